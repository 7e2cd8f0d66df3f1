"""manifest.json: what was drawn from what, with the hash of every picture.

`conditions` is what two evaluations must share for their numbers to be compared, and its hash is in their results; `subject`
is what was evaluated, `drawing` what changes pictures by rounding alone, `files` what came out.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from src.evaluate.sets import EvaluationSet, task_settings
from src.evaluate.subjects import refuse_unlike
from src.results import command_line, plain, write_atomic
from src.types import UserError

if TYPE_CHECKING:
    from src.build import Sampler
    from src.evaluate.sets import Plan

NAME, VERSION = "manifest.json", 1
DRAWN = ("evaluation_set", "task", "backbone", "sampler", "resolution", "precision")  # what decides the pictures


def drawn_from(cfg: DictConfig, plan: "Plan", model: "Sampler", node: DictConfig, solver: str) -> dict[str, Any]:
    """What decides every picture beside the adapter, before the set is read. node: the task's configuration."""
    facts, resolution = model.backbone.facts, plan.source.resolution
    noise = "normal numbers keyed by (seed, eval-noise, row), drawn on the CPU"
    return {
        "evaluation_set": {"name": plan.name, "split": plan.split, "n": len(plan), **plan.framing, "image_format": "png"},
        "task": {"name": model.task.name, **task_settings(model.task, node)},
        "backbone": {"id": facts.source, "revision": facts.revision, "hash": model.backbone.weight_hash()},
        "sampler": {"solver": solver, "steps": cfg.steps, "guidance": cfg.guidance, "seed": plan.seed, "noise": noise},
        "resolution": resolution,
        "precision": cfg.hardware.precision,
    }


def group_key(conditions: Mapping[str, Any], fingerprint: str) -> str:
    """8 hex digits: evaluations with the same stand in one folder. fingerprint: of the set's source."""
    return _hash([{key: conditions[key] for key in DRAWN}, fingerprint], 4)


def conditions_of(drawn: Mapping[str, Any], opened: EvaluationSet, measures: Mapping[str, Any]) -> dict[str, Any]:
    """`drawn_from` with the content of the set and what pictures are measured with."""
    conditions = {key: drawn[key] for key in DRAWN} | {"measures": measures}
    conditions["evaluation_set"] = {**drawn["evaluation_set"], "hash": opened.hash}
    return plain(conditions)


def conditions_hash(conditions: Mapping[str, Any]) -> str:
    """16 hex digits, equal for evaluations that compare."""
    return _hash(conditions, 8)


def write_manifest(
    folder: Path, conditions: dict[str, Any], subject: dict[str, Any], drawing: dict[str, Any], files: list[dict[str, str]]
) -> dict[str, Any]:
    """Put manifest.json in place: nothing in it depends on when, how fast or in how many goes it was made, and nothing but
    `command` on where. `content_hash` is over all else: equal for two evaluations with the same pictures."""
    content = plain({"conditions": conditions, "subject": subject, "drawing": drawing, "files": files})
    manifest = {
        "version": VERSION,
        "conditions_hash": conditions_hash(conditions),
        "content_hash": _hash(content, 8),
        "command": command_line(),
        **content,
    }
    write_atomic(folder / NAME, (json.dumps(manifest, indent=1) + "\n").encode())
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished evaluation. Raises UserError for a folder without one, or another version."""
    try:
        manifest = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder}: no whole {NAME} there; give a folder that `python -m src.evaluate` printed") from None
    if manifest.get("version") != VERSION:
        raise UserError(f"{folder}: {NAME} is of version {manifest.get('version')}, this code reads {VERSION}: evaluate again")
    return manifest


def check_like(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Raises UserError, naming what differs, unless two manifests are of equal conditions."""
    refuse_unlike(one["conditions"], two["conditions"], one["subject"]["label"], two["subject"]["label"])


def _hash(content: Any, size: int) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=size).hexdigest()
