"""The adapter interface: a LightningModule that trains a control method on a frozen backbone.

A subclass builds its modules and writes `encode_condition` and `predict`; everything else is here, once.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from src.backbones.base import Backbone
from src.objectives import Objective
from src.types import Batch, ConditionSpace, TextCond, UserError


@dataclass(frozen=True)
class OptimizerRecipe:
    """How the adapter's weights move. Everything is counted in images, so micro-batch and devices change nothing.

    algorithm: called with the parameters; warmup_images: linear rise; decay: "constant" or "cosine" (to zero at
    total_images); clip_norm: largest gradient norm (0: no clipping); effective_batch: images per optimizer step.
    """

    algorithm: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    warmup_images: int
    decay: str
    clip_norm: float
    effective_batch: int
    total_images: int

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0) as a fraction of the peak."""
        images = (step + 1) * self.effective_batch
        warm = min(1.0, images / self.warmup_images) if self.warmup_images else 1.0
        if self.decay == "constant":
            return warm
        rest = max(1, self.total_images - self.warmup_images)
        done = min(1.0, max(0.0, (images - self.warmup_images) / rest))
        return warm * 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi, dtype=torch.float64))))


class ControlAdapter(pl.LightningModule):
    """Base class of control methods.

    backbone: loaded and frozen; it is not a submodule, so that neither checkpoint nor optimizer can hold a tensor of it.
    objective: what the backbone predicts. optimizer: None for an adapter that is only sampled from.
    condition_space: in which space `encode_condition` wants the condition.

    Class attributes declare what the contract tests then hold the method to:
    families: backbone families it knows; grad_through_backbone: whether its backward pass enters the frozen network;
    identity_at_init: whether the untrained adapter gives exactly the backbone's prediction.
    """

    families: ClassVar[tuple[str, ...]]
    grad_through_backbone: ClassVar[bool]
    identity_at_init: ClassVar[bool]

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        optimizer: OptimizerRecipe | None,
        name: str,
        condition_space: ConditionSpace,
    ):
        super().__init__()
        if backbone.facts.family not in self.families:
            known, given = ", ".join(self.families), backbone.facts
            raise UserError(f"adapter={name} works on {known}; backbone {given.source} is of the family {given.family}")
        self._frozen = (backbone,)  # a tuple hides it from the module tree
        self.objective, self.recipe, self.name, self.condition_space = objective, optimizer, name, condition_space

    @property
    def backbone(self) -> Backbone:
        return self._frozen[0]

    @abstractmethod
    def encode_condition(self, condition: Tensor) -> Tensor:
        """Condition in `condition_space` -> features; what depends on the condition alone, computed once per image."""

    @abstractmethod
    def predict(
        self, backbone: Backbone, x_BCHW: Tensor, t_B: Tensor, text: TextCond, features: Tensor, scale: float = 1.0
    ) -> Tensor:
        """The controlled prediction, (B, C, H, W). scale 0 is the backbone alone, 1 the adapter as trained."""

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """The trainable modules by role (copies, connectors, stem, head); together they are all of the adapter."""

    def trainable_parts_m(self) -> dict[str, float]:
        """Millions of trainable parameters per part."""
        return {k: sum(p.numel() for p in m.parameters() if p.requires_grad) / 1e6 for k, m in self.parts().items()}

    def losses(self, batch: Batch) -> Tensor:
        """(B,) loss per image at the noise and t that the batch carries."""
        t_B = self.objective.sample_t(batch.uniform_B)
        x_t, target = self.objective.corrupt(batch.latents_BCHW, batch.noise_BCHW, t_B)
        prediction = self.predict(self.backbone, x_t, t_B, batch.text, self.encode_condition(batch.condition))
        return self.objective.loss(prediction, target, t_B)

    def training_step(self, batch: Batch, _batch_idx: int) -> Tensor:
        loss = self.losses(batch).mean()
        self.last_loss = loss.detach()
        return loss

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def autocast(self) -> AbstractContextManager:
        """The precision of training for whoever calls the adapter outside of it: that of the backbone's weights."""
        dtype = next(self.backbone.net.parameters()).dtype
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)

    def setup(self, stage: str) -> None:
        if self.backbone.net is not None:
            self.backbone.to(self.trainer.strategy.root_device)

    def configure_optimizers(self) -> dict:
        optimizer = self.recipe.algorithm([p for p in self.parameters() if p.requires_grad])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.recipe.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        limit = self.recipe.clip_norm or float("inf")
        self.last_grad_norm = float(nn.utils.clip_grad_norm_(self.parameters(), limit))
