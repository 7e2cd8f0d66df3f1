"""The U-Net backbone in every shape that it knows: unrolled exactly, and controlled where diffusers controls it."""

import pytest
import torch

from src.adapters.controlnet import ControlNet
from src.adapters.scedit import SCEdit
from src.adapters.t2i_adapter import T2IAdapter
from src.backbones.source import EMBEDDED_ROOT
from src.backbones.unet import UNet
from src.objectives import EpsilonPrediction, VPrediction
from src.sampling import denoise, solver_for
from src.types import UserError
from tests.conftest import CPU, noisy_inputs
from tests.unet_shapes import COMMON, SCALED, SHAPES, configs_of

STEPS = torch.tensor([299, 899])  # of the times in `noisy_inputs`
CAPTIONS = ["a large red ball and a small blue cube, brown floor", "a small green cone, dark floor"]


@pytest.fixture
def shaped(random_backbone):
    """`shaped(name)`: a random U-Net of one of `SHAPES`."""

    def make(name, dtype=torch.float32, **changes):
        return random_backbone(UNet, "StableDiffusionPipeline", configs_of(name, **changes), dtype)

    return make


@pytest.fixture(params=["sd21_tiny", *SHAPES])
def backbone(request, shaped):
    return shaped(request.param) if request.param in SHAPES else request.getfixturevalue(request.param)


def added(x, text):
    """What SDXL's forward wants beside the captions: pooled text and sizes of an uncropped picture."""
    if text.pooled_BP is None:
        return None
    height, width = (8.0 * side for side in x.shape[-2:])
    ids = torch.tensor([[height, width, 0, 0, height, width]] * len(x))
    return {"text_embeds": text.pooled_BP, "time_ids": ids}


def reference(backbone, x, text, **residuals):
    """The forward of diffusers, untouched."""
    dtype = backbone.net.dtype
    words = text.tokens_BLD.to(dtype)
    return backbone.net(x.to(dtype), STEPS, words, added_cond_kwargs=added(x, text), return_dict=False, **residuals)[0]


def shaken(adapter):
    """The adapter as if trained: every parameter moved."""
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=gen))
    return adapter


def pictures(height=64, width=128):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def test_unrolled_equals_diffusers_exactly(backbone):
    x, t, text = noisy_inputs(backbone, 8, 16)
    ours, theirs = backbone.predict(x, t, text), reference(backbone, x, text)
    assert theirs.std() > 0.01
    assert torch.equal(ours, theirs)
    assert backbone.step_plans()[backbone.facts.middle].kind in ("mid", "up")


@torch.no_grad()
@pytest.mark.parametrize("kernel", [1, 3])
def test_skips_that_scedit_edits_are_those_that_diffusers_lets_one_add_to(backbone, kernel):
    x, t, text = noisy_inputs(backbone, 8, 16)
    adapter = shaken(SCEdit(backbone, backbone.objective, None, "scedit", kernel=kernel))
    features, state = adapter.encode_condition(pictures()), backbone.begin(x, t, text)
    for k in range(adapter.before_decoder):
        state = backbone.run(k, state)
    edits = [0.5 * tune(s, h) for s, tune, h in zip(state.skips, adapter.tuners, features, strict=True)]
    middle = torch.zeros_like(state.x)
    theirs = reference(backbone, x, text, down_block_additional_residuals=tuple(edits), mid_block_additional_residual=middle)
    ours = adapter.predict(backbone, x, t, text, features, 0.5)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (ours - backbone.predict(x, t, text)).abs().mean() > 0.01


@torch.no_grad()
def test_unrolled_in_half_precision(shaped):
    backbone = shaped("sdxl", torch.bfloat16)
    x, t, text = noisy_inputs(backbone)
    assert torch.equal(backbone.predict(x, t, text), reference(backbone, x, text))


@torch.no_grad()
def test_sdxl_reads_size_and_pooled_text(shaped):
    backbone = shaped("sdxl")
    x, t, text = noisy_inputs(backbone)
    ours = backbone.predict(x, t, text)
    other = type(text)(text.tokens_BLD, text.pooled_BP.flip(0))
    assert not torch.allclose(backbone.predict(x, t, other), ours, atol=1e-3)


# ---- control ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_controlnet_adds_where_diffusers_does(backbone, scale):
    x, t, text = noisy_inputs(backbone, 8, 16)
    adapter = shaken(ControlNet(backbone, backbone.objective, None, "controlnet"))
    features = adapter.encode_condition(pictures())
    *skips, middle = (scale * r for r in adapter.residuals(backbone, x, t, text, features))
    assert all(float(r.abs().max()) > 0 for r in (*skips, middle))
    theirs = reference(backbone, x, text, down_block_additional_residuals=skips, mid_block_additional_residual=middle)
    ours = adapter.predict(backbone, x, t, text, features, scale)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert not torch.allclose(ours, backbone.predict(x, t, text), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd21", "sdxl"])  # diffusers' class wants a middle block with attention
def test_controlnet_residuals_are_those_of_diffusers(shaped, name):
    """Its class, with random weights of which ours gets a copy."""
    from diffusers import ControlNetModel

    backbone = shaped(name)
    x, t, text = noisy_inputs(backbone, 8, 16)
    adapter = ControlNet(backbone, backbone.objective, None, "controlnet")
    stock = shaken(ControlNetModel.from_unet(backbone.net).eval())
    for copied, plan in zip(adapter.copies, backbone.step_plans(), strict=False):
        for role, path in plan.names.items():
            copied.parts[role].load_state_dict(stock.get_submodule(path).state_dict())
    for part, module in adapter.entry.items():
        module.load_state_dict(getattr(stock, part).state_dict())
    for connector, theirs in zip(adapter.connectors, [*stock.controlnet_down_blocks, stock.controlnet_mid_block], strict=True):
        connector.load_state_dict(theirs.state_dict())
    adapter.hint.load_state_dict(stock.controlnet_cond_embedding.state_dict())
    skips, middle = stock(
        x, STEPS, text.tokens_BLD, pictures(), added_cond_kwargs=added(x, text), return_dict=False, conditioning_scale=1.0
    )
    ours = adapter.residuals(backbone, x, t, text, adapter.encode_condition(pictures()))
    assert len(ours) == len(skips) + 1
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, (*skips, middle), strict=True))


@torch.no_grad()
def test_t2i_adapter_adds_where_diffusers_does(backbone):
    x, t, text = noisy_inputs(backbone, 8, 16)
    adapter = shaken(T2IAdapter(backbone, backbone.objective, None, "t2i_adapter"))
    features = adapter.encode_condition(pictures())
    given = [f.clone() for f in features]  # diffusers takes them from this list, and leaves those that have no place
    theirs = reference(backbone, x, text, down_intrablock_additional_residuals=given)
    ours = adapter.predict(backbone, x, t, text, features)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert len(adapter.places) == len(features) - len(given)
    for n in range(len(features) - len(given)):
        without = tuple(f * (i != n) for i, f in enumerate(features))
        assert not torch.allclose(adapter.predict(backbone, x, t, text, without), ours, atol=1e-4), n


@torch.no_grad()
def test_light_t2i_adapter(shaped):
    backbone = shaped("sd21")
    x, t, text = noisy_inputs(backbone, 8, 16)
    adapter = shaken(T2IAdapter(backbone, backbone.objective, None, "t2i_adapter", size="light"))
    features = adapter.encode_condition(pictures())
    assert len(features) == 4  # one per level: the published light adapter has no stage more
    theirs = reference(backbone, x, text, down_intrablock_additional_residuals=[f.clone() for f in features])
    assert torch.allclose(adapter.predict(backbone, x, t, text, features), theirs, atol=1e-6)


def test_light_t2i_adapter_is_refused_on_sdxl(shaped):
    """Its stages halve the size each time, SDXL's second level has the size of the first behind its downsampler."""
    backbone = shaped("sdxl")
    with pytest.raises(UserError, match=r"adapter\.size"):
        T2IAdapter(backbone, backbone.objective, None, "t2i_adapter", size="light")


# ---- the embedded one against its pipeline ----------------------------------------------------------------------------


def stock_pipeline(folder):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def both_samplers(backbone, folder, captions, steps=5):
    """The same noise through our loop and through the stock pipeline with our solver."""
    pipe, facts = stock_pipeline(folder), backbone.facts
    pipe.scheduler = solver_for(backbone.objective, pipe.scheduler)
    noise = torch.randn(len(captions), facts.latent_channels, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = pipe(
        captions, height=64, width=64, num_inference_steps=steps, guidance_scale=3.0,
        latents=noise.clone(), output_type="latent",
    ).images  # fmt: skip
    text, empty = backbone.encode_text(captions, CPU), backbone.encode_text([""], CPU)
    solver = solver_for(backbone.objective, backbone.scheduler())
    ours = denoise(
        lambda x, t, c, _: backbone.predict(x, t, c), noise, solver, backbone.objective, steps, text, empty, None, 3.0
    )
    return ours, theirs


def test_facts_and_objective(sd21_tiny):
    facts, objective = sd21_tiny.facts, sd21_tiny.objective
    assert facts.widths == (64, 64, 64, 128, 128, 128, 128, 128, 64, 64)
    assert (facts.depth, facts.middle, facts.factor, facts.multiple, facts.latent_channels) == (9, 3, 8, 16, 16)
    assert [p.kind for p in sd21_tiny.step_plans()] == ["down", "downsample", "down", "mid", "up", "up", "upsample", "up", "up"]
    assert isinstance(objective, VPrediction)
    scaled = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    assert torch.allclose(objective.signal_T, scaled)


def test_text_matches_the_stock_pipeline(sd21_tiny):
    ours = sd21_tiny.encode_text(CAPTIONS, CPU)
    with torch.no_grad():
        tokens, _ = stock_pipeline(EMBEDDED_ROOT / "sd21_tiny").encode_prompt(CAPTIONS, CPU, 1, False)
    assert torch.equal(ours.tokens_BLD, tokens)
    assert (ours.pooled_BP, ours.mask_BL) == (None, None)


def test_sampler_equals_the_stock_pipeline(sd21_tiny):
    ours, theirs = both_samplers(sd21_tiny, EMBEDDED_ROOT / "sd21_tiny", CAPTIONS)
    assert torch.allclose(ours, theirs, atol=1e-4)


# ---- SDXL, whose pipeline is made here --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    """A whole untrained SDXL in small: two CLIPs, epsilon, a scheduler of another kind than ours."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    from src.embedded.text import clip_encoder, clip_text_model, clip_tokenizer
    from src.embedded.vae import CHANNELS, build_vae

    torch.manual_seed(0)
    config = {k: v for k, v in COMMON.items() if k != "_class_name"} | SHAPES["sdxl"]
    config |= {"cross_attention_dim": 24, "in_channels": CHANNELS, "out_channels": CHANNELS, "sample_size": 8}
    config["projection_class_embeddings_input_dim"] = 16 + 6 * 8
    unet = shaken(UNet2DConditionModel(**config))
    tokenizer = clip_tokenizer()
    pipe = StableDiffusionXLPipeline(
        build_vae(64), clip_text_model(tokenizer, 8, 1), clip_encoder(tokenizer, 16, 2), tokenizer, tokenizer, unet,
        EulerDiscreteScheduler(**SCALED, timestep_spacing="leading", steps_offset=1), add_watermarker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sdxl")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def sdxl(sdxl_folder):
    return UNet(name="small", source=str(sdxl_folder), native_resolution=64).load(CPU, torch.float32)


def test_sdxl_predicts_noise(sdxl):
    assert isinstance(sdxl.objective, EpsilonPrediction)
    assert (sdxl.facts.pooled_width, sdxl.facts.text_width, sdxl.facts.multiple) == (16, 24, 32)


def test_sdxl_text_matches_the_stock_pipeline(sdxl, sdxl_folder):
    ours = sdxl.encode_text([*CAPTIONS, ""], CPU)
    with torch.no_grad():
        found = stock_pipeline(sdxl_folder).encode_prompt(CAPTIONS, do_classifier_free_guidance=True)
    tokens, no_tokens, pooled, no_pooled = found
    assert torch.equal(ours.tokens_BLD, torch.cat([tokens, no_tokens[:1]]))
    assert torch.equal(ours.pooled_BP, torch.cat([pooled, no_pooled[:1]]))
    assert float(ours.tokens_BLD[2].abs().max()) == 0


def test_sdxl_sampler_equals_the_stock_pipeline(sdxl, sdxl_folder):
    ours, theirs = both_samplers(sdxl, sdxl_folder, CAPTIONS)
    assert torch.allclose(ours, theirs, atol=1e-4)


# ---- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_embed_type", "projection"),
        ("num_class_embeds", 1000),  # Stable Diffusion's upscaler
        ("time_cond_proj_dim", 256),  # distilled ones that read the guidance scale
        ("encoder_hid_dim_type", "text_proj"),
        ("addition_embed_type", "text"),
        ("down_block_types", ["SimpleCrossAttnDownBlock2D"] * 4),
        ("in_channels", 9),  # inpainting
    ],
)
def test_an_unknown_kind_of_unet_is_refused(shaped, key, value):
    with pytest.raises(UserError, match=f"{key}=.*is not supported: use a Stable Diffusion") as caught:
        shaped("sd21", **{key: value})
    assert "\n" not in str(caught.value)
