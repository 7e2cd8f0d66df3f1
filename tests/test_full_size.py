"""Full-size shapes, on `meta`: known sizes, what of an adapter can never learn, and a training step of every cell.

Millions of parameters are those of the networks' own publications and of diffusers' classes.
"""

from functools import cache

import pytest
import torch

from src import build
from src.backbones.source import SHAPES, SourceError
from src.config import load
from src.config.nodes import node_of
from src.construct import construct, partial
from src.profiling.memory import blank_batch
from src.support import matrix
from tests.conftest import CPU

MILLIONS = {
    "sd3_medium": 2028.33,
    "sd3_5_medium": 2243.17,
    "sd3_5_large": 8056.63,
    "pixart_alpha": 610.86,
    "sd21": 865.91,
    "sdxl": 2567.46,
}


@cache
def hollow(name):
    return construct(load("train", [f"backbone={name}", f"backbone.source=random:{name}"]).backbone).hollow(torch.float32)


def cells():
    """Supported pairs. Slow ones differ from a quick one in depth and width alone, or have fewer parts."""
    for adapter, found in matrix().items():
        for base in (b for b in MILLIONS if found[b] is None):
            quick = base in ("sd3_medium", "pixart_alpha", "sd21") and adapter not in ("template", "unicon_half")
            quick |= (adapter, base) in (("unicon_half", "sdxl"), ("unicon", "sd3_5_medium"))
            yield pytest.param(adapter, base, marks=[] if quick else pytest.mark.slow, id=f"{adapter}-{base}")


@cache
def adapter_of(name, base, *overrides):
    cfg = load("train", [f"adapter={name}", f"backbone={base}", f"backbone.source=random:{base}", "hardware=cpu", *overrides])
    with torch.device("meta"):
        return build.new_adapter(cfg, hollow(base), training=False)


def millions(parameters):
    return sum(p.numel() for p in parameters) / 1e6


def dead(adapter):
    return {n: p for n, p in adapter.named_parameters() if not p.requires_grad}


def test_every_full_size_backbone_has_its_shape():
    import json

    assert set(json.loads(SHAPES.read_text())) == set(MILLIONS) == {b for b in matrix()["unicon"] if not b.endswith("_tiny")}


@pytest.mark.parametrize("name", MILLIONS)
def test_backbone_sizes(name):
    backbone = hollow(name)
    assert millions(backbone.net.parameters()) == pytest.approx(MILLIONS[name], abs=0.01)
    assert not any(p.requires_grad for p in backbone.parameters())
    assert all(p.is_meta for p in backbone.net.parameters())


@pytest.mark.parametrize(
    ("name", "base", "overrides", "total"),
    [
        ("controlnet", "sd21", (), 364.23),
        ("controlnet", "sdxl", (), 1251.01),
        ("dit_controlnet", "sd3_medium", (), 1062.86),  # 12 of 24 blocks
        pytest.param("dit_controlnet", "sd3_medium", ("adapter.blocks=6",), 538.81, marks=pytest.mark.slow),
        ("dit_controlnet", "sd3_medium", ("adapter.blocks=23",), 2023.61),
        pytest.param("dit_controlnet", "sd3_5_medium", (), 1261.17, marks=pytest.mark.slow),
        ("dit_controlnet", "pixart_alpha", (), 294.92),  # 13 of 28 blocks
        ("t2i_adapter", "sd21", (), 77.37),
        ("t2i_adapter", "sd21", ("adapter.size=light",), 18.69),
        ("t2i_adapter", "sdxl", (), 79.03),
        ("scedit", "sd21", (), 28.82),
        ("scedit", "sd21", ("adapter.kernel=3",), 99.11),
        ("scedit", "sdxl", (), 14.07),
        ("control_lora", "sdxl", ("adapter.rank=64", "adapter.targets=attention"), 92.91),  # plain attention, as PEFT counts it
    ],
)
def test_published_adapter_sizes(name, base, overrides, total):
    assert millions(adapter_of(name, base, *overrides).parameters()) == pytest.approx(total, abs=0.01)


def test_the_last_copy_of_sd3_learns_no_text():
    """Nobody reads the text behind the last copy: 23.6 M parameters are frozen.

    A last block of SD3's own has 30.7 M fewer than an inner one, counted otherwise: two thirds of its text modulation are
    missing too, which here are rows of a weight whose other rows learn, and its text queries, computed in vain, are not.
    """
    adapter = adapter_of("dit_controlnet", "sd3_medium")
    inside = ("attn.add_q_proj.", "attn.to_add_out.", "ff_context.net.0.proj.", "ff_context.net.2.")
    assert set(dead(adapter)) == {f"copies.11.{part}{kind}" for part in inside for kind in ("weight", "bias")}
    assert millions(dead(adapter).values()) == pytest.approx(23.60, abs=0.01)
    modulation = millions(adapter.copies[11].norm1_context.parameters()) * 4 / 6
    queries = millions(adapter.copies[11].attn.add_q_proj.parameters())
    inner, last = (millions(hollow("sd3_medium").steps()[i].parameters()) for i in (11, 23))
    assert millions(dead(adapter).values()) + modulation - queries == pytest.approx(inner - last)
    assert inner - last == pytest.approx(30.68, abs=0.01)


def test_all_blocks_of_a_transformer_are_all_but_the_last():
    """The most that PixArt-delta's ablation and diffusers' SD3 copy."""
    assert len(adapter_of("dit_controlnet", "pixart_alpha", "adapter.blocks=all").copies) == 27
    assert len(adapter_of("dit_controlnet", "sd3_medium", "adapter.blocks=all").copies) == 23


def test_proportional_rule_never_asks_the_last_of_23_copies():
    """int(i / (24 / 23)) is at most 21 for the blocks that get a residual, so nothing behind copy 21 learns."""
    adapter = adapter_of("dit_controlnet", "sd3_medium", "adapter.blocks=23")
    assert not any(p.requires_grad for m in (adapter.copies[22], adapter.connectors[22]) for p in m.parameters())
    assert millions(dead(adapter).values()) == pytest.approx(110.95, abs=0.01)
    assert adapter.connectors[21].weight.requires_grad
    one_to_one = adapter_of("dit_controlnet", "sd3_medium", "adapter.blocks=23", "adapter.index_rule=one_to_one")
    assert millions(dead(one_to_one).values()) == pytest.approx(23.60, abs=0.01)


@pytest.mark.parametrize("base", ["pixart_alpha", "sd21", "sdxl"])
def test_nothing_is_dead_where_text_is_only_read(base):
    name = "dit_controlnet" if base == "pixart_alpha" else "controlnet"
    assert dead(adapter_of(name, base)) == {}


@pytest.mark.parametrize(("name", "base"), cells())
def test_a_training_step_of_every_cell_fits(name, base):
    """At twice the smallest resolution: a map of one by one would fit anything that it is added to."""
    backbone, node = hollow(base), node_of("adapter", name)
    with torch.device("meta"):
        adapter = partial({k: v for k, v in node.items() if k != "params_match"})(backbone, backbone.objective, None)
        batch = blank_batch(backbone.facts, adapter.condition_space, 2, 2 * backbone.facts.multiple)
        losses = adapter.losses(batch)
        losses.sum().backward()
    assert losses.shape == (2,)
    assert any(p.grad is not None for p in adapter.parameters())
    assert all(p.grad is None for p in backbone.parameters())


# ---- a source without weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", ["load_codec", "encode_text", "scheduler"])
def test_a_random_source_says_what_it_is_for(ask):
    backbone = hollow("sd21")
    given = {"load_codec": (CPU,), "encode_text": (["a red ball"], CPU), "scheduler": ()}[ask]
    with pytest.raises(SourceError, match=r"random:sd21 has random weights.*name a folder or a hub id in backbone") as e:
        getattr(backbone, ask)(*given)
    assert "\n" not in str(e.value)


def test_an_unknown_shape_lists_those_that_there_are():
    node = load("train", ["backbone=sd21", "backbone.source=random:sd15"]).backbone
    with pytest.raises(SourceError, match=r"random:sd15.*no such shape.*'pixart_alpha'.*'sdxl'"):
        construct(node)


def test_a_shape_of_another_family_is_refused():
    node = load("train", ["backbone=sd21", "backbone.source=random:pixart_alpha"]).backbone
    with pytest.raises(SourceError, match="names no 'unet'"):
        construct(node)


def test_hollow_leaves_the_original_as_it_was():
    backbone = construct(load("train", ["backbone=sd21", "backbone.source=random:sd21"]).backbone)
    twin = backbone.hollow(torch.bfloat16)
    assert backbone.net is None
    assert {p.dtype for p in twin.net.parameters()} == {torch.bfloat16}
    assert len(twin.steps()) == backbone.facts.depth
