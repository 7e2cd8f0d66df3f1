"""Where the run is: images, images per second, memory, time left."""

import sys
import time

import pytorch_lightning as pl

from src.callbacks.base import RunContext, StepCallback
from src.callbacks.meter import peak_mem_gib


class ImageProgress(StepCallback):
    """A rich bar on a terminal; elsewhere one line about every `line_seconds` seconds, so that a log stays readable."""

    def __init__(self, line_seconds: float, *, run: RunContext):
        super().__init__(run)
        self.line_seconds = line_seconds
        self._bar = self._task = None
        self._began = self._said = 0.0
        self._first = 0

    def on_train_start(self, trainer: pl.Trainer, adapter: pl.LightningModule) -> None:
        super().on_train_start(trainer, adapter)
        self._began = self._said = time.monotonic()
        self._first = trainer.global_step * self.run.effective_batch
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("images"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, refresh_per_second=2)
            self._task = self._bar.add_task("train", total=self.run.total_images, completed=self._first, facts="")
            self._bar.start()

    def on_step(self, trainer: pl.Trainer, adapter: pl.LightningModule, images_seen: int) -> None:
        now = time.monotonic()
        speed = (images_seen - self._first) / max(1e-9, now - self._began)
        every = 0.5 if self._bar is not None else self.line_seconds
        if now - self._said < every:  # reading the loss waits for the device
            return
        self._said = now
        facts = f"loss {float(adapter.last_loss):.3f} | {speed:.1f} img/s | {peak_mem_gib(adapter.device):.2f} GiB"
        if self._bar is not None:
            self._bar.update(self._task, completed=images_seen, facts=facts)
        else:
            left = (self.run.total_images - images_seen) / max(1e-9, speed)
            print(f"images {images_seen}/{self.run.total_images} | {facts} | {left / 60:.1f} min left", flush=True)

    def teardown(self, trainer: pl.Trainer, adapter: pl.LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
