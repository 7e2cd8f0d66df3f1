"""The evaluation set: the images, captions, conditions and noise that every adapter is given, from a data source.

What it is made of stands beside the pictures of all who were given it, `set/` of the group's folder, and is known by one
hash over the content: renamed files are the same set, another pixel or caption is another.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
from omegaconf import DictConfig, OmegaConf

from src.construct import construct
from src.data.seen import check_seen
from src.data.signals import FILTERS
from src.data.source import Probe, Source
from src.data.tolerant import tolerant
from src.evaluate.pictures import PictureFolder, Pictures, Progress, Say
from src.tasks.base import Task
from src.types import Sample, UserError

FILTER_NAMES = {cv2.INTER_AREA: "area", cv2.INTER_CUBIC: "cubic", cv2.INTER_LINEAR: "linear"}


@dataclass(frozen=True)
class Plan:
    """A set before a picture is read. source: its rows alone; framing: how the source makes squares of pictures."""

    name: str
    split: str
    seed: int
    source: Source
    framing: dict[str, str]

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class EvaluationSet:
    """The set on the disk. hash: over ids, captions, images and conditions."""

    plan: Plan
    folder: PictureFolder
    images: Pictures
    conditions: Pictures
    ids: list[str]
    captions: list[str]
    hash: str


class First(Source):
    """The first `count` samples of a source."""

    def __init__(self, source: Source, count: int):
        self.source, self.count = source, count
        self.name, self.resolution, self.signals = source.name, source.resolution, source.signals
        self.are_scenes = source.are_scenes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(f"sample {index} of {self.count}")
        return self.source[index]

    def describe(self, index: int) -> tuple[str, str]:
        return self.source.describe(index)

    def size_of(self, index: int) -> tuple[int, int]:
        return self.source.size_of(index)

    def probe(self, index: int) -> Probe:
        return self.source.probe(index)

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()}-first{self.count}"

    def pictures_fingerprint(self) -> str:
        return f"{self.source.pictures_fingerprint()}-first{self.count}"


def plan_set(cfg: DictConfig, task: Task, trained: bool, resolution: int, said: Say) -> Plan:
    """The set that `evaluation_set`, `data` and `n` name, without bad samples where the data says `skip`: the first `n` good
    ones, or all that there are. trained: whether the task is that of a run.

    Raises UserError for more images than it has, for data that is not the named set's, for images of several sizes, and for
    photos that the task's detector does not know.
    """
    chosen = cfg.evaluation_set
    source = construct(cfg.data, split=chosen.split, resolution=resolution)
    if chosen.fingerprint is not None and source.fingerprint() != chosen.fingerprint:
        raise UserError(
            f"evaluation_set={chosen.name} is {chosen.fingerprint}, and the data here is {source.fingerprint()}: under its "
            "name there is no other; write evaluation_set=folder with the data= that is meant"
        )
    images = len(source) if chosen.images is None else chosen.images
    if images > len(source):
        raise UserError(f"evaluation_set.images={images}, but data={source.name} has {len(source)} in its split {chosen.split}")
    count = images if cfg.n is None else cfg.n
    if count > images:
        raise UserError(f"n={count}, but evaluation_set={chosen.name} has {images} images; write n={images}, or n=null for all")
    if count < 2:
        raise UserError(f"evaluation_set={chosen.name} has {count} images: with one there is no other's condition")
    check_seen(task, source, trained)
    framing = framing_of(source)
    source = tolerant(source, Path(cfg.cache_dir), cfg.hardware.workers, said, [task], leave_out=True)
    if len(source) < count:
        if len(source) < 2:
            raise UserError(
                f"evaluation_set={chosen.name}: {len(source)} of {count} images are good, and 2 are needed; mend some"
            )
        said(f"evaluation_set={chosen.name}: n={len(source)}, where {count} were asked for: bad samples are left out")
        count = len(source)
    sizes = {source.size_of(row) for row in range(count)}
    if len(sizes) > 1:
        raise UserError(f"evaluation_set.split={chosen.split} has images of {len(sizes)} sizes; write data.buckets=null")
    return Plan(chosen.name, chosen.split, chosen.seed, First(source, count) if count < len(source) else source, framing)


def framing_of(source: Source) -> dict[str, str]:
    """How pictures become squares: crop and resize filter, for the manifest."""
    rules = getattr(source, "framing", None)
    if rules is None:
        return {"crop": "none", "resize": "none, made at this size"}
    smaller, larger = (FILTER_NAMES[f] for f in FILTERS["picture"])
    return {"crop": rules.crop, "resize": f"OpenCV {smaller} where it shrinks, {larger} where it grows"}


def refuse_training_images(plan: Plan, data: DictConfig, trained: DictConfig, subject: str) -> None:
    """Refuse a set that holds images which a run was trained on, if both read one place; scenes name their worlds, and none
    is both. data, trained: the configuration of the set's data, and the run's."""
    theirs = trained.data
    if data.get("path") is None or any(theirs.get(key) != data.get(key) for key in ("_target_", "path", "hub_split", "table")):
        return
    source = construct(theirs, split="train", resolution=trained.resolution)
    ids = {source.describe(row)[0].removesuffix("~flip") for row in range(len(source))}
    seen = [id for id in (plan.source.describe(row)[0] for row in range(len(plan))) if id in ids]
    if seen:
        raise UserError(
            f"{subject} was trained on {len(seen)} of the {len(plan)} images of this set, such as {seen[0]}; it held out "
            f"others: data.val_images={theirs.get('val_images')} evaluation_set.split=val"
        )


def open_set(plan: Plan, task: Task, folder: Path, said: Say) -> EvaluationSet:
    """Write what is missing of the set's pictures, and open it. Images are read one at a time."""
    kept, rows = PictureFolder(folder, said, wait=True), range(len(plan))
    images, conditions = names("image", rows), names("condition", rows)
    missing = [r for r in rows if images[r] not in kept.files or conditions[r] not in kept.files]
    progress = Progress("set", len(plan), len(plan) - len(missing), said)
    for row in missing:
        sample = plan.source[row]
        kept.write(images[row], sample.image)
        kept.write(conditions[row], task.condition_of(sample, plan.seed))
        progress.add(1)
    described = [plan.source.describe(row) for row in rows]
    digest = hashlib.blake2b(digest_size=16)
    for row, (id, caption) in enumerate(described):
        seen = [kept.files[name].pixels for name in (images[row], conditions[row])]
        digest.update(json.dumps([id, caption, *seen]).encode())
    kept.close()
    ids, captions = ([d[i] for d in described] for i in (0, 1))
    return EvaluationSet(plan, kept, kept.many(images), kept.many(conditions), ids, captions, digest.hexdigest())


def names(folder: str, rows: Sequence[int]) -> list[str]:
    """The file of each row."""
    return [f"{folder}/{row:05d}.png" for row in rows]


def task_settings(task: Task, node: DictConfig) -> dict[str, Any]:
    """What makes the conditions and judges the outputs, for the manifest; where a metric's weights lie does not count."""
    options = {k: v for k, v in OmegaConf.to_container(node, resolve=True).items() if k not in ("_target_", "lpips_weights")}
    return {"options": options, "condition": task.settings(), "metrics": list(task.metrics)}
