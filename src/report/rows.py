"""Reading results: every results.json below some folders, in groups within which numbers may be compared."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.results import Result, read_results
from src.types import UserError


@dataclass(frozen=True)
class Row:
    """One run. scores: metric, or metric/arm -> one value per held-out image, where the run kept them; ids: of these images."""

    result: Result
    folder: Path
    scores: dict[str, np.ndarray] | None
    ids: tuple[str, ...]

    @property
    def main_metric(self) -> str:
        """The task's control score: the first metric that was written."""
        return next(iter(self.result.metrics))

    @property
    def label(self) -> str:
        return f"{self.result.adapter}, seed {self.result.seed}"


def read_rows(folders: Iterable[str | Path]) -> list[Row]:
    """Every results.json below the folders, in the order of their paths; a run and its copy are one.

    Raises UserError if a folder holds none.
    """
    rows: dict[tuple, Row] = {}
    for folder in folders:
        found = sorted(Path(folder).rglob("results.json"))
        if not found:
            raise UserError(
                f"runs={folder}: no results.json below it; give folders that `python -m src.train` printed as `run: ...`"
            )
        for row in map(_read_row, found):
            r = row.result
            key = (r.config_sha, r.seed, r.date, r.command)
            if key not in rows or rows[key].scores is None:  # of two copies, the one that kept more
                rows[key] = row
    return list(rows.values())


def _read_row(file: Path) -> Row:
    outcome = file.with_name("outcome.json")
    kept = json.loads(outcome.read_text()) if outcome.is_file() else {}
    scores = {name: np.array(values) for name, values in kept.get("scores", {}).items()} or None
    return Row(read_results(file), file.parent, scores, tuple(kept.get("ids", ())))


def conditions_of(result: Result) -> dict[str, Any]:
    """Everything that two rows must share for their numbers to be comparable, apart from what is compared."""
    first = next(iter(result.metrics.values()))
    return {
        "backbone": result.backbone["id"],
        "backbone_hash": result.backbone["hash"],
        "task": result.task,
        "resolution": result.resolution,
        "images_seen": result.images_seen,
        "effective_batch": result.effective_batch,
        "n": first["n"],
        **{name: result.flags.get(name) for name in ("solver", "sampling_steps", "guidance")},
    }


def groups(rows: Iterable[Row]) -> list[tuple[dict[str, Any], list[Row]]]:
    """Rows in groups of equal conditions, (conditions, rows); rows of unlike conditions never share a table."""
    found: dict[str, tuple[dict[str, Any], list[Row]]] = {}
    for row in rows:
        conditions = conditions_of(row.result)
        found.setdefault(json.dumps(conditions, sort_keys=True), (conditions, []))[1].append(row)
    return list(found.values())
