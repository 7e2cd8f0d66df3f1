"""A finished run of an experiment, put where experiments are committed, and held against what stands there.

    python -m src.report.keep runs/<name>/<stamp> ...

Copies results.json, outcome.json, curves.png and the last grid of a run into experiments/<experiment>/ and says which scores
are others than before: on one kind of processor a repeated run gives the same ones, to the last bit. Refuses, before
anything is copied, a run that is not finished, that is no experiment of conf/experiment, or whose code was not committed.
"""

import sys
from pathlib import Path

from src.config import CONF
from src.report.side_by_side import HOME
from src.results import Result, read_results, write_atomic
from src.vocabulary import UserError, refused_in_one_line

SAME = ("results.json", "outcome.json", "curves.png")


def files_of(run: Path) -> dict[str, Path]:
    """Name in the folder of the experiment -> file of the run. Raises UserError for one that is missing."""
    grids = sorted((run / "grids").glob("images-*.png"))
    found = {name: run / name for name in SAME} | {"grid.png": grids[-1] if grids else run / "grids"}
    for name, file in found.items():
        if not file.is_file():
            raise UserError(f"{run}: no {name}; is the run finished? go on with: python -m src.train resume={run}")
    return found


def check(run: Path, results: Path) -> Result:
    """The result of a run that may be kept. Raises UserError."""
    result = read_results(results)
    if not (CONF / "experiment" / f"{result.experiment}.yaml").is_file():
        raise UserError(f"{run}: {result.experiment} is no file of conf/experiment; run +experiment=<one of those>")
    if result.git_dirty is not False or result.git_sha == "unknown":
        raise UserError(f"{run}: its code was not all committed, so nobody could repeat it; commit, and run it again")
    return result


def changes(before: Result, now: Result) -> list[str]:
    """A line for every score that is another one, that came, or that went."""
    old, new = ({name: m["value"] for name, m in one.metrics.items()} for one in (before, now))
    differ = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    return [f"  {name}: {old.get(name)} -> {new.get(name)}" for name in differ]


def keep(runs: list[Path], home: Path = HOME) -> list[str]:
    """Copy the runs, all or none. -> a line or more of each. Raises UserError."""
    found, lines = [files_of(run) for run in runs], []
    results = [check(run, files["results.json"]) for run, files in zip(runs, found, strict=True)]
    for files, result in zip(found, results, strict=True):
        folder = home / result.experiment
        told = changes(read_results(folder / "results.json"), result) if (folder / "results.json").exists() else ["  new"]
        folder.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            write_atomic(folder / name, file.read_bytes())
        lines += [f"{result.experiment}: {'all scores as before' if not told else 'kept'}", *told]
    return lines


if __name__ == "__main__":
    with refused_in_one_line():
        if len(sys.argv) < 2:
            raise UserError("which runs? python -m src.report.keep runs/<name>/<stamp> ...")
        print("\n".join(keep([Path(word) for word in sys.argv[1:]])))
