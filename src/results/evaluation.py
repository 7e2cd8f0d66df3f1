"""The result of an evaluation: what one adapter drew of a fixed set, measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.results.checks import SCHEMA_VERSION, all_finite, date, filled, mapping, number, one_of, speeds, text, truth
from src.results.files import read_row, write_row
from src.results.train import check_metrics


@dataclass
class EvaluationResult:
    """One adapter on one set. Fields that a training has too are as in `Result`.

    manifest: hash of everything that two evaluations must share to be compared (`conditions` of manifest.json beside it);
    evaluation_set: {name, hash, n}; subject: what was evaluated, without places on the machine; adapter_hash: sha256 of its
    weights. seed, images_seen, config_sha, design: of the training, None for an adapter of diffusers, which does not tell.
    metrics: as in `Result`, and small_n: true in distances of sets with fewer than 2,048 pictures.
    crosscheck: the FID of other packages on the same features (`metrics.crosscheck`), or None where it was not taken.
    draw_seconds, img_per_s: of the pictures that this process drew, the latter the median over batches, with their quartiles
    [first, third]; None where all were there already, and the speed where a result is older than its quartiles.
    """

    adapter: str
    subject: str
    adapter_hash: str
    backbone: dict[str, Any]
    task: str
    resolution: int
    evaluation_set: dict[str, Any]
    manifest: str
    metrics: dict[str, dict[str, Any]]
    seed: int | None
    images_seen: int | None
    config_sha: str | None
    trainable_m: float
    draw_seconds: float | None
    img_per_s: float | None
    device: str
    precision: str
    flags: dict[str, Any]
    git_sha: str
    versions: dict[str, str]
    date: str
    command: str
    git_dirty: bool | None = None
    design: dict[str, Any] | None = None
    crosscheck: dict[str, Any] | None = None
    img_per_s_quartiles: list[float] | None = None
    kind: str = "evaluation"
    schema_version: int = SCHEMA_VERSION


def write_evaluation(path: str | Path, result: EvaluationResult | Mapping[str, Any]) -> None:
    """Check an evaluation and put it at `path`; see `write_row`. Raises ResultError."""
    write_row(path, result, check_evaluation)


def read_evaluation(path: str | Path) -> EvaluationResult:
    """Read and check the results.json of an evaluation. Raises ResultError naming the file and the field."""
    return read_row(path, check_evaluation)


def check_evaluation(raw: Mapping[str, Any]) -> EvaluationResult:
    """A mapping -> EvaluationResult with plain Python numbers. Raises ResultError."""
    found = filled(EvaluationResult, raw)
    for name in ("adapter", "subject", "adapter_hash", "task", "manifest", "device", "precision", "git_sha", "command"):
        text(name, getattr(found, name))
    for name in ("id", "revision", "hash"):
        text(f"backbone.{name}", mapping("backbone", found.backbone).get(name))
    for name in ("name", "hash"):
        text(f"evaluation_set.{name}", mapping("evaluation_set", found.evaluation_set).get(name))
    number("evaluation_set.n", found.evaluation_set.get("n"), 1, whole=True)
    number("resolution", found.resolution, 1, whole=True)
    for name in ("seed", "images_seen"):
        if getattr(found, name) is not None:
            number(name, getattr(found, name), 0, whole=True)
    for name in ("trainable_m", "draw_seconds", "img_per_s"):
        if name == "trainable_m" or getattr(found, name) is not None:
            number(name, getattr(found, name), 0)
    speeds(found, img_per_s="img_per_s_quartiles")
    for name, value in mapping("versions", found.versions, empty=False).items():
        text(f"versions.{name}", value)
    all_finite("flags", mapping("flags", found.flags, empty=False))
    for name in ("design", "crosscheck"):
        all_finite(name, mapping(name, getattr(found, name) or {}))
    truth("git_dirty", found.git_dirty, unknown=True)
    date("date", found.date)
    for name, entry in mapping("metrics", found.metrics, empty=False).items():
        if isinstance(entry, dict) and "small_n" in entry:
            one_of(f"metrics.{name}.small_n", entry["small_n"], (True,))
    check_metrics("metrics", {name: _without_label(entry) for name, entry in found.metrics.items()})
    return found


def _without_label(entry: Any) -> Any:
    return {key: value for key, value in entry.items() if key != "small_n"} if isinstance(entry, dict) else entry
