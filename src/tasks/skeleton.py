"""Skeleton maps: joints drawn as coloured bones, in the hue order of OpenPose (CMU's rendering, 1812.08008)."""

import colorsys

import cv2
import numpy as np


def draw_skeletons(joints: np.ndarray, bones: tuple[tuple[int, int], ...], size: int) -> np.ndarray:
    """(P, J, >=2) joint columns and rows in pixels -> (size, size, 3) uint8: black with one hue per bone."""
    canvas = np.zeros((size, size, 3), np.uint8)
    width = max(1, round(size / 64))
    for person in joints:
        for k, (a, b) in enumerate(bones):
            rgb = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(k / len(bones), 1, 1))
            ends = [tuple(round(float(v) * 16) for v in person[j][:2]) for j in (a, b)]
            cv2.line(canvas, *ends, rgb, width, cv2.LINE_AA, shift=4)
    return canvas
