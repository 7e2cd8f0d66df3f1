"""The PixArt backbone: unrolled exactly, text and pictures as the stock pipeline has them."""

import pytest
import torch

from src.backbones.dit import PixArt
from src.backbones.source import EMBEDDED_ROOT
from src.objectives import EpsilonPrediction
from src.sampling import denoise, solver_for
from src.types import TextCond
from tests.conftest import CPU, noisy_inputs

CAPTIONS = ["a large red ball and a small blue cube, brown floor", "a small green cone, dark floor"]
# how the pipeline is called: cleaning captions wants packages of its own, and its aspect ratios begin at 256 pixels
PLAIN = {"clean_caption": False, "max_sequence_length": 24}


def stock_pipeline():
    from diffusers import PixArtAlphaPipeline

    pipe = PixArtAlphaPipeline.from_pretrained(EMBEDDED_ROOT / "pixart_tiny", dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pixart_1024(pixart_tiny, random_backbone):
    """The 1024-pixel model in small: it embeds size and aspect ratio."""
    configs = {part: pixart_tiny.model.config(part) for part in ("transformer", "vae", "text_encoder", "scheduler")}
    configs["transformer"] |= {"use_additional_conditions": True, "sample_size": 128, "num_layers": 3}
    # a third of the width per number
    configs["transformer"] |= {"num_attention_heads": 4, "attention_head_dim": 24, "cross_attention_dim": 96}
    configs["tokenizer"] = {}
    return lambda dtype: random_backbone(PixArt, "PixArtAlphaPipeline", configs, dtype, text_tokens=24, native_law="uniform")


def reference(net, x, steps, text):
    """The forward of diffusers, untouched, without the half that says the variance."""
    height, width = (8.0 * side for side in x.shape[-2:])
    sizes = {"resolution": torch.tensor([[height, width]] * len(x)), "aspect_ratio": torch.tensor([[height / width]] * len(x))}
    dtype = net.dtype
    out = net(
        x.to(dtype),
        encoder_hidden_states=text.tokens_BLD.to(dtype),
        encoder_attention_mask=text.mask_BL,
        timestep=steps,
        added_cond_kwargs=sizes if net.use_additional_conditions else {"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return out.chunk(2, dim=1)[0]


@pytest.mark.parametrize("size", [(8, 8), (6, 12)])
def test_unrolled_equals_diffusers_exactly(pixart_tiny, size):
    x, t, text = noisy_inputs(pixart_tiny, *size)
    with torch.no_grad():
        theirs = reference(pixart_tiny.net, x, torch.tensor([299, 899]), text)
        assert theirs.std() > 0.01
        assert torch.equal(pixart_tiny.predict(x, t, text), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_1024_pixel_model_too(pixart_1024, dtype):
    backbone = pixart_1024(dtype)
    x, t, text = noisy_inputs(backbone, 6, 12)
    with torch.no_grad():
        ours, theirs = backbone.predict(x, t, text), reference(backbone.net, x, torch.tensor([299, 899]), text)
        assert theirs.std() > 0.01
        assert torch.equal(ours, theirs)
        turned = backbone.predict(x.transpose(2, 3), t, text).transpose(2, 3)
    assert not torch.allclose(turned.float(), ours.float(), atol=0.01)


def test_padding_says_nothing(pixart_tiny):
    x, t, text = noisy_inputs(pixart_tiny)
    noise = torch.randn(text.tokens_BLD.shape, generator=torch.Generator().manual_seed(2))
    padding = (text.mask_BL == 0)[..., None]
    other, words = (torch.where(where, noise, text.tokens_BLD) for where in (padding, ~padding))
    with torch.no_grad():
        ours = pixart_tiny.predict(x, t, text)
        assert torch.equal(pixart_tiny.predict(x, t, TextCond(other, None, text.mask_BL)), ours)
        assert not torch.allclose(pixart_tiny.predict(x, t, TextCond(words, None, text.mask_BL)), ours, atol=1e-3)


def test_attention_projects_what_the_block_does(pixart_tiny):
    """Queries, keys and values of a block, attended and projected, are what its self-attention adds before its gate."""
    state, seen = pixart_tiny.begin(*noisy_inputs(pixart_tiny)), []
    block = pixart_tiny.steps()[2]
    handle = block.attn1.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        q, k, v = pixart_tiny.attention(2, state)
        pixart_tiny.run(2, state)
        handle.remove()
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        assert torch.allclose(block.attn1.to_out[0](found), seen[0], atol=1e-5)


def test_facts_and_objective(pixart_tiny):
    facts, objective = pixart_tiny.facts, pixart_tiny.objective
    assert (facts.depth, facts.width, facts.latent_channels, facts.factor, facts.multiple) == (8, 160, 16, 8, 16)
    assert (facts.text_tokens, facts.text_mask, facts.pooled_width) == (24, True, None)
    assert isinstance(objective, EpsilonPrediction)
    linear = (1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    assert torch.allclose(objective.signal_T, linear)


def test_text_matches_the_stock_pipeline(pixart_tiny):
    ours = pixart_tiny.encode_text(CAPTIONS, CPU)
    with torch.no_grad():
        tokens, mask, _, _ = stock_pipeline().encode_prompt(CAPTIONS, do_classifier_free_guidance=False, **PLAIN)
    assert torch.equal(ours.tokens_BLD, tokens)
    assert torch.equal(ours.mask_BL, mask.float())
    assert ours.mask_BL.sum(1).tolist() == [13, 8]  # words, commas and the end
    assert ours.pooled_BP is None


def test_sampler_equals_the_stock_pipeline(pixart_tiny):
    """Same noise, solver and guidance: our loop over the unrolled network and diffusers' own make the same picture."""
    pipe, objective = stock_pipeline(), pixart_tiny.objective
    pipe.scheduler = solver_for(objective, pipe.scheduler)
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = pipe(
        CAPTIONS, height=64, width=64, num_inference_steps=5, guidance_scale=3.0, use_resolution_binning=False,
        latents=noise.clone(), output_type="latent", **PLAIN,
    ).images  # fmt: skip
    text, empty = pixart_tiny.encode_text(CAPTIONS, CPU), pixart_tiny.encode_text([""], CPU)
    solver = solver_for(objective, pixart_tiny.scheduler())
    ours = denoise(lambda x, t, c, _: pixart_tiny.predict(x, t, c), noise, solver, objective, 5, text, empty, None, 3.0)
    assert torch.allclose(ours, theirs, atol=1e-4)
