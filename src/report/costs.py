"""Costs as tables: memory and its parts, operations, time, and estimates beside measurements."""

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

from src.report.groups import Group, said
from src.report.names import cost_names
from src.report.rows import CostRow
from src.report.tables import Cell, Table, number
from src.results.cost import FLOPS, LATENCY, MEMORY, PHASES

SAID = ("compile", "optimizer", "optimizer_kernel", "quantize", "tf32_matmul", "channels_last", "ema", "threads")
WORDS = {"frozen_weights": "frozen weights", "trainable_weights": "trained weights", "ema": "average"}
TOLD = (
    "What was estimated before each measurement, and what came out. Of a CPU's memory, measured is what the tensors of a real "
    "step came to; of a GPU's, what its allocator handed out."
)
CSV_FIELDS = (
    "adapter", "backbone", "mode", "what", "status", "resolution", "batch", "precision", "checkpointing", "naive", "device",
    "hardware", "trainable_m", "frozen_m", "quantity", "value", "low", "high", "n", "unit", "bound",
    "git_sha", "git_dirty", "date", "command",
)  # fmt: skip


def words(part: str) -> str:
    """A part of memory, of the operations or of a step, as a reader says it."""
    return WORDS.get(part, part.replace("_", " "))


def memory_table(group: Group[CostRow]) -> Table:
    """A row per cell: its peak in GiB, the parts that add up to it on the tensors' own account, and when it is reached."""
    table = []
    for row, name in zip(group.rows, cost_names(group.rows), strict=True):
        r, of = row.result, (row.place,)
        cells = [Cell(name), Cell(f"{r.trainable_m:,.1f}", r.trainable_m, of, "trained, M")]
        if r.status == "oom":
            table.append([*cells, Cell("out of memory", None, of), *[Cell("")] * (len(MEMORY) + 1)])
            continue
        cells.append(Cell(number(r.peak_mem_gib), r.peak_mem_gib, of, "peak memory", unit="GiB"))
        cells += [Cell(number(r.memory_gib[p]), r.memory_gib[p], of, words(p), unit="GiB") for p in MEMORY]
        table.append([*cells, Cell(r.peak_when)])
    return Table(["adapter", "trained, M", "peak, GiB", *map(words, MEMORY), "peaks in"], table, "Memory, in GiB.")


def time_table(group: Group[CostRow]) -> Table:
    """A row per cell: operations in 10^9, milliseconds of a step (medians with quartiles, or bounds), speed."""
    table = []
    for row, name in zip(group.rows, cost_names(group.rows), strict=True):
        r, of = row.result, (row.place,)
        if r.status == "oom":
            table.append([Cell(name), *[Cell("")] * (len(FLOPS) + len(PHASES) + len(LATENCY) + 3)])
            continue
        cells = [Cell(name)]
        cells += [Cell(number(r.flops[p] / 1e9), r.flops[p] / 1e9, of, words(p), unit="GFLOP") for p in FLOPS]
        times = r.step_time_ms or {}
        cells += [time_cell(times.get(p), times.get("bound", False), of, words(p)) for p in PHASES]
        latency = r.latency_ms or {}
        cells += [time_cell(latency.get(p), False, of, f"latency, {p}") for p in LATENCY]
        cells.append(time_cell(_over(latency.get("batch"), r.batch), False, of, "latency, per image"))
        cells += [_speed(row, r.img_per_s, ",.2f", "images/s"), _speed(row, r.mfu, ".1%", "MFU")]
        table.append(cells)
    titles = [*(f"{words(p)}, GFLOP" for p in FLOPS), *(f"{words(p)}, ms" for p in PHASES)]
    titles += [*(f"latency of a {part}, ms" for part in LATENCY), "latency per image, ms"]  # of drawing pictures alone
    bound = group.conditions["mode"] == "estimate"
    rates = group.conditions.get("rates") or {}
    about = f"Lower bounds from the rates of {rates.get('gpu')}." if bound and rates else ""
    about = about or ("No bound on time: no rates are known for this device." if bound else "Medians with quartiles.")
    return Table(["adapter", *titles, "images/s", "MFU"], table, f"Operations and time of one step. {about}")


def _speed(row: CostRow, value: float | None, form: str, name: str) -> Cell:
    """A measured speed with its quartiles."""
    if (spread := row.quartiles(value)) is None:
        return Cell("")
    low, high = spread
    text = f"{value:{form}} [{low:{form}}, {high:{form}}]"
    return Cell(text, value, (row.place,), f"{name}, median and quartiles", interval=spread)


def _over(entry: Any, count: int) -> Any:
    """A measured time over how many share it."""
    if entry is None:
        return None
    return entry | {"median": entry["median"] / count, "quartiles": [q / count for q in entry["quartiles"]]}


def time_cell(entry: Any, bound: bool, of: tuple[str, ...], name: str) -> Cell:
    """A measured time with its quartiles, or a bound, which says so."""
    if entry is None:
        return Cell("")
    if bound:
        return Cell(f"\u2265 {entry:,.2f}", entry, of, f"{name}, lower bound", unit="ms")
    low, high = entry["quartiles"]
    text = f"{entry['median']:,.2f} [{low:,.2f}, {high:,.2f}]"
    return Cell(text, entry["median"], of, f"{name}, median and quartiles", entry["n"], (low, high), "ms")


def predicted_table(rows: Iterable[CostRow]) -> Table | None:
    """Every measured cell beside its own estimate; None where nothing was measured with one."""
    table = []
    for row in rows:
        r, of = row.result, (row.place,)
        if r.mode != "measure" or not r.predicted:
            continue
        told, found = r.predicted["peak_mem_gib"], r.peak_mem_gib
        cell = f"{row.label}, {r.backbone['name']}, {r.resolution} pixels, {r.what}, batch {r.batch}"
        gib = [Cell(f"{told:.3f}", told, of, "peak memory, estimated", unit="GiB")]
        gib += (
            [Cell("out of memory")] if found is None else [Cell(f"{found:.3f}", found, of, "peak memory, measured", unit="GiB")]
        )
        gib += [
            Cell("")
            if not found
            else Cell(f"{100 * (told / found - 1):+.1f} %", told / found - 1, of, "estimated over measured")
        ]
        bound, time = _total(r.predicted.get("step_time_ms")), _total(r.step_time_ms)
        ms = [Cell("") if bound is None else Cell(f"\u2265 {bound:,.2f}", bound, of, "step, lower bound", unit="ms")]
        ms += [Cell("") if time is None else time_cell(r.step_time_ms["total"], False, of, "step")]
        table.append([Cell(cell), Cell(r.device), *gib, *ms])
    titles = ["cell", "device", "estimated, GiB", "measured, GiB", "error", "step, bound, ms", "step, measured, ms"]
    return Table(titles, table, TOLD) if table else None


def _total(times: Mapping[str, Any] | None) -> float | None:
    entry = (times or {}).get("total")
    return entry["median"] if isinstance(entry, dict) else entry


def cost_conditions_said(c: Mapping[str, Any]) -> str:
    """What all cells of a table of costs share, in a sentence or two."""
    text = f"{c['source']}, {c['precision']}, {c['device']}, profile {c['hardware']}. "
    text += "; ".join(f"{name.replace('_', ' ')} {said(c[name])}" for name in SAID if c.get(name) is not None) + "."
    return text + (f" Sampling: {said(c['sampling'])}." if c.get("sampling") else "")


def cost_csv(rows: Iterable[CostRow]) -> str:
    """One line per cell and quantity."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        r = row.result
        same = {name: getattr(r, name) for name in CSV_FIELDS if hasattr(r, name)} | {"backbone": r.backbone["name"]}
        same |= {name: r.flags[name] for name in ("checkpointing", "naive")}
        for quantity in _quantities(row):
            writer.writerow(same | quantity)
    return out.getvalue()


def _quantities(row: CostRow) -> Iterable[dict[str, Any]]:
    r = row.result
    if r.status == "oom":
        yield {"quantity": "peak_mem_gib"}
        return
    yield {"quantity": "peak_mem_gib", "value": r.peak_mem_gib, "unit": "GiB"}
    yield from ({"quantity": f"memory_gib.{k}", "value": v, "unit": "GiB"} for k, v in r.memory_gib.items())
    yield from ({"quantity": f"flops.{k}", "value": v, "unit": "FLOP"} for k, v in r.flops.items())
    for kind, times in {"step_time_ms": r.step_time_ms, "latency_ms": r.latency_ms}.items():
        for phase, entry in (times or {}).items():
            if isinstance(entry, dict):
                low, high = entry["quartiles"]
                spread = {"value": entry["median"], "low": low, "high": high, "n": entry["n"]}
                yield {"quantity": f"{kind}.{phase}", "unit": "ms", **spread}
            elif phase != "bound":
                yield {"quantity": f"{kind}.{phase}", "value": entry, "unit": "ms", "bound": True}
    for name, unit in {"img_per_s": "images/s", "mfu": "fraction"}.items():
        if (spread := row.quartiles(getattr(r, name))) is not None:
            yield {"quantity": name, "value": getattr(r, name), "low": spread[0], "high": spread[1], "unit": unit}
