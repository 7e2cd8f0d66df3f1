"""Noised images that come again: a fixed set of draws, their features on disk, several steps per batch, work ahead."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.adapters.base import ControlAdapter
from src.adapters.frozen import FrozenPass
from src.callbacks.base import Preempted
from src.config import load
from src.data.feature_cache import WithFollowing
from src.results import read_results, read_rows
from src.train.flow import train
from src.types import Batch, UserError
from tests.conftest import QUICK

# 6 optimizer steps of 8 images over 16: three epochs, each step in two micro-batches
RUN = [*QUICK, "data.train_images=16", "data.val_images=4", "budget.images=48", "budget.effective_batch=8"]
RUN += ["hardware.micro_batch=4", "validation.every_images=1000", "validation.images=2", "validation.final_images=2"]
RUN += ["callbacks.meter.every_steps=1", "caption_dropout=0.3", "adapter=unicon_half", "optimizer.warmup_images=8"]
TWO_DRAWS = "feature_cache.draws=2"


def go(place: Path, cache: Path, *extra: str) -> Path:
    typed = [*RUN, f"output_dir={place}", f"cache_dir={cache}", *extra]
    try:
        return train(load("train", typed), typed)
    except Preempted as stopped:
        return stopped.folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((folder / "checkpoints").glob("images-*"))[-1] / "adapter.safetensors")


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row]


def same(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    return losses(a) == losses(b) and x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.fixture
def seen(monkeypatch):
    """What each micro-batch of a training held."""
    held: list[dict] = []
    original = ControlAdapter.training_step

    def spy(self, batch, i):
        keys = ("index", "ids", "noise_BCHW", "uniform_B", "condition", "text")
        held.append({k: getattr(batch, k) for k in keys} | {"type": type(batch)})
        return original(self, batch, i)

    monkeypatch.setattr(ControlAdapter, "training_step", spy)
    return held


@pytest.fixture
def made(monkeypatch):
    """The batch size of every frozen pass that was run on real tensors."""
    sizes: list[int] = []
    original = FrozenPass.run

    def spy(backbone, x_t, *rest):
        if not x_t.is_meta:
            sizes.append(len(x_t))
        return original(backbone, x_t, *rest)

    monkeypatch.setattr(FrozenPass, "run", staticmethod(spy))
    return sizes


# ---- draws and the cache ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_draws_are_fixed_and_take_turns(tmp_path, cache_dir, seen):
    go(tmp_path, cache_dir, TWO_DRAWS)
    by_draw: dict[int, list] = {}
    for batch in seen:
        for i, draw in enumerate(batch["index"]):
            key = (batch["ids"][i], batch["uniform_B"][i].item(), batch["noise_BCHW"][i].sum().item())
            by_draw.setdefault(draw, []).append((*key, batch["text"].tokens_BLD[i].sum().item()))
    assert sorted(by_draw) == list(range(32))  # two of each image; the third epoch repeats the first one's
    assert all(len(set(same)) == 1 for same in by_draw.values())
    assert [len(by_draw[draw]) for draw in range(32)] == [2, 1] * 16
    assert len({same[0][1] for same in by_draw.values()}) == 32


def test_features_from_the_disk_teach_the_same(tmp_path, cache_dir, made, capsys):
    fresh = go(tmp_path / "a", cache_dir, TWO_DRAWS)
    assert not made
    kept = go(tmp_path / "b", cache_dir, TWO_DRAWS, "feature_cache.dtype=fp32")
    assert same(kept, fresh)
    said = capsys.readouterr().out
    assert "frozen features: 16 images x 2 draws x " in said
    assert made == [1] + [4] * 8  # one to know the bytes, then all draws; none in the training
    stores = {f.parent: json.loads(f.read_text()) for f in cache_dir.glob("features-*/store.json")}
    store, facts = next((f, d) for f, d in stores.items() if d["precision"] == ["32-true", "fp32"])
    assert facts["rows"] == 32
    held = load_file(next(store.glob("rows-*.safetensors")))
    assert sorted(held) == ["text.3", "x.3", "x.4", "x.5", "x.6"]
    assert sum(t[0].nbytes for t in held.values()) == facts["row_bytes"]
    assert read_results(kept / "results.json").flags["feature_dtype"] == "fp32"


@pytest.mark.slow
def test_features_in_sixteen_bits_teach_nearly_the_same_with_and_without_condition(tmp_path, cache_dir, made):
    halved = go(tmp_path / "c", cache_dir, TWO_DRAWS, "feature_cache.dtype=bf16", "control_arm=true", "budget.images=16")
    assert made == [1] + [4] * 8 + [1]  # the arm without condition reads the same features
    whole = go(tmp_path / "d", cache_dir, TWO_DRAWS, "budget.images=16")
    rounded, exact = losses(halved), losses(whole)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["feature_cache.dtype=fp32"], r"give feature_cache\.draws="),
        ([TWO_DRAWS, "feature_cache.dtype=fp32", "adapter=dit_controlnet"], "writes into the backbone"),
        ([TWO_DRAWS, "feature_cache.dtype=fp32", "feature_cache.budget_gib=0.0001"], "more than feature_cache.budget_gib"),
        ([TWO_DRAWS, "feature_cache.dtype=fp16"], "bf16"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_made(tmp_path, cache_dir, words, said):
    with pytest.raises(UserError, match=said) as refused:
        go(tmp_path, cache_dir, *words)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


# ---- several steps per pass -------------------------------------------------------------------------------------------


def test_several_steps_learn_from_one_pass(tmp_path, cache_dir, seen, made):
    straight = go(tmp_path / "a", cache_dir, "reuse=3")
    assert [batch["index"][0] for batch in seen] == [0, 4] * 3 + [8, 12] * 3
    assert made == [4] * 4
    assert len(read_rows(straight / "metrics.jsonl")) == 7  # six steps and a validation
    assert read_results(straight / "results.json").flags["reuse"] == 3


@pytest.mark.slow
def test_a_run_that_stopped_between_two_uses_goes_on_exactly(tmp_path, cache_dir):
    straight = go(tmp_path / "a", cache_dir, "reuse=3", "together=['unicon_half copy=skip_layer']")
    stopped = go(tmp_path / "b", cache_dir, "reuse=3", "budget.stop_at_images=16")
    typed = [f"resume={stopped}", f"cache_dir={cache_dir}"]
    train(load("train", typed), typed)
    assert same(stopped, straight)


@pytest.mark.slow
def test_a_method_without_a_pass_of_its_own_may_repeat_batches_too(tmp_path, cache_dir, seen, made):
    go(tmp_path, cache_dir, "reuse=2", "adapter=template", "budget.images=16")
    assert [batch["index"][0] for batch in seen] == [0, 4, 0, 4]
    assert not made


# ---- ahead ------------------------------------------------------------------------------------------------------------


def test_batches_know_the_one_that_follows():
    class Item:
        following = None

    items = [Item() for _ in range(3)]
    given = [(item, item.following) for item in WithFollowing(items)]
    assert given == [(items[0], items[1]), (items[1], items[2]), (items[2], None)]
    assert len(WithFollowing(items)) == 3
    assert list(WithFollowing([])) == []


@pytest.mark.slow
def test_passes_made_ahead_teach_the_same(tmp_path, cache_dir, made, capsys):
    plain = go(tmp_path / "a", cache_dir)
    ahead = go(tmp_path / "b", cache_dir, "hardware.overlap=true")
    assert same(ahead, plain)
    assert made == [4] * 12
    assert "saves nothing on a CPU" in capsys.readouterr().out
    assert read_results(ahead / "results.json").config_sha == read_results(plain / "results.json").config_sha


@pytest.mark.slow
def test_the_stream_is_the_ordinary_one_where_nothing_repeats(tmp_path, cache_dir, seen):
    go(tmp_path, cache_dir, "budget.images=16")
    plain = [(b["index"], b["ids"], b["noise_BCHW"]) for b in seen]
    assert [b[0] for b in plain] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert {b["type"] for b in seen} == {Batch}
