"""Loss, rate, speed and memory of training, once every few steps."""

import math
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from src.callbacks.base import RunContext, StepCallback
from src.ranks.place import whole
from src.spread import spread


class ThroughputMeter(StepCallback):
    """Logs train/loss, train/lr, train/grad_norm, train/step_time_ms, train/img_per_s and train/peak_mem_gib.

    every_steps: how often; a row holds the mean loss and the median step time since the last one. A step's time is that of
    its micro-batches, without what lies between them: validations, checkpoints, the turns of others that train together.
    On a CPU the peak is the process's largest resident size; on a GPU the allocator's peak. Between rows nothing here asks
    the device for a number: a step that waits for its loss cannot prepare the next one. Losses that are not finite (see
    `src.callbacks.guard`) are left out of the mean.
    """

    def __init__(self, every_steps: int, *, run: RunContext):
        super().__init__(run)
        self.every_steps = every_steps
        self.step_times_ms: list[float] = []
        self.train_seconds = 0.0
        self._losses: list[Tensor] = []
        self._steps: list[list[tuple]] = []  # (began, ended) of each micro-batch, of the steps that are not read yet
        self._slices: list[tuple] = []  # of the present step
        self._began = None

    def on_train_batch_start(self, trainer: pl.Trainer, adapter: pl.LightningModule, batch, batch_idx: int) -> None:
        self._began = _moment(adapter.device)

    def on_train_batch_end(self, trainer: pl.Trainer, adapter: pl.LightningModule, outputs, batch, batch_idx: int) -> None:
        self._losses.append(adapter.last_loss)
        self._slices.append((self._began, _moment(adapter.device)))
        super().on_train_batch_end(trainer, adapter, outputs, batch, batch_idx)

    def on_step(self, trainer: pl.Trainer, adapter: pl.LightningModule, images_seen: int) -> None:
        self._steps.append(self._slices)
        self._slices = []
        if trainer.global_step % self.every_steps == 0 or images_seen == self.run.total_images:
            losses = [loss for loss in self.run.ranks.mean(torch.stack(self._losses).tolist()) if math.isfinite(loss)]
            self._losses.clear()
            self._read_times()
            middle = spread(self.step_times_ms[-self.every_steps :])["median"]
            row = {
                "train/loss": sum(losses) / len(losses) if losses else math.nan,
                "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
                "train/grad_norm": float(whole(adapter.last_grad_norm)),
                "train/step_time_ms": middle,
                "train/img_per_s": 1000 * self.run.effective_batch / middle,
                "train/peak_mem_gib": peak_mem_gib(adapter.device),
                "train/seconds": self.train_seconds,
            }
            self.run.log(row, images_seen)

    def step_spread_ms(self) -> dict[str, Any] | None:
        """{median, quartiles, n} over the steps of this process without their first tenth, where caches and kernels warm up;
        None before any step."""
        self._read_times()
        times = self.step_times_ms[len(self.step_times_ms) // 10 :]
        return spread(times) if times else None

    def state_dict(self) -> dict:
        self._read_times()
        return {"train_seconds": self.train_seconds}

    def load_state_dict(self, state: dict) -> None:
        self.train_seconds = state["train_seconds"]

    def _read_times(self) -> None:
        """Put the steps since the last reading into the books."""
        recent = [sum(_ms_between(*part) for part in step) for step in self._steps]
        self._steps.clear()
        self.step_times_ms += recent
        self.train_seconds += sum(recent) / 1000


def _moment(device: torch.device) -> float | torch.cuda.Event:
    """Now: on a GPU a mark in its queue, which need not be waited for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ms_between(began: float | torch.cuda.Event, ended: float | torch.cuda.Event) -> float:
    if isinstance(began, float):
        return 1000 * (ended - began)
    ended.synchronize()
    return began.elapsed_time(ended)


def peak_mem_gib(device: torch.device) -> float:
    """Peak memory of this process so far, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
