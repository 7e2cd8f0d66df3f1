"""Switches that make a step faster or smaller, and what each of them does to results: nothing, rounding, or a stated change."""

import copy
import sys
import types
from operator import methodcaller

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src import build
from src.backbones.quantize import QuantizedLinear, int8_product, quantize_linears, rounded
from src.backbones.switches import speed_up
from src.backbones.unread import unread_modules
from src.bench.quantized import loss_change
from src.checkpoint import AdapterCheckpointIO, CheckpointError, fitting_weights
from src.config import config_sha, load, science_diff
from src.construct import construct
from src.profiling.memory import estimate_for
from src.types import UserError
from tests.conftest import CPU, noisy_inputs
from tests.contract.registry import configured as composed
from tests.contract.test_adapters import alone, controlled, make_batch, shaken

KINDS = ("int8", "fp8")
TINY = ("sd3_tiny", "pixart_tiny", "sd21_tiny")
CAPTIONS = ["a large red ball", "a small blue cube"]


def configured(base="sd3_tiny", adapter="unicon", *more):
    return composed("train", f"backbone={base}", f"adapter={adapter}", "hardware=cpu", *more)


@pytest.fixture(scope="module")
def loaded():
    """Each embedded backbone, exact and in 8 bits, with two captions."""
    known = {}

    def get(base, kind=None):
        if (base, kind) not in known:
            node = configured(base).backbone
            node.quantize = kind  # fp8 is refused on a CPU by the configuration; its arithmetic can be tried there
            known[base, kind] = construct(node).load(CPU, torch.float32)
        return known[base, kind]

    return get


@pytest.fixture(scope="module")
def texts(loaded):
    known = {}

    def get(base):
        if base not in known:
            known[base] = loaded(base).encode_text(CAPTIONS, CPU)
        return known[base]

    return get


def made(backbone, base="sd3_tiny", adapter="unicon", *more):
    return build.new_adapter(configured(base, adapter, *more), backbone, training=False)


# ---- 8 bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_weights_are_as_near_as_the_format_allows(kind):
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    levels, scale = rounded(weight, kind)
    error = (levels.float() * scale[:, None] - weight).abs()
    # int8: half a level. e4m3 has 3 bits behind the point: half of 2^-3, and half its smallest step near zero
    bound = scale[:, None] / 2 if kind == "int8" else torch.maximum(weight.abs() * 2**-4, scale[:, None] * 2**-10)
    assert (error <= bound * 1.0001).all()
    assert levels.element_size() == 1
    assert torch.equal(levels[3].float(), torch.zeros(64))
    assert scale[3] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_layer_is_the_product_with_its_rounded_weights(kind):
    gen = torch.Generator().manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(2, 5, 64, generator=gen)
    small = QuantizedLinear(layer, kind)
    weight = small.weight.float() * small.scale[:, None]
    if kind == "int8":
        expected, tolerance = F.linear(x, weight, layer.bias), 1e-5
    else:
        levels, scale = rounded(x.flatten(0, 1), "fp8")
        expected, tolerance = F.linear((levels.float() * scale[:, None]).view_as(x), weight, layer.bias), 2**-7
    assert torch.allclose(small(x), expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))
    assert (small(x) - layer(x)).abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_its_gradient_is_that_of_the_rounded_weights_and_nothing_is_kept_for_it(kind):
    small = QuantizedLinear(nn.Linear(64, 48), kind)
    x = torch.randn(3, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = small(x)
    own = {small.weight.untyped_storage().data_ptr(), small.scale.untyped_storage().data_ptr()}
    assert {t.untyped_storage().data_ptr() for t in kept} <= own
    y.sum().backward()
    expected = torch.ones(3, 48) @ (small.weight.float() * small.scale[:, None])
    assert torch.allclose(x.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_casting_a_network_leaves_its_8_bits_alone(kind):
    net = nn.Sequential(QuantizedLinear(nn.Linear(32, 32), kind), nn.Linear(32, 16))
    weight, scale = net[0].weight.clone(), net[0].scale.clone()
    net.to(torch.bfloat16)
    assert net[1].weight.dtype == net[0].bias.dtype == torch.bfloat16
    assert net[0].weight.dtype == weight.dtype
    assert torch.equal(net[0].weight.view(torch.int8), weight.view(torch.int8))
    assert torch.equal(net[0].scale, scale)
    assert net(torch.randn(4, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    twin = copy.deepcopy(net).to("meta")
    assert twin[0].weight.is_meta
    assert twin[0].weight.dtype == weight.dtype


def test_fp8_leaves_layers_that_its_kernels_do_not_take():
    odd = nn.ModuleDict({"a": nn.Linear(24, 32), "b": nn.Linear(32, 32)})
    assert quantize_linears([odd], "fp8") == 1
    assert isinstance(odd["a"], nn.Linear)
    assert quantize_linears([odd], "int8") == 1


def test_autocast_decides_the_precision_of_the_product():
    small = QuantizedLinear(nn.Linear(32, 32), "int8")
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = small(x)
    assert y.dtype == torch.bfloat16
    exact = int8_product(x.bfloat16(), small.weight, small.scale, torch.bfloat16) + small.bias.bfloat16()
    assert torch.equal(y, exact)


@pytest.mark.parametrize("base", TINY)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_backbone_is_smaller_says_so_and_gives_exact_copies(loaded, base, kind):
    exact, small = loaded(base), loaded(base, kind)
    for copied in (
        lambda b: b.copy_steps([0, b.facts.depth - 1]),
        *map(methodcaller, ("copy_entry", "copy_head", "copy_embed")),
    ):
        mine, theirs = (dict(copied(b).named_parameters()) for b in (small, exact))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(p, theirs[n]) and p.requires_grad for n, p in mine.items())
    again = copy.copy(exact)
    again._modules, again.quantize = dict(exact._modules), kind
    assert again.attach(copy.deepcopy(exact.net)).weight_hash() == small.weight_hash()
    assert small.weight_hash().endswith(f"-{kind}")
    assert "-" not in exact.weight_hash()
    sizes = [sum(t.nbytes for t in (*b.net.parameters(), *b.net.buffers())) for b in (exact, small)]
    assert sizes[1] < (0.85 if base == "sd21_tiny" else 0.35) * sizes[0]  # most of a U-Net's weights are convolutions
    counts = [sum(p.numel() for p in b.net.parameters()) for b in (exact, small)]
    assert counts[0] == counts[1]
    with torch.no_grad():
        told, coarse = (b.predict(*noisy_inputs(b)) for b in (exact, small))
    error = float((told - coarse).pow(2).mean().sqrt() / told.pow(2).mean().sqrt())
    assert 0 < error < {"int8": 0.03, "fp8": 0.15}[kind]


def test_a_full_copy_starts_as_the_exact_backbone_even_on_a_quantized_one(loaded, texts):
    exact, small = loaded("sd3_tiny"), loaded("sd3_tiny", "int8")
    adapter = made(small)
    batch = make_batch(adapter, small, texts("sd3_tiny"))
    with torch.no_grad():
        start = controlled(adapter, small, batch)
        full = (start - alone(adapter, exact, batch)).abs().max()
    assert float(full) <= 1e-5


@pytest.mark.parametrize(("base", "adapter"), [("sd3_tiny", "dit_controlnet"), ("sd21_tiny", "controlnet")])
def test_gradients_cross_a_quantized_backbone(loaded, texts, base, adapter):
    small = loaded(base, "int8")
    trained = shaken(made(small, base, adapter))
    trained.losses(make_batch(trained, small, texts(base))).mean().backward()
    bare = [n for n, p in trained.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().any())]
    assert bare == []


@pytest.mark.parametrize("base", ["sd3_tiny", "sd21_tiny"])
def test_the_estimate_knows_the_quantized_weights(loaded, base):
    small = loaded(base, "int8")
    estimate = estimate_for(
        small, lambda b: made(b, base), batch=2, resolution=64, precision="32-true", ema=False, accumulates=False
    )
    idle = sum(p.nbytes for p in made(small, base).parameters() if not p.requires_grad)
    bytes_ = sum(t.nbytes for t in (*small.net.parameters(), *small.net.buffers()))
    assert estimate.frozen_weights_gib * 2**30 == pytest.approx(bytes_ + idle, rel=0.01)


def test_the_change_of_the_loss_is_measured_on_the_same_draws(loaded, texts):
    exact, small = loaded("sd3_tiny"), loaded("sd3_tiny", "int8")
    adapter = made(exact, "sd3_tiny", "unicon_half")
    batches = [make_batch(adapter, exact, texts("sd3_tiny")) for _ in range(2)]
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-3)
    for _ in range(5):
        adapter.losses(batches[0]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = adapter.state_dict()
    told = loss_change(lambda b: made(b, "sd3_tiny", "unicon_half"), weights, exact, small, batches)
    assert told["change"]["n"] == 4
    assert told["quantize"] == "int8"
    assert told["loss"]["value"] == pytest.approx(float(adapter.losses(batches[0]).mean().detach()), rel=1e-5)
    assert told["change"]["value"] == pytest.approx(told["quantized_loss"]["value"] - told["loss"]["value"])
    assert 0 < abs(told["relative"]) < 0.1
    assert loss_change(lambda b: made(b, "sd3_tiny", "unicon_half"), weights, exact, exact, batches)["change"]["value"] == 0


def test_a_checkpoint_of_a_quantized_backbone_is_refused_on_the_exact_one(loaded, tmp_path):
    weights = {"a": torch.zeros(1)}
    meta = {"adapter": "unicon", "backbone": "x", "backbone_hash": loaded("sd3_tiny", "int8").weight_hash()}
    AdapterCheckpointIO().save_checkpoint({"state_dict": weights, "controlbench": meta}, tmp_path / "c")
    assert fitting_weights(tmp_path / "c", weights, meta).keys() == weights.keys()
    with pytest.raises(CheckpointError, match=r"-int8"):
        fitting_weights(tmp_path / "c", weights, meta | {"backbone_hash": loaded("sd3_tiny").weight_hash()})


def test_a_quantized_backbone_is_science_and_an_unquantized_one_is_what_it_always_was():
    plain, small = configured(), configured("sd3_tiny", "unicon", "backbone.quantize=int8")
    old = plain.copy()
    del old.backbone.quantize
    assert config_sha(plain) == config_sha(old) != config_sha(small)
    assert science_diff(old, plain) == []
    assert science_diff(plain, small) == ["backbone.quantize"]


# ---- compiled blocks, memory layout ---------------------------------------------------------------------------------------


def switched(backbone, adapter, **changes):
    chosen = {"compile": "none", "cuda_graphs": False, "channels_last": False} | changes
    return speed_up(backbone, adapter.parts().values(), grad_through_backbone=adapter.grad_through_backbone, **chosen)


@pytest.mark.parametrize("base", ["sd3_tiny", "sd21_tiny"])
def test_compiling_the_frozen_half_takes_its_blocks_alone_and_keeps_every_name(base, texts):
    backbone = construct(configured(base).backbone).load(CPU, torch.float32)
    adapter = shaken(made(backbone, base))
    batch, names = make_batch(adapter, backbone, texts(base)), list(adapter.state_dict())
    with torch.no_grad():
        before = adapter.losses(batch)
    assert switched(backbone, adapter, compile="frozen") == []
    taken = {m for m in backbone.net.modules() if m._compiled_call_impl is not None}
    steps = [p for s in backbone.steps() for p in (s.parts.values() if hasattr(s, "parts") else [s])]
    assert taken == set(steps)
    assert not any(m._compiled_call_impl is not None for m in adapter.modules())
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # the compiler itself takes minutes: see the slow test
        assert torch.equal(adapter.losses(batch), before)
    switched(backbone, adapter, compile="all")
    assert any(m._compiled_call_impl is not None for m in adapter.modules())
    assert list(adapter.state_dict()) == names


@pytest.mark.slow
def test_a_compiled_frozen_half_gives_the_same_losses_and_gradients(texts):
    backbone = construct(configured().backbone).load(CPU, torch.float32)
    adapter = shaken(made(backbone))
    batch = make_batch(adapter, backbone, texts("sd3_tiny"))

    def step():
        adapter.zero_grad()
        loss = adapter.losses(batch).mean()
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in adapter.parameters() if p.grad is not None]

    loss, gradients = step()
    switched(backbone, adapter, compile="frozen")
    compiled, others = step()
    assert torch.allclose(compiled, loss, rtol=1e-5)
    assert all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max())) for a, b in zip(others, gradients, strict=True)
    )


def test_channels_last_changes_the_layout_of_a_unet_and_no_more_than_rounding(texts, tmp_path):
    backbone = construct(configured("sd21_tiny").backbone).load(CPU, torch.float32)
    digest = backbone.weight_hash()
    adapter = shaken(made(backbone, "sd21_tiny"))
    batch = make_batch(adapter, backbone, texts("sd21_tiny"))
    before = adapter.losses(batch)
    before.mean().backward()
    gradients = {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}
    adapter.zero_grad()
    assert switched(backbone, adapter, channels_last=True) == []
    kernels = [p for m in (backbone.net, adapter) for p in m.parameters() if p.ndim == 4 and p.shape[2] > 1 and p.shape[1] > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    seen = []
    hook = backbone.net.mid_block.resnets[0].register_forward_hook(
        lambda _m, _a, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    after = adapter.losses(batch)
    hook.remove()
    assert seen == [True]  # features follow the kernels
    assert torch.allclose(after, before, rtol=1e-4)
    after.mean().backward()
    for name, gradient in gradients.items():
        new = adapter.get_parameter(name).grad
        assert torch.allclose(new, gradient, rtol=1e-2, atol=1e-4 * float(gradient.abs().max())), name
    assert backbone.weight_hash() == digest
    meta = {"adapter": "a", "backbone": "b", "backbone_hash": digest}
    AdapterCheckpointIO().save_checkpoint({"state_dict": adapter.state_dict(), "controlbench": meta}, tmp_path / "c")
    back = fitting_weights(tmp_path / "c", adapter.state_dict(), meta)
    assert all(torch.equal(back[k], v) for k, v in adapter.state_dict().items())


def test_what_does_nothing_or_cannot_work_is_said(loaded):
    backbone = copy.copy(loaded("sd3_tiny"))
    adapter = made(backbone, "sd3_tiny", "dit_controlnet")
    assert "channels_last does nothing" in switched(backbone, adapter, channels_last=True)[0]
    with pytest.raises(UserError, match=r"gradient crosses the backbone; write hardware\.cuda_graphs=false"):
        switched(backbone, adapter, compile="frozen", cuda_graphs=True)
    assert not backbone.graphs


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["hardware=cpu", "hardware.cuda_graphs=true"], "hardware.cuda_graphs=false"),
        (["hardware=h200", "hardware.cuda_graphs=true"], "hardware.compile=frozen"),
        (["hardware=cpu", "backbone.quantize=fp8"], "backbone.quantize=int8"),
        (["hardware=cpu", "backbone.quantize=int4"], "backbone.quantize=int4"),
        (["hardware=cpu", "hardware.compile=frozn"], "did you mean frozen?"),
        (["hardware=cpu", "optimizer=adamw8bit"], "optimizer=adamw"),
        (["hardware=h200", "hardware.precision=16-mixed", "optimizer=adamw_fused"], "hardware.precision=bf16-mixed"),
    ],
)
def test_a_refusal_names_the_fix(words, fix, monkeypatch):
    fake = types.ModuleType("bitsandbytes.optim")  # with the package there, what is missing is the GPU
    fake.AdamW8bit = type("AdamW8bit", (torch.optim.AdamW,), {})
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", fake)
    with pytest.raises(UserError) as refused:
        load("train", words)
    assert fix in str(refused.value)
    assert "\n" not in str(refused.value)


# ---- the step -------------------------------------------------------------------------------------------------------------


def test_the_fused_optimizer_is_adamw():
    weights = [torch.randn(7, 5, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    after = []
    for option in ("adamw", "adamw_fused"):
        algorithm = construct(load("train", ["hardware=cpu", f"optimizer={option}"]).optimizer.algorithm)
        own = [nn.Parameter(w.clone()) for w in weights]
        optimizer = algorithm(own)
        assert bool(optimizer.defaults["fused"]) == (option == "adamw_fused")
        for step in range(5):
            for p in own:
                p.grad = torch.sin(p.detach() * (step + 1))
            optimizer.step()
        after.append(own)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*after, strict=True))


@pytest.mark.parametrize("base", TINY)
def test_a_step_asks_the_device_for_no_number(base):
    """On `meta` there are no numbers: whoever asked for one, and so would wait for a GPU, would be refused."""
    cfg = configured(base)
    backbone = construct(cfg.backbone)
    with torch.device("meta"):
        hollow = backbone.hollow(torch.float32)
        adapter = build.new_adapter(cfg, hollow)
        batch = build.blank_batch(hollow.facts, adapter.condition_space, 2, 64)
    adapter.training_step(batch, 0).backward()
    adapter.configure_gradient_clipping(None)
    assert adapter.last_grad_norm.is_meta
    assert adapter.last_loss.is_meta


def test_features_of_inference_mode_cannot_be_trained_on(loaded, texts):
    """Why the frozen half runs under no_grad: a trained layer keeps the feature that it multiplies."""
    backbone = loaded("sd3_tiny")
    adapter = shaken(made(backbone))
    batch = make_batch(adapter, backbone, texts("sd3_tiny"))
    with torch.inference_mode():
        state = backbone.begin(batch.latents_BCHW, batch.uniform_B, batch.text)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        adapter.connectors[0](state.x.clone(), state.x)


def test_what_the_frozen_half_computes_in_vain(loaded, texts):
    """The last block's queries of the text, which diffusers' own forward cuts off; the frozen head is not even asked."""
    backbone = loaded("sd3_tiny")
    adapter = shaken(made(backbone))
    batch = make_batch(adapter, backbone, texts("sd3_tiny"))
    silent, idle = unread_modules(backbone.steps()[-1], lambda: adapter.losses(batch))
    assert silent == ["attn.add_q_proj"]
    assert idle == []
    silent, idle = unread_modules(backbone._head(), lambda: adapter.losses(batch))
    assert silent == []
    assert "proj_out" in idle
