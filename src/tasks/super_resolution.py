"""A low-resolution picture as the condition, 4x smaller unless its degradation says otherwise."""

from typing import ClassVar

from src.tasks.restoration import Restoration


class SuperResolution(Restoration):
    """The picture is made small, with or without what a real camera and file would add, and scaled up again.

    bicubic_x4_v1 is the field's classical setting; mixed_x4_v1 adds random blur, noise and JPEG, which make the task blind.
    """

    signal: ClassVar = "low_resolution"
