"""Exponential moving average of the adapter's weights, and of nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from torch import Tensor

from src.callbacks.base import RunContext, StepCallback
from src.checkpoint import EMA_KEY
from src.ranks.strategies import placed_as


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
            self.average = {k: v.detach().clone() for k, v in _trained(adapter).items()}

    def on_step(self, trainer: pl.Trainer, adapter: pl.LightningModule, images_seen: int) -> None:
        if self.average is None:
            return
        step = trainer.global_step
        decay = min(self.run.ema_decay, (1 + step) / (10 + step))
        weights = _trained(adapter)
        with torch.no_grad():
            for name, mean in self.average.items():
                mean.lerp_(weights[name], 1 - decay)

    @contextmanager
    def applied(self, adapter: pl.LightningModule) -> Iterator[None]:
        """Inside, the adapter holds the average; afterwards its own weights again, whatever happened."""
        if self.average is None:
            yield
            return
        own = {k: v.detach().clone() for k, v in _trained(adapter).items()}
        try:
            _put(adapter, self.average)
            yield
        finally:
            _put(adapter, own)

    def on_save_checkpoint(self, trainer: pl.Trainer, adapter: pl.LightningModule, checkpoint: dict) -> None:
        if self.average is not None:
            checkpoint[EMA_KEY] = {**adapter.state_dict(), **self.average}  # whole, so that it can be read alone

    def on_load_checkpoint(self, trainer: pl.Trainer, adapter: pl.LightningModule, checkpoint: dict) -> None:
        if self.run.ema_decay and EMA_KEY in checkpoint:
            self.average = {k: placed_as(p.detach(), checkpoint[EMA_KEY][k]).clone() for k, p in _trained(adapter).items()}


@torch.no_grad()
def _put(adapter: pl.LightningModule, values: dict[str, Tensor]) -> None:
    for name, parameter in _trained(adapter).items():
        parameter.copy_(values[name])


def _trained(adapter: pl.LightningModule) -> dict[str, Tensor]:
    return {k: p for k, p in adapter.named_parameters() if p.requires_grad}
