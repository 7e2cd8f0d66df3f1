"""Where a picture's pixels go: scaling, cropping, mirroring and aspect buckets, one geometry for image and signals.

A `Frame` is worked out once per image and applied to everything that belongs to it. Every map is first scaled to the
image's scaled size, whatever its own, and then cut by the same box, so no map is ever cropped on its own. A partner picture
that is smaller than its image stays so, for its task to scale it up: it is cut in proportion, and shrinks as the image does.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from src import rng
from src.data.signals import FILTERS, MIRRORED, SIGNALS
from src.types import UserError

Crop = Literal["center", "random"]
Small = Literal["upscale", "drop", "refuse"]
Aspect = Literal["crop", "refuse"]
Size = tuple[int, int]  # height, width in pixels
BUCKET_MULTIPLE = 8
LEAST_MEASURED = 0.5 - 1e-4  # of a pixel of a depth map; the rest is rounding
SAME_ASPECT = 0.01  # relative difference of two aspect ratios that counts as rounding


@dataclass(frozen=True)
class Frame:
    """Scale a picture of `original` size to `scaled`, cut (height, width) from (top, left), then mirror it if `flip`."""

    original: Size
    scaled: Size
    top: int
    left: int
    height: int
    width: int
    flip: bool

    def apply(self, values: np.ndarray, kind: str = "picture") -> np.ndarray:
        """(h, w) or (h, w, C) of any size with the image's aspect ratio -> (height, width[, C]); kind: see `FILTERS`."""
        if values.shape[:2] != self.scaled:
            values = scaled(values, self.scaled, kind)
        cut = values[self.top : self.top + self.height, self.left : self.left + self.width]
        return np.ascontiguousarray(cut[:, ::-1] if self.flip else cut)

    def apply_small(self, values: np.ndarray) -> np.ndarray:
        """(h, w, 3) uint8, a smaller picture of the same -> what it shows of the frame, at its own scale.

        Pixels are taken over as they are where the frame's edges are edges of theirs, else interpolated (Pillow's bicubic
        filter, exact to fractions of a pixel). Where the image shrinks, this one shrinks as much (Pillow's area filter).
        """
        shrinks = min(1.0, self.scaled[0] / self.original[0])
        per_px = [have / whole for have, whole in zip(values.shape[:2], self.scaled, strict=True)]  # its pixels per frame pixel
        corner, size = (self.top, self.left), (self.height, self.width)
        ends = [(at * k, (at + side) * k) for at, side, k in zip(corner, size, per_px, strict=True)]
        sides = [max(1, round((last - first) * shrinks)) for first, last in ends]
        (top, bottom), (left, right) = ends
        if shrinks == 1 and all(edge == int(edge) for edge in (top, bottom, left, right)):
            cut = values[int(top) : int(bottom), int(left) : int(right)]
        else:
            chosen = Image.Resampling.BOX if shrinks < 1 else Image.Resampling.BICUBIC
            cut = np.asarray(Image.fromarray(values).resize((sides[1], sides[0]), chosen, box=(left, top, right, bottom)))
        return np.ascontiguousarray(cut[:, ::-1] if self.flip else cut)

    def apply_joints(self, joints: np.ndarray) -> np.ndarray:
        """(people, joints, 3) in pixels of the original -> the same in pixels of the frame. Right and left change places in
        a mirror; joints that leave the frame keep their coordinates outside of it."""
        moved = joints.copy()
        moved[..., 0] = joints[..., 0] * (self.scaled[1] / self.original[1]) - self.left
        moved[..., 1] = joints[..., 1] * (self.scaled[0] / self.original[0]) - self.top
        if self.flip and joints.size:
            moved[..., 0] = self.width - moved[..., 0]
            order = np.arange(joints.shape[1])
            for a, b in MIRRORED[joints.shape[1]]:
                order[[a, b]] = b, a
            moved = moved[:, order]
        return moved

    def signal(self, name: str, values: np.ndarray) -> np.ndarray:
        """A signal by its name."""
        kind = SIGNALS[name]
        if kind == "picture" and values.shape[0] < self.original[0] and values.shape[1] < self.original[1]:
            return self.apply_small(values)
        return self.apply_joints(values) if kind == "joints" else self.apply(values, kind)


@dataclass(frozen=True)
class Framing:
    """The rules of one source. Raises UserError for values that no picture could follow.

    resolution: pixels per side, where there are no buckets; crop: which part of the scaled picture is kept, the middle, or
    one drawn from (crop_seed, id), the same in every epoch, since latents are cached; buckets: sizes (height, width), of
    which each picture takes the one with the nearest aspect ratio.
    """

    resolution: int
    crop: Crop
    crop_seed: int
    buckets: tuple[Size, ...] | None

    def __post_init__(self) -> None:
        if self.buckets is not None and not self.buckets:
            raise UserError("data.buckets=[] is empty; write null, or sizes such as [[512, 512], [640, 384]]")
        for bucket in self.buckets or ():
            if len(bucket) != 2 or any(not isinstance(s, int) or s <= 0 or s % BUCKET_MULTIPLE for s in bucket):
                fault = f"is not [height, width] in multiples of {BUCKET_MULTIPLE}"
                raise UserError(f"data.buckets: {list(bucket)} {fault}; write for example [512, 768]")
        if len(set(self.buckets or ())) < len(self.buckets or ()):
            raise UserError(f"data.buckets={[list(b) for b in self.buckets or ()]} names a size twice")

    def target(self, original: Size) -> Size:
        """The size that a picture of the original size gets: its bucket (the first of equals), or the square."""
        if not self.buckets:
            return self.resolution, self.resolution
        ratio = np.log(original[0] / original[1])
        return min(self.buckets, key=lambda b: abs(np.log(b[0] / b[1]) - ratio))

    def is_small(self, original: Size) -> bool:
        """Whether a picture must grow to fill its frame."""
        return any(have < want for have, want in zip(original, self.target(original), strict=True))

    def cuts(self, original: Size) -> bool:
        """Whether a picture has another aspect ratio than its frame, beyond rounding, and loses an edge."""
        return not same_aspect(original, self.target(original))

    def frame(self, original: Size, id: str, flip: bool = False) -> Frame:
        """The geometry of one picture: scaled until it just covers its frame, then cropped. id: of the picture itself, so
        that a mirrored twin shows the same part."""
        height, width = self.target(original)
        scale = max(height / original[0], width / original[1])
        scaled = max(height, round(original[0] * scale)), max(width, round(original[1] * scale))
        spare = scaled[0] - height, scaled[1] - width
        if self.crop == "center":
            top, left = spare[0] // 2, spare[1] // 2
        else:
            draw = np.random.default_rng(rng.key(self.crop_seed, "crop", id))
            top, left = (int(draw.integers(0, s, endpoint=True)) for s in spare)
        return Frame(original, scaled, top, left, height, width, flip)

    def settings(self) -> dict:
        """What changes a frame: part of a source's fingerprint."""
        drawn = {"crop_seed": self.crop_seed} if self.crop == "random" else {}
        return {"resolution": self.resolution, "crop": self.crop, "buckets": self.buckets, **drawn}


def scaled(values: np.ndarray, size: Size, kind: str) -> np.ndarray:
    """(h, w[, C]) -> `size`, of the same number type, by the rule of its kind."""
    shrink, grow = FILTERS[kind]
    chosen = shrink if size[0] * size[1] < values.shape[0] * values.shape[1] else grow
    if chosen is None:
        return brightest(values, size)
    return measured(values, size, chosen) if kind == "depth" else _resize(values, size, chosen)


def measured(values: np.ndarray, size: Size, chosen: int) -> np.ndarray:
    """A depth map -> `size` by a filter of OpenCV. Of each pixel only what was measured counts, which is what is not 0; where
    that is less than `LEAST_MEASURED` of it, it is 0 as well: a hole has neither a rim nor a say."""
    known = values != 0
    made = _resize(values.astype(np.float32), size, chosen)
    if not known.all():
        share = _resize(known.astype(np.float32), size, chosen)
        made = np.where(share >= LEAST_MEASURED, made / np.maximum(share, LEAST_MEASURED), np.float32(0))
    return made if values.dtype.kind == "f" else np.rint(made).astype(values.dtype)


def brightest(values: np.ndarray, size: Size) -> np.ndarray:
    """(h, w[, C]) -> `size`: the largest value of each block. Every pixel is in one block, so a line of one pixel stays whole
    and gets no wider than a pixel. A side that grows by a pixel of rounding repeats some."""
    for axis, (have, want) in enumerate(zip(values.shape[:2], size, strict=True)):
        values = np.maximum.reduceat(values, np.arange(want) * have // want, axis=axis)
    return values


def _resize(values: np.ndarray, size: Size, chosen: int) -> np.ndarray:
    return cv2.resize(values, (size[1], size[0]), interpolation=chosen)


def same_aspect(a: Size, b: Size) -> bool:
    """Whether two sizes differ in aspect ratio by no more than rounding: 1 %, or one pixel of the smallest side."""
    tolerance = max(SAME_ASPECT, 1 / min(*a, *b))
    return abs(np.log((a[0] * b[1]) / (a[1] * b[0]))) <= tolerance
