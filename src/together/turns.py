"""Trainers that take turns: one at a time, batch by batch, in a fixed order.

A trainer's loop cannot be left and entered again, so each has a thread; but only the one whose turn it is runs, from the
start of one of its batches to the start of its next; first all of them get ready. Nothing is done at the same time, and
nothing depends on timing.
"""

import threading
from collections.abc import Callable, Sequence

import pytorch_lightning as pl
import torch

from src.callbacks.base import Preempted, RunContext, Stop
from src.callbacks.stopper import GracefulStop, listening


class Turns:
    """Whose turn it is, of those who have not left. The first of them leads."""

    def __init__(self, count: int):
        self._present = list(range(count))
        self._holder = 0
        self._moved = threading.Condition()

    def wait(self, number: int) -> None:
        """Return when it is this one's turn."""
        with self._moved:
            self._moved.wait_for(lambda: self._holder == number)

    def hand_on(self, number: int) -> None:
        """End the turn of `number`, whose turn it is."""
        with self._moved:
            place = self._present.index(number)
            self._holder = self._present[(place + 1) % len(self._present)]
            self._moved.notify_all()

    def leave(self, number: int) -> None:
        """End the last turn of `number`, which it may be waiting for."""
        with self._moved:
            if self._holder == number and len(self._present) > 1:
                self.hand_on(number)
            self._present.remove(number)

    def leads(self, number: int) -> bool:
        """Whether the others follow this one, so that all have done as many steps when its turn comes."""
        return self._present[0] == number


class TakeTurns(pl.Callback):
    """Waits for the trainer's turn in front of each batch. First of the callbacks, so that no clock runs meanwhile.

    All leave after the same optimizer step: the one that the leader, or whoever is asked in a validation, has just done.
    """

    def __init__(self, turns: Turns, number: int, run: RunContext):
        self.turns, self.number, self.run = turns, number, run

    def on_train_batch_start(self, trainer: pl.Trainer, adapter: pl.LightningModule, batch: object, batch_idx: int) -> None:
        self.turns.hand_on(self.number)
        self.turns.wait(self.number)
        if batch_idx % trainer.accumulate_grad_batches:
            return
        stop = self.run.stop
        decides = stop.requested is not None and stop.at_step is None and self.turns.leads(self.number)
        if decides or stop.at_step == trainer.global_step:
            next(c for c in trainer.callbacks if isinstance(c, GracefulStop)).leave_if_asked(trainer, adapter)


def in_turn(trainings: Sequence[Callable[[], None]], turns: Turns, stop: Stop) -> None:
    """Run trainings whose trainers have `TakeTurns` in the given order, the first in this thread, until all have ended.

    One that fails leaves, and the others go on. Raises the first failure in the end, or `Preempted` if there is none.
    """
    if len(trainings) == 1:
        return trainings[0]()
    failures: dict[int, BaseException] = {}
    threads = torch.get_num_threads()

    def go(number: int) -> None:
        try:
            turns.wait(number)
            torch.set_num_threads(threads)  # each thread has its own number, and sums depend on it
            trainings[number]()
        except BaseException as failure:
            failures[number] = failure
        finally:
            turns.leave(number)

    others = [threading.Thread(target=go, args=(n,), name=f"training-{n}") for n in range(1, len(trainings))]
    for thread in others:
        thread.start()
    go(0)
    with listening(stop):
        if isinstance(failures.get(0), KeyboardInterrupt | SystemExit):
            stop.requested = stop.requested or "SIGINT"
        for thread in others:
            thread.join()
    if failures:
        real = [f for _, f in sorted(failures.items()) if not isinstance(f, Preempted)]
        raise (real or list(failures.values()))[0]
