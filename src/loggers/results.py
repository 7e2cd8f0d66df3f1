"""A finished evaluation or cell of a benchmark in the W&B project that trainings are logged to: one row of numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src.loggers.wandb_run import WandbRun
from src.results import CostResult
from src.results.evaluation import EvaluationResult

COST, EVALUATED = "cost", "eval"  # what the keys begin with


def log_result(
    cfg_logger: Any, folder: Path, name: str, config: Mapping[str, Any], result: CostResult | EvaluationResult
) -> None:
    """Send a result that is already on the disk, for logger=wandb; whatever W&B does, the result stands.

    folder: of the result, where W&B keeps its files; config: what the run is to be filtered and grouped by.
    Raises UserError for an unknown mode.
    """
    kept = ("command", "git_sha", "git_dirty", "versions", "device", "kind", "date")
    facts = {key: value for key, value in asdict(result).items() if key in kept}
    run = WandbRun(cfg_logger, folder, name, {**config, "facts": facts}, [result.kind])
    run.log_metrics({"images_seen": getattr(result, "images_seen", None) or 0, **dict(scalars(result))})
    run.close()


def scalars(result: CostResult | EvaluationResult) -> Iterator[tuple[str, float]]:
    """Every number of a result by its key in W&B: eval/fid, eval/fid/low; cost/memory_gib/activations."""
    if isinstance(result, EvaluationResult):
        for name, m in result.metrics.items():
            yield f"{EVALUATED}/{name}", m["value"]
            yield f"{EVALUATED}/{name}/n", m["n"]
            yield from ((f"{EVALUATED}/{name}/{side}", x) for side, x in zip(("low", "high"), m["ci95"] or (), strict=False))
        return
    plain = {key: getattr(result, key) for key in ("peak_mem_gib", "img_per_s", "mfu", "trainable_m", "frozen_m", "batch")}
    for key in ("memory_gib", "flops", "step_time_ms", "latency_ms"):
        parts = {part: x["median"] if isinstance(x, dict) else x for part, x in (getattr(result, key) or {}).items()}
        plain |= {f"{key}/{part}": x for part, x in parts.items()}
    yield from ((f"{COST}/{key}", x) for key, x in plain.items() if x is not None and not isinstance(x, bool))
