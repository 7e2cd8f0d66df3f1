"""What every registered adapter promises on every backbone that it knows."""

import json

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file

from src import build
from src.checkpoint import META_KEY, AdapterCheckpointIO
from src.profiling.saved import saved_bytes
from src.support import matrix, options
from src.types import Batch
from tests.conftest import CPU
from tests.contract.registry import EMBEDDED_BACKBONES, configured, node

CELLS = [(a, b) for a in options("adapter") for b in EMBEDDED_BACKBONES if matrix()[a][b] is None]


@pytest.fixture(scope="module")
def loaded():
    made = {name: instantiate(node("backbone", name)).load(CPU, torch.float32) for name in EMBEDDED_BACKBONES}
    text = {
        name: b.encode_text(["a large red ball, gray floor", "a small blue cube, dark floor"], CPU) for name, b in made.items()
    }
    return made, text


@pytest.fixture(scope="module")
def configs(loaded):
    """Each network's own configuration before any adapter was made for it."""
    return {name: described(backbone) for name, backbone in loaded[0].items()}


def described(backbone) -> str:
    """Both ways in which diffusers holds a configuration: some of its classes write into one of them."""
    config = backbone.net.config
    return json.dumps([dict(config), {key: getattr(config, key) for key in config}], sort_keys=True, default=str)


@pytest.fixture(params=CELLS, ids=lambda c: f"{c[0]}-{c[1]}")
def cell(request, loaded, configs):
    """(adapter, backbone, batch) with random parts seeded. Whatever a test does, the backbone's configuration stays."""
    name, base = request.param
    backbone, text = loaded[0][base], loaded[1][base]
    adapter = build.new_adapter(
        configured("train", f"adapter={name}", f"backbone={base}", "hardware=cpu"), backbone, training=False
    )
    yield adapter, backbone, make_batch(adapter, backbone, text)
    assert described(backbone) == configs[base]


def make_batch(adapter, backbone, text) -> Batch:
    gen, facts = torch.Generator().manual_seed(1), backbone.facts
    side = backbone.native_resolution // facts.factor
    latents = torch.randn(2, facts.latent_channels, side, side, generator=gen)
    pixels = torch.rand(2, 3, backbone.native_resolution, backbone.native_resolution, generator=gen)
    condition = torch.randn(latents.shape, generator=gen) if adapter.condition_space == "latent" else pixels
    noise = torch.randn(latents.shape, generator=gen)
    return Batch([0, 1], ["a", "b"], latents, noise, torch.tensor([0.3, 0.7]), text, condition)


def shaken(adapter):
    """The adapter as if trained: every parameter moved."""
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=gen))
    return adapter


def controlled(adapter, backbone, batch, scale=1.0):
    t = adapter.objective.sample_t(batch.uniform_B)
    return adapter.predict(backbone, batch.latents_BCHW, t, batch.text, adapter.encode_condition(batch.condition), scale)


def alone(adapter, backbone, batch):
    with torch.no_grad():
        return backbone.predict(batch.latents_BCHW, adapter.objective.sample_t(batch.uniform_B), batch.text)


def test_declarations_are_complete(cell):
    adapter, backbone, _ = cell
    assert backbone.facts.family in adapter.families
    assert isinstance(adapter.grad_through_backbone, bool)
    assert isinstance(adapter.identity_at_init, bool)
    assert adapter.condition_space in ("latent", "pixel")


def test_identity_at_the_start(cell):
    adapter, backbone, batch = cell
    difference = (controlled(adapter, backbone, batch) - alone(adapter, backbone, batch)).abs().max()
    assert (float(difference.detach()) <= 1e-5) == adapter.identity_at_init


def test_scale_zero_is_the_backbone_even_when_trained(cell):
    adapter, backbone, batch = cell
    shaken(adapter)
    with torch.no_grad():
        expected = alone(adapter, backbone, batch)
        assert torch.equal(controlled(adapter, backbone, batch, 0.0), expected)
        near = (controlled(adapter, backbone, batch, 1e-4) - expected).abs().max()
        far = (controlled(adapter, backbone, batch, 1.0) - expected).abs().max()
    assert near < 1e-2 * far


def test_the_condition_matters_once_trained(cell):
    adapter, backbone, batch = cell
    shaken(adapter)
    with torch.no_grad():
        one = controlled(adapter, backbone, batch)
        batch.condition = batch.condition.flip(0)
        assert (controlled(adapter, backbone, batch) - one).abs().max() > 1e-5  # rounding is a hundredth of it


def test_samples_of_a_batch_do_not_mix(cell):
    adapter, backbone, batch = cell
    shaken(adapter)
    with torch.no_grad():
        both = controlled(adapter, backbone, batch)
        assert torch.equal(controlled(adapter, backbone, batch), both)  # nothing is kept from one call to the next
        for row in (slice(0, 1), slice(1, 2)):
            tensors = [getattr(batch, k)[row] for k in ("latents_BCHW", "noise_BCHW", "uniform_B")]
            half = Batch(batch.index[row], batch.ids[row], *tensors, batch.text[row], batch.condition[row])
            assert torch.allclose(controlled(adapter, backbone, half), both[row], atol=1e-4)


def test_every_parameter_has_a_gradient_within_the_declared_steps(cell):
    """Real steps from the real start, where zero layers hold gradients back."""
    adapter, _, batch = cell
    trained = {n: p for n, p in adapter.named_parameters() if p.requires_grad}
    optimizer, bare = torch.optim.AdamW(trained.values(), 1e-3), set(trained)
    for step in range(1, adapter.steps_to_all + 1):
        assert bare or step <= 2, f"all had a gradient after {step - 1} steps, and {adapter.steps_to_all} are declared"
        optimizer.zero_grad()
        adapter.losses(batch).mean().backward()
        bare -= {n for n in bare if trained[n].grad is not None and trained[n].grad.abs().any()}
        optimizer.step()
    assert bare == set()


def test_gradients_reach_all_of_the_adapter_and_nothing_else(cell):
    adapter, backbone, batch = cell
    shaken(adapter).losses(batch).mean().backward()
    bare = [n for n, p in adapter.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().any())]
    assert bare == []
    assert all(p.grad is None for p in backbone.parameters())


def test_backbone_activations_are_stored_only_if_declared(cell):
    """Counted by autograd's own saved-tensor hooks while the frozen blocks run."""
    adapter, backbone, batch = cell
    report = saved_bytes(lambda: shaken(adapter).losses(batch).mean(), [adapter], backbone)
    assert report.frozen_steps == backbone.facts.depth
    assert (report.backbone_bytes > 0) == adapter.grad_through_backbone
    assert report.total_bytes > 0


def test_parts_are_the_whole_adapter(cell):
    adapter, _, _ = cell
    inside = [id(p) for m in adapter.parts().values() for p in m.parameters()]
    assert sorted(inside) == sorted(id(p) for p in adapter.parameters())


def test_state_holds_no_backbone_tensor(cell):
    adapter, backbone, _ = cell
    frozen = {t.data_ptr() for t in backbone.net.state_dict().values()}
    assert not frozen & {t.data_ptr() for t in adapter.state_dict().values()}
    assert not any(name.startswith(("_frozen", "backbone", "net")) for name in adapter.state_dict())


def test_the_file_of_a_checkpoint_holds_the_adapter_and_no_more(cell, tmp_path):
    """Through Lightning's own saving, as in a run."""
    adapter, _, _ = cell
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", plugins=[AdapterCheckpointIO()], **quiet)
    adapter.on_save_checkpoint = lambda checkpoint: checkpoint.update({META_KEY: {"adapter": adapter.name}})
    trainer.strategy.connect(adapter)
    trainer.save_checkpoint(tmp_path / "one", weights_only=True)
    kept, own = load_file(tmp_path / "one" / "adapter.safetensors"), adapter.state_dict()
    assert kept.keys() == own.keys()
    assert all(torch.equal(kept[name], own[name]) for name in own)
    assert {f.name for f in (tmp_path / "one").iterdir()} == {"adapter.safetensors", "meta.json", "state.pt"}
    assert (tmp_path / "one" / "state.pt").stat().st_size < 20_000  # no tensor hides there


def test_a_few_steps_lower_the_loss(cell):
    adapter, backbone, batch = cell
    digest, optimizer = backbone.weight_hash(), torch.optim.AdamW(adapter.parameters(), 1e-3)
    losses = []
    while len(losses) < 40 and (not losses or losses[-1] >= 0.9 * losses[0]):
        optimizer.zero_grad()
        loss = adapter.losses(batch).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert backbone.weight_hash() == digest


def test_checkpointing_changes_memory_not_the_result(cell):
    adapter, backbone, batch = cell
    shaken(adapter)
    gradients = []
    for scope in ("none", "adapter", "both"):
        adapter.checkpointing = scope
        adapter.zero_grad()
        adapter.losses(batch).mean().backward()
        gradients.append([p.grad.clone() for p in adapter.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))
