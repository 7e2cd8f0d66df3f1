"""What pictures are measured with: the task's scores, distances of sets, and what networks say of single pictures.

Which of them there are is settled before anything is drawn: what was asked for by name and cannot be had is refused, what
merely could have been is told in a line.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from src.config.messages import nearest
from src.evaluate.pictures import PictureFolder, Say
from src.metrics.clip import PROMPTS
from src.metrics.extractors import FeatureExtractor, Inception, extract
from src.metrics.quality import PYIQA, PictureMetric, picture_metrics
from src.tasks.base import Task
from src.types import UserError

DISTANCES = ("fid", "fid_inf", "kid")
STAND_IN = "_scenes"  # the suffix of what the embedded world has in the place of Inception
WEIGHTS = {  # metric -> the key under `metrics` that names its weights
    **dict.fromkeys(("clip_score", *PROMPTS), "clip"),
    **{name: f"{name}_weights" for name in PYIQA},
    "lpips": "lpips_weights",
}


@dataclass
class Measures:
    """extractors: of set distances; pictures: metrics of single pictures; wanted: names that were asked for, None for all.

    compares: whether the task judges an output against the image itself, so that distances to the original mean something.
    """

    extractors: list[FeatureExtractor]
    pictures: list[PictureMetric]
    wanted: set[str] | None
    compares: bool

    def settings(self) -> dict[str, Any]:
        """Everything that changes a number, for the manifest."""
        return {
            "extractors": [extractor.settings() for extractor in self.extractors],
            "pictures": [metric.settings() for metric in self.pictures],
        }

    def wants(self, name: str) -> bool:
        return self.wanted is None or name in self.wanted


def plan_measures(cfg: DictConfig, task: Task, of_scenes: bool, resolution: int, said: Say) -> Measures:
    """From the keys under `metrics`. of_scenes: whether the set shows scenes. Raises UserError in about a second for a name
    that is unknown, or whose weights are missing."""
    keys, wanted = cfg.metrics, None if cfg.metrics.names is None else set(cfg.metrics.names)
    if wanted is not None:
        refuse_unknown(wanted, task)
        for name in sorted(wanted & WEIGHTS.keys() - set(task.metrics)):
            if keys[WEIGHTS[name]] is None:
                raise UserError(f"metrics.names asks for {name}, and metrics.{WEIGHTS[name]}=null: name its weights there")
    device = "cuda" if cfg.hardware.accelerator == "gpu" else "cpu"
    compares = "psnr" in task.metrics
    given = {"clip": keys.clip, "musiq_weights": keys.musiq_weights, "maniqa_weights": keys.maniqa_weights}
    pictures, absent = picture_metrics(**given, lpips_weights=keys.lpips_weights, device=device)
    if wanted is None and not of_scenes:  # of renderings they would say little
        for line in absent:
            said(line)
    return Measures(_extractors(keys, wanted, of_scenes, resolution, device, said), pictures, wanted, compares)


def refuse_unknown(wanted: set[str], task: Task) -> None:
    known = {*task.metrics, *WEIGHTS, *DISTANCES, *(name + STAND_IN for name in DISTANCES)}
    for name in sorted(wanted - known):
        raise UserError(f"metrics.names: {name} is not a metric of task={task.name}{nearest(name, known)}")


def _extractors(
    keys: DictConfig, wanted: set[str] | None, of_scenes: bool, resolution: int, device: str, said: Say
) -> list[FeatureExtractor]:
    found: list[FeatureExtractor] = []
    asked = [suffix for suffix in ("", STAND_IN) if wanted and wanted & {name + suffix for name in DISTANCES}]
    if STAND_IN in asked or (wanted is None and of_scenes):
        found += _scenes(of_scenes, resolution, STAND_IN in asked, said)
    if "" in asked or keys.inception_weights is not None:
        found.append(Inception(keys.inception_weights, device, said))
    elif wanted is None and not of_scenes:
        try:
            found.append(Inception(None, device, said))
        except UserError as reason:
            said(f"no fid, kid: {reason}")
    for extractor in found:
        said(f"distances of sets{'' if extractor.suffix == '' else f' end in {extractor.suffix}'}: {extractor.described}")
    return found


def _scenes(of_scenes: bool, resolution: int, asked: bool, said: Say) -> list[FeatureExtractor]:
    from src.embedded.reader import SIZE
    from src.embedded.scene_features import SceneFeatures

    fault = None
    if not of_scenes:
        fault = "the scene reader has seen scenes alone, and this set is of something else; take fid with Inception's weights"
    elif resolution != SIZE:
        fault = f"the scene reader reads {SIZE} pixels a side, and resolution={resolution}"
    if fault is None:
        return [SceneFeatures()]
    if asked:
        raise UserError(f"metrics.names asks for fid{STAND_IN} or kid{STAND_IN}: {fault}")
    said(f"no fid{STAND_IN}: {fault}")
    return []


def features_of(
    folder: PictureFolder, names: Sequence[str], extractor: FeatureExtractor, label: str, said: Say
) -> tuple[np.ndarray, Path]:
    """Features (N, F) of some of a folder's pictures, and the file that they are kept in, as long as neither pictures nor
    extractor change."""
    stamp = json.dumps([extractor.settings(), [folder.files[name].sha256 for name in names]], sort_keys=True)
    key = hashlib.blake2b(stamp.encode(), digest_size=8).hexdigest()
    file = folder.folder / "features" / f"{label}-{extractor.name}-{key}.npy"
    if file.is_file():
        try:
            return np.load(file), file
        except (ValueError, EOFError, OSError):
            said(f"{file} is damaged and is made again")
    found = extract(extractor, folder.many(names))
    file.parent.mkdir(exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.npy")
    np.save(part, found)
    os.replace(part, file)
    return found, file
