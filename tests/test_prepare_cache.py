"""`python -m src.prepare cache`: told first, resumable, shared between processes, keyed by what decides a row."""

import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from src import build, prepare
from src.config import load, resolve_hardware
from src.data import cache, stores
from src.data.cache import TensorStore, shard_rows
from src.data.locks import RowLocks
from src.data.scenes import SceneSource
from src.data.stores import build_stores, plan_stores
from src.tasks.canny import Canny
from src.types import Sample, UserError
from tests.conftest import CPU, QUICK, ROOT, run_entry
from tests.processes import wait_for

COUNT, STUCK = 96, 40
FORK = multiprocessing.get_context("fork")


class Recorded(SceneSource):
    """Scenes that note which of them are drawn, and one of which may take for ever."""

    def __init__(self, log: Path, stuck_at: int = -1):
        super().__init__("scenes", 0, COUNT, 8, "train", 64)
        self.log, self.stuck_at = log, stuck_at

    def __getitem__(self, index):
        if index == self.stuck_at:
            time.sleep(600)
        with self.log.open("a") as file:
            file.write(f"{index}\n")
        return super().__getitem__(index)


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 8 rows, of which a process takes two at a time."""
    monkeypatch.setattr(cache, "SHARD", 8)
    monkeypatch.setattr(cache, "BLOCK", 16)


@pytest.fixture
def codec(sd3_tiny):
    return sd3_tiny.load_codec(CPU)


@pytest.fixture
def fill(sd3_tiny, codec):
    """Fills a folder as a training would."""

    def run(source, folder, space="latent", said=None) -> None:
        say = (said if said is not None else []).append
        build_stores([source], Canny("canny", 50, 120, 0.8), sd3_tiny, codec, space, folder, CPU, 0, 0, say)

    return run


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the locks, which are empty."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".locks"}


def drawn(log: Path) -> list[int]:
    return sorted(int(line) for line in log.read_text().split()) if log.exists() else []


def start(run, *args) -> multiprocessing.Process:
    process = FORK.Process(target=run, args=args)
    process.start()
    return process


def kill(process: multiprocessing.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(_loaded, tmp_path_factory):
    """What an uninterrupted process writes, in small shards."""
    folder, backbone = tmp_path_factory.mktemp("whole"), _loaded("sd3_tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD", 8)
        patch.setattr(cache, "BLOCK", 16)
        source, task = Recorded(folder / "log"), Canny("canny", 50, 120, 0.8)
        build_stores([source], task, backbone, backbone.load_codec(CPU), "latent", folder / "c", CPU, 0, 0, lambda _: None)
    backbone.drop_text()
    assert drawn(folder / "log") == list(range(COUNT))
    return content(folder / "c")


# ---- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_bytes_are_told_before_anything_is_drawn_and_are_right(fill, tmp_path, space):
    class Silent(SceneSource):
        def __getitem__(self, index):
            raise KeyboardInterrupt

    said, told = [], {}
    with pytest.raises(KeyboardInterrupt):
        fill(Silent("scenes", 0, 12, 8, "train", 64), tmp_path, space, said)
    fill(SceneSource("scenes", 0, 12, 8, "train", 64), tmp_path, space)
    for line in said:
        name, size = re.match(r"cache (\S+): 12 rows, ([\d.]+) MiB in ", line).groups()
        told[name] = float(size)
    assert len(told) == 3
    for name, size in told.items():
        tensors = load_file(tmp_path / name / "rows-00000000.safetensors")
        written = sum(t.numel() * t.element_size() for t in tensors.values())
        facts = json.loads((tmp_path / name / "store.json").read_text())
        assert facts["row_bytes"] * 12 == written
        assert facts["rows_per_shard"] == 256
        assert size == pytest.approx(written / 2**20, abs=0.05)


@pytest.mark.parametrize("name", ["sd3_tiny", "pixart_tiny", "sd21_tiny"])
def test_the_size_of_a_text_row_follows_from_the_facts(name, request):
    backbone = request.getfixturevalue(name)
    text = backbone.encode_text(["a large red ball, gray floor"], CPU)
    found = sum(x.numel() * 2 for x in text.fields().values())
    assert stores.text_bytes(backbone.facts) == found


def test_too_small_a_disk_is_refused_at_once(fill, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"cache_dir=.*MiB are to be written and the disk has 0\.0 MiB free"):
        fill(Recorded(tmp_path / "log"), tmp_path / "cache")
    assert drawn(tmp_path / "log") == []


def test_shards_are_bounded_in_rows_and_bytes():
    assert [shard_rows(size) for size in (1, 4096, 2**18, 3 * 2**20, 2**26, 2**30)] == [256, 256, 256, 16, 1, 1]


def test_pictures_are_encoded_a_few_at_a_time(fill, codec, tmp_path, monkeypatch):
    fill(SceneSource("scenes", 0, 12, 8, "train", 64), tmp_path / "at_once")
    monkeypatch.setattr(stores, "BATCH_PIXELS", 3 * 64 * 64)  # room for three: a power of two divides a shard, so two
    sizes, encode = [], type(codec).encode
    monkeypatch.setattr(type(codec), "encode", lambda self, x: (sizes.append(len(x)), encode(self, x))[1])
    fill(SceneSource("scenes", 0, 12, 8, "train", 64), tmp_path / "in_twos")
    assert sizes == [2] * 12 + [1]  # latents, conditions, and the black picture at the end
    for one in (tmp_path / "at_once").rglob("rows-*"):
        two = tmp_path / "in_twos" / one.relative_to(tmp_path / "at_once")
        ours, theirs = load_file(one), load_file(two)
        assert all(torch.allclose(ours[k], theirs[k], atol=1e-4) for k in ours)


def test_pictures_of_several_sizes_are_kept_apart_and_read_as_one(sd3_tiny, codec, tmp_path):
    sizes = [(64, 64), (32, 64), (64, 64), (64, 32), (32, 64)]

    class Buckets(SceneSource):
        def size_of(self, index):
            return sizes[index]

        def __getitem__(self, index):
            sample, (height, width) = super().__getitem__(index), sizes[index]
            return Sample(sample.id, sample.image[:height, :width], sample.caption)

    source, task = Buckets("scenes", 0, 5, 8, "train", 64), Canny("canny", 50, 120, 0.8)
    (made,) = build_stores([source], task, sd3_tiny, codec, "pixel", tmp_path, CPU, 0, 0, lambda _: None)
    assert sorted(map(list, made.buckets)) == [[0, 2], [1, 4], [3]]
    for rows in made.buckets:
        order = [int(r) for r in rows[::-1]]
        height, width = sizes[order[0]]
        assert made.latents.rows("latents", order).shape == (len(order), 16, height // 8, width // 8)
        shown = made.condition_rows(order)[0].mul(255).byte().movedim(0, -1).numpy()
        assert np.array_equal(shown, task.condition_of(source[order[0]], 0))
    with pytest.raises(ValueError, match="are of 2 sizes"):
        made.latents.rows("latents", [0, 1])


# ---- kills and company ------------------------------------------------------------------------------------------------


def test_after_a_kill_the_rest_is_computed_and_equals_an_uninterrupted_run(fill, small_shards, whole, tmp_path):
    folder, log = tmp_path / "killed", tmp_path / "killed.log"
    victim = start(fill, Recorded(log, STUCK), folder)
    wait_for(lambda: list(folder.glob("conditions-*/rows-00000032*")))
    kill(victim)
    done = content(folder)
    assert {name: whole[name] for name in done} == done  # what is there is whole
    assert 0 < len(done) < len(whole)
    shard = next(f for f in folder.rglob("rows-00000000*"))
    (shard.parent / ".rows-00000088.safetensors.1").write_bytes(b"half")  # as if it had been killed while writing
    log.unlink()
    fill(Recorded(log), folder)
    assert content(folder) == whole
    assert drawn(log) == list(range(STUCK - STUCK % 8, COUNT))


def test_two_processes_share_the_work(fill, small_shards, whole, tmp_path):
    folder, log = tmp_path / "both", tmp_path / "both.log"
    processes = [start(fill, Recorded(log), folder) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert content(folder) == whole
    assert drawn(log) == list(range(COUNT))  # each scene once


def test_what_a_killed_process_held_is_taken_over_by_one_that_waits(fill, small_shards, whole, tmp_path):
    folder, log = tmp_path / "waits", tmp_path / "waits.log"
    victim = start(fill, Recorded(log, STUCK), folder)
    wait_for(lambda: STUCK - 1 in drawn(log))
    heir = start(fill, Recorded(log), folder)
    others = set(range(COUNT)) - set(range(32, 48))  # the block that is held
    wait_for(lambda: others <= set(drawn(log)))
    assert heir.is_alive()
    kill(victim)
    heir.join()
    assert heir.exitcode == 0
    assert content(folder) == whole


def test_rows_are_locked_against_other_processes_only(tmp_path):
    mine = RowLocks(tmp_path)
    assert mine.take(range(0, 8))

    def other(queue) -> None:
        theirs = RowLocks(tmp_path)
        queue.put([theirs.take(range(4, 12)), theirs.take(range(8, 16))])

    queue = FORK.Queue()
    process = start(other, queue)
    assert queue.get(timeout=60) == [False, True]
    process.join()
    mine.release(range(0, 8))
    assert mine.take(range(0, 16))


def test_without_locks_everything_is_still_computed(fill, small_shards, whole, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("src.data.locks.fcntl.lockf", none)
    fill(Recorded(tmp_path / "log"), tmp_path / "bare")
    assert content(tmp_path / "bare") == whole


def test_many_shards_are_read_with_few_open(small_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MAX_OPEN", 2)
    store = TensorStore(tmp_path / "s", 64)
    for rows in store.missing():
        store.write(rows, {"x": torch.arange(rows.start, rows.stop)})
    order = [3, 60, 20, 4, 63, 11]
    assert store.rows("x", order).tolist() == order
    assert len(store._open) == 2


# ---- keys -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (80, 64), (60 * i, 10, 10)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}\n")
    return folder


@pytest.fixture
def names(pictures, codec, tmp_path):
    """The stores of a training, by kind."""

    def of(*words: str, changed_codec=None) -> dict[str, str]:
        words = ("data=folder", f"data.path={pictures}", "data.val_images=1", "validation.final_images=1", *words)
        cfg = load("train", ["validation.images=1", "hardware=cpu", *words])
        made = build.plan(cfg)
        shelf = plan_stores(
            made.train_source, made.task, made.backbone, changed_codec or codec, "latent", tmp_path / "cache", cfg.seed
        )
        return {store.folder.name.split("-")[0]: store.folder.name for store in shelf.stores}

    return of


def test_what_does_not_decide_a_row_keeps_the_cache(names):
    assert names() == names("optimizer.algorithm.lr=1e-5", "seed=3", "budget.images=64000", "adapter.copy=decoder")


def test_what_decides_a_row_renews_the_stores_that_hold_it(names, codec, pictures, sd3_tiny):
    before = names()

    def renewed(now: dict[str, str]) -> set[str]:
        return {kind for kind in now if now[kind] != before[kind]}

    assert renewed(names("task.low=40")) == {"conditions"}
    assert renewed(names("resolution=128")) == {"latents", "conditions"}
    other = sd3_tiny.load_codec(CPU)
    with torch.no_grad():
        next(other.vae.parameters()).add_(1e-3)
    assert renewed(names(changed_codec=other)) == {"latents", "conditions"}
    (pictures / "0.txt").write_text("another caption\n")
    assert renewed(names()) == {"text"}
    (pictures / "0.txt").write_text("picture 0\n")
    Image.new("RGB", (80, 64), "white").save(pictures / "0.png")
    assert {"latents", "conditions"} <= renewed(names())


def test_the_seed_counts_only_where_conditions_vary(sd3_tiny, codec, tmp_path):
    class Noisy(Canny):
        varies = True

        def make_condition(self, sample, generator):
            return generator.integers(0, 256, sample.image.shape, np.uint8)

    source, task = SceneSource("scenes", 0, 6, 8, "train", 64), Noisy("canny", 50, 120, 0.8)
    made = [
        build_stores([source], task, sd3_tiny, codec, "pixel", tmp_path, CPU, seed, 0, lambda _: None)[0] for seed in (0, 1)
    ]
    assert made[0].latents.folder == made[1].latents.folder
    assert made[0].conditions.folder != made[1].conditions.folder
    a, b = (m.condition_rows([2])[0] for m in made)
    assert not torch.equal(a, b)
    fresh = torch.from_numpy(task.condition_of(source[2], 0)).movedim(-1, 0) / 255  # by seed and id, wherever the row is
    assert torch.equal(a, fresh)


# ---- the verb ---------------------------------------------------------------------------------------------------------


def test_a_training_after_cache_encodes_nothing(tmp_path, monkeypatch, capsys):
    words = [*QUICK, "data.train_images=12", f"cache_dir={tmp_path / 'cache'}"]
    prepare.cache(load("train", words))
    said = capsys.readouterr().out
    assert said.count("MiB in") == 6  # three stores of both splits
    assert "12 and 8 samples are cached" in said
    before = content(tmp_path / "cache")
    encoded = []
    monkeypatch.setattr("src.backbones.codec.Codec.encode", lambda self, x: encoded.append(len(x)) or torch.zeros(1, 16, 8, 8))
    monkeypatch.setattr(TensorStore, "write", lambda *_: pytest.fail("a shard was written"))
    cfg = resolve_hardware(load("train", words))
    build.load_world(cfg, build.plan(cfg))
    assert set(encoded) <= {1}  # the black picture
    assert content(tmp_path / "cache") == before


@pytest.mark.slow
def test_the_command_survives_a_kill(tmp_path):
    words = [*QUICK, "data.train_images=600"]
    done = run_entry("prepare", "cache", *words, f"cache_dir={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "src.prepare", "cache", *words, f"cache_dir={tmp_path / 'killed'}"]
    victim = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    wait_for(lambda: list((tmp_path / "killed").glob("conditions-*/rows-*")))
    victim.kill()
    assert victim.wait() == -signal.SIGKILL
    assert content(tmp_path / "killed") != content(tmp_path / "whole")
    again = run_entry("prepare", "cache", *words, f"cache_dir={tmp_path / 'killed'}")
    assert again.returncode == 0, again.stderr
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
