"""Faults that a training meets and can go on after: memory that runs out, a loader whose workers die. What it was, what to
change, and what becomes of the memory that a failed step held."""

import gc
import os
import re
import shutil
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from omegaconf import DictConfig

from src.sampling import is_out_of_memory
from src.types import UserError

Kind = Literal["out_of_memory", "loader_died"]
SHARED_MEMORY = Path("/dev/shm")
_KILLED_BY = re.compile(r"killed by signal: ([\w ]+)")


class OutOfMemory(UserError):
    """A training step that did not fit the device."""


class LoaderDied(UserError):
    """A worker of the data loader ended on its own."""


def kind_of(error: BaseException) -> Kind | None:
    """Which fault an exception stands for; None for any other exception."""
    if isinstance(error, UserError):
        return None
    if "DataLoader worker" in str(error):
        return "loader_died"
    return "out_of_memory" if is_out_of_memory(error) else None


def explained(error: BaseException, cfg: DictConfig, run: Path, images_seen: int, peak_gib: float) -> UserError:
    """The fault as one line with the numbers and the mend. run: its folder; peak_gib: of the process or the device."""
    if kind_of(error) == "loader_died":
        return LoaderDied(f"{_why_died(error)} at {images_seen} images; {_fewer_workers(cfg, run)}")
    hardware, budget = cfg.hardware, cfg.budget.effective_batch
    tries = []
    if (smaller := halved(cfg)) is not None:
        tries.append(f"hardware.micro_batch={smaller} (budget.effective_batch={budget} stays) or hardware.oom=halve")
    if hardware.checkpointing != "both":
        tries.append("hardware.checkpointing=both")
    tries.append("a new run with a smaller resolution" + ("" if hardware.accelerator == "cpu" else " or optimizer=adamw8bit"))
    return OutOfMemory(
        f"out of memory in training at {images_seen} images: peak {peak_gib:.2f} GiB with hardware.micro_batch="
        f"{hardware.micro_batch} at resolution={cfg.resolution}; try {', '.join(tries)}: python -m src.train resume={run} ..."
    )


def halved(cfg: DictConfig) -> int | None:
    """The largest micro-batch up to half of the present one that divides the optimizer step; None if it is one image."""
    micro, on_each = cfg.hardware.micro_batch, cfg.budget.effective_batch // cfg.hardware.devices
    return next((m for m in range(micro // 2, 0, -1) if on_each % m == 0), None)


def free_memory(error: BaseException) -> None:
    """Let go of what the frames of a failed step hold, and of what the allocator keeps for later."""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        traceback.clear_frames(following.__traceback__)
        seen.append(following)
        following = following.__cause__ or following.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _why_died(error: BaseException) -> str:
    said = _chain(error)
    signals = [found.group(1) for text in said if (found := _KILLED_BY.search(text))]
    how = f"a worker of the data loader was killed ({signals[0].strip()})" if signals else "a worker of the data loader ended"
    if any("Bus error" in text or "shared memory" in text for text in said):
        room = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
        size = f", {room.free / 2**20:.0f} of {room.total / 2**20:.0f} MiB are free" if room else ""
        return f"{how}: shared memory is too small ({SHARED_MEMORY}{size}; in Docker: --shm-size=8g)"
    free_gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if any("Killed" in s for s in signals) or not signals:
        return f"{how}: most likely the machine ran out of memory ({free_gib:.1f} GiB are free now)"
    return how


def _fewer_workers(cfg: DictConfig, run: Path) -> str:
    fewer = cfg.hardware.workers // 2
    return (
        f"try hardware.workers={fewer}, now {cfg.hardware.workers}: python -m src.train resume={run} hardware.workers={fewer}"
    )


def _chain(error: BaseException) -> Sequence[str]:
    said, following = [], error
    while following is not None and len(said) < 8:
        said.append(str(following))
        following = following.__cause__ or following.__context__
    return said
