"""Control LoRA: the sums that stand for a widened input and for changed weights, what they leave behind, what is refused."""

import copy

import pytest
import torch
from torch import nn

from src.adapters.control_lora import ControlLoRA, changed
from src.config import Unsupported, load
from src.construct import construct
from src.support import check_cell
from tests.conftest import CPU
from tests.contract.test_adapters import make_batch, shaken


def made(backbone, **options):
    return shaken(ControlLoRA(backbone, backbone.objective, None, "control_lora", rank=4, **options))


def written_into(adapter, backbone, scale):
    """A twin of the backbone whose weights hold the changes, and whose embedding reads twice as many channels."""
    twin = copy.copy(backbone)
    twin._modules = dict(backbone._modules)
    twin.attach(copy.deepcopy(backbone.net))
    with torch.no_grad():
        for k, (places, loras) in enumerate(zip(adapter.places, adapter.lora, strict=True)):
            for place, lora in zip(places, loras, strict=True):
                twin.steps()[k].get_submodule(place).weight += scale * lora.up.weight @ lora.down.weight
    embed = twin._embed()
    wide = nn.Conv2d(2 * embed.in_channels, embed.out_channels, embed.kernel_size, embed.stride, embed.padding)
    with torch.no_grad():
        wide.weight.copy_(torch.cat([embed.weight, scale * adapter.stem.embed.weight], dim=1))
        wide.bias.copy_(embed.bias + scale * adapter.stem.embed.bias)
    if backbone.facts.spatial:
        twin.net.conv_in = wide
    else:
        twin.net.pos_embed.proj = wide
    return twin


@pytest.mark.parametrize("base", ["sd3_tiny", "pixart_tiny", "sd21_tiny"])
def test_it_is_the_network_with_a_widened_input_and_changed_weights(base, request):
    backbone = request.getfixturevalue(base)
    adapter = made(backbone)
    batch = make_batch(adapter, backbone, backbone.encode_text(["a large red ball", "a small blue cube"], CPU))
    t = adapter.objective.sample_t(batch.uniform_B)
    for scale in (1.0, 0.5):
        twin, both = written_into(adapter, backbone, scale), torch.cat([batch.latents_BCHW, batch.condition], dim=1)
        with torch.no_grad():
            features = adapter.encode_condition(batch.condition)
            found = adapter.predict(backbone, batch.latents_BCHW, t, batch.text, features, scale)
            assert torch.allclose(found, twin.predict(both, t, batch.text), atol=1e-4)
            assert not torch.allclose(found, backbone.predict(batch.latents_BCHW, t, batch.text), atol=1e-2)


def test_nothing_is_left_in_the_backbone_even_by_a_pass_that_fails(sd3_tiny):
    adapter, step = made(sd3_tiny), sd3_tiny.steps()[0]
    with changed(step, adapter.places[0], adapter.lora[0], 1.0):
        assert any(m._forward_hooks for m in step.modules())
    assert not any(m._forward_hooks for m in step.modules())
    wrong = sd3_tiny.begin(torch.randn(2, 16, 8, 8), torch.rand(2), sd3_tiny.encode_text(["a ball", "a cube"], CPU))
    with pytest.raises(TypeError):
        adapter._run(sd3_tiny, 0, wrong.with_(text=None), 1.0)
    assert not any(m._forward_hooks for m in sd3_tiny.net.modules())


def test_layers_whose_output_nobody_reads_get_none(sd3_tiny):
    adapter = made(sd3_tiny)
    assert "attn.add_q_proj" in adapter.places[0]
    assert "attn.add_q_proj" not in adapter.places[-1]
    attention = made(sd3_tiny, targets="attention")
    assert {place.split(".")[0] for places in attention.places for place in places} == {"attn"}


@pytest.mark.parametrize(("words", "said"), [
    (["adapter.rank=0"], r"adapter\.rank=0"),
    (["adapter.condition_space=pixel"], r"adapter\.condition_space=latent"),
    (["hardware.compile=frozen"], r"write hardware\.compile=none"),
])  # fmt: skip
def test_what_it_cannot_do_is_refused_before_a_weight_is_read(words, said):
    cfg = load("train", ["adapter=control_lora", "backbone=sd3_tiny", "hardware=cpu", *words])
    with pytest.raises(Unsupported, match=said):
        check_cell(cfg, construct(cfg.backbone))
