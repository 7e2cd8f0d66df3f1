"""Results as tables: one form for Markdown and for the page, where every number knows its run; and CSV to compute with."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from src.report.groups import Group, said
from src.report.names import differing
from src.report.names import said as typed
from src.report.rows import CostRow, Row

CSV_FIELDS = (
    "experiment", "adapter", "backbone", "backbone_hash", "task", "seed", "resolution", "images_seen", "effective_batch",
    "trainable_m", "train_seconds", "img_per_s", "img_per_s_low", "img_per_s_high", "peak_mem_gib", "device", "precision",
    "metric", "value", "low", "high", "n", "unit", "better", "git_sha", "git_dirty", "date", "command", "kind",
    "small_n", "method", "learning_rate", "recipe", "caption_dropout", "noise_seed", "subject", "manifest", "config_sha",
)  # fmt: skip
SPEED = "images/s, median and quartiles"
TWICE = "steps_to_control"  # says the same as images_to_control
ARROWS = {"higher": " \u2191", "lower": " \u2193", None: ""}

ARMS = {
    "wrong_condition": "minus that of a wrong condition",
    "no_condition": "minus that of none",
    "no_control_arm": "minus the no-control arm",
}
TRAINED = {"learning_rate": "learning rate", "recipe": "recipe", "caption_dropout": "caption dropout"}
EXTRA = {"images_seen": ("images seen", "{:,}"), "train_seconds": ("train s", "{:.0f}")}


@dataclass(frozen=True)
class Cell:
    """A field of a table. value: to sort by; runs: places of the rows that it came from; metric, n, interval: its proof."""

    text: str
    value: float | None = None
    runs: tuple[str, ...] = ()
    metric: str = ""
    n: int | None = None
    interval: tuple[float, float] | None = None
    unit: str = ""


@dataclass
class Table:
    """columns: titles; rows: cells as many, the first of each a name. about: one sentence above it; fold: what stands in its
    place on the page until it is opened. A column without a text is left out; numbers: columns that hold any."""

    columns: list[str]
    rows: list[list[Cell]]
    about: str = ""
    fold: str = ""
    numbers: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        kept = [c for c in range(len(self.columns)) if c == 0 or any(row[c].text for row in self.rows)]
        self.columns, self.rows = [self.columns[c] for c in kept], [[row[c] for c in kept] for row in self.rows]
        self.numbers = {c for c in range(len(self.columns)) if any(row[c].value is not None for row in self.rows)}


def score_table(group: Group[Row]) -> Table:
    """A row per run: its size, its control score with what it gains over other conditions, other scores, its time; and its
    learning rate, recipe and caption dropout where these are not one for all."""
    rows, main = group.rows, group.rows[0].main_metric
    gains = {f"{main}/gain_over_{arm}": words for arm, words in ARMS.items()}
    gains = {name: words for name, words in gains.items() if any(name in row.result.metrics for row in rows)}
    others = [name for name in bare(rows) if name != main]
    apart = differing([row.result.design or {} for row in rows])
    trained = {name: title for name, title in TRAINED.items() if name in apart}
    better = rows[0].result.metrics[main]["better"]
    titles = ["adapter", "seed", *trained.values(), "trained, M", main + ARROWS[better], *gains.values()]
    titles += [
        name + ARROWS[next(r.result.metrics[name]["better"] for r in rows if name in r.result.metrics)] for name in others
    ]
    extra = {k: v for k, v in EXTRA.items() if any(getattr(row.result, k, None) is not None for row in rows)}
    if "train_seconds" in extra:
        del extra["images_seen"]  # of trainings a condition
    table = []
    for row in rows:
        r, of = row.result, (row.place,)
        cells = [
            Cell(row.name or r.adapter),
            _plain(r.seed, "{}", of, "seed"),
            *(_trained((r.design or {}).get(name), of, title) for name, title in trained.items()),
            _plain(r.trainable_m, "{:.2f}", of, "trained, M"),
        ]
        cells += [metric_cell(row, name) for name in (main, *gains, *others)]
        cells += [_plain(getattr(r, name), form, of, title) for name, (title, form) in extra.items()]
        table.append([*cells, _speed(row)])
    return Table([*titles, *(title for title, _ in extra.values()), SPEED], table)


def _speed(row: Row) -> Cell:
    """Images per second with their quartiles."""
    r = row.result
    if r.img_per_s is None:
        return Cell("")
    low, high = r.img_per_s_quartiles
    text = f"{r.img_per_s:.1f} [{low:.1f}, {high:.1f}]"
    return Cell(text, r.img_per_s, (row.place,), SPEED, interval=(low, high), unit="images/s")


def bare(rows: Iterable[Row]) -> list[str]:
    """Names of all metrics of the right condition, without arms and gains, in the order in which they were written."""
    return [n for n in dict.fromkeys(n for row in rows for n in row.result.metrics) if "/" not in n and n != TWICE]


def metric_cell(row: Row, name: str) -> Cell:
    """One number of one run with its interval; empty where the run has none of that name."""
    m = row.result.metrics.get(name)
    if m is None:
        return Cell("")
    text = f"{m['value']:,.0f}" if m["n"] == 1 else number(m["value"])  # a count, such as images_to_control; a mean
    interval = tuple(m["ci95"]) if m["ci95"] else None
    if m.get("small_n"):
        text += " (small n)"
    if interval:
        text += f" [{number(interval[0])}, {number(interval[1])}]"
    return Cell(text, m["value"], (row.place,), name, m["n"], interval, m["unit"])


def markdown_table(table: Table) -> str:
    """As Markdown; bars in names are written out."""
    lines = [_line(table.columns), _line(["---"] * len(table.columns))]
    lines += [_line([cell.text for cell in row]) for row in table.rows]
    return "\n".join([*([table.about, ""] if table.about else []), *lines])


def score_conditions(c: dict[str, Any]) -> str:
    """What all rows of a table of scores share, in a sentence or two."""
    seen = f"{c['images_seen']:,} images in batches of {c['effective_batch']}, " if "images_seen" in c else ""
    where = f"{c['device']}, {c['precision']}" if "device" in c else c["precision"]
    parts = [
        f"{seen}{c['resolution']} pixels; scored on n = {c['n']} held-out images, {said(c['sampling_steps'])} steps of "
        f"{said(c['solver'])}, guidance {said(c['guidance'])}; {where}. 95 % intervals, over images."
    ]
    settings = c.get("task_settings")
    parts += [f"Task: {said(settings)}."] if settings else []
    parts += [f"Data: {said(c['data'])}."] if c.get("data") else []
    if "manifest" in c:
        parts.append(f"Set {c['evaluation_set']['name']}, manifest {c['manifest'][:16]}.")
    return " ".join([*parts, f"Backbone hash {c['backbone_hash']}."])


def commit(row: Row | CostRow) -> str:
    """Of which code a row came."""
    return row.result.git_sha[:7] + (" with uncommitted changes" if row.result.git_dirty else "")


def csv_text(rows: Iterable[Row]) -> str:
    """One line per run and metric."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        r = row.result
        same = {name: getattr(r, name) for name in CSV_FIELDS if hasattr(r, name)} | {"kind": r.kind}
        same |= {"backbone": r.backbone["id"], "backbone_hash": r.backbone["hash"], "noise_seed": row.noise_seed}
        same |= {"method": row.name or r.adapter, **{name: (r.design or {}).get(name) for name in TRAINED}}
        slow, fast = r.img_per_s_quartiles or (None, None)
        same |= {"img_per_s_low": slow, "img_per_s_high": fast}
        for name, m in r.metrics.items():
            low, high = m["ci95"] or (None, None)
            own = {"metric": name, "low": low, "high": high, "small_n": m.get("small_n")}
            own |= {k: m[k] for k in ("value", "n", "unit", "better")}
            writer.writerow(same | own)
    return out.getvalue()


def number(value: float) -> str:
    """A mean with as many digits as it deserves: four or so."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.{1 if size >= 100 else 2 if size >= 10 else 3}f}"


def signed(value: float) -> str:
    """A difference."""
    return ("+" if value >= 0 else "") + number(value)


def _trained(value: Any, of: tuple[str, ...], title: str) -> Cell:
    """A learning rate or a dropout, to sort by; a recipe by its name; empty where it is not known."""
    number_of = value if isinstance(value, int | float) else None
    return Cell("") if value is None else Cell(typed(value), number_of, of, title)


def _plain(value: float | None, form: str, runs: tuple[str, ...], metric: str) -> Cell:
    return Cell("") if value is None else Cell(form.format(value), value, runs, metric)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
