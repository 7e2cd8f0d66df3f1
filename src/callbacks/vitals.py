"""Whether a run is alive, and what it waits for."""

import time

import pytorch_lightning as pl

from src.callbacks.base import RunContext, StepCallback

JUDGED_STEPS = 50  # how many optimizer steps the share of waiting is taken over


class Vitals(StepCallback):
    """First of the callbacks, so that its clock stands still while the others work.

    heartbeat.json every `heartbeat_seconds` at most, and one warning when steps wait for data.

    data_wait_share: of the time of `JUDGED_STEPS` steps, reading included and validations and checkpoints not: where more of
    it goes by in waiting for the next batch, that is said, once.
    """

    def __init__(self, heartbeat_seconds: float, data_wait_share: float, *, run: RunContext):
        super().__init__(run)
        self.data_wait_share = data_wait_share
        run.heart.every_seconds = heartbeat_seconds
        self.warned = False
        self._steps, self._busy_s, self._began = 0, 0.0, 0.0
        self._waited_before_s, self._started = 0.0, False

    def on_train_start(self, trainer: pl.Trainer, adapter: pl.LightningModule) -> None:
        super().on_train_start(trainer, adapter)
        self._beat(trainer)
        self._started = False

    def on_train_batch_start(self, trainer: pl.Trainer, adapter: pl.LightningModule, batch, batch_idx: int) -> None:
        if not self._started:  # the first batch of all waits for the workers to start
            self._started = True
            self._start_over()
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, adapter: pl.LightningModule, *rest) -> None:
        self._busy_s += time.perf_counter() - self._began
        super().on_train_batch_end(trainer, adapter, *rest)

    def on_step(self, trainer: pl.Trainer, adapter: pl.LightningModule, images_seen: int) -> None:
        self._beat(trainer)
        self._steps += 1
        if self._steps >= JUDGED_STEPS:
            self._judge(images_seen)
            self._start_over()

    def on_train_end(self, trainer: pl.Trainer, adapter: pl.LightningModule) -> None:
        self.run.heart.every_seconds = 0.0
        self._beat(trainer)

    def _beat(self, trainer: pl.Trainer) -> None:
        self.run.heart.beat(trainer.global_step * self.run.effective_batch, self.run.total_images, "training")

    def _judge(self, images_seen: int) -> None:
        waited_s = self.run.data.waited_s - self._waited_before_s
        share = waited_s / max(1e-9, waited_s + self._busy_s)
        if share <= self.data_wait_share or self.warned:
            return
        self.warned = True
        workers = self.run.data.workers
        self.run.events.note("waits_for_data", images_seen, share=round(share, 3), workers=workers)
        more = f"try hardware.workers={max(1, 2 * workers)}, now {workers}, or a faster cache_dir"
        self.run.say(
            f"the last {self._steps} steps waited for data {100 * share:.0f} % of the time (warned from "
            f"callbacks.vitals.data_wait_share={self.data_wait_share:g}); {more}"
        )

    def _start_over(self) -> None:
        self._steps, self._busy_s, self._waited_before_s = 0, 0.0, self.run.data.waited_s
