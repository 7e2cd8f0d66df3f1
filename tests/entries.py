"""Runs an entry as a person does, in a process of its own, without paying some ten seconds of imports each time.

A server per test process has imported the packages that every entry imports, none of them this project's, and forks a child
for each call (multiprocessing's fork server). What the child then does is `python -m src.<entry> ...` to the letter: its own
environment, working folder, argv, file descriptors, exit code, and every module of src/ read anew.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["torch", "pytorch_lightning", "torchmetrics", "torchvision", "diffusers", "transformers", "scipy.stats", "hydra"]

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PACKAGES)


def run_entry(
    entry: str, *overrides: str, timeout: float = 300, fresh: bool = False, **extra_env: str
) -> subprocess.CompletedProcess:
    """`python -m src.<entry> ...` from the repository root; -> as `subprocess.run` with captured text.

    entry: one with a name in front of it, as tests.<name>, is taken as it is.
    fresh: by an interpreter of its own instead, for a test of what is imported. Raises subprocess.TimeoutExpired after
    `timeout` seconds, with the child killed. What a package reads of the environment while it is imported
    (HF_HUB_OFFLINE) must stand there before the first call of the session.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **extra_env}
    words = [sys.executable, "-m", entry if entry.startswith("tests.") else f"src.{entry}", *overrides]
    if fresh:
        return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        child = _server.Process(target=_entry, args=(words, env, str(out), str(err)))
        child.start()
        child.join(timeout)
        if late := child.is_alive():
            child.kill()
            child.join()
        said = [file.read_text() if file.exists() else "" for file in (out, err)]
    if late:
        raise subprocess.TimeoutExpired(words, timeout, *said)
    return subprocess.CompletedProcess(words, child.exitcode, *said)


def _entry(words: list[str], env: dict[str, str], out: str, err: str) -> None:
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    sys.path.insert(0, str(ROOT))
    for number, file in ((0, os.devnull), (1, out), (2, err)):
        opened = os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (open(n, "w" if n else "r", closefd=False) for n in (0, 1, 2))  # noqa: SIM115
    sys.argv, sys.orig_argv = words[2:], words
    code = 0
    try:
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    except SystemExit as left:
        code = left.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    # what an interpreter does at its end, and a forked child would not
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)
