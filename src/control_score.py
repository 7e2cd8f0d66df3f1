"""Proof that control is learned: the same prompts, conditions and noise through several arms, scored image by image.

Arms: "" the right condition; "wrong_condition" another image's; "zero_condition" the black picture;
"no_condition" the frozen backbone alone. Every arm is judged against the image's own condition.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from src import rng
from src.adapters.base import ControlAdapter
from src.backbones.codec import Codec
from src.data.datamodule import Stores
from src.data.stores import to_bytes
from src.sampling import denoise
from src.tasks.base import Task

RIGHT, WRONG, ZERO, NONE = "", "wrong_condition", "zero_condition", "no_condition"
ARMS = (RIGHT, WRONG, ZERO, NONE)
SAMPLE_BATCH = 32


@dataclass(frozen=True)
class HeldOut:
    """The held-out images and everything that judging needs.

    stores: cached rows; images, conditions: the same rows as pictures (N, H, W, 3) uint8; solver: a diffusers scheduler;
    steps: of the solver.
    """

    stores: Stores
    images: np.ndarray
    conditions: np.ndarray
    task: Task
    codec: Codec
    solver: Any
    steps: int
    guidance: float
    seed: int


def wrong_row(row: int, count: int) -> int:
    """The image whose condition stands in for the wrong one: half the set away."""
    return (row + count // 2) % count


def sample_arm(
    adapter: ControlAdapter, held: HeldOut, arm: str, rows: list[int], pause: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Pictures of one arm for some rows, (len(rows), H, W, 3) uint8. Noise is keyed by row: equal in all arms and runs.

    pause is called between batches and may raise, to leave early.
    """
    return np.concatenate(list(_batches(adapter, held, arm, rows, pause)))


def _batches(
    adapter: ControlAdapter, held: HeldOut, arm: str, rows: list[int], pause: Callable[[], None]
) -> Iterator[np.ndarray]:
    device, count, stores = adapter.device, len(held.images), held.stores
    for first in range(0, len(rows), SAMPLE_BATCH):
        pause()
        some = rows[first : first + SAMPLE_BATCH]
        text, empty = stores.text_rows(some).to(device, torch.float32), stores.empty_text.to(device)
        features = None
        if arm != NONE:
            condition = {
                RIGHT: lambda some=some: stores.condition_rows(some),
                WRONG: lambda some=some: stores.condition_rows([wrong_row(r, count) for r in some]),
                ZERO: lambda some=some: stores.zero_rows(some),
            }[arm]()
            features = adapter.features_of(condition)
        latent_shape = tuple(stores.latents.rows("latents", some[:1]).shape[1:])
        noise = rng.normal(held.seed, "eval-noise", some, latent_shape).to(device)
        predict = adapter.predictor(0.0 if arm == NONE else 1.0)
        latents = denoise(
            predict, noise, held.solver, adapter.backbone.objective, held.steps, text, empty, features, held.guidance
        )
        yield to_bytes(held.codec.decode(latents))


def score_rows(held: HeldOut, rows: list[int], pictures: np.ndarray) -> dict[str, np.ndarray]:
    """Metric name -> (len(rows),) scores of pictures against the rows' own conditions."""
    each = [held.task.score(p, held.conditions[r], held.images[r]) for r, p in zip(rows, pictures, strict=True)]
    return {name: np.array([s[name] for s in each]) for name in held.task.metrics}


def named(metric: str, arm: str) -> str:
    """canny_f1, or canny_f1/wrong_condition."""
    return f"{metric}/{arm}" if arm else metric
