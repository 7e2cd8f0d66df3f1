"""A blurred and 4x downsampled picture as the condition: UniCon's deblurring task."""

from typing import Any, ClassVar

from src.tasks.restoration import Restoration
from src.types import UserError


class Deblur(Restoration):
    """The picture is blurred, made small and scaled up again; a degradation that does not blur is refused."""

    signal: ClassVar = "blurred"

    def __init__(self, name: str, degradation: str | dict[str, Any], lpips_weights: str | None):
        super().__init__(name, degradation, lpips_weights)
        if self.degradation.blur_px[1] == 0:
            raise UserError(f"task.degradation={self.degradation.name} does not blur; task=super_resolution takes it")
