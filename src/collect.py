"""What a finished training leaves behind, and how outcomes become `results.json`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from src.adapters.base import ControlAdapter
from src.callbacks.base import RunContext
from src.callbacks.control import ControlValidation
from src.callbacks.guard import StepGuard
from src.callbacks.meter import ThroughputMeter, peak_mem_gib
from src.config import config_sha
from src.control_score import ARMS, RIGHT, ZERO, ceiling, control_entries, named
from src.metrics.intervals import metric
from src.results import Result, dated_origin
from src.results.design import data_of, design_of, noise_seed_of
from src.world import World

ROOT = Path(__file__).resolve().parents[1]
HARDWARE_FLAGS = (
    "micro_batch", "devices", "workers", "threads", "checkpointing", "compile", "cuda_graphs", "channels_last", "strategy",
    "nodes", "shard",
)  # fmt: skip
NO_CONTROL = "no_control_arm"


def summarise(context: RunContext, adapter: ControlAdapter, callbacks: list) -> dict:
    """What a finished training leaves behind for results.json."""
    control = next(c for c in callbacks if isinstance(c, ControlValidation))
    meter = next(c for c in callbacks if isinstance(c, ThroughputMeter))
    guard = next(c for c in callbacks if isinstance(c, StepGuard))
    times = meter.step_spread_ms()
    return {
        "images_seen": context.total_images,
        "train_seconds": round(meter.train_seconds, 1),
        "step_time_ms": None if times is None else times["median"],
        "step_time_quartiles_ms": None if times is None else times["quartiles"],
        "peak_mem_gib": peak_mem_gib(adapter.device),
        "trainable_parts_m": adapter.trainable_parts_m(),
        "frozen_dead_m": adapter.frozen_dead_m(),
        "images_to_control": control.images_to_control,
        "skipped_steps": guard.skipped,
        "ids": context.held.stores.ids[: context.validation["final_images"]],
        "scores": {k: [float(x) for x in v] for k, v in control.final_scores.items()},
    }


def collect(
    cfg: DictConfig, world: World, outcome: dict, arm: dict | None, together: Sequence[dict], experiment: str | None
) -> Result:
    """Join outcomes to the run's result: every arm with its interval, and the paired gain over each of them.

    together: the outcomes of all who shared a frozen pass, this one included. The seconds and the step time of each are
    then those of the whole: nobody could have had its own part of them for less. So are the quartiles, as if all had been
    slow in the same steps.
    """
    scores, arms = {name: np.array(values) for name, values in outcome["scores"].items()}, [a for a in ARMS if a != RIGHT]
    if arm is not None:
        arms.append(NO_CONTROL)
        scores |= {named(name, NO_CONTROL): np.array(arm["scores"][named(name, ZERO)]) for name in world.task.metrics}
    metrics = control_entries(world.task.metrics, scores, arms, ceiling(world.held))
    metrics["val_loss"] = metric(scores["val_loss"], "mse", "lower")
    if outcome["images_to_control"] is not None:
        count = outcome["images_to_control"]
        for name, value in (("images_to_control", count), ("steps_to_control", count // cfg.budget.effective_batch)):
            metrics[name] = {"value": value, "n": 1, "unit": name.split("_")[0], "better": "lower", "ci95": None}
    hardware = cfg.hardware
    return Result(
        experiment=experiment or cfg.name,
        adapter=cfg.adapter.name,
        backbone={
            "id": world.backbone.facts.source,
            "revision": world.backbone.facts.revision,
            "hash": world.backbone_hash,
            "quantize": world.backbone.quantize,
        },
        task=cfg.task.name,
        seed=cfg.seed,
        images_seen=outcome["images_seen"],
        effective_batch=cfg.budget.effective_batch,
        resolution=cfg.resolution,
        trainable_m=sum(outcome["trainable_parts_m"].values()),
        frozen_m=sum(p.numel() for p in world.backbone.net.parameters()) / 1e6,
        trainable_parts_m=outcome["trainable_parts_m"],
        frozen_dead_m=outcome.get("frozen_dead_m"),
        train_seconds=round(sum(o["train_seconds"] for o in together), 1),
        **step_times(together, cfg.budget.effective_batch),
        peak_mem_gib=outcome["peak_mem_gib"],
        device=torch.cuda.get_device_name() if hardware.accelerator == "gpu" else "cpu",
        precision=hardware.precision,
        flags=flags_of(cfg, world, outcome, together),
        metrics=metrics,
        task_settings=world.task.settings(),
        design=design_of(cfg),
        data=data_of(cfg),
        noise_seed=noise_seed_of(cfg),
        config_sha=config_sha(cfg),
        **dated_origin(ROOT),
    )


def step_times(together: Sequence[dict], images: int) -> dict[str, Any]:
    """The fields of a result that tell how fast steps of so many images were; None in each where one was not measured."""
    names = ("step_time_ms", "step_time_quartiles_ms", "img_per_s", "img_per_s_quartiles")
    if any(o.get("step_time_quartiles_ms") is None for o in together):
        return dict.fromkeys(names)
    middle, (fast, slow) = (np.sum([o[name] for o in together], axis=0).tolist() for name in names[:2])
    rate, slowest, fastest = (1000 * images / ms for ms in (middle, slow, fast))
    return dict(zip(names, (middle, [fast, slow], rate, [slowest, fastest]), strict=True))


def flags_of(cfg: DictConfig, world: World, outcome: dict, together: Sequence[dict]) -> dict:
    """What changes speed or memory, or tells how pictures were drawn."""
    return {
        **{key: cfg.hardware[key] for key in HARDWARE_FLAGS},
        "optimizer": cfg.optimizer.algorithm["_target_"],
        "optimizer_fused": bool(cfg.optimizer.algorithm.get("fused")),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "solver": type(world.held.solver).__name__,
        "sampling_steps": cfg.validation.steps,
        "guidance": cfg.validation.guidance,
        **repetition(cfg),
        **(shared_pass(outcome, len(together)) if len(together) > 1 else {}),
    }


def shared_pass(outcome: dict, runs: int) -> dict[str, Any]:
    """Flags of one of several runs that trained on the same frozen passes: how many, and what its own half of a step took."""
    own = ("step_time_ms", "step_time_quartiles_ms") if outcome.get("step_time_quartiles_ms") else ()
    return {"shared_pass": runs, **{f"own_{name}": outcome[name] for name in own}}


def repetition(cfg: DictConfig) -> dict[str, int | str]:
    """Flags of a training in which noised images come again."""
    reuse, cache = cfg.get("reuse", 1), cfg.get("feature_cache")
    found = {"reuse": reuse} if reuse > 1 else {}
    if cache is not None and cache.draws is not None:
        found |= {"feature_draws": cache.draws, "feature_dtype": cache.dtype or "not kept"}
    return found | ({"overlap": True} if cfg.hardware.get("overlap") else {})
