"""Reading results: every results.json below some folders, by kind, a run and its copy counted once."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from src.results import CostResult, Result, ResultError, kind_of, read_cost, read_results
from src.results.design import data_of, design_of, noise_seed_of
from src.results.evaluation import EvaluationResult, read_evaluation
from src.types import UserError


@dataclass(frozen=True)
class Row:
    """One training or evaluation. scores: metric, or metric/arm -> one value per held-out image, where the run kept them; ids:
    of these images. place: where it was found, from the folder that was asked for. name: the method, told from the others
    of its table (see `src.report.names`)."""

    result: Result | EvaluationResult
    folder: Path
    scores: dict[str, np.ndarray] | None
    ids: tuple[str, ...]
    place: str = ""
    name: str = ""

    @property
    def main_metric(self) -> str:
        """The task's control score: the first metric that was written."""
        return next(iter(self.result.metrics))

    @property
    def noise_seed(self) -> int | None:
        """The seed of the noise that it was scored with: of a training that does not say, its own."""
        r = self.result
        if isinstance(r, EvaluationResult):
            return r.flags.get("noise_seed")
        return r.seed if r.noise_seed is None else r.noise_seed

    @property
    def label(self) -> str:
        name = self.name or self.result.adapter
        return name if self.result.seed is None else f"{name}, seed {self.result.seed}"


@dataclass(frozen=True)
class CostRow:
    """One cell of a benchmark."""

    result: CostResult
    folder: Path
    place: str = ""

    @property
    def floor(self) -> bool:
        """The frozen backbone alone."""
        return self.result.adapter == "none"

    def quartiles(self, speed: float | None) -> tuple[float, float] | None:
        """First and third of its images/s or MFU, from those of the time that the speed was taken of; None of a bound, and
        where there is no speed or no time."""
        r = self.result
        time = r.latency_ms["batch"] if r.latency_ms else (r.step_time_ms or {}).get("total")
        if speed is None or not isinstance(time, dict):
            return None
        fast, slow = time["quartiles"]
        return speed * time["median"] / slow, speed * time["median"] / fast

    @property
    def label(self) -> str:
        """The method with what it may be compared under: its own options, what is computed twice, what was forgotten."""
        r = self.result
        words = ["backbone alone" if self.floor else r.adapter]
        words += [f"checkpointing {kind}" for kind in [r.flags["checkpointing"]] if kind not in (None, False, "none")]
        words += ["backbone not frozen"] if r.flags["naive"] else []
        return ", ".join(words)


@dataclass(frozen=True)
class Found:
    """Everything below the folders that were asked for. compared: what `src.evaluate` wrote of pairs of evaluations."""

    trained: list[Row]
    evaluated: list[Row]
    costs: list[CostRow]
    compared: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.trained) + len(self.evaluated) + len(self.costs)


def read_all(paths: Iterable[str | Path]) -> Found:
    """Every results.json below folders, or at the paths of files themselves, in the order of their paths.

    Raises UserError for a folder that holds none, ResultError for a file that cannot be trusted.
    """
    trained, evaluated, costs, taken, compared = {}, {}, {}, Counter(), []
    for path in map(Path, paths):
        compared += [_read_json(file) for file in sorted(path.rglob("comparison.json"))]
        for file in _files(path):
            place = _place(file, path)
            taken[place] += 1
            place += f" ({taken[place]})" if taken[place] > 1 else ""
            match kind_of(file):
                case "train":
                    _keep(trained, _row(file, place, read_results))
                case "evaluation":
                    _keep(evaluated, _row(file, place, read_evaluation))
                case "cost":
                    cost = CostRow(read_cost(file), file.parent, place)
                    costs.setdefault(json.dumps(asdict(cost.result), sort_keys=True), cost)
                case other:
                    raise ResultError(f"{file}: kind is {other!r}, wanted train, evaluation or cost")
    designs = {row.result.config_sha: row.result.design for row in trained.values()}
    known = [_of_training(row, designs) for row in evaluated.values()]
    return Found(list(trained.values()), known, list(costs.values()), compared)


def read_rows(paths: Iterable[str | Path]) -> list[Row]:
    """The trainings alone. Raises as `read_all`."""
    return read_all(paths).trained


def _files(path: Path) -> list[Path]:
    found = [path] if path.is_file() else sorted(path.rglob("results.json"))
    if not found:
        raise UserError(f"runs={path}: no results.json below it; give folders that `python -m src.train` printed as `run: ...`")
    return found


def _place(file: Path, asked: Path) -> str:
    """The folder of a result from the one that was asked for, whose own place on the machine is nobody's business."""
    if file == asked:
        return file.name
    below = file.parent.relative_to(asked).as_posix()
    return asked.resolve().name + ("" if below == "." else f"/{below}")


def _keep(rows: dict[tuple, Row], row: Row) -> None:
    """Of two copies of a run, the one that kept more: scores of each image, pictures, curves."""
    r = row.result
    made = r.adapter_hash if isinstance(r, EvaluationResult) else r.config_sha
    key = (made, r.seed, r.date, r.command)
    if key not in rows or _wealth(row) > _wealth(rows[key]):
        rows[key] = row


def _wealth(row: Row) -> int:
    return (row.scores is not None) + sum((row.folder / name).exists() for name in ("metrics.jsonl", "grids"))


def _row(file: Path, place: str, read: Callable[[Path], Any]) -> Row:
    outcome = file.with_name("outcome.json")
    kept = _read_json(outcome) if outcome.is_file() else {}
    scores = {name: np.array(values) for name, values in kept.get("scores", {}).items()} or None
    return Row(_completed(read(file), file.with_name("config.yaml")), file.parent, scores, tuple(kept.get("ids", ())), place)


def _completed(result: Any, config: Path) -> Any:
    """The result with what it does not say itself, being older than the fields, from the configuration beside it."""
    if not isinstance(result, Result) or result.design is not None or not config.is_file():
        return result
    cfg = OmegaConf.to_container(OmegaConf.load(config), resolve=True)
    return replace(result, design=design_of(cfg), data=data_of(cfg), noise_seed=noise_seed_of(cfg))


def _of_training(row: Row, designs: dict[str, Any]) -> Row:
    """An evaluation from before it had its subject's design, with that of the training beside it, if it is there."""
    found = designs.get(row.result.config_sha)
    return row if row.result.design is not None or found is None else replace(row, result=replace(row.result, design=found))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultError(f"{file} is not JSON ({error}); it was cut off or edited: delete it or run again") from None
