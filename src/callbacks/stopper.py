"""Ending early without losing anything."""

import signal

import pytorch_lightning as pl

from src.callbacks.base import Preempted, RunContext, StepCallback
from src.callbacks.checkpoints import SaveAdapter


class GracefulStop(StepCallback):
    """SIGTERM or SIGUSR1: finish the optimizer step, save, leave with exit code 143. The same at budget.stop_at_images.

    The step is finished first because gradients that are half accumulated cannot be saved: they would be lost.
    """

    def __init__(self, *, run: RunContext):
        super().__init__(run)
        self._before: dict[int, object] = {}

    def on_fit_start(self, trainer: pl.Trainer, adapter: pl.LightningModule) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._ask)

    def teardown(self, trainer: pl.Trainer, adapter: pl.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def on_step(self, trainer: pl.Trainer, adapter: pl.LightningModule, images_seen: int) -> None:
        limit = self.run.stop_at_images
        if (
            self.run.stop_requested is None
            and limit is not None
            and images_seen >= limit
            and images_seen < self.run.total_images
        ):
            self.run.stop_requested = "budget.stop_at_images"
        self.leave_if_asked(trainer, adapter)

    def leave_if_asked(self, trainer: pl.Trainer, adapter: pl.LightningModule) -> None:
        """Save and raise `Preempted` if a signal has come; only ever called between optimizer steps."""
        if self.run.stop_requested is not None:
            next(c for c in trainer.callbacks if isinstance(c, SaveAdapter)).save(trainer, adapter)
            by_signal = self.run.stop_requested.startswith("SIG")
            raise Preempted(self.run.stop_requested, self.run.root, by_signal)

    def _ask(self, number: int, _frame) -> None:
        self.run.stop_requested = signal.Signals(number).name
