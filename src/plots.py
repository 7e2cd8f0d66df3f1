"""Pictures of a run: training curves, sample grids, loss curves for model cards. The same input gives the same bytes."""

import textwrap
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from src.results import ResultError, read_rows

# Okabe and Ito's palette: told apart with every kind of colour vision; markers and dashes say the same once more
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#333333"
ARMS = {
    "": ("right condition", BLUE, "o", "-"),
    "wrong_condition": ("wrong condition", VERMILION, "s", "--"),
    "no_condition": ("no condition", BLACK, "^", ":"),
    "zero_condition": ("zero condition", GREEN, "D", "-."),
}
OTHER_ARMS = [(ORANGE, "v", "--"), (PURPLE, "P", "-."), (SKY, "X", ":")]
STYLE = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.right": False, "axes.spines.top": False}
STYLE |= {"svg.hashsalt": "controlbench"}  # names inside an SVG are otherwise drawn at random
NO_SCORE = ("loss", "steps_to_control", "images_to_control")  # of the val/ metrics; they have no panel of a score
CELL_GAP, MARGIN, LINE, TITLES = 4, 8, 14, 165  # pixels of a sheet: between cells, around, a line of text, row titles
GRID_ROWS = 6  # scenes of a validation that are shown, in columns
GRID_COLUMNS = ("source", "condition", "no control", "controlled", "wrong condition", "its output")  # of a validation


def plot_curves(jsonl_path: str | Path, out_png: str | Path) -> None:
    """metrics.jsonl -> one PNG: losses, one panel per validation score with its arms, images/s; x is images_seen.

    A score is any `val/<metric>`, its arms are `val/<metric>/<arm>`; a second x axis shows its wall clock.
    Raises ResultError for a log without rows.
    """
    rows = read_rows(jsonl_path)
    if not rows:
        raise ResultError(f"{jsonl_path} has no rows: nothing to plot")
    scores = list(dict.fromkeys(key.split("/")[1] for row in rows for key in row if key.startswith("val/")))
    panels = ["loss", *(name for name in scores if name not in NO_SCORE)]
    panels += ["speed"] if any("train/img_per_s" in row for row in rows) else []
    across = 2 if len(panels) in (2, 4) else min(3, len(panels))
    down = -(-len(panels) // across)
    with figure_of(4.6 * across, 3.4 * down) as figure:
        for place, name in enumerate(panels):
            axes = figure.add_subplot(down, across, place + 1)
            if place == 0:
                _loss_panel(axes, rows)
            elif name == "speed" and place == len(panels) - 1:
                _speed_panel(axes, rows)
            else:
                _score_panel(axes, rows, name)
            axes.set_xlabel("images seen")
        save(figure, out_png)


def plot_loss_curve(rows: Sequence[Mapping[str, Any]], x: str, ys: Sequence[str], out_png: str | Path, title: str) -> None:
    """One panel for a model card: each of `ys` against `x`, raw where there are few points, else raw and smoothed.

    rows: as of `read_rows`; a row without a column is skipped for that curve. Raises ResultError if a column is nowhere.
    """
    with figure_of(6.0, 3.6) as figure:
        axes = figure.add_subplot()
        for y, colour in zip(ys, [BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK], strict=False):
            xs, values = _column(rows, y, x)
            if not len(xs):
                raise ResultError(
                    f"no row has both {x} and {y}; known are {', '.join(sorted({k for row in rows for k in row}))}"
                )
            _curve(axes, xs, values, y, colour)
        axes.set(title=title, xlabel=x.replace("_", " "), ylabel=ys[0] if len(ys) == 1 else "")
        axes.legend(frameon=False)
        save(figure, out_png)


def plot_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    column_titles: Sequence[str],
    out_png: str | Path,
    row_titles: Sequence[str] | None = None,
    scale: int = 2,
) -> None:
    """Rows of (H, W, 3) uint8 pictures -> one labelled PNG, each pixel drawn as scale x scale pixels.

    None leaves a cell empty; row titles, such as captions, are wrapped to the left of their row.
    Raises ValueError naming the cell that is no uint8 picture, or titles that do not fit.
    """
    _check_grid(rows, column_titles, row_titles, scale)
    font = ImageFont.load_default(size=12)
    height = scale * max((cell.shape[0] for row in rows for cell in row if cell is not None), default=1)
    width = scale * max((cell.shape[1] for row in rows for cell in row if cell is not None), default=1)
    left = MARGIN + (TITLES if row_titles else 0)
    heads = [_wrapped(title, width - 2 * CELL_GAP, font) for title in column_titles]
    top = MARGIN + LINE * max((len(head) for head in heads), default=0) + CELL_GAP
    size = (left + len(column_titles) * (width + CELL_GAP) + MARGIN, top + len(rows) * (height + CELL_GAP) + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for c, head in enumerate(heads):
        for i, line in enumerate(head):
            draw.text((left + c * (width + CELL_GAP), MARGIN + i * LINE), line, fill="black", font=font)
    for r, row in enumerate(rows):
        y = top + r * (height + CELL_GAP)
        for i, line in enumerate(_wrapped(row_titles[r], 142, font)[: max(1, height // LINE)] if row_titles else []):
            draw.text((MARGIN, y + i * LINE), line, fill="black", font=font)
        for c, cell in enumerate(row):
            x = left + c * (width + CELL_GAP)
            if cell is None:
                draw.rectangle((x, y, x + width - 1, y + height - 1), fill="#EEEEEE")
            else:
                sheet.paste(Image.fromarray(np.repeat(np.repeat(cell, scale, 0), scale, 1)), (x, y))
    Path(out_png).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out_png, format="PNG")


def read_grid(sheet_png: str | Path, column_titles: Sequence[str], scale: int = 2) -> list[list[np.ndarray]] | None:
    """The pictures of a sheet that `plot_grid` drew with row titles, exactly as they were given to it; None for another sheet.

    For square pictures. Whether a cell is one shows in its pixels: each was drawn as a block of scale x scale equal ones.
    """
    with Image.open(sheet_png) as image:
        sheet = np.asarray(image.convert("RGB"))
    left, columns = MARGIN + TITLES, len(column_titles)
    size = (sheet.shape[1] - left - MARGIN) // columns - CELL_GAP
    if size < scale or size % scale or left + columns * (size + CELL_GAP) + MARGIN != sheet.shape[1]:
        return None
    font = ImageFont.load_default(size=12)
    top = MARGIN + LINE * max(len(_wrapped(title, size - 2 * CELL_GAP, font)) for title in column_titles) + CELL_GAP
    count, rest = divmod(sheet.shape[0] - top - MARGIN, size + CELL_GAP)
    if rest or count < 1:
        return None
    places = [[(top + r * (size + CELL_GAP), left + c * (size + CELL_GAP)) for c in range(columns)] for r in range(count)]
    blocks = [[sheet[y : y + size, x : x + size] for y, x in row] for row in places]
    cells = [[block[::scale, ::scale].copy() for block in row] for row in blocks]
    same = all(
        np.array_equal(np.repeat(np.repeat(cell, scale, 0), scale, 1), block)
        for row, drawn in zip(cells, blocks, strict=True)
        for cell, block in zip(row, drawn, strict=True)
    )
    return cells if same else None


def _check_grid(rows: Sequence[Sequence[Any]], column_titles: Sequence[str], row_titles: Any, scale: int) -> None:
    if not rows or scale < 1 or int(scale) != scale:
        raise ValueError(f"a grid wants at least one row and a whole scale of at least 1, got {len(rows)} rows, scale {scale}")
    if row_titles is not None and len(row_titles) != len(rows):
        raise ValueError(f"{len(row_titles)} row titles for {len(rows)} rows")
    for r, row in enumerate(rows):
        if len(row) != len(column_titles):
            raise ValueError(f"row {r} has {len(row)} pictures for {len(column_titles)} column titles")
        for c, cell in enumerate(row):
            if cell is not None and (cell.dtype != np.uint8 or cell.ndim != 3 or cell.shape[2] != 3):
                raise ValueError(f"row {r}, column {c}: wanted (H, W, 3) uint8, got {cell.shape} {cell.dtype}")


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    """Lines that fit into `width` pixels, as far as words allow."""
    letter = max(1.0, font.getlength(text or "x") / max(1, len(text)))
    return textwrap.wrap(text, max(4, int(width / letter))) or [""]


def _loss_panel(axes: Any, rows: list[dict[str, Any]]) -> None:
    axes.set_title("loss")
    xs, values = _column(rows, "train/loss")
    _curve(axes, xs, values, "train", BLUE)
    for key in dict.fromkeys(key for row in rows for key in row if key == "val/loss" or key.startswith("val/loss/")):
        xs, values = _column(rows, key)
        label, colour = ("validation", VERMILION) if key == "val/loss" else (key, ORANGE)
        axes.plot(xs, values, color=colour, marker="o", markersize=3.5, label=label)
    if axes.lines:
        axes.legend(frameon=False)


def _score_panel(axes: Any, rows: list[dict[str, Any]], name: str) -> None:
    axes.set_title(f"val/{name}")
    arms = list(dict.fromkeys(key[len(f"val/{name}") :].lstrip("/") for row in rows for key in row if _is_score(key, name)))
    spare = iter(OTHER_ARMS * len(arms))
    for arm in sorted(arms, key=lambda arm: list(ARMS).index(arm) if arm in ARMS else len(ARMS)):
        label, colour, marker, dashes = ARMS[arm] if arm in ARMS else (arm.replace("_", " "), *next(spare))
        xs, values = _column(rows, f"val/{name}/{arm}" if arm else f"val/{name}")
        axes.plot(xs, values, color=colour, marker=marker, linestyle=dashes, markersize=4, label=label)
    if len(arms) > 1:
        axes.legend(frameon=False)
    _clock_axis(axes, rows)


def _is_score(key: str, name: str) -> bool:
    return key == f"val/{name}" or key.startswith(f"val/{name}/")


def _speed_panel(axes: Any, rows: list[dict[str, Any]]) -> None:
    axes.set_title("training speed")
    axes.set_ylabel("images/s")
    xs, values = _column(rows, "train/img_per_s")
    _curve(axes, xs, values, "images/s", GREEN)
    axes.set_ylim(bottom=0)


def _curve(axes: Any, xs: np.ndarray, values: np.ndarray, label: str, colour: str) -> None:
    """Few points: as they are. Many: light, with their moving average over a thirtieth of the run on top."""
    lost = int((~np.isfinite(values)).sum())
    label += f", {lost} not finite" if lost else ""
    if len(xs) < 60:
        axes.plot(xs, values, color=colour, label=label)
        return
    axes.plot(xs, values, color=colour, alpha=0.25, linewidth=0.7)
    half = max(2, len(values) // 60)
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    start, stop = np.maximum(np.arange(len(values)) - half, 0), np.minimum(np.arange(len(values)) + half + 1, len(values))
    smooth = (sums[stop] - sums[start]) / np.maximum(counts[stop] - counts[start], 1)
    axes.plot(xs, smooth, color=colour, linewidth=1.6, label=f"{label} (mean of {2 * half + 1})")


def _clock_axis(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Seconds of wall clock above the panel, at the images that had been seen by then."""
    from matplotlib.ticker import MaxNLocator

    images, seconds = _column(rows, "time_s")
    if len(images) < 2 or seconds.max() <= seconds.min():
        return
    seconds = np.maximum.accumulate(seconds)
    unit, name = next((u, n) for u, n, most in ((1, "s", 300), (60, "min", 10800), (3600, "h", np.inf)) if seconds[-1] <= most)
    places, labels = [], []
    for tick in MaxNLocator(6).tick_values(seconds[0] / unit, seconds[-1] / unit):
        place = np.interp(tick * unit, seconds, images)
        apart = not places or place - places[-1] > 0.07 * (images[-1] - images[0])  # a pause puts many ticks on one image
        if seconds[0] <= tick * unit <= seconds[-1] and apart:
            places.append(place)
            labels.append(f"{tick:g}")
    clock = axes.secondary_xaxis("top")
    clock.set_xticks(places, labels)
    clock.set_xlabel(f"wall clock ({name})")


def _column(rows: Sequence[Mapping[str, Any]], y: str, x: str = "images_seen") -> tuple[np.ndarray, np.ndarray]:
    """((N,), (N,)) of the rows that have both, in the order of x; texts such as "nan" become numbers."""
    pairs = [(float(row[x]), float(row[y])) for row in rows if row.get(x) is not None and row.get(y) is not None]
    table = np.array(sorted(pairs, key=lambda pair: pair[0])).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@contextmanager
def figure_of(width: float, height: float) -> Any:
    """A figure without pyplot and without the user's own style: no window, no global state, the same look everywhere."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.1)
        FigureCanvasAgg(figure)
        yield figure


def save(figure: Any, file: str | Path) -> None:
    """As PNG or SVG, by the name's ending, without the date and the program that drew it."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}[file.suffix]
    figure.savefig(file, format=file.suffix[1:], metadata=metadata)
