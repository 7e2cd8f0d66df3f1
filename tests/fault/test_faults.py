"""Faults put into real trainings, each in a process of its own; afterwards the weights equal those of a run that nothing
happened to. What is promised: docs/faults.md."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from tests.conftest import ROOT
from tests.fault.helpers import (
    HANGS_S,
    assert_refused,
    assert_same,
    command,
    environment,
    events,
    folder_of,
    learned,
    losses,
    own_disks,
    resumed,
    trained,
)  # fmt: skip

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One cache for all of them."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def straight(place):
    """The run that nothing happens to."""
    done = trained(place / "straight")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(place / "straight")) == 12
    return place / "straight"


# ---- memory -----------------------------------------------------------------------------------------------------------


def test_out_of_memory_in_training_stops_with_what_to_change_and_loses_no_step(place, straight):
    out = place / "oom"
    done = trained(out, faults=("oom_training:22:1",))  # the second half of the sixth step
    numbers = ("out of memory in training at 20 images", "peak 0.", "hardware.micro_batch=2", "resolution=32")
    assert_refused(done, *numbers, "hardware.micro_batch=1", "hardware.checkpointing=both")
    assert (folder_of(out) / "checkpoints" / "images-000000020").is_dir()  # the fifth step, which no rule would have saved
    assert resumed(out).returncode == 0
    assert_same(out, straight)


def test_out_of_memory_in_training_halves_the_micro_batch(place):
    """The same images, noise and steps; what rounding makes of the halves is what a resume by hand makes of them."""
    by_hand, out = place / "by-hand", place / "halve"
    stopped = trained(by_hand, "budget.stop_at_images=20")
    assert stopped.returncode == 0, stopped.stderr
    assert resumed(by_hand, "hardware=cpu", "hardware.workers=0", "hardware.micro_batch=1").returncode == 0
    done = trained(out, "hardware.oom=halve", faults=("oom_training:22:1",))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on with hardware.micro_batch=1" in done.stdout
    assert_same(out, by_hand)
    assert events(out, "fault")[0]["kind"] == "out_of_memory"
    results = json.loads((folder_of(out) / "results.json").read_text())
    assert results["flags"]["micro_batch"] == 1


def test_out_of_memory_in_the_first_step_starts_over_with_less(place):
    out, small = place / "halve-first", place / "small"
    done = trained(out, "hardware.oom=halve", faults=("oom_training:0:1",))
    assert done.returncode == 0, done.stdout + done.stderr
    assert trained(small, "hardware.micro_batch=1").returncode == 0
    assert_same(out, small)


def test_out_of_memory_in_validation_skips_it_and_then_drawing(place, straight):
    """Two validations before the last; the frozen backbone's pictures are four arms each, of which the first fails."""
    out = place / "oom-val"
    done = trained(out, "callbacks.control.max_failures=2", faults=("oom_validation:2",))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validation at 16 images is skipped" in done.stdout
    assert "no pictures are drawn any more before the last validation: 2 in a row" in done.stdout
    assert [e["images_seen"] for e in events(out, "validation_failed")] == [16, 32]
    assert_same(out, straight)


def test_out_of_memory_in_the_last_validation_saves_and_leaves_only_that(place, straight):
    out = place / "oom-last"
    done = trained(out, "validation.every_images=1000", faults=("oom_validation:1",))
    assert_refused(done, "the last validation failed at 48 images", "resume=")
    assert resumed(out, "validation.every_images=1000").returncode == 0
    assert_same(out, straight)


# ---- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["nan_loss:18", "inf_gradient:5"], ids=["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_before_the_optimizer(place, fault):
    """Equal to a run whose optimizer does nothing at that step, the fifth, the data being sound."""
    out, idle = place / fault.partition(":")[0], place / "idle"
    done = trained(out, faults=(fault,))
    assert done.returncode == 0, done.stdout + done.stderr
    if not idle.exists():
        assert trained(idle, faults=("no_step:5",)).returncode == 0
    assert all(a.equal(b) for a, b in zip(learned(out).values(), learned(idle).values(), strict=True))
    (skipped,) = events(out, "skipped_step")
    assert skipped["images_seen"] == 20
    assert len(skipped["ids"]) == (2 if "loss" in fault else 4)  # the micro-batch, or the whole step
    assert json.loads((folder_of(out) / "outcome.json").read_text())["skipped_steps"] == 1


def test_too_many_in_a_row_end_the_run_and_keep_the_last_good_checkpoint(place, straight):
    out = place / "diverged"
    done = trained(out, "callbacks.guard.max_in_a_row=3", faults=("nan_losses:24",))
    assert_refused(done, "a loss is nan at step 9", "the 3th in a row", "optimizer.algorithm.lr")
    assert resumed(out).returncode == 0  # from the eighth step, two of them skipped; the data is sound now
    assert [e["images_seen"] for e in events(out, "skipped_step")] == [28, 32, 36]
    idle = place / "idle-78"  # whose optimizer did nothing at the two steps that were skipped before the last saving
    assert trained(idle, faults=("no_step:7:8",)).returncode == 0
    assert all(a.equal(b) for a, b in zip(learned(out).values(), learned(idle).values(), strict=True))


def test_weights_that_are_not_finite_are_never_saved(place, straight):
    out = place / "nan-weight"
    done = trained(out, faults=("nan_weight:21",))
    assert_refused(done, "is not finite at step 6", "the last good checkpoint stays")
    assert sorted(p.name for p in (folder_of(out) / "checkpoints").iterdir()) == ["images-000000008", "images-000000016"]
    assert resumed(out).returncode == 0
    assert_same(out, straight)


# ---- killed, stopped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["weights", "whole"])
def test_killed_while_saving_the_checkpoint_before_still_loads(place, straight, where):
    out = place / f"kill-{where}"
    done = trained(out, faults=(f"while_saving:SIGKILL:{where}:3",))
    assert done.returncode == -signal.SIGKILL
    left = sorted(p.name for p in (folder_of(out) / "checkpoints").iterdir())
    assert left == [".images-000000024.part", "images-000000008", "images-000000016"]
    assert resumed(out).returncode == 0
    assert_same(out, straight)
    assert not list((folder_of(out) / "checkpoints").glob(".*"))


def test_killed_in_a_step(place, straight):
    out = place / "killed"
    assert trained(out, faults=("kill:22",)).returncode == -signal.SIGKILL
    assert resumed(out).returncode == 0
    assert_same(out, straight)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("where", ["in_validation:{}", "while_saving:{}:weights:3"], ids=["validation", "saving"])
def test_a_signal_loses_nothing(place, straight, name, where):
    out = place / f"{name}-{where.partition(':')[0]}"
    done = trained(out, faults=(where.format(name),))
    assert done.returncode == 143, done.stdout + done.stderr
    assert events(out, "stopped")[0]["by"] == name
    assert resumed(out).returncode == 0
    assert_same(out, straight)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_in_a_step_and_to_the_whole_group_leaves_the_workers_at_work(place, straight, name):
    out = place / f"group-{name}"
    words = ("hardware.workers=1",)
    done = trained(out, *words, faults=(f"signal_all:20:{name}",))  # the first half of a step: its other half is still wanted
    assert done.returncode == 143, done.stdout + done.stderr
    assert (folder_of(out) / "checkpoints" / "images-000000024").is_dir()
    assert events(out, "stopped")[0]["by"] == name
    assert resumed(out, *words).returncode == 0
    assert_same(out, straight)


# ---- samples ----------------------------------------------------------------------------------------------------------


def test_bad_samples_that_are_replaced_teach_what_their_replacements_teach(place):
    """Equal to a run on a folder where somebody has put the next good picture and caption in the place of each bad one."""
    bad, by_hand, draw = place / "bad-pictures", place / "mended-pictures", np.random.default_rng(0)
    for folder in (bad, by_hand):
        folder.mkdir()
    for number in range(24):
        pixels = draw.integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        for folder in (bad, by_hand):
            Image.fromarray(pixels).save(folder / f"{number:02d}.png")
            (folder / f"{number:02d}.txt").write_text(f"picture {number}")
    (bad / "05.png").write_bytes((bad / "05.png").read_bytes()[:60])  # torn
    (bad / "11.png").write_bytes(b"no picture at all")
    for number in (5, 11):
        for suffix in ("png", "txt"):
            (by_hand / f"{number:02d}.{suffix}").write_bytes((by_hand / f"{number + 1:02d}.{suffix}").read_bytes())
    outs = []
    for folder in (bad, by_hand):
        outs.append(place / f"on-{folder.name}")
        words = ("data=folder", f"data.path={folder}", "data.on_bad_sample=skip", "data.max_bad_share=0.5")
        done = trained(outs[-1], *words)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("are bad and replaced" in done.stdout) == (folder == bad)
    assert_same(*outs)


# ---- room -------------------------------------------------------------------------------------------------------------


def test_what_was_estimated_of_the_disk_is_what_is_written(place, straight):
    from src.room import cache_needs, checkpoint_needs
    from src.world import plan

    cfg = OmegaConf.load(folder_of(straight) / "config.yaml")
    made = plan(cfg)
    (need,) = checkpoint_needs(cfg, made.backbone, resumed=True)
    last = sorted((folder_of(straight) / "checkpoints").glob("images-*"))[-1]
    assert sum(f.stat().st_size for f in last.rglob("*")) == pytest.approx(need.bytes, rel=0.1)
    assert cache_needs([cfg], [made])[0].bytes == 0
    cfg.cache_dir = str(place / "empty")
    shards = sum(f.stat().st_size for f in (place / "cache").glob("[lct]*-*/rows-*.safetensors"))
    assert cache_needs([cfg], [made])[0].bytes <= shards


# ---- disks ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_under_the_run_costs_no_step(place, straight):
    """A real file system of 24 MiB, full from the fourth step to the tenth; W&B's folder lies on it, too."""
    out = place / "full"
    faults = (f"fill_disk:{out}:14:38",)
    words = ("logger=wandb", "callbacks.checkpoints.retry_seconds=0")
    done = own_disks(out, {out: "24m"}, *words, faults=faults)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checkpoint not saved" in done.stdout
    assert "No space left" in done.stdout
    copy = place / "full-copy"
    assert_same(copy, straight)
    assert events(copy, "saved")[0]["images_seen"] == 8


def test_a_full_temporary_folder_costs_nothing(place, straight):
    out, temporary = place / "tmpdir", place / "small-tmp"
    words = ("logger=wandb", "hardware.workers=1")
    done = own_disks(out, {temporary: "64k"}, *words, fill=str(temporary), TMPDIR=str(temporary))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(out, straight)


def test_a_full_disk_under_the_cache_is_one_line_and_goes_on_where_it_was(place, straight):
    out, cache = place / "cache-full", place / "small-cache"
    done = own_disks(out, {cache: "64k"}, f"cache_dir={cache}", faults=("no_check_of_space",))
    assert_refused(done, "cannot be written", "No space left", "cache_dir=")
    done = trained(place / "cache-free", f"cache_dir={cache}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(place / "cache-free", straight)


# ---- what hangs or dies beside the training -----------------------------------------------------------------------------


def test_wandb_that_hangs_holds_up_no_step(place, straight):
    out = place / "wandb"
    began = time.monotonic()
    done = trained(out, "logger=wandb", faults=("stop_wandb:10",))
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < HANGS_S / 2  # W&B itself would wait for ever
    assert_same(out, straight)
    # what fills up first: the calls that wait, or the time to finish
    assert any(f"W&B {words}" in done.stdout for words in ("hangs and is off for this run", "did not finish")), done.stdout


def test_a_wandb_server_that_never_answers_holds_up_no_step(place, straight):
    """Online was asked for, there is a key, and the server takes every connection and says nothing."""
    out, key = place / "silent", "0123456789" * 4
    with silent_server() as (address, taken):
        extra = {"WANDB_MODE": "online", "WANDB_BASE_URL": address, "WANDB_API_KEY": key}
        done = trained(out, "logger=wandb", "logger.mode=online", **extra)
    assert done.returncode == 0, done.stdout + done.stderr
    assert taken, "nobody asked the server"
    assert "W&B offline: the server refused or was too slow" in done.stdout + done.stderr
    assert_same(out, straight)
    assert not [f for f in out.rglob("*") if f.is_file() and key.encode() in f.read_bytes()]


@pytest.mark.parametrize("asks", ["config('')", "fetch(('transformer',))"], ids=["a configuration", "weights"])
def test_a_hub_that_never_answers_is_one_line(tmp_path, asks):
    """Of what is not cached here: asked once, for `hub.WAIT_S`."""
    line = f"""
import time
from src.backbones.source import ModelSource
began = time.monotonic()
try:
    ModelSource('owner/name').{asks}
finally:
    print(time.monotonic() - began)
"""
    with silent_server() as (address, taken):
        env = {**environment(), "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", line], cwd=ROOT, env=env, capture_output=True, text=True, timeout=HANGS_S, check=False
        )
    assert taken, "nobody asked the server"
    assert "SourceError: owner/name is not cached here and the hub cannot be reached" in done.stderr, done.stderr
    assert float(done.stdout) < 60


@contextmanager
def silent_server():
    """An address on this machine whose connections are taken and never answered. -> it, and the connections so far."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        taken = []

        def take():
            with suppress(OSError):  # it is closed at the end
                while True:
                    taken.append(listening.accept()[0])

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", taken
        for connection in taken:
            connection.close()


def test_a_dead_worker_is_replaced_once_at_the_same_position(place, straight):
    out = place / "worker"
    done = trained(out, "hardware.workers=2", faults=("kill_worker:22",))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the loader is started once more" in done.stdout
    assert_same(out, straight)
    assert events(out, "fault")[0]["kind"] == "loader_died"


def test_a_second_dead_worker_ends_the_run_with_a_checkpoint(place, straight):
    out = place / "workers"
    done = trained(out, "hardware.workers=2", faults=("kill_worker:14", "kill_worker:30"))
    # whether the signal is known depends on who sees the death first, the loader's queue or its watch
    assert_refused(done, "a worker of the data loader", "hardware.workers=1, now 2", "ran out of memory")
    assert sorted((folder_of(out) / "checkpoints").glob("images-*"))[-1].name >= "images-000000024"
    assert resumed(out).returncode == 0
    assert_same(out, straight)


def test_slow_reading_is_said_once(place):
    words = ("budget.images=480", "callbacks.checkpoints.every_images=1000", "validation.every_images=1000")
    done = trained(place / "slow", *words, faults=("slow_reading:0.05",))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("waited for data") == 1
    assert len(events(place / "slow", "waits_for_data")) == 1


# ---- two at once ------------------------------------------------------------------------------------------------------


def test_a_second_process_on_one_run_folder_is_refused(place, straight):
    out, go = place / "two", place / "go"
    line = command(f"output_dir={out}", f"cache_dir={place}/cache", faults=(f"wait_for:22:{go}",))
    first = subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for said in first.stdout:
            if said.startswith("waiting"):
                break
        before = {p: p.stat().st_mtime_ns for p in folder_of(out).rglob("*") if p.is_file()}
        second = trained(out, "resume=auto")
        assert_refused(second, "another process", str(first.pid), "trains in this run folder")
        assert {p: p.stat().st_mtime_ns for p in folder_of(out).rglob("*") if p.is_file()} == before
        go.touch()
        assert first.communicate(timeout=HANGS_S)[0] is not None
        assert first.returncode == 0
    finally:
        first.kill()
    assert_same(out, straight)


def test_the_drivers_own_run_is_the_entrys_own(place, straight):
    """The driver adds nothing: `python -m src.train` learns the same."""
    line = command(f"output_dir={place}/plain", f"cache_dir={place}/cache")
    words = line[line.index("--") + 1 :]
    done = subprocess.run(
        [sys.executable, "-m", "src.train", *words], cwd=ROOT, env=dict(os.environ), capture_output=True, check=False
    )
    assert done.returncode == 0
    assert_same(place / "plain", straight)
