"""Human pose as the condition."""

from typing import ClassVar

import numpy as np

from src.tasks.base import Task
from src.tasks.detectors import PROBE, pose_detector
from src.tasks.skeleton import LAYOUTS, layout_of, skeleton_map
from src.types import Sample, UserError

OKS_THRESHOLDS = np.arange(10) * 0.05 + 0.5  # 0.50:0.05:0.95
BOX_TO_BODY = 0.53  # share of a box that a person covers: how COCO's tools estimate an area where there is no mask
PCK_ALPHA = 0.1  # of the longer side of the box around a person's joints
FEWEST_JOINTS = 4  # fewer joints than that are no person
NOBODY = np.zeros((0, 0, 3), np.float32)


class Pose(Task):
    """A skeleton in OpenPose's hues on black.

    detector: `scene_probe`, or a keypoint model of transformers by hub id or folder. layout: order of the joints that the
    data set gives: scene14, coco17 or openpose18. min_confidence: a joint of the detector below it was not found.

    The condition is drawn from the sample's joints, of all its people, where it has them, else from the detector's.

    Scores look for one person per picture, with the same detector on output and image; a joint that was found in the image
    alone is a miss, one that was found in the output alone does not count. Where the detector finds no person in the
    image, both scores are 1 if it finds none in the output, else 0.
    pose_oks_map: mean over the thresholds 0.50, 0.55, ... 0.95 of whether the object keypoint similarity (`oks`) reaches
    them, in one picture. Its mean over a set is COCO's average recall with one detection, and its average precision where
    detections are not ranked by confidence, since each picture has one person and one detection.
    pose_pck: share of the image's joints that are found within 0.1 of the longer side of the box around them (Yang and
    Ramanan, Articulated Human Detection with Flexible Mixtures of Parts, 2013).
    """

    metrics: ClassVar = {"pose_oks_map": ("fraction", "higher"), "pose_pck": ("fraction", "higher")}
    signal: ClassVar = "joints"

    def __init__(self, name: str, detector: str, layout: str, min_confidence: float):
        if not 0 < min_confidence < 1:
            raise UserError(f"task.min_confidence={min_confidence} should lie between 0 and 1")
        self.name, self.layout, self.min_confidence = name, layout_of(layout).name, min_confidence
        self.detector = pose_detector(detector)
        self.sees_scenes_only = detector == PROBE
        self.notes = (f"{name}: seen by the {self.detector.described}",)

    def make_condition(self, sample: Sample, generator: np.random.Generator) -> np.ndarray:
        size, given = sample.image.shape[:2], self.given(sample)
        if given is None:
            found, layout = self.found(sample.image), self.detector.layout
            return skeleton_map(found[None] if found is not None else NOBODY, layout, size)
        try:
            return skeleton_map(np.asarray(given, np.float32), self.layout, size)
        except UserError as error:
            raise UserError(f"{sample.id}: {error}") from error

    def found(self, image: np.ndarray) -> np.ndarray | None:
        """(H, W, 3) uint8 -> (J, 3) joints, the third number 0 where one was not found; None if there is nobody."""
        joints = self.detector.joints(image)
        joints[:, 2] *= joints[:, 2] >= self.min_confidence
        return joints if (joints[:, 2] > 0).sum() >= FEWEST_JOINTS else None

    def score(self, output: np.ndarray, condition: np.ndarray, image: np.ndarray) -> dict[str, float]:
        if output.shape != image.shape:
            raise ValueError(f"pose compares pictures of one size, got {output.shape} and {image.shape}")
        found, wanted = self.found(output), self.found(image)
        if found is None or wanted is None:
            return dict.fromkeys(self.metrics, float(found is wanted))
        similarity = oks(found, wanted, LAYOUTS[self.detector.layout].sigmas)
        return {"pose_oks_map": float((similarity >= OKS_THRESHOLDS).mean()), "pose_pck": pck(found, wanted, PCK_ALPHA)}

    def settings(self) -> dict:
        own = {"layout": self.layout, "min_confidence": self.min_confidence, "version": 1}
        return {"task": "pose", **self.detector.settings(), **own}


def oks(found: np.ndarray, wanted: np.ndarray, sigmas: np.ndarray) -> float:
    """Object keypoint similarity of COCO's keypoint evaluation: the mean over the wanted joints of exp(-d^2 / (2 s^2 k^2)).

    found, wanted: (J, 3), the third number positive where a joint is there; d: distance in pixels; k: twice the joint's
    sigma (J,); s^2: the person's area, 0.53 of the box around the wanted joints, for want of a mask. A joint that was not
    found adds 0. Raises ValueError if no joint is wanted.
    """
    there = wanted[:, 2] > 0
    if not there.any():
        raise ValueError("oks wants at least one joint")
    box = np.ptp(wanted[there, :2].astype(np.float64), axis=0)
    area = max(1.0, BOX_TO_BODY * float(box.prod()))
    far = np.square(found[there, :2].astype(np.float64) - wanted[there, :2]).sum(1)
    near = np.exp(-far / (2 * area * np.square(2 * sigmas[there])))
    return float((near * (found[there, 2] > 0)).mean())


def pck(found: np.ndarray, wanted: np.ndarray, alpha: float) -> float:
    """Share of the wanted joints (J, 3) found within alpha times the longer side of the box around them."""
    there = wanted[:, 2] > 0
    reach = alpha * max(1.0, float(np.ptp(wanted[there, :2], axis=0).max()))
    far = np.hypot(*(found[there, :2] - wanted[there, :2]).T)
    return float(((far <= reach) & (found[there, 2] > 0)).mean())
