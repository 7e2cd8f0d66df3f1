"""What is drawn, as data: the page draws it as SVG (`svg`), the files as PNG and SVG (`figures`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from omegaconf import OmegaConf

from src.report.costs import words
from src.report.groups import Group
from src.report.joins import SECONDS, TRAINING, joined, seconds_of
from src.report.names import cost_names
from src.report.rows import CostRow, Row
from src.report.tables import number
from src.results import read_rows as read_lines
from src.results.cost import FLOPS, MEMORY, PHASES

VALIDATED = "val/"
LOOKS = ("fid", "fid_scenes")  # how pictures look, where an evaluation has measured it
STACKS = {  # title -> unit, parts
    "peak memory": ("GiB", MEMORY),
    "operations of a step": ("GFLOP", FLOPS),
    "time of a step": ("ms", PHASES[:-1]),
}


@dataclass(frozen=True)
class Point:
    """low, high: the interval of y. tip: what stands there when the reader points at it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    tip: str = ""


@dataclass(frozen=True)
class Series:
    """colour: a number, the same for one method in all charts of a group; line: whether points are joined."""

    name: str
    points: tuple[Point, ...]
    colour: int
    line: bool = False


@dataclass(frozen=True)
class Chart:
    """Points or lines over two axes. diagonal: a line where both are equal; zero: axes begin there."""

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    note: str = ""
    diagonal: bool = False
    zero: bool = False


@dataclass(frozen=True)
class Bar:
    """parts: (name, size) from left to right; low, high: the spread of the whole."""

    name: str
    parts: tuple[tuple[str, float], ...]
    low: float | None = None
    high: float | None = None

    @property
    def total(self) -> float:
        return sum(size for _, size in self.parts)


@dataclass(frozen=True)
class Stack:
    """Bars below each other, each of stacked parts in the order of `parts`. bound: the bars are lower bounds."""

    title: str
    unit: str
    bars: tuple[Bar, ...]
    parts: tuple[str, ...]
    note: str = ""
    bound: bool = False


def score_charts(group: Group[Row], costs: Sequence[CostRow] = (), trained: Sequence[Row] = ()) -> list[Chart]:
    """The control score of every run with its interval against what it cost: seconds, parameters, and memory and operations
    where cells of the same designs were benchmarked; how the pictures look against the cost of the training alone. [] for a
    single run. trained: the trainings that evaluations may have come from."""
    if len(group.rows) < 2:
        return []
    axes: dict[str, Callable[[Row], float | None]] = {SECONDS: seconds_of(trained)}
    notes = {SECONDS: f"Seconds as the runs took them, on {group.conditions.get('device') or 'the machines of the trainings'}."}
    bench = joined(group.rows, costs)
    axes["trained parameters, millions"] = lambda row: row.result.trainable_m
    if bench:
        found = bench.axes(_batches(trained))
        axes |= found
        notes |= dict.fromkeys(found, bench.note)
    main, names = group.rows[0].main_metric, {name for row in group.rows for name in row.result.metrics}
    wanted = [(main, name) for name in axes]
    wanted += [(look, name) for look in LOOKS if look in names for name in (SECONDS, TRAINING) if name in axes]
    charts = []
    for metric, name in wanted:
        series = tuple(_scored(group.rows, metric, axes[name], name))
        points = [p for s in series for p in s.points]
        # seeds of a single method, all at one cost, compare nothing
        if len(points) > 1 and (len({p.x for p in points}) > 1 or sum(bool(s.points) for s in series) > 1):
            title = f"{metric} against {name.split(',')[0]}"
            charts.append(Chart(title, name, _axis(group.rows, metric), series, notes.get(name, "")))
    return charts


def _batches(trained: Sequence[Row]) -> dict[str | None, int]:
    return {row.result.config_sha: row.result.effective_batch for row in trained}


def _scored(rows: Sequence[Row], metric: str, of: Callable[[Row], float | None], axis: str) -> list[Series]:
    points: dict[str, list[Point]] = {}
    for row in rows:
        m, x = row.result.metrics.get(metric), of(row)
        own = points.setdefault(row.name or row.result.adapter, [])
        if m is not None and x is not None:
            low, high = m["ci95"] or (None, None)
            about = f" [{number(low)}, {number(high)}]" if m["ci95"] else ""
            tip = f"{row.label}: {number(m['value'])}{about}, n = {m['n']}; {axis}: {number(x)}"
            own.append(Point(x, m["value"], low, high, tip))
    return [Series(name, tuple(own), colour) for colour, (name, own) in enumerate(points.items())]


def _axis(rows: Sequence[Row], metric: str) -> str:
    m = next(row.result.metrics[metric] for row in rows if metric in row.result.metrics)
    direction = f", {m['better']} is better" if m["better"] else ""
    return f"{metric}{direction}"


def curve_charts(group: Group[Row], costs: Sequence[CostRow] = ()) -> list[Chart]:
    """The control score while training, against images, seconds of training and, of designs that were benchmarked, the
    operations of the training so far; of the runs that kept their curves."""
    first, bench = group.rows[0], joined(group.rows, costs)
    metric = f"{VALIDATED}{first.main_metric}"
    curves: dict[str, list[Series]] = {"images seen": [], SECONDS: [], TRAINING: []}
    methods = [row.name or row.result.adapter for row in group.rows]
    colours = {name: i for i, name in enumerate(dict.fromkeys(methods))}
    # seeds of a method share their colour, and their line in the legend
    named = {r.place: r.label if methods.count(name) == 1 else name for r, name in zip(group.rows, methods, strict=True)}
    watched = [_watched(row) for row in group.rows]
    for row, count in zip(group.rows, watched, strict=True):
        file = row.folder / "metrics.jsonl"
        rows = read_lines(file) if file.is_file() else []
        scored = _like_the_others(row, count, [(r["images_seen"], float(r[metric])) for r in rows if metric in r])
        if len(scored) < 2:
            continue
        spent = [(r["images_seen"], r["train/seconds"]) for r in rows if "train/seconds" in r]
        done = [bench.operations(row, images, {}) for images, _ in scored] if bench else []
        places = {"images seen": [images for images, _ in scored], SECONDS: _seconds(scored, spent)}
        places[TRAINING] = [x for x in done if x is not None]
        colour = colours[row.name or row.result.adapter]
        for name, xs in places.items():
            points = []
            for x, (images, y) in zip(xs, scored, strict=False):  # of no cost there is no curve
                when = "" if name == "images seen" else f"; {name}: {number(x)}"
                points.append(Point(x, y, tip=f"{row.label}: {number(y)} at {images:,} images{when}"))
            if points:
                curves[name].append(Series(named[row.place], tuple(points), colour, line=True))
    counts = " or ".join(map(str, sorted({n for n in watched if n}))) or "fewer"
    note = f"Scored on {counts} held-out images, the first of the n = {group.conditions['n']} of the table."
    notes = {TRAINING: f"{note} {bench.note}"} if bench else {}
    title, y = f"{first.main_metric} while training, against", _axis(group.rows, first.main_metric)
    return [Chart(f"{title} {x.split(',')[0]}", x, y, tuple(lines), notes.get(x, note)) for x, lines in curves.items() if lines]


def _seconds(scored: Sequence[tuple[float, float]], spent: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds of optimizer steps by each validation: what validations and checkpoints take is no cost of a method."""
    if not spent:
        return []
    images, seconds = np.array(sorted(spent)).T
    return [float(x) for x in np.interp([i for i, _ in scored], images, seconds)]


def _watched(row: Row) -> int | None:
    """On how many images the validations before the last were scored; None without the run's configuration."""
    file = row.folder / "config.yaml"
    return OmegaConf.select(OmegaConf.load(file), "validation.images") if file.is_file() else None


def _like_the_others(row: Row, watched: int | None, scored: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(images, score) of each validation, the last one of the images that the others were scored on: other images, other
    scores, and a curve would bend where nothing happened. Without the score of every image the last one is left out."""
    last = (row.scores or {}).get(row.main_metric)
    if not scored or scored[-1][0] != row.result.images_seen or watched == row.result.metrics[row.main_metric]["n"]:
        return scored
    if watched is None or last is None:
        return scored[:-1]
    return [*scored[:-1], (scored[-1][0], float(np.mean(last[:watched])))]


def stacks(group: Group[CostRow]) -> list[Stack]:
    """Memory, operations and time of every cell that was done, in their parts."""
    rows = [(row, name) for row, name in zip(group.rows, cost_names(group.rows), strict=True) if row.result.status == "done"]
    found = []
    for title, (unit, parts) in STACKS.items():
        bars = [Bar(name, sizes, *_spread(row, unit)) for row, name in rows if (sizes := _parts(row, unit, parts))]
        present = tuple(words(p) for p in parts if any(dict(bar.parts).get(words(p)) for bar in bars))
        bound = unit == "ms" and group.conditions["mode"] == "estimate"
        note = "Lower bounds by the rates of the named GPU, not times that were seen." if bound else ""
        if bars:
            found.append(_legible(Stack(title, unit, tuple(bars), present, note, bound)))
    return found


def _legible(stack: Stack) -> Stack:
    """In TFLOP where GFLOP would have six digits."""
    if stack.unit != "GFLOP" or max(bar.total for bar in stack.bars) < 1e4:
        return stack
    bars = (replace(bar, parts=tuple((name, size / 1e3) for name, size in bar.parts)) for bar in stack.bars)
    return replace(stack, unit="TFLOP", bars=tuple(bars))


def _parts(row: CostRow, unit: str, parts: Sequence[str]) -> tuple[tuple[str, float], ...]:
    r = row.result
    if unit == "GiB":
        return tuple((words(p), r.memory_gib[p]) for p in parts)
    if unit == "GFLOP":
        return tuple((words(p), r.flops[p] / 1e9) for p in parts)
    times = r.step_time_ms or {}
    found = {p: times[p]["median"] if isinstance(times[p], dict) else times[p] for p in parts if times.get(p) is not None}
    return tuple((words(p), value) for p, value in found.items())


def _spread(row: CostRow, unit: str) -> tuple[float | None, float | None]:
    total = (row.result.step_time_ms or {}).get("total")
    return tuple(total["quartiles"]) if unit == "ms" and isinstance(total, dict) else (None, None)


def speed_stack(rows: Sequence[CostRow]) -> Stack | None:
    """Images per second of every measured cell; None if none was."""
    bars = []
    for row in rows:
        r = row.result
        if r.mode != "measure" or (spread := row.quartiles(r.img_per_s)) is None:
            continue
        name = f"{row.label}; {r.backbone['name']}, {r.resolution} px, {r.what}, batch {r.batch}, {r.device}"
        bars.append(Bar(name, (("images/s", r.img_per_s),), *spread))
    return Stack("speed as measured", "images/s", tuple(bars), ("images/s",)) if bars else None


def predicted_chart(rows: Sequence[CostRow]) -> Chart | None:
    """Peak memory as estimated against as measured; None where no cell has both."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        r = row.result
        if r.mode == "measure" and r.predicted and r.peak_mem_gib is not None:
            told = r.predicted["peak_mem_gib"]
            about = f"{row.label}, {r.backbone['name']}, batch {r.batch}"
            tip = f"{about}: estimated {told:.3f}, measured {r.peak_mem_gib:.3f} GiB"
            found.setdefault(r.adapter, []).append(Point(told, r.peak_mem_gib, tip=tip))
    series = tuple(Series(name, tuple(points), i) for i, (name, points) in enumerate(found.items()))
    note = "On the diagonal the estimate is right."
    axes = ("estimated peak, GiB", "measured peak, GiB")
    return Chart("peak memory, predicted against measured", *axes, series, note, diagonal=True, zero=True) if series else None
