"""All files of a report."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.report import abstract
from src.report.charts import curve_charts, predicted_chart, score_charts, speed_stack, stacks
from src.report.costs import cost_conditions_said, cost_csv, memory_table, predicted_table, time_table
from src.report.figures import draw_charts, draw_stacks
from src.report.grids import sheets
from src.report.groups import Group, cost_groups, groups, refuse_unlike
from src.report.names import named
from src.report.page import page
from src.report.pairs import paired_tables
from src.report.rows import CostRow, Found, Row, read_all
from src.report.seeds import seed_table
from src.report.tables import commit, csv_text, markdown_table, score_conditions, score_table
from src.results import write_atomic


def write_report(paths: Iterable[str | Path], out: Path, one_table: bool = False) -> list[Path]:
    """Read everything below `paths` and write it into `out`: report.html, table.md, CSV, figures and sheets. -> files.

    Raises UserError for a folder without results, and, with one_table, for rows that must not stand in one.
    """
    found = read_all(paths)
    trained, evaluated, costs = _named(groups(found.trained)), _named(groups(found.evaluated)), cost_groups(found.costs)
    if one_table:
        for kind in (trained, evaluated, costs):
            refuse_unlike(kind)
    rows = ([r for g in kind for r in g.rows] for kind in (trained, evaluated))
    found = Found(*rows, found.costs, found.compared)
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(found, trained, evaluated, costs)
    files = [_text(out / "report.html", page(found, trained, evaluated, costs)), _text(out / "table.md", text)]
    if found.trained or found.evaluated:
        files.append(_text(out / "table.csv", csv_text([*found.trained, *found.evaluated])))
    if found.costs:
        files.append(_text(out / "cost.csv", cost_csv(found.costs)))
    for kind, several in (("", trained), ("evaluation-", evaluated)):
        for group in several:
            files += _figures(group, found, out, kind)
    for group in costs:
        files += draw_stacks(stacks(group), out / f"cost-{group.slug}", group.title)
    predicted, speed = predicted_chart(found.costs), speed_stack(found.costs)
    files += draw_charts([predicted], out / "predicted") if predicted else []
    files += draw_stacks([speed], out / "speed", "images per second") if speed else []
    print(text)
    print(f"{len(found)} results in {len(trained) + len(evaluated) + len(costs)} groups", flush=True)
    return files


def markdown(
    found: Found, trained: Sequence[Group[Row]], evaluated: Sequence[Group[Row]], costs: Sequence[Group[CostRow]]
) -> str:
    """Abstract, every table with its conditions, and every command."""
    parts = [*filter(None, abstract.compared(found, trained, evaluated, costs))]
    limits = abstract.limits(found, trained, evaluated)
    parts += ["What cannot be concluded:\n\n" + "\n".join(f"- {line}" for line in limits)] if limits else []
    parts += [part for group in (*trained, *evaluated) for part in score_section(group, found.compared)]
    parts += [part for group in costs for part in _cost_section(group)]
    if predicted := predicted_table(found.costs):
        parts += ["## predicted against measured", markdown_table(predicted)]
    return "\n\n".join(parts) + "\n"


def score_section(group: Group[Row], compared: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Heading, conditions, the table, what seeds and pairs say, and the commands."""
    tables = [score_table(group), seed_table(group.rows), *paired_tables(group.rows, compared)]
    parts = [f"## {group.title}", score_conditions(group.conditions), *([group.apart] if group.apart else [])]
    return [*parts, *(markdown_table(table) for table in tables if table), _commands(group.rows)]


def _cost_section(group: Group[CostRow]) -> list[str]:
    parts = [f"## {group.title}", cost_conditions_said(group.conditions), *([group.apart] if group.apart else [])]
    return [*parts, markdown_table(memory_table(group)), markdown_table(time_table(group)), _commands(group.rows)]


def _commands(rows: Sequence[Row | CostRow]) -> str:
    return "\n".join(f"- {row.label}: `{row.result.command}` at {commit(row)}" for row in rows)


def _figures(group: Group[Row], found: Found, out: Path, kind: str) -> list[Path]:
    files = draw_charts(score_charts(group, found.costs, found.trained), out / f"score-{kind}{group.slug}")
    files += draw_charts(curve_charts(group, found.costs), out / f"curves-{kind}{group.slug}")
    for number, sheet in enumerate(sheets(group.rows), 1):
        files.append(sheet.save(out / f"grid-{kind}{group.slug}{'' if number == 1 else f'-{number}'}.png"))
    return files


def _named(found: list[Group[Row]]) -> list[Group[Row]]:
    for group in found:
        group.rows = named(group.rows)
    return found


def _text(file: Path, text: str) -> Path:
    write_atomic(file, text.encode())
    return file
