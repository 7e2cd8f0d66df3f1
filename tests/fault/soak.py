"""A long training with random kills beside one without: equal to the bit, or not; and whether it holds more and more.

    python -m tests.fault.soak --steps 4000 --kills 12 --out runs/soak/soak.json

Both are processes of `python -m src.train`, whose memory and open files are read every second. The one is let alone. The other
is killed at random moments (SIGKILL twice as often as SIGTERM), in whatever it does then, and resumed by the same command. Then
weights, averages, optimizer states, the loss of every step and the held-out scores are compared. `passed` in the output says
what was judged; exit code 1 if anything of it failed.
"""

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
    "callbacks.meter.every_steps=1", "callbacks.vitals.heartbeat_seconds=0.2",
]  # fmt: skip
EVERY_STEPS, VALIDATE_STEPS, BATCH = 50, 500, 2  # between checkpoints, between validations; images of a step
LIVES = (0.1, 1.5)  # steps of a life before it is killed, as a share of what each would have if all had the same
STARTS_S, ENDS_S = 300.0, 3600.0  # a process that does not train, or does not end, by then hangs
GROWTH_MIB, GROWTH_FILES = 32.0, 0  # from the second quarter to the last, by the median: more than that is a leak
LIFE_MIB, LIFE_FILES = 128.0, 8  # what a resumed process may hold beyond the one that was let alone: what it reads back


def words(steps: int, out: Path) -> list[str]:
    """The overrides of a training of so many steps below a folder."""
    more = [f"budget.images={BATCH * steps}", f"callbacks.checkpoints.every_images={BATCH * EVERY_STEPS}"]
    more += [f"validation.every_images={BATCH * VALIDATE_STEPS}", f"cache_dir={out / 'cache'}"]
    return [*WORDS, *more]


class Trained:
    """One process of `python -m src.train`. Its errors go to a file: a pipe that nobody empties would stop it."""

    def __init__(self, line: list[str], out: Path):
        self.out, self.errors = out, out.parent / f"{out.name}.err"
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.errors, "wb") as err:
            command = [sys.executable, "-m", "src.train", *line, f"output_dir={out}"]
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=err)
        self.began, self.held = time.monotonic(), []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def watch(self, until: Callable[[], bool], most_s: float, every_s: float = 1.0) -> bool:
        """Read what it holds every so often. -> whether `until` came before its end. Raises SystemExit after most_s seconds."""
        limit = time.monotonic() + most_s
        while self.process.poll() is None:
            if until():
                return True
            if time.monotonic() > limit:
                self.process.kill()
                raise SystemExit(f"nothing came of the process in {most_s:.0f} s; its last words: {self.last_words()}")
            time.sleep(every_s)
            beat = self.beat()
            if beat.get("images_seen"):
                try:
                    self.held.append({"images_seen": beat["images_seen"], **held_by(self.process.pid)})
                except (OSError, ValueError):
                    continue  # it, or its worker, has just ended
        return False

    def beat(self) -> dict[str, Any]:
        """The heartbeat, if it is this process's own."""
        run = run_of(self.out)
        beat = last_beat(run) if run else {}
        return beat if beat.get("pid") == self.process.pid else {}

    def last_words(self) -> str:
        return self.errors.read_text(errors="replace")[-2000:]


def run_of(out: Path) -> Path | None:
    return next(iter(out.glob("template_*/*/")), None)


def held_by(pid: int) -> dict[str, float]:
    """Resident memory and open files of a process and its children, from /proc."""
    family = [pid, *(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    rss = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in family) * os.sysconf("SC_PAGE_SIZE")
    return {"rss_mib": round(rss / 2**20, 1), "open_files": sum(len(os.listdir(f"/proc/{one}/fd")) for one in family)}


def straight(line: list[str], out: Path) -> list[dict[str, float]]:
    """The run that is let alone. -> what it held, once per second of training."""
    one = Trained(line, out)
    one.watch(lambda: False, 4 * ENDS_S)
    if one.process.returncode:
        raise SystemExit(f"the run that was let alone failed: {one.last_words()}")
    return one.held


def broken(line: list[str], out: Path, steps: int, kills: int, seed: int) -> list[dict[str, Any]]:
    """The run that is killed so many times and resumed each time. -> its lives, the last of which ended by itself.

    A life is counted in steps, so that a slow machine is no other test than a fast one; the moment within a step is chance.

    Raises SystemExit for a death that was not caused here, whatever its signal: it would repeat itself for ever.
    """
    drawn, lives = random.Random(seed), []
    while True:
        one, sent = Trained([*line, "resume=auto"], out), None
        images = BATCH * drawn.uniform(*LIVES) * steps / (kills + 1)
        number, moment = signal.SIGTERM if drawn.random() < 1 / 3 else signal.SIGKILL, drawn.uniform(0, 1)
        trains = one.watch(lambda one=one: one.beat().get("phase") == "training", STARTS_S, 0.05)
        if trains and len(lives) < kills:
            goal = (one.beat().get("images_seen") or 0) + images
            if one.watch(lambda one=one, goal=goal: (one.beat().get("images_seen") or 0) >= goal, ENDS_S, 0.5):
                time.sleep(moment)
                one.process.send_signal(number)
                sent = number
        one.watch(lambda: False, ENDS_S)
        code = one.process.returncode
        if code != 0 and (sent is None or code not in (-sent, 128 + sent)):
            raise SystemExit(f"the run that was killed failed, exit code {code} after {sent}: {one.last_words()}")
        lives.append(
            {
                "signal": sent.name if sent and code else None,
                "exit_code": code,
                "seconds_lived": round(one.seconds, 1),
                "images_seen": _reached(out),
                "held_at_most": at_most(one.held),
            }
        )
        print(json.dumps(lives[-1]), flush=True)
        if code == 0:
            return lives


def _reached(out: Path) -> int:
    file = (run_of(out) or out) / "metrics.jsonl"
    rows = read_rows(file) if file.exists() else []
    return max((row["images_seen"] for row in rows if "train/loss" in row), default=0)


def at_most(held: list[dict[str, float]]) -> dict[str, float]:
    return {name: max((row[name] for row in held), default=0) for name in ("rss_mib", "open_files")}


def growth(held: list[dict[str, float]], images: int) -> dict[str, float]:
    """Median of the last quarter of a run minus that of its second quarter, for memory and open files."""
    second = [row for row in held if images / 4 <= row["images_seen"] < images / 2]
    last = [row for row in held if row["images_seen"] >= images * 3 / 4]
    if not (second and last):
        raise SystemExit("the run was too short to be looked at once in its second and in its last quarter; give more --steps")
    medians = [[statistics.median(row[name] for row in rows) for name in ("rss_mib", "open_files")] for rows in (second, last)]
    return {name: round(b - a, 1) for name, a, b in zip(("rss_mib", "open_files"), *medians, strict=True)}


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


def judged(equal: dict[str, bool], lives: list[dict[str, Any]], kills: int, grown: dict, held: dict) -> dict[str, bool]:
    """What the soak promises, point by point. held: at most, by the run that was let alone."""
    most = [life["held_at_most"] for life in lives]
    return {
        "equal": all(equal.values()),
        "kills_reached": sum(life["signal"] is not None for life in lives) == kills,
        "memory_does_not_grow": grown["rss_mib"] <= GROWTH_MIB,
        "open_files_do_not_grow": grown["open_files"] <= GROWTH_FILES,
        "no_life_holds_more_memory": all(m["rss_mib"] <= held["rss_mib"] + LIFE_MIB for m in most),
        "no_life_holds_more_files": all(m["open_files"] <= held["open_files"] + LIFE_FILES for m in most),
    }


def soak(steps: int, kills: int, seed: int, out: Path) -> dict[str, Any]:
    """Both runs below a folder, and what came of them."""
    line = words(steps, out)
    sha, dirty = git_state(ROOT)  # of the code that trains, not of what becomes of it meanwhile
    began = time.monotonic()
    held = straight(line, out / "straight")
    middle = time.monotonic()
    lives = broken(line, out / "broken", steps, kills, seed)
    ended = time.monotonic()
    one, other = learned(out / "straight"), learned(out / "broken")
    equal, grown = {name: same(one[name], other[name]) for name in one}, growth(held, BATCH * steps)
    return {
        "passed": judged(equal, lives, kills, grown, at_most(held)),
        "steps": steps,
        "losses_compared": len(one["losses"]),
        "equal": equal,
        "kills_asked": kills,
        "lives": lives,
        "seconds": {"let_alone": round(middle - began, 1), "killed": round(ended - middle, 1)},
        "looked": len(held),
        "held_at_most": at_most(held),
        "grown_from_second_to_last_quarter": grown,
        "allowed": {"growth": [GROWTH_MIB, GROWTH_FILES], "life_beyond": [LIFE_MIB, LIFE_FILES]},
        "sizes": sizes(run_of(out / "straight"), one, steps),
        "events_of_the_killed_run": _counts(run_of(out / "broken")),
        "seed": seed,
        "config": WORDS,
        "command": command_line(),
        "git_sha": sha,
        "git_dirty": dirty,
        "versions": environment(),
        "hardware": {"cpu": cpu(), "cores_used": len(os.sched_getaffinity(0)), "load_average_15_min": os.getloadavg()[2]},
    }


def sizes(run: Path, found: dict[str, Any], steps: int) -> dict[str, int]:
    """What was trained: images, numbers and bytes."""
    checkpoint = run / "checkpoints" / found["checkpoint"]
    return {
        "images": BATCH * steps,
        "effective_batch": BATCH,
        "trained_numbers": sum(tensor.numel() for tensor in found["weights"].values()),
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()),
        "run_folder_bytes": sum(file.stat().st_size for file in run.rglob("*") if file.is_file()),
    }


def _counts(run: Path) -> dict[str, int]:
    kinds = [row["event"] for row in read_rows(run / EVENTS)]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def cpu() -> str:
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
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(given.out, (json.dumps(results, indent=1) + "\n").encode())
    print(json.dumps({key: results[key] for key in ("passed", "held_at_most", "grown_from_second_to_last_quarter")}))
    raise SystemExit(0 if all(results["passed"].values()) else 1)


if __name__ == "__main__":
    main()
