"""The same held-out scenes through every method, side by side: same prompt, condition and noise."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from src.callbacks.control import GRID_COLUMNS
from src.plots import plot_grid
from src.report.rows import Row
from src.types import UserError

SHARED = ("source", "condition", "no control")


def plot_side_by_side(conditions: dict[str, Any], rows: list[Row], folder: Path) -> Path | None:
    """grid-<backbone>-<task>.png in `folder`: a row per scene, a column per run. -> the file, or None if no run has pictures.

    Raises UserError if two runs did not draw the same scenes.
    """
    drawn = [(row, cells) for row in rows if (cells := _last_cells(row.folder)) is not None]
    if not drawn:
        return None
    (first, reference), *rest = drawn
    scenes = sorted({int(file.stem.split("-")[0]) for file in reference.glob("*-0.png")})
    for row, cells in rest:
        for scene in scenes:
            if not all(np.array_equal(_cell(cells, scene, c), _cell(reference, scene, c)) for c in SHARED):
                raise UserError(
                    f"{row.folder} and {first.folder} show different scenes or backbones in row {scene} of their grids: "
                    "compare runs of the same data and noise"
                )
    grid = [[*(_cell(reference, s, c) for c in SHARED), *(_cell(cells, s, "controlled") for _, cells in drawn)] for s in scenes]
    backbone = conditions["backbone"].split(":")[-1].split("/")[-1]
    file = folder / f"grid-{backbone}-{conditions['task']}.png"
    plot_grid(grid, [*SHARED, *(row.label for row, _ in drawn)], file)
    return file


def _last_cells(run: Path) -> Path | None:
    """The pictures of a run's last validation."""
    found = sorted(run.glob("grids/cells-*"))
    return found[-1] if found else None


def _cell(cells: Path, scene: int, column: str) -> np.ndarray:
    return np.asarray(Image.open(cells / f"{scene}-{GRID_COLUMNS.index(column)}.png"))
