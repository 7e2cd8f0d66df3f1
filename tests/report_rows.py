"""Results for the tests of the report: the committed run with changes, cells of a benchmark, evaluations, pictures."""

import json

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from src.plots import GRID_COLUMNS
from src.results.cost import FLAGS, FLOPS, MEMORY, PHASES
from src.results.design import NO_OPTIONS
from tests.conftest import ROOT

COMMITTED = ROOT / "experiments" / "unicon_sd3_canny" / "results.json"
LATER = ("design", "data", "task_settings", "noise_seed")  # not in results of the first months; a test gives what it is about


def options(adapter, **changes):
    """An adapter's own keys as its yaml file has them, which is what a benchmark writes and a training's design holds."""
    file = ROOT / "conf" / "adapter" / f"{adapter}.yaml"
    node = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
    return {key: value for key, value in node.items() if key not in NO_OPTIONS} | changes


def design(adapter, **changes):
    """The design of a training as results hold it."""
    rest = {"learning_rate": 2e-3, "recipe": "fair", "caption_dropout": 0.1, "optimizer.warmup_images": 1600, "reuse": 1}
    return options(adapter) | rest | changes


def make_run(root, name, scores=None, ids=None, config=None, **changes):
    """-> a run folder: the committed result with changes, scores per image, a configuration."""
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    raw = json.loads(COMMITTED.read_text()) | dict.fromkeys(LATER) | {"date": f"2026-01-0{len(name)}T00:00:00+00:00"} | changes
    (folder / "results.json").write_text(json.dumps(raw))
    if scores is not None:
        kept = {"ids": ids or [str(i) for i in range(len(scores))], "scores": {"canny_f1": list(scores)}}
        (folder / "outcome.json").write_text(json.dumps(kept))
    if config is not None:
        (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def make_cell(root, name, flags=None, **changes):
    """-> a folder with the results.json of a measured cell of a benchmark; flags are changed by name."""
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    known = dict.fromkeys(FLAGS, "none") | {"precision": "32-true", "micro_batch": 4, "naive": False} | (flags or {})
    memory = {part: 0.5 + 0.25 * i for i, part in enumerate(MEMORY)}
    middle = {phase: 10.0 * (i + 1) for i, phase in enumerate(PHASES)}
    times = {phase: {"median": m, "quartiles": [0.9 * m, 1.1 * m], "n": 20} for phase, m in middle.items()}
    raw = {
        "kind": "cost", "mode": "measure", "what": "training", "status": "done", "adapter": "unicon",
        "backbone": {"name": "sd3_tiny", "id": "embedded:sd3_tiny", "revision": "local"},
        "adapter_options": options(changes.get("adapter", "unicon")),
        "hardware": "cpu", "device": "cpu",
        "resolution": 64, "batch": 4, "precision": "32-true", "trainable_m": 3.6, "frozen_m": 3.5,
        "trainable_parts_m": {"copies": 3.6},
        "peak_mem_gib": sum(memory.values()), "peak_when": "backward", "memory_gib": memory, "saved_gib": 1.0,
        "phases_gib": {"forward": 5.0}, "device_memory_gib": None,
        "flops": {**{part: 1_000_000_000 * (i + 1) for i, part in enumerate(FLOPS)}, "recomputed": 0, "condition": 0},
        "step_time_ms": times, "arithmetic_ms": None, "img_per_s": 100.0, "mfu": 0.25, "latency_ms": None,
        "sampling": None, "rates": None, "predicted": {"peak_mem_gib": 8.5, "step_time_ms": None}, "flags": known,
        "seed": 0, "git_sha": "a" * 40, "versions": {"torch": "2"}, "date": "2026-01-01T00:00:00+00:00",
        "command": "python -m src.bench", "git_dirty": False,
    } | changes  # fmt: skip
    (folder / "results.json").write_text(json.dumps(raw))
    return folder


def estimate(**changes):
    """Changes that turn a measured cell into an estimated one."""
    bound = dict.fromkeys(PHASES, 5.0) | {"bound": True}
    return {"mode": "estimate", "step_time_ms": bound, "img_per_s": None, "mfu": None, "predicted": None} | changes


def evaluation(folder, **changes):
    """Put an evaluation of the committed run's numbers into a folder."""
    raw = json.loads(COMMITTED.read_text())
    same = (
        "adapter",
        "backbone",
        "task",
        "resolution",
        "seed",
        "images_seen",
        "config_sha",
        "trainable_m",
        "img_per_s",
        "device",
    )
    same += ("precision", "flags", "git_sha", "versions", "date", "command", "metrics")
    made = {name: raw[name] for name in same} | {"kind": "evaluation", "manifest": "cafe" * 4, "draw_seconds": 1.0}
    made |= {"subject": folder.name, "adapter_hash": folder.name, "evaluation_set": {"name": "scenes", "hash": "beef", "n": 8}}
    (folder / "results.json").write_text(json.dumps(made | changes))


def cells(folder, seed, controlled):
    """Grid pictures of two scenes: the shared ones from `seed`, the controlled ones from `controlled`."""
    shared, own = np.random.default_rng(seed), np.random.default_rng(controlled)
    where = folder / "grids" / "cells-000032000"
    where.mkdir(parents=True)
    for scene in range(2):
        for column in range(len(GRID_COLUMNS)):
            draw = own if column > 2 else shared
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(where / f"{scene}-{column}.png")
