"""Trains as `python -m src.train` does, with faults put in.

    python -m tests.fault.driver FAULT[:ARGUMENT...] ... -- OVERRIDES

Faults are functions of this file; the code under test knows nothing of them. Positions are those of the training stream:
images since the start.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

OOM = "CUDA out of memory. Tried to allocate 2.00 GiB."


def at_training(position: str, act: Callable, before: bool = True) -> None:
    """Call act(adapter, batch) in the micro-batch that holds a position, the first time that it comes."""
    from src.adapters.base import ControlAdapter

    original, left = ControlAdapter.training_step, [int(position)]

    def step(self, batch, i):
        due = bool(left) and left[0] in batch.index
        if due:
            left.clear()
        if due and before:
            act(self, batch)
        loss = original(self, batch, i)
        return act(self, batch) if due and not before else loss

    ControlAdapter.training_step = step


def nan_loss(position: str) -> None:
    def spoil(adapter, batch):
        adapter.last_loss = adapter.last_loss * float("nan")
        return next(p for p in adapter.parameters() if p.requires_grad).sum() * float("nan")

    at_training(position, spoil, before=False)


def nan_losses(first: str) -> None:
    """From one position on."""
    from src.adapters.base import ControlAdapter

    original = ControlAdapter.losses

    def losses(self, batch, frozen=None):
        factor = float("nan") if self.training and batch.index[0] >= int(first) else 1.0
        return original(self, batch, frozen) * factor

    ControlAdapter.losses = losses


def inf_gradient(step: str) -> None:
    """One element of one gradient, at an optimizer step; the loss is as ever."""
    from src.adapters.base import ControlAdapter

    original, calls = ControlAdapter.configure_gradient_clipping, []

    def clip(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == int(step):
            next(p for p in self.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
        return original(self, *args, **kwargs)

    ControlAdapter.configure_gradient_clipping = clip


def no_step(*numbers: str) -> None:
    """An optimizer that does nothing at some of its steps: what a run with skipped steps must equal."""
    original, calls = torch.optim.AdamW.step, []

    def step(self, closure=None):
        calls.append(1)
        if str(len(calls)) not in numbers:
            return original(self, closure)
        with torch.enable_grad():
            return closure()

    torch.optim.AdamW.step = step


def nan_weight(position: str) -> None:
    """A weight that is not finite, after the steps before went well."""

    def spoil(adapter, batch):
        with torch.no_grad():
            next(p for p in adapter.parameters() if p.requires_grad).view(-1)[0] = float("nan")

    from src.callbacks.guard import StepGuard

    StepGuard.judge = lambda self, trainer, norm: True  # as if it had come from the optimizer's own step
    at_training(position, spoil)


def oom_training(position: str, fits: str) -> None:
    """Wherever the position is in a micro-batch of more than `fits` images."""
    from src.adapters.base import ControlAdapter

    original = ControlAdapter.training_step

    def step(self, batch, i):
        if int(position) in batch.index and len(batch.index) > int(fits):
            raise torch.OutOfMemoryError(OOM)
        return original(self, batch, i)

    ControlAdapter.training_step = step


def oom_validation(times: str) -> None:
    """The first drawings, whatever they draw."""
    from src.callbacks import control

    original, calls = control.sample_arm, []

    def draw(*args):
        calls.append(1)
        if len(calls) <= int(times):
            raise torch.OutOfMemoryError(OOM)
        return original(*args)

    control.sample_arm = draw


def in_validation(signal_name: str) -> None:
    from src.callbacks import control

    original, calls = control.sample_arm, []

    def draw(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), getattr(signal, signal_name))
        return original(*args)

    control.sample_arm = draw


def while_saving(signal_name: str, place: str, number: str) -> None:
    """A signal in the course of one of the savings. place: weights (written, nothing else), whole (before it has its name)."""
    from src import checkpoint

    name = {"weights": "torch.save", "whole": "verify"}[place]
    holder, attribute = (torch, "save") if name == "torch.save" else (checkpoint, "verify")
    original, calls = getattr(holder, attribute), []

    def wrapped(*args, **kwargs):
        if place == "whole" and not Path(args[0]).name.endswith(".part"):
            return original(*args, **kwargs)
        calls.append(1)
        if len(calls) == int(number):
            os.kill(os.getpid(), getattr(signal, signal_name))
        return original(*args, **kwargs)

    setattr(holder, attribute, wrapped)


def fill_disk(folder: str, first: str, last: str) -> None:
    """Take all room of the disk that holds a folder, from one position to another."""
    filler = Path(folder) / "filler"

    def fill(adapter, batch):
        with open(filler, "wb", buffering=0) as file:
            for size in (2**16, 2**10, 1):
                try:
                    while file.write(b"0" * size) == size:
                        pass
                except OSError:
                    pass
        print(f"disk full at {batch.index[0]}", flush=True)

    def free(adapter, batch):
        filler.unlink()
        print(f"disk free at {batch.index[0]}", flush=True)

    at_training(first, fill)
    at_training(last, free)


def no_check_of_space() -> None:
    """The disk fills up while the cache is written, and not before."""
    from src import preflight
    from src.data import stores

    stores.check_space = lambda *args: None
    preflight.disks = lambda needs: ()


def kill_worker(position: str) -> None:
    def kill(adapter, batch):
        workers = multiprocessing.active_children()
        assert workers, "no worker to kill"
        os.kill(workers[0].pid, signal.SIGKILL)
        time.sleep(0.2)

    at_training(position, kill)


def signal_all(position: str, name: str) -> None:
    """As a scheduler does: to this process and to its workers."""

    def send(adapter, batch):
        for process in multiprocessing.active_children():
            os.kill(process.pid, getattr(signal, name))
        os.kill(os.getpid(), getattr(signal, name))

    at_training(position, send)


def kill(position: str) -> None:
    at_training(position, lambda adapter, batch: os.kill(os.getpid(), signal.SIGKILL))


def wait_for(position: str, file: str) -> None:
    """Stand still until a file appears."""

    def wait(adapter, batch):
        print("waiting", flush=True)
        while not Path(file).exists():
            time.sleep(0.05)

    at_training(position, wait)


def stop_wandb(position: str) -> None:
    """From a position on W&B's own process does nothing, and does not end either."""
    from src.loggers import wandb_run

    wandb_run.FINISH_S, wandb_run.MOST_WAITING = 3.0, 3

    def stop(adapter, batch):
        import wandb

        os.kill(wandb.setup()._connection._proc._process.pid, signal.SIGSTOP)

    at_training(position, stop)


def slow_reading(seconds: str) -> None:
    from src.data.datamodule import ImageStream

    original = ImageStream.__getitems__

    def read(self, positions):
        time.sleep(float(seconds))
        return original(self, positions)

    ImageStream.__getitems__ = read


def main() -> None:
    split = sys.argv.index("--")
    given, sys.argv = sys.argv[1:split], [sys.argv[0], *sys.argv[split + 1 :]]
    from src.config import cli
    from src.train.flow import main as train

    for fault in given:
        name, *arguments = fault.split(":")
        globals()[name](*arguments)
    cli("train", train)


if __name__ == "__main__":
    main()
