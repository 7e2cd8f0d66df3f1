"""What is trained on: backbone, task, sources, caches and held-out images, from a configuration, in the one legal order.

Cheap things come first: by the time a weight is read, everything that can be refused has been.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from src.backbones.base import Backbone
from src.backbones.codec import Codec
from src.construct import construct
from src.control_score import HeldOut
from src.data.datamodule import Stores
from src.data.seen import check_seen
from src.data.source import Source
from src.data.stores import build_stores
from src.data.tolerant import bad_rows, without
from src.ranks.place import ALONE, Ranks
from src.sampling import solver_for
from src.support import check_cell
from src.tasks.base import Task
from src.types import UserError


@dataclass
class Plan:
    """What a configuration names, made without reading a weight."""

    backbone: Backbone
    task: Task
    train_source: Source
    val_source: Source


@dataclass
class World:
    """What all trainings of one run share: loaded backbone, codec, cached data, the held-out set."""

    backbone: Backbone
    codec: Codec
    task: Task
    train: Stores
    val: Stores
    held: HeldOut
    backbone_hash: str


def device_of(cfg: DictConfig) -> torch.device:
    """The device that this process works on, from a resolved hardware profile."""
    return torch.device("cuda", torch.cuda.current_device()) if cfg.hardware.accelerator == "gpu" else torch.device("cpu")


def backbone_dtype(cfg: DictConfig) -> torch.dtype:
    """Frozen weights are kept in the precision that they compute in."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(cfg.hardware.precision, torch.float32)


def plan(cfg: DictConfig, beside: Plan | None = None) -> Plan:
    """Construct backbone (facts only), task and sources; whatever is wrong with them is raised here.

    beside: the plan of another adapter or task on the same images, whose backbone and sources serve this one, too.
    """
    backbone = beside.backbone if beside else construct(cfg.backbone, resolution=cfg.resolution)
    check_cell(cfg, backbone)
    task = construct(cfg.task)
    for note in task.notes:
        _say(note)
    if beside:
        check_seen(task, beside.train_source)
        return Plan(backbone, task, beside.train_source, beside.val_source)
    train, val = (construct(cfg.data, split=split, resolution=cfg.resolution) for split in ("train", "val"))
    for side in {side for row in range(len(train)) for side in train.size_of(row)} - {cfg.resolution}:
        backbone.check_resolution(side, "a side of data.buckets")
    if len(val) < cfg.validation.final_images:
        raise UserError(f"validation.final_images={cfg.validation.final_images}, but data.val_images gives {len(val)}")
    check_seen(task, train)
    if line := repeats(train, cfg.budget.effective_batch):
        _say(line)
    return Plan(backbone, task, train, val)


def repeats(source: Source, batch: int) -> str:
    """A line where a size has fewer training images than a step takes; empty where none has."""
    sizes = Counter(source.size_of(row) for row in range(len(source)))
    (height, width), fewest = min(sizes.items(), key=lambda pair: pair[1])
    if fewest >= batch:
        return ""
    which = f"of the size {width} x {height}" if len(sizes) > 1 else f"of data={source.name}"
    return (
        f"{fewest} training images {which} are fewer than budget.effective_batch={batch}: none is left out, and a step holds "
        f"some of them more than once; write budget.effective_batch={fewest} or less, or give more images"
    )


def load_world(cfg: DictConfig, made: Plan) -> World:
    """Read the weights, fill the caches, and set up the held-out images."""
    return load_worlds([cfg], [made])[0]


def load_worlds(cfgs: Sequence[DictConfig], plans: Sequence[Plan], ranks: Ranks = ALONE) -> list[World]:
    """The worlds of those who train together, around one backbone; those with equal conditions have one world. ranks: all of
    whom load them."""
    cfg, backbone, device = cfgs[0], plans[0].backbone, device_of(cfgs[0])
    backbone.load(device, backbone_dtype(cfg))
    codec = backbone.load_codec(device)
    plans[0].train_source, plans[0].val_source = watched(cfg, plans[0], [made.task for made in plans], ranks)
    stores: dict[str, list[Stores]] = {}
    for one, made in zip(cfgs, plans, strict=True):
        if conditions_key(one) not in stores:
            made.train_source, made.val_source = plans[0].train_source, plans[0].val_source
            stores[conditions_key(one)] = filled(one, made, codec)
    backbone.drop_text()
    digest, worlds = backbone.weight_hash(), {}
    for one, made in zip(cfgs, plans, strict=True):
        key = conditions_key(one)
        if key not in worlds:
            held = held_out(one, made, stores[key][1], codec)
            worlds[key] = World(backbone, codec, made.task, *stores[key], held, digest)
    return [worlds[conditions_key(one)] for one in cfgs]


def conditions_key(cfg: DictConfig) -> str:
    """What tells the conditions of one configuration from those of another on the same images."""
    return OmegaConf.to_yaml(cfg.task, resolve=True) + cfg.adapter.condition_space


def held_out(cfg: DictConfig, made: Plan, stores: Stores, codec: Codec) -> HeldOut:
    """The held-out images with their conditions, and how pictures are drawn for them."""
    samples = [made.val_source[i] for i in range(min(cfg.validation.final_images, len(made.val_source)))]
    conditions = [made.task.condition_of(s, cfg.seed) for s in samples]
    return HeldOut(
        stores=stores,
        images=np.stack([s.image for s in samples]),
        conditions=np.stack(conditions),
        task=made.task,
        codec=codec,
        solver=solver_for(made.backbone.objective, made.backbone.scheduler()),
        steps=cfg.validation.steps,
        guidance=cfg.validation.guidance,
        seed=cfg.validation.seed,
    )


def cached(cfg: DictConfig, made: Plan, codec: Codec) -> list[Stores]:
    """The caches of both splits, filled, of `made`'s sources as `watched` makes them."""
    made.train_source, made.val_source = watched(cfg, made, [made.task])
    return filled(cfg, made, codec)


def watched(cfg: DictConfig, made: Plan, tasks: Sequence[Task], ranks: Ranks = ALONE) -> list[Source]:
    """Both sources, where the data says so with bad training samples replaced and bad held-out ones left out: a score would
    count a second copy twice. tasks: all that will make conditions of them; ranks: the first reads, and says what is bad."""
    folder, workers = Path(cfg.cache_dir), cfg.hardware.workers
    both = ((made.train_source, False), (made.val_source, True))
    lists = ranks.first_works(lambda beat: [bad_rows(s, folder, workers, _say, tasks, out, beat) for s, out in both])
    return [without(source, skipped, out) for (source, out), skipped in zip(both, lists, strict=True)]


def filled(cfg: DictConfig, made: Plan, codec: Codec) -> list[Stores]:
    """The caches of both splits, filled."""
    folder, workers, space = Path(cfg.cache_dir), cfg.hardware.workers, cfg.adapter.condition_space
    sources, device = [made.train_source, made.val_source], device_of(cfg)
    return build_stores(sources, made.task, made.backbone, codec, space, folder, device, cfg.seed, workers, _say)


def _say(line: str) -> None:
    print(line, flush=True)
