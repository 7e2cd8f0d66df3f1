"""Latents, text embeddings and conditions, computed once and kept on disk in safetensors shards.

A store's key says everything that decides its content, so a changed learning rate keeps it and a changed caption,
autoencoder, resolution or threshold makes a new one. A shard appears under its name only when it is whole: a killed
build goes on at the next shard, and processes that build the same store at once share the work (`src.data.locks`).
"""

import hashlib
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from src.data.locks import RowLocks, WholeFile
from src.types import UserError

CACHE_VERSION = 1
SHARD, SHARD_BYTES = 256, 2**26  # a shard has at most so many rows and bytes; both are powers of two
BLOCK = 4 * SHARD  # rows that a process takes at a time
MAX_OPEN = 256  # shards that are kept mapped for reading


def store_key(**content: object) -> str:
    """16 hex digits over what decides a store's content, and the cache's own version."""
    text = json.dumps({"cache_version": CACHE_VERSION, **content}, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def shard_rows(row_bytes: int) -> int:
    """Rows per shard: the largest power of two within `SHARD` and `SHARD_BYTES`, at least 1. It divides `SHARD`."""
    return 1 << min(SHARD.bit_length() - 1, max(0, (SHARD_BYTES // row_bytes).bit_length() - 1))


class TensorStore:
    """`count` rows of named tensors in `folder`, in shards. Opened lazily, so it may cross process borders.

    row_bytes: of one row, known before any is computed; it sets the rows per shard.
    """

    def __init__(self, folder: Path, count: int, row_bytes: int = 1):
        self.folder, self.count, self.row_bytes = folder, count, row_bytes
        self.shard = shard_rows(row_bytes)
        self.locks = RowLocks(folder)
        self._open: OrderedDict[int, Any] = OrderedDict()

    def missing(self, within: range | None = None) -> list[range]:
        """Row ranges of the shards that are not on disk yet; within: of these rows only, which begin with a shard."""
        within = range(self.count) if within is None else within
        starts = range(within.start, within.stop, self.shard)
        return [range(s, min(s + self.shard, self.count)) for s in starts if not self._path(s).exists()]

    def missing_bytes(self) -> int:
        """What is still to be computed and written."""
        return self.row_bytes * sum(map(len, self.missing()))

    def describe(self, **content: object) -> None:
        """Leave the parts of the key beside the shards, for whoever asks why there are two stores."""
        facts = {"cache_version": CACHE_VERSION, "rows": self.count, "row_bytes": self.row_bytes}
        facts |= {"rows_per_shard": self.shard, **content}
        text = json.dumps(facts, indent=1, sort_keys=True, default=str) + "\n"
        with self._writing(self.folder / "store.json") as part:
            part.write_text(text)

    def write(self, rows: range, tensors: dict[str, Tensor]) -> None:
        """Put one shard in place atomically. Raises UserError where the disk has no room for it."""
        with self._writing(self._path(rows.start)) as part:
            save_file({k: v.contiguous() for k, v in tensors.items()}, part)

    @contextmanager
    def _writing(self, target: Path) -> Iterator[Path]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with WholeFile(target) as part:
                yield part
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{target} cannot be written: {error}; shards that are whole stay, so free some space and repeat the command, "
                "or name another folder with cache_dir="
            ) from error

    def sweep(self, rows: range) -> None:
        """Remove what a killed process left half written of these rows, which this process holds."""
        if self.locks.work:
            for part in (p for missing in self.missing(rows) for p in self.folder.glob(f".{self._path(missing.start).name}.*")):
                part.unlink(missing_ok=True)

    def rows(self, name: str, indices: list[int]) -> Tensor:
        """(len(indices), ...) of the tensor `name`."""
        found = []
        for i in indices:
            if not 0 <= i < self.count:
                raise IndexError(f"row {i} of {self.count} in {self.folder.name}")
            start = i - i % self.shard
            found.append(self._opened(start).get_slice(name)[i - start])
        return torch.stack(found)

    def _opened(self, start: int) -> Any:
        if start in self._open:
            self._open.move_to_end(start)
        else:
            try:
                self._open[start] = safe_open(self._path(start), framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{self._path(start)} cannot be read: {error}; delete this file, and the next run computes it again"
                ) from error
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
        return self._open[start]

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "count": self.count, "row_bytes": self.row_bytes}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def _path(self, start: int) -> Path:
        return self.folder / f"rows-{start:08d}.safetensors"


class StoreOfSizes:
    """Stores of tensors of several shapes, read as one. rows: which rows of the whole each of them holds, in its order."""

    def __init__(self, stores: Sequence[TensorStore], rows: Sequence[np.ndarray]):
        self.stores, self.rows_of = list(stores), [np.asarray(r) for r in rows]
        self.count = sum(map(len, self.rows_of))
        self._where = np.empty((self.count, 2), int)
        for number, some in enumerate(self.rows_of):
            self._where[some] = np.stack([np.full(len(some), number), np.arange(len(some))], 1)

    def rows(self, name: str, indices: list[int]) -> Tensor:
        """(len(indices), ...) of the tensor `name`. Raises ValueError for rows of different shapes."""
        numbers = {int(self._where[i, 0]) for i in indices}
        if len(numbers) != 1:
            raise ValueError(f"rows {indices[:8]} are of {len(numbers)} sizes: a batch has one")
        return self.stores[numbers.pop()].rows(name, [int(self._where[i, 1]) for i in indices])


def blocks_to_do(stores: list[TensorStore], say: Callable[[str], None]) -> Iterator[tuple[range, list[TensorStore]]]:
    """Blocks of at most `BLOCK` rows, each with the stores that lack some of them and are this process's to fill until the
    next block is asked for; of a block that was half filled before, the missing shards alone are wanted.

    What another process is filling comes last, once that process has ended with it: normally nothing is missing then.
    """
    count = stores[0].count
    while True:
        blocks = [range(s, min(s + BLOCK, count)) for s in range(0, count, BLOCK)]
        blocks = [block for block in blocks if any(store.missing(block) for store in stores)]
        if not blocks:
            return
        idle = True
        for block in blocks:
            taken = [store for store in stores if store.missing(block) and store.locks.take(block)]
            try:
                lacking = [store for store in taken if store.missing(block)]  # it may have been filled just before
                if lacking:
                    idle = False
                    for store in lacking:
                        store.sweep(block)
                    yield block, lacking
            finally:
                for store in taken:
                    store.locks.release(block)
        if idle:
            for store in (store for store in stores if store.missing(blocks[0])):
                say(f"cache {store.folder.name}: another process computes rows {blocks[0].start} and on; waiting for it")
                store.locks.wait(blocks[0])


def check_space(stores: list[TensorStore], folder: Path, say: Callable[[str], None]) -> None:
    """Say how large each store that lacks something will be, before anything is computed. Raises UserError if the disk is
    too small for all that is missing."""
    total = sum(store.missing_bytes() for store in stores)
    for store in stores:
        if missing := store.missing_bytes():
            whole = store.count * store.row_bytes
            left = "" if missing == whole else f", {mib(missing)} of it still to do"
            say(f"cache {store.folder.name}: {store.count} rows, {mib(whole)} in {folder}{left}")
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if total > free:
        raise UserError(
            f"cache_dir={folder}: {mib(total)} are to be written and the disk has {mib(free)} free; name another with "
            "cache_dir=<folder>, or delete what is not needed there"
        )


def mib(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 2**20:,.1f} MiB" if count < 2**34 else f"{count / 2**30:,.1f} GiB"
