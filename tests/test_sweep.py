"""Sweeps: whatever a cell does, it becomes a row, the others run, and what is missing can be run later."""

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hydra._internal.utils import _locate
from hydra.core.plugins import Plugins

from src.config import CONF, cli, load, preflight
from src.sweep import launcher
from src.sweep.cells import Cell
from src.sweep.folder import SweepFolder
from src.sweep.process import WARNING, CellProcess, judge
from src.sweep.rows import BROKEN, Row, exit_code, identity, key_of
from src.types import UserError
from tests.conftest import ROOT
from tests.processes import alive

# What stands in for a verb's process: `seed` says how it ends, a file `mended` that all is well now. It says when it ran
# and which GPUs it saw.
VERB = """
import json, os, signal, sys, time
from pathlib import Path
here = Path(sys.argv[0]).parent
seed = int(next((w.split("=")[1] for w in sys.argv if w.startswith("seed=")), 0))
with (here / "began.jsonl").open("a") as file:
    file.write(json.dumps([sys.argv[1:], seed]) + chr(10))
began = time.time()
print("seed", seed)
if not (here / "mended").exists():
    if seed == 1:
        raise ValueError("no such thing")
    if seed == 2:
        sys.exit(3)
    if seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == 4:
        time.sleep(600)
if seed >= 20:
    time.sleep(0.4)
    (here / f"ran-{seed}.json").write_text(json.dumps([os.environ.get("CUDA_VISIBLE_DEVICES"), began, time.time()]))
print(f"run: runs/x/{seed}")
"""


def main(cfg):
    raise AssertionError("a cell ran inside the sweep's own process")


class Shell:
    """Runs `<verb> -m ...` in this process, with cells that are a small script."""

    def __init__(self, folder: Path, monkeypatch, capsys):
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.verb = folder / "verb.py"
        self.verb.write_text(VERB)

    def __call__(self, *words: str) -> int:
        """The exit code; what was printed is in `out` and `err`, the sweep's folder in `sweep`."""
        words = [*words, f"output_dir={self.folder}"]
        self.monkeypatch.setattr(sys, "orig_argv", ["python", str(self.verb), *words])
        self.monkeypatch.setattr(sys, "argv", [str(self.verb), *words])
        with pytest.raises(SystemExit) as stop:
            cli("train", main)
        self.out, self.err = self.capsys.readouterr()
        last = self.out.strip().splitlines()[-1:] or [""]
        self.sweep = Path(last[0].removeprefix("sweep: ")) if last[0].startswith("sweep: ") else None
        return stop.value.code

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.sweep / "cells.jsonl").read_text().splitlines()]

    def began(self) -> list[int]:
        file = self.folder / "began.jsonl"
        return [json.loads(line)[1] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    return Shell(tmp_path, monkeypatch, capsys)


# ---- how a process ended ----------------------------------------------------------------------------------------------

ENDINGS = [
    ("print('run: runs/a/b')", "done", 0, None, None),
    ("raise ValueError('a word')", "failed", 1, None, "exit code 1: ValueError: a word"),
    ("import sys; sys.exit(3)", "failed", 3, None, "exit code 3: it printed nothing"),
    ("import sys; print('error: x=1 is wrong', file=sys.stderr); sys.exit(2)", "refused", 2, None, "x=1 is wrong"),
    ("import sys; sys.exit(2)", "failed", 2, None, "exit code 2"),
    ("import os; os.kill(os.getpid(), 9)", "killed", 137, "SIGKILL", "out-of-memory killer"),
    ("import os; os.kill(os.getpid(), 11)", "killed", 139, "SIGSEGV", "killed (SIGSEGV)"),
    ("import sys; sys.exit(143)", "killed", 143, "SIGTERM", "killed (SIGTERM)"),  # as src.train ends after it has saved
    ("raise MemoryError", "oom", 1, None, "MemoryError"),
    ("import numpy; numpy.empty(2**50)", "oom", 1, None, "_ArrayMemoryError"),
    (
        "class OutOfMemoryError(RuntimeError): __module__ = 'torch'\nraise OutOfMemoryError('CUDA out of memory.')",
        "oom", 1, None, "torch.OutOfMemoryError: CUDA out of memory.",
    ),
    (
        "import os, sys; print(\"terminate called after throwing an instance of 'std::bad_alloc'\"); os.abort()",
        "oom", 134, "SIGABRT", "bad_alloc",
    ),
    (
        "import sys; print('error: out of memory: it did not fit', file=sys.stderr); print('run: runs/c'); sys.exit(3)",
        "oom", 3, None, "out of memory: it did not fit",
    ),
    ("print('a MemoryError was survived'); raise KeyError('x')", "failed", 1, None, "exit code 1: KeyError: 'x'"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "status", "exit_code", "signal_name", "says"), ENDINGS, ids=lambda v: str(v)[:40])
def test_an_ending_is_called_by_its_name(code, status, exit_code, signal_name, says, tmp_path):
    process = CellProcess([sys.executable, "-c", code], tmp_path / "log", dict(os.environ), None, 1)
    found = judge(process.wait(0.02), process.log, None)
    assert (found.status, found.exit_code, found.signal) == (status, exit_code, signal_name)
    assert (says is None and found.error is None) or says in found.error
    assert found.run == next((run for run in ("runs/a/b", "runs/c") if run in code), None)


def test_torch_out_of_memory_on_a_cpu_is_known(tmp_path):
    with pytest.raises(RuntimeError) as says:
        torch.empty(2**58)
    process = CellProcess([sys.executable, "-c", f"raise RuntimeError({str(says.value)!r})"], tmp_path / "log", {}, None, 1)
    assert judge(process.wait(0.02), process.log, None).status == "oom"


def test_a_cell_that_does_not_end_is_ended_with_its_workers(tmp_path):
    """It is asked first, which this one does not hear, and killed with its whole group when the grace is over."""
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('heard', flush=True))\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True)\n"
        "while True: time.sleep(600)"
    )
    process = CellProcess([sys.executable, "-c", code], tmp_path / "log", dict(os.environ), 2.0, 0.5)
    found = judge(process.wait(0.02), process.log, 2.0)
    assert (found.status, found.signal, found.error) == ("timeout", "SIGKILL", "not finished after 2 s")
    worker, heard = (tmp_path / "log").read_text().split()
    assert heard == "heard"
    deadline = time.monotonic() + 5
    while alive(int(worker)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(int(worker))


# ---- a sweep ----------------------------------------------------------------------------------------------------------


def test_no_cell_ends_the_others_and_the_rest_runs_later(shell):
    words = ["-m", "seed=0,1,2,3", "sweep.grace_s=1"]
    assert shell(*words) == 1
    first = shell.rows()
    assert [(row["number"], row["status"], row["exit_code"], row["signal"]) for row in first] == [
        (0, "done", 0, None),
        (1, "failed", 1, None),
        (2, "failed", 3, None),
        (3, "killed", 137, "SIGKILL"),
    ]
    assert [row["run"] for row in first] == ["runs/x/0", None, None, None]
    assert first[1]["error"] == "exit code 1: ValueError: no such thing"
    assert all(f"seed={n}" in row["overrides"] and Path(row["log"]).read_text() for n, row in enumerate(first))
    assert "failed: job 1: exit code 1: ValueError: no such thing\n  | seed 1\n" in shell.err
    assert "4 cells: 1 done, 2 failed, 1 killed" in shell.out
    record = json.loads((shell.sweep / "sweep.json").read_text())
    assert record["overrides"][0] == "seed=0,1,2,3"
    assert {"program", "date", "command", "commit", "dirty"} <= set(record)
    assert "hydra" not in (shell.folder / "began.jsonl").read_text()  # a cell is started as a person would start it
    assert "sweep." not in (shell.folder / "began.jsonl").read_text()

    (shell.folder / "mended").touch()
    (shell.folder / "began.jsonl").unlink()
    folder = shell.sweep
    assert f"sweep.resume={folder}" in shell.out
    assert shell(*words, f"sweep.resume={folder}", "sweep.timeout_s=500") == 0, shell.err
    assert shell.sweep == folder
    assert shell.began() == [1, 2, 3]
    assert [row["status"] for row in shell.rows()[4:]] == ["done"] * 3
    assert "4 cells: 4 done" in shell.out
    assert (folder / "logs" / "1-2.log").exists()
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]

    assert shell("-m", "seed=0,1,2", f"sweep.resume={folder}") == 2
    assert shell.err.startswith(f"error: sweep.resume={folder}: another sweep is there: train seed=0,1,2,3; repeat")
    assert shell.err.count("\n") == 1
    assert shell("-m", "seed=0,1", f"sweep.resume={shell.folder}") == 2
    assert shell.err.startswith(f"error: sweep.resume={shell.folder}: no sweep.json there")


def test_what_cannot_run_is_found_without_a_process(shell):
    """An adapter that is not for this backbone is skipped, values that do not go together are refused; the rest runs."""
    words = ["-m", "adapter=unicon,controlnet", "backbone=sd3_tiny", "budget.effective_batch=32,20", "hardware=cpu"]
    assert shell(*words, "hardware.micro_batch=16") == 2
    assert [row["status"] for row in shell.rows()] == ["done", "refused", "skipped", "refused"]
    assert len(shell.began()) == 1
    assert "skipped: job 2: adapter=controlnet backbone=sd3_tiny: " in shell.err
    assert "refused: job 1: command line: budget.effective_batch=20 is not a multiple" in shell.err
    assert [row["exit_code"] for row in shell.rows()] == [0, None, None, None]


def test_a_sweep_of_skipped_cells_is_none_the_worse(shell):
    assert shell("-m", "adapter=controlnet,dit_controlnet", "backbone=sd3_tiny") == 0
    assert "2 cells: 1 skipped, 1 done" in shell.out


def test_a_time_limit_becomes_a_row(shell):
    assert shell("-m", "seed=4,0", "sweep.timeout_s=1", "sweep.grace_s=1", "sweep.jobs=2") == 1
    assert {row["number"]: row["status"] for row in shell.rows()} == {0: "timeout", 1: "done"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_cell_and_keeps_the_rows(number, shell):
    def interrupt() -> None:
        while 4 not in shell.began():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    before = signal.signal(number, signal.default_int_handler)  # a shell may have started these tests with SIGINT ignored
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        assert shell("-m", "seed=0,4,5") == 128 + number
    finally:
        signal.signal(number, before)
    assert [row["number"] for row in shell.rows()] == [0]
    assert shell.began() == [0, 4]
    assert "3 cells: 1 done, 2 not run" in shell.out
    assert f"sweep.resume={shell.sweep}" in shell.out
    assert subprocess.run(["pgrep", "-f", str(shell.verb)], check=False, capture_output=True).returncode == 1


# ---- room for several -------------------------------------------------------------------------------------------------


def test_each_gpu_has_one_cell_at_a_time(shell, monkeypatch):
    monkeypatch.setattr(launcher, "visible_gpus", lambda: ["4", "7"])
    assert shell("-m", "seed=20,21,22,23", "hardware=gpu_24g", "sweep.jobs=3") == 0
    ran = [json.loads((shell.folder / f"ran-{seed}.json").read_text()) for seed in range(20, 24)]
    assert {gpu for gpu, _, _ in ran} == {"4", "7"}
    for gpu in ("4", "7"):
        times = sorted((began, ended) for found, began, ended in ran if found == gpu)
        assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(times))


def test_the_gpus_of_this_process_are_handed_on(monkeypatch):
    monkeypatch.setattr(launcher.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8f2")
    assert launcher.visible_gpus() == ["3", "GPU-8f2"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert launcher.visible_gpus() == ["0", "1"]


def test_a_cell_that_measures_on_a_cpu_is_alone():
    plain, timed, on_gpu = Cell(0, ()), Cell(1, (), timed=True), Cell(2, (), timed=True, gpus=1)
    assert launcher.has_room(plain, [plain], 0, 0, False)
    assert launcher.has_room(timed, [], 0, 0, False)
    assert not launcher.has_room(timed, [plain], 0, 0, False)
    assert not launcher.has_room(plain, [timed], 0, 0, False)
    assert launcher.has_room(on_gpu, [on_gpu], 1, 1, True)
    assert not launcher.has_room(on_gpu, [on_gpu], 1, 0, True)
    assert not launcher.has_room(on_gpu, [on_gpu], 0, 0, False)  # no GPU here: they would share the CPU


# ---- the folder -------------------------------------------------------------------------------------------------------

RECORD = {"program": "train", "overrides": ["seed=1,2"], "date": "d", "command": "c", "commit": "a" * 40, "dirty": False}


def row(number: int, status: str = "done") -> Row:
    return Row(number, (f"seed={number}", "cache_dir=x"), status, 1.0, "d", exit_code=0)


def test_two_sweeps_never_share_a_folder(tmp_path, capsys):
    first, second = (SweepFolder(tmp_path / "s", resumed=False) for _ in range(2))
    first.begin(RECORD)
    second.begin(RECORD)
    assert (first.path.name, second.path.name) == ("s", "s-1")
    again = SweepFolder(first.path, resumed=True)
    with pytest.raises(UserError, match="is still running"):
        again.begin(RECORD)
    first.release()
    again.begin({**RECORD, "commit": "b" * 40})
    assert "began at commit aaaaaaaaaa, what is missing runs at bbbbbbbbbb" in capsys.readouterr().out
    assert json.loads((first.path / "sweep.json").read_text())["resumed"][0]["commit"] == "b" * 40


def test_a_cell_that_outlives_its_sweep_keeps_the_folder(tmp_path):
    folder = SweepFolder(tmp_path / "s", resumed=False)
    folder.begin(RECORD)
    wait = "import sys; sys.stdin.read()"
    cell = subprocess.Popen([sys.executable, "-c", wait], stdin=subprocess.PIPE, pass_fds=[folder.lock])
    folder.release()  # the sweep is gone
    with pytest.raises(UserError, match="or a cell of it, is still running"):
        SweepFolder(folder.path, resumed=True).begin(RECORD)
    cell.communicate()
    SweepFolder(folder.path, resumed=True).begin(RECORD)


def test_a_torn_last_row_is_cut_off_and_the_last_row_of_a_cell_counts(tmp_path):
    folder = SweepFolder(tmp_path / "s", resumed=False)
    folder.begin(RECORD)
    folder.append(row(1, "failed"))
    folder.append(row(2))
    with (folder.path / "cells.jsonl").open("a") as file:
        file.write('{"number": 3, "overr')
    folder.release()
    again = SweepFolder(folder.path, resumed=True)
    again.begin(RECORD)
    again.append(row(1))
    assert {key: found.status for key, found in again.latest().items()} == {("seed=1",): "done", ("seed=2",): "done"}


def test_a_cell_is_known_by_what_it_is_and_not_by_its_place():
    assert identity(["b=2", "a=1", "sweep.jobs=3", "resume=auto", "cache_dir=x"]) == identity(["a=1", "b=2", "output_dir=y"])
    assert identity(["hardware=cpu"]) != identity(["hardware=h200"])
    assert [key_of(o) for o in ("+a.b=1=2", "~c", "hydra/launcher=x")] == ["a.b", "c", "hydra.launcher"]


def test_the_exit_code_tells_the_worst():
    cells = [(0, ("seed=0",)), (1, ("seed=1",))]

    def code(*statuses: str) -> int:
        return exit_code(cells, {(f"seed={n}",): row(n, status) for n, status in enumerate(statuses)})

    assert code("done", "skipped") == 0
    assert code("done", "refused") == 2
    assert {code("refused", status) for status in BROKEN} == {1}
    assert code("done") == 1  # the other never ran


# ---- Hydra and other launchers ----------------------------------------------------------------------------------------


def test_the_launcher_needs_no_other_plugin(monkeypatch):
    monkeypatch.setitem(sys.modules, "hydra_plugins", None)
    launcher.register()
    assert _locate("hydra_plugins.controlbench.CellLauncher") is launcher.CellLauncher
    assert launcher.CellLauncher in Plugins.instance().discover()


def test_a_sweep_is_no_science_and_its_limits_are_checked(capsys):
    assert load("train").sweep == {"resume": None, "jobs": 1, "timeout_s": None, "grace_s": 60}
    with pytest.raises(SystemExit):
        preflight("train", ["-m", "seed=1,2", "sweep.jobs=0"])
    assert "sweep.jobs=0 is below 1" in capsys.readouterr().err


def test_a_launcher_that_is_not_installed_is_named(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "submitit" in name else found(name))
    with pytest.raises(SystemExit) as stop:
        preflight("train", ["-m", "seed=1,2", "hydra/launcher=submitit_slurm"])
    assert stop.value.code == 2
    said = "error: command line: hydra/launcher=submitit_slurm is not here: pip install hydra-submitit-launcher\n"
    assert capsys.readouterr().err == said


def test_hydras_own_launcher_gives_rows_too(shell):
    assert shell("-m", "seed=1,0", "hydra/launcher=basic") == 1
    assert [row["status"] for row in shell.rows()] == ["failed", "done"]


def test_an_experiment_can_be_a_sweep(shell):
    """`hydra.mode: MULTIRUN` in a file: cells hear of the file's folder, and that they are no sweep."""
    (shell.folder / "conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params: {seed: '2,0'}\n"
    (shell.folder / "conf" / "experiment" / "mine.yaml").write_text(text)
    folder = f"{shell.folder / 'conf'}"
    assert shell("--config-dir", folder, "+experiment=mine") == 1, shell.err
    assert {row["number"]: row["status"] for row in shell.rows()} == {0: "failed", 1: "done"}
    words = json.loads((shell.folder / "began.jsonl").read_text().splitlines()[0])[0]
    assert words == ["seed=2", "+experiment=mine", f"output_dir={shell.folder}", "hydra.mode=RUN", "--config-dir", folder]


needs_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="the extra `slurm` is not installed")


def test_a_warned_job_is_given_back_after_its_cell_has_saved(tmp_path):
    """The handler of a launcher, as submitit's, requeues and leaves. Slurm warns the cell, too, which must not die of that."""
    saved, given_back = tmp_path / "saved", []
    cell = f"""
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.5)
    pathlib.Path({str(saved)!r}).touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""

    def requeue(number, frame):
        given_back.append(saved.exists())
        raise SystemExit(-1)

    before = signal.signal(WARNING, requeue)
    try:
        process = CellProcess([sys.executable, "-c", cell], tmp_path / "log", dict(os.environ), None, 30.0)
        while "ready" not in (tmp_path / "log").read_text():
            time.sleep(0.02)
        os.kill(process.pid, WARNING)
        time.sleep(0.1)
        assert process.poll() is None, "the warning is the launcher's"
        threading.Timer(0.3, lambda: os.kill(os.getpid(), WARNING)).start()
        with pytest.raises(SystemExit), process.ending_first(WARNING):
            process.wait()
    finally:
        signal.signal(WARNING, before)
    assert given_back == [True]
    assert process.poll().code == 143


@needs_submitit
def test_the_warning_is_the_one_that_submitit_asks_for():
    from submitit.core.job_environment import JobEnvironment

    assert JobEnvironment._usr_sig() == WARNING


@needs_submitit
@pytest.mark.slow
def test_submitit_gives_rows_too(shell, monkeypatch):
    """Two jobs of its local executor, one after the other: a cell that is killed is a row, and ends neither job nor sweep."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert shell("-m", "seed=3,0", "hydra/launcher=submitit_local") == 1, shell.err
    assert [(row["number"], row["status"]) for row in shell.rows()] == [(0, "killed"), (1, "done")]
    assert "2 cells: 1 killed, 1 done" in shell.out
    assert list(shell.sweep.glob(".submitit/*/*_submitted.pkl"))


@needs_submitit
@pytest.mark.parametrize("name", ["submitit_local", "submitit_slurm"])
def test_the_launchers_of_submitit_take_what_their_files_say(name, tmp_path):
    """Every key is one that the plugin knows, and submitit takes their values; nothing is sent to a queue."""
    from hydra_plugins.hydra_submitit_launcher import config
    from omegaconf import OmegaConf

    schema = config.LocalQueueConf if name.endswith("local") else config.SlurmQueueConf
    file = OmegaConf.load(CONF / "hydra" / "launcher" / f"{name}.yaml")
    around = {"sweep": {"jobs": 3}, "hydra": {"sweep": {"dir": str(tmp_path)}, "job": {"name": "train"}, "launcher": file}}
    given = OmegaConf.to_container(OmegaConf.create(around).hydra.launcher, resolve=True)
    made = OmegaConf.merge(OmegaConf.structured(schema), given)
    assert made.submitit_folder == f"{tmp_path}/.submitit/%j"
    if name.endswith("slurm"):
        from submitit.slurm.slurm import _make_sbatch_string

        kept = ("nodes", "gpus_per_node", "cpus_per_task", "signal_delay_s", "partition", "additional_parameters")
        text = _make_sbatch_string("true", tmp_path, **{k: v for k in kept if (v := made[k]) is not None})
        assert "#SBATCH --requeue" in text
        assert made.array_parallelism == 3
        assert made.signal_delay_s > load("train").sweep.grace_s
