"""Proof that control is learned: the same prompts, conditions and noise through several arms, scored image by image.

Arms: "" the right condition; "wrong_condition" another image's; "zero_condition" the black picture;
"no_condition" the frozen backbone alone. Every arm is judged against the image's own condition.
Training's validation and `python -m src.evaluate` both draw and score with what is here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from src import rng
from src.adapters.base import ControlAdapter
from src.backbones.codec import Codec
from src.data.datamodule import Stores
from src.data.stores import to_bytes
from src.metrics.intervals import metric
from src.sampling import Batches, denoise
from src.tasks.base import Task

RIGHT, WRONG, ZERO, NONE = "", "wrong_condition", "zero_condition", "no_condition"
ARMS = (RIGHT, WRONG, ZERO, NONE)
SAMPLE_BATCH = 32
CEILING = "autoencoder_ceiling"
Scores = dict[str, np.ndarray]  # metric, or metric/arm -> (N,) one value per image


@dataclass(frozen=True)
class HeldOut:
    """The held-out images and everything that judging needs.

    stores: cached rows; images, conditions: the same rows as pictures (N, H, W, 3) uint8, or a sequence that reads them;
    solver: a diffusers scheduler; steps: of the solver.
    """

    stores: Stores
    images: Sequence[np.ndarray] | np.ndarray
    conditions: Sequence[np.ndarray] | np.ndarray
    task: Task
    codec: Codec
    solver: Any
    steps: int
    guidance: float
    seed: int


def sample_arm(
    adapter: ControlAdapter, held: HeldOut, arm: str, rows: list[int], pause: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Pictures of one arm for some rows, (len(rows), H, W, 3) uint8. Noise is keyed by row: equal in all arms and runs.

    pause is called between batches and may raise, to leave early.
    """
    return np.concatenate([made for _, made in drawn(adapter, held, arm, rows, Batches(SAMPLE_BATCH), pause)])


def drawn(
    adapter: ControlAdapter,
    held: HeldOut,
    arm: str,
    rows: Sequence[int],
    batches: Batches,
    pause: Callable[[], None] = lambda: None,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """`sample_arm` batch by batch: the rows of each and their pictures. batches: how many at once."""

    def draw(some: list[int]) -> np.ndarray:
        pause()
        return to_bytes(held.codec.decode(_latents(adapter, held, arm, some)))

    return batches.over(rows, draw)


def _latents(adapter: ControlAdapter, held: HeldOut, arm: str, rows: list[int]) -> torch.Tensor:
    device, count, stores = adapter.device, len(held.images), held.stores
    text, empty = stores.text_rows(rows).to(device, torch.float32), stores.empty_text.to(device)
    features = None
    if arm != NONE:
        condition = {
            RIGHT: lambda: stores.condition_rows(rows),
            WRONG: lambda: stores.condition_rows([rng.wrong_row(r, count) for r in rows]),
            ZERO: lambda: stores.zero_rows(rows),
        }[arm]()
        features = adapter.features_of(condition)
    latent_shape = tuple(stores.latents.rows("latents", rows[:1]).shape[1:])
    noise = rng.normal(held.seed, "eval-noise", rows, latent_shape).to(device)
    predict = adapter.predictor(0.0 if arm == NONE else 1.0)
    return denoise(predict, noise, held.solver, adapter.backbone.objective, held.steps, text, empty, features, held.guidance)


def score_rows(held: HeldOut, rows: Sequence[int], pictures: Sequence[np.ndarray] | np.ndarray) -> Scores:
    """Metric name -> (len(rows),) scores of pictures against the rows' own conditions."""
    each = [held.task.score(p, held.conditions[r], held.images[r]) for r, p in zip(rows, pictures, strict=True)]
    return {name: np.array([s[name] for s in each]) for name in held.task.metrics}


def ceiling(held: HeldOut) -> Scores:
    """Scores of the real images after the autoencoder: what no adapter on this backbone can pass by much."""
    rows, pictures = range(len(held.images)), []
    for first in range(0, len(rows), SAMPLE_BATCH):
        latents = held.stores.latents.rows("latents", list(rows[first : first + SAMPLE_BATCH]))
        pictures.extend(to_bytes(held.codec.decode(latents)))
    return score_rows(held, rows, pictures)


def control_entries(
    metrics: Mapping[str, tuple[str, str]], scores: Scores, arms: Sequence[str], best: Scores
) -> dict[str, dict[str, Any]]:
    """Every number about control as entries of `results.json`, the most important metric first.

    metrics: the task's; scores: `named` by metric and arm; arms: beside the right condition; best: of `ceiling`.
    Of each metric: the right condition's, each arm's, what the right condition gains over it (paired), and the ceiling.
    """
    entries = {}
    for name, (unit, better) in metrics.items():
        right = scores[name]
        entries[name] = metric(right, unit, better)
        for arm in arms:
            values = scores[named(name, arm)]
            entries[named(name, arm)] = metric(values, unit, better)
            entries[f"{name}/gain_over_{arm}"] = metric(right - values, unit, better)
        entries[f"{name}/{CEILING}"] = metric(best[name], unit, better)
    return entries


def named(metric: str, arm: str) -> str:
    """canny_f1, or canny_f1/wrong_condition."""
    return f"{metric}/{arm}" if arm else metric
