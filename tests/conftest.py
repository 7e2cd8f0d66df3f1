"""Shared fixtures: the embedded backbone, random ones of other shapes, and small runs through the real entries."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
# a quick try of anything: small data, few images, few solver steps
QUICK = [
    "data.train_images=96",
    "data.val_images=8",
    "budget.images=64",
    "budget.effective_batch=16",
    "hardware=cpu",
    "hardware.micro_batch=16",
    "hardware.workers=0",
    "validation.every_images=64",
    "validation.images=4",
    "validation.final_images=8",
    "validation.steps=2",
    "logger=local",
]


def run_entry(entry: str, *overrides: str, timeout: float = 300, **extra_env: str) -> subprocess.CompletedProcess:
    """`python -m src.<entry> ...` in a process of its own, from the repository root."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **extra_env}
    command = [sys.executable, "-m", f"src.{entry}", *overrides]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def run_folder(done: subprocess.CompletedProcess) -> Path:
    """The folder that the last line of an entry names."""
    assert done.stdout.strip(), done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("run: "), done.stdout + done.stderr
    return ROOT / last.removeprefix("run: ")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests, so that each scene is rendered once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def _sd3_tiny():
    from src.backbones.mmdit import SD3

    return SD3(name="sd3_tiny", source="embedded:sd3_tiny", native_resolution=64, t5_tokens=0).load(CPU, torch.float32)


@pytest.fixture
def sd3_tiny(_sd3_tiny):
    """The embedded SD3; a shallow copy per test around the same frozen network."""
    return copy.copy(_sd3_tiny)


def random_sd3(sd3_tiny, **changes):
    """A backbone of the SD3 class with random weights and another configuration: SD3.5's qk-norm, dual attention."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    config = {k: v for k, v in sd3_tiny.net.config.items() if not k.startswith("_")} | changes
    other = copy.copy(sd3_tiny)
    other._modules = dict(sd3_tiny._modules)
    net = SD3Transformer2DModel(**config)
    with torch.no_grad():  # a fresh network is too close to linear to find a mistake in the order of its parts
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return other.attach(net)


@pytest.fixture
def sd35_random(sd3_tiny):
    """SD3.5-medium in small: RMS-normed queries and keys, dual attention in the first blocks."""
    return random_sd3(sd3_tiny, qk_norm="rms_norm", dual_attention_layers=(0, 1, 2))


@pytest.fixture
def inputs():
    """A batch of two: latents (2, 16, 8, 8), t, text condition."""
    from src.types import TextCond

    gen = torch.Generator().manual_seed(0)
    text = TextCond(torch.randn(2, 24, 128, generator=gen), torch.randn(2, 128, generator=gen))
    return torch.randn(2, 16, 8, 8, generator=gen), torch.tensor([0.3, 0.9]), text
