"""The same held-out scenes through every method, side by side: same prompt, condition and noise."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from src.plots import GRID_COLUMNS, GRID_ROWS, plot_grid, read_grid
from src.report.rows import Row
from src.results import read_rows as read_lines
from src.results.evaluation import EvaluationResult

SHARED = ("source", "condition", "no control")
OWN = "controlled"
ALONE = ("wrong condition", "its output")  # of a single run there is room for these


@dataclass
class Drawn:
    """Pictures of a run's last validation. scenes: of each the pictures of `GRID_COLUMNS`, (H, W, 3) uint8; ids, captions: of
    the scenes, "" where the run kept none."""

    row: Row
    scenes: list[list[np.ndarray | None]]
    ids: list[str]
    captions: list[str]


@dataclass
class Sheet:
    """Scenes through several runs. columns: titles; cells: a row of pictures per scene; runs: those that are shown."""

    columns: list[str]
    cells: list[list[np.ndarray | None]]
    ids: list[str]
    captions: list[str]
    runs: list[Row]

    def save(self, file: Path) -> Path:
        """As one labelled PNG."""
        titles = self.captions if any(self.captions) else None
        plot_grid(self.cells, self.columns, file, row_titles=titles)
        return file


def sheets(rows: Sequence[Row]) -> list[Sheet]:
    """A sheet for the runs that show the same scenes from the same backbone, usually all of them; [] if none has pictures."""
    together: list[list[Drawn]] = []
    for drawn in filter(None, map(drawn_by, rows)):
        home = next((members for members in together if _same_scenes(members[0], drawn)), None)
        if home is None:
            together.append([drawn])
        else:
            home.append(drawn)
    return [_sheet(members) for members in together]


def drawn_by(row: Row) -> Drawn | None:
    """The pictures of a run: from its cells, else read back from the sheet that was kept of them."""
    if isinstance(row.result, EvaluationResult):
        return _evaluated(row)
    found = sorted(row.folder.glob("grids/cells-*"))
    if found:
        count = len({int(file.stem.split("-")[0]) for file in found[-1].glob("*-0.png")})
        scenes = [[_read(found[-1] / f"{r}-{c}.png") for c in range(len(GRID_COLUMNS))] for r in range(count)]
    elif (kept := row.folder / "grid.png").is_file():
        scenes = read_grid(kept, GRID_COLUMNS) or []
    else:
        scenes = []
    if not scenes:
        return None
    ids, captions = list(row.ids[: len(scenes)]), []
    table = row.folder / "tables" / "val" / "samples.jsonl"
    if table.is_file():
        lines = read_lines(table)
        last = [line for line in lines if line["images_seen"] == lines[-1]["images_seen"]]
        ids, captions = [str(line["id"]) for line in last], [str(line["caption"]) for line in last]
    return Drawn(row, scenes, _filled(ids, len(scenes)), _filled(captions, len(scenes)))


def _evaluated(row: Row) -> Drawn | None:
    """The first pictures of an evaluation beside those of its set; None where they are gone."""
    from src.rng import wrong_row  # torch comes with it

    given, count = row.folder.parent / "set", row.result.evaluation_set["n"]
    outcome, scenes = row.folder / "outcome.json", []
    for scene in range(min(GRID_ROWS, count)):
        this, other = (f"{number:05d}.png" for number in (scene, wrong_row(scene, count)))
        files = [given / "image" / this, given / "condition" / this, row.folder / "no_condition" / this]
        files += [row.folder / "right" / this, given / "condition" / other, row.folder / "wrong_condition" / this]
        scenes.append([_read(file) if file.is_file() else None for file in files])
    if not scenes or any(scenes[0][GRID_COLUMNS.index(c)] is None for c in (*SHARED[:2], OWN)):
        return None
    captions = json.loads(outcome.read_text(encoding="utf-8")).get("captions", []) if outcome.is_file() else []
    return Drawn(row, scenes, _filled(list(row.ids), len(scenes)), _filled(captions, len(scenes)))


def _same_scenes(one: Drawn, two: Drawn) -> bool:
    shown = [[GRID_COLUMNS.index(c) for c in SHARED]] * len(one.scenes)
    return len(one.scenes) == len(two.scenes) and all(
        _equal(a[c], b[c]) for a, b, columns in zip(one.scenes, two.scenes, shown, strict=True) for c in columns
    )


def _sheet(members: list[Drawn]) -> Sheet:
    first = members[0]
    own = GRID_COLUMNS.index(OWN)
    rest = [GRID_COLUMNS.index(c) for c in ALONE] if len(members) == 1 else []
    cells = [
        [*(scene[GRID_COLUMNS.index(c)] for c in SHARED), *(m.scenes[s][own] for m in members), *(scene[c] for c in rest)]
        for s, scene in enumerate(first.scenes)
    ]
    columns = [*SHARED, *(member.row.label for member in members), *(GRID_COLUMNS[c] for c in rest)]
    ids = next((m.ids for m in members if any(m.ids)), first.ids)
    captions = next((m.captions for m in members if any(m.captions)), first.captions)
    return Sheet(columns, cells, ids, captions, [member.row for member in members])


def _equal(one: np.ndarray | None, two: np.ndarray | None) -> bool:
    return one is two or (one is not None and two is not None and np.array_equal(one, two))


def _read(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _filled(words: list[str], count: int) -> list[str]:
    return [*words, *[""] * count][:count]
