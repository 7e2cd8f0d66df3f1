"""Fill the caches of a source: the only place where sources, tasks, codec and text encoders meet before training."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from src.backbones.base import Backbone
from src.backbones.codec import Codec
from src.data.cache import StoreOfSizes, TensorStore, blocks_to_do, check_space, store_key
from src.data.datamodule import Stores
from src.data.source import Source
from src.tasks.base import Task
from src.types import BackboneFacts, ConditionSpace, TextCond

# what is encoded at once: at most so many pictures and pixels (32 pictures of 256, 8 of 512, 2 of 1024), and captions
BATCH, BATCH_PIXELS, BATCH_CAPTIONS = 32, 2**21, 32
BATCH_COUNTED = 4096  # captions whose tokens are counted at once
SAY_EVERY_S = 30.0


def to_unit(pictures: list[np.ndarray] | np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(np.stack(list(pictures)))).movedim(-1, 1).float() / 255


def to_bytes(pictures: Tensor) -> np.ndarray:
    """(B, 3, H, W) float in [0, 1] -> (B, H, W, 3) uint8, rounded."""
    return pictures.mul(255).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).cpu().numpy()


def condition_tensor(maps: list[np.ndarray] | np.ndarray, space: ConditionSpace, codec: Codec) -> Tensor:
    """Condition maps (B, H, W, 3) uint8 -> what an adapter's `encode_condition` takes. The one path of every entry."""
    x = to_unit(maps)
    return codec.encode(x).cpu() if space == "latent" else x


@dataclass
class Room:
    """The stores of the pictures of one size, opened or still to be filled. rows: of the source, in its order."""

    size: tuple[int, int]
    rows: np.ndarray
    latents: TensorStore
    conditions: TensorStore


@dataclass
class Shelf:
    """The stores of one source: a room per picture size, and the captions of all."""

    source: Source
    ids: list[str]
    captions: list[str]
    rooms: list[Room]
    text: TensorStore

    @property
    def stores(self) -> list[TensorStore]:
        return [store for room in self.rooms for store in (room.latents, room.conditions)] + [self.text]

    def opened(self, empty_text: TextCond, zero_conditions: tuple[Tensor, ...]) -> Stores:
        """For training. A batch of several sizes cannot be read: `Stores.buckets` tells which rows go together."""
        rows = [room.rows for room in self.rooms]
        latents, conditions = ([getattr(room, name) for room in self.rooms] for name in ("latents", "conditions"))
        return Stores(
            self.ids,
            self.captions,
            latents[0] if len(rows) == 1 else StoreOfSizes(latents, rows),
            self.text,
            conditions[0] if len(rows) == 1 else StoreOfSizes(conditions, rows),
            empty_text,
            zero_conditions,
            tuple(rows) if len(rows) > 1 else (),
        )


def build_stores(
    sources: Sequence[Source],
    task: Task,
    backbone: Backbone,
    codec: Codec,
    space: ConditionSpace,
    cache_dir: Path,
    device: torch.device,
    seed: int,
    workers: int,
    say: Callable[[str], None],
) -> list[Stores]:
    """Fill what is missing of the stores of every source, and open them; bytes are told before the first is computed.

    Latents and conditions are stored in float32 (a 64-pixel latent is 4 KiB), condition pictures as bytes, text embeddings
    in float16. Memory is bounded: pictures are read and encoded `BATCH_PIXELS` at a time, and a store holds one shard.
    seed: of the condition maker, for tasks whose conditions vary. Raises UserError if the disk has no room.
    """
    shelves = [plan_stores(source, task, backbone, codec, space, cache_dir, seed) for source in sources]
    check_space([store for shelf in shelves for store in shelf.stores], cache_dir, say)
    try:
        for shelf in shelves:
            for room in shelf.rooms:
                _fill_pictures(room, shelf.source, task, codec, space, seed, workers, say)
            _fill_text(shelf, backbone, device, say)
    finally:
        for store in (store for shelf in shelves for store in shelf.stores):
            store.locks.close()
    sizes = {room.size for shelf in shelves for room in shelf.rooms}
    empty = backbone.encode_text([""], device).map(lambda x: x.half().float())  # as a cached caption is read
    zeros = {size: condition_tensor(np.zeros((1, *size, 3), np.uint8), space, codec) for size in sizes}
    return [shelf.opened(empty, tuple(zeros[room.size] for room in shelf.rooms)) for shelf in shelves]


def plan_stores(
    source: Source, task: Task, backbone: Backbone, codec: Codec, space: ConditionSpace, cache_dir: Path, seed: int
) -> Shelf:
    """Where the stores of a source are and how large; nothing is computed but captions and hashes."""
    described = [source.describe(i) for i in range(len(source))]
    ids, captions = [d[0] for d in described], [d[1] for d in described]
    facts, codec_hash, square = backbone.facts, codec.weight_hash(), (source.resolution, source.resolution)
    sizes = [source.size_of(i) for i in range(len(source))]

    def store(kind: str, count: int, row_bytes: int, **content: Any) -> TensorStore:
        made = TensorStore(cache_dir / f"{kind}-{store_key(**content)}", count, row_bytes)
        if made.missing():
            made.describe(**content)
        return made

    content, drawn = source.pictures_fingerprint(), {"seed": seed} if task.varies else {}
    seen = {"task": task.settings(), "space": space, "codec": codec_hash if space == "latent" else None, **drawn}
    rooms = []
    for size in sorted(set(sizes)):
        rows = np.array([i for i, s in enumerate(sizes) if s == size])
        latent_bytes, condition_bytes = picture_bytes(facts, size, space)
        pictures = {"source": content} | ({} if size == square else {"size": size})
        latents = store("latents", len(rows), latent_bytes, **pictures, codec=codec_hash, dtype="float32")
        rooms.append(Room(size, rows, latents, store("conditions", len(rows), condition_bytes, **pictures, **seen)))
    read_as = {"text": backbone.text_key(), "tokens": facts.text_tokens, "dtype": "float16"}
    text = store("text", len(source), text_bytes(facts), captions=store_key(captions=captions), **read_as)
    return Shelf(source, ids, captions, rooms, text)


def picture_bytes(facts: BackboneFacts, size: tuple[int, int], space: ConditionSpace) -> tuple[int, int]:
    """Bytes of a picture's latent and of its condition, from shapes alone. size: (height, width) in pixels."""
    latent = 4 * facts.latent_channels * (size[0] // facts.factor) * (size[1] // facts.factor)
    return latent, latent if space == "latent" else 3 * size[0] * size[1]


def text_bytes(facts: BackboneFacts) -> int:
    """Bytes of an encoded caption, from shapes alone."""
    per_token = facts.text_width + (1 if facts.text_mask else 0)
    return 2 * (facts.text_tokens * per_token + (facts.pooled_width or 0))


class _Prepared(Dataset):
    """Lists of rows -> their samples with condition maps; a class of its own so that loader workers can do the work.

    parts: rows of the source, and whether their conditions are wanted, too.
    """

    def __init__(self, source: Source, task: Task, seed: int, parts: list[tuple[list[int], bool]]):
        self.source, self.task, self.seed, self.parts = source, task, seed, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        rows, with_condition = self.parts[i]
        samples = [self.source[row] for row in rows]
        maps = [self.task.condition_of(s, self.seed) for s in samples] if with_condition else []
        return [s.image for s in samples], maps


class _Filling:
    """The rows of one store as they come, written whenever a shard is whole."""

    def __init__(self, store: TensorStore, block: range):
        self.store, self.missing, self.parts = store, store.missing(block), []

    def wants(self, rows: range) -> bool:
        """Whether the rows, which lie in one shard, are still to be computed."""
        return any(rows.start in shard for shard in self.missing)

    def add(self, rows: range, tensors: dict[str, Tensor]) -> None:
        self.parts.append(tensors)
        shard = next((shard for shard in self.missing if rows.stop == shard.stop), None)
        if shard is not None:
            self.store.write(shard, {name: torch.cat([part[name] for part in self.parts]) for name in tensors})
            self.parts.clear()


def _fill_pictures(
    room: Room,
    source: Source,
    task: Task,
    codec: Codec,
    space: ConditionSpace,
    seed: int,
    workers: int,
    say: Callable[[str], None],
) -> None:
    """One pass over the source serves latents and conditions: reading a picture costs more than encoding it."""
    both = [room.latents, room.conditions]
    at_once = max(1, BATCH_PIXELS // (room.size[0] * room.size[1]))
    batch = min(BATCH, 1 << at_once.bit_length() - 1, *(store.shard for store in both))  # a power of two divides a shard
    progress = _Progress("pictures", len(room.rows), say)
    for block, lacking in blocks_to_do(both, say):
        fill = {store.folder: _Filling(store, block) for store in lacking}
        latents, conditions = fill.get(room.latents.folder), fill.get(room.conditions.folder)
        parts = [rows for rows in _split(block, batch) if any(f.wants(rows) for f in fill.values())]
        asked = [
            (room.rows[rows.start : rows.stop].tolist(), conditions is not None and conditions.wants(rows)) for rows in parts
        ]
        loader = DataLoader(_Prepared(source, task, seed, asked), batch_size=None, num_workers=workers)
        for rows, (images, maps) in zip(parts, loader, strict=True):
            if latents is not None and latents.wants(rows):
                latents.add(rows, {"latents": codec.encode(to_unit(images)).cpu()})
            if maps:
                encoded = space == "latent"
                made = condition_tensor(maps, space, codec) if encoded else torch.from_numpy(np.stack(maps)).movedim(-1, 1)
                conditions.add(rows, {"condition": made})
            progress.add(len(rows))


def _fill_text(shelf: Shelf, backbone: Backbone, device: torch.device, say: Callable[[str], None]) -> None:
    batch, progress = min(BATCH_CAPTIONS, shelf.text.shard), _Progress("captions", len(shelf.captions), say)
    if shelf.text.missing():
        for line in cut_captions(shelf.ids, shelf.captions, backbone, device):
            say(line)
    for block, (store,) in blocks_to_do([shelf.text], say):
        fill = _Filling(store, block)
        for rows in (rows for rows in _split(block, batch) if fill.wants(rows)):
            cond = backbone.encode_text(shelf.captions[rows.start : rows.stop], device)
            fill.add(rows, {name: x.half() for name, x in cond.fields().items()})
            progress.add(len(rows))


def cut_captions(ids: list[str], captions: list[str], backbone: Backbone, device: torch.device) -> Iterator[str]:
    """A line for each tokenizer that cuts some captions: their share, and the longest."""
    counts: dict[str, list[int]] = {}
    limits: dict[str, int] = {}
    for first in range(0, len(captions), BATCH_COUNTED):
        for name, (limit, some) in backbone.text_lengths(captions[first : first + BATCH_COUNTED], device).items():
            counts.setdefault(name, []).extend(some)
            limits[name] = limit
    for name, found in counts.items():
        if cut := sum(n > limits[name] for n in found):
            longest = max(range(len(found)), key=found.__getitem__)
            yield (
                f"{cut} of {len(found)} captions ({cut / len(found):.1%}) are cut at the {limits[name]} tokens that the "
                f"{name} of {backbone.facts.source} reads; the longest has {found[longest]}: {ids[longest]}"
            )


def _split(rows: range, size: int) -> Iterator[range]:
    return (range(s, min(s + size, rows.stop)) for s in range(rows.start, rows.stop, size))


class _Progress:
    """A line every half minute: a cache of a large data set takes hours."""

    def __init__(self, what: str, count: int, say: Callable[[str], None]):
        self.what, self.count, self.say, self.done = what, count, say, 0
        self.began = self.said = time.monotonic()

    def add(self, rows: int) -> None:
        self.done += rows
        now = time.monotonic()
        if now - self.said > SAY_EVERY_S:
            rate, self.said = self.done / (now - self.began), now
            self.say(f"  {self.done} of at most {self.count} {self.what}, {rate:.1f}/s")
