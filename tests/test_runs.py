"""Run folders of other formats, and what a run leaves for whoever watches it."""

import json
import math

import pytest
from omegaconf import OmegaConf, open_dict

from src.config import load
from src.events import Events, Heart, last_beat
from src.results import read_rows
from src.runs import RUN_FORMAT, new_run, stored_config
from src.types import UserError


@pytest.fixture
def folder(tmp_path):
    return new_run(load("train", [f"output_dir={tmp_path}", "hardware=cpu"])).folder


def test_a_run_says_its_format_and_is_read_back_as_it_was(folder):
    assert json.loads((folder / "run.json").read_text()) == {"format": RUN_FORMAT}
    assert stored_config(folder) == OmegaConf.load(folder / "config.yaml")


def test_a_run_from_before_formats_is_brought_up(folder):
    (folder / "run.json").unlink()
    cfg = OmegaConf.load(folder / "config.yaml")
    with open_dict(cfg):
        del cfg.callbacks["guard"], cfg.hardware["oom"], cfg.hardware["nodes"], cfg.validation["seed"]
        cfg.hardware.checkpointing, cfg.hardware.compile = True, False
    OmegaConf.save(cfg, folder / "config.yaml")
    now = stored_config(folder)
    assert (now.hardware.checkpointing, now.hardware.compile, now.hardware.nodes, now.hardware.oom) == (
        "both",
        "none",
        1,
        "stop",
    )
    assert now.callbacks.guard.max_in_a_row == 5
    assert now.validation.seed == now.seed


@pytest.mark.parametrize(
    ("text", "said"), [('{"format": 99}', "has run format 99, this version reads 1 to"), ("{", "cannot be read")]
)
def test_a_format_that_is_not_known_is_refused(folder, text, said):
    (folder / "run.json").write_text(text)
    with pytest.raises(UserError, match=said):
        stored_config(folder)


def test_events_are_whole_lines_without_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    file = tmp_path / "events.jsonl"
    file.write_text('{"event": "started"}\n{"event": "sav')  # a kill in the middle of a line
    events = Events(tmp_path)
    events.note("skipped_step", 64, losses=[1.0, math.nan], why="key 0123456789abcdef0123456789abcdef01234567")
    one, two = read_rows(file)
    assert one == {"event": "started"}
    assert (two["event"], two["images_seen"], two["losses"]) == ("skipped_step", 64, [1.0, "nan"])
    assert "0123456789abcdef" not in file.read_text()


def test_of_several_ranks_the_first_alone_writes(tmp_path):
    Events(tmp_path, writes=False).note("started")
    Heart(tmp_path, writes=False).beat(0, 10, "training")
    assert list(tmp_path.iterdir()) == []
    Heart(tmp_path).beat(4, 10, "training")
    assert (last_beat(tmp_path)["images_seen"], last_beat(tmp_path)["phase"]) == (4, "training")


def test_what_cannot_be_written_ends_nothing(tmp_path, caplog):
    (tmp_path / "gone").touch()  # a file where the folder should be
    events = Events(tmp_path / "gone")
    events.note("saved", 1)
    events.note("saved", 2)
    Heart(tmp_path / "gone").beat(1, 2, "training")
    assert caplog.text.count("the run goes on without it") == 1
