"""`python -m src.prepare speed`: what is measured is what it says."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from src import prepare
from src.config import load
from src.data.scenes import SceneSource
from src.data.speed import Timed, as_formats, cached_rate, named, rates
from tests.conftest import QUICK, ROOT


def test_every_format_holds_the_same_pictures(tmp_path):
    scenes = SceneSource("scenes", 0, 5, 2, "train", 64)
    samples = [scenes[i] for i in range(5)]
    made = as_formats(samples, 64, tmp_path)
    assert {"folder, png", "folder, jpg", "folder with a table, png", "shards, png", "shards, jpg"} <= set(made)
    for name, source in made.items():
        for i in range(3):
            read = source[i]
            assert read.caption == samples[i].caption
            off = np.abs(read.image.astype(int) - samples[i].image).mean()
            assert off < 6 if "jpg" in name else off == 0, name


def test_a_rate_counts_images_per_second():
    measured = rates(lambda i: time.sleep(0.01), count=3, per_call=4, seconds=0.2)
    assert all(100 < one <= 400 for one in measured)
    told = named("img_per_s", measured)
    low, high = told["img_per_s_quartiles"]
    assert min(measured) - 0.1 <= low <= told["img_per_s"] <= high <= max(measured) + 0.1
    seen = []
    rates(seen.append, count=3, per_call=1, seconds=0.0)
    assert seen == [0, 0, 1, 2, 0, 1]  # one call to warm up, and one for each part


def test_the_waiting_share_is_that_of_the_loader():
    def slow(wait):
        for i in range(8):
            time.sleep(wait)
            yield i

    shares = []
    for wait, step in ((0.02, 0.0), (0.0, 0.02), (0.02, 0.02)):
        timed = Timed(slow(wait))
        for _ in timed:
            time.sleep(step)
        assert len(timed.came) == 8
        found = timed.waiting(2)
        assert found["batches"] == 5
        shares.append(found["wait_share"])
    assert shares[0] > 0.9
    assert shares[1] < 0.1
    assert 0.3 < shares[2] < 0.7


def test_a_cached_batch_is_read_whole():
    class Stream:
        def __init__(self):
            self.stores, self.asked = type("Stores", (), {"ids": ["a"] * 10}), []

        def __getitems__(self, positions):
            self.asked.append(positions)
            time.sleep(0.01)

    stream = Stream()
    assert 100 < cached_rate(stream, 4, 0.1)["cached_img_per_s"] <= 400
    assert stream.asked[:3] == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.slow
def test_the_verb_measures_formats_caches_and_a_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "SPEED_SECONDS", 0.2)
    monkeypatch.setattr(prepare, "SPEED_IMAGES", 16)
    monkeypatch.setattr(prepare, "SPEED_STEPS", 10)
    prepare.speed(load("train", [*QUICK, f"cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path / 'runs'}"]))
    printed = capsys.readouterr().out
    print(printed)
    folder = printed.strip().splitlines()[-1].removeprefix("run: ")
    found = json.loads((Path(folder) / "speed.json").read_text())
    assert all(r["img_per_s_with_condition"] > 0 for r in found["formats"].values())
    assert "as it is (scenes)" in found["formats"]
    assert found["cached_img_per_s"] > 0
    assert len(found["cached_img_per_s_quartiles"]) == 2
    assert found["training"]["batches"] == 10 - 2 - 1
    assert 0 < found["training"]["wait_share"] < 1
    assert "a training step of 16 images takes" in printed


@pytest.mark.parametrize("column", ["64px", "256px"])
def test_the_page_on_data_states_the_committed_numbers(column):
    found = json.loads((ROOT / "experiments" / "data_speed" / f"speed_{column}.json").read_text())
    lines = (ROOT / "docs" / "data.md").read_text().splitlines()
    first = {"64px": 1, "256px": 3}[column]
    rows = {cells[0].strip(): cells for cells in (line.strip("|").split("|") for line in lines if line.startswith("| "))}
    for name, told in found["formats"].items():
        if not name.startswith("as it is"):
            shown = [told["img_per_s"], told["img_per_s_with_condition"]]
            assert [float(x) for x in rows[name][first : first + 2]] == shown, name
    assert float(rows["from the caches, with text"][first + 1]) == found["cached_img_per_s"]
    text = " ".join(lines)
    assert f"{found['training']['wait_share']:.2%}".replace("%", " %") in text
    assert f"{found['training']['step_ms']} ms" in text
    files = sorted((ROOT / "experiments" / "data_speed").glob("check_10000_run*.json"))
    one, two, three = (json.loads(file.read_text())["seconds"] for file in files)
    assert f"{one}, {two} and {three} s on 10,000" in text
