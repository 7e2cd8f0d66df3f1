"""Depth of any kind to a number between 0, far, and 1, near: what depth maps show and depth scores compare.

Legend: H, W a picture's sides. Scenes have a fixed scale; photos and depth models, whose unit is unknown, a relative one.
"""

from typing import Literal

import numpy as np

from src.types import Sample, UserError

DEPTH_NEAR, DEPTH_FAR = 2.5, 7.5  # scene units mapped to white and black
PERCENTILES = (2, 98)  # of inverse depth, mapped to black and white: a few wild pixels do not decide a picture's scale

ROUNDING = 1e-4  # of white: by how much a filter's sum may leave the range


def scene_nearness(depth: np.ndarray) -> np.ndarray:
    """Depth of a scene in its units -> float32 in [0, 1]: 1 at 2.5 units and nearer, 0 at 7.5 and farther, linear between."""
    return (1 - np.clip((depth - DEPTH_NEAR) / (DEPTH_FAR - DEPTH_NEAR), 0, 1)).astype(np.float32)


def depth_picture(depth: np.ndarray) -> np.ndarray:
    """(H, W) depth in scene units -> (H, W) uint8, near is white."""
    return np.round(255 * scene_nearness(depth)).astype(np.uint8)


def relative_nearness(depth: np.ndarray, meaning: Literal["distance", "nearness"]) -> np.ndarray:
    """(H, W) depth of any unit and number type -> float32 in [0, 1] between the 2nd and 98th percentile of inverse depth.

    meaning: distance is inverted first; nearness (disparity, what MiDaS and its like predict) is taken as it is. Every step
    is in float64, so 16-bit values keep their full range. What is not finite, and a distance that is not positive, was not
    measured: it counts as farthest and has no say in the percentiles. A picture without any difference is all far.
    """
    values = np.asarray(depth).astype(np.float64)
    known = np.isfinite(values)
    if meaning == "distance":
        known &= np.nan_to_num(values) > 0
        values = 1 / np.where(known, values, 1)
    if not known.any():
        return np.zeros(values.shape, np.float32)
    low, high = np.percentile(values[known], PERCENTILES)
    if high <= low:
        return np.zeros(values.shape, np.float32)
    return np.where(known, np.clip((np.where(known, values, low) - low) / (high - low), 0, 1), 0).astype(np.float32)


def map_nearness(values: np.ndarray, name: str) -> np.ndarray:
    """(H, W) of a finished map -> float32 in [0, 1]. White is 255 for uint8 and 65535 for uint16; for all other types 1 where
    no value is beyond it, else 255. NaN is black. Raises UserError, with `name`, for what is in none of these ranges."""
    found = np.nan_to_num(values.astype(np.float64))
    low, high = float(found.min()), float(found.max())
    bits = values.dtype.itemsize * 8 if values.dtype.kind == "u" else 0
    white = (1 << bits) - 1 if bits in (8, 16) else 1 if high <= 1 + ROUNDING else 255
    if low < -ROUNDING * white or high > white * (1 + ROUNDING):
        fault = (
            f"has {values.dtype} values of {low:g}..{high:g}, neither 8 or 16 bits without a sign nor floats of 0..1 or 0..255"
        )
        fix = "scale them to one of these, or write task.signal_is=distance or nearness if that is what they are"
        raise UserError(f"{name}: its depth, read as a finished map, {fault}; {fix}")
    return (np.clip(found, 0, white) / white).astype(np.float32)


def gray(values: np.ndarray, sample: Sample) -> np.ndarray:
    """A depth of the data set, (H, W), (H, W, 1) or three equal channels -> (H, W), of the type that it has.

    Raises UserError for a depth of another size than the sample's picture, and for a colour-mapped one.
    """
    size = sample.image.shape[:2]
    if values.shape not in (size, (*size, 1), (*size, 3)):
        raise UserError(f"{sample.id}: its depth is {values.shape}, its picture {size}: give both the same size")
    if values.ndim == 3 and not (values == values[..., :1]).all():
        raise UserError(f"{sample.id}: its depth has {values.shape[2]} different channels: give it in gray")
    return values if values.ndim == 2 else values[..., 0]
