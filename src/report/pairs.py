"""Two rows of one table on the same images: what they differ by, with the interval of the difference."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from src.metrics.intervals import paired_metric
from src.report.rows import Row
from src.report.tables import Cell, Table, bare, signed
from src.results.evaluation import EvaluationResult

MOST_OPEN = 8  # runs whose differences are shown without being asked for
SETS = ("fid", "kid")  # distances of whole sets, which no mean over images gives


def paired_tables(rows: Sequence[Row], compared: Iterable[Mapping[str, Any]] = ()) -> list[Table]:
    """Differences between every two runs, the control score first, then every other score that was kept per image, then those
    distances of sets that `src.evaluate` compared. [] where the runs kept no scores per image, or not of the same images.

    compared: contents of comparison.json. On the page all tables but the first are folded away, and that, too, if it is large.
    """
    kept = [row for row in rows if row.scores is not None and row.main_metric in row.scores]
    if len(kept) < 2 or any(row.ids != kept[0].ids for row in kept):
        return []
    main, about = kept[0].main_metric, _about(kept)
    names = [n for n in bare(kept) if all(n in row.scores and n in row.result.metrics for row in kept)]
    tables = [_table(kept, name, [[_difference(a, b, name) for b in kept[:i]] for i, a in enumerate(kept)]) for name in names]
    of_sets = [n for n in bare(kept) if n.startswith(SETS) and n not in names]
    known, missing = [(name, _of_sets(kept, name, list(compared))) for name in of_sets], []
    for name, cells in known:
        if any(cell.text for row in cells for cell in row):
            tables.append(_table(kept, name, cells))
        else:
            missing.append(name)
    if missing:
        about += f" Of {', '.join(missing)}: python -m src.evaluate compare=[<the folders>] finds what is missing here."
    first = next(table for name, table in zip(names, tables, strict=False) if name == main)
    first.about, first.fold = about, first.fold if len(kept) > MOST_OPEN else ""
    return [first, *(table for table in tables if table is not first)]


def difference(row: Row, other: Row, name: str | None = None) -> tuple[float, tuple[float, float]]:
    """A score (null: the control score) of a run minus another's over the same images, and its 95 % interval."""
    name = name or row.main_metric
    m = row.result.metrics[name]
    gap = paired_metric(row.scores[name], other.scores[name], m["unit"], m["better"])
    return gap["value"], tuple(gap["ci95"] or (gap["value"], gap["value"]))


def _about(kept: Sequence[Row]) -> str:
    same = len({row.noise_seed for row in kept}) == 1
    noise = "from the same noise" if same else "from noise of their own where their noise seeds differ"
    return f"Paired over the same {len(kept[0].ids)} images, drawn {noise}, 95 % intervals; one that holds 0 decides nothing."


def _table(kept: Sequence[Row], name: str, cells: Sequence[Sequence[Cell]]) -> Table:
    rows = [[Cell(kept[i].label), *cells[i], *[Cell("")] * (len(kept) - 1 - i)] for i in range(1, len(kept))]
    return Table([f"{name}: row minus column", *(row.label for row in kept[:-1])], rows, fold=f"{name}: paired differences")


def _difference(row: Row, other: Row, name: str) -> Cell:
    value, interval = difference(row, other, name)
    return _cell(row, other, name, value, interval, len(row.ids))


def _cell(row: Row, other: Row, name: str, value: float, interval: tuple[float, float] | None, n: int) -> Cell:
    text = signed(value) + (f" [{signed(interval[0])}, {signed(interval[1])}]" if interval else "")
    unit = row.result.metrics[name]["unit"]
    return Cell(text, value, (row.place, other.place), f"{name}, paired difference", n, interval, unit)


def _of_sets(kept: Sequence[Row], name: str, compared: Sequence[Mapping[str, Any]]) -> list[list[Cell]]:
    return [[_compared(a, b, name, compared) for b in kept[:i]] for i, a in enumerate(kept)]


def _compared(row: Row, other: Row, name: str, compared: Sequence[Mapping[str, Any]]) -> Cell:
    """The difference that a comparison of these very adapters on this set found, turned around where it was made so."""
    for found in compared:
        hashes = {subject["hash"] for subject in found["subjects"]}
        if found["manifest"] != row.result.manifest or not {row.result.adapter_hash, other.result.adapter_hash} <= hashes:
            continue
        for pair in found["pairs"]:
            m, sides = pair["metrics"].get(name), (pair["of"], pair["minus"])
            if m is None or sides not in ((_side(row), _side(other)), (_side(other), _side(row))):
                continue
            sign = 1 if sides[0] == _side(row) else -1
            interval = tuple(sorted(sign * bound for bound in m["ci95"])) if m["ci95"] else None
            return _cell(row, other, name, sign * m["value"], interval, m["n"])
    return Cell("")


def _side(row: Row) -> str:
    r = row.result
    return f"{r.subject}, {r.adapter}" if isinstance(r, EvaluationResult) else row.label
