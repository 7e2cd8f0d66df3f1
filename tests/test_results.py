"""Results: refusals name the field, files are replaced in one step; statistics and pictures."""

import json
import math
import os
import subprocess
import sys
import types
from datetime import UTC, datetime

import numpy as np
import pytest
from PIL import Image

from src.metrics.intervals import bootstrap_ci, metric
from src.plots import plot_curves, plot_grid, plot_loss_curve
from src.results import (
    Result,
    ResultError,
    command_line,
    environment,
    git_state,
    hide_secrets,
    kind_of,
    read_cost,
    read_results,
    read_rows,
    write_cost,
    write_results,
)
from src.results.cost import FLAGS, FLOPS, MEMORY, PHASES
from src.types import UserError

DELETED = object()


def fields() -> dict:
    """A result as it should be."""
    score = {"value": 0.5, "n": 256, "unit": "", "better": "higher", "ci95": [0.45, 0.55]}
    return {
        "schema_version": 1,
        "experiment": "unicon_sd3_canny",
        "adapter": "unicon",
        "backbone": {"id": "embedded:sd3_tiny", "revision": "none", "hash": "ab12"},
        "task": "canny",
        "seed": 0,
        "images_seen": 32000,
        "effective_batch": 32,
        "trainable_m": 1.5,
        "frozen_m": 3.25,
        "trainable_parts_m": {"copy": 1.0, "connectors": 0.5},
        "step_time_ms": 12.5,
        "img_per_s": 80.0,
        "peak_mem_gib": None,
        "device": "cpu",
        "precision": "32-true",
        "flags": {"checkpointing": False, "micro_batch": 8},
        "metrics": {"canny_f1": score},
        "config_sha": "0123456789abcdef",
        "git_sha": "unknown",
        "versions": environment(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m src.train +experiment=unicon_sd3_canny",
        "resolution": 64,
        "train_seconds": 400.0,
        "arms": {"wrong_condition": {"canny_f1": {**score, "value": 0.1, "ci95": None}}},
    }


def cost_fields(mode: str = "measure") -> dict:
    """A cost as it should be."""
    memory = {name: float(n) for n, name in enumerate(MEMORY)}
    spread = {"median": 2.0, "quartiles": [1.5, 2.5], "n": 20}
    times = dict.fromkeys(PHASES, spread) if mode == "measure" else dict.fromkeys(PHASES, 1.0) | {"bound": True}
    nothing = ("device_memory_gib", "arithmetic_ms", "mfu", "latency_ms", "sampling", "rates", "predicted")
    flags = dict.fromkeys(FLAGS, "none") | {"precision": "bf16-mixed", "micro_batch": 8}
    same = ("trainable_m", "frozen_m", "trainable_parts_m", "seed", "git_sha", "versions", "date", "resolution")
    return {
        **{name: value for name, value in fields().items() if name in same},
        **dict.fromkeys(nothing),
        "kind": "cost",
        "mode": mode,
        "what": "training",
        "status": "done",
        "adapter": "unicon",
        "adapter_options": {"copy": "full", "blocks": None},
        "backbone": {"name": "sd3_medium", "id": "random:sd3_medium", "revision": "random"},
        "hardware": "h200",
        "device": "NVIDIA H200",
        "batch": 8,
        "precision": "bf16-mixed",
        "peak_mem_gib": sum(memory.values()),
        "peak_when": "forward",
        "memory_gib": memory,
        "saved_gib": 3.0,
        "phases_gib": {"forward": 21.0},
        "flops": dict.fromkeys((*FLOPS, "recomputed", "condition"), 10),
        "step_time_ms": times,
        "img_per_s": 4.0,
        "flags": flags,
        "command": "python -m src.bench",
    }


def changed(path: str, value, make=fields) -> dict:
    """The good result with one field set, or deleted where value is DELETED."""
    result = place = make()
    *outer, last = path.split(".")
    for name in outer:
        place = place[name]
    if value is DELETED:
        del place[last]
    else:
        place[last] = value
    return result


def test_write_and_read(tmp_path):
    path = tmp_path / "run" / "results.json"
    good = fields() | {"trainable_m": np.float64(1.5), "images_seen": np.int64(32000)}
    write_results(path, good)
    result = read_results(path)
    assert isinstance(result, Result)
    assert result.metrics["canny_f1"]["n"] == 256
    assert result.images_seen == 32000
    write_results(path, result)
    assert read_results(path) == result
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
    assert not {k for k in fields() if k not in json.loads(path.read_text())}


def test_a_speed_without_its_spread_is_read_as_not_measured(tmp_path):
    path, old = tmp_path / "results.json", fields()
    assert old["step_time_ms"]
    path.write_text(json.dumps({k: v for k, v in old.items() if "quartiles" not in k}))
    result = read_results(path)
    assert result.step_time_ms is result.img_per_s is None
    assert result.train_seconds == old["train_seconds"]
    path.write_text(json.dumps(old | {"step_time_quartiles_ms": [11.0, 13.0]}))
    result = read_results(path)
    assert (result.step_time_ms, result.step_time_quartiles_ms, result.img_per_s) == (12.5, [11.0, 13.0], None)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("task", DELETED, "task is missing"),
        ("task", "", "task is ''"),
        ("colour", "red", "colour is not a field"),
        ("schema_version", 2, "schema_version is 2"),
        ("seed", True, "seed is True"),
        ("seed", 1.5, "seed is 1.5, wanted a whole number"),
        ("images_seen", -1, "images_seen is -1"),
        ("trainable_m", math.nan, "trainable_m is nan"),
        ("trainable_m", None, "trainable_m is None"),
        ("step_time_ms", math.inf, "step_time_ms is inf"),
        ("step_time_quartiles_ms", [13.0, 14.0], "the median, 12.5, lies outside"),
        ("img_per_s_quartiles", 80.0, "img_per_s_quartiles is 80.0, wanted [first, third]"),
        ("img_per_s_quartiles", [math.nan, 90.0], "img_per_s_quartiles is nan"),
        ("backbone.revision", DELETED, "backbone.revision is missing"),
        ("trainable_parts_m.copy", "1", "trainable_parts_m.copy is '1'"),
        ("flags", {}, "flags is empty"),
        ("flags.threshold", [1.0, math.nan], "flags.threshold.1 is nan"),
        ("versions.torch", 2, "versions.torch is 2"),
        ("date", "2030-01-01T00:00:00", "date is '2030"),
        ("date", "yesterday", "date is 'yesterday'"),
        ("metrics.canny_f1", 0.5, "metrics.canny_f1 is 0.5"),
        ("metrics.canny_f1.n", DELETED, "metrics.canny_f1.n is missing"),
        ("metrics.canny_f1.n", 0, "metrics.canny_f1.n is 0"),
        ("metrics.canny_f1.std", 1.0, "metrics.canny_f1.std is not a field"),
        ("metrics.canny_f1.value", math.nan, "metrics.canny_f1.value is nan"),
        ("metrics.canny_f1.better", "more", "metrics.canny_f1.better is 'more'"),
        ("metrics.canny_f1.ci95", [0.6, 0.4], "low is above high"),
        ("metrics.canny_f1.ci95", [0.4, math.inf], "metrics.canny_f1.ci95 is inf"),
        ("metrics.canny_f1.ci95", 0.1, "metrics.canny_f1.ci95 is 0.1"),
        ("arms.wrong_condition.canny_f1.n", DELETED, "arms.wrong_condition.canny_f1.n is missing"),
    ],
)
def test_refusals_name_the_field(tmp_path, field, value, said):
    path = tmp_path / "results.json"
    write_results(path, fields())
    before = path.read_bytes()
    with pytest.raises(UserError) as error:
        write_results(path, changed(field, value))
    assert said in str(error.value)
    assert path.read_bytes() == before, "the old file is untouched"
    path.write_text(json.dumps(changed(field, value)))
    with pytest.raises(ResultError, match=r"results\.json"):
        read_results(path)


@pytest.mark.parametrize("mode", ["measure", "estimate"])
def test_costs_are_written_and_read(tmp_path, mode):
    path = tmp_path / "results.json"
    write_cost(path, cost_fields(mode))
    row = read_cost(path)
    assert row.memory_gib["activations"] == 5.0
    assert kind_of(path) == "cost"
    write_cost(path, row)
    assert read_cost(path) == row
    with pytest.raises(ResultError, match=r"results\.json: kind is 'cost', wanted one of train"):
        read_results(path)
    write_results(path, fields())
    assert kind_of(path) == "train"
    with pytest.raises(ResultError, match="kind is 'train', wanted one of cost"):
        read_cost(path)


def test_a_result_from_before_there_were_kinds_is_a_training(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(fields()))
    assert "kind" not in fields()
    assert kind_of(path) == read_results(path).kind == "train"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        *[(f"flags.{name}", DELETED, f"flags.{name} is missing: a cost without its conditions") for name in FLAGS],
        ("flags", {}, "flags is empty"),
        ("flags.precision", "32-true", "flags.precision is '32-true', and the row says 'bf16-mixed'"),
        ("flags.micro_batch", 4, "flags.micro_batch is 4, and the row says 8"),
        ("mode", "guess", "mode is 'guess', wanted one of estimate, measure"),
        ("what", "both", "what is 'both'"),
        ("status", "failed", "status is 'failed', wanted one of done, oom"),
        ("status", "oom", "status is oom: nothing was measured"),
        ("device", "", "device is ''"),
        ("batch", 0, "batch is 0"),
        ("backbone.id", DELETED, "backbone.id is missing"),
        ("peak_mem_gib", None, "peak_mem_gib is None"),
        ("peak_mem_gib", 5.0, "memory_gib adds up to 21.0, and peak_mem_gib is 5.0"),
        ("peak_when", "later", "peak_when is 'later'"),
        ("memory_gib.ema", DELETED, "memory_gib.ema is missing"),
        ("memory_gib.ema", -1.0, "memory_gib.ema is -1.0"),
        ("flops.backward", DELETED, "flops.backward is missing"),
        ("flops.backward", math.nan, "flops.backward is nan"),
        ("step_time_ms", None, "step_time_ms is missing: a measurement has times"),
        ("step_time_ms.bound", True, "step_time_ms.bound is True, and mode is measure"),
        ("step_time_ms.total", DELETED, "step_time_ms.total is missing"),
        ("step_time_ms.total", 2.0, "a measured time carries its spread"),
        ("step_time_ms.total", {"median": 2.0, "quartiles": [1.0, 3.0]}, "a measured time carries its spread"),
        ("step_time_ms.total", {"median": 4.0, "quartiles": [1.0, 3.0], "n": 3}, "the median, 4.0, lies outside"),
        ("sampling", {"steps": 20}, "sampling is {'steps': 20}, and what is training"),
        ("what", "inference", "sampling is None, and what is inference"),
        ("mfu", math.inf, "mfu is inf"),
        ("colour", "red", "colour is not a field"),
    ],
)
def test_refusals_of_costs_name_the_field(tmp_path, field, value, said):
    path, bad = tmp_path / "results.json", changed(field, value, cost_fields)
    with pytest.raises(UserError) as error:
        write_cost(path, bad)
    assert said in str(error.value)
    assert not path.exists()
    path.write_text(json.dumps(bad))
    with pytest.raises(ResultError, match=r"results\.json"):
        read_cost(path)


def test_drawing_that_was_measured_has_its_latency(tmp_path):
    row = cost_fields() | {"what": "inference", "sampling": {"steps": 20}}
    spread = row["step_time_ms"]["total"]
    for names, missing in ((None, "condition"), (("condition", "step", "image"), "batch")):
        with pytest.raises(ResultError, match=rf"latency_ms\.{missing} is missing"):
            write_cost(tmp_path / "results.json", row | {"latency_ms": names and dict.fromkeys(names, spread)})
    write_cost(tmp_path / "results.json", row | {"latency_ms": dict.fromkeys(("condition", "step", "batch"), spread)})
    write_cost(tmp_path / "estimate.json", cost_fields("estimate") | {"what": "inference", "sampling": {"steps": 20}})


def test_a_cell_that_ran_out_of_memory_has_no_numbers(tmp_path):
    found = ("peak_mem_gib", "peak_when", "memory_gib", "saved_gib", "phases_gib", "flops", "step_time_ms", "img_per_s")
    row = cost_fields() | dict.fromkeys(found) | {"status": "oom", "predicted": {"peak_mem_gib": 150.0}}
    write_cost(tmp_path / "results.json", row)
    assert read_cost(tmp_path / "results.json").predicted == {"peak_mem_gib": 150.0}


def test_write_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_results(path, fields())
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_results(path, fields() | {"seed": 7})
    assert path.read_bytes() == before, "half a file"
    assert len(list(tmp_path.iterdir())) == 1, "a left-over"


def test_unreadable_results_and_rows(tmp_path):
    with pytest.raises(ResultError, match=r"cannot read .*gone\.json"):
        read_results(tmp_path / "gone.json")
    (tmp_path / "cut.json").write_text('{"task": "can')
    with pytest.raises(ResultError, match="not JSON"):
        read_results(tmp_path / "cut.json")
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read_rows(tmp_path / "rows.jsonl") == [{"a": 1}, {"a": 2}], "only the last line may be torn"
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(ResultError, match="line 2"):
        read_rows(tmp_path / "rows.jsonl")


def test_git_state(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True)

    assert git_state(tmp_path) == ("unknown", False)
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    sha, dirty = git_state(tmp_path)
    assert len(sha) == 40
    assert not dirty
    (tmp_path / "new").write_text("2")
    assert git_state(tmp_path) == (sha, True)


def test_command_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SOME_API_KEY", "very-secret-key")
    arguments = [f"resume={tmp_path}/runs/a", "data.path=/mnt/disk/photos", "+experiment=x", "cache_dir=/home/someone/c"]
    monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(__spec__=types.SimpleNamespace(name="src.train")))
    monkeypatch.setattr("sys.argv", ["/x/src/train.py", *arguments, "+hub_token=hf_abc", "note=very-secret-key", "name=a b"])
    command = command_line()
    assert command.startswith("python -m src.train ")
    assert command.split(" ", 3)[3] == (
        "resume=runs/a data.path=.../photos +experiment=x cache_dir=~/c '+hub_token=<hidden>' 'note=<hidden>' 'name=a b'"
    ).replace("cache_dir=~/c", "'cache_dir=~/c'")
    assert str(tmp_path) not in command
    assert "secret" not in command


def test_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    hidden = hide_secrets({"t5_tokens": 256, "hf_token": "x", "a": [{"api_key": "y", "b": "is hf_0123456789"}], "token": None})
    assert hidden == {
        "t5_tokens": 256,
        "hf_token": "<hidden>",
        "a": [{"api_key": "<hidden>", "b": "is <hidden>"}],
        "token": None,
    }


def test_environment_imports_nothing_and_names_versions():
    found = environment()
    assert found["torch"].split(".")[0].isdigit()
    assert found["python"]
    assert found["platform"]


def test_bootstrap_covers_the_truth_of_a_known_distribution():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(300):
        low, high = bootstrap_ci(rng.exponential(2.0, 80), seed=trial, n_boot=400)
        inside += low <= 2.0 <= high
    assert 0.88 <= inside / 300 <= 0.98
    values = rng.normal(0, 1, 400)
    low, high = bootstrap_ci(values)
    half = 1.96 * values.std() / 20
    assert np.allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.02)
    assert bootstrap_ci(values) == (low, high), "the same interval every time"


def test_metric():
    assert metric(np.array([0.5]), "", "higher") == {"value": 0.5, "n": 1, "unit": "", "better": "higher", "ci95": None}
    packed = metric(np.array([1, 2, 3]), "dB", None)
    assert packed["value"] == 2.0
    assert packed["n"] == 3
    assert packed["ci95"][0] < 2 < packed["ci95"][1]
    assert metric(np.ones(5), "", "lower")["ci95"] == [1.0, 1.0]
    for bad, said in (
        ([], "at least 1"),
        ([1.0, np.nan], "1 of 2 values are not finite, the first at index 1"),
        ([[1.0]], "shape"),
    ):
        with pytest.raises(ValueError, match=said):
            metric(np.array(bad), "", None)


def rows_of_a_run() -> list[dict]:
    """A log with everything that the curves show."""
    rows = [
        {"images_seen": 32 * i, "time_s": 0.5 * i, "train/loss": 1 / (1 + i), "train/img_per_s": 60.0 + i % 3}
        for i in range(1, 81)
    ]
    rows[40]["train/loss"] = "nan"
    for i, row in enumerate(rows[::20]):
        row |= {"val/loss": 0.5, "val/canny_f1": i / 5, "val/canny_f1/wrong_condition": 0.1, "val/canny_f1/other": 0.2}
    return rows


def test_plots_are_pictures_and_deterministic(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows_of_a_run()))
    for name in ("a.png", "b.png"):
        plot_curves(log, tmp_path / "deep" / name)
        plot_loss_curve(rows_of_a_run(), "images_seen", ["train/loss", "val/loss"], tmp_path / f"card-{name}", "a card")
    for left, right in (("deep/a.png", "deep/b.png"), ("card-a.png", "card-b.png")):
        data = (tmp_path / left).read_bytes()
        assert data == (tmp_path / right).read_bytes()
        assert b"Matplotlib" not in data
        with Image.open(tmp_path / left) as image:
            assert image.width > 300
            assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    with pytest.raises(ResultError, match="no row has both images_seen and val/fid"):
        plot_loss_curve(rows_of_a_run(), "images_seen", ["val/fid"], tmp_path / "no.png", "x")
    log.write_text("")
    with pytest.raises(ResultError, match="no rows"):
        plot_curves(log, tmp_path / "no.png")


def test_grid_enlarges_pixels_exactly(tmp_path):
    rng = np.random.default_rng(0)
    cells = [[rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), None], [np.zeros((8, 8, 3), np.uint8)] * 2]
    plot_grid(cells, ["source", "made"], tmp_path / "grid.png", row_titles=["a caption", "b"], scale=3)
    with Image.open(tmp_path / "grid.png") as image:
        sheet = np.asarray(image)
    big = cells[0][0].repeat(3, 0).repeat(3, 1)
    tall, wide = (sheet.shape[i] - 24 + 1 for i in (0, 1))
    assert any((sheet[y : y + 24, x : x + 24] == big).all() for y in range(tall) for x in range(wide))
    for bad, said in (
        ([[np.zeros((8, 8, 3))]], "row 0, column 0: wanted .* float64"),
        ([[np.zeros((8, 8), np.uint8)]], "row 0, column 0"),
        ([[None, None]], "row 0 has 2 pictures for 1"),
        ([], "at least one row"),
    ):
        with pytest.raises(ValueError, match=said):
            plot_grid(bad, ["a"], tmp_path / "no.png")
