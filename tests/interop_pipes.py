"""What the tests of interoperation share: shaken adapters, a condition, and one drawing made here and in a stock pipeline."""

from functools import cache

import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image, ImageDraw

from src import build
from src.config import load
from src.construct import construct
from src.data.stores import condition_tensor
from src.sampling import denoise, solver_for
from tests.conftest import CPU
from tests.contract.test_adapters import shaken

PROMPTS, GUIDANCE, STEPS = ["a large red ball, gray floor", "a small blue cube, dark floor"], 3.0, 3
STOCK = {"sd3_tiny": StableDiffusion3Pipeline, "pixart_tiny": PixArtAlphaPipeline, "sd21_tiny": StableDiffusionPipeline}
# texts as the backbones have them in training
TEXT = {
    "sd3_tiny": {"max_sequence_length": 0},
    "pixart_tiny": {"max_sequence_length": 24, "clean_caption": False, "use_resolution_binning": False},
    "sd21_tiny": {},
}
BACKBONES = {}  # loaded ones, by name


@pytest.fixture(scope="session")
def make():
    """make("unicon adapter.connector=zero_mlp", "sd3_tiny") -> (configuration, backbone, shaken adapter)."""
    build.quiet()

    @cache
    def made(words: str, base: str):
        name, *overrides = words.split()
        cfg = load("train", [f"adapter={name}", f"backbone={base}", "hardware=cpu", *overrides])
        if base not in BACKBONES:
            BACKBONES[base] = construct(cfg.backbone).load(CPU, torch.float32)
        adapter = shaken(build.new_adapter(cfg, BACKBONES[base], training=False)).eval()
        if name == "controlnet":  # its hint passes eight small layers and would hardly be seen
            adapter.hint.conv_out.weight.data.mul_(300)
        return cfg, BACKBONES[base], adapter

    return made


def drawing(seed: int = 0) -> Image.Image:
    """A condition: bright shapes on black, 64 x 64 pixels."""
    picture, rng = Image.new("RGB", (64, 64)), np.random.default_rng(seed)
    for _ in range(3):
        x, y = rng.integers(0, 40, 2)
        ImageDraw.Draw(picture).ellipse([int(x), int(y), int(x) + 20, int(y) + 16], outline=(255, 255, 255), width=2)
    return picture


def noise_for(backbone, count: int = 2):
    side = backbone.native_resolution // backbone.facts.factor
    return torch.randn(count, backbone.facts.latent_channels, side, side, generator=torch.Generator().manual_seed(3))


def ours(adapter, backbone, conditions, scale=1.0):
    """What this project draws: latents (2, C, H, W)."""
    maps = np.stack([np.asarray(c) for c in conditions])
    features = adapter.encode_condition(condition_tensor(maps, adapter.condition_space, backbone.load_codec(CPU)))

    def predict(x, t, text, given):
        return adapter.predict(backbone, x, t, text, given, scale)

    text, empty = backbone.encode_text(PROMPTS, CPU), backbone.encode_text([""], CPU)
    solver = solver_for(backbone.objective, backbone.scheduler())
    with torch.no_grad():
        return denoise(predict, noise_for(backbone), solver, backbone.objective, STEPS, text, empty, features, GUIDANCE)


def stock_pipe(kind, backbone, **parts):
    """A stock pipeline on the backbone's folder, with our solver and without SD3's T5, as in training."""
    base = backbone.name
    without = {"text_encoder_3": None, "tokenizer_3": None} if base == "sd3_tiny" else {}
    pipe = kind.from_pretrained(backbone.model.fetch(("",)), local_files_only=True, **without, **parts)
    pipe.scheduler = solver_for(backbone.objective, backbone.scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe, backbone, **given):
    """What the pipeline draws from the same noise and prompts."""
    common = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent", "height": 64, "width": 64}
    made = pipe(
        prompt=PROMPTS, negative_prompt=["", ""] if backbone.name != "pixart_tiny" else "", latents=noise_for(backbone).clone(),
        return_dict=False, **common, **TEXT[backbone.name], **given,
    )  # fmt: skip
    return made[0]


def gap(one, other) -> float:
    return float((one - other).detach().abs().max())


def drift(found, expected) -> float:
    """The largest difference between two drawings, in units of their own spread: a shaken adapter may go far."""
    return gap(found, expected) / max(1.0, float(expected.std()))
