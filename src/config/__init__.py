"""The way from a command line to a checked configuration: `cli` is what an entry calls; `load` composes and checks inside a
program. Types are in `schema`, values in conf/*.yaml.
"""

import argparse
import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from src.config.checks import check_names, check_nodes, check_secrets, check_typed, check_values, resolve
from src.config.compose import COMMAND_LINE, CONF, Request, compose
from src.config.messages import ConfigError, Gather, Incompatible, Unsupported, Where, key_is
from src.config.older import brought_up
from src.config.recipes import own_note
from src.config.rules import NOT_SCIENCE, accumulation, check_together, config_sha, resolve_hardware, science_diff
from src.config.schema import SCHEMAS, ExportConfig, PrepareConfig, SampleConfig, TrainConfig, only
from src.results import hide_secrets
from src.vocabulary import UserError

if TYPE_CHECKING:
    from src.sweep.cells import Sweep

__all__ = ["CONF", "NOT_SCIENCE", "ConfigError", "Incompatible", "Unsupported"]
__all__ += ["ExportConfig", "PrepareConfig", "Request", "SampleConfig", "TrainConfig"]
__all__ += [
    "accumulation",
    "brought_up",
    "cli",
    "composed",
    "config_sha",
    "load",
    "preflight",
    "resolve_hardware",
    "science_diff",
]

MAX_SWEPT_VALUES = 16  # values of one key that are checked before a sweep starts; each job checks itself in any case

# ---- from a command line to a checked configuration -------------------------------------------------------------------


def load(config_name: str, overrides: Iterable[str] = (), config_dir: str | Path = CONF) -> DictConfig:
    """Compose conf/<config_name>.yaml with overrides and check it. Raises ConfigError; touches no global Hydra state."""
    return composed(Request(config_name, SCHEMAS[config_name], tuple(overrides), str(config_dir)))[0]


def composed(request: Request) -> tuple[DictConfig, list[str]]:
    """-> a checked configuration, and notes that are worth a line. Raises ConfigError."""
    cfg, where = compose(request)
    return _checked(cfg, request.schema, where)


Early = Callable[[DictConfig, Mapping[str, Any]], None]  # of a configuration, and of which yaml each of its groups is


def preflight(config_name: str, argv: list[str], config_dir: str | Path = CONF, early: Early | None = None) -> "Sweep | None":
    """Check a command line (`argv` without the program's name) before Hydra sees it. -> the sweep that it asks for, if any.

    Prints `error: <place>: <key>=<value> <fault>` on stderr, or a list of such faults, and exits 2 if it is wrong. Help,
    completion and Hydra's own information flags are left to Hydra; `--cfg` is only composed, for a reader may want to see an
    incomplete one. early: a check of a single job that needs no class of a node, and so comes before they are imported.
    """
    # the plugin of submitit knows the keys of conf/hydra/launcher/submitit_*.yaml; Hydra checks them, and means to stop that
    warnings.filterwarnings("ignore", message="(?s).*validated against ConfigStore schema with the same name")
    args, sweep = get_args_parser().parse_args(argv), None
    if args.help or args.hydra_help or args.shell_completion or args.info or args.experimental_rerun:
        return None
    if args.config_path:  # Hydra reads it relative to the file of the task function, which is this one
        config_dir = args.config_path if "://" in args.config_path else Path(__file__).parent / args.config_path
    request = Request(args.config_name or config_name, SCHEMAS[config_name], (), str(config_dir), args.config_dir)
    try:
        check_typed(args.overrides)
        for number, cell in enumerate(_cells(request, args.overrides, args.multirun)):
            cfg, where = compose(Request(request.config_name, request.schema, cell, request.config_dir, request.extra_dir))
            if args.cfg:
                continue
            multirun, whole = args.multirun or cfg.hydra.mode == RunMode.MULTIRUN, cfg.copy()
            try:
                notes = _checked(cfg, request.schema, where, None if multirun else early)[1]
            except Incompatible:
                if not multirun:
                    raise
                notes = []  # in a sweep this job fails on its own, the others run
            if number == 0:
                sweep = _sweep(request, args, argv, whole) if multirun else None
                for note in notes:
                    print(f"note: {note}", file=sys.stderr)
    except UserError as exc:
        _refuse(exc)
    return sweep


def cli(config_name: str, main: Callable[[DictConfig], Any], early: Early | None = None) -> None:
    """Run an entry: `preflight`, then Hydra. A UserError becomes one line on stderr and exit code 2, without a traceback.

    In a multirun the jobs after a refused one still run, and the exit code is 2 at the end; `sweep` keys make each of them a
    process of its own (src/sweep), whatever launches it.
    """
    sweep = preflight(config_name, sys.argv[1:], early=early)
    if {"--help", "-h"} & set(sys.argv[1:]):
        only(config_name)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra otherwise ends on any exception itself, with exit code 1

    @functools.wraps(main)
    def task(cfg: DictConfig) -> Any:
        job = HydraConfig.get()
        if sweep is not None:
            return sweep.run(job.job.num, job.overrides.task)
        try:
            if job.mode == RunMode.MULTIRUN:
                _recheck(config_name, job)
            return main(cfg)
        except UserError as exc:
            if job.mode != RunMode.MULTIRUN:
                _refuse(exc)
            if isinstance(exc, Unsupported):
                print(f"skipped: job {job.job.num}: {exc}", file=sys.stderr, flush=True)
                return None
            print(f"error: job {job.job.num}: {exc}", file=sys.stderr, flush=True)
            raise

    program = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)
    try:
        if sweep is None:
            program()
        else:
            from src.sweep.launcher import run_sweep

            task.sweep = sweep
            raise SystemExit(run_sweep(sweep, program))
    except UserError as exc:
        if sweep is not None:
            _refuse(exc)
        raise SystemExit(2) from None
    except HydraException as exc:
        _refuse(ConfigError(" ".join(str(exc).split())))


def _sweep(request: Request, args: argparse.Namespace, argv: list[str], cfg: DictConfig) -> "Sweep | None":
    """The sweep of a verb that has `sweep` keys. cfg: one of its cells, with Hydra's node."""
    package = str(cfg.hydra.launcher._target_).removeprefix("hydra_plugins.").partition(".")[0]
    if package.endswith("_launcher") and (not _is_here("hydra_plugins") or not _is_here(f"hydra_plugins.{package}")):
        fault = f"is not here: pip install {package.replace('_', '-')}"
        raise ConfigError(key_is(COMMAND_LINE, "hydra/launcher", cfg.hydra.runtime.choices["hydra/launcher"], fault))
    if "sweep" not in request.schema.__dataclass_fields__:
        return None
    from src.sweep.cells import plan_sweep

    names = ("config_path", "config_name", "config_dir")
    flags = [word for name in names if (value := getattr(args, name)) for word in (f"--{name.replace('_', '-')}", value)]
    return plan_sweep(request, flags, argv, args.overrides, cfg)


def _is_here(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _checked(cfg: DictConfig, schema: type, where: Where, early: Early | None = None) -> tuple[DictConfig, list[str]]:
    """The configuration without Hydra's node, and notes that are worth a line. Raises all faults at once."""
    choices = cfg.hydra.runtime.choices
    with open_dict(cfg):
        del cfg["hydra"]
    gather = Gather()
    gather(check_names, cfg, schema, where)
    tree = gather(resolve, cfg, where)
    if tree is not None:
        gather(check_secrets, tree, where)
        gather(check_values, tree, schema, where)
        if early is not None:
            gather(early, cfg, choices)
        gather(check_nodes, tree, schema, where, bool(gather.found))
        if early is not None:
            gather.done()  # what is left may ask torch for a GPU
        notes = check_together(tree, where, gather)
    own = gather(own_note, cfg, choices)
    gather.done()
    return cfg, [*notes, *([own] if own else [])]


def _recheck(config_name: str, job: Any) -> None:
    """Check one job of a multirun as preflight does: its combination of values was never seen before."""
    main_dir = next(s.path for s in job.runtime.config_sources if s.provider == "main")
    extra_dir = next((s.path for s in job.runtime.config_sources if s.provider == "command-line"), None)
    overrides = tuple(job.overrides.task)
    cfg, where = compose(Request(job.job.config_name, SCHEMAS[config_name], overrides, main_dir, extra_dir))
    _checked(cfg, SCHEMAS[config_name], where)


def _cells(request: Request, overrides: list[str], multirun: bool) -> list[tuple[str, ...]]:
    """Overrides without sweeps: the first value of each, then every other value with the first of the rest."""
    if not multirun:
        return [tuple(overrides)]
    parser, rows = OverridesParser.create(request.loader()), []
    for text in overrides:
        try:
            (item,) = parser.parse_overrides([text])
        except HydraException:
            rows.append([text])  # refused with a reason when it is composed
            continue
        if not item.is_sweep_override():
            rows.append([text])
        elif item.is_discrete_sweep():  # what cannot be counted is left to the sweeper
            rows.append([f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()])
            if not rows[-1]:
                raise ConfigError(f"{COMMAND_LINE}: {text} matches nothing")
    first = [row[0] for row in rows]
    cells = [tuple(first)]
    for i, row in enumerate(rows):
        cells += [(*first[:i], value, *first[i + 1 :]) for value in row[1:MAX_SWEPT_VALUES]]
    return cells


def _refuse(exc: Exception) -> NoReturn:
    print(f"error: {hide_secrets(str(exc))}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None
