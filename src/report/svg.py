"""Charts as small SVG for the page. Colours come from the page's own style, so that one drawing serves light and dark.

Text is escaped here: what this module returns is markup.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from src.report.charts import Bar, Chart, Point, Stack
from src.report.tables import number

LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 12.0, 42.0
LETTER = 6.4  # width of a letter of the axes' 12 pixels, on average
ROW, THICK = 42.0, 15.0  # of a bar with its name above it


@dataclass(frozen=True)
class Scale:
    """From numbers to pixels along one axis."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between low and high: at most `most`, apart by 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10((high - low) / most))
    for step in (power * factor for factor in (1, 2, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [round(i * step, 12) for i in range(first, last + 1)]


def chart_svg(chart: Chart, width: int) -> str:
    """Points with their intervals, or lines, over two axes."""
    height = round(min(0.62 * width, 340))
    points = [p for s in chart.series for p in s.points]
    xs = [p.x for p in points]
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    if chart.diagonal:
        xs = ys = [*xs, *ys]
    x = Scale(*_range(xs, chart.zero), LEFT, width - RIGHT)
    y = Scale(*_range(ys, chart.zero), height - BOTTOM, TOP)
    parts = [*_x_axis(x, chart.x, width, height), *_y_axis(y, chart.y, width)]
    if chart.diagonal:
        parts.append(_line(x(x.low), y(x.low), x(x.high), y(x.high), "diagonal"))
    for s in chart.series:
        if s.line:
            path = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in s.points)
            parts.append(f'<polyline class="curve c{s.colour % 7} d{s.colour % 4}" points="{path}"/>')
        parts += [_point(p, x(p.x), y, s.colour) for p in s.points]
    return _svg(width, height, f"{chart.title}. {chart.x} across, {chart.y} upwards.", parts)


def stack_svg(stack: Stack, width: int) -> str:
    """Bars below each other, their names above them, their totals behind them."""
    height = TOP + ROW * len(stack.bars) + BOTTOM - 12
    most = max(max(bar.total, bar.high or 0.0) for bar in stack.bars) or 1.0
    x = Scale(0.0, most, 2.0, width - 74.0)
    parts = _x_axis(x, stack.unit, width, height, most=5)
    for i, bar in enumerate(stack.bars):
        parts += _bar(stack, bar, x, TOP + ROW * i)
    return _svg(width, height, f"{stack.title}, {stack.unit}", parts)


def legend(names: Iterable[tuple[str, int]], shapes: bool) -> list[tuple[str, str]]:
    """(name, a mark for it): the shape and colour of its points, or a square of its colour."""
    mark = [
        (name, marker(6, 6, colour) if shapes else f'<rect class="b{colour % 7}" width="12" height="12"/>')
        for name, colour in names
    ]
    return [
        (name, f'<svg class="mark" viewBox="0 0 12 12" width="12" height="12" aria-hidden="true">{m}</svg>') for name, m in mark
    ]


def marker(x: float, y: float, colour: int) -> str:
    """A point whose shape and colour tell its series."""
    shapes = ["M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-3.6-3.6h7.2v7.2h-7.2z", "M0-4.6 4.3 3.4h-8.6z", "M0-5 5 0 0 5-5 0z"]
    shapes += ["M-1.4-4.6h2.8v3.2h3.2v2.8h-3.2v3.2h-2.8v-3.2h-3.2v-2.8h3.2z", "M0 4.6-4.3-3.4h8.6z"]
    shapes += ["M-4.2-2.4-2.4-4.2 0-1.8 2.4-4.2 4.2-2.4 1.8 0 4.2 2.4 2.4 4.2 0 1.8-2.4 4.2-4.2 2.4-1.8 0z"]
    return f'<path class="m c{colour % 7}" transform="translate({x:.1f} {y:.1f})" d="{shapes[colour % 7]}"/>'


def _point(point: Point, x: float, y: Scale, colour: int) -> str:
    drawn = []
    if point.low is not None and point.high is not None:
        low, high = y(point.low), y(point.high)
        ends = f"M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"
        drawn.append(f'<path class="whisker c{colour % 7}" d="M{x:.1f} {low:.1f}V{high:.1f}{ends}"/>')
    drawn.append(marker(x, y(point.y), colour))
    hit = f'<circle class="hit" cx="{x:.1f}" cy="{y(point.y):.1f}" r="13"/>'
    return f'<g class="tip" tabindex="0" data-tip="{escape(point.tip)}">{"".join(drawn)}{hit}</g>'


def _bar(stack: Stack, bar: Bar, x: Scale, top: float) -> list[str]:
    parts, done = [f'<text class="name" x="2" y="{top + 13:.1f}">{escape(bar.name)}</text>'], 0.0
    colours = {name: i for i, name in enumerate(stack.parts)}
    for name, size in bar.parts:
        if size > 0:
            tip = f"{bar.name}: {name} {number(size)} {stack.unit}, {100 * size / bar.total:.0f} % of {number(bar.total)}"
            drawn = f'<rect class="tip b{colours.get(name, 0) % 7}" x="{x(done):.1f}" y="{top + 18:.1f}"'
            parts.append(f'{drawn} width="{x(done + size) - x(done):.2f}" height="{THICK}" data-tip="{escape(tip)}"/>')
        done += size
    if bar.low is not None and bar.high is not None:
        middle = top + 18 + THICK / 2
        ends = f"M{x(bar.low):.1f} {middle - 4:.1f}v8M{x(bar.high):.1f} {middle - 4:.1f}v8"
        parts.append(f'<path class="whisker ink" d="M{x(bar.low):.1f} {middle:.1f}H{x(bar.high):.1f}{ends}"/>')
    sign = "\u2265 " if stack.bound else ""
    end = x(max(done, bar.high or 0.0)) + 6
    return [*parts, f'<text x="{end:.1f}" y="{top + 18 + THICK - 3.5:.1f}">{sign}{number(bar.total)}</text>']


def _x_axis(x: Scale, title: str, width: float, height: float, most: int = 7) -> list[str]:
    places = ticks(x.low, x.high, max(3, min(most, int((x.end - x.start) / 62))))
    bottom = height - BOTTOM
    parts = [_line(x(place), TOP, x(place), bottom, "grid") for place in places]
    labels = _labels(places)
    for place, label in zip(map(x, places), labels, strict=True):
        side = "mid" if place > LETTER * len(label) / 2 else "start"  # the zero of bars stands at the edge
        parts.append(f'<text class="{side}" x="{place:.1f}" y="{bottom + 16:.1f}">{label}</text>')
    return [*parts, f'<text class="mid axis" x="{(x.start + x.end) / 2:.1f}" y="{height - 6:.1f}">{escape(title)}</text>']


def _y_axis(y: Scale, title: str, width: float) -> list[str]:
    places = ticks(y.low, y.high, 6)
    parts = [_line(LEFT, y(place), width - RIGHT, y(place), "grid") for place in places]
    labels = _labels(places)
    parts += [
        f'<text class="end" x="{LEFT - 6}" y="{y(p) + 4:.1f}">{label}</text>' for p, label in zip(places, labels, strict=True)
    ]
    middle = (y.start + y.end) / 2
    return [*parts, f'<text class="mid axis" transform="translate(12 {middle:.1f}) rotate(-90)">{escape(title)}</text>']


def _labels(places: Sequence[float]) -> list[str]:
    """As many digits as tell the ticks apart."""
    step = places[1] - places[0] if len(places) > 1 else abs(places[0]) or 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{place:,.{digits}f}" for place in places]


def _range(values: Sequence[float], zero: bool) -> tuple[float, float]:
    """From the smallest to the largest with some air; from zero where that is asked for."""
    low, high = min(values), max(values)
    air = 0.08 * (high - low) or 0.08 * abs(high) or 0.5
    return (0.0 if zero else low - air if low - air > 0 or low < 0 else min(low, 0.0)), high + air


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def _svg(width: float, height: float, says: str, parts: Sequence[str]) -> str:
    box = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    return f'<svg {box} role="img" aria-label="{escape(says)}">{"".join(parts)}</svg>'
