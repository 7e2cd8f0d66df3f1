"""Pictures to numbers: one entry per metric with n and interval, one value per image beside them, and results.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from src.control_score import ARMS, NONE, RIGHT, HeldOut, Scores, ceiling, control_entries, named, score_rows
from src.evaluate.measures import Measures, features_of
from src.evaluate.pictures import Pictures, Progress, Say
from src.evaluate.sets import EvaluationSet
from src.metrics.crosscheck import cross_checked
from src.metrics.distances import set_distances
from src.metrics.extractors import Inception
from src.metrics.quality import entries, picture_scores
from src.results import dated_origin, write_atomic
from src.results.evaluation import EvaluationResult, write_evaluation
from src.spread import spread

if TYPE_CHECKING:
    from src.build import Sampler

ROOT = Path(__file__).resolve().parents[2]
JUDGED = (RIGHT, NONE)  # arms whose look is measured, beside whether they follow the condition


@dataclass
class Found:
    """entries: of results.json; scores: metric, or metric/arm -> one value per image; features: extractor's suffix -> files of
    the features of the right condition's pictures and of the set's images; crosscheck: other packages' FID of these, where
    they are Inception's."""

    entries: dict[str, dict[str, Any]]
    scores: Scores
    features: dict[str, dict[str, str]] = field(default_factory=dict)
    crosscheck: dict[str, Any] | None = None


def measure(held: HeldOut, opened: EvaluationSet, pictures: Mapping[str, Pictures], measures: Measures, said: Say) -> Found:
    """Control in every arm, then distances of sets and picture metrics of the right condition and the frozen backbone."""
    rows, arms = range(len(opened.ids)), [arm for arm in ARMS if arm in pictures]
    scores: Scores = {}
    for arm in arms:
        scores |= {named(name, arm): values for name, values in score_rows(held, rows, pictures[arm]).items()}
    found = Found(control_entries(held.task.metrics, scores, [a for a in arms if a != RIGHT], ceiling(held)), scores)
    for arm in (arm for arm in JUDGED if arm in pictures):
        for extractor in measures.extractors:
            ours, file = features_of(pictures[arm].folder, pictures[arm].names, extractor, arm or "right", said)
            reference, real = features_of(opened.folder, opened.images.names, extractor, "image", said)
            distances = set_distances(ours, reference).entries(extractor.suffix)
            found.entries |= {named(k, arm): v for k, v in distances.items() if measures.wants(k)}
            if arm == RIGHT:
                found.features[extractor.suffix] = {"pictures": str(file), "images": str(real)}
                if isinstance(extractor, Inception) and measures.wants("fid"):
                    found.crosscheck = crosschecked(ours, reference, said)
        if measures.pictures:
            originals = opened.images if measures.compares or measures.wanted else None
            values = picture_scores(measures.pictures, pictures[arm], opened.captions, originals)
            values = {k: v for k, v in values.items() if measures.wants(k) and named(k, arm) not in found.entries}
            found.scores |= {named(k, arm): v for k, v in values.items()}
            found.entries |= {named(k, arm): v for k, v in entries(measures.pictures, values).items()}
    return found


def crosschecked(ours: np.ndarray, reference: np.ndarray, said: Say) -> dict[str, Any]:
    """FID by this project, clean-fid and torchmetrics on the same features (N, F), and one line of whether they agree."""
    said(f"fid: the same {len(ours):,} features through clean-fid and torchmetrics, which take a while")
    found = cross_checked(ours, reference)
    told = ", ".join(f"{name} {value:.4f}" if isinstance(value, float) else f"{name}: {value}" for name, value in found.items()
                     if name != "agree")  # fmt: skip
    said(f"fid {'agrees' if found['agree'] else 'DOES NOT AGREE'}: {told}")
    return found


def write_numbers(
    folder: Path,
    manifest: dict[str, Any],
    found: Found,
    opened: EvaluationSet,
    model: "Sampler",
    held: HeldOut,
    progress: Progress,
) -> EvaluationResult:
    """outcome.json, the score of every image, then results.json. -> what is in the latter."""
    conditions, subject, drawing = (manifest[key] for key in ("conditions", "subject", "drawing"))
    relative = {s: {k: str(Path(f).relative_to(folder.parent)) for k, f in fs.items()} for s, fs in found.features.items()}
    kept = {
        "ids": opened.ids,
        "captions": opened.captions,
        "scores": {name: np.asarray(values).tolist() for name, values in found.scores.items()},
        "features": relative,
    }
    write_atomic(folder / "outcome.json", (json.dumps(kept) + "\n").encode())
    speed = spread(progress.speeds) if progress.made else None
    result = EvaluationResult(
        adapter=subject["adapter"],
        subject=subject["label"],
        adapter_hash=subject["hash"],
        backbone=conditions["backbone"],
        task=model.task.name,
        resolution=conditions["resolution"],
        evaluation_set={key: conditions["evaluation_set"][key] for key in ("name", "hash", "n", "split")},
        manifest=manifest["conditions_hash"],
        metrics=found.entries,
        seed=subject["seed"],
        images_seen=subject["images_seen"],
        config_sha=subject["config_sha"],
        design=subject["design"],
        crosscheck=found.crosscheck,
        trainable_m=sum(model.adapter.trainable_parts_m().values()),
        draw_seconds=round(progress.seconds, 1) if speed else None,
        img_per_s=speed["median"] if speed else None,
        img_per_s_quartiles=speed["quartiles"] if speed else None,
        device=drawing["device"],
        precision=conditions["precision"],
        flags={
            "solver": type(held.solver).__name__,
            "sampling_steps": held.steps,
            "guidance": held.guidance,
            "noise_seed": held.seed,
            "batch": drawing["batch"],
            "threads": drawing["threads"],
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        },
        **dated_origin(ROOT),
    )
    write_evaluation(folder / "results.json", result)
    return result
