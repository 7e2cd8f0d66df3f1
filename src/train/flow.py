"""A training from top to bottom: check, build, fit, score, and what it leaves in its folder."""

import contextlib
import errno
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from src import build, faults, preflight
from src.adapters.base import ControlAdapter
from src.callbacks.base import Preempted, RunContext, Stop
from src.callbacks.meter import peak_mem_gib
from src.callbacks.progress import ImageProgress
from src.collect import NO_CONTROL, collect, summarise
from src.config import resolve_hardware
from src.data.feature_cache import FeatureStore
from src.loggers import build_loggers
from src.plots import plot_curves
from src.ranks.launch import end_with_parent, launch, record
from src.ranks.place import ALONE, RankFailed, Ranks, device_count, is_rank, join, leave
from src.results import Result, write_atomic, write_results
from src.runs import Run, held, machine_of, open_run
from src.together.members import Member, check_same, common_checkpoints, fitted, members, open_others
from src.together.turns import TakeTurns, Turns, in_turn
from src.types import UserError


def main(cfg: DictConfig) -> None:
    """The entry: exit code 143 after a signal, 0 at the end or at budget.stop_at_images."""
    job = HydraConfig.get()
    typed, among_others = list(job.overrides.task), is_rank()  # asked now: Lightning clears the variables at its end
    if not among_others:
        judged = preflight.resolved(machine_of(cfg, typed))
        if device_count(judged.hardware) > 1:
            if cfg.resume in (None, "auto"):
                with contextlib.redirect_stdout(io.StringIO()):  # the first rank says the same
                    preflight.planned(judged, members, None if cfg.resume else fitted)
            raise SystemExit(launch(judged.hardware))
    end_with_parent()
    try:
        train(cfg, typed, job.runtime.choices.get("experiment"))
    except Preempted as why:
        saved = "saved" if why.saved else "NOT saved, for the disk has no room: it goes on from the checkpoint before"
        print(
            f"stopped by {why}; {saved}. Continue with: python -m src.train resume={why.folder}\nrun: {why.folder}", flush=True
        )
        raise SystemExit(143 if why.by_signal else 0) from None
    except BaseException as error:
        told = _full_disk(error) or error
        if among_others:
            if not isinstance(told, RankFailed):
                record(told)
            raise SystemExit(2 if isinstance(told, UserError) else 1) from None
        if told is error:
            raise
        raise told from error
    leave()


def _full_disk(error: BaseException) -> UserError | None:
    """The line for a disk without room; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    where = f" at {error.filename}" if error.filename else ""
    return UserError(f"the disk is full{where}; free some space, and go on with resume=auto: {error.strerror}")


def train(cfg: DictConfig, typed: list[str], experiment: str | None = None) -> Path:
    """One run, or several that train together, from a checked configuration to results.json. -> the folder of the one that was
    asked for. Raises Preempted once everything is saved."""
    cfg = resolve_hardware(cfg)
    ranks = join(resolve_hardware(machine_of(cfg, typed), speaks=False).hardware)
    torch.set_num_threads(cfg.hardware.threads)
    build.quiet()
    # refused before a folder is made; a resumed run is judged by its own configuration
    if ranks.several or cfg.resume not in (None, "auto"):  # several have been judged before they were started
        group = members(cfg)
    else:
        group = preflight.planned(cfg, members, None if cfg.resume else fitted)
    asked = fitted(group) if ranks.several and not cfg.resume else group[0].cfg
    run = ranks.first_does(lambda: open_run(asked, typed))
    if run.resumed:
        check_same(run, cfg, typed)
        run.cfg = resolve_hardware(run.cfg)  # the machine may be another one now
        group = members(run.cfg)
    if ranks.several and len(group) > 1:
        raise UserError(f"together: those who train together share one device, and this run has {ranks.count}")
    runs = [run, *open_others(run, [member.cfg for member in group[1:]])]
    if all((one.folder / "results.json").exists() for one in runs):
        print(f"already finished\nrun: {run.folder}", flush=True)
        return run.folder
    if cfg.resume:
        if ranks.several:
            fitted(group)
        else:
            preflight.planned(run.cfg, lambda _: group, fitted, run.resumed)
        for one, member in zip(runs, group, strict=True):
            one.cfg.hardware = member.cfg.hardware
    with held(runs if ranks.first else []):
        return _trained(runs, group, ranks, experiment)


def _trained(runs: Sequence[Run], group: Sequence[Member], ranks: Ranks, experiment: str | None) -> Path:
    run, began = runs[0], time.monotonic()
    worlds = build.load_worlds([one.cfg for one in runs], [member.plan for member in group], ranks)
    print(f"backbone and data ready in {time.monotonic() - began:.0f} s", flush=True)
    parts = [Part(one, world, member.label, ranks) for one, world, member in zip(runs, worlds, group, strict=True)]
    outcomes = train_all(parts)
    arms = train_all(parts, NO_CONTROL) if run.cfg.control_arm else [None] * len(parts)
    for part, outcome, arm in () if not ranks.first else reversed(list(zip(parts, outcomes, arms, strict=True))):
        results = collect(part.run.cfg, part.world, outcome, arm, outcomes, experiment if part.run is run else None)
        write_results(part.run.folder / "results.json", results)
        plot_curves(part.run.folder / "metrics.jsonl", part.run.folder / "curves.png")
        say_results(results, part.run.folder)
    return run.folder


@dataclass
class Part:
    """One of those who train together. label: what to call it."""

    run: Run
    world: build.World
    label: str
    ranks: Ranks = ALONE


def train_all(parts: Sequence[Part], arm: str = "") -> list[dict]:
    """Train every part to the end of its budget, in turn, or read back what a finished one left. -> each outcome.json.

    arm: "" trains with conditions; `NO_CONTROL` trains the same adapters on the same images with every condition black.
    """
    left = [part for part in parts if not (part.run.folder / arm / "outcome.json").exists()]
    met: list[type] = []
    while left:
        try:
            _together(left, arm)
            break
        except Preempted as why:
            raise Preempted(str(why), parts[0].run.folder, why.by_signal, why.saved) from None
        except (faults.OutOfMemory, faults.LoaderDied) as fault:
            # of several ranks the others wait in a step of theirs: all end, and go on together from the last checkpoint
            if len(left) > 1 or left[0].ranks.several or not _goes_on(left[0].run, fault, met):
                raise
            met.append(type(fault))
    files = [part.run.folder / arm / "outcome.json" for part in parts]
    return [json.loads(file.read_text()) if part.ranks.first else {} for part, file in zip(parts, files, strict=True)]


def _together(left: Sequence[Part], arm: str) -> None:
    """Train the parts that are not finished from where their checkpoints stand."""
    turns, stop = Turns(len(left)), Stop()
    checkpoints = left[0].ranks.first_does(lambda: common_checkpoints([part.run for part in left], arm))
    adapters = [build.new_adapter(part.run.cfg, part.world.backbone) for part in left]
    features = build.share_passes(left[0].run.cfg, left[0].world, adapters)

    def go(number: int) -> Callable[[], None]:
        first = [lambda context: TakeTurns(turns, number, context)] if len(left) > 1 else []
        return lambda: train_once(left[number], adapters[number], checkpoints[number], arm, stop, features, first, number == 0)

    in_turn([go(number) for number in range(len(left))], turns, stop)


def _goes_on(run: Run, fault: UserError, met: Sequence[type]) -> bool:
    """Whether a run can continue from its newest checkpoint, in this process: with half the micro-batch where memory ran out
    and `hardware.oom` says so, as it was where the loader died for the first time. met: the faults before."""
    if isinstance(fault, faults.LoaderDied):
        again = faults.LoaderDied not in met
        line = "the loader is started once more, where it was"
    else:
        smaller = faults.halved(run.cfg)
        again = run.cfg.hardware.oom == "halve" and smaller is not None
        if again:
            run.cfg.hardware.micro_batch = smaller
        line = f"going on with hardware.micro_batch={smaller}; budget.effective_batch={run.cfg.budget.effective_batch} stays"
    if again:
        print(f"{fault}\n{line}", flush=True)
        run.resumed = True
    return again


def train_once(
    part: Part,
    adapter: ControlAdapter,
    checkpoint: Path | None,
    arm: str,
    stop: Stop,
    features: FeatureStore | None = None,
    first_callbacks: Sequence[Callable[[RunContext], pl.Callback]] = (),
    speaks: bool = True,
) -> None:
    """Train one adapter to the end of its budget and leave outcome.json. speaks: False for one that shows no progress."""
    run, cfg, folder, ranks = part.run, part.run.cfg, part.run.folder / arm, part.ranks
    folder.mkdir(exist_ok=True)
    build.speed_up(cfg, part.world.backbone, adapter)
    facts = announce(part, adapter, arm)
    config = OmegaConf.to_container(cfg, resolve=True)
    name = "-".join([cfg.name, run.folder.name, *([arm] if arm else [])])
    tags = list(cfg.tags) + ([arm] if arm else [])
    loggers = build_loggers(cfg.logger, folder, name, config, tags, facts) if ranks.first else []
    context = build.run_context(cfg, part.world, run.folder, folder, loggers, not arm, features, ranks)
    context.stop, context.label = stop, part.label if first_callbacks else ""
    callbacks = [make(context) for make in first_callbacks]
    callbacks += [c for c in build.callbacks(cfg, context) if speaks or not isinstance(c, ImageProgress)]
    if checkpoint is not None:
        context.data.start = json.loads((checkpoint / "meta.json").read_text())["images_seen"]
        print(f"resuming {folder} at {context.data.start} images", flush=True)
    micro_batch, workers = cfg.hardware.micro_batch, cfg.hardware.workers
    context.events.note("resumed" if run.resumed else "started", context.data.start, micro_batch=micro_batch, workers=workers)
    for logger in loggers if run.resumed else ():
        logger.rewind(context.data.start)
    status = "failed"
    try:
        _fit(build.trainer(cfg, context, callbacks), adapter, context, cfg, checkpoint)
        if part.world.backbone.weight_hash() != part.world.backbone_hash:
            raise RuntimeError("the frozen backbone changed while training: this is a bug in the adapter")
        if ranks.first:
            write_atomic(folder / "outcome.json", json.dumps(summarise(context, adapter, callbacks)).encode())
        context.events.note("finished", context.total_images)
        status = "success"
    finally:
        for logger in loggers:
            logger.close(status)


def _fit(trainer: pl.Trainer, adapter: ControlAdapter, context: RunContext, cfg: DictConfig, checkpoint: Path | None) -> None:
    """Lightning's training; memory that runs out and a loader that dies become the line that says what to change."""
    try:
        trainer.fit(adapter, datamodule=context.data, ckpt_path=checkpoint)
    except (RuntimeError, MemoryError) as error:
        if (kind := faults.kind_of(error)) is None:
            raise
        images_seen, peak_gib = trainer.global_step * context.effective_batch, peak_mem_gib(adapter.device)
        fault = faults.explained(error, cfg, context.root, images_seen, peak_gib)
        context.events.note("fault", images_seen, kind=kind, why=str(fault), peak_mem_gib=peak_gib)
        raise fault from None


def announce(part: Part, adapter: ControlAdapter, arm: str) -> dict:
    """Say what is about to be trained."""
    parts = adapter.trainable_parts_m()
    frozen = sum(p.numel() for p in part.world.backbone.net.parameters()) / 1e6
    split = ", ".join(f"{k} {v:.3f}" for k, v in parts.items())
    print(f"{part.label}{' without condition' if arm else ''} on {part.run.cfg.backbone.name}: frozen {frozen:.2f} M, ", end="")
    print(f"trainable {sum(parts.values()):.2f} M ({split})", flush=True)
    if adapter.unreached:
        print(f"not trained, for nothing reads what they compute: {adapter.frozen_dead_m():.3f} M", end="")
        print(f" ({adapter.unreached[0]}, ...)", flush=True)
    return {"frozen_m": frozen, "trainable_m": sum(parts.values()), "arm": arm or "with_condition"}


def say_results(results: Result, folder: Path) -> None:
    """The closing lines: the score of each arm, and where to look."""
    speed = ""
    if results.img_per_s is not None:
        slow, fast = results.img_per_s_quartiles
        speed = f", {results.img_per_s:.0f} img/s [{slow:.0f}, {fast:.0f}]"
    print(f"\n{results.images_seen} images in {results.train_seconds:.0f} s of training{speed}")
    for name, m in results.metrics.items():
        interval = f"  95 % [{m['ci95'][0]:.3f}, {m['ci95'][1]:.3f}]" if m["ci95"] else ""
        print(f"  {name:<42} {m['value']:>9.3f} {m['unit']}{interval}  n={m['n']}")
    print(f"pictures: {folder}/grids   curves: {folder}/curves.png   numbers: {folder}/results.json")
    prompt = (folder / "examples" / "condition-0.txt").read_text().strip()
    print(f"next: python -m src.sample run={folder} prompt=\"'{prompt}'\" condition={folder}/examples/condition-0.png")
    print(f"run: {folder}", flush=True)
