"""Waiting for other processes, and whether one still runs: for tests that kill."""

import time
from collections.abc import Callable
from pathlib import Path


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Until it holds. Raises AssertionError when that takes too long."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie, which nobody may be there to bury."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
