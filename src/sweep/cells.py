"""A sweep between its command line and its rows: which cells it has, how one is started, what is told and kept of it."""

import datetime
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from src.backbones.source import ModelSource, SourceError
from src.config import Request, Unsupported, composed
from src.construct import construct
from src.results import command_line, git_state
from src.support import check_cell
from src.sweep.folder import SweepFolder
from src.sweep.process import WARNING, CellProcess, Ending, judge, tail
from src.sweep.rows import SETTLED, Row, exit_code, identity, key_of, label, table
from src.types import UserError

ROOT = Path(__file__).resolve().parents[2]
TOLD_LINES = 15  # of the log of a cell that broke
# what is said to the sweep and not to its cells; Hydra's nodes of these names, with all that is below them
TO_THE_SWEEP = ("sweep.", "hydra.mode", "hydra.sweep", "hydra.launcher")


@dataclass(frozen=True)
class Cell:
    """A cell that may start. timed: it measures time; gpus: how many it works on, where there are any."""

    number: int
    overrides: tuple[str, ...]
    timed: bool = False
    gpus: int = 0


@dataclass
class Sweep:
    """One multirun of a verb.

    request: what is composed, without overrides; prefix: the command line of this process before the words of the verb;
    flags: Hydra's flags among these words; words: the overrides among them; launcher: the class that Hydra is to take;
    jobs, timeout_s, grace_s: of conf/shared/sweep.yaml;
    multirun_in_yaml: whether an experiment makes it one, and not `-m`; cells: number and overrides of each; stopped: the
    number of the signal that ended the sweep.
    """

    request: Request
    prefix: list[str]
    flags: list[str]
    words: list[str]
    folder: SweepFolder
    launcher: str
    jobs: int
    timeout_s: float | None
    grace_s: float
    multirun_in_yaml: bool = False
    cells: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    stopped: int = 0

    @property
    def typed(self) -> list[str]:
        """The overrides that say what the sweep is."""
        return [word for word in self.words if key_of(word) != "sweep.resume"]

    @property
    def program(self) -> str:
        """What the cells run, in words: `src.bench`, `src.prepare cache`."""
        return " ".join(self.prefix[self.prefix.index("-m") + 1 :]) if "-m" in self.prefix else self.request.config_name

    def begin(self) -> None:
        """Take the folder and write there what this sweep is."""
        sha, dirty = git_state(ROOT)
        record = {"program": self.program, "overrides": self.typed, "date": _now(), "command": command_line()}
        self.folder.begin({**record, "commit": sha, "dirty": dirty})

    def check(self, number: int, overrides: Sequence[str]) -> Cell | None:
        """The cell if it may start. None if it is settled: done before, or not possible, which becomes a row."""
        overrides = tuple(o for o in overrides if not key_of(o).startswith(TO_THE_SWEEP))
        before = self.folder.latest().get(identity(overrides))
        if before is not None and before.status in SETTLED:
            return None
        try:
            cfg, _ = composed(replace(self.request, overrides=(*overrides, *self._hydra_words())))
            check_pair(cfg)
        except UserError as exc:
            status = "skipped" if isinstance(exc, Unsupported) else "refused"
            self._keep(Row(number, overrides, status, 0, _now(), error=" ".join(str(exc).split())))
            return None
        except Exception as exc:  # a fault of the program in this cell; the others may be well
            self._keep(Row(number, overrides, "failed", 0, _now(), error=f"before it began: {type(exc).__name__}: {exc}"))
            return None
        mode, hardware = cfg.get("mode"), cfg.get("hardware") or {}
        on_gpu = hardware.get("accelerator") != "cpu" and mode != "estimate"
        return Cell(number, overrides, timed=mode == "measure", gpus=(hardware.get("devices") or 1) if on_gpu else 0)

    def start(self, cell: Cell, gpus: Sequence[str] = (), inherit: Sequence[int] = ()) -> CellProcess | None:
        """A fresh process for a cell, which sees the given GPUs, or those of this process. None, and a row, without one."""
        log = self.folder.new_log(cell.number)
        group = {"WANDB_RUN_GROUP": self.folder.path.name}  # of cells whose logger.group is null
        env = {**group, **os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})}
        words = [*self.prefix, *cell.overrides, *self._hydra_words(), *self.flags]
        try:
            process = CellProcess(words, log, env, self.timeout_s, self.grace_s, inherit)
        except OSError as exc:
            self._keep(Row(cell.number, cell.overrides, "failed", 0, _now(), error=f"could not be started: {exc}"))
            return None
        where = f" on GPU {', '.join(gpus)}" if gpus else ""
        print(f"start: job {cell.number}: {label(cell.overrides, self.typed)}{where}   log: {log}", flush=True)
        return process

    def end(self, cell: Cell, process: CellProcess, ending: Ending) -> None:
        """Keep and tell how a cell ended."""
        found = judge(ending, process.log, self.timeout_s)
        self._keep(
            Row(
                cell.number,
                cell.overrides,
                found.status,
                round(ending.seconds, 2),
                _now(),
                exit_code=found.exit_code,
                signal=found.signal,
                run=found.run,
                log=str(process.log),
                error=found.error,
            )
        )

    def run(self, number: int, overrides: Sequence[str]) -> None:
        """One cell from check to row, in the process of a job that another launcher started."""
        cell = self.check(number, overrides)
        process = cell and self.start(cell)
        if process:
            with process.ending_first(WARNING):  # submitit requeues the job, and what runs then is killed within seconds
                ending = process.wait()
            self.end(cell, process, ending)

    def close(self) -> int:
        """Tell what became of every cell, and how to go on. -> the exit code of the sweep."""
        found = self.folder.latest()
        cells = self.cells or [(row.number, row.overrides) for row in found.values()]
        print(f"\n{table(cells, found, self.typed)}", flush=True)
        if any(identity(o) not in found or found[identity(o)].status not in SETTLED for _, o in cells):
            words = ["python", *self.prefix[1:], "-m", *self.typed, f"sweep.resume={self.folder.path}", *self.flags]
            print(f"to run what is neither done nor skipped: {shlex.join(words)}")
        print(f"sweep: {self.folder.path}", flush=True)
        return 128 + self.stopped if self.stopped else exit_code(cells, found)

    def _hydra_words(self) -> list[str]:
        """Overrides of Hydra's own node that a cell should hear, too."""
        keys = [(o, key_of(o)) for o in self.typed]
        heard = [o for o, key in keys if key.startswith("hydra.") and not key.startswith(TO_THE_SWEEP)]
        return [*heard, "hydra.mode=RUN"] if self.multirun_in_yaml else heard

    def _keep(self, row: Row) -> None:
        self.folder.append(row)
        words = label(row.overrides, self.typed)
        if row.status == "done":
            print(f"done: job {row.number}: {words} ({row.seconds:.0f} s)", flush=True)
            if row.run:
                print(f"run: {row.run}", flush=True)
            return
        lines = [f"{row.status}: job {row.number}: {row.error}"]
        if row.log and row.status != "refused":
            lines += [f"  | {line}" for line in tail(Path(row.log))[-TOLD_LINES:]]
            lines += [f"  job {row.number} was {words}; the rest of its log: {row.log}"]
        print("\n".join(lines), file=sys.stderr, flush=True)


def plan_sweep(request: Request, flags: list[str], argv: Sequence[str], typed: Sequence[str], cfg: DictConfig) -> Sweep:
    """The sweep that a command line asks for. Writes nothing, and refuses to go on in another sweep's folder.

    argv: the words behind the program's name, flags and overrides, typed: the overrides; cfg: any of the cells, whole.
    """
    prefix = [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(argv)]]
    folder = SweepFolder(Path(cfg.sweep.resume or cfg.hydra.sweep.dir), resumed=cfg.sweep.resume is not None)
    launcher = str(cfg.hydra.launcher._target_)
    limits = {key: cfg.sweep[key] for key in ("jobs", "timeout_s", "grace_s")}
    in_yaml = cfg.hydra.mode is not None
    sweep = Sweep(request, prefix, flags, list(typed), folder, launcher, **limits, multirun_in_yaml=in_yaml)
    parser = OverridesParser.create(request.loader())
    params = [f"{key}={value}" for key, value in (cfg.hydra.sweeper.get("params") or {}).items()]
    try:
        parsed = parser.parse_overrides([*params, *sweep.typed])
        (cells,) = BasicSweeper.split_arguments([o for o in parsed if not o.is_hydra_override()], None)
    except HydraException:  # for another sweeper, or refused by Hydra in a moment
        cells = []
    sweep.cells = [(number, tuple(overrides)) for number, overrides in enumerate(cells)]
    if folder.resumed:
        folder.check_same(sweep.program, sweep.typed)
    return sweep


def check_pair(cfg: DictConfig) -> None:
    """Refuse what the cell itself would refuse of adapter and backbone, without a network. Raises UserError, Unsupported.

    A full-size backbone is judged by its shipped shape; one that is neither here nor shipped is left to the cell.
    """
    if cfg.get("floor") or not (cfg.get("adapter") and cfg.get("backbone")):  # a floor has no adapter on its backbone
        return
    node, source = cfg.backbone, ModelSource(cfg.backbone.source)
    if not source.random and source.local_folder is None:
        shape = f"random:{node.name}"
        try:
            ModelSource(shape).config("")
        except SourceError:
            return
        node = OmegaConf.merge(node, {"source": shape})
    check_cell(cfg, construct(node, resolution=cfg.resolution))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
