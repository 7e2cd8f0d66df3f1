"""The report: what is read, what may share a table, what a difference is, and what is refused."""

import csv
import functools
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from src.bench.measure import latencies
from src.config import load
from src.metrics.intervals import bootstrap_ci
from src.plots import GRID_COLUMNS, plot_grid, read_grid
from src.report import abstract
from src.report.__main__ import entry
from src.report.charts import Bar, Chart, Point, Series, Stack, curve_charts, predicted_chart, score_charts, stacks
from src.report.costs import cost_csv, memory_table, predicted_table, time_table
from src.report.dashboard import control_scores, define, definition, push, workspace
from src.report.figures import draw_charts, draw_stacks
from src.report.grids import sheets
from src.report.groups import cost_groups, groups, refuse_unlike
from src.report.names import named
from src.report.page import _chart
from src.report.pairs import paired_tables
from src.report.rows import Found, read_all, read_rows
from src.report.seeds import by_method, over_seeds, seed_table
from src.report.svg import ticks
from src.report.tables import csv_text, markdown_table, score_table
from src.report.write import score_section, write_report
from src.results import ResultError
from src.results.design import design_of
from src.types import UserError
from tests.conftest import ROOT, run_entry
from tests.report_rows import COMMITTED, cells, design, estimate, evaluation, make_cell, make_run, options


@pytest.fixture
def run(tmp_path):
    """run(name, scores, **changes) -> a run folder: the committed result with changes, and scores per image."""
    return functools.partial(make_run, tmp_path)


@pytest.fixture
def cell(tmp_path):
    """cell(name, **changes) -> a folder with the results.json of one cell of a benchmark."""
    return functools.partial(make_cell, tmp_path)


# ---- reading ----------------------------------------------------------------------------------------------------------


def test_a_copy_of_a_run_is_counted_once(run, tmp_path):
    run("a")
    run("b", [0.1, 0.2])
    rows = read_rows([tmp_path / "runs", tmp_path / "runs" / "a"])
    assert [row.folder.name for row in rows] == ["b"]


def test_kinds_are_told_apart(run, cell, tmp_path):
    run("a")
    cell("cost")
    evaluation(run("evaluated"))
    found = read_all([tmp_path / "runs"])
    assert [[row.place for row in kind] for kind in (found.trained, found.evaluated, found.costs)] == [
        ["runs/a"],
        ["runs/evaluated"],
        ["runs/cost"],
    ]
    assert "manifest cafecafecafecafe." in "\n".join(score_section(groups(found.evaluated)[0]))


def test_what_cannot_be_trusted_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"no results\.json below it; give folders"):
        read_rows([tmp_path])
    folder = run("a", kind="guess")
    with pytest.raises(ResultError, match="kind is 'guess', wanted train, evaluation or cost"):
        read_rows([folder])
    (folder / "results.json").write_text(COMMITTED.read_text())
    (folder / "outcome.json").write_text('{"ids": [')
    with pytest.raises(ResultError, match=r"outcome\.json is not JSON"):
        read_all([folder])


def test_a_file_of_any_name_can_be_given(run):
    folder = run("a")
    (folder / "results.json").rename(folder / "frozen.json")
    assert [row.place for row in read_rows([folder / "frozen.json"])] == ["frozen.json"]


# ---- groups -----------------------------------------------------------------------------------------------------------


def test_runs_under_unlike_conditions_never_share_a_table(run, tmp_path):
    run("a")
    run("bb", adapter="unicon_half")
    run("ccc", images_seen=64)
    flags = json.loads(COMMITTED.read_text())["flags"]
    run("dddd", flags=flags | {"guidance": 7.5})
    run("eeeee", precision="bf16-mixed", device="NVIDIA H200")
    grouped = groups(read_rows([tmp_path / "runs"]))
    assert [sorted(r.folder.name for r in g.rows) for g in grouped] == [["a", "bb"], ["ccc"], ["dddd"], ["eeeee"]]
    assert len({g.slug for g in grouped}) == len({g.title for g in grouped}) == 4
    text = "\n".join(part for g in grouped for part in score_section(g))
    assert text.count("## embedded:sd3_tiny, canny") == 4
    assert "64 images in batches of 32" in text
    assert "Not in the table of embedded:sd3_tiny, canny: images seen 64 instead of 32,000." in text
    assert "guidance 7.5 instead of 3.0." in text
    assert "precision bf16-mixed instead of 32-true; device NVIDIA H200 instead of cpu." in text
    with pytest.raises(UserError, match=r"runs/ccc differs from runs/a: images seen 64 instead of 32,000; give runs"):
        refuse_unlike(grouped)
    refuse_unlike(grouped[:1])


def test_cells_share_a_table_across_checkpointing_and_with_the_backbone_alone(cell, tmp_path):
    cell("a", flags={"optimizer": "torch.optim.AdamW"})
    cell("b", flags={"optimizer": "torch.optim.AdamW", "checkpointing": "both"}, adapter="controlnet")
    cell("c", flags={"optimizer": "torch.optim.AdamW", "compile": "all"})
    cell("d", adapter="none", trainable_m=0)
    cell("e", **estimate(), flags={"optimizer": "torch.optim.AdamW"})
    grouped = cost_groups(read_all([tmp_path / "runs"]).costs)
    assert [[r.place[5:] for r in g.rows] for g in grouped] == [["d", "a", "b"], ["c"], ["e"]]
    assert [r.label for r in grouped[0].rows] == ["backbone alone", "unicon", "controlnet, checkpointing both"]
    assert "compile all instead of none" in grouped[1].apart
    assert "mode estimate instead of measure" in grouped[2].apart


# ---- tables -----------------------------------------------------------------------------------------------------------


def test_differences_are_paired_over_images(run, tmp_path):
    rng = np.random.default_rng(0)
    easy = rng.uniform(0, 1, 50)  # scenes differ far more than methods do
    run("a", easy)
    run("bb", easy + 0.01 + rng.normal(0, 0.002, 50), adapter="unicon_half")
    rows = read_rows([tmp_path / "runs"])
    gap = rows[1].scores["canny_f1"] - rows[0].scores["canny_f1"]
    low, high = bootstrap_ci(gap)
    (table,) = paired_tables(rows)
    assert f"| unicon_half, seed 0 | {gap.mean():+.3f} [{low:+.3f}, {high:+.3f}] |" in markdown_table(table)
    assert low > 0.005
    proof = table.rows[0][1]
    assert (proof.runs, proof.n, proof.interval) == (("runs/bb", "runs/a"), 50, (low, high))


def test_scores_of_other_images_are_not_paired(run, tmp_path):
    run("a", [0.1, 0.2])
    run("bb", [0.1, 0.2], ids=["x", "y"], adapter="unicon_half")
    assert paired_tables(read_rows([tmp_path / "runs"])) == []


def test_every_number_knows_its_run_n_and_interval(run, tmp_path):
    run("a")
    (group,) = groups(read_rows([tmp_path / "runs"]))
    table = score_table(group)
    cell = table.rows[0][table.columns.index("canny_f1 \u2191")]
    m = group.rows[0].result.metrics["canny_f1"]
    assert (cell.value, cell.n, cell.interval, cell.runs) == (m["value"], 256, tuple(m["ci95"]), ("runs/a",))
    assert cell.text == "0.663 [0.641, 0.686]"
    assert "minus the no-control arm" in table.columns


def test_csv_holds_every_metric_of_every_run(run, tmp_path):
    run("a")
    rows = read_rows([tmp_path / "runs"])
    lines = csv_text(rows).splitlines()
    assert len(lines) == 1 + len(rows[0].result.metrics)
    assert f"canny_f1,{rows[0].result.metrics['canny_f1']['value']}" in lines[1]


def test_a_speed_is_shown_with_its_quartiles_or_not_at_all(run, tmp_path):
    run("a", img_per_s=80.0, img_per_s_quartiles=[72.0, 88.0])
    run("bb", img_per_s=90.0, img_per_s_quartiles=None)
    found = read_rows([tmp_path / "runs"])
    (group,) = groups(found)
    table = score_table(group)
    assert [row[-1].text for row in table.rows] == ["80.0 [72.0, 88.0]", ""]
    assert table.columns[-1] == "images/s, median and quartiles"
    lines = {(r["img_per_s"], r["img_per_s_low"], r["img_per_s_high"]) for r in csv.DictReader(csv_text(found).splitlines())}
    assert lines == {("80.0", "72.0", "88.0"), ("", "", "")}


def test_costs_as_tables(cell, tmp_path):
    nothing = dict.fromkeys(
        ("peak_mem_gib", "peak_when", "memory_gib", "saved_gib", "phases_gib", "flops", "step_time_ms", "img_per_s", "mfu")
    )
    cell("a")
    cell("b", **nothing, status="oom", adapter="controlnet")
    cell("c", **estimate())
    found = read_all([tmp_path / "runs"])
    measured, estimated = cost_groups(found.costs)
    memory, time = markdown_table(memory_table(measured)), markdown_table(time_table(measured))
    assert "| unicon | 3.6 | 8.750 | 0.500 | 0.750 | 1.000 | 1.250 | 1.500 | 1.750 | 2.000 | backward |" in memory
    assert "| controlnet | 3.6 | out of memory |" in memory
    assert "| 10.00 [9.00, 11.00] |" in time
    assert "| 100.00 [90.91, 111.11] | 25.0% [22.7%, 27.8%] |" in time
    assert "| \u2265 5.00 |" in markdown_table(time_table(estimated))
    told = markdown_table(predicted_table(found.costs))
    assert "| 8.500 | 8.750 | -2.9 % |" in told
    assert "| 8.500 | out of memory |" in told
    lines = cost_csv(found.costs).splitlines()
    assert sum(",peak_mem_gib," in line for line in lines) == 3
    assert any("step_time_ms.total,5.0,,,,ms,True" in line for line in lines)


def test_seeds_are_averaged_with_students_interval(run, tmp_path):
    values = {"a": 0.60, "bb": 0.66, "ccc": 0.63}
    for seed, (name, value) in enumerate(values.items()):
        metrics = {
            "canny_f1": {"value": value, "n": 256, "unit": "fraction", "better": "higher", "ci95": [value - 0.02, value + 0.02]}
        }
        run(name, seed=seed, metrics=metrics)
        run(f"half-{name}", seed=seed, metrics=metrics, adapter="unicon_half")
    rows = read_rows([tmp_path / "runs"])
    half = 4.303 * 0.03 / np.sqrt(3)  # t with 2 degrees of freedom; the standard deviation of the three is 0.03
    mean, (low, high) = over_seeds(list(values.values()))
    assert (mean, low, high) == pytest.approx((0.63, 0.63 - half, 0.63 + half))
    table = markdown_table(seed_table(rows))
    assert f"| unicon | 3 | 0.630 [{low:.3f}, {high:.3f}] | 0.600 to 0.660 |" in table
    assert "| unicon_half | 3 |" in table
    assert "+0.000 [+0.000, +0.000] |" in table  # the same scores at the same seeds
    assert seed_table(rows[:1]) is None
    assert over_seeds([0.5]) == (0.5, None)


def test_forms_of_one_adapter_are_told_apart(run, tmp_path):
    def config(seed, **adapter):
        return {"seed": seed, "adapter": {"name": "unicon", **adapter}, "hardware": {"threads": seed}, "output_dir": f"o{seed}"}

    for seed in (0, 1):
        run(f"a{seed}", seed=seed, config_sha="a", config=config(seed, copy="full", flow="unidirectional"))
        run(f"b{seed}", seed=seed, config_sha="b", config=config(seed, copy="decoder", flow="unidirectional"))
    names = [row.name for row in named(read_rows([tmp_path / "runs"]))]
    assert names == ["unicon copy=full", "unicon copy=full", "unicon copy=decoder", "unicon copy=decoder"]


def test_forms_without_a_configuration_go_by_their_experiment(run, tmp_path):
    run("a", experiment="first")
    run("bb", experiment="second")
    run("ccc", adapter="unicon_half")
    assert [row.name for row in named(read_rows([tmp_path / "runs"]))] == ["unicon (first)", "unicon (second)", "unicon_half"]


# ---- pictures and charts ----------------------------------------------------------------------------------------------


def test_a_sheet_shows_the_same_scenes_through_every_run(run, tmp_path):
    cells(run("a"), seed=1, controlled=2)
    cells(run("bb", adapter="unicon_half"), seed=1, controlled=3)
    rows = read_rows([tmp_path / "runs"])
    (sheet,) = sheets(rows)
    assert sheet.columns == ["source", "condition", "no control", "unicon, seed 0", "unicon_half, seed 0"]
    shown = np.asarray(Image.open(rows[1].folder / "grids" / "cells-000032000" / "1-3.png"))
    assert np.array_equal(sheet.cells[1][4], shown)
    drawn = np.asarray(Image.open(sheet.save(tmp_path / "sheet.png")))
    windows = np.lib.stride_tricks.sliding_window_view(drawn, (16, 16, 3))[..., 0, :, :, :]
    assert (windows == shown.repeat(2, 0).repeat(2, 1)).all((-3, -2, -1)).any()


def test_runs_that_drew_other_scenes_get_a_sheet_of_their_own(run, tmp_path):
    cells(run("a"), seed=1, controlled=2)
    cells(run("bb", adapter="unicon_half"), seed=9, controlled=3)
    found = sheets(read_rows([tmp_path / "runs"]))
    assert [[row.place for row in sheet.runs] for sheet in found] == [["runs/a"], ["runs/bb"]]
    assert found[0].columns[-2:] == ["wrong condition", "its output"]


def test_evaluations_share_a_table_by_their_manifest_and_show_their_pictures(run, tmp_path):
    rng = np.random.default_rng(0)
    for folder in (tmp_path / "runs" / "set", run("a"), run("b")):
        for arm in ("image", "condition") if folder.name == "set" else ("right", "no_condition", "wrong_condition"):
            (folder / arm).mkdir(parents=True)
            for scene in range(8):
                picture = np.random.default_rng(scene) if arm == "no_condition" else rng
                Image.fromarray(picture.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / arm / f"{scene:05d}.png")
    few = {"fid_scenes": {"value": 40.0, "n": 8, "unit": "", "better": "lower", "ci95": [30.0, 50.0], "small_n": True}}
    evaluation(tmp_path / "runs" / "a", images_seen=9600)
    evaluation(tmp_path / "runs" / "b", adapter="unicon_half", seed=None, images_seen=None, config_sha=None)
    found = read_all([tmp_path / "runs"])
    (group,) = groups(found.evaluated)
    assert [row.label for row in group.rows] == ["unicon, seed 0", "unicon_half"]
    assert "| 9,600 |" in markdown_table(score_table(group))
    (sheet,) = sheets(group.rows)
    assert np.array_equal(sheet.cells[2][4], np.asarray(Image.open(tmp_path / "runs" / "b" / "right" / "00002.png")))
    (alone,) = sheets(group.rows[:1])
    other = np.asarray(Image.open(tmp_path / "runs" / "set" / "condition" / "00006.png"))  # half the set away from row 2
    assert np.array_equal(alone.cells[2][alone.columns.index("wrong condition")], other)
    evaluation(tmp_path / "runs" / "b", manifest="f00d" * 4, metrics=few)
    one, two = groups(read_all([tmp_path / "runs"]).evaluated)
    assert "manifest f00df00df00df00d instead of cafecafecafecafe" in two.apart
    assert "| 40.00 (small n) [30.00, 50.00] |" in markdown_table(score_table(two))
    assert any("n = 8 images" in line for line in abstract.limits(Found([], two.rows, []), [], [two]))


def test_a_sheet_is_read_back_exactly(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [[rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in GRID_COLUMNS] for _ in range(3)]
    plot_grid(pictures, GRID_COLUMNS, tmp_path / "grid.png", row_titles=["a small ball"] * 3)
    assert np.array_equal(read_grid(tmp_path / "grid.png", GRID_COLUMNS), pictures)
    assert read_grid(tmp_path / "grid.png", GRID_COLUMNS[:5]) is None
    plot_grid(pictures, GRID_COLUMNS, tmp_path / "bare.png")
    assert read_grid(tmp_path / "bare.png", GRID_COLUMNS) is None
    with Image.open(tmp_path / "grid.png") as image:
        image.rotate(0.5).save(tmp_path / "turned.png")
    assert read_grid(tmp_path / "turned.png", GRID_COLUMNS) is None


def test_a_committed_experiment_shows_its_pictures():
    (sheet,) = sheets(read_rows([COMMITTED.parent]))
    assert (len(sheet.cells), len(sheet.cells[0]), sheet.cells[0][0].shape) == (6, 6, (64, 64, 3))
    assert sheet.ids[0] == "scene-1-0"


def test_curves_count_seconds_of_training_alone(run, tmp_path):
    folder = run("a", config={"validation": {"images": 32}})
    rows = [{"images_seen": i, "time_s": 9 * i, "train/seconds": i / 100} for i in (100, 200, 300, 400)]
    rows += [{"images_seen": i, "time_s": 9 * i, "val/canny_f1": i / 1000} for i in (200, 350)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (group,) = groups(read_rows([folder]))
    images, seconds = curve_charts(group)
    assert [(p.x, p.y) for p in images.series[0].points] == [(200, 0.2), (350, 0.35)]
    assert [(p.x, p.y) for p in seconds.series[0].points] == [(2.0, 0.2), (3.5, 0.35)]
    assert images.note.startswith("Scored on 32 held-out images, the first of the n = 256 of the table.")


def test_the_last_point_of_a_curve_is_of_the_same_images_as_the_others(run):
    scores = np.linspace(0, 1, 256)
    folder = run("a", scores, config={"validation": {"images": 32}})
    rows = [{"images_seen": i, "val/canny_f1": i / 64_000} for i in (8_000, 16_000, 32_000)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (group,) = groups(read_rows([folder]))
    (images,) = curve_charts(group)
    assert [p.y for p in images.series[0].points] == pytest.approx([0.125, 0.25, scores[:32].mean()])
    (folder / "outcome.json").unlink()  # what cannot be told is left out
    (group,) = groups(read_rows([folder]))
    assert [p.x for p in curve_charts(group)[0].series[0].points] == [8_000, 16_000]


def test_a_benchmark_is_joined_to_runs_of_the_same_adapter_alone(run, cell, tmp_path):
    run("a", config={"adapter": {"name": "unicon", **options("unicon")}})  # from before results had their design
    run("bb", adapter="unicon_half", design=design("unicon_half"))
    cell("b-unicon")
    cell("b-half", adapter="unicon_half", peak_mem_gib=8.75)
    cell("b-other", adapter="unicon_half", resolution=512)
    found = read_all([tmp_path / "runs"])
    (group,) = groups(found.trained)
    group.rows = named(group.rows)
    charts = {chart.x: chart for chart in score_charts(group, found.costs)}
    memory = charts["peak memory, GiB"]
    assert [(s.name, s.points[0].x) for s in memory.series] == [("unicon", 8.75), ("unicon_half", 8.75)]
    assert "measured, batch 4, 32-true, cpu, checkpointing none" in memory.note
    run("ccc", config={"adapter": {"name": "unicon", **options("unicon", copy="decoder")}})
    (group,) = groups(read_rows([tmp_path / "runs" / name for name in ("a", "ccc")]))
    group.rows = named(group.rows)
    assert "peak memory, GiB" not in {c.x for c in score_charts(group, found.costs)}  # one method is no comparison
    cell("b-decoder", adapter_options=options("unicon", copy="decoder"), peak_mem_gib=8.75)
    memory = {c.x: c for c in score_charts(group, read_all([tmp_path / "runs"]).costs)}["peak memory, GiB"]
    assert [s.name for s in memory.series if s.points] == ["unicon copy=full", "unicon copy=decoder"]


def test_the_options_that_a_benchmark_writes_are_those_of_a_trainings_design(run, cell, tmp_path):
    """Both from their own configurations: a row of `src.bench` holds every key of the adapter's yaml."""
    from src.bench.cell import _options

    for name, adapter in (("a", "unicon"), ("bb", "unicon_half")):
        cell(f"cell-{name}", adapter=adapter, adapter_options=_options(load("bench", [f"adapter={adapter}"])))
        run(name, adapter=adapter, design=design_of(load("train", [f"adapter={adapter}", "optimizer.algorithm.lr=1e-3"])))
    found = read_all([tmp_path / "runs"])
    (group,) = groups(found.trained)
    group.rows = named(group.rows)
    charts = {chart.x: chart for chart in score_charts(group, found.costs)}
    points = {s.name: s.points[0].x for s in charts["operations of training, TFLOP"].series}
    per_image = (6e9 / 4 + 4e9 / 32) / 1e12  # of the made-up cell: 1 + 2 + 3 in batches of 4, and 4 for each step of 32
    assert points == pytest.approx(dict.fromkeys(("unicon", "unicon_half"), 32000 * per_image))
    assert "measured, batch 4" in charts["operations of training, TFLOP"].note


def test_curves_and_evaluations_stand_against_operations_and_seconds_of_training(run, cell, tmp_path):
    cell("cost")
    cell("cost-half", adapter="unicon_half")
    looks = {"fid_scenes": {"value": 40.0, "n": 8, "unit": "", "better": "lower", "ci95": None, "small_n": True}}
    for name, adapter in (("a", "unicon"), ("bb", "unicon_half")):
        folder = run(name, adapter=adapter, design=design(adapter), config_sha=adapter, train_seconds=100.0 * len(name))
        rows = [{"images_seen": n, "train/seconds": n / 100, "val/canny_f1": 0.5} for n in (3200, 6400)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        metrics = json.loads(COMMITTED.read_text())["metrics"] | looks
        evaluation(
            run(f"e{name}"), adapter=adapter, config_sha=adapter, design=design(adapter), metrics=metrics, images_seen=6400
        )
    found = read_all([tmp_path / "runs"])
    (trained,), (evaluated,) = groups(found.trained), groups(found.evaluated)
    per_image = (6e9 / 4 + 4e9 / 32) / 1e12  # of the made-up cell: 1 + 2 + 3 in batches of 4, and 4 for each step of 32
    curves = {chart.x: chart for chart in curve_charts(trained, found.costs)}
    assert [s.name for s in curves["images seen"].series] == ["unicon, seed 0", "unicon_half, seed 0"]
    assert [p.x for p in curves["operations of training, TFLOP"].series[0].points] == pytest.approx(
        [3200 * per_image, 6400 * per_image]
    )
    charts = {chart.title: chart for chart in score_charts(evaluated, found.costs, found.trained)}
    assert [s.points[0].x for s in charts["fid_scenes against seconds of training"].series] == [100, 200]
    assert [s.points[0].x for s in charts["canny_f1 against seconds of training"].series] == [100, 200]
    whole = charts["fid_scenes against operations of training"].series[0].points[0]
    assert (whole.x, whole.y) == (pytest.approx(6400 * per_image), 40)
    assert "fid_scenes against peak memory" not in charts  # how it looks is told against the cost of the training alone


# ---- designs, data, seeds ---------------------------------------------------------------------------------------------


def test_ablations_are_joined_over_seeds_without_their_configurations(run, tmp_path):
    for copy in ("full", "decoder"):
        for seed in range(3):
            same = {"design": design("unicon", copy=copy), "seed": seed, "config_sha": f"{copy}{seed}"}
            run(f"{copy}{seed}", **same)
            evaluation(run(f"e{copy}{seed}"), **same)
    found = read_all([tmp_path / "runs"])
    for (group,) in (groups(found.trained), groups(found.evaluated)):
        methods = by_method(named(group.rows))
        assert {name: sorted(seeds) for name, seeds in methods.items()} == {
            "unicon copy=full": [0, 1, 2],
            "unicon copy=decoder": [0, 1, 2],
        }


def test_an_evaluation_without_a_design_takes_that_of_its_training(run, tmp_path):
    for copy in ("full", "decoder"):
        run(copy, design=design("unicon", copy=copy), config_sha=copy)
        evaluation(run(f"e{copy}"), config_sha=copy)
    (group,) = groups(read_all([tmp_path / "runs"]).evaluated)
    assert sorted(row.name for row in named(group.rows)) == ["unicon copy=decoder", "unicon copy=full"]


def test_unlike_data_never_share_a_table(run, tmp_path):
    run("a", data={"name": "scenes", "world_seed": 0})
    run("bb", data={"name": "scenes", "world_seed": 1}, adapter="unicon_half")
    first, second = groups(read_rows([tmp_path / "runs"]))
    assert "data name scenes, world_seed 1 instead of name scenes, world_seed 0" in second.apart
    assert "Data: name scenes, world_seed 0." in "\n".join(score_section(first))


def test_learning_rates_that_differ_are_a_column(run, tmp_path):
    run("a", design=design("unicon"))
    run("bb", adapter="controlnet", design=design("controlnet", learning_rate=5e-4))
    (group,) = groups(read_rows([tmp_path / "runs"]))
    table = score_table(group)
    assert [row[table.columns.index("learning rate")].text for row in table.rows] == ["0.002", "0.0005"]
    assert "recipe" not in table.columns
    assert any(
        "differ in learning rate, which is part" in line for line in abstract.limits(Found(group.rows, [], []), [group], [])
    )
    (alone,) = groups(read_rows([tmp_path / "runs" / "a"]))
    assert "learning rate" not in score_table(alone).columns


def test_every_score_has_its_interval_its_seed_mean_and_its_pairs(run, tmp_path):
    rng = np.random.default_rng(0)
    for seed in range(2):
        for adapter in ("unicon", "unicon_half"):
            folder = run(f"{adapter[6:]}{seed}", rng.uniform(0, 1, 9), adapter=adapter, seed=seed, noise_seed=0)
            kept = json.loads((folder / "outcome.json").read_text())
            kept["scores"]["val_loss"] = rng.uniform(0, 1, 9).tolist()
            (folder / "outcome.json").write_text(json.dumps(kept))
    (group,) = groups(read_rows([tmp_path / "runs"]))
    m = group.rows[0].result.metrics["val_loss"]
    said = f"{m['value']:.3f} [{m['ci95'][0]:.3f}, {m['ci95'][1]:.3f}]"
    assert said in markdown_table(score_table(group))
    seeds = seed_table(group.rows)
    assert seeds.rows[1][seeds.columns.index("val_loss \u2193")].value == pytest.approx(m["value"])
    assert "All seeds share the held-out images and the noise they are drawn from." in seeds.about
    control, loss = paired_tables(group.rows)
    assert (control.fold, loss.fold) == ("", "val_loss: paired differences")
    assert "drawn from the same noise" in control.about
    gap = group.rows[1].scores["val_loss"] - group.rows[0].scores["val_loss"]
    assert loss.rows[0][1].value == pytest.approx(gap.mean())
    assert loss.rows[0][1].interval == tuple(bootstrap_ci(gap))


def test_trainings_of_other_seeds_share_noise_only_if_they_say_so(run, tmp_path):
    for seed in range(2):
        run(f"a{seed}", [0.1, 0.2, 0.3], seed=seed)
    rows = read_rows([tmp_path / "runs"])
    assert [row.noise_seed for row in rows] == [0, 1]  # from before the noise had a seed of its own
    assert "noise of their own" in paired_tables(rows)[0].about
    assert seed_table(rows).about.endswith("All seeds share the held-out images.")


def test_seeds_of_one_noise_stand_in_one_sheet(run, tmp_path):
    for seed in range(2):
        cells(run(f"a{seed}", seed=seed, noise_seed=0), seed=7, controlled=seed)
    (sheet,) = sheets(read_rows([tmp_path / "runs"]))
    assert sheet.columns[-2:] == ["unicon, seed 0", "unicon, seed 1"]


def test_differences_of_sets_are_those_of_the_comparison_turned_around_if_need_be(run, tmp_path):
    looks = {"fid_scenes": {"value": 40.0, "n": 8, "unit": "d", "better": "lower", "ci95": None, "small_n": True}}
    metrics = json.loads(COMMITTED.read_text())["metrics"] | looks
    for name in ("a", "b"):
        evaluation(run(name, [0.1, 0.2, 0.4]), adapter=f"method_{name}", metrics=metrics)
    found = read_all([tmp_path / "runs"])
    (group,) = groups(found.evaluated)
    (alone,) = paired_tables(group.rows, found.compared)
    assert "Of fid_scenes: python -m src.evaluate compare=" in alone.about
    gap = {"value": 3.0, "n": 8, "unit": "d", "better": "lower", "ci95": [1.0, 6.0]}
    subjects = [{"label": name, "hash": name} for name in ("a", "b")]
    made = {"kind": "comparison", "manifest": "cafe" * 4, "subjects": subjects}
    pair = {"of": "a, method_a", "minus": "b, method_b", "metrics": {"fid_scenes": gap}}
    for manifest, shown in (("cafe" * 4, True), ("f00d" * 4, False)):
        (tmp_path / "runs" / "comparison.json").write_text(json.dumps(made | {"manifest": manifest, "pairs": [pair]}))
        tables = paired_tables(group.rows, read_all([tmp_path / "runs"]).compared)
        assert len(tables) == 1 + shown
    (tmp_path / "runs" / "comparison.json").write_text(json.dumps(made | {"pairs": [pair]}))
    _, fid = paired_tables(group.rows, read_all([tmp_path / "runs"]).compared)
    assert [cell.text for cell in fid.rows[0]] == ["method_b, seed 0", "-3.000 [-6.000, -1.000]"]


def test_the_csv_says_what_a_number_may_be_compared_with(run, tmp_path):
    looks = {"fid_scenes": {"value": 40.0, "n": 8, "unit": "d", "better": "lower", "ci95": None, "small_n": True}}
    metrics = json.loads(COMMITTED.read_text())["metrics"] | looks
    evaluation(run("a"), metrics=metrics, config_sha="abc", design=design("unicon"))
    rows = list(csv.DictReader(csv_text(named(read_all([tmp_path / "runs"]).evaluated)).splitlines()))
    (fid,) = [row for row in rows if row["metric"] == "fid_scenes"]
    assert (fid["small_n"], fid["subject"], fid["manifest"], fid["config_sha"]) == ("True", "a", "cafe" * 4, "abc")
    assert (fid["method"], fid["learning_rate"], fid["recipe"]) == ("unicon", "0.002", "fair")
    assert all(row["small_n"] == "" for row in rows if row is not fid)


def test_latency_has_a_column_and_a_line(cell, tmp_path):
    measured = latencies([4.0, 5.0, 6.0], [2.0, 2.0, 2.0], 20)  # as the benchmark takes them, of batches of 4
    cell("a", what="inference", sampling={"steps": 20, "guidance": 3.0, "batch": 8}, latency_ms=measured)
    found = read_all([tmp_path / "runs"])
    (group,) = cost_groups(found.costs)
    table = time_table(group)
    shown = {title: row.text for title, row in zip(table.columns, table.rows[0], strict=True) if title.startswith("latency")}
    assert shown == {
        "latency of a condition, ms": "5.00 [4.50, 5.50]",
        "latency of a step, ms": "2.00 [2.00, 2.00]",
        "latency of a batch, ms": "45.00 [44.50, 45.50]",
        "latency per image, ms": "11.25 [11.12, 11.38]",
    }
    assert "latency_ms.batch,45.0,44.5,45.5,3,ms" in cost_csv(found.costs)
    cell("b")
    (other,) = cost_groups(read_all([tmp_path / "runs" / "b"]).costs)
    assert not [title for title in time_table(other).columns if "latency" in title]


def test_seeds_of_a_method_have_one_line_in_a_legend(run, tmp_path):
    for seed in range(2):
        folder = run(f"a{seed}", seed=seed)
        rows = [{"images_seen": n, "val/canny_f1": 0.5} for n in (3200, 6400)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (group,) = groups(read_rows([tmp_path / "runs"]))
    (chart,) = curve_charts(group)
    assert [s.name for s in chart.series] == ["unicon", "unicon"]
    assert [s.points[0].tip[:14] for s in chart.series] == ["unicon, seed 0", "unicon, seed 1"]
    assert len(_chart(chart)["legend"]) == 1
    assert "trained parameters, millions" not in {c.x for c in score_charts(group)}  # one method, at one cost


def test_stacks_add_up(cell, tmp_path):
    cell("a")
    (group,) = cost_groups(read_all([tmp_path / "runs"]).costs)
    memory, operations, time = stacks(group)
    assert memory.bars[0].total == pytest.approx(group.rows[0].result.peak_mem_gib)
    assert operations.bars[0].total == pytest.approx(10)
    assert (time.bars[0].total, time.bars[0].low, time.bars[0].high) == (60, 36, 44)
    (point,) = predicted_chart(group.rows).series[0].points
    assert (point.x, point.y) == (8.5, 8.75)


def test_figures_are_the_same_bytes_twice(tmp_path):
    chart = Chart("score", "GiB", "f1", (Series("a", (Point(1, 2, 1, 3),), 0), Series("b", (Point(2, 3),), 1)))
    stack = Stack("memory", "GiB", (Bar("a", (("weights", 1.0), ("activations", 2.0)), 2.5, 3.5),), ("weights", "activations"))
    for number in "12":
        draw_charts([chart], tmp_path / f"chart{number}")
        draw_stacks([stack], tmp_path / f"stack{number}", "cost")
    for name in ("chart", "stack"):
        for ending in ("png", "svg"):
            first, second = ((tmp_path / f"{name}{number}.{ending}").read_bytes() for number in "12")
            assert first == second
            assert len(first) > 5000


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.38, 3.45), (826, 32000), (-0.004, 0.003), (0.8301, 0.8302)])
@pytest.mark.parametrize("most", [3, 4, 7])
def test_ticks_are_round_few_and_inside(low, high, most):
    found = ticks(low, high, most)
    assert 1 <= len(found) <= most
    assert len(found) >= 2 or most == 3
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


# ---- the abstract -----------------------------------------------------------------------------------------------------


def test_the_abstract_says_who_leads_and_whether_that_is_certain(run, tmp_path):
    rng = np.random.default_rng(0)
    easy = rng.uniform(0, 1, 200)
    for name, gap, noise, adapter in (("a", 0, 0, "unicon"), ("bb", 0.02, 0.3, "near"), ("ccc", 0.1, 0.01, "far")):
        scores = easy + gap + rng.normal(0, noise, 200)
        value = {"n": 200, "unit": "rmse", "better": "lower", "ci95": None, "value": float(scores.mean())}
        run(name, scores, adapter=adapter, metrics={"canny_f1": value})
    (group,) = groups(read_rows([tmp_path / "runs"]))
    said = abstract.leader(group)
    assert "unicon, seed 0 has the best canny_f1" in said
    assert "ahead of far, seed 0 (-0.1" in said
    assert "cannot be told apart from near, seed 0" in said
    limits = abstract.limits(Found(group.rows, [], []), [group], [])
    assert any(line.startswith("Differences are judged one by one") for line in limits)


def test_the_abstract_says_what_cannot_be_concluded(run, cell, tmp_path):
    few = json.loads(COMMITTED.read_text())["metrics"]["canny_f1"] | {"n": 32}
    run("a", metrics={"canny_f1": few}, git_dirty=True)
    run("b", metrics={"canny_f1": few}, adapter="unicon_half", trainable_m=1.7, command="another")  # at the same time as a
    cell("cost", **estimate())
    found = read_all([tmp_path / "runs"])
    said = " ".join(abstract.limits(found, groups(found.trained), []))
    for words in (
        "Every method was trained with one seed.",
        "2 runs stood on n = 32 images: only large differences show.",
        "(1.70 to 3.61 million)",
        "sd3_tiny: small networks",
        "2 of 2 runs overlapped in time",
        "Estimated costs were computed, not seen",
        "1 row came from code with uncommitted changes",
    ):
        assert words in said
    assert "FID" not in said


def test_nothing_is_said_that_the_rows_do_not_hold(run, tmp_path):
    whole = json.loads(COMMITTED.read_text())
    backbone = whole["backbone"] | {"id": "stabilityai/stable-diffusion-3-medium-diffusers"}
    for seed in range(3):
        run(f"a{'b' * seed}", seed=seed, backbone=backbone)
    found = read_all([tmp_path / "runs"])
    said = abstract.limits(Found(found.trained, [], []), groups(found.trained), [])
    assert said == ["Seconds and images per second are as the runs took them; what else ran on the machine is not recorded."]


# ---- the entry and the dashboard --------------------------------------------------------------------------------------


def test_the_command_reads_the_committed_experiments(tmp_path):
    folders = [str(ROOT / "experiments" / f"{a}_sd3_canny") for a in ("unicon", "unicon_half", "dit_controlnet")]
    done = run_entry("report", f"runs=[{','.join(folders)}]", f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "## embedded:sd3_tiny, canny" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.csv").read_text().startswith("experiment,adapter,backbone")
    assert (tmp_path / "report.html").stat().st_size < 3e6
    assert (tmp_path / "score-sd3_tiny-canny.svg").is_file()
    assert (tmp_path / "grid-sd3_tiny-canny.png").is_file()


def test_one_table_of_unlike_rows_is_refused_before_anything_is_written(run, tmp_path):
    run("a")
    run("bb", images_seen=64)
    with pytest.raises(UserError, match="images seen 64 instead of 32,000"):
        write_report([tmp_path / "runs"], tmp_path / "out", one_table=True)
    assert not (tmp_path / "out").exists()


def test_help_and_refusals_load_nothing_heavy():
    heavy = ("pytorch_lightning", "diffusers", "transformers", "matplotlib", "wandb", "jinja2.environment")
    code = f"import src.report.__main__, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_dashboard_is_plain_data_over_keys_that_runs_log(tmp_path, capsys):
    cfg = load("report_wandb", [f"out={tmp_path}", f"runs=[{COMMITTED.parent}]"])
    made = json.loads(define(cfg).read_text())
    assert "wandb login, then python -m src.report wandb project=controlbench push=true" in capsys.readouterr().out
    panels = [panel for section in made["sections"] for panel in section["panels"]]
    assert {panel["kind"] for panel in panels} == {"line", "scatter", "bar", "media"}
    logged = (ROOT / "src" / "callbacks" / "meter.py").read_text() + (ROOT / "src" / "callbacks" / "control.py").read_text()
    keys = {key for panel in panels for key in panel["y"] if isinstance(panel["y"], list)}
    assert {key for key in keys if key.startswith("val/canny_f1")} >= {"val/canny_f1", "val/canny_f1/wrong_condition"}
    assert all(f'"{key}"' in logged for key in keys if not key.startswith(("val/canny_f1", "eval/", "cost/")))


def test_the_dashboard_shows_what_evaluations_and_benchmarks_log(run, cell, tmp_path):
    from src.loggers.results import scalars

    looks = {"fid_scenes": {"value": 40.0, "n": 8, "unit": "d", "better": "lower", "ci95": None, "small_n": True}}
    evaluation(run("a"), metrics=json.loads(COMMITTED.read_text())["metrics"] | looks)
    cell("b")
    found = read_all([tmp_path / "runs"])
    sent = {key for row in (*found.evaluated, *found.costs) for key, _ in scalars(row.result)}
    made = definition("ControlBench", "controlbench", None, {"canny": "canny_f1"})
    panels = {section["name"]: [p["y"][0] for p in section["panels"]] for section in made["sections"]}
    assert panels["evaluations"] == ["eval/canny_f1", "eval/fid", "eval/fid_scenes"]
    assert {*panels["evaluations"], *panels["benchmarks"]} - sent == {"eval/fid"}  # which wants Inception


def test_the_dashboard_knows_every_task():
    found = control_scores([])
    assert found.keys() == {file.stem for file in (ROOT / "conf" / "task").glob("*.yaml")}
    assert found["canny"] == "canny_f1"


def test_the_definition_becomes_a_workspace():
    pytest.importorskip("wandb_workspaces", reason="the extra `dashboards` is not installed")
    made = definition("ControlBench", "controlbench", "somebody", {"canny": "canny_f1"})
    space = workspace(made)
    assert [section.name for section in space.sections] == [section["name"] for section in made["sections"]]
    lines = [panel for section in space.sections for panel in section.panels if hasattr(panel, "x")]
    assert {str(panel.x) for panel in lines} >= {"images_seen", "RelativeTime(Process)"}


def test_pushing_without_a_key_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("wandb_workspaces", reason="the extra `dashboards` is not installed")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match="push=true: no key for"):
        push(load("report_wandb", [f"out={tmp_path}", "push=true"]))
    assert not (tmp_path / "dashboard.json").exists()


def test_a_misspelt_verb_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        entry(["wandbb"])
    assert refused.value.code == 2
    assert "wandbb is no verb of src.report; did you mean wandb?" in capsys.readouterr().err
