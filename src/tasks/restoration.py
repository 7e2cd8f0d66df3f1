"""What super-resolution and deblurring share: a degraded picture as the condition, and the image itself as the target."""

from typing import Any, ClassVar

import numpy as np

from src.tasks.base import Task, as_picture
from src.tasks.degradations import degradation as degradation_of
from src.tasks.degradations import resized
from src.tasks.picture_metrics import ALEXNET_FILE, LPIPS, psnr, ssim
from src.types import Sample, UserError


class Restoration(Task):
    """Shown: the degraded picture at the image's size. Judged: the output against the image, value by value.

    degradation: the name of a shipped one, or a mapping with a name of its own (see `Degradation`). A partner picture from
    the data (`signal`, of the image's size or smaller) takes its place; it is scaled to the image with the bicubic filter,
    as a degraded one is, so that a partner made by the same degradation gives the same condition, to the bit.
    psnr: dB over RGB; ssim: Wang et al. 2004 per RGB channel, averaged; lpips: only with `lpips_weights`, a file of
    torchvision's AlexNet (see `LPIPS`). They measure fidelity to one image: where much was lost, a sharp guess can look
    better and score lower than a blurred mean.
    """

    metrics: ClassVar = {"psnr": ("dB", "higher"), "ssim": ("fraction", "higher")}
    control_gap: ClassVar = 1.0  # dB: a fifth less squared error

    def __init__(self, name: str, degradation: str | dict[str, Any], lpips_weights: str | None):
        self.name, self.degradation = name, degradation_of(degradation)
        self.varies = self.degradation.varies
        self.lpips = LPIPS(lpips_weights) if lpips_weights is not None else None
        if self.lpips is None:
            self.notes = (f"{name}: no lpips; task.lpips_weights=<file> with torchvision's {ALEXNET_FILE} adds it",)
        else:
            self.metrics = {**type(self).metrics, "lpips": ("distance", "lower")}
            self.notes = (f"{name}: lpips with {self.lpips.described}",)

    def make_condition(self, sample: Sample, generator: np.random.Generator) -> np.ndarray:
        given = self.given(sample)
        if given is None:
            return self.degradation(sample.image, generator)
        (height, width), partner = sample.image.shape[:2], as_picture(given, sample.id, self.signal)
        # a partner made by rounding up or down has a side that is off by less than one of its pixels
        if abs(partner.shape[0] / height - partner.shape[1] / width) >= 1 / min(height, width) or partner.shape[0] > height:
            raise UserError(
                f"{sample.id}: its {self.signal} picture is {partner.shape[1]} x {partner.shape[0]} pixels, the image "
                f"{width} x {height}; give one of the same shape, not larger"
            )
        return resized(partner, (height, width))

    def score(self, output: np.ndarray, condition: np.ndarray, image: np.ndarray) -> dict[str, float]:
        scores = {"psnr": psnr(output, image), "ssim": ssim(output, image)}
        return scores if self.lpips is None else {**scores, "lpips": self.lpips(output, image)}

    def settings(self) -> dict:
        return {"task": "restoration", "signal": self.signal, "degradation": self.degradation.settings(), "version": 1}
