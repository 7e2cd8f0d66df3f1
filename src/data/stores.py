"""Fill the caches of one split: the only place where sources, tasks, codec and text encoders meet before training."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from src import rng
from src.backbones.base import Backbone
from src.backbones.codec import Codec
from src.data.cache import TensorStore, store_key
from src.data.datamodule import Stores
from src.data.source import Source
from src.tasks.base import Task
from src.types import ConditionSpace, Sample


class _Prepared(Dataset):
    """A source's samples with their condition maps; a class of its own so that loader workers can do the work."""

    def __init__(self, source: Source, task: Task, seed: int, rows: range):
        self.source, self.task, self.seed, self.rows = source, task, seed, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Sample, np.ndarray]:
        sample = self.source[self.rows[i]]
        generator = np.random.default_rng(rng.key(self.seed, "condition", self.rows[i]))
        return Sample(sample.id, sample.image, sample.caption), self.task.make_condition(sample, generator)


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


def build_stores(
    source: Source,
    task: Task,
    backbone: Backbone,
    codec: Codec,
    space: ConditionSpace,
    cache_dir: Path,
    device: torch.device,
    seed: int,
    workers: int,
    say: Callable[[str], None],
) -> Stores:
    """Fill what is missing of the stores of a source, and open them.

    Latents and conditions are stored in float32 (a 64-pixel latent is 4 KiB), text embeddings in float16.
    seed: of the condition maker; tasks with random degradations draw from it, per image.
    """
    described = [source.describe(i) for i in range(len(source))]
    ids, captions = [d[0] for d in described], [d[1] for d in described]
    facts, content, codec_hash = backbone.facts, source.fingerprint(), codec.weight_hash()
    in_space = {"space": space, "codec": codec_hash if space == "latent" else None}
    keys = {
        "latents": store_key(source=content, codec=codec_hash, dtype="float32"),
        "conditions": store_key(source=content, task=task.settings(), seed=seed, **in_space),
        "text": store_key(captions=captions, text=backbone.text_key(), tokens=facts.text_tokens, dtype="float16"),
    }
    latents, conditions, text = (TensorStore(cache_dir / f"{name}-{key}", len(source)) for name, key in keys.items())

    for rows in _union(latents.missing(), conditions.missing()):
        # one pass over the source serves both, since reading or rendering a picture costs more than encoding it
        prepared = list(DataLoader(_Prepared(source, task, seed, rows), batch_size=None, num_workers=workers))
        if rows in latents.missing():
            latents.write(rows, {"latents": codec.encode(to_unit([s.image for s, _ in prepared])).cpu()}, say)
        if rows in conditions.missing():
            maps = np.stack([m for _, m in prepared])
            stored = condition_tensor(maps, space, codec) if space == "latent" else torch.from_numpy(maps).movedim(-1, 1)
            conditions.write(rows, {"condition": stored}, say)
    for rows in text.missing():
        cond = backbone.encode_text(captions[rows.start : rows.stop], device)
        text.write(rows, {name: x.half() for name, x in cond.fields().items()}, say)
    empty = backbone.encode_text([""], device).map(lambda x: x.half().float())  # as a cached caption is read
    black = np.zeros((1, source.resolution, source.resolution, 3), np.uint8)
    return Stores(ids, captions, latents, text, conditions, empty, condition_tensor(black, space, codec))


def _union(*lists: list[range]) -> list[range]:
    return sorted({r for some in lists for r in some}, key=lambda r: r.start)
