"""The typed root of every entry's configuration, and the way from a command line to a checked one.

Types live here, values in conf/*.yaml: a default is written once. Groups with a `_target_` are free mappings whose schema
is the signature of the class they name. `cli` is what an entry calls; `load` composes and checks inside a program.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, open_dict

from src.config.checks import ConfigError, Incompatible, Unsupported, Where, check_unknown, check_values, resolve
from src.config.compose import COMMAND_LINE, CONF, Request, compose
from src.config.rules import NOT_SCIENCE, accumulation, check_together, config_sha, resolve_hardware, science_diff
from src.objectives import TIME_LAWS
from src.types import UserError

__all__ = ["CONF", "NOT_SCIENCE", "ConfigError", "Incompatible", "Unsupported"]
__all__ += ["ExportConfig", "PrepareConfig", "SampleConfig", "TrainConfig"]
__all__ += ["accumulation", "cli", "config_sha", "load", "preflight", "resolve_hardware", "science_diff"]

MAX_SWEPT_VALUES = 16  # values of one key that are checked before a sweep starts; each job checks itself in any case
NODE, NODES = {"kind": "node"}, {"kind": "nodes"}  # a mapping with a `_target_`; a mapping of such


def _key(**facts: Any) -> Any:
    """A key whose value stands in yaml. least, below: bounds; choices: the legal words."""
    return field(default=MISSING, metadata=facts)


@dataclass
class BudgetConfig:
    """How much is learned, in images, whatever the machine."""

    images: int = _key(least=1)
    effective_batch: int = _key(least=1)
    stop_at_images: int | None = _key(least=1)


@dataclass
class ValidationConfig:
    """What is drawn and scored while training, and at its end."""

    every_images: int = _key(least=1)
    images: int = _key(least=1)
    final_images: int = _key(least=1)
    steps: int = _key(least=1)
    guidance: float = _key(least=0)


@dataclass
class HardwareConfig:
    """Speed only: nothing here may change a result. In `auto`, null is filled in from the profile that fits the machine."""

    name: str = MISSING
    accelerator: str = _key(choices=("auto", "cpu", "gpu"))
    devices: int | None = _key(least=1)
    precision: str | None = _key(choices=("32-true", "bf16-mixed", "16-mixed"))
    micro_batch: int | None = _key(least=1)
    workers: int | None = _key(least=0)
    threads: int | None = _key(least=1)
    checkpointing: bool | None = MISSING
    compile: bool | None = MISSING
    strategy: str | None = MISSING
    memory_gib: float | None = _key(least=0)


@dataclass
class OptimizerConfig:
    """algorithm: a `_partial_` node that still wants the parameters."""

    algorithm: dict[str, Any] = field(default=MISSING, metadata=NODE)
    warmup_images: int = _key(least=0)
    decay: str = _key(choices=("constant", "cosine"))
    clip_norm: float | None = _key(least=0)


@dataclass
class LoggerConfig:
    """Where curves go besides the run folder. mode auto: online if there is a key, else offline with one line."""

    name: str = _key(choices=("wandb", "local"))
    project: str | None = MISSING
    entity: str | None = MISSING
    group: str | None = MISSING
    mode: str = _key(choices=("auto", "online", "offline", "disabled"))


@dataclass
class TrainConfig:
    """`python -m src.train`; the meaning of each key is beside its value in conf/train.yaml."""

    also: ClassVar = ("+experiment",)  # written on the command line, and no key of the configuration itself
    seed: int = _key(least=0)
    resolution: int = _key(least=1)
    budget: BudgetConfig = MISSING
    caption_dropout: float = _key(least=0, below=1)
    time_law: str = _key(choices=TIME_LAWS)
    ema_decay: float = _key(least=0, below=1)
    control_arm: bool = MISSING
    resume: str | None = MISSING
    output_dir: str = MISSING
    cache_dir: str = MISSING
    name: str = MISSING
    tags: list[str] = MISSING
    validation: ValidationConfig = MISSING
    backbone: dict[str, Any] = field(default=MISSING, metadata=NODE)
    adapter: dict[str, Any] = field(default=MISSING, metadata=NODE)
    task: dict[str, Any] = field(default=MISSING, metadata=NODE)
    data: dict[str, Any] = field(default=MISSING, metadata=NODE)
    hardware: HardwareConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    logger: LoggerConfig = MISSING
    callbacks: dict[str, Any] = field(default=MISSING, metadata=NODES)


@dataclass
class SampleConfig:
    """`python -m src.sample`: one condition and one prompt to one image."""

    run: str = MISSING
    prompt: str = MISSING
    condition: str = MISSING
    condition_is_image: bool = MISSING
    out: str | None = MISSING
    scale: float = MISSING
    seed: int = _key(least=0)
    steps: int = _key(least=1)
    guidance: float = _key(least=0)
    hardware: HardwareConfig = MISSING


@dataclass
class PrepareConfig:
    """`python -m src.prepare`: train an embedded backbone from nothing, on scenes that it renders itself."""

    seed: int = _key(least=0)
    world_images: int = _key(least=1)
    vae_steps: int | None = _key(least=1)
    backbone_steps: int | None = _key(least=1)
    reader_steps: int = _key(least=1)
    out: str | None = MISSING
    cache_dir: str = MISSING
    workers: int = _key(least=0)
    backbone: dict[str, Any] = field(default=MISSING, metadata=NODE)


@dataclass
class ExportConfig:
    """`python -m src.export`: the trained adapter of a run for diffusers."""

    run: str = MISSING
    out: str = MISSING
    form: str = _key(choices=("auto", "diffusers", "dropin"))


SCHEMAS: dict[str, type] = {"train": TrainConfig, "sample": SampleConfig, "prepare": PrepareConfig, "export": ExportConfig}
for _name, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_schema, provider="src.config")


# ---- from a command line to a checked configuration -------------------------------------------------------------------


def load(config_name: str, overrides: Iterable[str] = (), config_dir: str | Path = CONF) -> DictConfig:
    """Compose conf/<config_name>.yaml with overrides and check it. Raises ConfigError; touches no global Hydra state."""
    cfg, where = compose(Request(config_name, SCHEMAS[config_name], tuple(overrides), str(config_dir)))
    return _checked(cfg, SCHEMAS[config_name], where)[0]


def preflight(config_name: str, argv: list[str], config_dir: str | Path = CONF) -> None:
    """Check a command line (`argv` without the program's name) before Hydra sees it.

    Prints `error: <place>: <key>=<value> <fault>` on stderr and exits 2 if it is wrong. Help, completion and Hydra's own
    information flags are left to Hydra; `--cfg` is only composed, for a reader may want to see an incomplete one.
    """
    args = get_args_parser().parse_args(argv)
    if args.help or args.hydra_help or args.shell_completion or args.info or args.experimental_rerun:
        return
    if args.config_path:  # Hydra reads it relative to the file of the task function, which is this one
        config_dir = args.config_path if "://" in args.config_path else Path(__file__).parent / args.config_path
    request = Request(args.config_name or config_name, SCHEMAS[config_name], (), str(config_dir), args.config_dir)
    try:
        for number, cell in enumerate(_cells(request, args.overrides, args.multirun)):
            cfg, where = compose(Request(request.config_name, request.schema, cell, request.config_dir, request.extra_dir))
            if args.cfg:
                continue
            try:
                notes = _checked(cfg, request.schema, where)[1]
            except Incompatible:
                if not args.multirun:
                    raise
                continue  # in a sweep this job fails on its own, the others run
            for note in notes if number == 0 else ():
                print(f"note: {note}", file=sys.stderr)
    except ConfigError as exc:
        _refuse(exc)


def cli(config_name: str, main: Callable[[DictConfig], Any]) -> None:
    """Run an entry: preflight, then Hydra. A UserError becomes one line on stderr and exit code 2, without a traceback.

    In a multirun the jobs after a refused one still run, and the exit code is 2 at the end.
    """
    preflight(config_name, sys.argv[1:])
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra otherwise ends on any exception itself, with exit code 1

    @functools.wraps(main)
    def task(cfg: DictConfig) -> Any:
        job = HydraConfig.get()
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

    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)()
    except UserError:
        raise SystemExit(2) from None
    except HydraException as exc:
        _refuse(ConfigError(" ".join(str(exc).split())))


def _checked(cfg: DictConfig, schema: type, where: Where) -> tuple[DictConfig, list[str]]:
    """The configuration without Hydra's node, and notes that are worth a line."""
    with open_dict(cfg):
        del cfg["hydra"]
    check_unknown(cfg, schema, where)
    tree = resolve(cfg, where)
    check_values(tree, schema, where)
    return cfg, check_together(tree, where)


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
    print(f"error: {exc}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None
