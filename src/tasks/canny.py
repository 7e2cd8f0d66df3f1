"""Canny edges as the condition."""

from typing import ClassVar

import cv2
import numpy as np

from src.tasks.base import Task
from src.tasks.edges import colour_canny
from src.types import Sample, UserError

TOLERANCE_PX = 1


class Canny(Task):
    """White edges on black, one pixel wide, from the colour gradient.

    low, high: hysteresis thresholds on the Sobel gradient of 8-bit values; sigma: blur before it, in pixels.
    canny_f1: harmonic mean of edge precision and recall with a tolerance of 1 pixel (8 neighbours);
    canny_ssim: structural similarity of the two edge maps (11-pixel Gaussian window, Wang et al. 2004), as in UniCon's tables.
    """

    metrics: ClassVar = {"canny_f1": ("fraction", "higher"), "canny_ssim": ("fraction", "higher")}

    def __init__(self, name: str, low: float, high: float, sigma: float):
        if not 0 < low < high:
            raise UserError(f"task canny wants 0 < low < high, got low={low}, high={high}")
        self.name, self.low, self.high, self.sigma = name, low, high, sigma

    def edges(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (H, W) uint8 in {0, 255}."""
        return colour_canny(image, self.low, self.high, self.sigma)

    def make_condition(self, sample: Sample, generator: np.random.Generator) -> np.ndarray:
        return np.repeat(self.edges(sample.image)[..., None], 3, 2)

    def score(self, output: np.ndarray, condition: np.ndarray, image: np.ndarray) -> dict[str, float]:
        found, wanted = self.edges(output), condition[..., 0]
        return {"canny_f1": edge_f1(found > 127, wanted > 127), "canny_ssim": _ssim(found, wanted)}

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


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity of two (H, W) uint8 maps, data range 255."""
    a, b = a.astype(np.float64), b.astype(np.float64)

    def blur(x: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(x, (11, 11), 1.5)[5:-5, 5:-5]  # only windows that lie inside the picture

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ssim = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(ssim.mean())
