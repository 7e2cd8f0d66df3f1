"""What a bug report should say of a machine: versions, device, disks, folders, logins (yes or no, never the value), and what
would stop a training with these words.

    python -m src.doctor adapter=unicon_half hardware=h100 ...

The words are those of src.train. Exit code 2 where there are problems, and nothing is started or written.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from src import preflight
from src.config import load
from src.data.cache import mib
from src.faults import SHARED_MEMORY
from src.results import environment, git_state, hide_secrets
from src.types import UserError

ROOT = Path(__file__).resolve().parents[1]


def facts(cfg: DictConfig | None) -> Iterator[tuple[str, Any]]:
    """(name, value) of a line each. cfg: None where the words made no configuration."""
    yield from environment().items()
    sha, dirty = git_state(ROOT)
    yield "commit", f"{sha[:12]}{', with changes' if dirty else ''}"
    yield "processor", f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    yield "memory", mib(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", f"{gpu.name}, {mib(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}"
    if not torch.cuda.is_available():
        yield "GPU", f"none (torch's CUDA: {torch.version.cuda or 'none'})"
    yield "shared memory", _room(SHARED_MEMORY)
    yield "token of the hub", _yes(preflight.has_token())
    yield "offline by HF_HUB_OFFLINE", _yes(os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"))
    with contextlib.suppress(FileNotFoundError):
        yield "temporary files", _room(Path(tempfile.gettempdir()))
    if cfg is not None:
        for key in ("output_dir", "cache_dir"):
            yield key, _room(Path(cfg[key]))
        yield "W&B", _wandb(cfg)


def _wandb(cfg: DictConfig) -> str:
    if cfg.logger.name != "wandb":
        return f"not asked for (logger={cfg.logger.name})"
    try:
        from src.loggers.wandb_run import asked_mode, reachable, server

        mode, where = asked_mode(cfg.logger.mode)
        state, why = (mode, where) if mode in ("offline", "disabled") else reachable(server())
    except (ImportError, UserError) as error:
        return f"not to be had: {error}"
    return f"{state}{f': {why}' if why else ''}"


def _room(folder: Path) -> str:
    """Where it is, what is free, and whether it can be written to."""
    if not folder.is_absolute():
        folder = folder.absolute()
    room, fault = shutil.disk_usage(preflight.nearest(folder)), preflight.no_folder(folder)
    return f"{folder}, {mib(room.free)} of {mib(room.total)} free, {fault or 'can be written to'}"


def _yes(what: bool) -> str:
    return "yes" if what else "no"


def problems(words: Sequence[str]) -> tuple[DictConfig | None, str]:
    """The configuration of the words, where they make one, and all that would stop a training with it."""
    cfg = None
    try:
        cfg = load("train", words)
        from src.together.members import fitted, members

        with contextlib.redirect_stdout(io.StringIO()):
            preflight.planned(preflight.resolved(cfg), members, fitted)
    except UserError as error:
        return cfg, str(error)
    return cfg, ""


def main(words: Sequence[str]) -> int:
    """Print it. -> the exit code."""
    cfg, found = problems(words)
    for name, value in facts(cfg):
        print(hide_secrets(f"{name:<26} {value}"))
    print(hide_secrets(f"\n{found}" if found else "\nno problems"), flush=True)
    return 2 if found else 0


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv[1:]):
        raise SystemExit(print(__doc__))
    raise SystemExit(main(sys.argv[1:]))
