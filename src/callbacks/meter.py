"""Loss, rate, speed and memory of training, once every few steps."""

import time

import pytorch_lightning as pl
import torch

from src.callbacks.base import RunContext, StepCallback, TrainingDiverged


class ThroughputMeter(StepCallback):
    """Logs train/loss, train/lr, train/grad_norm, train/step_time_ms, train/img_per_s and train/peak_mem_gib.

    every_steps: how often; a row holds the mean loss and the median step time since the last one. Steps that are
    preceded by a validation or a checkpoint are timed from the end of those. On a CPU the peak is the process's
    largest resident size; on a GPU the allocator's peak.
    """

    def __init__(self, every_steps: int, *, run: RunContext):
        super().__init__(run)
        self.every_steps = every_steps
        self.step_times_ms: list[float] = []
        self._losses: list[float] = []
        self._began = 0.0
        self.train_seconds = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, adapter: pl.LightningModule, batch, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, adapter: pl.LightningModule, outputs, batch, batch_idx: int) -> None:
        loss = adapter.last_loss
        if not torch.isfinite(loss):
            raise TrainingDiverged(
                f"loss is {float(loss)} at images {batch.ids[:4]}; lower the rate, e.g. optimizer.algorithm.lr"
            )
        self._losses.append(float(loss))
        super().on_train_batch_end(trainer, adapter, outputs, batch, batch_idx)

    def on_step(self, trainer: pl.Trainer, adapter: pl.LightningModule, images_seen: int) -> None:
        spent = time.perf_counter() - self._began
        self.train_seconds += spent
        self.step_times_ms.append(1000 * spent)
        if trainer.global_step % self.every_steps == 0 or images_seen == self.run.total_images:
            recent = sorted(self.step_times_ms[-self.every_steps :])
            middle = recent[len(recent) // 2]
            row = {
                "train/loss": sum(self._losses) / len(self._losses),
                "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
                "train/grad_norm": adapter.last_grad_norm,
                "train/step_time_ms": middle,
                "train/img_per_s": 1000 * self.run.effective_batch / middle,
                "train/peak_mem_gib": peak_mem_gib(adapter.device),
                "train/seconds": self.train_seconds,
            }
            self.run.log(row, images_seen)
            self._losses.clear()

    def median_step_ms(self) -> float | None:
        """Median over the run without its first tenth, where caches and kernels warm up; None before any step."""
        times = sorted(self.step_times_ms[len(self.step_times_ms) // 10 :])
        return times[len(times) // 2] if times else None

    def state_dict(self) -> dict:
        return {"train_seconds": self.train_seconds}

    def load_state_dict(self, state: dict) -> None:
        self.train_seconds = state["train_seconds"]


def peak_mem_gib(device: torch.device) -> float:
    """Peak memory of this process so far, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
