"""Exponential moving average of the adapter's weights, and of nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from torch import Tensor

from src.callbacks.base import RunContext, StepCallback
from src.checkpoint import EMA_KEY


class AdapterEMA(StepCallback):
    """average <- average + (1 - decay) (weights - average) after each step; validation and sampling use the average.

    The decay rises as (1 + step) / (10 + step) at first, so that short runs are not held back by the start.
    Lightning's own averaging callback copies the frozen backbone too and cannot resume an adapter-only checkpoint.
    """

    def __init__(self, *, run: RunContext):
        super().__init__(run)
        self.average: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: pl.Trainer, adapter: pl.LightningModule) -> None:
        if self.run.ema_decay and self.average is None:
            self.average = {k: v.detach().clone() for k, v in adapter.named_parameters()}

    def on_step(self, trainer: pl.Trainer, adapter: pl.LightningModule, images_seen: int) -> None:
        if self.average is None:
            return
        step = trainer.global_step
        decay = min(self.run.ema_decay, (1 + step) / (10 + step))
        weights = dict(adapter.named_parameters())
        with torch.no_grad():
            for name, mean in self.average.items():
                mean.lerp_(weights[name], 1 - decay)

    @contextmanager
    def applied(self, adapter: pl.LightningModule) -> Iterator[None]:
        """Inside, the adapter holds the average; afterwards its own weights again, whatever happened."""
        if self.average is None:
            yield
            return
        own = {k: v.detach().clone() for k, v in adapter.named_parameters()}
        try:
            _put(adapter, self.average)
            yield
        finally:
            _put(adapter, own)

    def on_save_checkpoint(self, trainer: pl.Trainer, adapter: pl.LightningModule, checkpoint: dict) -> None:
        if self.average is not None:
            checkpoint[EMA_KEY] = self.average

    def on_load_checkpoint(self, trainer: pl.Trainer, adapter: pl.LightningModule, checkpoint: dict) -> None:
        if self.run.ema_decay and EMA_KEY in checkpoint:
            device = adapter.device
            self.average = {k: v.to(device).clone() for k, v in checkpoint[EMA_KEY].items()}


@torch.no_grad()
def _put(adapter: pl.LightningModule, values: dict[str, Tensor]) -> None:
    for name, parameter in adapter.named_parameters():
        parameter.copy_(values[name])
