"""What would stop a command later is told at once: each problem from a machine that is made to look so, and all in one list."""

import shutil
import socket
import types
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf, open_dict

from src import doctor, preflight
from src.config import load
from src.config import preflight as command_line
from src.evaluate.measures import WEIGHTS
from src.room import cache_needs, checkpoint_needs, loader_bytes
from src.together.members import fitted, members
from src.types import UserError
from tests.conftest import run_entry

SECRET = "hf_thisMustNeverBeSeen0123456789"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def composed():
    return load("train", ["hardware=cpu", "logger=local", "adapter=template", "hardware.workers=2"])


@pytest.fixture
def cfg(composed, tmp_path):
    """A training's configuration whose folders are new ones."""
    one = composed.copy()
    with open_dict(one):
        one.output_dir, one.cache_dir = str(tmp_path / "runs"), str(tmp_path / "cache")
    return one


@pytest.fixture(scope="module")
def group(composed):
    return members(composed)


def gpu(monkeypatch, name="Tesla V100", major=7, minor=0, gib=16):
    facts = types.SimpleNamespace(name=name, major=major, minor=minor, total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)


def small(monkeypatch, folder: Path, free: int) -> None:
    """So many bytes are free on the disk of a folder."""
    real = shutil.disk_usage
    within = lambda path: Path(path).absolute().is_relative_to(folder)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40 - free, free) if within(path) else real(path))


# ---- the command line -------------------------------------------------------------------------------------------------


def test_all_faults_of_a_command_line_are_one_list(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line("train", ["hardware=cpu", "hardware.devices=0", "resolution=33", "budget.images=3", "adapter.copy=hlaf"])
    assert stop.value.code == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "error: 4 problems:"
    for key, line in zip(("hardware.devices=0", "adapter.copy=hlaf", "budget.images=3", "resolution=33"), lines, strict=True):
        assert key in line


# ---- one problem each -------------------------------------------------------------------------------------------------


def test_precision_and_memory_of_the_device(monkeypatch):
    hardware = load("train", ["hardware=gpu_24g"]).hardware
    gpu(monkeypatch)
    (line,) = preflight.device(hardware)
    assert line.startswith("hardware.precision=bf16-mixed: Tesla V100 has no bf16 (compute capability 7.0")
    assert line.endswith("write hardware.precision=16-mixed")
    gpu(monkeypatch, "A2", 8, 6, 16)
    (line,) = preflight.device(hardware)
    assert line == "hardware=gpu_24g counts on 24 GiB, A2 has 16; write hardware=auto, or hardware.memory_gib=16"
    gpu(monkeypatch, "RTX 4090", 8, 9, 23)
    assert not list(preflight.device(hardware))


def test_folders_that_cannot_be_written_to(cfg, tmp_path, monkeypatch):
    assert not list(preflight.folders(cfg))
    (tmp_path / "runs").touch()
    monkeypatch.setattr(preflight.os, "access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr(preflight.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    lines = list(preflight.folders(cfg))
    assert lines[0].startswith(f"output_dir={cfg.output_dir}: {cfg.output_dir} is a file, not a folder; name another with")
    assert lines[1].startswith(f"cache_dir={cfg.cache_dir}: {tmp_path} cannot be written to")
    assert "temporary files" in lines[2]
    assert "TMPDIR" in lines[2]


def test_shared_memory_against_the_workers(cfg, group, monkeypatch):
    if not preflight.SHARED_MEMORY.is_dir():
        pytest.skip("no /dev/shm here")
    of_worker = loader_bytes(cfg, group[0].plan.backbone.facts)
    small(monkeypatch, preflight.SHARED_MEMORY, 2 * of_worker)
    assert not list(preflight.shared_memory(cfg, group))
    small(monkeypatch, preflight.SHARED_MEMORY, 2 * of_worker - 1)
    (line,) = preflight.shared_memory(cfg, group)
    assert line.startswith("hardware.workers=2: ")
    assert "write hardware.workers=1, or in Docker: --shm-size=8g" in line


def test_disks_are_asked_for_all_that_goes_there(cfg, group, tmp_path, monkeypatch):
    one = [types.SimpleNamespace(cfg=cfg, plan=group[0].plan)]
    made = [preflight.training_needs(one, resumed) for resumed in (False, True)]
    total = sum(need.bytes for need in made[0])
    assert total > sum(need.bytes for need in made[1]) > 0
    small(monkeypatch, tmp_path, total)
    assert not list(preflight.disks(made[0]))
    small(monkeypatch, tmp_path, total - 1)
    (line,) = preflight.disks(made[0])
    assert f"3 checkpoints in output_dir={cfg.output_dir}" in line
    assert f"the cache in cache_dir={cfg.cache_dir}" in line
    assert "give output_dir=<folder> or cache_dir=<folder>" in line


def test_what_lies_in_the_cache_is_not_asked_for_again(cfg, group, tmp_path):
    made, (whole,) = group[0].plan, cache_needs([cfg], [group[0].plan])
    rows, row_bytes = len(made.train_source), 4 * made.backbone.facts.latent_channels * 64
    store = tmp_path / "cache" / "latents-0"
    store.mkdir(parents=True)
    (store / "store.json").write_text(f'{{"rows": {rows}, "row_bytes": {row_bytes}, "rows_per_shard": 256}}')
    (store / "rows-00000000.safetensors").touch()
    (left,) = cache_needs([cfg], [made])
    assert whole.bytes - left.bytes == 256 * row_bytes


def test_a_checkpoint_is_counted_once_for_each_that_lies_there(cfg, group):
    (one,) = checkpoint_needs(cfg, group[0].plan.backbone, resumed=True)
    with open_dict(cfg):
        cfg.control_arm = True
    (six,) = checkpoint_needs(cfg, group[0].plan.backbone, resumed=False)
    assert six.bytes == 6 * one.bytes


def test_a_gated_model_without_a_token(monkeypatch, tmp_path):
    node = load("train", ["backbone=sd3_medium"]).backbone
    monkeypatch.setattr(preflight, "in_hub_cache", lambda source: False)
    monkeypatch.setattr(preflight, "has_token", lambda: False)
    (line,) = preflight.hub(node)
    assert node.licence_url in line
    assert "`hf auth login` or set HF_TOKEN" in line
    monkeypatch.setattr(preflight, "has_token", lambda: True)
    assert not list(preflight.hub(node))
    monkeypatch.setattr(preflight, "has_token", lambda: False)
    assert not list(preflight.hub(OmegaConf.merge(node, {"source": str(tmp_path)})))


def test_wandb_that_shall_be_online(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    from src.loggers import wandb_run

    logger = types.SimpleNamespace(name="wandb", mode="online")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and never listens
        monkeypatch.setattr(wandb_run, "server", lambda: f"http://127.0.0.1:{closed.getsockname()[1]}")
        (line,) = preflight.wandb_server(logger)
        assert line.startswith("logger.mode=online: W&B cannot be online: no key for 127.0.0.1")
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
        (line,) = preflight.wandb_server(logger)
        assert "did not answer" in line
        assert SECRET not in line
    logger.mode = "auto"
    assert not list(preflight.wandb_server(logger))


def test_weights_of_metrics_that_are_asked_for(tmp_path):
    cfg = load("evaluate", ["run=runs/x", "hardware=cpu"])
    with open_dict(cfg):
        for key in ("musiq_weights", "maniqa_weights", "lpips_weights", "inception_weights"):
            cfg.metrics[key] = str(tmp_path / "nowhere" / key)
        cfg.metrics.names = ["fid", "musiq"]
    lines = list(preflight.metric_weights(cfg.metrics, cfg.data, cfg.hardware))
    told = [key for key in ("musiq_weights", "maniqa_weights", "lpips_weights") if any(key in line for line in lines)]
    assert told == ["musiq_weights", "maniqa_weights", "lpips_weights"]
    assert any("inception" in line for line in lines)
    assert {"musiq_weights", "maniqa_weights", "lpips_weights", "clip"} == set(WEIGHTS.values())


# ---- all of them ------------------------------------------------------------------------------------------------------


def test_everything_is_one_list(cfg, tmp_path, monkeypatch, group):
    here = [types.SimpleNamespace(cfg=cfg, plan=group[0].plan)]
    (tmp_path / "cache").touch()
    monkeypatch.setattr(preflight, "hub", lambda node: ["backbone.source=a/b: no token"])
    small(monkeypatch, preflight.SHARED_MEMORY, 0)
    small(monkeypatch, tmp_path, 0)

    def too_large(group):
        raise UserError("training should take 99 GiB")

    with pytest.raises(UserError) as refused:
        preflight.planned(cfg, lambda asked: here, too_large)
    first, *lines = str(refused.value).splitlines()
    assert first == f"{len(lines)} problems:"
    for words in ("is a file, not a folder", "are to be written", "training should take 99 GiB", "no token"):
        assert sum(words in line for line in lines) == 1, lines
    monkeypatch.undo()
    (tmp_path / "cache").unlink()
    assert preflight.planned(cfg, members, fitted)[0].cfg.name == cfg.name


def test_a_training_ends_with_the_list_before_anything_is_made(tmp_path):
    (tmp_path / "file").touch()
    words = ["hardware=gpu_24g", "logger=local", f"output_dir={tmp_path / 'file'}", f"cache_dir={tmp_path / 'file' / 'cache'}"]
    done = run_entry("train", *words, CUDA_VISIBLE_DEVICES="", HF_TOKEN=SECRET)
    assert done.returncode == 2
    first, *lines = done.stderr.strip().splitlines()
    assert first == "error: 3 problems:"
    for word, told in zip(("hardware=gpu_24g wants 1 GPU", "output_dir=", "cache_dir="), lines, strict=True):
        assert word in told
    assert SECRET not in done.stdout + done.stderr
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]


def test_the_doctor_says_the_same_without_secrets(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    words = ["hardware=cpu", "adapter=template", "logger.mode=offline", f"cache_dir={tmp_path / 'cache'}"]
    assert doctor.main([*words, f"output_dir={tmp_path / 'runs'}"]) == 0
    said = capsys.readouterr().out
    for line in ("token of the hub           yes", "W&B                        offline", "torch  ", "no problems"):
        assert line in said
    assert doctor.main([*words, f"output_dir={tmp_path / 'file'}"]) == 2
    said += capsys.readouterr().out
    assert "is a file, not a folder" in said
    assert doctor.main([*words, f"tags=[{SECRET}]"]) == 2  # refused before anything is looked at
    said += capsys.readouterr().out
    assert doctor.main(["resolution=33", "seeed=1"]) == 2
    said += capsys.readouterr().out
    assert SECRET not in said
    assert not (tmp_path / "runs").exists()


def test_an_evaluation_is_judged_too(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    words = ["run=runs/x", "hardware=cpu", f"output_dir={tmp_path / 'drawn'}", f"cache_dir={tmp_path / 'file'}"]
    cfg = load("evaluate", [*words, f"metrics.musiq_weights={tmp_path / 'none'}"])
    small(monkeypatch, tmp_path, 3 * 64 * 64)  # two pictures, half as large as their pixels
    with pytest.raises(UserError) as refused:
        preflight.evaluation(cfg, cfg.backbone, pictures=3, side=64)
    first, *lines = str(refused.value).splitlines()
    assert first == "3 problems:"
    for word, line in zip(("cache_dir=", "metrics.musiq_weights=", "3 pictures in output_dir="), lines, strict=True):
        assert word in line
    with open_dict(cfg):
        cfg.cache_dir, cfg.metrics.musiq_weights = str(tmp_path / "cache"), None
    preflight.evaluation(cfg, cfg.backbone, pictures=2, side=64)
