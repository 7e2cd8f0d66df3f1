"""`python -m src.prepare shards`: what comes back, the same bytes each time, after kills and from several processes."""

import hashlib
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src import prepare
from src.config import load
from src.data import shard_plan
from src.data.folder import FolderSource
from src.data.scenes import SceneSource
from src.data.shard_plan import plan_shards, suffix_of
from src.data.shards import ShardSource
from src.data.source import BadSample
from src.data.write_shards import write_missing, write_shards
from src.types import UserError
from tests.processes import wait_for

COUNT, STUCK = 40, 23
FORK = multiprocessing.get_context("fork")
SMALL_MIB = 0.25  # about eight scenes


class Recorded(SceneSource):
    """Scenes that note which of them are drawn, and one of which may take for ever."""

    def __init__(self, log: Path | None = None, stuck_at: int = -1):
        super().__init__("scenes", 0, COUNT, 8, "train", 64)
        self.log, self.stuck_at = log, stuck_at

    def __getitem__(self, index):
        if index == self.stuck_at:
            time.sleep(600)
        if self.log:
            with self.log.open("a") as file:
                file.write(f"{index}\n")
        return super().__getitem__(index)


def quiet(_: str) -> None:
    return None


def write(sources, out, engine="local", workers=0, mib=SMALL_MIB, picture="png"):
    return write_shards(sources, out, mib, picture, engine, workers, quiet)


def content(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != ".locks"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one uninterrupted process writes: (folder, its files)."""
    folder = tmp_path_factory.mktemp("whole")
    write([Recorded()], folder)
    return folder, content(folder)


# ---- what comes back --------------------------------------------------------------------------------------------------


def test_shards_give_back_ids_captions_pictures_and_signals(tmp_path):
    originals = [SceneSource("scenes", 0, 10, 4, split, 64) for split in ("train", "val")]
    index = write(originals, tmp_path)
    assert index["rows_of_sources"] == [10, 4]
    signals = {name: suffix_of(name) for name in ("depth", "joints", "segmentation")}
    assert index["signals"] == signals
    for original, split in zip(originals, ("train", "val"), strict=True):
        read = ShardSource("shards", str(tmp_path), 4, split, 64, signals=signals)
        assert len(read) == len(original)
        for i in range(len(original)):
            a, b = original[i], read[i]
            assert (a.id, a.caption) == (b.id, b.caption)
            assert np.array_equal(a.image, b.image)
            assert np.array_equal(a.signals["depth"], b.signals["depth"])
            assert np.array_equal(a.signals["segmentation"], b.signals["segmentation"])
            people = a.signals["joints"]
            assert np.allclose(b.signals["joints"], people) if len(people) else not b.signals["joints"].size


def test_a_folder_comes_back_with_its_own_names(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (48, 48, 3), np.uint8)
        Image.fromarray(noise).save(pictures / f"a picture {i}.png")
        (pictures / f"a picture {i}.txt").write_text(f"ein Bär, 熊 {i}", encoding="utf-8")
    originals = [FolderSource("folder", str(pictures), 2, split, 32) for split in ("train", "val")]
    for picture in ("png", "jpg"):
        write(originals, tmp_path / picture, picture=picture)
        read = ShardSource("shards", str(tmp_path / picture), 2, "train", 32)
        assert [read.describe(i) for i in range(4)] == [originals[0].describe(i) for i in range(4)]
        off = np.abs(read[1].image.astype(int) - originals[0][1].image).mean()
        assert off == 0 if picture == "png" else 0 < off < 12


def test_members_say_nothing_of_when_and_by_whom(whole):
    folder, _ = whole
    with tarfile.open(folder / "00000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    suffixes = ["png", "txt", "json", "depth.npy", "joints.npy", "segmentation.png"]
    assert [m.name for m in members[:12]] == [f"{row:08d}.{s}" for row in range(2) for s in suffixes]


def test_the_index_counts_and_hashes(whole):
    folder, files = whole
    index = json.loads(files["index.json"])
    assert sum(s["rows"] for s in index["shards"]) == index["rows"] == COUNT
    for shard in index["shards"]:
        assert hashlib.sha256(files[shard["name"]]).hexdigest() == shard["sha256"]
        assert len(files[shard["name"]]) == shard["bytes"]
    assert index["bytes"] == sum(len(b) for name, b in files.items() if name.endswith(".tar"))
    mean = np.mean([s["bytes"] for s in index["shards"][:-1]]) / 2**20
    assert mean == pytest.approx(SMALL_MIB, rel=0.15)
    assert len(index["shards"]) > 3


# ---- the same bytes ---------------------------------------------------------------------------------------------------


def test_after_a_kill_the_rest_is_written_and_equals_an_uninterrupted_run(whole, tmp_path):
    folder, files = whole
    (tmp_path / "plan.json").write_bytes(files["plan.json"])  # so that no row is drawn to measure
    log = tmp_path.parent / "killed.log"
    victim = FORK.Process(target=write, args=([Recorded(log, STUCK)], tmp_path))
    victim.start()
    wait_for(lambda: log.exists() and str(STUCK - 1) in log.read_text().split())
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    done = content(tmp_path)
    parts = [name for name in done if name.startswith(".")]
    assert len(parts) == 1  # the shard that it was writing
    assert {name: files[name] for name in done if name not in parts} == {n: b for n, b in done.items() if n not in parts}
    assert "index.json" not in done
    log.unlink()
    write([Recorded(log)], tmp_path)
    assert content(tmp_path) == files
    again = sorted(int(row) for row in log.read_text().split())
    assert again[-1] == COUNT - 1
    assert len(again) == COUNT - again[0] < COUNT  # what was whole was not written again


def test_two_processes_share_the_work(whole, tmp_path):
    _, files = whole
    log = tmp_path.parent / "both.log"
    (tmp_path / "plan.json").write_bytes(files["plan.json"])
    plan = plan_shards([Recorded(log)], tmp_path, SMALL_MIB, "png", quiet)
    processes = [FORK.Process(target=write_missing, args=(plan, quiet)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(int(row) for row in log.read_text().split()) == list(range(COUNT))
    write([Recorded()], tmp_path)
    assert content(tmp_path) == files


@pytest.mark.slow
def test_worker_processes_write_the_same_bytes(whole, tmp_path):
    write([SceneSource("scenes", 0, COUNT, 8, "train", 64)], tmp_path, workers=2)
    assert content(tmp_path) == whole[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'controlbench[ray]'")
def test_ray_writes_the_same_bytes(whole, tmp_path):
    import ray

    try:
        write([SceneSource("scenes", 0, COUNT, 8, "train", 64)], tmp_path, engine="ray", workers=2)
    finally:
        ray.shutdown()
    assert content(tmp_path) == whole[1]


# ---- what is refused --------------------------------------------------------------------------------------------------


def test_a_folder_of_other_shards_is_refused(whole):
    folder, files = whole
    with pytest.raises(UserError, match=r"holds shards with shard_mib=0\.25, not 1; name another folder"):
        write([Recorded()], folder, mib=1)
    with pytest.raises(UserError, match="holds shards with sources="):
        write([SceneSource("scenes", 3, COUNT, 8, "train", 64)], folder)
    assert content(folder) == files


def test_too_small_a_disk_is_refused_before_a_shard_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_plan.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"are to be written and the disk has 0\.0 MiB free"):
        write([Recorded()], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ray_is_asked_for_only_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(UserError, match=r"pip install 'controlbench\[ray\]', or write engine=local"):
        write([Recorded()], tmp_path, engine="ray")


def test_a_bad_sample_ends_it_and_leaves_no_part(tmp_path):
    class Bad(SceneSource):
        def __getitem__(self, index):
            if index == 20:
                raise BadSample("scene 20", "not whole", "mend it")
            return super().__getitem__(index)

    source = Bad("scenes", 0, 21, 8, "train", 64)
    with pytest.raises(BadSample, match="scene 20: not whole; mend it"):
        write([source], tmp_path)
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".0")]
    assert not (tmp_path / "index.json").exists()


# ---- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_writes_both_splits_and_says_how_to_read_them(tmp_path, capsys):
    words = ["data=scenes", "data.train_images=10", "data.val_images=4", "resolution=64", "workers=0", f"out={tmp_path}"]
    prepare.shards(load("prepare_shards", words))
    printed = capsys.readouterr().out
    last = printed.strip().splitlines()[-1]
    assert last.startswith(f"to read them: data=shards data.path={tmp_path} data.val_images=4 ")
    assert "14 samples in 1 shards" in printed
    signals = last.rpartition('"')[0].rpartition('"')[2]
    cfg = load("train", ["data=shards", f"data.path={tmp_path}", "data.val_images=4", "validation.images=4",
                         "validation.final_images=4", signals])  # fmt: skip
    assert dict(cfg.data.signals) == {name: suffix_of(name) for name in ("depth", "joints", "segmentation")}
    prepare.shards(load("prepare_shards", words))
    assert "all there before" in capsys.readouterr().out


def test_the_verb_leaves_bad_samples_out_and_what_it_wrote_is_read(tmp_path, capsys):
    """A second copy of a good one would be an id that stands twice, which no training reads."""
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (48, 48, 3), np.uint8)
        Image.fromarray(noise).save(pictures / f"{i:02d}.png")
        (pictures / f"{i:02d}.txt").write_text(f"picture {i}")
    for i in (2, 3, 9):  # the last four are held out
        file = pictures / f"{i:02d}.png"
        file.write_bytes(file.read_bytes()[:-300])
    words = ["data=folder", f"data.path={pictures}", "data.val_images=4", "resolution=32", "workers=0", f"out={out}"]
    words += ["data.on_bad_sample=skip", "data.max_bad_share=0.5"]
    cfg = load("prepare_shards", words)
    cfg.shard_mib = 0.02
    prepare.shards(cfg)
    printed = capsys.readouterr().out
    assert "2 of 8 samples of folder are bad and left out, and 6 stay" in printed
    assert "9 samples in" in printed
    assert f"to read them: data=shards data.path={out} data.val_images=3" in printed
    train, val = (ShardSource("shards", str(out), 3, split, 32) for split in ("train", "val"))
    assert [train.describe(i)[0] for i in range(len(train))] == [f"{i:02d}.png" for i in (0, 1, 4, 5, 6, 7)]
    assert [val.describe(i) for i in range(len(val))] == [(f"{i:02d}.png", f"picture {i}") for i in (8, 10, 11)]
    assert np.array_equal(train[2].image, FolderSource("folder", str(pictures), 4, "train", 32, on_bad_sample="skip")[4].image)
    listed = [json.loads(line) for file in out.glob("skipped-*.jsonl") for line in file.read_text().splitlines()]
    assert sorted((s["id"], s["replaced_by"]) for s in listed) == [("02.png", None), ("03.png", None), ("09.png", None)]
    before = content(out)
    assert len([name for name in before if name.endswith(".tar")]) > 2
    for name in ("index.json", "00001.tar"):  # as after a kill
        (out / name).unlink()
    prepare.shards(cfg)
    assert {n: b for n, b in content(out).items() if not n.endswith(".tar.index.json")} == {
        n: b for n, b in before.items() if not n.endswith(".tar.index.json")
    }
