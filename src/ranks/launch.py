"""Start a run's processes on this node, one per device, and watch them: when one fails, all end, and the first error is told.

A run on several nodes has one such process on each, as `srun --ntasks-per-node=1` starts them; Slurm's variables, or
NODE_RANK, MASTER_ADDR and MASTER_PORT, say where they meet.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.parent import end_with
from src.results import hide_secrets, scrub
from src.types import UserError

FOLDER = "CONTROLBENCH_RANKS"  # in the environment of a rank: where it tells of its error
ABORT_S = 3.0  # from asking a silent rank where it hangs, to killing it
GRACE_S = 10.0  # for the others to end by themselves, after the first has failed
POLL_S = 0.1
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TOLD_LINES = 25


@dataclass(frozen=True)
class Node:
    """This machine among those of a run. address, port: where rank 0 listens."""

    number: int
    address: str
    port: int


def this_node(nodes: int, env: Mapping[str, str] = os.environ) -> Node:
    """Where this machine stands. Raises UserError where several are wanted and nothing tells which this one is."""
    if nodes == 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return Node(0, "127.0.0.1", free.getsockname()[1])
    number, address = env.get("NODE_RANK", env.get("SLURM_NODEID")), env.get("MASTER_ADDR")
    if address is None and "SLURM_JOB_NODELIST" in env:
        address = first_host(env["SLURM_JOB_NODELIST"])
    if number is None or address is None:
        raise UserError(
            f"hardware.nodes={nodes}: nothing says which node this is; start it on each with srun --ntasks-per-node=1, or set "
            "NODE_RANK, MASTER_ADDR and MASTER_PORT"
        )
    if int(env.get("SLURM_LOCALID", 0)):
        raise UserError(f"hardware.nodes={nodes}: each starts its own ranks; give srun --ntasks-per-node=1")
    if "SLURM_NNODES" in env and int(env["SLURM_NNODES"]) != nodes:
        given = env["SLURM_NNODES"]
        raise UserError(f"hardware.nodes={nodes}, and Slurm gave {given}; write hardware.nodes={given}")
    # a port that all nodes find alike, and other jobs on the machine do not
    port = int(env.get("MASTER_PORT") or 20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000)
    return Node(int(number), address, port)


def first_host(nodes: str) -> str:
    """The first name of Slurm's list: `gpu[03-05,9]` and `gpu03,gpu04` give gpu03."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,]*))?", nodes)
    return found.group(1) + (found.group(2) or "") + (found.group(3) or "")


def launch(hardware: Mapping[str, Any]) -> int:
    """Run this very command as `hardware.devices` ranks until all have ended. -> the exit code of the one that ended first
    with a fault, 143 after a signal, else 0."""
    node, count = this_node(hardware["nodes"]), hardware["devices"]
    folder = Path(tempfile.mkdtemp(prefix="controlbench-ranks-"))
    ranks = [_start(node, local, count, count * hardware["nodes"], folder) for local in range(count)]
    codes: dict[int, int] = {}
    with _forwarding(ranks):
        failed_at, hung = None, set()
        while len(codes) < count:
            time.sleep(POLL_S)
            for local, process in enumerate(ranks):
                if local not in codes and (code := process.poll()) is not None:
                    codes[local] = code
                    if code not in (0, 143) and failed_at is None:
                        failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > GRACE_S and len(codes) < count:
                hung |= _end(ranks, codes)
    bad = {local: code for local, code in codes.items() if code not in (0, 143)}
    if not bad:
        shutil.rmtree(folder, ignore_errors=True)
        return max(codes.values())
    return _tell(folder, node.number * count, bad, hung)


def _start(node: Node, local: int, count: int, world: int, folder: Path) -> subprocess.Popen:
    """A rank; the first one's output goes where this process's does, the others' into a file."""
    rank = node.number * count + local
    env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(local), "NODE_RANK": str(node.number), "WORLD_SIZE": str(world)}
    env |= {"MASTER_ADDR": node.address, "MASTER_PORT": str(node.port), FOLDER: str(folder), "PYTHONFAULTHANDLER": "1"}
    if node.address == "127.0.0.1":
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that nothing resolves stops no run
    command = [sys.executable, *sys.orig_argv[1:]]
    if local == 0:
        return subprocess.Popen(command, env=env)
    with (folder / f"rank-{rank}.log").open("wb") as out:
        return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)


def _end(ranks: Sequence[subprocess.Popen], codes: Mapping[int, int]) -> set[int]:
    """End who is still there. -> their local numbers.

    The signal makes Python write where each thread is, which tells what a hung rank waits for.
    """
    left = [process for local, process in enumerate(ranks) if local not in codes]
    for process in left:
        process.send_signal(signal.SIGABRT)
    until = time.monotonic() + ABORT_S
    while any(process.poll() is None for process in left) and time.monotonic() < until:
        time.sleep(POLL_S)
    for process in left:
        process.kill()
        process.wait()
    return {local for local in range(len(ranks)) if local not in codes}


@contextlib.contextmanager
def _forwarding(ranks: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Inside, a signal to this process reaches all ranks: one of them could not stop alone."""

    def forward(number: int, _frame: object) -> None:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(folder: Path, base: int, bad: Mapping[int, int], hung: set[int]) -> int:
    """Print the first error, then a line for each other rank of this node. -> the exit code of the first.

    base: the rank of local number 0; bad: exit codes by local number; hung: those that had to be ended.
    """
    for log in folder.glob("rank-*.log"):
        scrub(log)
    told = sorted((json.loads(file.read_text()) for file in folder.glob("rank-*.json")), key=lambda e: e["time"])
    silent = {base + local: code for local, code in bad.items()}
    for error in told:
        silent.pop(error["rank"], None)
    lines: list[str] = []
    if told and told[0]["refusal"]:
        print(f"error: {told[0]['line']}", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        return 2
    killed = [rank for rank, code in silent.items() if code < 0 and rank - base not in hung]
    if killed and all("Connection" in e["line"] or "closed by peer" in e["line"] for e in told):
        told = []  # the others only noticed that it had gone
    if told:
        lines += [f"error: rank {told[0]['rank']} failed first: {told[0]['line']}", told[0]["traceback"].rstrip()]
        lines += [f"rank {e['rank']} then: {e['line']}" for e in told[1:]]
    for rank, code in sorted(silent.items()):
        said = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        what = "did not answer and was ended" if rank - base in hung else f"ended without a word ({said})"
        lines.append(f"{'error: ' if not lines else ''}rank {rank} {what}")
        if (log := folder / f"rank-{rank}.log").exists():
            lines += [f"  | {line}" for line in _last_words(log)]
    print("\n".join([*lines, f"what the ranks said: {folder}"]), file=sys.stderr, flush=True)
    codes = [code for code in bad.values() if code > 0]
    return codes[0] if codes else 1


def _last_words(log: Path) -> list[str]:
    """The end of what a rank printed; of one that was ended, where its main thread stood, the innermost call first."""
    lines = log.read_text(errors="replace").splitlines()
    stood = max((n for n, line in enumerate(lines) if line.startswith("Current thread")), default=None)
    return lines[-TOLD_LINES:] if stood is None else lines[stood : stood + TOLD_LINES]


# ---- in a rank --------------------------------------------------------------------------------------------------------


def record(error: BaseException) -> None:
    """Tell the process that watches of an error, at once: others will fail because of it, and the first one counts."""
    if FOLDER not in os.environ:
        return
    rank, line = int(os.environ["RANK"]), " ".join(str(error).split()) or type(error).__name__
    refusal = isinstance(error, UserError)
    line = line if refusal else f"{type(error).__name__}: {line}"
    found = {"time": time.time(), "rank": rank, "refusal": refusal, "line": line}
    found = hide_secrets(found | {"traceback": "".join(traceback.format_exception(error))})
    part = Path(os.environ[FOLDER]) / f".rank-{rank}"
    with contextlib.suppress(OSError):  # it has gone
        part.write_text(json.dumps(found))
        os.replace(part, part.with_name(f"rank-{rank}.json"))


def end_with_parent() -> None:
    """End this rank when the process that watches it is killed: nobody else would."""
    if FOLDER in os.environ:
        end_with(os.getppid())
