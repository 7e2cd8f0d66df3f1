"""The frozen backbone alone, in the place of an adapter: what no method can cost less than."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from src.backbones.base import Backbone
from src.types import Batch, TextCond


class Floor(nn.Module):
    """A backbone with an adapter's face and nothing of its own: forward only, without a graph, up to the loss."""

    name = "none"
    condition_space: ClassVar = "latent"
    grad_through_backbone: ClassVar = False
    unreached: ClassVar = ()

    def __init__(self, backbone: Backbone):
        super().__init__()
        self._frozen = (backbone,)  # a tuple hides it from the module tree

    @property
    def backbone(self) -> Backbone:
        return self._frozen[0]

    def parts(self) -> dict[str, nn.Module]:
        return {}

    def trainable_parts_m(self) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        """(B,) loss per image of the backbone's own prediction."""
        objective = self.backbone.objective
        t_B = objective.sample_t(batch.uniform_B)
        x_t, target = objective.corrupt(batch.latents_BCHW, batch.noise_BCHW, t_B)
        return objective.loss(self.backbone.predict(x_t, t_B, batch.text), target, t_B)

    def encode_condition(self, condition: Tensor) -> None:
        """There is nothing that could read it."""
        return None

    features_of = encode_condition

    def predict(self, backbone: Backbone, x_BCHW: Tensor, t_B: Tensor, text: TextCond, features: None) -> Tensor:
        """The backbone's prediction, (B, C, H, W)."""
        return backbone.predict(x_BCHW, t_B, text)

    def predictor(self, scale: float = 1.0) -> Callable[..., Tensor]:
        """predict(x, t, text, features) in the precision of the backbone's weights."""

        def predict(x_BCHW: Tensor, t_B: Tensor, text: TextCond, features: None) -> Tensor:
            with self._autocast():
                return self.backbone.predict(x_BCHW, t_B, text)

        return predict

    def _autocast(self) -> AbstractContextManager:
        weight = next(self.backbone.net.parameters())
        return nullcontext() if weight.dtype == torch.float32 else torch.autocast(weight.device.type, weight.dtype)
