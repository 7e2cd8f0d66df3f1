"""Methods that were trained more than once: what their seeds agree on."""

from collections.abc import Sequence

import numpy as np

from src.report.rows import Row
from src.report.tables import ARROWS, Cell, Table, bare, number, signed

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom; beyond the list the normal one is 4 % too small or less
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)


def by_method(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Name -> seed -> run; of one seed the last."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(row.name or row.result.adapter, {})[row.result.seed] = row
    return found


def over_seeds(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """The mean over seeds and its 95 % interval by Student's t; none of a single seed."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()), None
    t = T[len(values) - 2] if len(values) - 2 < len(T) else T[-1]
    half = t * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), (float(values.mean() - half), float(values.mean() + half))


def seed_table(rows: Sequence[Row]) -> Table | None:
    """Mean, spread and interval over seeds, the same of the difference to the first method where both have a seed, and the
    mean and interval of every other score; None where no method was trained twice."""
    methods, main = by_method(rows), rows[0].main_metric
    if all(len(seeds) < 2 for seeds in methods.values()):
        return None
    (first, base), *_ = methods.items()
    others = [name for name in bare(rows) if name != main]
    table = []
    for name, seeds in methods.items():
        scores = _values(seeds, main)
        of = tuple(row.place for row in seeds.values())
        cells = [Cell(name), Cell(str(len(scores)), len(scores), of, "seeds")]
        cells.append(_mean(list(scores.values()), of, f"{main}, mean over seeds", number))
        cells.append(Cell(f"{number(min(scores.values()))} to {number(max(scores.values()))}", min(scores.values()), of, main))
        shared = [seed for seed in scores if seed in base]
        gaps = [scores[seed] - base[seed].result.metrics[main]["value"] for seed in shared] if name != first else []
        both = of + tuple(base[seed].place for seed in shared)
        cells.append(_mean(gaps, both, f"{main}, minus {first} at the same seed", signed) if gaps else Cell(""))
        of_others = [(other, list(_values(seeds, other).values())) for other in others]
        cells += [_mean(values, of, f"{other}, mean over seeds", number) if values else Cell("") for other, values in of_others]
        table.append(cells)
    shared = "images and the noise they are drawn from" if len({row.noise_seed for row in rows}) == 1 else "images"
    about = "Over seeds: the mean, with Student's 95 % interval where there are two or more. "
    about += f"All seeds share the held-out {shared}."
    titles = ["method", "seeds", main, "lowest to highest", f"minus {first}, per seed"]
    return Table([*titles, *(name + _arrow(rows, name) for name in others)], table, about)


def _values(seeds: dict[int, Row], name: str) -> dict[int, float]:
    return {seed: row.result.metrics[name]["value"] for seed, row in seeds.items() if name in row.result.metrics}


def _arrow(rows: Sequence[Row], name: str) -> str:
    return ARROWS[next(row.result.metrics[name]["better"] for row in rows if name in row.result.metrics)]


def _mean(values: Sequence[float], of: tuple[str, ...], metric: str, form) -> Cell:
    mean, interval = over_seeds(values)
    text = form(mean) + (f" [{form(interval[0])}, {form(interval[1])}]" if interval else "")
    return Cell(text, mean, of, metric, len(values), interval)
