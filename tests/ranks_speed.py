"""Two processes on two cores against one on one: images per second, and whether every step has the same loss and weights.

    python -m tests.ranks_speed --images 3200 --repeats 3 --out runs/ranks_speed.json

Both are trainings of `python -m src.train` with one thread per process, in turns, so the machine has to be otherwise idle; the
load that it had is written down. Speeds are medians over the steps with their quartiles, the ratio is of the runs of a turn.
Exit code 1 if the losses or the weights differ.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from src.results import Result, command_line, environment, git_state, read_results, read_rows, write_atomic
from src.spread import spread
from tests.conftest import ROOT
from tests.fault.soak import cpu

WORDS = [
    "hardware=cpu", "hardware.workers=0", "hardware.threads=1", "hardware.micro_batch=16", "budget.effective_batch=32",
    "logger=local", "data.train_images=512", "data.val_images=8", "validation.every_images=100000", "validation.images=4",
    "validation.final_images=4", "validation.steps=2", "callbacks.meter.every_steps=1", "optimizer.warmup_images=640",
]  # fmt: skip


def trained(place: Path, images: int, devices: int) -> Path:
    """-> the run folder. One device takes its 32 images as two micro-batches of 16, two take one each: the same sums."""
    words = [*WORDS, f"budget.images={images}", f"output_dir={place / str(devices)}", f"cache_dir={place.parent / 'cache'}"]
    line = [sys.executable, "-m", "src.train", *words, f"hardware.devices={devices}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return Path(done.stdout.strip().splitlines()[-1].removeprefix("run: "))


def found(place: Path, images: int, repeats: int) -> dict[str, Any]:
    """Speed and equality of both."""
    trained(place / "warm", 64, 1)  # so that nothing is read for the first time in the first run alone
    before = os.getloadavg()[0]
    turns = [{devices: trained(place / str(turn), images, devices) for devices in (1, 2)} for turn in range(repeats)]
    told = [{devices: read_results(run / "results.json") for devices, run in runs.items()} for runs in turns]
    ratios = [results[2].img_per_s / results[1].img_per_s for results in told]
    equal = [equality(runs) for runs in turns]
    sha, dirty = git_state(ROOT)
    return {
        "img_per_s": {
            "one_process": speeds(told, 1),
            "two_processes": speeds(told, 2),
            "ratio": {"runs": ratios, **spread(ratios)},
        },
        "steps": sum(one["steps"] for one in equal),
        "equal_losses": sum(one["equal_losses"] for one in equal),
        "largest_difference_of_a_loss": max(one["largest_difference_of_a_loss"] for one in equal),
        "equal_weights": all(one["equal_weights"] for one in equal),
        "load_average_before": before,
        "config": WORDS,
        "command": command_line(),
        "git_sha": sha,
        "git_dirty": dirty,
        "versions": environment(),
        "hardware": {"cpu": cpu(), "cores_used": len(os.sched_getaffinity(0))},
    }


def speeds(told: Sequence[dict[int, Result]], devices: int) -> list[dict[str, Any]]:
    """{median, quartiles} of each run, over its steps."""
    return [{"median": results[devices].img_per_s, "quartiles": results[devices].img_per_s_quartiles} for results in told]


def equality(runs: dict[int, Path]) -> dict[str, Any]:
    """Whether both runs of a turn had the same losses and ended with the same weights."""
    rows = {n: [(r["images_seen"], r["train/loss"]) for r in read_rows(run / "metrics.jsonl") if "train/loss" in r]
            for n, run in runs.items()}  # fmt: skip
    last = {n: load_file(sorted((run / "checkpoints").glob("images-*"))[-1] / "adapter.safetensors") for n, run in runs.items()}
    return {
        "steps": len(rows[1]),
        "equal_losses": sum(a == b for a, b in zip(rows[1], rows[2], strict=True)),
        "largest_difference_of_a_loss": max(abs(a[1] - b[1]) for a, b in zip(rows[1], rows[2], strict=True)),
        "equal_weights": last[1].keys() == last[2].keys() and all(torch.equal(last[1][key], last[2][key]) for key in last[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = found(Path(folder), given.images, given.repeats)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(given.out, (json.dumps(results, indent=1) + "\n").encode())
    shown = ("img_per_s", "steps", "equal_losses", "largest_difference_of_a_loss", "equal_weights", "load_average_before")
    print(json.dumps({key: results[key] for key in shown}))
    raise SystemExit(0 if results["equal_weights"] and results["equal_losses"] == results["steps"] else 1)


if __name__ == "__main__":
    main()
