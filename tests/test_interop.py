"""Adapters in diffusers' own classes: the same numbers there and here, and back."""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from src.adapters.controlnet import ControlNet as OurControlNet
from src.adapters.dit_controlnet import DiTControlNet as OurDiT
from src.adapters.t2i_adapter import T2IAdapter as OurT2I
from src.backbones.mmdit import SD3
from src.backbones.source import ModelSource
from src.backbones.unet import UNet
from src.interop.export import export_adapter, stock_model
from src.interop.imports import DoesNotFit, import_adapter
from src.interop.stock import NotPortable
from src.types import Batch
from tests.conftest import CPU, noisy_inputs
from tests.contract.test_adapters import controlled, make_batch, shaken
from tests.interop_pipes import PROMPTS, drawing, drift, gap, make, ours, stock_pipe, theirs
from tests.unet_shapes import configs_of

__all__ = ["make"]  # a fixture
EXPORTS = {  # base, overrides, class, pipeline
    "controlnet": ("sd21_tiny", ControlNetModel, StableDiffusionControlNetPipeline),
    "dit_controlnet": ("sd3_tiny", SD3ControlNetModel, StableDiffusion3ControlNetPipeline),
    "dit_controlnet adapter.blocks=4": ("sd3_tiny", SD3ControlNetModel, StableDiffusion3ControlNetPipeline),
    "t2i_adapter": ("sd21_tiny", T2IAdapter, StableDiffusionAdapterPipeline),
    "t2i_adapter adapter.size=light": ("sd21_tiny", T2IAdapter, StableDiffusionAdapterPipeline),
}


# ---- export -----------------------------------------------------------------------------------------------------------


def with_stock_network(model, backbone, batch, condition):
    """One step's prediction as the pipelines compute it: the adapter's residuals, then the network's own forward."""
    x, text = batch.latents_BCHW, batch.text
    t = backbone.objective.to_model_time(backbone.objective.sample_t(batch.uniform_B))
    sizes = torch.tensor([[64.0, 64.0, 0, 0, 64.0, 64.0]] * 2)  # which SDXL wants to know
    added = {"added_cond_kwargs": {"text_embeds": text.pooled_BP, "time_ids": sizes}}
    if isinstance(model, SD3ControlNetModel):
        named = {"encoder_hidden_states": text.tokens_BLD, "pooled_projections": text.pooled_BP, "timestep": t}
        residuals = model(x, condition, return_dict=False, **named)[0]
        return backbone.net(x, block_controlnet_hidden_states=residuals, **named).sample
    if isinstance(model, T2IAdapter):
        extra = {"down_intrablock_additional_residuals": [f.clone() for f in model(condition)]}  # a list that is emptied
    else:
        down, mid = model(x, t, text.tokens_BLD, condition, return_dict=False, **added)
        extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return backbone.net(x, t, text.tokens_BLD, **added, **extra).sample


@pytest.mark.parametrize("words", EXPORTS)
def test_an_exported_adapter_says_the_same_in_diffusers_and_comes_back_bit_for_bit(words, make, tmp_path):
    base, kind, _ = EXPORTS[words]
    _, backbone, adapter = make(words, base)
    before = json.dumps(dict(backbone.net.config), default=str)
    assert export_adapter(adapter, tmp_path) == kind.__name__
    assert json.dumps(dict(backbone.net.config), default=str) == before
    model, batch = kind.from_pretrained(tmp_path), make_batch(adapter, backbone, backbone.encode_text(PROMPTS, CPU))
    with torch.no_grad():
        expected = controlled(adapter, backbone, batch)
        assert gap(with_stock_network(model, backbone, batch, batch.condition), expected) < 1e-5
        assert torch.equal(controlled(import_adapter(tmp_path, backbone), backbone, batch), expected)
        assert gap(controlled(adapter, backbone, batch, 0.0), expected) > 1e-2  # the adapter matters
        batch.condition = batch.condition.flip(0)
        assert gap(controlled(adapter, backbone, batch), expected) > 1e-3  # and so does the condition


def test_the_shapes_of_sd35_are_exported_too(random_backbone, tmp_path):
    """Normed queries and keys, and blocks with a second attention."""
    tiny = ModelSource("embedded:sd3_tiny")
    configs = {part: tiny.config(part) for part in ("transformer", "vae", "text_encoder", "scheduler")} | {"tokenizer": {}}
    configs["transformer"] = configs["transformer"] | {"qk_norm": "rms_norm", "dual_attention_layers": [0, 1, 2]}
    backbone = random_backbone(SD3, "StableDiffusion3Pipeline", configs, t5_tokens=0)
    round_trip(shaken(OurDiT(backbone, backbone.objective, None, "dit_controlnet", blocks=5)), SD3ControlNetModel, tmp_path)


@pytest.mark.parametrize(("ours", "kind"), [(OurControlNet, ControlNetModel), (OurT2I, T2IAdapter)])
def test_the_shapes_of_sdxl_are_exported_too(ours, kind, random_backbone, tmp_path):
    backbone = random_backbone(UNet, "StableDiffusionXLPipeline", configs_of("sdxl"))
    round_trip(shaken(ours(backbone, backbone.objective, None, "one")), kind, tmp_path)


@torch.no_grad()
def round_trip(adapter, kind, folder):
    """Out and back: the same prediction in diffusers, the same bits here."""
    backbone = adapter.eval().backbone
    x, t, text = noisy_inputs(backbone)
    space = (backbone.facts.latent_channels, 8, 8) if adapter.condition_space == "latent" else (3, 64, 64)
    condition = torch.rand(2, *space, generator=torch.Generator().manual_seed(4))
    batch = Batch([0, 1], ["a", "b"], x, x, t, text, condition)
    export_adapter(adapter, folder)
    expected = controlled(adapter, backbone, batch)
    assert gap(with_stock_network(kind.from_pretrained(folder), backbone, batch, condition), expected) < 1e-5
    assert torch.equal(controlled(import_adapter(folder, backbone), backbone, batch), expected)


@pytest.mark.parametrize("words", [w for w in EXPORTS if "light" not in w])
def test_a_stock_pipeline_draws_the_same_with_an_exported_adapter(words, make, tmp_path, monkeypatch):
    base, kind, pipeline = EXPORTS[words]
    _, backbone, adapter = make(words, base)
    export_adapter(adapter, tmp_path)
    model, conditions = kind.from_pretrained(tmp_path), [drawing(0), drawing(1)]
    part = "adapter" if kind is T2IAdapter else "controlnet"
    pipe = stock_pipe(pipeline, backbone, **{part: model})
    image = {"control_image" if base == "sd3_tiny" else "image": conditions}
    if base == "sd3_tiny":  # the pipeline draws the condition's latent from the posterior, we take its mode
        monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        assert pipe.controlnet.config.force_zeros_for_pooled_projection is False
    expected = ours(adapter, backbone, conditions)
    assert drift(theirs(pipe, backbone, **image), expected) < 1e-4
    assert drift(expected, ours(adapter, backbone, conditions[::-1])) > 1e-2  # the condition matters


def test_the_posterior_that_the_sd3_pipeline_draws_from_is_narrow(make):
    """What our latent condition differs by from the pipeline's: little against the latents' own spread."""
    codec = make("dit_controlnet", "sd3_tiny")[1].load_codec(CPU)
    picture = torch.from_numpy(np.array(drawing())).movedim(-1, 0)[None] / 127.5 - 1
    found = codec.vae.encode(picture).latent_dist
    assert float((found.std * codec.scale).mean()) < 0.2 * float(codec.encode((picture + 1) / 2).std())


@pytest.mark.parametrize(
    ("words", "base", "reason"),
    [
        ("dit_controlnet", "pixart_tiny", "no ControlNet class"),
        ("dit_controlnet adapter.index_rule=repeat", "sd3_tiny", "index_rule=proportional"),
        ("dit_controlnet adapter.connector_width=16", "sd3_tiny", "connector_width=null"),
        ("t2i_adapter", "sd3_tiny", "for U-Nets only"),
        ("unicon_half", "sd3_tiny", "no class for it"),
    ],
)
def test_what_diffusers_cannot_hold_is_refused_with_the_way_out(words, base, reason, make):
    with pytest.raises(NotPortable, match=reason) as said:
        stock_model(make(words, base)[2])
    assert "form=dropin" in str(said.value)
    assert "\n" not in str(said.value)


# ---- import -----------------------------------------------------------------------------------------------------------


def test_a_controlnet_trained_on_zero_text_and_unshifted_latents_is_given_ours_and_says_the_same(make, tmp_path):
    """The published SD3 ControlNets have this flag; the autoencoder here is given a shift, for it has none."""
    _, backbone, adapter = make("dit_controlnet", "sd3_tiny")
    shift, scale = 0.3, backbone.model.config("vae")["scaling_factor"]
    model = stock_model(adapter)
    model.register_to_config(force_zeros_for_pooled_projection=True)
    model.save_pretrained(tmp_path)
    shifted = _with_shift(backbone, shift)
    batch = make_batch(adapter, backbone, backbone.encode_text(PROMPTS, CPU))
    t = backbone.objective.to_model_time(backbone.objective.sample_t(batch.uniform_B))
    tokens, pooled = batch.text.tokens_BLD, batch.text.pooled_BP
    with torch.no_grad():
        named = {"encoder_hidden_states": tokens, "timestep": t}
        theirs_condition = batch.condition + shift * scale  # z * scale, where ours is (z - shift) * scale
        residuals = model(batch.latents_BCHW, theirs_condition, pooled_projections=torch.zeros_like(pooled), **named)[0]
        expected = backbone.net(
            batch.latents_BCHW, pooled_projections=pooled, block_controlnet_hidden_states=residuals, **named
        ).sample
        found = controlled(import_adapter(tmp_path, shifted), shifted, batch)
        assert gap(found, expected) < 1e-5
        assert gap(controlled(adapter, backbone, batch), expected) > 1e-3  # which it would not without the correction


def _with_shift(backbone, shift):
    other, model = copy.copy(backbone), backbone.model
    changed = type(model)(model.source)

    def config(part):
        return model.config(part) | ({"shift_factor": shift} if part == "vae" else {})

    object.__setattr__(changed, "config", config)
    other.model = changed
    return other


def unet_net(**changes):
    shape = {"block_out_channels": [64, 128], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "in_channels": 16}
    shape |= {"layers_per_block": 1, "cross_attention_dim": 64, "attention_head_dim": [2, 4], "norm_num_groups": 16}
    return ControlNetModel(**shape | {"use_linear_projection": True} | changes)


def sd3_net(**changes):
    return SD3ControlNetModel(**{"num_layers": 1, "num_attention_heads": 1, "caption_projection_dim": 64} | changes)


def unet():
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DConditionModel(block_out_channels=(32,), norm_num_groups=8, **blocks)


@pytest.mark.parametrize(
    ("model", "base", "reason"),
    [
        (lambda: unet_net(attention_head_dim=4), "sd21_tiny", "attention_head_dim"),
        (lambda: unet_net(block_out_channels=[32, 64]), "sd21_tiny", "block_out_channels"),
        (lambda: unet_net(controlnet_conditioning_channel_order="bgr"), "sd21_tiny", "RGB"),
        (unet_net, "sd3_tiny", "use adapter=dit_controlnet"),
        (lambda: T2IAdapter(in_channels=1, channels=[64, 128]), "sd21_tiny", "in_channels=1"),
        (lambda: T2IAdapter(channels=[64, 128]), "sd3_tiny", "for U-Nets"),
        (lambda: sd3_net(joint_attention_dim=None, use_pos_embed=False), "sd3_tiny", "SD3SingleTransformerBlock"),
        (lambda: sd3_net(extra_conditioning_channels=1), "sd3_tiny", "inpainting"),
        (lambda: sd3_net(num_layers=6), "sd3_tiny", "1 to 5 blocks"),
        (sd3_net, "sd3_tiny", "attention_head_dim=64"),
        (unet, "sd21_tiny", "holds a UNet2DConditionModel"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_name(model, base, reason, make, tmp_path):
    model().save_pretrained(tmp_path)
    with pytest.raises(DoesNotFit, match=reason) as said:
        import_adapter(tmp_path, make("template", base)[1])
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [("no/such/folder", "not a folder"), (".", "no config.json"), ("nobody/nothing-at-all", "cannot be had")],
)
def test_a_source_that_is_not_there_is_refused(source, reason):
    with pytest.raises(DoesNotFit, match=reason):
        import_adapter(source, None)
