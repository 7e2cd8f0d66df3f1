"""Adapters that train together on one frozen pass end as if each had trained alone, to the bit."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.adapters.base import ControlAdapter
from src.adapters.frozen import FrozenPass
from src.callbacks import control
from src.callbacks.base import Preempted, TrainingDiverged
from src.config import load
from src.results import read_results, read_rows
from src.train.flow import train
from src.types import UserError
from tests.conftest import QUICK

# 4 optimizer steps of 8 images in micro-batches of 4, with a validation in the middle
RUN = [*QUICK, "data.train_images=24", "budget.images=32", "budget.effective_batch=8", "hardware.micro_batch=4"]
RUN += ["validation.every_images=16", "validation.images=2", "validation.final_images=2", "validation.steps=1"]
RUN += ["callbacks.meter.every_steps=1", "caption_dropout=0.3"]
RUN += ["callbacks.checkpoints.every_images=16", "optimizer.warmup_images=8"]
HALF = "together=[unicon_half]"


def go(place: Path, cache: Path, *extra: str) -> Path:
    """A run that may stop itself; -> its folder."""
    typed = [*RUN, f"output_dir={place}", f"cache_dir={cache}", *extra]
    try:
        return train(load("train", typed), typed)
    except Preempted as stopped:
        return stopped.folder


def resume(folder: Path, cache: Path, *extra: str) -> Path:
    typed = [f"resume={folder}", f"cache_dir={cache}", *extra]
    return train(load("train", typed), typed)


def half_of(place: Path) -> Path:
    """The folder of the one run of UniCon-Half below a place."""
    (folder,) = place.glob("unicon_half_*/*/")
    return folder


def learned(folder: Path) -> dict:
    """Weights, average and optimizer state of the last checkpoint, the scores of every image, and the logged losses."""
    last = sorted((folder / "checkpoints").glob("images-*"))[-1]
    state = torch.load(last / "state.pt", weights_only=True)
    rows = [{k: v for k, v in row.items() if "time" not in k and "second" not in k and "img_per_s" not in k and "mem" not in k}
            for row in read_rows(folder / "metrics.jsonl")]  # fmt: skip
    return {
        "images": last.name,
        "tensors": load_file(last / "adapter.safetensors"),
        "ema": load_file(last / "adapter_ema.safetensors"),
        "state": dict(enumerate(_tensors(state["optimizer_states"]))),
        "scores": json.loads((folder / "outcome.json").read_text())["scores"],
        "rows": rows,
    }


def _tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(item)


def same(a: dict, b: dict) -> bool:
    plain = [a[k] == b[k] for k in ("images", "scores", "rows")]
    pairs = [(a[k], b[k]) for k in ("tensors", "ema", "state")]
    return all(plain) and all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache_dir):
    """What UniCon and UniCon-Half learn on their own."""
    place = tmp_path_factory.mktemp("alone")
    return learned(go(place, cache_dir)), learned(go(place, cache_dir, "adapter=unicon_half"))


def test_each_ends_as_if_it_had_trained_alone(tmp_path, cache_dir, alone, monkeypatch):
    made, original = [], FrozenPass.run
    monkeypatch.setattr(FrozenPass, "run", staticmethod(lambda *a: made.append(a[1].device.type) or original(*a)))
    folder = go(tmp_path, cache_dir, HALF)
    half = half_of(tmp_path)
    assert made.count("cpu") == 8  # one for each micro-batch; estimates make others without data
    assert same(learned(folder), alone[0])
    assert same(learned(half), alone[1])
    outcomes = [json.loads((f / "outcome.json").read_text()) for f in (folder, half)]
    for f, mine in zip((folder, half), outcomes, strict=True):
        result = read_results(f / "results.json")
        assert result.flags["shared_pass"] == 2
        assert result.flags["own_step_time_ms"] == mine["step_time_ms"]
        assert result.flags["own_step_time_quartiles_ms"] == mine["step_time_quartiles_ms"]
        assert result.train_seconds == pytest.approx(sum(o["train_seconds"] for o in outcomes), abs=0.1)
        assert result.step_time_ms == pytest.approx(sum(o["step_time_ms"] for o in outcomes))
        assert (f / "examples" / "condition-0.png").exists()


@pytest.mark.slow
def test_two_methods_on_two_tasks_are_four_runs_on_one_pass(tmp_path, cache_dir, alone, monkeypatch):
    made, original = [], FrozenPass.run
    monkeypatch.setattr(FrozenPass, "run", staticmethod(lambda *a: made.append(a[1].device.type) or original(*a)))
    folder = go(tmp_path, cache_dir, HALF, "together_tasks=[depth]")
    assert made.count("cpu") == 8
    named = {p.parent.parent.name.replace("_sd3_tiny", ""): p.parent for p in tmp_path.glob("*/*/results.json")}
    assert sorted(named) == ["unicon_canny", "unicon_depth", "unicon_half_canny", "unicon_half_depth"]
    assert named["unicon_canny"] == folder
    assert same(learned(folder), alone[0])
    assert same(learned(named["unicon_half_canny"]), alone[1])
    deep = go(tmp_path / "deep", cache_dir, "adapter=unicon_half", "task=depth")
    assert same(learned(named["unicon_half_depth"]), learned(deep))
    assert read_results(folder / "results.json").flags["shared_pass"] == 4


@pytest.mark.slow
def test_conditions_may_be_read_in_another_space(tmp_path, cache_dir, alone):
    folder = go(tmp_path, cache_dir, 'together=["unicon connector=zero_mlp condition_space=pixel"]', "budget.images=16")
    (other,) = (p.parent for p in tmp_path.glob("*/*/results.json") if p.parent != folder)
    words = ["adapter.connector=zero_mlp", "adapter.condition_space=pixel"]
    assert same(learned(other), learned(go(tmp_path / "c", cache_dir, *words, "budget.images=16")))


def test_a_resumed_group_goes_on_exactly(tmp_path, cache_dir, alone):
    first = go(tmp_path, cache_dir, HALF, "budget.stop_at_images=16")
    half = half_of(tmp_path)
    assert not (first / "outcome.json").exists()
    assert [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (first, half)] == [["images-000000016"]] * 2
    assert resume(first, cache_dir) == first
    assert same(learned(first), alone[0])
    assert same(learned(half), alone[1])
    assert (half / "results.json").exists()
    assert resume(first, cache_dir) == first  # already finished


@pytest.mark.slow
def test_all_go_on_from_the_newest_checkpoint_that_all_have(tmp_path, cache_dir, alone):
    """As if the process had been killed between the checkpoints of the two."""
    import shutil

    first = go(tmp_path, cache_dir, HALF, "budget.stop_at_images=24", "callbacks.checkpoints.every_images=8")
    half = half_of(tmp_path)
    shutil.rmtree(half / "checkpoints" / "images-000000024")
    resume(first, cache_dir)
    assert same(learned(first), alone[0])
    assert same(learned(half), alone[1])


@pytest.mark.slow
def test_a_signal_in_one_validation_stops_all_at_the_same_step(tmp_path, cache_dir, alone, monkeypatch):
    """The first has validated and waits for its turn; the second is interrupted, and neither has begun the next step."""
    calls, original = [], control.sample_arm

    def interrupted(adapter, *args):
        calls.append(adapter.name)
        if calls.count("unicon_half") == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(adapter, *args)

    monkeypatch.setattr(control, "sample_arm", interrupted)
    first = go(tmp_path, cache_dir, HALF)
    half = half_of(tmp_path)
    names = [[p.name for p in sorted((f / "checkpoints").iterdir())][-1] for f in (first, half)]
    assert names == ["images-000000016"] * 2
    assert calls.count("unicon_half") < 4
    monkeypatch.undo()
    resume(first, cache_dir)
    assert same(learned(first), alone[0])
    assert same(learned(half), alone[1])


@pytest.mark.slow
def test_a_signal_in_a_step_lets_all_finish_it(tmp_path, cache_dir, monkeypatch):
    original = ControlAdapter.training_step

    def interrupted(self, batch, i):
        if self.name == "unicon" and batch.index[0] == 12:  # the second micro-batch of the second step
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, batch, i)

    monkeypatch.setattr(ControlAdapter, "training_step", interrupted)
    first = go(tmp_path, cache_dir, HALF, "callbacks.checkpoints.every_images=1000")
    for folder in (first, half_of(tmp_path)):
        assert [p.name for p in (folder / "checkpoints").iterdir()] == ["images-000000016"]


@pytest.mark.slow
def test_one_that_diverges_leaves_and_the_others_go_on(tmp_path, cache_dir, alone, monkeypatch):
    original = ControlAdapter.losses

    def broken(self, batch, frozen=None):
        losses = original(self, batch, frozen)
        return losses * float("nan") if self.name == "unicon" and batch.index[0] == 8 else losses

    monkeypatch.setattr(ControlAdapter, "losses", broken)
    with pytest.raises(TrainingDiverged, match="loss is nan"):
        go(tmp_path, cache_dir, HALF)
    assert same(learned(half_of(tmp_path)), alone[1])


@pytest.mark.slow
def test_a_member_is_an_ordinary_run(tmp_path, cache_dir, alone):
    """Stopped together, resumed alone."""
    go(tmp_path, cache_dir, HALF, "budget.stop_at_images=16")
    half = half_of(tmp_path)
    resume(half, cache_dir)
    assert same(learned(half), alone[1])
    assert "shared_pass" not in read_results(half / "results.json").flags


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["together=[dit_controlnet]"], "dit_controlnet writes into the backbone"),
        (['together=["unicon flow=bidirectional"]'], "unicon flow=bidirectional writes into the backbone"),
        (["together=[unicon]"], "unicon stands there twice"),
        (["together=[unicorn]"], "did you mean unicon"),
        (['together=["unicon depth=3"]'], "unicon depth=3"),
        (["together=[controlnet]"], "U-Net"),
    ],
)
def test_refusals_come_before_anything_is_made(tmp_path, cache_dir, words, said):
    with pytest.raises(UserError, match=said) as refused:
        go(tmp_path, cache_dir, *words)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_resume_with_other_companions_is_refused(tmp_path, cache_dir):
    first = go(tmp_path, cache_dir, "budget.stop_at_images=8")
    with pytest.raises(UserError, match="differs from the run's own"):
        resume(first, cache_dir, HALF)
