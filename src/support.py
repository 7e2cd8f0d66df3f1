"""Which adapter works on which backbone: asked of the classes themselves, before any weight is read.

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
from src.config import CONF, Unsupported, load
from src.construct import construct
from src.types import BackboneFacts

NOT_OPTIONS = ("_target_", "name", "params_match")


def options(group: str) -> list[str]:
    """Names of the yaml files of a group."""
    return sorted(p.stem for p in (Path(CONF) / group).glob("*.yaml"))


def refusal(adapter: Mapping[str, Any], facts: BackboneFacts) -> str | None:
    """Why an adapter node cannot work on a backbone; None if it can."""
    given = {k: v for k, v in adapter.items() if k not in NOT_OPTIONS}
    return get_class(adapter["_target_"]).refusal(facts, **given)


def check_cell(cfg: DictConfig, backbone: Backbone) -> None:
    """Refuse an unsupported pair with the reason and what works instead. Raises Unsupported."""
    adapter = OmegaConf.to_container(cfg.adapter, resolve=True)
    reason = refusal(adapter, backbone.facts)
    if reason is None:
        return
    others = [a for a in options("adapter") if a not in (cfg.adapter.name, "template")]
    works = [a for a in others if refusal(_adapter(a), backbone.facts) is None]
    raise Unsupported(
        f"adapter={cfg.adapter.name} backbone={cfg.backbone.name}: {reason} (on this backbone: {', '.join(works) or 'none'})"
    )


def matrix() -> dict[str, dict[str, str | None]]:
    """adapter -> backbone -> None where it works, else the reason why not."""
    return {a: {b: refusal(_adapter(a), _facts(b)) for b in options("backbone")} for a in options("adapter")}


def table() -> str:
    """The matrix in Markdown, with a line on tasks."""
    found = matrix()
    backbones = options("backbone")
    lines = [f"| adapter | {' | '.join(backbones)} |", "| --- |" + " :-: |" * len(backbones)]
    for adapter, cells in found.items():
        lines.append(f"| {adapter} | {' | '.join('yes' if cells[b] is None else '-' for b in backbones)} |")
    return "\n".join([*lines, "", f"Every cell works with every task: {', '.join(options('task'))}."])


def reasons() -> str:
    """One line per adapter and reason, for the cells that are empty."""
    lines = []
    for adapter, cells in matrix().items():
        for reason in sorted({r for r in cells.values() if r}):
            where = ", ".join(b for b, r in cells.items() if r == reason)
            lines.append(f"{adapter} not on {where}: {reason}")
    return "\n".join(lines)


@cache
def _adapter(name: str) -> dict[str, Any]:
    return OmegaConf.to_container(load("train", [f"adapter={name}"]).adapter, resolve=True)


@cache
def _facts(name: str) -> BackboneFacts:
    node = load("train", [f"backbone={name}"]).backbone
    if not ModelSource(node.source).embedded:
        node.source = f"random:{name}"
    return construct(node).facts
