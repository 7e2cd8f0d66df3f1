"""The result of a training: how well control was learned, and under which conditions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.results.checks import SCHEMA_VERSION, ResultError, all_finite, date, filled, mapping, number, speeds, text, truth
from src.results.files import read_row, write_row


@dataclass
class Result:
    """One run. Sizes in millions of parameters, times in the unit of the name; None only where "or None" is said.

    backbone: {id, revision, hash}; trainable_parts_m: part of the adapter -> millions; flags: everything that changes
    speed or memory without changing the method (checkpointing, compile, micro_batch, ...), never empty.
    metrics: name -> {value, n, unit, better: "higher" | "lower" | None, ci95: [low, high] | None}.
    frozen_dead_m: of the adapter, frozen since nothing reads what it computes, in no other count; None in older results.
    task_settings: how the task makes conditions and scores. design: dotted key -> value of the adapter's options, the recipe,
    the learning rate and the rest of how it was trained (see `design`); data: name and settings of what was trained on;
    noise_seed: of the noise that held-out images are drawn from. These four are None in results older than the field.
    step_time_ms, img_per_s: medians over the steps, each with its quartiles [first, third]; these, and peak_mem_gib, are None
    where not measured, and a speed where a result is older than its quartiles.
    arms: control arm -> metrics of that arm, or None.
    git_sha: "unknown" outside a checkout; git_dirty: None when not known. command: as typed, without absolute paths.
    """

    experiment: str
    adapter: str
    backbone: dict[str, Any]
    task: str
    seed: int
    images_seen: int
    effective_batch: int
    resolution: int
    trainable_m: float
    frozen_m: float
    trainable_parts_m: dict[str, float]
    train_seconds: float
    step_time_ms: float | None
    img_per_s: float | None
    peak_mem_gib: float | None
    device: str
    precision: str
    flags: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    config_sha: str
    git_sha: str
    versions: dict[str, str]
    date: str
    command: str
    task_settings: dict[str, Any] | None = None
    design: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    noise_seed: int | None = None
    arms: dict[str, dict[str, dict[str, Any]]] | None = None
    git_dirty: bool | None = None
    frozen_dead_m: float | None = None
    step_time_quartiles_ms: list[float] | None = None
    img_per_s_quartiles: list[float] | None = None
    kind: str = "train"
    schema_version: int = SCHEMA_VERSION


def write_results(path: str | Path, result: Result | Mapping[str, Any]) -> None:
    """Check a result and put it at `path`; see `write_row`. Raises ResultError."""
    write_row(path, result, check_result)


def read_results(path: str | Path) -> Result:
    """Read and check the results.json of a training. Raises ResultError naming the file and the field."""
    return read_row(path, check_result)


def check_result(raw: Mapping[str, Any]) -> Result:
    """A mapping -> Result with plain Python numbers. Raises ResultError."""
    result = filled(Result, raw)
    for name in ("experiment", "adapter", "task", "device", "precision", "config_sha", "git_sha", "command"):
        text(name, getattr(result, name))
    for name, least in {"seed": 0, "images_seen": 0, "effective_batch": 1, "resolution": 1}.items():
        number(name, getattr(result, name), least, whole=True)
    for name in ("trainable_m", "frozen_m", "train_seconds", "step_time_ms", "img_per_s", "peak_mem_gib"):
        if getattr(result, name) is not None or name not in ("step_time_ms", "img_per_s", "peak_mem_gib"):
            number(name, getattr(result, name), 0)
    speeds(result, step_time_ms="step_time_quartiles_ms", img_per_s="img_per_s_quartiles")
    if result.frozen_dead_m is not None:
        number("frozen_dead_m", result.frozen_dead_m, 0)
    for name in ("id", "revision", "hash"):
        text(f"backbone.{name}", mapping("backbone", result.backbone).get(name))
    for name, value in mapping("trainable_parts_m", result.trainable_parts_m).items():
        number(f"trainable_parts_m.{name}", value, 0)
    for name, value in mapping("versions", result.versions, empty=False).items():
        text(f"versions.{name}", value)
    all_finite("flags", mapping("flags", result.flags, empty=False))
    for name in ("task_settings", "design", "data"):
        all_finite(name, mapping(name, getattr(result, name) or {}))
    if result.noise_seed is not None:
        number("noise_seed", result.noise_seed, 0, whole=True)
    truth("git_dirty", result.git_dirty, unknown=True)
    date("date", result.date)
    check_metrics("metrics", result.metrics)
    for arm, metrics in mapping("arms", result.arms or {}).items():
        check_metrics(f"arms.{arm}", metrics)
    return result


def check_metrics(where: str, metrics: Any) -> None:
    """Every metric has its value, n, unit, direction and interval."""
    for name, entry in mapping(where, metrics).items():
        at = f"{where}.{name}"
        if not isinstance(entry, dict):
            raise ResultError(f"{at} is {entry!r}, wanted {{value, n, unit, better, ci95}}: a number carries its conditions")
        for key in sorted(entry.keys() ^ {"value", "n", "unit", "better", "ci95"}):
            fault = "is not a field of a metric" if key in entry else "is missing: a number carries its conditions"
            raise ResultError(f"{at}.{key} {fault}")
        number(f"{at}.value", entry["value"])
        number(f"{at}.n", entry["n"], 1, whole=True)
        if not isinstance(entry["unit"], str):
            raise ResultError(f"{at}.unit is {entry['unit']!r}, wanted a text ('' for a number without a unit)")
        if entry["better"] not in ("higher", "lower", None):
            raise ResultError(f"{at}.better is {entry['better']!r}, wanted 'higher', 'lower' or null")
        if entry["ci95"] is not None:
            if not isinstance(entry["ci95"], list) or len(entry["ci95"]) != 2:
                raise ResultError(f"{at}.ci95 is {entry['ci95']!r}, wanted [low, high] or null")
            low, high = (number(f"{at}.ci95", bound) for bound in entry["ci95"])
            if low > high:
                raise ResultError(f"{at}.ci95 is {entry['ci95']}: low is above high")
