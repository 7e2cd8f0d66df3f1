"""Degradations by name and version: what a picture loses before a restoration task shows it.

One round of the model of Real-ESRGAN (2107.10833, section 3.1): blur, downsampling, noise, JPEG, each optional. A name
fixes every constant, so other constants want another name, and a change of what a shipped name does wants a new version.
Every parameter is drawn before the first pixel: the same (seed, sample) gets the same blur, noise level and quality at
any resolution. Arithmetic is 8-bit fixed point (Pillow's filters, libjpeg) or float64 that ends in rounding, so that
machines agree.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import cv2
import numpy as np
from PIL import Image

from src.types import UserError

FILTERS = {"area": Image.Resampling.BOX, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
KERNEL_SIGMAS = 3  # a blur kernel reaches so many standard deviations
MAX_BLUR_PX = 20.0


@dataclass(frozen=True)
class Degradation:
    """What happens to a picture, in this order. Pairs are (low, high) of a uniform draw; equal ends are a constant.

    blur_px: standard deviation of a Gaussian kernel along each of its two axes, in pixels of the image, 0 for none;
    isotropic_share: how often both axes are equal, else they are turned by a random angle;
    scale: the low-resolution picture has 1 / scale of the image's height and width, rounded up;
    filters: of the downsampling, one drawn at random; all of them are wide enough not to alias (area, bilinear, bicubic);
    noise: standard deviation of Gaussian noise on the low-resolution picture, in 8-bit values; gray_noise_share: how often
    the three channels get the same; jpeg_quality: libjpeg's 1..100 with 4:2:0 chroma, None for no JPEG.
    """

    name: str
    blur_px: tuple[float, float] = (0.0, 0.0)
    isotropic_share: float = 1.0
    scale: int = 4
    filters: tuple[str, ...] = ("bicubic",)
    noise: tuple[float, float] = (0.0, 0.0)
    gray_noise_share: float = 0.0
    jpeg_quality: tuple[int, int] | None = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise UserError(f"a degradation wants a name, got {self.name!r}")
        self._check_range("blur_px", 0, MAX_BLUR_PX)
        self._check_range("noise", 0, 255)
        if self.jpeg_quality is not None:
            self._check_range("jpeg_quality", 1, 100)
            if not all(isinstance(v, int) for v in self.jpeg_quality):
                raise self._fault("jpeg_quality", "whole numbers")
        for share in ("isotropic_share", "gray_noise_share"):
            value = getattr(self, share)
            if not _number(value) or not 0 <= value <= 1:
                raise self._fault(share, "a share from 0 to 1")
        if not isinstance(self.scale, int) or isinstance(self.scale, bool) or not 1 <= self.scale <= 16:
            raise self._fault("scale", "a whole number from 1 to 16")
        legal = isinstance(self.filters, tuple) and self.filters and all(f in FILTERS for f in self.filters)
        if not legal:
            raise self._fault("filters", f"some of {list(FILTERS)}")

    def _check_range(self, field: str, least: float, most: float) -> None:
        pair = getattr(self, field)
        numbers = isinstance(pair, tuple) and len(pair) == 2 and all(_number(v) for v in pair)
        if not numbers or not least <= pair[0] <= pair[1] <= most:
            raise self._fault(field, f"[low, high] with {least:g} <= low <= high <= {most:g}")

    def _fault(self, field: str, wanted: str) -> UserError:
        return UserError(f"degradation {self.name}: {field} wants {wanted}, got {getattr(self, field)!r}")

    @property
    def varies(self) -> bool:
        """Whether two draws differ."""
        quality = self.jpeg_quality or (0, 0)
        spread = self.blur_px[0] < self.blur_px[1] or quality[0] < quality[1] or len(set(self.filters)) > 1
        return spread or self.noise[1] > 0

    def settings(self) -> dict[str, Any]:
        """Name and every constant: part of the cache's key."""
        return asdict(self)

    def low_resolution(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """(H, W, 3) uint8 -> (ceil(H / scale), ceil(W / scale), 3) uint8."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"a degradation wants (H, W, 3) uint8, got {image.shape} {image.dtype}")
        first, second, level = (generator.uniform(*pair) for pair in (self.blur_px, self.blur_px, self.noise))
        round_kernel = generator.uniform() < self.isotropic_share
        angle = generator.uniform(0, np.pi)
        chosen = self.filters[int(generator.integers(len(self.filters)))]
        gray = generator.uniform() < self.gray_noise_share
        low, high = self.jpeg_quality or (0, 0)
        quality = int(generator.integers(low, high + 1))

        small = (-(-image.shape[0] // self.scale), -(-image.shape[1] // self.scale))
        made = resized(blurred(image, first, first if round_kernel else second, angle), small, chosen)
        if level > 0:
            drawn = generator.standard_normal((*made.shape[:2], 1 if gray else 3))
            made = _to_bytes(made + level * drawn)
        return jpeg(made, quality) if self.jpeg_quality else made

    def __call__(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """(H, W, 3) uint8 -> the degraded picture, scaled back to (H, W, 3) uint8 with the bicubic filter."""
        return resized(self.low_resolution(image, generator), image.shape[:2])


def blurred(image: np.ndarray, sigma_a: float, sigma_b: float, angle: float) -> np.ndarray:
    """Gaussian blur of (H, W, 3) uint8 with standard deviations along two axes, in pixels, the first `angle` (radians) from
    the horizontal; borders are mirrored."""
    widest = max(sigma_a, sigma_b)
    if widest == 0:
        return image
    reach = max(1, int(np.ceil(KERNEL_SIGMAS * widest)))
    padded = np.pad(image.astype(np.float64), ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    if sigma_a == sigma_b:
        line = _gauss(np.arange(-reach, reach + 1), widest)
        out = cv2.sepFilter2D(padded, -1, line / line.sum(), line / line.sum())
    else:
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        kernel = _gauss(along, sigma_a) * _gauss(across, sigma_b)
        out = cv2.filter2D(padded, -1, kernel / kernel.sum())
    return _to_bytes(out[reach:-reach, reach:-reach])


def _gauss(distance: np.ndarray, sigma: float) -> np.ndarray:
    return np.exp(-0.5 * (distance / max(sigma, 1e-3)) ** 2)


def resized(image: np.ndarray, size: tuple[int, int], filter_name: str = "bicubic") -> np.ndarray:
    """(h, w, 3) uint8 -> (*size, 3) uint8 with Pillow's filters, which widen when they shrink a picture.

    bicubic has a = -0.5, as MATLAB's `imresize`, in which the field's x4 test sets were made.
    """
    if image.shape[:2] == tuple(size):
        return image
    return np.array(Image.fromarray(image).resize((size[1], size[0]), FILTERS[filter_name]))


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """(H, W, 3) uint8 through a JPEG of this quality, chroma at half resolution."""
    held = io.BytesIO()
    Image.fromarray(image).save(held, "JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(held) as opened:
        return np.array(opened.convert("RGB"))


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(0, 255).astype(np.uint8)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


SHIPPED = {
    d.name: d
    for d in (
        Degradation("bicubic_x4_v1"),
        # UniCon's deblurring is a blur before 4x downsampling; its width is ours: at the finest detail that the small
        # picture could hold, a cycle in 8 pixels, 6 % of the amplitude are left
        Degradation("gaussian_blur_x4_v1", blur_px=(3.0, 3.0)),
        # ranges of Real-ESRGAN's first round, with BSRGAN's three filters (2103.14006, section 3)
        Degradation(
            "mixed_x4_v1",
            blur_px=(0.2, 3.0),
            isotropic_share=0.5,
            filters=("area", "bilinear", "bicubic"),
            noise=(1.0, 25.0),
            gray_noise_share=0.4,
            jpeg_quality=(30, 95),
        ),
    )
}


def degradation(given: str | Mapping[str, Any]) -> Degradation:
    """A shipped degradation by its name, or one of the reader's own: a mapping of the fields, with a name of its own.

    Raises UserError for an unknown name or field, a value out of range, and a shipped name with constants given.
    """
    if isinstance(given, str):
        if given not in SHIPPED:
            raise UserError(
                f"task.degradation={given!r} is none of {sorted(SHIPPED)}; other constants want a mapping with a name"
            )
        return SHIPPED[given]
    if not isinstance(given, Mapping):
        raise UserError(f"task.degradation={given!r} wants a name, one of {sorted(SHIPPED)}, or a mapping of constants")
    known = [f.name for f in fields(Degradation)]
    wrong = sorted(str(k) for k in given if k not in known)
    if wrong or "name" not in given:
        raise UserError(f"task.degradation: {f'unknown key {wrong[0]!r}' if wrong else 'no name'}; its keys are {known}")
    if given["name"] in list(SHIPPED):
        raise UserError(f"task.degradation: {given['name']!r} is shipped and keeps its constants; give yours another name")
    return Degradation(**{k: tuple(v) if isinstance(v, Sequence) and not isinstance(v, str) else v for k, v in given.items()})
