"""Charts as files for a paper or a README: PNG and SVG of the same drawing. The same input gives the same bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.plots import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, figure_of, save
from src.report.charts import Chart, Stack
from src.report.tables import number

COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
MARKERS, DASHES = "osPD^vX", ("-", "--", "-.", ":")
ENDINGS = (".png", ".svg")


def draw_charts(charts: Sequence[Chart], stem: Path) -> list[Path]:
    """Charts beside each other in one figure. -> its files, [] where there is nothing to draw."""
    if not charts:
        return []
    across = min(len(charts), 2)
    down = -(-len(charts) // across)
    with figure_of(4.8 * across, 3.6 * down) as figure:
        for place, chart in enumerate(charts):
            _chart(figure.add_subplot(down, across, place + 1), chart)
        return _saved(figure, stem)


def draw_stacks(found: Sequence[Stack], stem: Path, title: str) -> list[Path]:
    """Memory, operations and time of the same cells beside each other. -> files, [] where there is nothing to draw."""
    if not found:
        return []
    names = list(dict.fromkeys(bar.name for stack in found for bar in stack.bars))
    with figure_of(1.8 + 3.9 * len(found), 2.1 + 0.34 * len(names)) as figure:
        figure.suptitle(title, fontsize=10)
        for place, stack in enumerate(found):
            axes = figure.add_subplot(1, len(found), place + 1)
            _stack(axes, stack, names)
            if place:
                axes.set_yticklabels([])
        return _saved(figure, stem)


def _chart(axes: Any, chart: Chart) -> None:
    axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    told = set()  # seeds of one method have one line in the legend
    for s in chart.series:
        colour, marker = COLOURS[s.colour % 7], MARKERS[s.colour % 7]
        xs, ys = [p.x for p in s.points], [p.y for p in s.points]
        axes.plot(xs, ys, color=colour, marker=marker, linestyle=DASHES[s.colour % 4] if s.line else "",
                  label=None if s.name in told else s.name)  # fmt: skip
        told.add(s.name)
        for p in s.points:
            if p.low is not None and p.high is not None:
                axes.vlines(p.x, p.low, p.high, color=colour, linewidth=1.2)
    if chart.zero:
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    if chart.diagonal:
        most = max(axes.get_xlim()[1], axes.get_ylim()[1])
        axes.plot([0, most], [0, most], color="0.6", linewidth=0.8, zorder=0)
    axes.legend(frameon=False, fontsize=8)


def _stack(axes: Any, stack: Stack, names: Sequence[str]) -> None:
    axes.set(title=stack.title, xlabel=f"{stack.unit}, lower bound" if stack.bound else stack.unit)
    places = {name: len(names) - 1 - i for i, name in enumerate(names)}
    done = dict.fromkeys(names, 0.0)
    for i, part in enumerate(stack.parts):
        sizes = {bar.name: dict(bar.parts).get(part, 0.0) for bar in stack.bars}
        left = [done[name] for name in sizes]
        axes.barh([places[n] for n in sizes], list(sizes.values()), left=left, color=COLOURS[i % 7], label=part, height=0.7)
        done = {name: done[name] + sizes.get(name, 0.0) for name in names}
    for bar in stack.bars:
        if bar.low is not None and bar.high is not None:
            axes.hlines(places[bar.name], bar.low, bar.high, color="black", linewidth=1)
        axes.annotate(f" {number(bar.total)}", (max(bar.total, bar.high or 0.0), places[bar.name]), va="center", fontsize=7)
    axes.set_yticks([places[name] for name in names], names, fontsize=8)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlim(0, 1.16 * max(max(bar.total, bar.high or 0.0) for bar in stack.bars) or 1)
    axes.locator_params(axis="x", nbins=5)
    below = -0.6 / (0.34 * len(names))  # inches over the height of the axes
    axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, below))


def _saved(figure: Any, stem: Path) -> list[Path]:
    files = [stem.with_name(stem.name + ending) for ending in ENDINGS]
    for file in files:
        save(figure, file)
    return files
