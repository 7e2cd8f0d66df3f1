"""The tiniest training, in a process of its own, with or without a fault."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.events import EVENTS
from src.results import read_rows
from tests.conftest import ROOT

# 12 optimizer steps of 4 images, a checkpoint every 2 steps, a validation every 4
TINY = [
    "adapter=template", "backbone=pixart_tiny", "resolution=32", "logger=local", "hardware=cpu", "hardware.workers=0",
    "hardware.micro_batch=2", "budget.images=48", "budget.effective_batch=4", "optimizer.warmup_images=8",
    "data.train_images=20", "data.val_images=4", "caption_dropout=0.3", "validation.every_images=16", "validation.images=2",
    "validation.final_images=4", "validation.steps=2", "callbacks.checkpoints.every_images=8", "callbacks.meter.every_steps=1",
]  # fmt: skip


HANGS_S = 1200  # a training that takes longer hangs, on however busy a machine
RUN = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": HANGS_S}


def command(*words: str, faults: tuple[str, ...] = (), python: str = sys.executable) -> list[str]:
    own_data = any(word.startswith("data=") for word in words)
    tiny = [word for word in TINY if not (own_data and word.startswith("data.train_images="))]
    return [python, "-m", "tests.fault.driver", *faults, "--", *tiny, *words]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", **extra}


def trained(out: Path, *words: str, faults: tuple[str, ...] = (), **extra: str) -> subprocess.CompletedProcess:
    """A training below `out`, whose caches lie beside it. Resumes with resume=auto among the words."""
    places = [f"output_dir={out}"] + (
        [] if any(w.startswith("cache_dir=") for w in words) else [f"cache_dir={out.parent}/cache"]
    )
    line = command(*places, *words, faults=faults)
    return subprocess.run(line, check=False, env=environment(**extra), **RUN)


def resumed(out: Path, *words: str, faults: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    done = trained(out, *words, "resume=auto", faults=faults)
    assert "continuing" in done.stdout, done.stdout + done.stderr
    return done


def folder_of(out: Path) -> Path:
    (folder,) = out.glob("template_*/*/")
    return folder


def learned(out: Path) -> dict[str, torch.Tensor]:
    """Weights and their average in the last checkpoint, which must be that of the whole budget."""
    last = sorted((folder_of(out) / "checkpoints").glob("images-*"))[-1]
    assert last.name == "images-000000048"
    files = {name: load_file(last / f"{name}.safetensors") for name in ("adapter", "adapter_ema")}
    return {f"{name}.{key}": tensor for name, tensors in files.items() for key, tensor in tensors.items()}


def assert_same(out: Path, straight: Path) -> None:
    """Weights, averages, held-out scores and the log of every step, to the bit."""
    ours, theirs = learned(out), learned(straight)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    scores = [json.loads((folder_of(o) / "outcome.json").read_text())["scores"] for o in (out, straight)]
    assert scores[0] == scores[1]
    assert losses(out) == losses(straight)


def losses(out: Path) -> list[tuple[int, float]]:
    rows = read_rows(folder_of(out) / "metrics.jsonl")
    return [(row["images_seen"], row["train/loss"]) for row in rows if "train/loss" in row]


def events(out: Path, kind: str) -> list[dict]:
    return [row for row in read_rows(folder_of(out) / EVENTS) if row["event"] == kind]


def assert_refused(done: subprocess.CompletedProcess, *said: str) -> None:
    """Exit code 2 and one line of error, without a traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    for words in said:
        assert words in line, line


def own_disks(out: Path, disks: dict[Path, str], *words: str, faults: tuple[str, ...] = (), fill: str = "", **extra: str):
    """`trained` where each of the folders is a small disk of its own, which this process alone sees; what was left in `out`
    is copied to <out>-copy. Skips where a user may not mount anything. fill: a folder that is full from the start."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-Urm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces here, so no small disks")
    for disk in disks:
        disk.mkdir(parents=True, exist_ok=True)
    places = [f"output_dir={out}"] + (
        [] if any(w.startswith("cache_dir=") for w in words) else [f"cache_dir={out.parent}/cache"]
    )
    line = command(*places, *words, faults=faults)
    mounts = [f"mount -t tmpfs -o size={size} tmpfs '{disk}'" for disk, size in disks.items()]
    full = [f"head -c 100M /dev/zero > '{fill}/filler' 2>/dev/null; true"] if fill else []
    script = " && ".join([*mounts, *full, '"$@"']) + f"; code=$?; cp -r '{out}' '{out}-copy'; exit $code"
    shell = ["unshare", "-Urm", "sh", "-c", script, "sh", *line]
    return subprocess.run(shell, check=False, env=environment(**extra), **RUN)
