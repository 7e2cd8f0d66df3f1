"""Shared fixtures: the embedded backbones, random ones of other shapes, and small runs through the real entries."""

import copy
import gc
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.entries import ROOT, run_entry

__all__ = ["CPU", "QUICK", "ROOT", "SMALL", "noisy_inputs", "run_entry", "run_folder"]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

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
# for a test that asks only whether it runs: two optimizer steps of two images, and the fewest pictures that have an interval
SMALL = [*QUICK, "data.train_images=4", "data.val_images=2", "budget.images=4", "budget.effective_batch=2"]
SMALL += ["hardware.micro_batch=2", "validation.images=2", "validation.final_images=2", "validation.every_images=4"]


def run_folder(done: subprocess.CompletedProcess) -> Path:
    """The folder that the last line of an entry names."""
    assert done.stdout.strip(), done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("run: "), done.stdout + done.stderr
    return ROOT / last.removeprefix("run: ")


def pytest_collection_finish() -> None:
    """What was imported stays: without this the collector looks through half a million objects again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """Trainings inside a test process draw no curves, which take a second each; those through the entry do."""
    if "src.train.flow" in sys.modules:  # a file of tests that trains nothing need not import it
        monkeypatch.setattr("src.train.flow.plot_curves", lambda log, picture: None)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests, so that each scene is rendered once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def _loaded():
    from src.construct import construct
    from tests.contract.registry import node

    return cache(lambda name: construct(node("backbone", name)).load(CPU, torch.float32))


@pytest.fixture
def sd3_tiny(_loaded):
    """The embedded SD3; a shallow copy per test around the same frozen network."""
    return copy.copy(_loaded("sd3_tiny"))


@pytest.fixture
def pixart_tiny(_loaded):
    """The embedded PixArt-alpha, in the same way."""
    return copy.copy(_loaded("pixart_tiny"))


@pytest.fixture
def sd21_tiny(_loaded):
    """The embedded Stable Diffusion 2.1, in the same way."""
    return copy.copy(_loaded("sd21_tiny"))


@pytest.fixture
def random_backbone(tmp_path, monkeypatch):
    """Makes a backbone of any class and shape with random weights, through the source that serves to measure memory."""
    from src.backbones import source

    def make(kind, pipeline, configs, dtype=torch.float32, **options):
        index = {"_class_name": pipeline, **{part: ["diffusers", c.get("_class_name", "-")] for part, c in configs.items()}}
        file = tmp_path / "shapes.json"
        file.write_text(json.dumps({"small": {"": index, **configs}}))
        monkeypatch.setattr(source, "SHAPES", file)
        backbone = kind(name="small", source="random:small", native_resolution=64, **options).load(CPU, torch.float32)
        gen = torch.Generator().manual_seed(1)
        with torch.no_grad():  # a fresh network is too close to linear to find a mistake in the order of its parts
            for p in backbone.net.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=gen))
        torch.nn.Module.to(backbone.net, dtype)  # diffusers' own warns
        return backbone

    return make


def noisy_inputs(backbone, height=8, width=8):
    """A batch of two for a backbone: latents, t of the thousand steps' 300th and 900th, captions with some padding."""
    from src.types import TextCond

    gen, facts = torch.Generator().manual_seed(0), backbone.facts
    tokens = torch.randn(2, facts.text_tokens, facts.text_width, generator=gen)
    pooled = torch.randn(2, facts.pooled_width, generator=gen) if facts.pooled_width else None
    mask = torch.ones(2, facts.text_tokens) if facts.text_mask else None
    if facts.text_mask:
        mask[0, 3:] = 0
        mask[1, 5:] = 0
    latents = torch.randn(2, facts.latent_channels, height, width, generator=gen)
    return latents, torch.tensor([0.3, 0.9]), TextCond(tokens, pooled, mask)
