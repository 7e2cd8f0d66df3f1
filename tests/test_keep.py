"""Runs that are kept as experiments: what is copied, what is said of changes, what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from src.report.keep import keep
from src.types import UserError
from tests.report_rows import COMMITTED


@pytest.fixture
def finished(tmp_path):
    """A run folder of the committed experiment's result, with changes."""

    def make(name="one", grids=2, **changes):
        folder = tmp_path / name
        (folder / "grids").mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(json.loads(COMMITTED.read_text()) | {"git_dirty": False} | changes))
        (folder / "outcome.json").write_text("{}")
        for number in range(grids):
            Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(folder / "grids" / f"images-{number:09d}.png")
        (folder / "curves.png").write_bytes(b"curves")
        return folder

    return make


def test_a_run_is_kept_and_a_repeated_one_is_said_to_be_the_same(finished, tmp_path):
    home = tmp_path / "experiments"
    assert keep([finished()], home) == ["unicon_sd3_canny: kept", "  new"]
    kept = home / "unicon_sd3_canny"
    assert {f.name for f in kept.iterdir()} == {"results.json", "outcome.json", "curves.png", "grid.png"}
    with Image.open(kept / "grid.png") as grid:
        assert np.asarray(grid).max() == 1  # of the last validation
    assert keep([finished("again", date="2026-01-05T00:00:00+00:00")], home) == ["unicon_sd3_canny: all scores as before"]
    metrics = json.loads(COMMITTED.read_text())["metrics"]
    value = metrics["canny_f1"]["value"]
    other = metrics | {"canny_f1": metrics["canny_f1"] | {"value": 0.5, "ci95": [0.4, 0.6]}}
    del other["val_loss"]
    said = keep([finished("other", metrics=other)], home)
    assert said[:2] == ["unicon_sd3_canny: kept", f"  canny_f1: {value} -> 0.5"]
    assert said[2].startswith("  val_loss: ")
    assert said[2].endswith("-> None")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"git_dirty": True}, "its code was not all committed"),
        ({"git_dirty": None}, "its code was not all committed"),
        ({"experiment": "tests"}, "tests is no file of conf/experiment"),
        ({"grids": 0}, "no grid.png; is the run finished"),
    ],
)
def test_what_nobody_could_repeat_is_refused_before_anything_is_copied(finished, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        keep([finished("good"), finished("bad", **changes)], tmp_path / "experiments")
    assert not (tmp_path / "experiments").exists()
