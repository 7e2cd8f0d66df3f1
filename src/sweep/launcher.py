"""The launcher `cells`: every cell of a multirun in a process of its own, several at a time where the machine has room."""

import contextlib
import importlib
import os
import signal
import sys
import time
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from src.sweep.cells import Cell, Sweep
from src.sweep.process import CellProcess
from src.types import UserError

POLL_S = 0.1
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class CellLauncher(Launcher):
    """Hydra's side of it. The task function brings its `Sweep` along as an attribute."""

    __module__ = "hydra_plugins.controlbench"  # Hydra makes plugins of that package only; see `register`

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """Called by Hydra with what it composed."""
        self.sweep = task_function.sweep

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run cells; what became of them stands in the sweep's rows, so that for Hydra all are completed."""
        cells = [(initial_job_idx + number, overrides) for number, overrides in enumerate(job_overrides)]
        if not self.sweep.stopped:
            run_cells(self.sweep, cells, visible_gpus())
        return [JobReturn(overrides=overrides, status=JobStatus.COMPLETED) for overrides in job_overrides]


def register() -> None:
    """Make `hydra/launcher: cells` known to Hydra, which looks a plugin up by its name below `hydra_plugins`."""
    try:
        package = importlib.import_module("hydra_plugins")
    except ImportError:  # no other plugin is installed
        package = sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
    package.controlbench = sys.modules[__name__]
    Plugins.instance().register(CellLauncher)


def run_sweep(sweep: Sweep, program: Callable[[], None]) -> int:
    """A multirun from its folder to its closing table, whatever launches the cells. -> exit code.

    program: Hydra's main function. Raises UserError where the folder cannot be had.
    """
    sweep.begin()
    if sweep.launcher == f"{CellLauncher.__module__}.{CellLauncher.__name__}":
        register()
    at = sys.argv.index(sweep.words[-1]) + 1 if sweep.words else len(sys.argv)  # argparse wants overrides side by side
    folder = str(sweep.folder.path).replace("'", "\\'")
    words = [f"hydra.sweep.dir='{folder}'"]
    if sweep.launcher.endswith(".LocalLauncher"):  # of submitit, which starts what it is given all at once
        words.append(f"hydra.sweeper.max_batch_size={sweep.jobs}")
    sys.argv[at:at] = words
    lost = False
    try:
        program()
    except KeyboardInterrupt:
        sweep.stopped = signal.SIGINT
    except (UserError, HydraException):
        raise
    except Exception as exc:  # another launcher lost a job; what the others found is in the rows
        print(f"error: the launcher ended early: {' '.join(str(exc).split())}", file=sys.stderr, flush=True)
        lost = True
    finally:
        sweep.folder.release()
    return sweep.close() or int(lost)


def visible_gpus() -> list[str]:
    """Names of the GPUs of this process, as CUDA_VISIBLE_DEVICES takes them. Makes no CUDA context."""
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def run_cells(sweep: Sweep, cells: Sequence[tuple[int, Sequence[str]]], gpus: Sequence[str]) -> None:
    """Run cells in order, `sweep.jobs` at a time where there is room, until all have ended or a signal stops the sweep.

    A cell that works on GPUs has them for itself; one that measures time on a CPU has the machine for itself.
    """
    waiting, running, free = deque(cells), {}, list(gpus)
    following: Cell | None = None
    inherit = () if sweep.folder.lock is None else (sweep.folder.lock,)
    with signals() as told:
        try:
            while (waiting or running or following) and not told:
                for process, (cell, held) in list(running.items()):
                    if (ending := process.poll()) is not None:
                        del running[process]
                        free = [gpu for gpu in gpus if gpu in {*free, *held}]
                        sweep.end(cell, process, ending)
                while (following or waiting) and len(running) < sweep.jobs and not told:  # checks disturb nothing that runs
                    following = following or sweep.check(*waiting.popleft())
                    if following is None:
                        continue
                    needs = min(following.gpus, len(gpus))
                    if not has_room(following, [cell for cell, _ in running.values()], needs, len(free), bool(gpus)):
                        break
                    if process := sweep.start(following, free[:needs], inherit):
                        running[process] = (following, free[:needs])
                        free = free[needs:]
                    following = None
                if running:
                    time.sleep(POLL_S)
        finally:
            sweep.stopped = told[0] if told else 0
            stop(sweep, running, told)


def has_room(cell: Cell, running: Sequence[Cell], needs: int, free: int, with_gpus: bool) -> bool:
    """Whether a cell may start beside those that run. needs, free: numbers of GPUs."""
    alone = [c.timed and not (c.gpus and with_gpus) for c in (cell, *running)]
    return needs <= free and not (running and any(alone))


def stop(sweep: Sweep, running: dict[CellProcess, tuple[Cell, Any]], told: list[int]) -> None:
    """Ask what runs to end, and wait for it; a second signal does not wait. A cell has a row only if it was done just then."""
    if running:
        name = signal.Signals(told[0]).name if told else "a fault of the sweep"
        print(f"\n{name}: stopping {len(running)} running cell(s); once more to kill at once", flush=True)
    for process in running:
        process.stop()
    hurried = False
    while running:
        for process, (cell, _) in list(running.items()):
            if (ending := process.poll()) is not None:
                del running[process]
                if ending.code == 0:
                    sweep.end(cell, process, ending)
        if len(told) > 1 and not hurried:
            hurried = True
            for process in running:
                process.stop()
        time.sleep(POLL_S)


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collects the signals that should stop a sweep, instead of ending the process in the middle of a row."""
    told: list[int] = []
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as of a process in the background
            signal.signal(number, lambda found, _: told.append(found))
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
