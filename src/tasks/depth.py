"""Depth as the condition."""

import copy
from typing import ClassVar, Literal

import numpy as np

from src.tasks.base import Task
from src.tasks.detectors import PROBE, Meaning, depth_detector
from src.tasks.nearness import gray, map_nearness, relative_nearness, scene_nearness
from src.types import Sample, UserError


class Depth(Task):
    """Nearness as a gray picture: near is white, in three equal channels.

    detector: `scene_probe`, or a depth model of transformers by hub id or folder; predicts: what the model's numbers mean,
    auto to go by its type. signal_is: what the numbers of a data set mean: distance from the camera in any unit; nearness
    in any unit (inverse depth, disparity); or map, a finished picture, near is white, scaled as `map_nearness` says.

    The condition is the sample's own depth where it has one, else the detector's. With the scene probe depth is in scene
    units on a fixed scale: 2.5 units and nearer white, 7.5 and farther black. With a model it is relative: inverse depth
    between its 2nd and 98th percentile in this picture. A distance that is not positive was not measured, and is black.

    depth_rmse, depth_mse: root mean square and mean square difference, over the pixels of one picture, of the detector on
    the output and the same detector on the image, both on the 0 to 1 scale of the map: times 255, or its square, for
    papers that count in 8-bit values. A set's number is the mean over its pictures.
    """

    metrics: ClassVar = {"depth_rmse": ("fraction", "lower"), "depth_mse": ("fraction^2", "lower")}
    control_gap: ClassVar = 0.05
    signal: ClassVar = "depth"

    def __init__(self, name: str, detector: str, predicts: Meaning, signal_is: Literal["distance", "nearness", "map"]):
        self.name, self.signal_is = name, signal_is
        self.detector = depth_detector(detector, predicts)
        self.sees_scenes_only = detector == PROBE
        self.notes = (f"{name}: seen by the {self.detector.described}",)

    def make_condition(self, sample: Sample, generator: np.random.Generator) -> np.ndarray:
        given = self.given(sample)
        nearness = (
            self.detector.nearness(sample.image) if given is None else self.measured(gray(np.asarray(given), sample), sample.id)
        )
        return np.repeat(np.round(255 * nearness).astype(np.uint8)[..., None], 3, 2)

    def for_finished_maps(self) -> "Depth":
        made = copy.copy(self)
        made.signal_is = "map"
        return made

    def measured(self, depth: np.ndarray, name: str) -> np.ndarray:
        """A data set's (H, W) depth of any number type -> (H, W) float32 in [0, 1], near is 1. name: how messages call it."""
        if self.signal_is == "map":
            return map_nearness(depth, name)
        if not self.detector.absolute:
            return relative_nearness(depth, self.signal_is)
        if self.signal_is == "distance" and depth.dtype.kind == "f":
            return np.where(depth > 0, scene_nearness(depth), np.float32(0))
        fault = f"task.detector=scene_probe reads depth as distances in scene units, and this is {depth.dtype}"
        fix = "name a depth model in task.detector, or write task.signal_is=map for finished maps"
        raise UserError(f"{name}: {fault} with task.signal_is={self.signal_is}; {fix}")

    def score(self, output: np.ndarray, condition: np.ndarray, image: np.ndarray) -> dict[str, float]:
        if output.shape != image.shape:
            raise ValueError(f"depth compares pictures of one size, got {output.shape} and {image.shape}")
        off = self.detector.nearness(output) - self.detector.nearness(image)
        mse = float(np.square(off, dtype=np.float64).mean())
        return {"depth_rmse": mse**0.5, "depth_mse": mse}

    def settings(self) -> dict:
        return {"task": "depth", **self.detector.settings(), "signal_is": self.signal_is, "version": 1}
