"""How many bytes a command is going to write or put ready, from shapes alone: for whoever looks whether there is room."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from src.backbones.base import Backbone, BackboneFacts
from src.data.stores import picture_bytes, text_bytes
from src.fit import training_estimate
from src.profiling.memory import GIB
from src.world import Plan, conditions_key

PREFETCHED = 2  # batches that each worker of a loader has ready, torch's own default
PNG_SHARE = 0.5  # of the bytes of a picture's pixels: a guess from below, so that only what surely lacks room is refused


@dataclass(frozen=True)
class Need:
    """key: of the configuration, that names the folder; what: in words."""

    key: str
    folder: Path
    what: str
    bytes: int


def checkpoint_needs(cfg: DictConfig, backbone: Backbone, resumed: bool) -> list[Need]:
    """The checkpoints that lie there at once: those that are kept, and one more, for the new one is whole before an old one
    goes. resumed: then all but the new one are there already."""
    found = training_estimate(cfg, backbone)  # weights, their average and the optimizer's state are what is saved
    size = int(GIB * (found.trainable_weights_gib + found.ema_gib + found.optimizer_gib))
    keys = cfg.callbacks.checkpoints
    made = cfg.budget.images // keys.every_images + 1
    count = 1 if resumed else min(keys.keep + 1, made) * (2 if cfg.control_arm else 1)
    return [Need("output_dir", Path(cfg.output_dir), f"{count} checkpoint{'s' if count > 1 else ''}", count * size)]


def cache_needs(cfgs: Sequence[DictConfig], plans: Sequence[Plan]) -> list[Need]:
    """The caches of those who train together, without what is there.

    The name of a store says what is in it by the hash of weights that nobody has read yet, so a store of the same size counts
    as the same: too little may be counted, and never too much. The cache itself counts again, exactly, before it begins.
    """
    facts, folder, bytes_left, seen = plans[0].backbone.facts, Path(cfgs[0].cache_dir), 0, set()
    for source in (plans[0].train_source, plans[0].val_source):
        sizes = Counter(source.size_of(row) for row in range(len(source)))
        bytes_left += _missing(folder, "text", len(source), text_bytes(facts))
        bytes_left += sum(_missing(folder, "latents", n, picture_bytes(facts, size, "latent")[0]) for size, n in sizes.items())
        for cfg in cfgs:
            space, key = cfg.adapter.condition_space, (source.fingerprint(), conditions_key(cfg))
            if key not in seen:
                seen.add(key)
                of_size = {size: picture_bytes(facts, size, space)[1] for size in sizes}
                bytes_left += sum(_missing(folder, "conditions", n, of_size[size]) for size, n in sizes.items())
    return [Need("cache_dir", folder, "the cache", bytes_left)]


def _missing(folder: Path, kind: str, rows: int, row_bytes: int) -> int:
    """Bytes of a store, without the shards of the fullest one of its kind and size."""
    there = 0
    for file in folder.glob(f"{kind}-*/store.json"):
        try:
            facts: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if (facts.get("rows"), facts.get("row_bytes")) == (rows, row_bytes):
            shards = sum(1 for _ in file.parent.glob("rows-*.safetensors"))
            there = max(there, min(rows, shards * facts["rows_per_shard"]))
    return (rows - there) * row_bytes


def loader_bytes(cfg: DictConfig, facts: BackboneFacts) -> int:
    """What one worker of a training's loader has ready in shared memory: latents, noise, captions and conditions as float32."""
    latent, condition = picture_bytes(facts, (cfg.resolution, cfg.resolution), cfg.adapter.condition_space)
    of_condition = condition if cfg.adapter.condition_space == "latent" else 4 * condition
    return PREFETCHED * cfg.hardware.micro_batch * (2 * latent + 2 * text_bytes(facts) + of_condition)


def picture_needs(folder: Path, pictures: int, side: int) -> list[Need]:
    """Drawn pictures of an evaluation."""
    return [Need("output_dir", folder, f"{pictures} pictures", int(PNG_SHARE * 3 * side * side * pictures))]
