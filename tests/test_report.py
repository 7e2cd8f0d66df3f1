"""The report: what may share a table, what a difference is, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from src.callbacks.control import GRID_COLUMNS
from src.metrics.intervals import bootstrap_ci
from src.report.grids import plot_side_by_side
from src.report.rows import groups, read_rows
from src.report.tables import csv_text, markdown, paired_table
from src.types import UserError
from tests.conftest import ROOT, run_entry

COMMITTED = ROOT / "experiments" / "unicon_sd3_canny" / "results.json"


@pytest.fixture
def run(tmp_path):
    """run(name, scores, **changes) -> a run folder: the committed result with changes, and scores per image."""

    def make(name, scores=None, ids=None, **changes):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        raw = json.loads(COMMITTED.read_text()) | {"date": f"2026-01-0{len(name)}T00:00:00+00:00"} | changes
        (folder / "results.json").write_text(json.dumps(raw))
        if scores is not None:
            kept = {"ids": ids or [str(i) for i in range(len(scores))], "scores": {"canny_f1": list(scores)}}
            (folder / "outcome.json").write_text(json.dumps(kept))
        return folder

    return make


def cells(folder, seed, controlled):
    """Grid pictures of two scenes: the shared ones from `seed`, the controlled ones from `controlled`."""
    shared, own = np.random.default_rng(seed), np.random.default_rng(controlled)
    where = folder / "grids" / "cells-000032000"
    where.mkdir(parents=True)
    for scene in range(2):
        for column in range(len(GRID_COLUMNS)):
            draw = own if column > 2 else shared
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(where / f"{scene}-{column}.png")


def test_runs_under_unlike_conditions_never_share_a_table(run, tmp_path):
    run("a")
    run("bb", adapter="unicon_half")
    run("ccc", images_seen=64)
    flags = json.loads(COMMITTED.read_text())["flags"]
    run("dddd", flags=flags | {"guidance": 7.5})
    grouped = groups(read_rows([tmp_path / "runs"]))
    assert [sorted(r.folder.name for r in rows) for _, rows in grouped] == [["a", "bb"], ["ccc"], ["dddd"]]
    text = markdown(grouped)
    assert text.count("## embedded:sd3_tiny, canny") == 3
    assert "64 images in batches of 32" in text
    assert "guidance 7.5" in text


def test_differences_are_paired_over_images(run, tmp_path):
    rng = np.random.default_rng(0)
    easy = rng.uniform(0, 1, 50)  # scenes differ far more than methods do
    run("a", easy)
    run("bb", easy + 0.01 + rng.normal(0, 0.002, 50), adapter="unicon_half")
    rows = read_rows([tmp_path / "runs"])
    table = paired_table(rows)
    gap = rows[1].scores["canny_f1"] - rows[0].scores["canny_f1"]
    low, high = bootstrap_ci(gap)
    assert f"| unicon_half, seed 0 | {gap.mean():+.3f} [{low:+.3f}, {high:+.3f}] |" in table
    assert low > 0.005


def test_scores_of_other_images_are_not_paired(run, tmp_path):
    run("a", [0.1, 0.2])
    run("bb", [0.1, 0.2], ids=["x", "y"], adapter="unicon_half")
    assert paired_table(read_rows([tmp_path / "runs"])) == ""


def test_a_copy_of_a_run_is_counted_once(run, tmp_path):
    run("a")
    run("b", [0.1, 0.2])
    rows = read_rows([tmp_path / "runs", tmp_path / "runs" / "a"])
    assert [row.folder.name for row in rows] == ["b"]


def test_csv_holds_every_metric_of_every_run(run, tmp_path):
    run("a")
    rows = read_rows([tmp_path / "runs"])
    lines = csv_text(rows).splitlines()
    assert len(lines) == 1 + len(rows[0].result.metrics)
    assert f"canny_f1,{rows[0].result.metrics['canny_f1']['value']}" in lines[1]


def test_a_grid_shows_the_same_scenes_through_every_run(run, tmp_path):
    cells(run("a"), seed=1, controlled=2)
    cells(run("bb", adapter="unicon_half"), seed=1, controlled=3)
    rows = read_rows([tmp_path / "runs"])
    ((conditions, members),) = groups(rows)
    file = plot_side_by_side(conditions, members, tmp_path)
    assert file.name == "grid-sd3_tiny-canny.png"
    sheet = np.asarray(Image.open(file))
    shown = np.asarray(Image.open(rows[1].folder / "grids" / "cells-000032000" / "1-3.png")).repeat(2, 0).repeat(2, 1)
    windows = np.lib.stride_tricks.sliding_window_view(sheet, shown.shape)[..., 0, :, :, :]
    assert (windows == shown).all((-3, -2, -1)).any()


def test_runs_that_drew_other_scenes_are_refused(run, tmp_path):
    cells(run("a"), seed=1, controlled=2)
    cells(run("bb", adapter="unicon_half"), seed=9, controlled=3)
    ((conditions, members),) = groups(read_rows([tmp_path / "runs"]))
    with pytest.raises(UserError, match="different scenes or backbones in row 0"):
        plot_side_by_side(conditions, members, tmp_path)


def test_the_command_reads_the_committed_experiments(tmp_path):
    done = run_entry("report", f"runs=[{ROOT / 'experiments'}]", f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "## embedded:sd3_tiny, canny" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.csv").read_text().startswith("experiment,adapter,backbone")


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no results\.json below it; give folders"):
        read_rows([tmp_path])
