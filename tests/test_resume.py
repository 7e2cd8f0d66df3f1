"""A resumed run equals an uninterrupted one, to the bit: sample ids, rate, loss, weights."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from src.adapters.base import ControlAdapter
from src.callbacks.base import Preempted
from src.config import load
from src.data.folder import FolderSource
from src.data.write_shards import write_shards
from src.results import read_rows
from src.train.flow import train
from src.types import UserError
from tests.bad_files import photo
from tests.conftest import QUICK, ROOT

# 20 optimizer steps of 4 images in two turns over 20 training images: four epochs
RUN = [*QUICK, "data.train_images=20", "budget.images=80", "budget.effective_batch=4", "hardware.micro_batch=2"]
RUN += ["callbacks.meter.every_steps=1", "caption_dropout=0.3", "optimizer.warmup_images=12"]
RUN += ["validation.every_images=1000", "validation.images=2", "validation.final_images=4"]


def spied(patch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Which images each micro-batch holds from now on, in order."""
    ids: list[tuple[int, str]] = []
    original = ControlAdapter.training_step

    def spy(self, batch, i):
        ids.extend(zip(batch.index, batch.ids, strict=True))
        return original(self, batch, i)

    patch.setattr(ControlAdapter, "training_step", spy)
    return ids


@pytest.fixture
def seen(monkeypatch):
    return spied(monkeypatch)


def go(tmp_path: Path, cache: Path, *extra: str) -> Path:
    """A run that may stop itself; -> its folder."""
    typed = [*RUN, f"output_dir={tmp_path}", f"cache_dir={cache}", *extra]
    try:
        return train(load("train", typed), typed)
    except Preempted as stopped:
        return stopped.folder


def resume(folder: Path, cache: Path, *extra: str) -> Path:
    typed = [f"resume={folder}", f"cache_dir={cache}", *extra]
    try:
        return train(load("train", typed), typed)
    except Preempted as stopped:
        return stopped.folder


def weights(folder: Path, name: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(sorted((folder / "checkpoints").glob("images-*"))[-1] / f"{name}.safetensors")


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(folder: Path) -> list[tuple]:
    wanted = ("images_seen", "train/loss", "train/lr", "train/grad_norm")
    return [tuple(r[k] for k in wanted) for r in read_rows(folder / "metrics.jsonl") if "train/loss" in r]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache_dir) -> tuple[Path, list[tuple[int, str]]]:
    """The whole run, and what it saw: all that stop and go on are held against it."""
    with pytest.MonkeyPatch.context() as patch:
        ids = spied(patch)
        return go(tmp_path_factory.mktemp("uninterrupted"), cache_dir), ids


def test_twenty_steps_equal_ten_and_ten(tmp_path, cache_dir, seen, uninterrupted):
    ten_and_ten(tmp_path, cache_dir, seen, *uninterrupted)


@pytest.mark.slow
def test_twenty_steps_in_whole_batches_equal_ten_and_ten(tmp_path, cache_dir, seen):
    straight = go(tmp_path / "a", cache_dir, "hardware.micro_batch=4")
    ids = list(seen)
    seen.clear()
    ten_and_ten(tmp_path / "b", cache_dir, seen, straight, ids, "hardware.micro_batch=4")


def ten_and_ten(place: Path, cache: Path, seen: list, straight: Path, ids: list, *extra: str) -> None:
    first = go(place, cache, "budget.stop_at_images=40", *extra)
    assert not (first / "results.json").exists()
    assert len(seen) == 40
    second = resume(first, cache)
    assert second == first
    assert list(seen) == ids
    assert len(ids) == 80
    assert rows(first) == rows(straight)
    assert len(rows(first)) == 20
    assert equal(weights(first), weights(straight))
    assert equal(weights(first, "adapter_ema"), weights(straight, "adapter_ema"))
    scores = [json.loads((f / "outcome.json").read_text())["scores"] for f in (straight, first)]
    assert scores[0] == scores[1]


def test_a_resume_may_change_the_micro_batch(tmp_path, cache_dir, seen):
    first = go(tmp_path, cache_dir, "budget.images=40", "budget.stop_at_images=24")
    resume(first, cache_dir, "hardware=cpu", "hardware.micro_batch=4", "hardware.workers=0")
    assert [n for n, _ in seen] == list(range(40))
    assert len(rows(first)) == 10


@pytest.mark.slow
def test_order_is_a_permutation_of_each_epoch(tmp_path, cache_dir, seen):
    go(tmp_path, cache_dir)
    epochs = [[name for _, name in seen[e : e + 20]] for e in range(0, 80, 20)]
    assert all(len(set(e)) == 20 for e in epochs)
    assert epochs[0] != epochs[1]


def test_changed_science_is_refused_by_key(tmp_path, cache_dir):
    first = go(tmp_path, cache_dir, "budget.stop_at_images=4")
    with pytest.raises(UserError, match=r"optimizer\.algorithm\.lr"):
        resume(first, cache_dir, *RUN, "optimizer.algorithm.lr=0.5")


def test_nothing_to_resume_is_said(tmp_path, cache_dir):
    with pytest.raises(UserError, match="no run folder"):
        resume(tmp_path, cache_dir)


def test_auto_continues_the_unfinished_run_of_this_science_only(tmp_path, cache_dir):
    short = "budget.images=12"
    first = go(tmp_path, cache_dir, short, "budget.stop_at_images=4")
    other = go(tmp_path, cache_dir, short, "resume=auto", "seed=1", "budget.stop_at_images=4")
    again = go(tmp_path, cache_dir, short, "resume=auto")
    assert other != first
    assert again == first
    assert (first / "results.json").exists()


def test_a_broken_newest_checkpoint_is_passed_over(tmp_path, cache_dir, capsys, uninterrupted):
    first = go(tmp_path, cache_dir, "callbacks.checkpoints.every_images=20", "budget.stop_at_images=40")
    newest = sorted((first / "checkpoints").glob("images-*"))[-1]
    file = newest / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    (first / "checkpoints" / ".images-000000060.part").mkdir()
    resume(first, cache_dir)
    assert "passed over" in capsys.readouterr().out
    assert equal(weights(first), weights(uninterrupted[0]))
    assert not list((first / "checkpoints").glob(".*"))


def test_sigterm_saves_and_exits_143_and_auto_finds_it(tmp_path, cache_dir):
    """A real process, a real signal: in the middle of training, after the first step."""
    more = ["budget.images=4000", "callbacks.meter.every_steps=1", f"output_dir={tmp_path}", f"cache_dir={cache_dir}"]
    command = [sys.executable, "-m", "src.train", *RUN, *more]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("*/*/metrics.jsonl")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, out + err
    folder = next(tmp_path.glob("*/*/config.yaml")).parent
    saved = sorted((folder / "checkpoints").glob("images-*"))[-1]
    images = json.loads((saved / "meta.json").read_text())["images_seen"]
    assert images >= 4
    assert f"run: {folder}" in out
    typed = [*RUN, *more, "resume=auto", f"budget.stop_at_images={images + 8}"]
    with pytest.raises(Preempted) as again:
        train(load("train", typed), typed)
    assert again.value.folder == folder
    assert [r[0] for r in rows(folder)] == list(range(4, images + 9, 4))
    assert OmegaConf.load(folder / "config.yaml").budget.images == 4000


def test_sixteen_bits_run_from_end_to_end(tmp_path, cache_dir):
    """Frozen weights in bfloat16, the adapter in float32 under autocast; validation samples in the same precision."""
    folder = go(tmp_path, cache_dir, "budget.images=8", "hardware=cpu", "hardware.precision=bf16-mixed", "hardware.workers=0")
    assert all(t.dtype == torch.float32 for t in weights(folder).values())
    assert json.loads((folder / "results.json").read_text())["precision"] == "bf16-mixed"


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(tmp_path, cache_dir):
    plain, compiled = (go(tmp_path / str(on), cache_dir, "budget.images=24", f"hardware.compile={on}") for on in (False, True))
    losses = [[r[1] for r in rows(f)] for f in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert weights(plain).keys() == weights(compiled).keys()


def test_a_signal_in_the_last_validation_loses_nothing(tmp_path, cache_dir, monkeypatch, uninterrupted):
    from src.callbacks import control

    straight = uninterrupted[0]
    calls, original = [], control.sample_arm

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(control, "sample_arm", interrupted)
    first = go(tmp_path, cache_dir)
    assert not (first / "outcome.json").exists()
    assert sorted((first / "checkpoints").glob("images-*"))[-1].name == "images-000000080"
    resume(first, cache_dir)
    scores = [json.loads((f / "outcome.json").read_text())["scores"] for f in (straight, first)]
    assert scores[0] == scores[1]
    assert equal(weights(first), weights(straight))


@pytest.mark.parametrize("form", [pytest.param("folder", marks=pytest.mark.slow), "shards"])
def test_real_formats_go_on_at_the_very_next_sample(tmp_path, cache_dir, seen, form):
    """Mirrored pictures, of which one is broken and replaced; stopped in the second of two epochs, and in its middle."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        file = images / f"{i}.png"
        Image.fromarray(photo(i, 64, 64)).save(file)
        file.with_suffix(".txt").write_text(f"picture {i}")
    path = images
    if form == "shards":
        source = FolderSource("folder", str(images), 2, "train", 64), FolderSource("folder", str(images), 2, "val", 64)
        write_shards(source, tmp_path / "shards", 1, "png", "local", 0, lambda _: None)
        path = tmp_path / "shards"
        tar = next(path.glob("*.tar"))
        raw = bytearray(tar.read_bytes())
        start = raw.index(b"IDAT", raw.index(b"IDAT") + 4)  # of the second picture
        raw[start + 4 : start + 40] = bytes(36)
        tar.write_bytes(raw)
    else:
        (images / "3.png").write_bytes((images / "3.png").read_bytes()[:-200])
    words = [f"data={form}", f"data.path={path}", "data.val_images=2", "data.flip=true", "data.on_bad_sample=skip"]
    words += ["data.max_bad_share=0.5", "budget.images=24", "budget.effective_batch=4", "hardware.micro_batch=4"]
    words += ["validation.images=2", "validation.final_images=2", "validation.steps=1"]
    base = [w for w in RUN if not w.startswith(("data.", "budget.", "hardware.micro", "validation.images", "validation.final"))]

    def started(name: str, *more: str) -> Path:
        typed = [*base, *words, f"output_dir={tmp_path / name}", f"cache_dir={cache_dir}", *more]
        try:
            return train(load("train", typed), typed)
        except Preempted as stopped:
            return stopped.folder

    straight = started("a")
    ids = list(seen)
    seen.clear()
    first = started("b", "budget.stop_at_images=16")
    assert len(seen) == 16
    resume(first, cache_dir)
    assert list(seen) == ids
    names = [name for _, name in ids]
    assert len({*names}) == 10
    assert max(names.count(n) for n in {*names}) >= 4  # five of six pictures, and their mirror images
    assert rows(first) == rows(straight)
    assert equal(weights(first), weights(straight))
