"""Which adapter works on which backbone for which task: asked of the classes themselves, before any weight is read.

`python -m src.train --list` prints it, the README holds the same table, and a run of an unsupported pair is refused with it.
Facts of full-size backbones come from their shipped shapes, so that nothing is downloaded to know what is possible.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from src.backbones.base import Backbone
from src.backbones.source import ModelSource
from src.config import CONF, Unsupported
from src.config.nodes import node_of
from src.construct import construct
from src.types import BackboneFacts

NOT_OPTIONS = ("_target_", "name", "params_match")


def options(group: str) -> list[str]:
    """Names of the yaml files of a group."""
    return sorted(p.stem for p in (Path(CONF) / group).glob("*.yaml"))


def refusal(node: Mapping[str, Any], facts: BackboneFacts) -> str | None:
    """Why an adapter or task node cannot work on a backbone; None if it can."""
    given = {k: v for k, v in node.items() if k not in NOT_OPTIONS}
    return get_class(node["_target_"]).refusal(facts, **given)


def check_cell(cfg: DictConfig, backbone: Backbone) -> None:
    """Refuse an unsupported adapter or task with the reason and the nearest that works. Raises Unsupported."""
    adapter, facts = OmegaConf.to_container(cfg.adapter, resolve=True), backbone.facts
    if fault := unsupported(adapter, cfg.backbone.name, facts):
        raise Unsupported(fault)
    compiled = OmegaConf.select(cfg, "hardware.compile")
    if compiled in ("frozen", "all") and get_class(adapter["_target_"]).reaches_into_blocks:
        raise Unsupported(
            f"adapter={cfg.adapter.name} hardware.compile={compiled}: it changes layers inside of the frozen blocks, and "
            "compiled ones would go on without it; write hardware.compile=none"
        )
    task = OmegaConf.to_container(cfg.task, resolve=True) if cfg.get("task") else None
    reason = task and refusal(task, facts)
    if reason:
        works = [t for t in options("task") if refusal(node_of("task", t), facts) is None]
        raise Unsupported(
            f"task={cfg.task.name} backbone={cfg.backbone.name}: {reason} (on this backbone: {', '.join(works) or 'none'})"
        )


def unsupported(adapter: Mapping[str, Any], backbone: str, facts: BackboneFacts) -> str | None:
    """What is said of an adapter's node that does not work on a backbone, with what would; None if it does."""
    reason = refusal(adapter, facts)
    return reason and f"adapter={adapter['name']} backbone={backbone}: {reason} ({nearest(adapter, facts)})"


def nearest(adapter: Mapping[str, Any], facts: BackboneFacts) -> str:
    """What works instead of an adapter that does not: on its backbone the same with its yaml's own options, else one of the
    same idea, else all there are; and the backbone where it does, preferably of the same family and kind of weights."""
    name, idea = adapter["name"], get_class(adapter["_target_"]).idea
    others = [o for o in options("adapter") if o != "template"]
    akin = [o for o in others if idea and _class("adapter", o).idea == idea]
    works = [o for o in akin if _works(o, facts)] or [o for o in others if o not in akin and _works(o, facts)]
    own = f"adapter={name} with its yaml's own options" if name in others and _works(name, facts) else ""
    here = own or ", ".join(works) or "none"
    embedded = facts.source.startswith("embedded:")
    bases = sorted(options("backbone"), key=lambda b: (_family(b) != facts.family, b.endswith("_tiny") != embedded))
    there = next((b for b in bases if refusal(adapter, facts_of(b)) is None), None)
    return f"on this backbone: {here}" + (f"; with this adapter: backbone={there}" if there else "")


@cache
def matrix() -> dict[str, dict[str, str | None]]:
    """adapter -> backbone -> None where it works, else the reason why not."""
    return {a: {b: refusal(node_of("adapter", a), facts_of(b)) for b in options("backbone")} for a in options("adapter")}


def task_gaps() -> dict[str, dict[str, str]]:
    """task -> backbone -> why it cannot be learned there, for those that cannot; adapters read every condition alike."""
    found = {t: {b: refusal(node_of("task", t), facts_of(b)) for b in options("backbone")} for t in options("task")}
    return {t: {b: reason for b, reason in row.items() if reason} for t, row in found.items()}


def tasks_line() -> str:
    """Which cells work with which tasks, in a sentence."""
    gaps = task_gaps()
    line = f"Every cell works with every task: {', '.join(t for t, row in gaps.items() if not row)}."
    but = [f"{task} not on {', '.join(row)}" for task, row in gaps.items() if row]
    return f"{line} But {'; '.join(but)}." if but else line


def table() -> str:
    """The matrix in Markdown, with a line on tasks."""
    found = matrix()
    backbones = options("backbone")
    lines = [f"| adapter | {' | '.join(backbones)} |", "| --- |" + " :-: |" * len(backbones)]
    for adapter, cells in found.items():
        lines.append(f"| {adapter} | {' | '.join('yes' if cells[b] is None else '-' for b in backbones)} |")
    return "\n".join([*lines, "", tasks_line()])


def reasons() -> str:
    """One line per adapter and reason, for the cells that are empty."""
    lines = []
    for adapter, cells in matrix().items():
        for reason in sorted({r for r in cells.values() if r}):
            where = ", ".join(b for b, r in cells.items() if r == reason)
            lines.append(f"{adapter} not on {where}: {reason}")
    lines += [f"{task} not on {base}: {reason}" for task, row in task_gaps().items() for base, reason in row.items()]
    return "\n".join(lines)


def _works(adapter: str, facts: BackboneFacts) -> bool:
    return refusal(node_of("adapter", adapter), facts) is None


def _class(group: str, name: str) -> Any:
    return get_class(node_of(group, name)["_target_"])


def _family(name: str) -> str:
    """Of a backbone, by the module of its class."""
    return _class("backbone", name).__module__.split(".")[-1]


@cache
def facts_of(name: str) -> BackboneFacts:
    """Facts of a backbone by the name of its yaml, without a download."""
    node = dict(node_of("backbone", name))
    if not ModelSource(node["source"]).embedded:
        node["source"] = f"random:{name}"
    return construct(node).facts
