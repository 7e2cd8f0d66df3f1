"""Results as tables: Markdown to read, CSV to compute with, and the paired difference of every two runs."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from src.metrics.intervals import bootstrap_ci
from src.report.rows import Row

CSV_FIELDS = (
    "experiment", "adapter", "backbone", "backbone_hash", "task", "seed", "resolution", "images_seen", "effective_batch",
    "trainable_m", "train_seconds", "img_per_s", "peak_mem_gib", "device", "precision",
    "metric", "value", "low", "high", "n", "unit", "better", "git_sha", "git_dirty", "date", "command",
)  # fmt: skip


def markdown(grouped: Sequence[tuple[dict[str, Any], list[Row]]]) -> str:
    """Every group as a heading with its conditions, a table of its runs, their paired differences, and their commands."""
    return "\n\n".join(_section(conditions, rows) for conditions, rows in grouped) + "\n"


def _section(conditions: dict[str, Any], rows: list[Row]) -> str:
    main = rows[0].main_metric
    heads = [main, f"{main}/gain_over_wrong_condition", f"{main}/gain_over_no_condition"]
    titles = [main, "minus that of a wrong condition", "minus that of none"]
    shared = set.intersection(*(set(row.result.metrics) for row in rows))
    others = [name for name in rows[0].result.metrics if "/" not in name and name in shared and name != main]
    columns = ["adapter", "seed", "trained, M", *titles, *others, "train s"]
    lines = [_line(columns), _line(["---"] * len(columns))]
    for row in rows:
        r = row.result
        cells = [r.adapter, str(r.seed), f"{r.trainable_m:.2f}", *(_value(r.metrics.get(name)) for name in heads)]
        cells += [_number(r.metrics[name]) for name in others]
        lines.append(_line([*cells, f"{r.train_seconds:.0f}"]))
    parts = [f"## {conditions['backbone']}, {conditions['task']}", _conditions(conditions), "\n".join(lines)]
    differences = paired_table(rows)
    if differences:
        parts.append(differences)
    parts.append("\n".join(f"- {row.label}: `{row.result.command}` at {_commit(row)}" for row in rows))
    return "\n\n".join(parts)


def _conditions(c: dict[str, Any]) -> str:
    return (
        f"{c['images_seen']:,} images in batches of {c['effective_batch']}, {c['resolution']} pixels; scored on n = {c['n']} "
        f"held-out images, {c['sampling_steps']} steps of {c['solver']}, guidance {c['guidance']}. 95 % intervals, over images."
    )


def paired_table(rows: list[Row]) -> str:
    """Differences of the control score between every two runs over the same images, with their intervals; "" where the
    runs kept no scores per image, or not of the same images."""
    kept = [row for row in rows if row.scores is not None]
    if len(kept) < 2 or any(row.ids != kept[0].ids for row in kept):
        return ""
    metric = kept[0].main_metric
    lines = [_line([f"{metric}: row minus column", *(row.label for row in kept[:-1])]), _line(["---"] * len(kept))]
    for i, row in enumerate(kept[1:], 1):
        cells = [_difference(row, other, metric) for other in kept[:i]]
        lines.append(_line([row.label, *cells, *[""] * (len(kept) - 1 - i)]))
    return "\n".join(lines)


def _difference(row: Row, other: Row, metric: str) -> str:
    gap = row.scores[metric] - other.scores[metric]
    return _signed(float(np.mean(gap)), bootstrap_ci(gap))


def csv_text(rows: Sequence[Row]) -> str:
    """One line per run and metric."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        r = row.result
        same = {name: getattr(r, name) for name in CSV_FIELDS if hasattr(r, name)}
        same |= {"backbone": r.backbone["id"], "backbone_hash": r.backbone["hash"]}
        for name, m in r.metrics.items():
            low, high = m["ci95"] or (None, None)
            own = {"metric": name, "low": low, "high": high, **{k: m[k] for k in ("value", "n", "unit", "better")}}
            writer.writerow(same | own)
    return out.getvalue()


def _value(m: dict[str, Any] | None) -> str:
    if m is None:
        return ""
    return f"{m['value']:.3f}" + (f" [{m['ci95'][0]:.3f}, {m['ci95'][1]:.3f}]" if m["ci95"] else "")


def _number(m: dict[str, Any]) -> str:
    return f"{m['value']:,.0f}" if m["n"] == 1 else f"{m['value']:.3f}"  # a count, such as images_to_control; a mean


def _signed(value: float, interval: tuple[float, float]) -> str:
    return f"{value:+.3f} [{interval[0]:+.3f}, {interval[1]:+.3f}]"


def _commit(row: Row) -> str:
    return row.result.git_sha[:7] + (" with uncommitted changes" if row.result.git_dirty else "")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
