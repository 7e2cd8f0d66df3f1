"""Loggers: local files are whole whatever W&B does, and W&B offline holds the same run."""

import csv
import json
import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from src.loggers import LocalLogger, WandbRun, build_loggers
from src.results import read_rows
from src.types import UserError
from tests.wandb_reader import finished_run

wandb = pytest.importorskip("wandb")
FAKE_KEY = "f4ke" * 10
CONFIG = {"seed": 3, "backbone": {"name": "sd3_tiny", "t5_tokens": 0}, "hub_token": "hf_notforanyone", "betas": [0.9, 0.99]}


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No key, no mode, no host from outside; W&B forgets its settings after each test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    yield
    wandb.teardown(0)


def wanted(mode="offline", name="wandb"):
    """A logger config."""
    return SimpleNamespace(name=name, project="controlbench-test", entity=None, group="tiny", mode=mode)


def build(run_dir, mode="offline", name="wandb", config=CONFIG, facts=None):
    """Both loggers of a run."""
    return build_loggers(wanted(mode, name), run_dir, "unicon_tiny_canny", config, ["smoke", "canny"], facts or {})


def picture(path: Path, colour) -> Path:
    """An 8 x 8 PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(path)
    return path


def only_log(run_dir: Path) -> Path:
    """The one .wandb file of a run folder."""
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    return path


def files_with(root: Path, text: str) -> list[Path]:
    """Which files below hold the text."""
    return [path for path in root.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_local_rows_and_growing_csv(tmp_path):
    (local,) = build(tmp_path, name="local")
    local.log_metrics({"train/loss": np.float32(0.5), "train/lr": 1e-4}, step=32)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train/loss"] == 0.5, "on the disk when the call returns"
    local.log_metrics({"val/canny_f1": 0.25, "images_seen": 64, "train/loss": float("nan")}, step=2)
    local.log_metrics({"train/loss": 0.25}, step=96)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["images_seen"] for row in rows] == [32, 64, 96]
    assert rows[1]["train/loss"] == "nan", "valid JSON, and the NaN is seen"
    with open(tmp_path / "metrics.csv") as file:
        table = list(csv.DictReader(file))
    assert table[0]["val/canny_f1"] == ""
    assert table[1]["val/canny_f1"] == "0.25"
    assert table[2]["train/loss"] == "0.25"
    before = (tmp_path / "metrics.csv").read_bytes()
    LocalLogger(tmp_path, "again")
    assert (tmp_path / "metrics.csv").read_bytes() == before, "appended and rebuilt CSV are the same"
    with pytest.raises(TypeError, match="note"):
        local.log_metrics({"note": "text"}, step=1)


def test_resume_appends_and_rewind_drops_the_lost_part(tmp_path):
    first = LocalLogger(tmp_path, "run")
    for images in (32, 64, 96):
        first.log_metrics({"train/loss": images / 100, "time_s": float(images)}, step=images)
        first.log_grid("val/grid", picture(tmp_path / "grids" / f"{images}.png", 9), images)
        first.log_table("samples", ["caption", "picture"], [["a box", tmp_path / "grids" / f"{images}.png"]], images)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"images_seen": 128, "train/lo')  # killed in the middle of a line
    second = LocalLogger(tmp_path, "run")
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3
    second.rewind(64)
    second.log_metrics({"train/loss": 0.5}, step=96)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["images_seen"] for row in rows] == [32, 64, 96]
    assert 64 <= rows[-1]["time_s"] < 66, "the clock goes on from the last row kept"
    assert [row["images_seen"] for row in read_rows(tmp_path / "media.jsonl")] == [32, 64]
    table = read_rows(tmp_path / "tables" / "samples.jsonl")
    assert [row["images_seen"] for row in table] == [32, 64]
    assert table[0]["picture"] == "grids/32.png"
    with open(tmp_path / "metrics.csv") as file:
        assert [row["images_seen"] for row in csv.DictReader(file)] == ["32", "64", "96"]


def test_full_disk_costs_no_run_and_no_row(tmp_path, monkeypatch, caplog):
    import src.loggers.local as module

    local = LocalLogger(tmp_path, "run")
    local.log_metrics({"train/loss": 1.0}, step=32)
    append = module._append
    monkeypatch.setattr(module, "_append", lambda path, text: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    local.log_metrics({"train/loss": 2.0}, step=64)
    local.log_metrics({"train/loss": 3.0}, step=96)
    assert sum("No space left" in record.message for record in caplog.records) == 1
    monkeypatch.setattr(module, "_append", append)
    local.log_metrics({"train/loss": 4.0}, step=128)
    assert [row["train/loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    with open(tmp_path / "metrics.csv") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_wandb_offline_holds_the_whole_run(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "hub_token=hf_notforanyone", "seed=3"])
    loggers = build(tmp_path / "run", facts={"trainable_m": 1.25})
    grid = picture(tmp_path / "run" / "grids" / "images-000000064.png", (200, 100, 0))
    samples = [picture(tmp_path / "run" / "samples" / f"{name}.png", i * 40) for i, name in enumerate("abcde")]
    columns = ["source", "condition", "no control", "controlled", "wrong condition", "caption", "score"]
    for logger in loggers:
        for step in range(1, 6):
            logger.log_metrics({"train/loss": 1 / step, "images_seen": 32 * step}, step=step)
        logger.log_metrics({"val/canny_f1": 0.5, "val/canny_f1/wrong_condition": 0.125, "images_seen": 160})
        logger.log_grid("val/grid", grid, 160)
        logger.log_table("val/samples", columns, [[*samples, "a red box", np.float32(0.5)]], 160)
        logger.finalize("success")
        logger.log_metrics({"val/steps_to_control": 7, "images_seen": 160})  # scores come after the fit
        logger.close()
        logger.close()
    run = finished_run(only_log(tmp_path / "run"))
    assert (run.project, run.group, run.name, sorted(run.tags)) == (
        "controlbench-test",
        "tiny",
        "unicon_tiny_canny",
        ["canny", "smoke"],
    )
    assert run.run_id == (tmp_path / "run" / "wandb" / "run-id.txt").read_text().strip()
    assert run.config["seed"] == 3
    assert run.config["backbone"] == {"name": "sd3_tiny", "t5_tokens": 0}
    facts = run.config["facts"]
    assert facts["trainable_m"] == 1.25
    assert "torch" in facts["versions"]
    assert isinstance(facts["git_dirty"], bool)
    assert facts["git_sha"]
    assert "seed=3" in facts["command"]
    losses = {row["images_seen"]: row["train/loss"] for row in run.history if "train/loss" in row}
    assert losses == {32 * step: 1 / step for step in range(1, 6)}
    assert run.summary["val/canny_f1/wrong_condition"] == 0.125
    assert run.summary["val/steps_to_control"] == 7
    assert run.step_metrics["*"] == "images_seen"
    (shown,) = [row["val/grid"] for row in run.history if "val/grid" in row]
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    with Image.open(folder / "files" / shown["path"]) as image:
        assert image.getpixel((3, 3)) == (200, 100, 0), "not black"
    (table,) = [row["val/samples"] for row in run.history if "val/samples" in row]
    assert table["_type"] == "table-file"
    assert (table["nrows"], table["ncols"]) == (1, 7)
    contents = {k: v for artifact in run.artifacts for k, v in artifact["contents"].items()}
    (name,) = [name for name in contents if name.endswith(".table.json")]
    stored = json.loads(Path(contents[name]).read_text())
    assert stored["columns"] == columns
    assert stored["data"][0][-2:] == ["a red box", 0.5]
    assert all(cell["_type"] == "image-file" and cell["path"] in contents for cell in stored["data"][0][:5])
    assert all(Path(place).is_relative_to(tmp_path / "run") for place in contents.values()), "the folder can be moved"
    assert run.exit_code == 0
    assert wandb.run is None
    assert not files_with(tmp_path, "hf_notforanyone"), "not from the config, not from the command line"
    (line,) = [record.message for record in caplog.records if "W&B" in record.message]
    assert "logger.mode=offline" in line
    assert "wandb sync" in line


def test_two_runs_in_one_process_and_a_resumed_one(tmp_path):
    for name in ("one", "two"):
        _, run = build(tmp_path / name)
        run.log_metrics({"train/loss": 1.0, "images_seen": 32})  # left open, as after a crash of the caller
    _, run = build(tmp_path / "two")
    run.log_metrics({"train/loss": 0.5, "images_seen": 64})
    run.finalize("failed")
    run.log_metrics({"train/loss": 0.25, "images_seen": 96})
    assert wandb.run is None, "a failed run ends at once, and later rows do not reopen it"
    one = finished_run(only_log(tmp_path / "one"))
    parts = [finished_run(path) for path in sorted((tmp_path / "two").glob("wandb/offline-run-*/*.wandb"))]
    assert len(parts) == 2
    assert parts[0].run_id == parts[1].run_id != one.run_id
    assert sorted(row["images_seen"] for part in parts for row in part.history) == [32, 64]
    assert sorted(part.exit_code for part in parts) == [0, 1]
    assert [row["images_seen"] for row in one.history] == [32]


def test_key_but_no_server_goes_offline_soon_and_the_key_stays_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("sys.argv", ["train.py", f"note={FAKE_KEY}"])
    start = time.monotonic()
    loggers = build(tmp_path, "auto", config={"note": f"key {FAKE_KEY}", "url": "https://me:pass@host/x"})
    assert time.monotonic() - start < 15
    for logger in loggers:
        logger.log_metrics({"train/loss": 1.0, "images_seen": 32})
        logger.close()
    run = finished_run(only_log(tmp_path))
    assert run.config["note"] == "key <hidden>"
    assert run.config["url"] == "https://host/x"
    assert run.history[0]["train/loss"] == 1.0
    assert not files_with(tmp_path, FAKE_KEY)
    assert FAKE_KEY not in caplog.text
    assert "127.0.0.1 did not answer" in caplog.text
    assert "wandb sync" in caplog.text


def test_a_server_that_answers_but_fails_leads_to_offline(tmp_path, monkeypatch, caplog):
    import src.loggers.wandb_run as module

    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(module, "_connects", lambda url: True)
    monkeypatch.setattr(module, "INIT_S", 1.0)
    _, run = build(tmp_path, "online")
    run.log_metrics({"train/loss": 1.0, "images_seen": 32})
    run.close()
    assert finished_run(only_log(tmp_path)).history[0]["images_seen"] == 32
    assert "refused or was too slow" in caplog.text


def test_online_is_asked_for_where_key_and_host_are_there(tmp_path, monkeypatch):
    import src.loggers.wandb_run as module

    asked, init = [], wandb.init
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    monkeypatch.setattr(module, "_connects", lambda url: True)
    monkeypatch.setattr(wandb, "init", lambda mode, **options: asked.append(mode) or init(mode="offline", **options))
    build(tmp_path, "auto")[1].close()
    assert asked == ["online"]
    assert not files_with(tmp_path, FAKE_KEY)


@pytest.mark.parametrize("broken", ["init", "log"])
def test_broken_wandb_costs_one_line(tmp_path, monkeypatch, caplog, broken):
    def fail(*args, **kwargs):
        raise RuntimeError("server on fire\nand more")

    if broken == "init":
        monkeypatch.setattr(wandb, "init", fail)
    loggers = build(tmp_path)
    if broken == "log":
        monkeypatch.setattr(loggers[1].experiment, "log", fail)
    for step in (32, 64):
        for logger in loggers:
            logger.log_metrics({"train/loss": 1.0, "images_seen": step})
            logger.log_grid("val/grid", picture(tmp_path / "grid.png", 7), step)
    for logger in loggers:
        logger.close()
    assert [row["images_seen"] for row in read_rows(tmp_path / "metrics.jsonl")] == [32, 64]
    (line,) = [record.message for record in caplog.records if "server on fire" in record.message]
    assert "off for this run" in line
    assert "and more" not in line
    assert not any(name in os.environ for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"))


def test_wandb_absent(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    local, run = build(tmp_path)
    run.log_metrics({"train/loss": 1.0, "images_seen": 32})
    run.close()
    assert "not installed" in caplog.text
    assert not (tmp_path / "wandb").exists()


def test_mode_of_the_environment_wins(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    _, run = build(tmp_path, "offline")
    run.log_metrics({"train/loss": 1.0, "images_seen": 32})
    run.experiment.anything("goes")
    assert "WANDB_MODE=disabled wins" in caplog.text
    assert not (tmp_path / "wandb").exists()
    monkeypatch.setenv("WANDB_MODE", "sideways")
    with pytest.raises(UserError, match="WANDB_MODE is 'sideways'"):
        build(tmp_path)
    with pytest.raises(UserError, match=r"logger\.name is 'tensorboard'"):
        build(tmp_path, name="tensorboard")


def test_no_key_means_offline_without_asking(tmp_path, monkeypatch):
    from src.loggers.wandb_run import _has_key, reachable, urlsplit

    mode, why = reachable("https://api.forge.coreweave.com")
    assert mode == "offline"
    assert "no key" in why
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n login user\n password {FAKE_KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert _has_key(urlsplit("https://api.forge.coreweave.com"))
    assert not _has_key(urlsplit("https://my.server:8080"))


def test_lightning_takes_both(tmp_path):
    from pytorch_lightning import Trainer
    from pytorch_lightning.demos.boring_classes import BoringModel

    loggers = build(tmp_path)
    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(logger=loggers, max_steps=2, limit_val_batches=1, accelerator="cpu", **options)
    trainer.validate(BoringModel(), verbose=False)
    trainer.fit(BoringModel())
    assert isinstance(loggers[1], WandbRun)
    assert trainer.log_dir == str(tmp_path)
    for logger in trainer.loggers:
        logger.log_metrics({"val/canny_f1": 0.75}, step=64)
        logger.close()
    assert finished_run(only_log(tmp_path)).summary["val/canny_f1"] == 0.75


def test_a_result_is_one_row_in_the_project_of_the_trainings(tmp_path):
    from src.loggers.results import log_result
    from src.results import read_cost
    from src.results.evaluation import read_evaluation
    from tests.report_rows import evaluation, make_cell

    evaluated, cost = tmp_path / "evaluated", make_cell(tmp_path, "cost")
    evaluated.mkdir()
    evaluation(evaluated, images_seen=640)
    config = {"adapter": {"name": "unicon"}, "hub_token": "hf_notforanyone"}
    for folder, read in ((evaluated, read_evaluation), (cost, read_cost)):
        result = read(folder / "results.json")
        log_result(wanted(), folder, folder.name, config, result)
        assert not (folder / "metrics.jsonl").exists(), "results.json is the local record"
    one, two = (finished_run(only_log(folder)) for folder in (evaluated, cost))
    for run, kind in ((one, "evaluation"), (two, "cost")):
        assert (run.project, run.group, run.tags, run.exit_code) == ("controlbench-test", "tiny", [kind], 0)
        assert run.config["adapter"] == {"name": "unicon"}
        assert run.config["facts"]["kind"] == kind
        assert len(run.history) == 1
    m = read_evaluation(evaluated / "results.json").metrics["canny_f1"]
    assert [one.summary[f"eval/canny_f1{end}"] for end in ("", "/n", "/low", "/high")] == [m["value"], m["n"], *m["ci95"]]
    assert one.history[0]["images_seen"] == 640
    assert (two.summary["cost/peak_mem_gib"], two.summary["cost/step_time_ms/total"]) == (8.75, 40)
    assert not files_with(tmp_path, "hf_notforanyone")


@pytest.mark.parametrize("verb", ["bench", "evaluate"])
def test_a_benchmark_and_an_evaluation_log_nowhere_unless_asked(verb):
    from src.config import load

    given = [] if verb == "bench" else ["run=somewhere"]
    assert load(verb, given).logger.name == "local"
    asked = load(verb, [*given, "logger=wandb"]).logger
    assert (asked.project, asked.group) == (load("train").logger.project, None)


def test_a_benchmark_sends_its_row(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from src.bench import cell
    from src.config import load
    from src.results import read_cost
    from tests.report_rows import make_cell

    result = read_cost(make_cell(tmp_path, "cost") / "results.json")
    monkeypatch.setattr(cell, "lines", lambda result: [])
    for name, sent in (("local", 0), ("wandb", 1)):
        cfg = load("bench", [f"logger={name}", f"output_dir={tmp_path / name}"])
        folder = cell._write(SimpleNamespace(cfg=cfg), result)
        assert len(list(folder.glob("wandb/offline-run-*/*.wandb"))) == sent
    assert finished_run(only_log(folder)).summary["cost/img_per_s"] == 100


def test_the_cells_of_a_sweep_are_one_group(tmp_path, monkeypatch):
    from src.sweep import cells
    from src.sweep.folder import SweepFolder

    seen = []
    monkeypatch.setattr(cells, "CellProcess", lambda words, log, env, *rest: seen.append(env))
    folder = tmp_path / "multirun" / "20260101-120000"
    (folder / "logs").mkdir(parents=True)
    sweep = cells.Sweep(None, ["python"], [], [], SweepFolder(folder, resumed=True), "", 1, None, 60)
    sweep.start(cells.Cell(0, ("seed=1",)))
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    sweep.start(cells.Cell(1, ("seed=2",)))
    assert [env["WANDB_RUN_GROUP"] for env in seen] == ["20260101-120000", "mine"]
    monkeypatch.setenv("WANDB_RUN_GROUP", "20260101-120000")
    ungrouped = SimpleNamespace(**{**vars(wanted()), "group": None})
    WandbRun(ungrouped, tmp_path / "run", "name", {}, []).close()
    assert finished_run(only_log(tmp_path / "run")).group == "20260101-120000"
