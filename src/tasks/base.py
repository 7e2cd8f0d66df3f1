"""The task interface: what is shown to the adapter, and how an output is judged against it.

One implementation serves training, validation, evaluation, sampling and export; its settings travel in the checkpoint
(they are part of the resolved configuration).
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

from src import rng
from src.types import BackboneFacts, Sample, UserError


class Task(ABC):
    """Pictures here are (H, W, 3) uint8, one at a time.

    metrics: name -> (unit, "higher" or "lower" is better), in the order of importance; the first is the control score
    that validation watches. The class holds those that are always there; an instance may extend its own copy, by a
    metric whose weights its configuration names.
    control_gap: by how much of the first metric, in its unit, the right condition must beat a wrong one for control to
    count as learned.
    signal: the exact map in `Sample.signals` from which the condition comes where a sample carries it, without a
    detector or a degradation; None where there is no such map.
    varies: whether `make_condition` draws from its generator. Conditions that do are cached per seed, others once.
    An instance whose options decide sets its own.
    sees_scenes_only: whether its detector knows the project's rendered scenes and no photos.
    notes: lines to say once when a run starts.
    """

    name: str
    metrics: ClassVar[dict[str, tuple[str, str]]]
    control_gap: ClassVar[float] = 0.1
    signal: ClassVar[str | None] = None
    varies: ClassVar[bool] = False
    sees_scenes_only: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def refusal(cls, facts: BackboneFacts, **options: Any) -> str | None:
        """Why a backbone cannot learn this task with these options of its yaml; None if it can. Needs no weights.

        Conditions are pictures of the image's size, which every adapter reads: no task here refuses a backbone.
        """
        return None

    @abstractmethod
    def make_condition(self, sample: Sample, generator: np.random.Generator) -> np.ndarray:
        """The condition map of a sample, (H, W, 3) uint8, of the image's size.

        generator: a fresh one per sample, keyed by (seed, sample id) and by nothing else, so that a picture is degraded
        in the same way at any position of any source, in any order, process and split: see `condition_of`.
        """

    @abstractmethod
    def score(self, output: np.ndarray, condition: np.ndarray, image: np.ndarray) -> dict[str, float]:
        """Every metric of `metrics` for one output, each finite. All three pictures have the same size.

        Control is judged by one detector on output and image alike, and restoration against the image itself; the
        condition serves tasks whose exact map is more than a detector finds.
        """

    @abstractmethod
    def settings(self) -> dict:
        """Everything that changes a condition map, by name and version: part of the cache's key."""

    def condition_of(self, sample: Sample, seed: int) -> np.ndarray:
        """`make_condition` with the generator of (seed, sample id): the call of every entry."""
        return self.make_condition(sample, np.random.default_rng(rng.key(seed, "condition", sample.id)))

    def for_finished_maps(self) -> "Task":
        """This task as it reads finished condition pictures, such as a run leaves in `examples/`, where a data set's maps
        hold numbers that still want a scale."""
        return self

    def given(self, sample: Sample) -> Any | None:
        """The sample's own map of `signal`, if it carries one."""
        return sample.signals.get(self.signal) if self.signal else None


def as_picture(given: Any, sample_id: str, signal: str) -> np.ndarray:
    """A map from the data, (h, w), (h, w, 1) or (h, w, 3), uint8 or bool -> (h, w, 3) uint8, true as 255.

    Raises UserError, naming the sample, for any other shape or type: values in another range would be guessed at.
    """
    found = np.asarray(given)
    if found.dtype == np.bool_:
        found = found.astype(np.uint8) * np.uint8(255)
    if found.ndim == 2:
        found = found[..., None]
    if found.dtype != np.uint8 or found.ndim != 3 or found.shape[2] not in (1, 3) or 0 in found.shape:
        raise UserError(
            f"{sample_id}: its {signal} map is {found.dtype} of shape {np.shape(given)}; "
            "give 8-bit gray or RGB of shape (height, width) or (height, width, 3)"
        )
    return np.ascontiguousarray(np.broadcast_to(found, (*found.shape[:2], 3)))
