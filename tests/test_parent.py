"""What a process has started ends with it, however it ends."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.processes import alive, wait_for

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


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_the_workers_of_a_pool_end_with_the_process_that_made_it(tmp_path, way):
    program = tmp_path / "starts.py"
    program.write_text(STARTS)
    maker = subprocess.Popen([sys.executable, str(program), str(ROOT), str(tmp_path), way])
    wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    pids = [int(file.stem) for file in tmp_path.glob("*.pid")]
    assert all(alive(pid) for pid in pids)
    maker.kill()
    maker.wait()
    wait_for(lambda: not any(alive(pid) for pid in pids))
