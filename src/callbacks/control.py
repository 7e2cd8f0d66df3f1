"""Validation: the loss and the control scores of all arms on fixed prompts, conditions and noise, and a picture grid."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image

from src.callbacks.base import Preempted, RunContext, StepCallback
from src.callbacks.checkpoints import SaveAdapter
from src.callbacks.ema import AdapterEMA
from src.callbacks.stopper import GracefulStop
from src.control_score import ARMS, NONE, RIGHT, SAMPLE_BATCH, WRONG, ZERO, named, sample_arm, score_rows
from src.faults import free_memory, kind_of
from src.metrics.intervals import bootstrap_ci
from src.plots import GRID_COLUMNS, GRID_ROWS, plot_grid
from src.ranks.place import RankFailed
from src.rng import wrong_row
from src.sampling import NoRoom
from src.types import UserError


class ControlValidation(StepCallback):
    """Every `validation.every_images` images, and at the end on `validation.final_images`.

    Logs val/loss and val/<metric>[/<arm>], writes grids/, and notes the first images_seen at which the right condition
    beats a wrong one for certain (val/images_to_control, val/steps_to_control). A resumed run makes up for a
    validation that its predecessor did not finish. Where several processes train, each draws a part, and the first judges:
    one that drew alone would keep the others waiting for most of a validation.

    A validation that fails (memory, a full disk, whatever it was) is skipped; after `max_failures` in a row only the loss is
    taken from then on. The last one is the run's result and is never skipped: the weights are saved, and the run ends.
    """

    def __init__(self, max_failures: int, *, run: RunContext):
        super().__init__(run)
        self.max_failures, self.failures, self.draws = max_failures, 0, True
        self.ended = False  # whether the last validation is done, in this process
        self.done: list[int] = []
        self.images_to_control: int | None = None
        self.final_scores: dict[str, np.ndarray] = {}
        self._alone: dict[int, np.ndarray] = {}  # row -> picture of the frozen backbone, which never changes

    def on_train_start(self, trainer: pl.Trainer, adapter: pl.LightningModule) -> None:
        super().on_train_start(trainer, adapter)
        self._maybe(trainer, adapter, trainer.global_step * self.run.effective_batch)

    def on_step(self, trainer: pl.Trainer, adapter: pl.LightningModule, images_seen: int) -> None:
        self._maybe(trainer, adapter, images_seen)

    def on_fit_end(self, trainer: pl.Trainer, adapter: pl.LightningModule) -> None:
        # a run that was stopped in its last validation has no step left to train, and the trainer starts none
        self._maybe(trainer, adapter, trainer.global_step * self.run.effective_batch)

    def _maybe(self, trainer: pl.Trainer, adapter: pl.LightningModule, images_seen: int) -> None:
        every, batch = self.run.validation["every_images"], self.run.effective_batch
        last = images_seen >= self.run.total_images
        due = images_seen > 0 and (last or images_seen // every > (images_seen - batch) // every)
        # the scores of the last one are in no checkpoint: a run that ended right after it draws them again
        if due and (images_seen not in self.done or (last and not self.ended)):
            self._tried(trainer, adapter, images_seen, last)
            self.done.append(images_seen)

    def _tried(self, trainer: pl.Trainer, adapter: pl.LightningModule, images_seen: int, last: bool) -> None:
        """Validate; where that fails, count it and go on, or save and give up if it was the last one."""
        began = time.monotonic()
        try:
            self.validate(trainer, adapter, images_seen, last)
            self.failures, self.ended = 0, last
            self.run.events.note("validation", images_seen, seconds=round(time.monotonic() - began, 3))
        except Preempted:
            raise
        except Exception as error:
            # what the person has to mend, or what concerns training: a worker of its loader has died meanwhile
            if (isinstance(error, UserError) and not isinstance(error, NoRoom)) or kind_of(error) == "loader_died":
                raise
            if not self.run.ranks.cuts:  # the others wait in the middle of a pass that this one has left
                raise
            free_memory(error)
            self._failed(trainer, adapter, images_seen, last, error)

    def _failed(self, trainer: pl.Trainer, adapter: pl.LightningModule, images_seen: int, last: bool, error: Exception) -> None:
        self.failures += 1
        why = (str(error) or type(error).__name__).splitlines()[0]
        self.run.events.note("validation_failed", images_seen, why=f"{type(error).__name__}: {why}", in_a_row=self.failures)
        if last:
            next(c for c in trainer.callbacks if isinstance(c, SaveAdapter)).save(trainer, adapter)
            raise UserError(
                f"the last validation failed at {images_seen} images ({why}); the weights are trained and saved, and only "
                f"this is left to do: python -m src.train resume={self.run.root}"
            ) from error
        self.run.say(f"validation at {images_seen} images is skipped: {why} ({self.failures} in a row)")
        if self.draws and self.failures >= self.max_failures:
            self.draws = False
            self.run.say(f"no pictures are drawn any more before the last validation: {self.failures} in a row failed")

    def validate(self, trainer: pl.Trainer, adapter: pl.LightningModule, images_seen: int, last: bool) -> None:
        """One validation with the averaged weights; leaves training untouched, to the bit."""
        ema = next(c for c in trainer.callbacks if isinstance(c, AdapterEMA))
        ranks = self.run.ranks
        stopper = next(c for c in trainer.callbacks if isinstance(c, GracefulStop))
        rows = list(range(self.run.validation["final_images" if last else "images"]))
        adapter.eval()
        try:
            with ema.applied(adapter):

                def pause() -> None:
                    self.run.heart.beat(images_seen, self.run.total_images, "validation")
                    # leaving early must happen with the trained weights in place, so only a flag is raised here
                    asked = self.run.stop.requested is not None
                    if asked if ranks.cuts else ranks.any(asked):
                        raise InterruptedError

                losses = self._together(lambda: self._losses(adapter, pause))
                arms = ARMS if self.run.with_condition else (ZERO,)
                chosen = [arm for arm in arms if self.draws or last]
                pictures = {arm: self._together(lambda arm=arm: self._pictures(adapter, arm, rows, pause)) for arm in chosen}
        except InterruptedError:
            stopper.agree()
            stopper.leave_if_asked(trainer, adapter)
        finally:
            adapter.train()
        ranks.first_does(lambda: self._judge(pictures, losses, rows, images_seen, last))

    def _together(self, work: Callable[[], dict]) -> dict:
        """What every rank found, in one. Raises InterruptedError on all if one of them was asked to end, and what went wrong
        on one of them on all: a validation is skipped together."""
        if not self.run.ranks.several or not self.run.ranks.cuts:
            return work()
        found, error = None, None
        try:
            found = work()
        except InterruptedError:
            pass
        except Exception as fault:
            error = fault
        every, faults = zip(
            *self.run.ranks.gather((found, None if error is None else f"{type(error).__name__}: {error}")), strict=True
        )
        if error is not None:
            raise error
        if any(faults):
            raise RankFailed(next(fault for fault in faults if fault))
        if None in every:
            raise InterruptedError
        return {key: value for one in every for key, value in one.items()}

    def _judge(self, drawn: dict, found: dict, rows: list[int], images_seen: int, last: bool) -> None:
        """Score what was drawn, and tell and keep it. drawn: arm -> row -> picture; found: number of a batch -> its losses."""
        losses = np.concatenate([found[number] for number in sorted(found)])
        pictures = {arm: np.stack([of_arm[row] for row in rows]) for arm, of_arm in drawn.items()}
        scores = {arm: score_rows(self.run.held, rows, p) for arm, p in pictures.items()}
        flat = {named(m, arm): values for arm, by_metric in scores.items() for m, values in by_metric.items()}
        if self.run.with_condition and pictures:
            self._note_control(scores, images_seen)
            self._show(lambda: self._grid(pictures, rows, flat, images_seen))
        self._tell(images_seen, losses, scores, flat, len(rows))
        if last:
            self.final_scores = flat | {"val_loss": losses}
            if self.run.with_condition:
                self._show(self._write_examples)

    def _tell(self, images_seen: int, losses: np.ndarray, scores: dict, flat: dict[str, np.ndarray], count: int) -> None:
        row = {"val/loss": float(losses.mean()), **{f"val/{k}": float(v.mean()) for k, v in flat.items()}}
        if self.images_to_control is not None:
            row["val/images_to_control"] = self.images_to_control
            row["val/steps_to_control"] = self.images_to_control // self.run.effective_batch
        self.run.log(row, images_seen)
        first = next(iter(self.run.held.task.metrics))
        said = ", ".join(f"{arm or 'right'} {scores[arm][first].mean():.3f}" for arm in scores) or "not drawn"
        self.run.say(f"validation at {images_seen} images, n={count}: loss {losses.mean():.4f} | {first}: {said}")

    def _show(self, write: Callable[[], None]) -> None:
        """Pictures for people: a full disk costs them, and not the scores."""
        try:
            write()
        except OSError as error:
            self.run.say(f"pictures of the validation are not written: {error}")

    @torch.no_grad()
    def _losses(self, adapter: pl.LightningModule, pause) -> dict[int, np.ndarray]:
        """Number of a batch -> losses of its images, of this rank's batches."""
        loader, losses = self.run.data.val_dataloader(), {}
        wanted = set(self.run.ranks.mine(range(len(loader)), 1))
        for number, batch in enumerate(loader):
            if number not in wanted:
                continue
            pause()
            with adapter.autocast():
                losses[number] = adapter.called("losses", batch.to(adapter.device)).cpu().double().numpy()
        return losses

    def _pictures(self, adapter: pl.LightningModule, arm: str, rows: list[int], pause) -> dict[int, np.ndarray]:
        """Row -> picture, of this rank's rows."""
        rows = self.run.ranks.mine(rows, SAMPLE_BATCH)
        fresh = [r for r in rows if arm != NONE or r not in self._alone]
        made = dict(zip(fresh, sample_arm(adapter, self.run.held, arm, fresh, pause), strict=True)) if fresh else {}
        if arm == NONE:
            self._alone.update(made)
        return {r: made[r] if r in made else self._alone[r] for r in rows}

    def _note_control(self, scores: dict, images_seen: int) -> None:
        metric, (_, better) = next(iter(self.run.held.task.metrics.items()))
        gap = scores[RIGHT][metric] - scores[WRONG][metric]
        low, _ = bootstrap_ci(gap if better == "higher" else -gap)
        if self.images_to_control is None and low > self.run.held.task.control_gap:
            self.images_to_control = images_seen

    def _grid(self, pictures: dict, rows: list[int], flat: dict, images_seen: int) -> None:
        held, metric = self.run.held, next(iter(self.run.held.task.metrics))
        file = self.run.folder / "grids" / f"images-{images_seen:09d}.png"
        titles = list(GRID_COLUMNS)
        wrong = [held.conditions[wrong_row(r, len(held.images))] for r in rows[:GRID_ROWS]]
        cells = [
            [held.images[r], held.conditions[r], pictures[NONE][i], pictures[RIGHT][i], wrong[i], pictures[WRONG][i]]
            for i, r in enumerate(rows[:GRID_ROWS])
        ]
        captions = [held.stores.captions[r] for r in rows[:GRID_ROWS]]
        file.parent.mkdir(exist_ok=True)
        plot_grid(cells, titles, file, row_titles=captions)
        columns = ["id", "caption", metric, *titles]
        table = [
            [held.stores.ids[r], captions[i], float(flat[metric][i]), *self._cell_files(cells[i], images_seen, i)]
            for i, r in enumerate(rows[:GRID_ROWS])
        ]
        for logger in self.run.loggers:
            logger.log_grid("val/grid", file, images_seen)
            logger.log_table("val/samples", columns, table, images_seen)

    def _cell_files(self, cells: list[np.ndarray], images_seen: int, row: int) -> list[Path]:
        """The pictures of one grid row as files, which is what loggers take."""
        folder = self.run.folder / "grids" / f"cells-{images_seen:09d}"
        folder.mkdir(exist_ok=True)
        files = [folder / f"{row}-{column}.png" for column in range(len(cells))]
        for cell, file in zip(cells, files, strict=True):
            Image.fromarray(cell).save(file)
        return files

    def _write_examples(self) -> None:
        """Condition maps as files, to try `python -m src.sample` with; their prompts stand beside them."""
        folder, held = self.run.folder / "examples", self.run.held
        folder.mkdir(exist_ok=True)
        for row in range(min(GRID_ROWS, len(held.images))):
            Image.fromarray(held.conditions[row]).save(folder / f"condition-{row}.png")
            (folder / f"condition-{row}.txt").write_text(held.stores.captions[row] + "\n")

    def state_dict(self) -> dict:
        return {
            "done": self.done,
            "images_to_control": self.images_to_control,
            "failures": self.failures,
            "draws": self.draws,
        }

    def load_state_dict(self, state: dict) -> None:
        self.done, self.images_to_control = list(state["done"]), state["images_to_control"]
        self.failures, self.draws = state.get("failures", 0), state.get("draws", True)
