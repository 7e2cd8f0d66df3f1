"""Latents, text embeddings and conditions, computed once and kept on disk in safetensors shards.

A store's key says everything that decides its content, so a changed learning rate keeps it and a changed caption,
autoencoder, resolution or threshold makes a new one. A shard appears under its name only when it is whole: a killed
build goes on at the next shard, and two processes may build the same store at once.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CACHE_VERSION = 1
SHARD = 256


def store_key(**content: object) -> str:
    """16 hex digits over what decides a store's content, and the cache's own version."""
    text = json.dumps({"cache_version": CACHE_VERSION, **content}, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class TensorStore:
    """`count` rows of named tensors in `folder`, in shards of 256 rows. Opened lazily, so it may cross process borders."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count
        self._open: dict[int, object] = {}

    def missing(self) -> list[range]:
        """Row ranges of the shards that are not on disk yet."""
        starts = range(0, self.count, SHARD)
        return [range(s, min(s + SHARD, self.count)) for s in starts if not self._path(s).exists()]

    def write(self, rows: range, tensors: dict[str, Tensor], say: Callable[[str], None]) -> None:
        """Put one shard in place atomically; with the first one, say how large the whole store will be."""
        if rows.start == 0:
            each = sum(t.numel() * t.element_size() for t in tensors.values()) / len(rows)
            say(f"cache {self.folder.name}: {self.count} rows, {self.count * each / 2**20:.1f} MiB in {self.folder.parent}")
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self._path(rows.start)
        part = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, part)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)

    def rows(self, name: str, indices: list[int]) -> Tensor:
        """(len(indices), ...) of the tensor `name`."""
        found = []
        for i in indices:
            if not 0 <= i < self.count:
                raise IndexError(f"row {i} of {self.count} in {self.folder.name}")
            start = i - i % SHARD
            if start not in self._open:
                self._open[start] = safe_open(self._path(start), framework="pt")
            found.append(self._open[start].get_slice(name)[i - start])
        return torch.stack(found)

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "count": self.count, "_open": {}}

    def _path(self, start: int) -> Path:
        return self.folder / f"rows-{start:08d}.safetensors"
