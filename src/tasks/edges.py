"""Canny edges on the colour gradient: the one edge detector of conditions, scores and training data."""

import cv2
import numpy as np


def colour_canny(image: np.ndarray, low: float, high: float, sigma: float) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) uint8 in {0, 255}.

    OpenCV's Canny takes, pixel by pixel, the colour channel with the largest gradient, so an edge between two colours
    of equal luminance is found; on gray it would be lost. low, high: hysteresis thresholds on the L2 norm of the 3x3
    Sobel gradient of 8-bit values; sigma: Gaussian blur before it, in pixels (0: none).
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"colour_canny wants (H, W, 3) uint8, got {image.shape} {image.dtype}")
    if sigma > 0:
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    return cv2.Canny(image, low, high, L2gradient=True)
