"""Rows in groups within which numbers may be compared, and what keeps two groups apart, in words."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, get_args

from src.report.rows import CostRow, Row
from src.results import CostResult, Result
from src.results.evaluation import EvaluationResult
from src.types import Checkpointing, UserError

AnyRow = TypeVar("AnyRow", Row, CostRow)
SAMPLING = ("solver", "sampling_steps", "guidance")
# flags of a cost that are part of what is compared, or follow from it, and that the floor, which trains nothing, has none of
COMPARED = ("checkpointing", "naive", "attention", "micro_batch")
OF_TRAINING = ("optimizer", "optimizer_kernel", "clip_norm", "ema")
UNKNOWN = "not recorded"
_MODES = {"estimate": "estimated", "measure": "measured"}


@dataclass
class Group(Generic[AnyRow]):
    """Rows of equal conditions. slug: its name in files; apart: what keeps it from the nearest group before it."""

    conditions: dict[str, Any]
    rows: list[AnyRow]
    slug: str = ""
    apart: str = ""
    title: str = field(default="")


def conditions_of(result: Result | EvaluationResult) -> dict[str, Any]:
    """Everything that two rows must share for their numbers to be comparable, apart from what is compared."""
    first = next(iter(result.metrics.values()))
    same = {
        "backbone": result.backbone["id"],
        "backbone_hash": result.backbone["hash"],
        "task": result.task,
        "resolution": result.resolution,
        "n": first["n"],
        **{name: result.flags.get(name) for name in SAMPLING},
        "precision": result.precision,
    }
    if isinstance(result, EvaluationResult):  # the manifest's hash is over all of this, the set and the extractors
        return same | {"evaluation_set": result.evaluation_set, "manifest": result.manifest}
    return same | {
        "task_settings": getattr(result, "task_settings", None),
        "data": getattr(result, "data", None),
        "images_seen": result.images_seen,
        "effective_batch": result.effective_batch,
        "device": result.device,
    }


def cost_conditions(cost: CostResult) -> dict[str, Any]:
    """The same of a cost. How often activations are computed is part of what is compared, and no condition."""
    return {
        "backbone": cost.backbone["name"],
        "source": cost.backbone["id"],
        "what": cost.what,
        "mode": cost.mode,
        "resolution": cost.resolution,
        "batch": cost.batch,
        "precision": cost.precision,
        "device": cost.device,
        "hardware": cost.hardware,
        "sampling": cost.sampling,
        "rates": cost.rates,
        **{name: value for name, value in cost.flags.items() if name not in COMPARED},
    }


def groups(rows: Iterable[Row]) -> list[Group[Row]]:
    """Trainings or evaluations in groups of equal conditions; rows of unlike conditions never share a table."""
    found = _grouped(rows, lambda row: conditions_of(row.result))
    for group in found:
        group.title = f"{group.conditions['backbone']}, {group.conditions['task']}"
    return _described(found, lambda c: f"{short(c['backbone'])}-{c['task']}")


def cost_groups(rows: Iterable[CostRow]) -> list[Group[CostRow]]:
    """Costs in groups of equal conditions. The backbone alone stands in every group whose conditions it shares as far as it
    has any: nothing of it is optimized."""
    rows = list(rows)
    found = _grouped((row for row in rows if not row.floor), lambda row: cost_conditions(row.result))
    lonely = []
    for row in (row for row in rows if row.floor):
        own = _without(cost_conditions(row.result))
        homes = [group for group in found if _without(group.conditions) == own]
        for group in homes:
            group.rows.append(row)
        lonely += [] if homes else [row]
    found += _grouped(lonely, lambda row: cost_conditions(row.result))
    order = {adapter: i for i, adapter in enumerate(dict.fromkeys(row.result.adapter for row in rows))}
    for group in found:
        group.rows.sort(key=lambda row: (not row.floor, order[row.result.adapter], *_size_and_way(row)))
        c = group.conditions
        group.title = f"{c['backbone']}, {c['resolution']} pixels, {c['what']}, batch {c['batch']}, {_MODES[c['mode']]}"
    return _described(found, lambda c: f"{c['backbone']}-{c['resolution']}-{c['what']}-b{c['batch']}-{c['mode']}")


def differences(of: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What is unlike in two sets of conditions: "images_seen 9,600 instead of 32,000"."""
    names = [name for name in {**of, **other} if of.get(name) != other.get(name)]
    return [f"{name.replace('_', ' ')} {said(of.get(name))} instead of {said(other.get(name))}" for name in names]


def said(value: Any) -> str:
    """A condition in words."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {said(item)}" for key, item in value.items())
    return ", ".join(map(said, value)) if isinstance(value, list | tuple) else str(value)


def refuse_unlike(found: Sequence[Group]) -> None:
    """Raises UserError, naming what differs, if the rows of more than one group were asked for in one table."""
    if len(found) > 1:
        first, second = found[0], found[1]
        fault = "; ".join(differences(second.conditions, first.conditions))
        raise UserError(
            f"one_table=true, and {second.rows[0].place} differs from {first.rows[0].place}: {fault}; "
            "give runs of equal conditions, or leave one_table=false and they get tables of their own"
        )


def short(backbone: str) -> str:
    """embedded:sd3_tiny -> sd3_tiny; a hub id -> its last part."""
    return backbone.rsplit(":", maxsplit=1)[-1].rstrip("/").split("/")[-1]


def _grouped(rows: Iterable[AnyRow], conditions: Callable[[AnyRow], dict[str, Any]]) -> list[Group[AnyRow]]:
    found: dict[str, Group[AnyRow]] = {}
    for row in rows:
        own = conditions(row)
        found.setdefault(json.dumps(own, sort_keys=True), Group(own, [])).rows.append(row)
    return list(found.values())


def _described(found: list[Group], slug: Callable[[dict[str, Any]], str]) -> list[Group]:
    """Each with a file name and a title of its own, and with what keeps it from the nearest before it."""
    taken: dict[str, int] = {}
    for number, group in enumerate(found):
        name = slug(group.conditions)
        taken[name] = taken.get(name, 0) + 1
        group.slug = name if taken[name] == 1 else f"{name}-{taken[name]}"
        group.title += "" if taken[name] == 1 else f" ({taken[name]})"
        if earlier := [(differences(group.conditions, other.conditions), other) for other in found[:number]]:
            unlike, nearest = min(earlier, key=lambda pair: len(pair[0]))
            group.apart = f"Not in the table of {nearest.title}: {'; '.join(unlike)}."
    return found


def _size_and_way(row: CostRow) -> tuple[float, int, bool]:
    """From the smaller of a method's adapters to the larger, and of each from nothing that is computed twice to everything."""
    scopes, flags = get_args(Checkpointing), row.result.flags
    own = flags["checkpointing"]
    return row.result.trainable_m, scopes.index(own) if own in scopes else len(scopes), bool(flags.get("naive"))


def _without(conditions: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in conditions.items() if name not in OF_TRAINING}
