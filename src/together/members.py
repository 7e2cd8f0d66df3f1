"""Who trains together: the configurations beside the run's own, and the folders of their runs."""

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from src import build
from src.adapters.base import ControlAdapter
from src.adapters.frozen import Reads
from src.checkpoint import verify
from src.config import accumulation, config_sha, load
from src.features import check_features
from src.fit import fit, training_estimate
from src.matching import matched
from src.profiling.memory import GIB, MemoryEstimate, blank_batch
from src.profiling.meta import LOW_PRECISION, MetaKernels
from src.profiling.tracker import StorageTracker
from src.results import write_atomic
from src.runs import Run, new_run
from src.types import UserError

FILE = "together.json"  # in the folder of the run that was asked for: where the others are


@dataclass
class Member:
    """One of those who train together, before it has a run. label: what to call it in a line."""

    label: str
    cfg: DictConfig
    plan: build.Plan


def members(cfg: DictConfig) -> list[Member]:
    """The run's own configuration, and one more for each further adapter and task: every adapter on every task.

    An entry of `together` is an adapter, one of `together_tasks` a task, with keys that differ from its yaml:
    "unicon copy=skip_layer". Each could be trained alone, with the same result. Sizes are matched, and the first member's
    backbone serves all. Raises UserError for one that cannot train; `check_shared` refuses what cannot share.
    """
    adapters = [(cfg.adapter.name, cfg.adapter), *_nodes("adapter", cfg, "together")]
    tasks = [(cfg.task.name, cfg.task), *_nodes("task", cfg, "together_tasks")]
    found: list[Member] = []
    for (adapter, adapter_node), (task, task_node) in itertools.product(adapters, tasks):
        one = cfg.copy()
        if found:
            with open_dict(one):
                one.adapter, one.task, one.together, one.together_tasks, one.resume = adapter_node, task_node, [], [], None
        plan = build.plan(one, beside=found[0].plan if found else None)
        one, line = matched(one, plan.backbone)
        if line:
            print(line, flush=True)
        found.append(Member(adapter if len(tasks) == 1 else f"{adapter} on {task}", one, plan))
    sciences = [config_sha(member.cfg) for member in found]
    for number, member in enumerate(found):
        if sciences[number] in sciences[:number]:
            raise UserError(f"together: {member.label} stands there twice; name each adapter and task once")
    return found


def _nodes(group: str, cfg: DictConfig, key: str) -> list[tuple[str, DictConfig]]:
    """(entry, node) of every entry of a key. Raises UserError as the command line would."""
    made = []
    for entry in cfg.get(key) or []:
        option, *words = entry.split()
        try:
            node = load("train", [f"{group}={option}", *(f"{group}.{word}" for word in words)])[group]
        except UserError as error:
            raise UserError(f'{key}="{entry}": {error}') from None
        made.append((entry, OmegaConf.create(OmegaConf.to_container(node, resolve=True))))
    return made


def check_same(run: Run, cfg: DictConfig, typed: Sequence[str]) -> None:
    """Refuse to resume a run with others than those that it began with. typed: the overrides of the command line."""
    for key in ("together", "together_tasks"):
        own, asked = (list(one.get(key) or []) for one in (run.cfg, cfg))
        if own != asked and any(word.lstrip("+").startswith(f"{key}=") for word in typed):
            raise UserError(f"resume={run.folder}: {key}={asked} differs from the run's own, {own}; drop it or start a new run")


def open_others(first: Run, cfgs: Sequence[DictConfig]) -> list[Run]:
    """The runs of the other members: new folders, noted in the first one's, or those that are noted there."""
    file = first.folder / FILE
    if not cfgs:
        return []
    if not first.resumed:
        runs = [new_run(cfg) for cfg in cfgs]
        names = [os.path.relpath(run.folder, first.folder) for run in runs]
        write_atomic(file, (json.dumps({"with": names}, indent=1) + "\n").encode())
        return runs
    if not file.exists():
        raise UserError(f"resume={first.folder}: {FILE} is not there, so the runs that were trained with it are not known")
    folders = [first.folder / name for name in json.loads(file.read_text())["with"]]
    if missing := next((f for f in folders if not (f / "config.yaml").is_file()), None):
        raise UserError(f"resume={first.folder}: {missing} was trained with it and is no run folder now; put it back")
    for folder, cfg in zip(folders, cfgs, strict=True):
        cfg.name = folder.resolve().parent.name
    return [Run(folder.resolve(), cfg, resumed=True) for folder, cfg in zip(folders, cfgs, strict=True)]


def common_checkpoints(runs: Sequence[Run], arm: str = "") -> list[Path | None]:
    """A checkpoint of each run, all of the same images: the newest that all of them have. None for each if there is none.

    Raises UserError if one of them has newer ones only.
    """
    found = [run.checkpoint(arm) for run in runs]
    if None in found:
        return [None] * len(runs)
    name = min(path.name for path in found)  # they are named after their images, with leading zeros
    common = [path.with_name(name) for path in found]
    for path in common:
        if not path.is_dir():
            raise UserError(f"{path} is gone, where those who trained together go on; resume each run alone")
        verify(path)
    return common


def check_shared(group: Sequence[Member]) -> float:
    """Refuse, before a weight is read, who cannot share a frozen pass; tell or refuse what `feature_cache` asks of the disk.

    -> GiB of frozen features that wait in memory for another adapter, another step or, made ahead, for their own; what is
    made ahead also needs the room to make it in, while all that the backward pass wants is still there.
    Raises UserError.
    """
    cfg, plan, reuse = group[0].cfg, group[0].plan, group[0].cfg.get("reuse", 1)
    on_disk = cfg.get("feature_cache") is not None and cfg.feature_cache.dtype is not None
    waiting, ahead = accumulation(cfg) if reuse > 1 else int(len(group) > 1), bool(cfg.hardware.get("overlap"))
    if not (on_disk or waiting or ahead):
        return 0.0
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        hollow = plan.backbone.hollow(LOW_PRECISION[cfg.hardware.precision] or torch.float32)
        adapters = [build.new_adapter(member.cfg, hollow, training=False) for member in group]
    reads = build.union_of(adapters)
    if len(group) > 1 and reads is None:
        writer = next(member.label for member, adapter in zip(group, adapters, strict=True) if adapter.reads() is None)
        raise UserError(
            f"together: {writer} writes into the backbone, so no other can use its pass; train it alone, or take methods that "
            "only read (unicon and unicon_half with flow=unidirectional)"
        )
    if on_disk:
        sizes = {plan.train_source.size_of(row) for row in range(len(plan.train_source))}
        check_features(cfg, len(plan.train_source), len(sizes), reads and _pass_of(cfg, adapters[0], reads, 1).numbers)
    if reads is None:
        return 0.0
    one = _pass_of(cfg, adapters[0], reads, cfg.hardware.micro_batch)
    return (waiting * one.held_bytes + ahead * one.making_bytes) / GIB


@dataclass(frozen=True)
class _PassSize:
    """held_bytes: of a frozen pass; making_bytes: of it and the work on it, at most; numbers: that a cache would keep."""

    held_bytes: int
    making_bytes: int
    numbers: int


def _pass_of(cfg: DictConfig, twin: ControlAdapter, reads: Reads, batch: int) -> _PassSize:
    """The size of a pass from shapes alone. twin: an adapter without data."""
    tracker = StorageTracker()
    with torch.device("meta"):
        blank = blank_batch(twin.backbone.facts, twin.condition_space, batch, cfg.resolution)
    tracker.hold("frozen_weights", [*twin.backbone.net.parameters(), *twin.backbone.net.buffers()])
    before = sum(tracker.live.values())
    with torch.no_grad(), MetaKernels(LOW_PRECISION[cfg.hardware.precision]), tracker:
        frozen = twin.frozen_pass(blank, reads)
    held = sum(t.nbytes for t in frozen.storages())
    return _PassSize(held, sum(tracker.peak.values()) - before, sum(t.numel() for t in frozen.tensors().values()))


def fitted(group: Sequence[Member]) -> DictConfig:
    """Tell or refuse what the group takes of memory and disk, before a weight is read. -> the first one's configuration, with
    the hardware that `hardware.fit=auto` chose for all of them. Raises UserError."""
    waiting_gib = check_shared(group)

    def estimate(cfg: DictConfig) -> MemoryEstimate:
        share = cfg.hardware.micro_batch / group[0].cfg.hardware.micro_batch
        cfgs = [cfg, *(_as_in(cfg, member.cfg) for member in group[1:])]
        return in_all([training_estimate(one, group[0].plan.backbone) for one in cfgs], share * waiting_gib)

    cfg = fit(group[0].cfg, group[0].plan.backbone, estimate)
    for member in group:
        member.cfg = _as_in(cfg, member.cfg)
    return group[0].cfg


def _as_in(other: DictConfig, cfg: DictConfig) -> DictConfig:
    """cfg with what concerns all members as it is in another configuration."""
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.hardware, cfg.optimizer, cfg.resolution = other.hardware, other.optimizer, other.resolution
    return cfg


def in_all(estimates: Sequence[MemoryEstimate], waiting_gib: float) -> MemoryEstimate:
    """What those who train in turn take at most: the largest one's peak, the weights, gradients, optimizers and averages of the
    others, which stay where they are meanwhile, and frozen features that wait for their next use."""
    largest = max(estimates, key=lambda e: e.peak_gib - 2 * e.trainable_weights_gib - e.optimizer_gib - e.ema_gib)
    others = [e for e in estimates if e is not largest]
    more = {name: sum(getattr(e, name) for e in others) for name in ("trainable_weights_gib", "optimizer_gib", "ema_gib")}
    more |= {"gradients_gib": more["trainable_weights_gib"], "activations_gib": waiting_gib}
    added = {name: getattr(largest, name) + gib for name, gib in more.items()}
    return replace(largest, **added, peak_gib=largest.peak_gib + sum(more.values()))
