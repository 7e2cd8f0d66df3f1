"""The memory estimate against real steps on tiny models, and the proof that UniCon stores nothing of its backbone."""

import math
from functools import cache

import pytest
import torch
from torch import nn

from src import build
from src.backbones.mmdit import SD3
from src.config import load
from src.profiling import meta
from src.profiling.memory import GIB, blank_batch, describe, estimate_for, track_step
from src.profiling.saved import saved_bytes
from src.profiling.tracker import CATEGORIES, StorageTracker
from src.types import UserError

CPU = torch.device("cpu")
SIZE = 64  # pixels: 4 x 4 image tokens


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A whole untrained model of the embedded kind with two blocks, in the diffusers layout."""
    from diffusers import SD3Transformer2DModel

    from src.embedded.sd3 import TinySD3
    from src.embedded.vae import build_vae

    path, model = tmp_path_factory.mktemp("sd3"), TinySD3(seed=0)
    model.transformer = SD3Transformer2DModel.from_config({**model.transformer.config, "num_layers": 2})
    model.pipeline(build_vae(SIZE)).save_pretrained(path)
    return str(path)


@pytest.fixture
def backbone(folder):
    return SD3(name="tiny", source=folder, native_resolution=SIZE, t5_tokens=0)


@pytest.fixture
def loaded(backbone):
    return backbone.load(CPU, torch.float32)


@cache
def settings(*overrides):
    return load("train", ["adapter=unicon", "hardware=cpu", *overrides])


def unicon(checkpointing="none", **options):
    """Makes the adapter as a run does."""
    overrides = [f"adapter.{key}={value}" for key, value in options.items()]
    cfg = settings(f"hardware.checkpointing={checkpointing}", *overrides)
    return lambda backbone: build.new_adapter(cfg, backbone, training=False)


def estimate(backbone, build=None, **options):
    asked = {"batch": 4, "resolution": SIZE, "precision": "32-true", "ema": False} | options
    return estimate_for(backbone, build or unicon(), **asked)


def step(backbone, batch=4, resolution=SIZE):
    return blank_batch(backbone.facts, "latent", batch, resolution)


def given_bytes(batch):
    text = batch.text.tokens_BLD.nbytes + batch.text.pooled_BP.nbytes
    return text + sum(t.nbytes for t in (batch.latents_BCHW, batch.noise_BCHW, batch.uniform_B, batch.condition))


@pytest.mark.parametrize("options", [{}, {"copy": "decoder"}, {"checkpointing": "both"}, {"condition_space": "pixel"}])
@pytest.mark.parametrize("accumulates", [True, False])
def test_estimate_equals_a_real_step(loaded, options, accumulates):
    told = estimate(loaded, unicon(**options), ema=True, accumulates=accumulates)
    torch.manual_seed(0)
    batch = blank_batch(loaded.facts, options.get("condition_space", "latent"), 4, SIZE)
    real = track_step(unicon(**options)(loaded), batch, ema=True, accumulates=accumulates)
    for name in ("frozen_weights", "trainable_weights", "gradients", "optimizer", "ema"):
        assert getattr(told, f"{name}_gib") == getattr(real, f"{name}_gib"), name
    assert told.when == real.when
    assert told.saved_gib == pytest.approx(real.saved_gib, rel=0.01)
    assert told.phases_gib == pytest.approx(real.phases_gib, rel=0.01)


def test_tracker_equals_the_allocator(loaded):
    adapter, batch = unicon()(loaded), step(loaded, batch=16)
    told = track_step(adapter, batch)
    for p in adapter.parameters():
        p.grad = torch.zeros_like(p)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        adapter.losses(batch).mean().backward()
    events = sorted((e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    before = [told.frozen_weights_gib, told.trainable_weights_gib, told.gradients_gib, told.optimizer_gib]
    moved = max(told.phases_gib["forward"], told.phases_gib["backward"]) - sum(before)
    assert moved * GIB == pytest.approx(peak + given_bytes(batch), rel=0.01)


def test_weights_gradients_and_optimizer_are_exact(loaded):
    told = estimate(loaded, ema=True)
    adapter = unicon()(loaded)
    numbers = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    dead = [p for p in adapter.parameters() if not p.requires_grad]  # the last copy's text query
    assert dead
    frozen = sum(t.nbytes for t in (*loaded.net.parameters(), *loaded.net.buffers(), *dead))
    assert told.trainable_weights_gib * GIB == told.gradients_gib * GIB == told.ema_gib * GIB == 4 * numbers
    assert told.optimizer_gib * GIB == 8 * numbers
    assert told.frozen_weights_gib * GIB == frozen
    parts = [getattr(told, f"{c}_gib") for c in CATEGORIES]
    assert sum(parts) == pytest.approx(told.peak_gib)
    assert max(told.phases_gib.values()) == told.peak_gib


def test_optimizer_step_needs_one_more_copy(loaded):
    adapter = unicon()(loaded)
    trained = [p for p in adapter.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(trained, foreach=True, weight_decay=0.01)
    optimizer.step()
    tracker = StorageTracker()
    tracker.phase = "optimizer"
    state = [t for s in optimizer.state.values() for t in s.values()]
    tracker.hold("optimizer", [*trained, *(p.grad for p in trained), *state])
    with tracker:
        optimizer.step()
    numbers = sum(p.numel() for p in trained)
    assert tracker.peak["temporaries"] == pytest.approx(4 * numbers, rel=0.01)


def growth(backbone):
    """Saved bytes at 256 tokens, and what they would be if they grew in a straight line from 64 and 144."""
    at = {tokens: estimate(backbone, resolution=16 * math.isqrt(tokens)).saved_gib for tokens in (64, 144, 256)}
    return at[256], at[64] + (at[144] - at[64]) * (256 - 64) / (144 - 64)


def test_attention_is_linear_in_tokens(backbone, monkeypatch):
    real, line = growth(backbone)
    assert real == pytest.approx(line, rel=0.005)
    monkeypatch.setattr(meta, "_flash", nn.functional.scaled_dot_product_attention)
    real, line = growth(backbone)
    assert real > 1.05 * line  # what torch itself does on `meta`: all tokens by all tokens


def test_checkpointing_lowers_activations(backbone):
    plain, lean = (estimate(backbone, unicon(checkpointing=c), batch=64) for c in ("none", "both"))
    assert lean.saved_gib < 0.4 * plain.saved_gib
    assert lean.peak_gib < plain.peak_gib


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(loaded, precision):
    full, mixed = (estimate(loaded, batch=64, precision=p) for p in ("32-true", precision))
    dead = sum(p.nbytes for p in unicon()(loaded).parameters() if not p.requires_grad) / GIB  # float32, as all of the adapter
    assert mixed.frozen_weights_gib - dead == pytest.approx((full.frozen_weights_gib - dead) / 2)
    assert mixed.trainable_weights_gib == full.trainable_weights_gib
    assert 0.5 * full.saved_gib < mixed.saved_gib < 0.85 * full.saved_gib


def test_mixed_precision_equals_autocast(backbone, monkeypatch):
    """Against the CPU's autocast, after giving the emulation its list: it keeps norms in 16 bits, a GPU's does not."""
    monkeypatch.setattr(meta, "CAST_FLOAT", set())
    told = estimate(backbone, precision="bf16-mixed", batch=16)
    adapter, batch = unicon()(backbone.load(CPU, torch.bfloat16)), step(backbone, 16)
    tracker = StorageTracker()
    tracker.hold("frozen_weights", [*backbone.net.parameters(), *backbone.net.buffers(), *adapter.parameters()])
    with tracker, torch.autocast("cpu", torch.bfloat16):
        loss = adapter.losses(batch).mean()
    assert told.saved_gib * GIB == pytest.approx(tracker.live["activations"] + given_bytes(batch), rel=0.01)
    assert loss.requires_grad


def test_checkpointed_blocks_are_recomputed_in_mixed_precision(backbone):
    """Recomputation must meet the same kernels as the forward pass, or its temporaries would be float32."""
    full, mixed = (
        estimate(backbone, unicon(checkpointing="both"), batch=64, resolution=256, precision=p)
        for p in ("32-true", "bf16-mixed")
    )
    assert full.when == mixed.when == "backward"
    assert mixed.temporaries_gib < 0.75 * full.temporaries_gib


def test_estimate_disturbs_nothing(backbone, folder):
    estimate(backbone)
    assert backbone.net is None
    loaded = backbone.load(CPU, torch.float32)
    net, hash_before, rng = loaded.net, loaded.weight_hash(), torch.get_rng_state()
    estimate(loaded)
    assert loaded.net is net
    assert loaded.weight_hash() == hash_before
    assert torch.equal(torch.get_rng_state(), rng)


def test_unicon_stores_no_activation_of_the_backbone(loaded):
    adapter = unicon()(loaded)
    report = saved_bytes(lambda: adapter.losses(step(loaded)).mean(), [adapter], loaded)
    assert report.frozen_steps == loaded.facts.depth
    assert report.backbone_bytes == 0
    assert report.total_bytes > 0
    x = torch.zeros(4, 16, 8, 8, requires_grad=True)
    through = saved_bytes(lambda: loaded.predict(x, torch.full((4,), 0.5), step(loaded).text), [], loaded)
    assert through.backbone_bytes == through.total_bytes > 0  # the same eyes see it where it does happen
    assert "run" not in vars(loaded)


def test_no_gradient_reaches_the_backbone(loaded):
    adapter = unicon()(loaded)
    loaded.requires_grad_(True)  # even if it were not frozen
    adapter.losses(step(loaded)).mean().backward()
    assert all(p.grad is None for p in loaded.parameters())
    assert any(p.grad is not None for p in adapter.parameters())


def test_half_stores_less_than_full(loaded):
    reports, estimates = [], []
    for copy in ("full", "decoder"):
        adapter = unicon(copy=copy)(loaded)
        reports.append(saved_bytes(lambda a=adapter: a.losses(step(loaded)).mean(), [adapter], loaded))
        estimates.append(estimate(loaded, unicon(copy=copy)))
    assert reports[1].total_bytes < 0.6 * reports[0].total_bytes
    assert estimates[1].saved_gib < 0.7 * estimates[0].saved_gib
    assert estimates[1].peak_gib < estimates[0].peak_gib


def test_saved_bytes_equal_the_tracker(loaded):
    """Two independent counts of the same thing: hooks of autograd, and storages that live when the forward pass ends."""
    adapter = unicon()(loaded)
    report = saved_bytes(lambda: adapter.losses(step(loaded)).mean(), [adapter], loaded)
    assert report.total_bytes / GIB == pytest.approx(track_step(adapter, step(loaded)).saved_gib, rel=0.03)


def test_describe(backbone):
    line = describe(estimate(backbone))
    assert line.startswith("estimated peak 0.")
    assert "trainable weights 0.0" in line
    assert "ema" not in line
    assert "\n" not in line


def test_refusals(backbone):
    with pytest.raises(ValueError, match=r"precision='64'.*32-true"):
        estimate(backbone, precision="64")
    with pytest.raises(UserError, match="64 or 80"):
        estimate(backbone, resolution=72)
