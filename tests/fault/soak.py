"""A long training with random kills beside one without: equal to the bit, or not.

    python -m tests.fault.soak --steps 4000 --kills 12 --out experiments/soak/results.json

Both are processes of `python -m src.train`. The one is let alone; its memory and open files are read every second. The other is
killed at random moments (SIGKILL twice as often as SIGTERM), in whatever it does then, and resumed by the same command. Then
weights, averages, optimizer states, the loss of every step and the held-out scores are compared.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from src.events import EVENTS, last_beat
from src.results import command_line, environment, git_state, read_rows, write_atomic
from tests.conftest import ROOT

# the smallest adapter, on pictures of 32 pixels; micro-batches of one, so that a kill can fall between the halves of a step
WORDS = [
    "adapter=template", "backbone=pixart_tiny", "resolution=32", "logger=local", "hardware=cpu", "hardware.workers=1",
    "hardware.micro_batch=1", "budget.effective_batch=2", "optimizer.warmup_images=200", "data.train_images=256",
    "data.val_images=4", "caption_dropout=0.3", "validation.images=2", "validation.final_images=4", "validation.steps=2",
    "callbacks.meter.every_steps=1",
]  # fmt: skip
EVERY_STEPS, VALIDATE_STEPS = 50, 500  # between checkpoints, and between validations
LONGEST_S, QUIET_S = (2.0, 25.0), 120.0  # from the start of training to the kill; the longest that a process may be silent


def words(steps: int, out: Path) -> list[str]:
    """The overrides of a training of so many steps below a folder."""
    more = [f"budget.images={2 * steps}", f"callbacks.checkpoints.every_images={2 * EVERY_STEPS}"]
    more += [f"validation.every_images={2 * VALIDATE_STEPS}", f"cache_dir={out / 'cache'}"]
    return [*WORDS, *more]


def start(line: list[str]) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", "src.train", *line], cwd=ROOT, env=env, **pipes)


def run_of(out: Path) -> Path | None:
    return next(iter(out.glob("template_*/*/")), None)


def held_by(pid: int) -> dict[str, float]:
    """Resident memory and open files of a process and its children, from /proc."""
    family = [pid, *(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    rss = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in family) * os.sysconf("SC_PAGE_SIZE")
    return {"rss_mib": round(rss / 2**20, 1), "open_files": sum(len(os.listdir(f"/proc/{one}/fd")) for one in family)}


def straight(line: list[str], out: Path) -> list[dict[str, float]]:
    """The run that is let alone. -> what it held, once per second of training."""
    process, found = start([*line, f"output_dir={out}"]), []
    while process.poll() is None:
        time.sleep(1)
        run = run_of(out)
        beat = last_beat(run) if run else {}
        if beat.get("images_seen"):
            try:
                found.append({"images_seen": beat["images_seen"], **held_by(process.pid)})
            except (OSError, ValueError):
                continue  # it, or its worker, has just ended
    if process.returncode:
        raise SystemExit(f"the run that was let alone failed: {process.stderr.read().decode()[-2000:]}")
    return found


def broken(line: list[str], out: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """The run that is killed so many times and resumed each time. -> what was done to it."""
    drawn, done = random.Random(seed), []
    while True:
        process, began = start([*line, f"output_dir={out}", "resume=auto"]), time.monotonic()
        wait = drawn.uniform(*LONGEST_S)
        number = signal.SIGTERM if drawn.random() < 1 / 3 else signal.SIGKILL
        if len(done) < kills and _trains(process, out):
            time.sleep(wait)
            process.send_signal(number)
        _, said = process.communicate(timeout=3600)
        if process.returncode == 0:
            return done
        if process.returncode not in (-signal.SIGKILL, 143):
            raise SystemExit(f"the run that was killed failed: {said.decode()[-2000:]}")
        rows = read_rows(run_of(out) / "metrics.jsonl") if (run_of(out) / "metrics.jsonl").exists() else []
        reached = max((row["images_seen"] for row in rows if "train/loss" in row), default=0)
        seconds = round(time.monotonic() - began, 1)
        done.append({"signal": number.name, "seconds_lived": seconds, "images_seen": reached, "exit_code": process.returncode})
        print(json.dumps(done[-1]), flush=True)


def _trains(process: subprocess.Popen, out: Path) -> bool:
    """Wait until this process trains; False if it ended before."""
    until = time.monotonic() + QUIET_S
    while process.poll() is None and time.monotonic() < until:
        run = run_of(out)
        beat = last_beat(run) if run else {}
        if beat.get("pid") == process.pid and beat.get("phase") == "training":
            return True
        time.sleep(0.05)
    return False


def same(a: Any, b: Any) -> bool:
    """Whether two trees of tensors and plain values are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def learned(out: Path) -> dict[str, Any]:
    """All that the two runs must agree in."""
    run = run_of(out)
    last = sorted((run / "checkpoints").glob("images-*"))[-1]
    state = torch.load(last / "state.pt", weights_only=True)
    rows = read_rows(run / "metrics.jsonl")
    return {
        "checkpoint": last.name,
        "weights": load_file(last / "adapter.safetensors"),
        "averages": load_file(last / "adapter_ema.safetensors"),
        "optimizer_states": [state["optimizer_states"], state["lr_schedulers"]],
        "losses": [(r["images_seen"], r["train/loss"], r["train/grad_norm"]) for r in rows if "train/loss" in r],
        "scores": json.loads((run / "outcome.json").read_text())["scores"],
    }


def soak(steps: int, kills: int, seed: int, out: Path) -> dict[str, Any]:
    """Both runs below a folder, and what came of them."""
    line = words(steps, out)
    began = time.monotonic()
    found = straight(line, out / "straight")
    middle = time.monotonic()
    done = broken(line, out / "broken", kills, seed)
    ended = time.monotonic()
    one, other = learned(out / "straight"), learned(out / "broken")
    quarter = [row for row in found if row["images_seen"] >= steps / 2] or found
    sha, dirty = git_state(ROOT)
    return {
        "steps": steps,
        "losses_compared": len(one["losses"]),
        "kills": done,
        "equal": {name: same(one[name], other[name]) for name in one},
        "seconds": {"let_alone": round(middle - began, 1), "killed": round(ended - middle, 1)},
        "held_at_a_quarter": quarter[0],
        "held_at_the_end": found[-1],
        "held_at_most": {name: max(row[name] for row in found) for name in ("rss_mib", "open_files")},
        "events_of_the_killed_run": _counts(run_of(out / "broken")),
        "seed": seed,
        "config": WORDS,
        "command": command_line(),
        "git_sha": sha,
        "git_dirty": dirty,
        "versions": environment(),
        "hardware": {"cpu": _cpu(), "cores_used": len(os.sched_getaffinity(0))},
    }


def _counts(run: Path) -> dict[str, int]:
    kinds = [row["event"] for row in read_rows(run / EVENTS)]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def _cpu() -> str:
    names = [x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = soak(given.steps, given.kills, given.seed, Path(folder))
    write_atomic(given.out, (json.dumps(results, indent=1) + "\n").encode())
    print(json.dumps({key: results[key] for key in ("equal", "held_at_a_quarter", "held_at_the_end")}))
    raise SystemExit(0 if all(results["equal"].values()) else 1)


if __name__ == "__main__":
    main()
