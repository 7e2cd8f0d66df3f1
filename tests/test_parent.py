"""What a process has started ends with it, however it ends."""

import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

STARTS = """
import os, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from src.parent import worker_pool

def work(folder):
    (pathlib.Path(folder) / f"{os.getpid()}.pid").touch()
    time.sleep(600)

if __name__ == "__main__":
    with worker_pool(2, spawn=sys.argv[3] == "spawn") as pool:
        for job in [pool.submit(work, sys.argv[2]) for _ in range(2)]:
            job.result()
"""


def running(pid: str) -> bool:
    """Whether a process is there and no zombie, which nobody may be there to bury."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True, check=False).stdout.strip()
    return bool(state) and not state.startswith("Z")


def wait_for(true, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_the_workers_of_a_pool_end_with_the_process_that_made_it(tmp_path, way):
    program = tmp_path / "starts.py"
    program.write_text(STARTS)
    maker = subprocess.Popen([sys.executable, str(program), str(ROOT), str(tmp_path), way])
    wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    pids = [file.stem for file in tmp_path.glob("*.pid")]
    assert all(running(pid) for pid in pids)
    maker.kill()
    maker.wait()
    wait_for(lambda: not any(running(pid) for pid in pids))
