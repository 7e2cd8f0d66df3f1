"""Ending early without losing anything."""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytorch_lightning as pl

from src.callbacks.base import Preempted, RunContext, StepCallback, Stop
from src.callbacks.checkpoints import SaveAdapter


class GracefulStop(StepCallback):
    """SIGTERM or SIGUSR1: finish the optimizer step, save, leave with exit code 143. The same at budget.stop_at_images.

    The step is finished first because gradients that are half accumulated cannot be saved: they would be lost.
    """

    def __init__(self, *, run: RunContext):
        super().__init__(run)
        self._listening = ExitStack()

    def on_fit_start(self, trainer: pl.Trainer, adapter: pl.LightningModule) -> None:
        self._listening.enter_context(listening(self.run.stop))

    def on_train_start(self, trainer: pl.Trainer, adapter: pl.LightningModule) -> None:
        super().on_train_start(trainer, adapter)
        # Lightning has put a handler of its own around ours by now: it would end the run, with exit code 0, in the middle of
        # a step whose gradients are half accumulated
        self._listening.enter_context(listening(self.run.stop))
        self.agree()
        self.leave_if_asked(trainer, adapter)

    def teardown(self, trainer: pl.Trainer, adapter: pl.LightningModule, stage: str) -> None:
        self._listening.close()

    def on_step(self, trainer: pl.Trainer, adapter: pl.LightningModule, images_seen: int) -> None:
        stop, limit = self.run.stop, self.run.stop_at_images
        reached = limit is not None and limit <= images_seen < self.run.total_images
        if stop.requested is None and reached:
            stop.requested = "budget.stop_at_images"
        self.agree()
        self.leave_if_asked(trainer, adapter)

    def agree(self) -> None:
        """A signal to one rank asks all of them, after the same step."""
        stop, ranks = self.run.stop, self.run.ranks
        if ranks.any(stop.requested is not None):
            stop.requested = next(name for name in ranks.gather(stop.requested) if name is not None)

    def leave_if_asked(self, trainer: pl.Trainer, adapter: pl.LightningModule) -> None:
        """Save and raise `Preempted` if a signal has come; only ever called between optimizer steps."""
        stop = self.run.stop
        if stop.requested is None:
            return
        stop.at_step = trainer.global_step
        saved = next(c for c in trainer.callbacks if isinstance(c, SaveAdapter)).save(trainer, adapter)
        images_seen = trainer.global_step * self.run.effective_batch
        self.run.events.note("stopped", images_seen, by=stop.requested, saved=saved)
        raise Preempted(stop.requested, self.run.root, stop.requested.startswith("SIG"), saved)


@contextmanager
def listening(stop: Stop) -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 ask for an end. Signals reach the main thread alone; in any other this does nothing."""
    before: dict[int, object] = {}

    def ask(number: int, _frame: object) -> None:
        stop.requested = signal.Signals(number).name

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
