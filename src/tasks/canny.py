"""Canny edges as the condition."""

from typing import ClassVar

import cv2
import numpy as np

from src.tasks.base import Task, as_picture
from src.tasks.edges import colour_canny
from src.tasks.picture_metrics import ssim
from src.types import Sample, UserError

TOLERANCE_PX = 1


class Canny(Task):
    """White edges on black, one pixel wide, from the colour gradient.

    low, high: hysteresis thresholds on the Sobel gradient of 8-bit values; sigma: blur before it, in pixels.
    Edge maps from the data (signal "canny") are shown as they are. Scores always compare the edges that these thresholds
    find in the output with those that they find in the image: a stored map may be another detector's.
    canny_f1: harmonic mean of edge precision and recall with a tolerance of 1 pixel (8 neighbours);
    canny_ssim: structural similarity of the two edge maps (11-pixel Gaussian window, Wang et al. 2004), as in UniCon's tables.
    """

    metrics: ClassVar = {"canny_f1": ("fraction", "higher"), "canny_ssim": ("fraction", "higher")}
    signal: ClassVar = "canny"

    def __init__(self, name: str, low: float, high: float, sigma: float):
        if not 0 < low < high:
            raise UserError(f"task canny wants 0 < low < high, got low={low}, high={high}")
        self.name, self.low, self.high, self.sigma = name, low, high, sigma

    def edges(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (H, W) uint8 in {0, 255}."""
        return colour_canny(image, self.low, self.high, self.sigma)

    def make_condition(self, sample: Sample, generator: np.random.Generator) -> np.ndarray:
        given = self.given(sample)
        if given is None:
            return np.repeat(self.edges(sample.image)[..., None], 3, 2)
        shown = as_picture(given, sample.id, self.signal)
        if shown.shape != sample.image.shape:
            raise UserError(
                f"{sample.id}: its canny map is {shown.shape[1]} x {shown.shape[0]} pixels, the image "
                f"{sample.image.shape[1]} x {sample.image.shape[0]}; bring both to one size"
            )
        return shown

    def score(self, output: np.ndarray, condition: np.ndarray, image: np.ndarray) -> dict[str, float]:
        found, wanted = self.edges(output), self.edges(image)
        return {"canny_f1": edge_f1(found > 127, wanted > 127), "canny_ssim": ssim(found, wanted)}

    def settings(self) -> dict:
        return {"task": "canny", "low": self.low, "high": self.high, "sigma": self.sigma, "version": 1}


def edge_f1(found: np.ndarray, wanted: np.ndarray) -> float:
    """F1 of two (H, W) edge masks with a tolerance of `TOLERANCE_PX`; two empty masks agree (1), one empty does not (0)."""
    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())
    reach = np.ones((2 * TOLERANCE_PX + 1,) * 2, np.uint8)
    near_wanted = cv2.dilate(wanted.astype(np.uint8), reach) > 0
    near_found = cv2.dilate(found.astype(np.uint8), reach) > 0
    precision, recall = (found & near_wanted).sum() / found.sum(), (wanted & near_found).sum() / wanted.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall > 0 else 0.0
