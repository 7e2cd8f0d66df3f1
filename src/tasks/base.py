"""The task interface: what is shown to the adapter, and how an output is judged against it.

One implementation serves training, validation, evaluation, sampling and export; its settings travel in the checkpoint
(they are part of the resolved configuration).
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from src.types import Sample


class Task(ABC):
    """Pictures here are (H, W, 3) uint8, one at a time.

    metrics: name -> (unit, "higher" or "lower" is better), in the order of importance; the first is the control score
    that validation watches.
    """

    name: str
    metrics: ClassVar[dict[str, tuple[str, str]]]

    @abstractmethod
    def make_condition(self, sample: Sample, generator: np.random.Generator) -> np.ndarray:
        """The condition map of a sample, (H, W, 3) uint8. generator: keyed by (seed, image), for degradations."""

    @abstractmethod
    def score(self, output: np.ndarray, condition: np.ndarray, image: np.ndarray) -> dict[str, float]:
        """Every metric of `metrics` for one output; the detector that made the condition is applied to it."""

    @abstractmethod
    def settings(self) -> dict:
        """Everything that changes a condition map: part of the cache's key."""
