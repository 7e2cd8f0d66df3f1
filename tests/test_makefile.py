"""The Makefile's measurement on a GPU, without one: its commands compose, and what fails is told and fails the whole."""

import os
import shlex
import subprocess
import sys

import pytest

from src.config import preflight
from tests.conftest import ROOT

VERBS = {"src.bench": "bench", "src.bench.speed": "bench", "src.bench.peer": "bench_peer", "src.report": "report"}


def make(target, *words, env=None):
    """Run make, which knows nothing of a make around it."""
    outer = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", target, *words], cwd=ROOT, env=outer | (env or {}), capture_output=True, text=True, timeout=120, check=False
    )


def commands():
    """What `make bench-gpu` would run, as words; without python's path and what stands behind `||`."""
    told = make("-n", "bench-gpu", "BENCH_PYTHON=python", "PEER=peer.py").stdout
    return [shlex.split(line.partition(" || ")[0])[2:] for line in told.splitlines() if line.startswith("python -m ")]


def test_there_are_all_kinds_of_measurements():
    verbs = [words[0] for words in commands()]
    assert set(verbs) == {*VERBS, "src.bench.markdown"}
    assert verbs.count("src.bench") > 5


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:90])
def test_every_command_composes(words):
    verb, *given = words
    if verb == "src.bench.markdown":
        return
    if verb == "src.bench.speed":
        given = given[1:]  # the switches
    asks = [word.replace("hardware=auto", "hardware=h200").replace("mode=measure", "mode=estimate") for word in given]
    estimable = [word for word in asks if not word.startswith(("hardware.compile=", "hardware.channels_last="))]
    preflight(VERBS[verb], estimable)  # ends the process where something is wrong


@pytest.fixture
def stand_in(tmp_path):
    """A python that notes what it is asked for, and fails where a word of it is FAILS."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$*" >> "$ASKED"\ncase "$*" in *"$FAILS"*) exit 1;; esac\n')
    program.chmod(0o755)
    return [f"BENCH_PYTHON={program}", f"GPU={tmp_path / 'gpu'}"], {"ASKED": str(tmp_path / "asked")}


@pytest.mark.parametrize("fails", ["floor=true what=training", "src.report"])
def test_one_failure_stops_nothing_and_fails_the_whole(stand_in, fails, tmp_path):
    words, env = stand_in
    done = make("bench-gpu", *words, env=env | {"FAILS": fails})
    assert done.returncode != 0
    assert "not everything of the last command ended well" in done.stderr
    assert "src.bench.markdown" in (tmp_path / "asked").read_text()
    again = make("bench-gpu", *words, env=env | {"FAILS": "nothing at all"})
    assert again.returncode == 0, again.stderr


def test_a_machine_without_a_gpu_is_refused_before_anything_runs(tmp_path):
    stub = tmp_path / "torch.py"
    stub.write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    words = [f"BENCH_PYTHON={sys.executable}", f"GPU={tmp_path / 'gpu'}"]
    done = make("bench-gpu", *words, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode != 0
    assert "torch finds no GPU here" in done.stderr
    assert not (tmp_path / "gpu").exists()
