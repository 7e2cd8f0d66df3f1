"""Trainings joined to what a benchmark of the same design costs: memory, operations of a step, and of the training so far."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from src.report.rows import CostRow, Row
from src.results.cost import FLOPS, CostResult
from src.results.design import flat, options_of

PER_IMAGE = tuple(part for part in FLOPS if part != "optimizer")
SECONDS, TRAINING = "seconds of training", "operations of training, TFLOP"
MEMORY, STEP = "peak memory, GiB", "operations of a step, GFLOP"
Axis = Callable[[Row], float | None]


@dataclass(frozen=True)
class Joined:
    """cells: place of a run -> the cell of its own design; about: under which conditions all of these cells were taken."""

    cells: Mapping[str, CostRow]
    about: str

    def axes(self, batches: Mapping[str | None, int]) -> dict[str, Axis]:
        """Name -> a run's cost, None for a run that was not benchmarked. batches: as `operations` takes them."""

        def of(pick: Callable[[CostResult], float]) -> Axis:
            return lambda row: pick(self.cells[row.place].result) if row.place in self.cells else None

        return {
            TRAINING: lambda row: self.operations(row, row.result.images_seen, batches),
            MEMORY: of(lambda cost: cost.peak_mem_gib),
            STEP: of(lambda cost: sum(cost.flops[part] for part in FLOPS) / 1e9),
        }

    def operations(self, row: Row, images: int | None, batches: Mapping[str | None, int]) -> float | None:
        """10^12 operations that a training has done by so many images: passes by the image, the optimizer by the step.

        batches: config_sha -> effective batch of trainings, for an evaluation, which does not tell; else that of the cell.
        """
        if row.place not in self.cells or images is None:
            return None
        cost = self.cells[row.place].result
        batch = getattr(row.result, "effective_batch", None) or batches.get(row.result.config_sha) or cost.batch
        passes = sum(cost.flops[part] for part in PER_IMAGE) / cost.batch
        return images * (passes + cost.flops["optimizer"] / batch) / 1e12

    @property
    def note(self) -> str:
        return f"Cost as benchmarked: {self.about}."


def joined(rows: Sequence[Row], costs: Iterable[CostRow]) -> Joined | None:
    """Each run with the cell of its adapter on its backbone with equal options, of cells of equal conditions: those that know
    most of the designs, and of these the ones whose checkpointing is that of most runs. None where no run has a cell."""
    costs, alike = list(costs), {}
    for row in rows:
        options = None if row.result.design is None else options_of(row.result.design)
        for cell in costs:
            if options is not None and _fits(row, options, cell.result):
                alike.setdefault(_about(cell.result), {}).setdefault(row.place, cell)
    if not alike:
        return None
    scopes = {row.place: row.result.flags.get("checkpointing") for row in rows}

    def rank(found: tuple[str, dict[str, CostRow]]) -> tuple[int, int]:
        return len(found[1]), sum(scopes[place] == cell.result.flags["checkpointing"] for place, cell in found[1].items())

    about, cells = max(alike.items(), key=rank)
    return Joined(cells, about)


def seconds_of(trained: Iterable[Row]) -> Axis:
    """Seconds of training: of a training its own, of an evaluation those of the training that it came from."""
    known = {row.result.config_sha: row.result.train_seconds for row in trained}
    return lambda row: getattr(row.result, "train_seconds", None) or known.get(row.result.config_sha)


def _fits(row: Row, options: Mapping[str, Any], cost: CostResult) -> bool:
    r = row.result
    mine = (r.adapter, r.backbone["id"], r.resolution, "training", "done", False)
    theirs = (cost.adapter, cost.backbone["id"], cost.resolution, cost.what, cost.status, cost.flags["naive"])
    return mine == theirs and dict(options) == flat(cost.adapter_options)


def _about(cost: CostResult) -> str:
    return f"{cost.mode}d, batch {cost.batch}, {cost.precision}, {cost.device}, checkpointing {cost.flags['checkpointing']}"
