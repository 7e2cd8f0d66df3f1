"""Train a control adapter: compose, check, build, fit, and prove that control was learned.

    python -m src.train +experiment=unicon_sd3_canny

The last line printed is `run: <folder>`; what is in it: README.md.
"""

import datetime
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from src import build, support
from src.callbacks.base import Preempted
from src.callbacks.control import ControlValidation
from src.callbacks.meter import ThroughputMeter, peak_mem_gib
from src.config import accumulation, cli, config_sha, resolve_hardware
from src.control_score import ARMS, RIGHT, ZERO, named, score_rows
from src.data.stores import to_bytes
from src.loggers import build_loggers
from src.matching import matched
from src.metrics.intervals import metric
from src.plots import plot_curves
from src.profiling.memory import describe, estimate_for
from src.results import Result, command_line, environment, git_state, write_atomic, write_results
from src.runs import Run, open_run
from src.types import UserError

ROOT = Path(__file__).resolve().parents[1]
NO_CONTROL = "no_control_arm"


def main(cfg: DictConfig) -> None:
    """The entry: exit code 143 after a signal, 0 at the end or at budget.stop_at_images."""
    job = HydraConfig.get()
    try:
        train(cfg, list(job.overrides.task), job.runtime.choices.get("experiment"))
    except Preempted as why:
        print(f"stopped by {why}; saved. Continue with: python -m src.train resume={why.folder}\nrun: {why.folder}", flush=True)
        raise SystemExit(143 if why.by_signal else 0) from None


def train(cfg: DictConfig, typed: list[str], experiment: str | None = None) -> Path:
    """One run, from a checked configuration to results.json. -> its folder. Raises Preempted once it has saved itself."""
    cfg = resolve_hardware(cfg)
    if cfg.hardware.devices != 1:
        raise UserError(f"hardware.devices={cfg.hardware.devices}: one device trains a run; write hardware.devices=1")
    torch.set_num_threads(cfg.hardware.threads)
    build.quiet()
    made = build.plan(cfg)
    cfg, chosen = matched(cfg, made.backbone)
    if chosen:
        print(chosen, flush=True)
    if not cfg.resume:  # refused before a folder is made; a resumed run is judged by its own configuration
        check_memory(cfg, made)
    run = open_run(cfg, typed)
    if (run.folder / "results.json").exists():
        print(f"already finished\nrun: {run.folder}", flush=True)
        return run.folder
    if run.resumed:
        run.cfg = resolve_hardware(run.cfg)  # the machine may be another one now
        made = build.plan(run.cfg)
    if cfg.resume:
        check_memory(run.cfg, made)
    began = time.monotonic()
    world = build.load_world(run.cfg, made)
    print(f"backbone and data ready in {time.monotonic() - began:.0f} s", flush=True)
    outcome = train_once(run, world)
    arm = train_once(run, world, NO_CONTROL) if run.cfg.control_arm else None
    results = collect(run.cfg, world, outcome, arm, experiment)
    write_results(run.folder / "results.json", results)
    plot_curves(run.folder / "metrics.jsonl", run.folder / "curves.png")
    say_results(results, run.folder)
    return run.folder


def train_once(run: Run, world: build.World, arm: str = "") -> dict:
    """Train one adapter to the end of its budget, or read back what a finished one left. -> outcome.json's content.

    arm: "" trains with conditions; `NO_CONTROL` trains the same adapter on the same images with every condition black.
    """
    cfg, folder = run.cfg, run.folder / arm
    if (folder / "outcome.json").exists():
        return json.loads((folder / "outcome.json").read_text())
    folder.mkdir(exist_ok=True)
    adapter = build.new_adapter(cfg, world.backbone)
    if cfg.hardware.compile:
        build.compile_blocks(world.backbone, adapter)
    facts = announce(cfg, world, adapter, arm)
    config = OmegaConf.to_container(cfg, resolve=True)
    name = "-".join([cfg.name, run.folder.name, *([arm] if arm else [])])
    loggers = build_loggers(cfg.logger, folder, name, config, list(cfg.tags) + ([arm] if arm else []), facts)
    context = build.run_context(cfg, world, run.folder, folder, loggers, with_condition=not arm)
    callbacks = build.callbacks(cfg, context)
    checkpoint = run.checkpoint(arm)
    if checkpoint is not None:
        images = json.loads((checkpoint / "meta.json").read_text())["images_seen"]
        print(f"resuming {folder} at {images} images", flush=True)
        context.data.start = images
        for logger in loggers:
            logger.rewind(images)
    status = "failed"
    try:
        trainer = build.trainer(cfg, context, callbacks)
        trainer.fit(adapter, datamodule=context.data, ckpt_path=checkpoint)
        if world.backbone.weight_hash() != world.backbone_hash:
            raise RuntimeError("the frozen backbone changed while training: this is a bug in the adapter")
        outcome = summarise(context, adapter, callbacks)
        write_atomic(folder / "outcome.json", json.dumps(outcome).encode())
        status = "success"
    finally:
        for logger in loggers:
            logger.close(status)
    return outcome


def check_memory(cfg: DictConfig, made: build.Plan) -> None:
    """Say how much memory training should take, before any weight is read; refuse what the profile cannot hold."""
    hardware = cfg.hardware
    estimate = estimate_for(
        made.backbone,
        lambda backbone: build.new_adapter(cfg, backbone),
        batch=hardware.micro_batch,
        resolution=cfg.resolution,
        precision=hardware.precision,
        ema=cfg.ema_decay > 0,
        accumulates=accumulation(cfg) > 1,
        state_bytes=2 if "8bit" in cfg.optimizer.algorithm["_target_"] else 8,
    )
    print(describe(estimate), flush=True)
    if hardware.memory_gib and estimate.peak_gib > hardware.memory_gib:
        raise UserError(
            f"training should take {estimate.peak_gib:.1f} GiB and hardware={hardware.name} has {hardware.memory_gib:g}: try "
            f"hardware.micro_batch={max(1, hardware.micro_batch // 2)}, hardware.checkpointing=both or adapter=unicon_half"
        )


def announce(cfg: DictConfig, world: build.World, adapter, arm: str) -> dict:
    """Say what is about to be trained."""
    parts = adapter.trainable_parts_m()
    frozen = sum(p.numel() for p in world.backbone.net.parameters()) / 1e6
    split = ", ".join(f"{k} {v:.3f}" for k, v in parts.items())
    print(f"{cfg.adapter.name}{' without condition' if arm else ''} on {cfg.backbone.name}: frozen {frozen:.2f} M, ", end="")
    print(f"trainable {sum(parts.values()):.2f} M ({split})", flush=True)
    if adapter.unreached:
        idle = sum(adapter.get_parameter(name).numel() for name in adapter.unreached) / 1e6
        print(f"not trained, for nothing reads what they compute: {idle:.3f} M ({adapter.unreached[0]}, ...)", flush=True)
    return {"frozen_m": frozen, "trainable_m": sum(parts.values()), "arm": arm or "with_condition"}


def summarise(context, adapter, callbacks: list) -> dict:
    """What a finished training leaves behind for results.json."""
    control = next(c for c in callbacks if isinstance(c, ControlValidation))
    meter = next(c for c in callbacks if isinstance(c, ThroughputMeter))
    return {
        "images_seen": context.total_images,
        "train_seconds": round(meter.train_seconds, 1),
        "step_time_ms": meter.median_step_ms(),
        "peak_mem_gib": peak_mem_gib(adapter.device),
        "trainable_parts_m": adapter.trainable_parts_m(),
        "images_to_control": control.images_to_control,
        "ids": context.held.stores.ids[: context.validation["final_images"]],
        "scores": {k: [float(x) for x in v] for k, v in control.final_scores.items()},
    }


def collect(cfg: DictConfig, world: build.World, outcome: dict, arm: dict | None, experiment: str | None) -> Result:
    """Join outcomes to the run's result: every arm with its interval, and the paired gain over each of them."""
    metrics, best = {}, ceiling(world)
    for name, (unit, better) in world.task.metrics.items():
        right = np.array(outcome["scores"][name])
        others = {a: np.array(outcome["scores"][named(name, a)]) for a in ARMS if a != RIGHT}
        if arm is not None:
            others[NO_CONTROL] = np.array(arm["scores"][named(name, ZERO)])
        metrics[name] = metric(right, unit, better)
        for a, values in others.items():
            metrics[f"{name}/{a}"] = metric(values, unit, better)
            metrics[f"{name}/gain_over_{a}"] = metric(right - values, unit, better)
        metrics[f"{name}/autoencoder_ceiling"] = metric(best[name], unit, better)
    metrics["val_loss"] = metric(np.array(outcome["scores"]["val_loss"]), "mse", "lower")
    if outcome["images_to_control"] is not None:
        count = outcome["images_to_control"]
        for name, value in (("images_to_control", count), ("steps_to_control", count // cfg.budget.effective_batch)):
            metrics[name] = {"value": value, "n": 1, "unit": name.split("_")[0], "better": "lower", "ci95": None}
    step_ms, hardware = outcome["step_time_ms"], cfg.hardware
    sha, dirty = git_state(ROOT)
    return Result(
        experiment=experiment or cfg.name,
        adapter=cfg.adapter.name,
        backbone={"id": world.backbone.facts.source, "revision": world.backbone.facts.revision, "hash": world.backbone_hash},
        task=cfg.task.name,
        seed=cfg.seed,
        images_seen=outcome["images_seen"],
        effective_batch=cfg.budget.effective_batch,
        resolution=cfg.resolution,
        trainable_m=sum(outcome["trainable_parts_m"].values()),
        frozen_m=sum(p.numel() for p in world.backbone.net.parameters()) / 1e6,
        trainable_parts_m=outcome["trainable_parts_m"],
        train_seconds=outcome["train_seconds"],
        step_time_ms=step_ms,
        img_per_s=1000 * cfg.budget.effective_batch / step_ms if step_ms else None,
        peak_mem_gib=outcome["peak_mem_gib"],
        device=torch.cuda.get_device_name() if hardware.accelerator == "gpu" else "cpu",
        precision=hardware.precision,
        flags={
            **{
                k: hardware[k] for k in ("micro_batch", "devices", "workers", "threads", "checkpointing", "compile", "strategy")
            },
            "optimizer": cfg.optimizer.algorithm["_target_"],
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "solver": type(world.held.solver).__name__,
            "sampling_steps": cfg.validation.steps,
            "guidance": cfg.validation.guidance,
        },
        metrics=metrics,
        config_sha=config_sha(cfg),
        git_sha=sha,
        git_dirty=dirty,
        versions=environment(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command_line(),
    )


def ceiling(world: build.World) -> dict[str, np.ndarray]:
    """Scores of the real images after the autoencoder: what no adapter on this backbone can pass by much."""
    rows = list(range(len(world.held.images)))
    pictures = to_bytes(world.codec.decode(world.val.latents.rows("latents", rows)))
    return score_rows(world.held, rows, pictures)


def say_results(results: Result, folder: Path) -> None:
    """The closing lines: the score of each arm, and where to look."""
    print(f"\n{results.images_seen} images in {results.train_seconds:.0f} s of training, {results.img_per_s or 0:.0f} img/s")
    for name, m in results.metrics.items():
        interval = f"  95 % [{m['ci95'][0]:.3f}, {m['ci95'][1]:.3f}]" if m["ci95"] else ""
        print(f"  {name:<42} {m['value']:>9.3f} {m['unit']}{interval}  n={m['n']}")
    print(f"pictures: {folder}/grids   curves: {folder}/curves.png   numbers: {folder}/results.json")
    prompt = (folder / "examples" / "condition-0.txt").read_text().strip()
    print(f"next: python -m src.sample run={folder} prompt=\"'{prompt}'\" condition={folder}/examples/condition-0.png")
    print(f"run: {folder}", flush=True)


if __name__ == "__main__":
    if "--list" in sys.argv[1:]:
        print(support.table(), support.reasons(), sep="\n\n")
    else:
        cli("train", main)
