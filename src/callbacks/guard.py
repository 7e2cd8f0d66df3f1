"""No step is taken on a loss or a gradient that is not finite."""

import math
from functools import partial

import pytorch_lightning as pl
import torch
from torch import Tensor

from src.callbacks.base import RunContext, StepCallback, TrainingDiverged
from src.ranks.place import whole


class StepGuard(StepCallback):
    """Judges each optimizer step once its gradients are there. One with NaN or Inf in a loss or in the gradient's norm leaves
    the weights and the optimizer as they are; its images count as seen, so that every later step is the same as ever.

    max_in_a_row: so many such steps one after the other end the run. What was skipped stands in events.jsonl with the ids of
    its images. With a loss scale (precision 16-mixed), overflowing gradients belong to the search for the scale, which skips
    such steps itself: they are counted only once it can go no lower than 1.

    The judgement waits for the device, once per optimizer step: with its gradients, and before the weights move.
    """

    def __init__(self, max_in_a_row: int, *, run: RunContext):
        super().__init__(run)
        self.max_in_a_row = max_in_a_row
        self.skipped = self.in_a_row = 0
        self.stepping = False  # between the judgement of a step and its end: weights and average may be half moved
        self._micro_batches: list[tuple[Tensor, list[str]]] = []
        self._ids: list[str] = []

    def on_fit_start(self, trainer: pl.Trainer, adapter: pl.LightningModule) -> None:
        adapter.judge = partial(self.judge, trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, adapter: pl.LightningModule, batch, batch_idx: int) -> None:
        self._ids = batch.ids

    def on_before_backward(self, trainer: pl.Trainer, adapter: pl.LightningModule, loss: Tensor) -> None:
        self._micro_batches.append((adapter.last_loss, self._ids))

    def judge(self, trainer: pl.Trainer, norm: Tensor) -> bool:
        """Whether the step may be taken. norm: of its gradients. Raises TrainingDiverged after too many that may not."""
        self.stepping = True
        size = whole(norm).to(self._micro_batches[0][0])
        *losses, size = torch.stack([*(loss for loss, _ in self._micro_batches), size]).tolist()
        found = [ids for value, (_, ids) in zip(losses, self._micro_batches, strict=True) if not math.isfinite(value)]
        fine = not found and (math.isfinite(size) or _looks_for_scale(trainer))
        fine = trainer.strategy.reduce_boolean_decision(fine, all=True)  # all processes take the same steps
        ids = [name for some in found or [ids for _, ids in self._micro_batches] for name in some]
        self._micro_batches.clear()
        if fine:
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        told = self.run.ranks.gather((losses, ids if found or not math.isfinite(size) else []))  # whose images they were
        losses, ids = [n for some, _ in told for n in some], [name for _, some in told for name in some]
        self._tell(trainer, losses, size, ids)
        return False

    def _tell(self, trainer: pl.Trainer, losses: list[float], norm: float, ids: list[str]) -> None:
        images_seen = (trainer.global_step + 1) * self.run.effective_batch
        bad = next((loss for loss in losses if not math.isfinite(loss)), None)
        what = f"the norm of the gradients is {norm}" if bad is None else f"a loss is {bad}"
        self.run.events.note(
            "skipped_step", images_seen, losses=losses, grad_norm=norm, ids=ids, in_a_row=self.in_a_row, in_all=self.skipped
        )
        shown = ", ".join(ids[:4]) + (", ..." if len(ids) > 4 else "")
        self.run.say(f"step {trainer.global_step + 1} is skipped: {what}; images {shown} (all of them: {self.run.events.file})")
        if self.in_a_row >= self.max_in_a_row:
            self.run.events.note("fault", images_seen, kind="diverged")
            raise TrainingDiverged(
                f"{what} at step {trainer.global_step + 1}, the {self.in_a_row}th in a row that was skipped "
                f"(callbacks.guard.max_in_a_row); the last good checkpoint stays in {self.run.folder / 'checkpoints'}; lower "
                f"the rate, e.g. optimizer.algorithm.lr, or look at the images in {self.run.events.file}"
            )

    def on_step(self, trainer: pl.Trainer, adapter: pl.LightningModule, images_seen: int) -> None:
        self.stepping = False

    def state_dict(self) -> dict:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def _looks_for_scale(trainer: pl.Trainer) -> bool:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() > 1
