"""UniCon against ControlNet at about equal size, from the rows of a table of costs, so that no ratio is typed.

    python -m src.bench.pairs experiments/cost/estimates

Prints two Markdown tables. In the first a pair is UniCon-Half with the ControlNet of the backbone, and on transformers UniCon
with the ControlNet that copies all blocks but the last; both without checkpointing, with it in the adapter alone, in both
networks, and against a ControlNet whose backbone nobody froze. The second is of drawing a picture: every method over its
backbone alone. Of measured rows it prints the peaks, and how far the estimates were from them:

    python -m src.bench.pairs experiments/cost/cpu
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.bench.markdown import rows
from src.results import CostResult, read_cost
from src.results.cost import FLOPS
from src.vocabulary import UserError, refused_in_one_line

TITLES = ["backbone, pixels, batch", "ControlNet", "UniCon", "checkpointing", "memory, GiB", "ratio", "operations"]
TITLES += ["bound on time"]
PEAKS = ["backbone, pixels, batch", "method, MiB by checkpointing", "none", "adapter", "both", "backbone not frozen"]
PEAKS += ["estimate off by, bytes"]
GIB = 2**30
NOTHING = "none"  # the adapter of the floor
DRAWING = ["backbone, pixels", "method", "memory, GiB", "operations of a step", "bound on time"]
WAYS = (("none", False), ("adapter", False), ("both", False), ("none", True))  # checkpointing, naive


@dataclass(frozen=True)
class Pair:
    """Two rows of one place, batch and way. Ratios are over the same rows: below 1 in memory, above 1 in the others, UniCon is
    the cheaper one."""

    net: CostResult
    uni: CostResult

    @property
    def memory(self) -> float:
        return self.uni.peak_mem_gib / self.net.peak_mem_gib

    @property
    def operations(self) -> float:
        """Of a step, with what is recomputed."""
        net, uni = (sum(row.flops[part] for part in FLOPS) for row in (self.net, self.uni))
        return net / uni

    @property
    def time(self) -> float:
        return self.net.step_time_ms["total"] / self.uni.step_time_ms["total"]

    def cells(self) -> list[str]:
        """Of its row in the table."""
        backbone, naive = self.uni.backbone["name"], self.net.flags["naive"]
        return [
            f"{backbone}, {self.uni.resolution}, {self.uni.batch}",
            f"{self.net.trainable_m:.0f} M",
            f"{'UniCon-Half' if self.uni.adapter == 'unicon_half' else 'UniCon'}, {self.uni.trainable_m:.0f} M",
            "none; ControlNet's backbone not frozen" if naive else self.uni.flags["checkpointing"],
            f"{self.net.peak_mem_gib:.1f} to {self.uni.peak_mem_gib:.1f}",
            *(f"{ratio:.2f}" for ratio in (self.memory, self.operations, self.time)),
        ]


def pairs(found: Sequence[CostResult], batch: int = 8) -> Iterator[Pair]:
    """Every pair of a batch that rows have both sides of, place by place."""
    by_place: dict[tuple[str, int], list[CostResult]] = defaultdict(list)
    for row in found:
        if row.what == "training" and row.batch == batch and row.step_time_ms is not None:
            by_place[row.backbone["name"], row.resolution].append(row)
    for place in by_place.values():
        yield from _of(place)


def _of(place: list[CostResult]) -> Iterator[Pair]:
    nets = [r for r in place if r.adapter in ("controlnet", "dit_controlnet")]
    sizes = sorted({r.trainable_m for r in nets})
    for name, size in zip(("unicon_half", "unicon"), sizes, strict=False):
        for scope, naive in WAYS:
            net = [r for r in nets if r.trainable_m == size and _way(r) == (scope, naive)]
            uni = [r for r in place if r.adapter == name and _way(r) == (scope, False)]
            if net and uni:
                yield Pair(net[0], uni[0])


def _way(row: CostResult) -> tuple[str, bool]:
    return row.flags["checkpointing"], row.flags["naive"]


def drawing(found: Sequence[CostResult]) -> Iterator[list[str]]:
    """Of every method that draws one picture: place, method, peak, and operations and bound on time of a solver
    step over those of the backbone alone."""
    found = [r for r in found if r.what == "inference" and r.batch == 1 and r.step_time_ms is not None]
    floors = {(r.backbone["name"], r.resolution): r for r in found if r.adapter == NOTHING}
    for r in sorted(
        found, key=lambda r: (r.backbone["name"], r.resolution, r.flops["frozen_forward"] + r.flops["adapter_forward"])
    ):
        floor = floors.get((r.backbone["name"], r.resolution))
        if floor is not None:
            operations = (r.flops["frozen_forward"] + r.flops["adapter_forward"]) / floor.flops["frozen_forward"]
            name = "the backbone alone" if r.adapter == NOTHING else f"{r.adapter}, {r.trainable_m:.0f} M"
            time = r.step_time_ms["total"] / floor.step_time_ms["total"]
            place = f"{r.backbone['name']}, {r.resolution}"
            yield [place, name, f"{r.peak_mem_gib:.1f}", f"{operations:.2f}", f"{time:.2f}"]


def peaks(found: Sequence[CostResult]) -> Iterator[list[str]]:
    """Of every method whose training step was measured: place, method, MiB by checkpointing, and the largest
    distance of an estimate from its measurement in bytes."""
    by_method: dict[tuple[str, str], list[CostResult]] = defaultdict(list)
    for r in found:
        if r.what == "training" and r.mode == "measure" and r.status == "done":
            name = "the backbone alone" if r.adapter == NOTHING else f"{r.adapter}, {r.trainable_m:.2f} M"
            by_method[f"{r.backbone['name']}, {r.resolution}, {r.batch}", name].append(r)
    for (place, name), own in by_method.items():
        sizes = {_way(r): f"{r.peak_mem_gib * 1024:.1f}" for r in own}
        off = max(abs(r.predicted["peak_mem_gib"] - r.peak_mem_gib) for r in own)
        yield [place, name, *(sizes.get(way, "") for way in WAYS), f"{off * GIB:.0f}"]


def read(folder: Path) -> list[CostResult]:
    """Every row below a folder. Raises ResultError for a file that cannot be read."""
    return [read_cost(file) for file in sorted(folder.rglob("results.json"))]


def tables(folder: Path) -> str:
    """All that the rows below a folder have, in Markdown. Raises UserError where that is nothing, and as `read` does."""
    found = read(folder)
    if measured := list(peaks(found)):
        return "\n".join(rows(PEAKS, measured))
    compared = [pair.cells() for pair in pairs(found)]
    if not compared:
        fault = "no row of UniCon beside one of ControlNet at batch 8"
        raise UserError(f"{folder}: {fault}; python -m src.bench.table writes them")
    return "\n".join([*rows(TITLES, compared), "", *rows(DRAWING, list(drawing(found)))])


if __name__ == "__main__":
    with refused_in_one_line():
        if len(sys.argv) != 2:
            raise UserError("give the folder of a table: python -m src.bench.pairs experiments/cost/estimates")
        print(tables(Path(sys.argv[1])))
