"""The committed pictures of a task side by side: the same held-out scenes through every method.

    python -m src.report.side_by_side canny

Reads experiments/<adapter>_<backbone>_<task>/grid.png and writes experiments/side_by_side/grid-<backbone>-<task>.png, and
with several backbones grid-all-<task>.png. Refuses sources whose rows are not the same scenes.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.plots import GRID_COLUMNS, plot_grid, read_grid
from src.vocabulary import UserError, refused_in_one_line

HOME = Path(__file__).resolve().parents[2] / "experiments"
SHARED = ("source", "condition")  # of a scene, whatever the backbone
ALONE, OWN = GRID_COLUMNS.index("no control"), GRID_COLUMNS.index("controlled")
ROUNDING = 1  # of 255: another processor sums in another order, and a pixel in thousands of a render or a drawing differs
ORDER = ("unicon", "unicon_half", "controlnet", "dit_controlnet", "t2i_adapter", "control_lora", "scedit")


@dataclass
class Shown:
    """One committed run: its scenes, each with the pictures of `GRID_COLUMNS`."""

    folder: str
    adapter: str
    backbone: str
    scenes: list[list[np.ndarray]]

    @property
    def title(self) -> str:
        return self.adapter.replace("_", " ")


def committed(task: str, home: Path = HOME) -> list[Shown]:
    """Every committed run of a task that has a picture, by backbone. Raises UserError for a sheet that cannot be read back."""
    found = []
    for file in sorted(home.glob(f"*_{task}/results.json")):
        row, sheet = json.loads(file.read_text()), file.with_name("grid.png")
        if row["task"] != task or not sheet.is_file():
            continue
        scenes = read_grid(sheet, GRID_COLUMNS)
        if scenes is None:
            raise UserError(f"{sheet.parent.name}/grid.png is no sheet of a validation: draw it again with its experiment")
        found.append(Shown(file.parent.name, row["adapter"], row["backbone"]["id"].removeprefix("embedded:"), scenes))
    if not found:
        raise UserError(f"no experiment of task={task} has a grid.png under {home.name}/")
    return sorted(found, key=lambda s: (s.backbone, ORDER.index(s.adapter) if s.adapter in ORDER else len(ORDER)))


def check_same(shown: list[Shown], columns: tuple[str, ...]) -> None:
    """Refuse runs that do not show the same scene in the same row. Raises UserError naming run, row and column."""
    first = shown[0]
    for other in shown[1:]:
        if len(other.scenes) != len(first.scenes):
            raise UserError(f"{other.folder} shows {len(other.scenes)} scenes, {first.folder} {len(first.scenes)}")
        for row, (one, two) in enumerate(zip(first.scenes, other.scenes, strict=True)):
            for column in columns:
                place = GRID_COLUMNS.index(column)
                if not _alike(one[place], two[place]):
                    raise UserError(f"{other.folder}: row {row + 1} has another {column} than in {first.folder}")


def _alike(one: np.ndarray, two: np.ndarray) -> bool:
    return one.shape == two.shape and np.abs(one.astype(int) - two).max() <= ROUNDING


def combine(task: str, home: Path = HOME) -> list[Path]:
    """Draw every sheet. -> their files. Raises UserError, before anything is written, where scenes differ."""
    by_base: dict[str, list[Shown]] = {}
    for one in committed(task, home):
        by_base.setdefault(one.backbone, []).append(one)
    for group in by_base.values():
        check_same(group, (*SHARED, "no control"))
    everyone = [one for group in by_base.values() for one in group]
    check_same(everyone, SHARED)
    out, files = home / "side_by_side", []
    for base, group in by_base.items():
        titles = [*SHARED, "no control", *(one.title for one in group)]
        cells = [[*scene[: ALONE + 1], *(one.scenes[r][OWN] for one in group)] for r, scene in enumerate(group[0].scenes)]
        files.append(out / f"grid-{base}-{task}.png")
        plot_grid(cells, titles, files[-1])
    if len(by_base) > 1:
        titles = [*SHARED, *(f"{one.backbone.replace('_', ' ')} {one.title}" for one in everyone)]
        scenes = enumerate(everyone[0].scenes)
        cells = [[*scene[: len(SHARED)], *(one.scenes[r][OWN] for one in everyone)] for r, scene in scenes]
        files.append(out / f"grid-all-{task}.png")
        plot_grid(cells, titles, files[-1], scale=1)
    return files


if __name__ == "__main__":
    with refused_in_one_line():
        for written in combine(sys.argv[1] if len(sys.argv) > 1 else "canny"):
            print(f"wrote {written.relative_to(HOME.parent)}")
