"""What is kept of a cell that ended, and what all cells of a sweep come to."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SETTLED = ("done", "skipped")  # what a resumed sweep leaves alone
BROKEN = ("failed", "oom", "timeout", "killed")
PLACES = ("sweep", "hydra", "resume", "output_dir", "cache_dir")  # keys that say where and how, and not which cell


@dataclass(frozen=True)
class Row:
    """One cell that ended.

    status: done, skipped (an adapter that was never made for this backbone), refused (exit code 2 and a line that says why),
    failed, oom, timeout or killed. exit_code: as a shell tells it, None where no process was started; signal: by its name.
    run: the run folder that the cell's last line names; log: what it printed; error: one line.
    """

    number: int
    overrides: tuple[str, ...]
    status: str
    seconds: float
    date: str
    exit_code: int | None = None
    signal: str | None = None
    run: str | None = None
    log: str | None = None
    error: str | None = None


def key_of(override: str) -> str:
    """`+a.b=1` -> `a.b`; `hydra/launcher=x` -> `hydra.launcher`."""
    return override.lstrip("+~").partition("=")[0].replace("/", ".")


def identity(overrides: Iterable[str]) -> tuple[str, ...]:
    """What makes two cells, or two sweeps, the same: the overrides in any order, without those of `PLACES`."""
    return tuple(sorted(o for o in overrides if key_of(o).partition(".")[0] not in PLACES))


def label(overrides: Sequence[str], typed: Sequence[str]) -> str:
    """A cell in words: its overrides without those that the whole sweep shares."""
    return " ".join(o for o in overrides if o not in typed) or " ".join(overrides)


def table(cells: Sequence[tuple[int, Sequence[str]]], rows: dict[tuple[str, ...], Row], typed: Sequence[str]) -> str:
    """All cells of a sweep, one per line, and how many ended how."""
    lines, ends = [f"{'job':>4}  {'status':<8} {'seconds':>8}  cell"], Counter()
    for number, overrides in cells:
        row = rows.get(identity(overrides))
        status = row.status if row else "not run"
        ends[status] += 1
        seconds = f"{row.seconds:.0f}" if row and row.exit_code is not None else "-"
        words = label(overrides, typed)
        why = (row.error or "").removeprefix(f"{words}: ") if row else ""
        lines.append(f"{number:>4}  {status:<8} {seconds:>8}  {words}{f'   ({_short(why)})' if why else ''}")
    return "\n".join([*lines, f"{len(cells)} cells: {', '.join(f'{n} {status}' for status, n in ends.items())}"])


def _short(text: str, most: int = 100) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def exit_code(cells: Sequence[tuple[int, Sequence[str]]], rows: dict[tuple[str, ...], Row]) -> int:
    """1 if a cell broke or never ran, else 2 if one was refused, else 0."""
    ends = {row.status if (row := rows.get(identity(overrides))) else "not run" for _, overrides in cells}
    if ends & {*BROKEN, "not run"}:
        return 1
    return 2 if "refused" in ends else 0
