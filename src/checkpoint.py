"""Adapter checkpoints: a folder that appears only when it is whole, and holds nothing of the backbone.

`adapter.safetensors` (and `adapter_ema.safetensors`), `meta.json` (who it fits: adapter, backbone id, revision, hash) and
`state.pt` (optimizer, schedule, counters; readable with weights_only=True). The resolved configuration stands in the
run folder and, hashed, in the meta.
"""

import json
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from src.types import UserError

FORMAT = 1
META_KEY, EMA_KEY = "controlbench", "ema"


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or belongs to something else."""


class FormatError(CheckpointError):
    """A checkpoint in a format that this version does not read."""


class NotSaved(OSError):
    """A checkpoint that could not be written. Nothing was changed: what was there before still is."""


class AdapterCheckpointIO(CheckpointIO):
    """Lightning's way to our folders: its checkpoint dictionary is split into weights, moving average, meta and state."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write beside the target, sync, read back, rename. The old checkpoint of that name goes last. Raises NotSaved."""
        target = Path(path)
        part = target.with_name(f".{target.name}.part")
        try:
            self._write(checkpoint, target, part)
        # safetensors and torch have errors of their own for a full disk
        except (OSError, SafetensorError, RuntimeError, CheckpointError) as error:
            shutil.rmtree(part, ignore_errors=True)
            raise NotSaved(f"{target}: {str(error).splitlines()[0]}") from error

    def _write(self, checkpoint: dict[str, Any], target: Path, part: Path) -> None:
        rest = dict(checkpoint)
        weights, ema, meta = rest.pop("state_dict"), rest.pop(EMA_KEY, None), rest.pop(META_KEY)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file(_plain(weights), part / "adapter.safetensors")
        if ema:
            save_file(_plain(ema), part / "adapter_ema.safetensors")
        torch.save(rest, part / "state.pt")
        (part / "meta.json").write_text(json.dumps({"format": FORMAT, **meta}, indent=1))
        for file in part.iterdir():
            _sync(file)
        _sync(part)
        verify(part)
        old = target.with_name(f".{target.name}.old")
        if target.exists():
            os.replace(target, old)
        os.replace(part, target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)

    def load_checkpoint(self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None) -> dict:
        """Put Lightning's dictionary together again; nothing is unpickled but tensors and plain values."""
        folder = Path(path)
        checkpoint = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        checkpoint["state_dict"] = load_file(folder / "adapter.safetensors")
        checkpoint[META_KEY] = read_meta(folder)
        if (folder / "adapter_ema.safetensors").exists():
            checkpoint[EMA_KEY] = load_file(folder / "adapter_ema.safetensors")
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        shutil.rmtree(path, ignore_errors=True)


def verify(folder: Path) -> None:
    """Read every file of a checkpoint folder. Raises CheckpointError where one is cut short or missing."""
    try:
        load_file(folder / "adapter.safetensors")
        if (folder / "adapter_ema.safetensors").exists():
            load_file(folder / "adapter_ema.safetensors")
        torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        read_meta(folder)
    except FormatError:
        raise
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {str(error).splitlines()[0]}") from error


def read_meta(folder: Path) -> dict:
    """The meta of a checkpoint. Raises FormatError for another format version."""
    meta = json.loads((folder / "meta.json").read_text())
    if meta.get("format") != FORMAT:
        raise FormatError(f"{folder} has checkpoint format {meta.get('format')}, this version reads {FORMAT}")
    return meta


def newest(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint of a run, by images seen; broken ones are passed over. Raises FormatError for one that is
    newer than all whole ones and in another format: the run went further than this version can follow."""
    for folder in sorted((p for p in checkpoints.glob("images-*") if p.is_dir()), reverse=True):
        try:
            verify(folder)
            return folder
        except FormatError:
            raise
        except CheckpointError as error:
            print(f"passed over: {error}")
    return None


def tidy(checkpoints: Path) -> None:
    """Clear away what a killed process left half done; only for the process that holds the run.

    A checkpoint that was being replaced when it happened is put back.
    """
    for part in checkpoints.glob(".images-*.part"):
        shutil.rmtree(part, ignore_errors=True)
    for old in checkpoints.glob(".images-*.old"):
        target = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, target)


def fitting_weights(folder: Path, own: dict[str, Tensor], meta: dict, ema: bool = True) -> dict[str, Tensor]:
    """Weights of a checkpoint for an adapter whose tensors are `own` and whose identity is `meta`.

    ema: take the moving average where there is one. Raises CheckpointError, naming the first difference, for another
    method, another backbone, or other tensors.
    """
    theirs = read_meta(folder)
    for what in ("adapter", "backbone", "backbone_hash"):
        if theirs[what] != meta[what]:
            raise CheckpointError(f"{folder} was trained with {what}={theirs[what]!r}; this run has {what}={meta[what]!r}")
    file = folder / "adapter_ema.safetensors"
    weights = load_file(file if ema and file.exists() else folder / "adapter.safetensors")
    missing, surplus = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or surplus:
        raise CheckpointError(
            f"{folder} does not fit: {len(missing)} tensors missing {missing[:3]}, {len(surplus)} unknown {surplus[:3]}"
        )
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{folder} does not fit: {name} is {tuple(tensor.shape)}, this adapter's {tuple(own[name].shape)}"
            )
    return weights


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
