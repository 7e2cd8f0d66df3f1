"""One HTML file that holds everything: tables that sort, charts that answer, pictures, and the proof of every number."""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from src.report import abstract
from src.report.charts import Chart, Stack, curve_charts, predicted_chart, score_charts, speed_stack, stacks
from src.report.costs import cost_conditions_said, memory_table, predicted_table, time_table
from src.report.grids import Sheet, sheets
from src.report.groups import Group
from src.report.pairs import paired_tables
from src.report.rows import CostRow, Found, Row
from src.report.seeds import seed_table
from src.report.svg import chart_svg, legend, stack_svg
from src.report.tables import Table, commit, score_conditions, score_table

TEMPLATES = Path(__file__).parent / "templates"
WIDE, NARROW = 620, 340  # pixels of a chart, for a desk and for a telephone
SIDE = 192  # pixels: larger pictures are made smaller on the page
TITLE = "ControlBench: what was compared, and how far it can be trusted"


def page(found: Found, trained: Sequence[Group[Row]], evaluated: Sequence[Group[Row]], costs: Sequence[Group[CostRow]]) -> str:
    """The page. The same rows give the same bytes; prompts, names and commands are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    rows = [*found.trained, *found.evaluated]
    predicted, chart, speed = predicted_table(found.costs), predicted_chart(found.costs), speed_stack(found.costs)
    return environment.get_template("page.html").render(
        title=TITLE,
        says=[*filter(None, abstract.compared(found, trained, evaluated, costs))],
        limits=abstract.limits(found, trained, evaluated),
        dates=_dates([*rows, *found.costs]),
        groups=[_group(group, found, "s") for group in trained],
        evaluations=[_group(group, found, "e") for group in evaluated],
        costs=[_cost_group(group) for group in costs],
        predicted=_table(predicted) if predicted else None,
        predicted_charts=[_chart(chart)] if chart else [],
        speed_charts=[_stack(speed)] if speed else [],
        runs=[_run(row) for row in (*rows, *found.costs)],
        proofs={row.place: _proof(row) for row in (*rows, *found.costs)},
    )


def _group(group: Group[Row], found: Found, kind: str) -> dict[str, Any]:
    extra = [table for table in (seed_table(group.rows), *paired_tables(group.rows, found.compared)) if table]
    charts = (*score_charts(group, found.costs, found.trained), *curve_charts(group, found.costs))
    return {
        "id": f"{kind}-{group.slug}",
        "title": group.title,
        "conditions": score_conditions(group.conditions),
        "apart": group.apart,
        "tables": [_table(table) for table in (score_table(group), *extra)],
        "charts": [_chart(chart) for chart in charts],
        "sheets": [_sheet(sheet) for sheet in sheets(group.rows)],
    }


def _cost_group(group: Group[CostRow]) -> dict[str, Any]:
    return {
        "id": f"c-{group.slug}",
        "title": group.title,
        "conditions": cost_conditions_said(group.conditions),
        "apart": group.apart,
        "tables": [_table(memory_table(group)), _table(time_table(group))],
        "charts": [_stack(stack) for stack in stacks(group)],
    }


def _table(table: Table) -> dict[str, Any]:
    return {"about": table.about, "fold": table.fold, "columns": table.columns, "numbers": table.numbers, "rows": table.rows}


def _chart(chart: Chart) -> dict[str, Any]:
    from markupsafe import Markup

    marks = [(name, Markup(mark)) for name, mark in legend(_once(chart), shapes=True)]
    drawings = {"wide": Markup(chart_svg(chart, WIDE)), "narrow": Markup(chart_svg(chart, NARROW))}
    return {"title": chart.title, "note": chart.note, "legend": marks, **drawings}


def _once(chart: Chart) -> list[tuple[str, int]]:
    return list(dict.fromkeys((s.name, s.colour) for s in chart.series if s.points))


def _stack(stack: Stack) -> dict[str, Any]:
    from markupsafe import Markup

    names = [(name, i) for i, name in enumerate(stack.parts)] if len(stack.parts) > 1 else []
    marks = [(name, Markup(mark)) for name, mark in legend(names, shapes=False)]
    drawings = {"wide": Markup(stack_svg(stack, WIDE)), "narrow": Markup(stack_svg(stack, NARROW))}
    return {"title": stack.title, "note": stack.note, "legend": marks, **drawings}


def _sheet(sheet: Sheet) -> dict[str, Any]:
    rows = [
        {"caption": caption or name, "pictures": [None if cell is None else data_uri(cell) for cell in cells]}
        for caption, name, cells in zip(sheet.captions, sheet.ids, sheet.cells, strict=True)
    ]
    return {"columns": sheet.columns, "rows": rows}


def data_uri(picture: np.ndarray) -> str:
    """(H, W, 3) uint8 -> a PNG inside an address, exact up to SIDE pixels, above that made smaller."""
    image = Image.fromarray(picture)
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def _proof(row: Row | CostRow) -> dict[str, Any]:
    """What stands behind a number of this row."""
    r = row.result
    return {
        "label": row.label,
        "command": r.command,
        "commit": commit(row),
        "seed": r.seed,
        "date": r.date[:10],
        "device": f"{r.device}, {r.precision}",
        "place": row.place,
    }


def _run(row: Row | CostRow) -> dict[str, Any]:
    r = row.result
    what = f"{r.backbone['id']}, {r.task}" if isinstance(row, Row) else f"{r.backbone['name']}, {r.what}, {r.mode}"
    return _proof(row) | {"what": what, "sha": r.git_sha}


def _dates(rows: Iterable[Row | CostRow]) -> str:
    days = sorted(row.result.date[:10] for row in rows)
    return days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
