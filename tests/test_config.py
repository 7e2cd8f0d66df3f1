"""Configuration: what is right composes, what is wrong is refused in one line with its place, and speed is not science."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from src.config import (
    CONF,
    ConfigError,
    Incompatible,
    accumulation,
    config_sha,
    load,
    preflight,
    resolve_hardware,
    science_diff,
)
from src.config.checks import check_names, check_nodes, check_values, resolve
from src.config.signatures import fits, hint_name
from src.types import UserError
from tests.contract.registry import configured

SAMPLE = ["run=runs/x", "prompt=a ball", "condition=edges.png"]
OPTIONS = [(f.parent.name, f.stem) for f in sorted(CONF.glob("[a-z]*/*.yaml")) if f.parent.name not in ("shared", "experiment")]
EXPERIMENTS = sorted(CONF.glob("experiment/*.yaml"))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def conf(tmp_path):
    """A copy of conf/ to misspell."""
    return shutil.copytree(CONF, tmp_path / "conf")


def refusal(capsys, name, argv, config_dir=CONF) -> str:
    """The one line that preflight prints before it exits 2."""
    with pytest.raises(SystemExit) as stop:
        preflight(name, argv, config_dir)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert not printed.out
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


# ---- what is right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda x: x)
def test_every_group_file_composes(group, option, monkeypatch):
    if option == "adamw8bit":
        fake = types.ModuleType("bitsandbytes.optim")
        fake.AdamW8bit = torch.optim.AdamW
        monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", fake)
    entry, given = ("evaluate", ["run=runs/x"]) if group == "evaluation_set" else ("train", [])
    if group in ("data", "evaluation_set") and option in ("folder", "hub", "shards"):
        given.append("data.path=pictures")
    if option == "adamw8bit":  # a GPU's own
        given.append("hardware=gpu_24g")
    cfg = load(entry, [f"{group}={option}", *given])
    assert "hydra" not in cfg
    assert group not in cfg or cfg[group].get("name", option) == option  # a recipe sets keys of other groups


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda f: f.stem)
def test_every_experiment_composes_and_says_what_it_reaches(file):
    lines = file.read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1] == f"# python -m src.train +experiment={file.stem}"
    assert re.match(r"# reaches: [a-z_0-9]+ \d+\.\d+ with the right condition", lines[2])
    assert lines[3].startswith("# hardware: ")
    cfg = load("train", [f"+experiment={file.stem}"])
    assert file.stem.startswith(cfg.adapter.name)


def test_the_default_of_every_entry():
    cfg = load("train")
    assert cfg.resolution == cfg.backbone.native_resolution == 64
    assert cfg.name == "unicon_sd3_tiny_canny"
    assert load("sample", SAMPLE).prompt == "a ball"
    assert load("prepare").backbone.name == "sd3_tiny"


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("CONTROLBENCH_CACHE", "/somewhere")
    assert load("train").cache_dir == load("prepare").cache_dir == "/somewhere"


def test_a_quick_try_is_allowed_and_notes_what_it_gives_up(capsys):
    preflight("train", ["budget.images=64"])
    assert "note: optimizer.warmup_images=1600 outlasts budget.images=64" in capsys.readouterr().err
    preflight("train", ["hardware=cpu", "hardware.precision=bf16-mixed"])
    assert capsys.readouterr().err.count("note: ") == 1


@pytest.mark.parametrize("flag", [["--help"], ["--hydra-help"], ["--info"], ["-sc"]])
def test_hydra_keeps_its_flags(flag, capsys):
    preflight("train", flag)
    assert capsys.readouterr().err == ""


def test_an_incomplete_configuration_can_be_shown_and_hydra_keys_set():
    preflight("sample", ["--cfg", "job"])
    preflight("train", ["hydra.run.dir=elsewhere", "hydra/job_logging=default"])


# ---- what is wrong on the command line --------------------------------------------------------------------------------

WRONG = [
    (["budget.imags=3"], "command line: budget.imags=3 is not a known key; did you mean budget.images?"),
    (["+budget.imags=3"], "command line: budget.imags=3 is not a known key; did you mean budget.images?"),
    (["budget={imags: 3}"], "command line: budget.imags=3 is not a known key; did you mean budget.images?"),
    (["lr=1e-4"], "did you mean optimizer.algorithm.lr?"),
    (["nme=x"], "did you mean name?"),
    (["+colour=red"], "command line: colour=red is not a known key; known: "),
    (["adaptr=unicon"], "did you mean adapter?"),
    (["backbone=sd3_tinny"], "command line: backbone=sd3_tinny is not in conf/backbone; did you mean sd3_tiny?"),
    (["backbone=flux"], "known: pixart_alpha, pixart_tiny, sd21, sd21_tiny, sd3_5_large, sd3_5_medium"),
    (["hardware.rates.gpu=x"], "hardware.rates is null in the chosen file of conf/hardware; choose one that has keys there"),
    (["hardware.rates={gpu: x}"], "hardware.rates is null in the chosen file of conf/hardware"),
    (["backbone=null"], "should be the name of a file in conf/backbone"),
    (["experiment=unicon_sd3_canny"], "write +experiment=unicon_sd3_canny"),
    (["+experiment=unicon_sd3_cany"], "did you mean unicon_sd3_canny?"),
    (["+experimnt=unicon_sd3_canny"], "did you mean +experiment?"),
    (["+adapter=unicon"], "+adapter=unicon is chosen already; write adapter=unicon"),
    (["+seed=3"], "+seed=3 is set already; write seed=3"),
    (["~seed"], "seed is required"),
    (["seed"], "cannot read 'seed'"),
    (["seed=1,2"], "add --multirun"),
    (["name=(x"], "quote a value"),
    (["seed=${oc.env:NO_SUCH_VARIABLE}"], "cannot be filled in"),
    (["name=${adapter.nme}"], "cannot be filled in"),
    (["budget.images=abc"], "command line: budget.images=abc should be int"),
    (["budget.images=1.5"], "should be int"),
    (["budget=5"], "should be a mapping"),
    (["control_arm=maybe"], "should be bool"),
    (["tags=a"], "should be a list of str"),
    (["budget.images=0"], "is below 1"),
    (["caption_dropout=1"], "is not below 1"),
    (["ema_decay=1.0"], "is not below 1"),
    (["ema_decay=-0.1"], "is below 0"),
    (["logger.mode=onlin"], "did you mean online?"),
    (["optimizer.decay=linear"], "is not one of constant, cosine"),
    (["hardware.precision=bf16"], "did you mean bf16-mixed?"),
    (["+adapter.extra=3"], "adapter.extra=3 is no argument of src.adapters.unicon.UniCon"),
    (["adapter.cpy=full"], "did you mean adapter.copy?"),
    (["+backbone.sorce=x"], "is no argument of src.backbones.mmdit.SD3; did you mean backbone.source?"),
    (
        ["backbone=pixart_tiny", "+backbone.sorce=x"],
        "is no argument of src.backbones.dit.PixArt; did you mean backbone.source?",
    ),
    (["backbone=sd21_tiny", "backbone.name=3"], "should be str"),
    (["backbone.name=3"], "should be str"),
    (["~backbone.source"], "backbone.source is missing"),
    (["adapter.copy=ful"], "should be encoder | decoder | skip_layer | full; did you mean full?"),
    (["+adapter.backbone=x"], "is filled in by the program"),
    (["task.low=abc"], "task.low=abc should be float"),
    (["~task.low"], "conf/task/canny.yaml: task.low is missing"),
    (["adapter._target_=src.adapters.unicon.Unicon"], "did you mean src.adapters.unicon.UniCon?"),
    (["adapter._target_=src.adapters.unicorn.UniCon"], "did you mean src.adapters.unicon.UniCon?"),
    (["adapter._target_=nowhere.Thing"], "pip install nowhere"),
    (["callbacks.ema=null"], "to leave it out, write ~callbacks.ema"),
    (["optimizer.algorithm.lr=fast"], "optimizer.algorithm.lr=fast should be float"),
    (["optimizer.algorithm.betas=[0.9]"], "should be [float, float]"),
    (["+optimizer.algorithm.momentum=0.9"], "is no argument of torch.optim.AdamW"),
    (["data=folder"], "conf/data/folder.yaml: data.path has no default; give it: data.path=..."),
    (["--config-name", "trian"], "did you mean train?"),
    (["--config-dir", "no/such/folder"], "is not a folder"),
    (["hydra/launcher=basicc"], "hydra/launcher/basicc"),
    # between keys
    (["budget.images=16"], "write budget.images=32 or budget.effective_batch=16"),
    (["budget.stop_at_images=64000"], "write budget.stop_at_images=null"),
    (["hardware=cpu", "hardware.micro_batch=12"], "write hardware.micro_batch=8 or budget.effective_batch=36"),
    (["hardware=gpu_80g", "hardware.devices=3"], "write hardware.devices=2 or budget.effective_batch=33"),
    (["hardware=gpu_80g", "hardware.workers=null"], "write hardware=auto"),
    (["hardware=cpu", "hardware.precision=16-mixed"], "write hardware.precision=32-true"),
    (["resolution=920", "backbone=sd3_medium"], "write resolution=912 or resolution=928"),
    (["data.val_images=100"], "write validation.final_images=100 or data.val_images=256"),
]


@pytest.mark.parametrize(("argv", "says"), WRONG, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_wrong_command_line_is_refused_in_one_line(argv, says, capsys):
    assert says in refusal(capsys, "train", argv)


def test_sample_says_what_it_needs_and_how_to_quote(capsys):
    assert "run has no default; give it: run=..." in refusal(capsys, "sample", [])
    assert """'prompt="a ball, left"'""" in refusal(capsys, "sample", [*SAMPLE[:1], "prompt=a ball, left", SAMPLE[2]])
    assert "did you mean prompt?" in refusal(capsys, "sample", ["promt=x"])


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_missing_optional_package_is_named(capsys):
    assert "pip install bitsandbytes" in refusal(capsys, "train", ["optimizer=adamw8bit"])


def test_what_a_group_file_builds_on_is_not_blamed(capsys):
    assert "budget.imags=3" in refusal(capsys, "train", ["optimizer=adamw8bit", "budget.imags=3"])
    assert "hardware.precision=16-mixed needs a GPU" in refusal(capsys, "sample", [*SAMPLE, "hardware.precision=16-mixed"])


def test_a_sweep_is_checked_value_by_value_before_it_starts(capsys):
    assert "did you mean sd3_tiny?" in refusal(capsys, "train", ["-m", "seed=1,2", "backbone=sd3_tiny,sd3_tinny"])
    assert "matches nothing" in refusal(capsys, "train", ["-m", "adapter=glob(z*)"])
    preflight("train", ["-m", "seed=range(2)", "hardware=cpu", "budget.effective_batch=16,24", "hardware.micro_batch=8,16"])


# ---- what is wrong in a file ------------------------------------------------------------------------------------------

WRONG_FILES = [
    ("train.yaml", "images: 32000", "imags: 32000", [], "budget.imags=32000 is not a known key; did you mean budget.images?"),
    ("train.yaml", "seed: 0", "seed: first", [], "seed=first should be int"),
    ("train.yaml", "seed: 0", "sed: 0", [], "sed=0 is not a known key; did you mean seed?"),
    ("train.yaml", "adapter: unicon", "adapter: unicorn", [], "adapter=unicorn is not in conf/adapter; did you mean unicon?"),
    ("train.yaml", "adapter: unicon", "adaptr: unicon", [], "adaptr: unicon: no such group; did you mean adapter?"),
    ("train.yaml", "seed: 0", "seed: [0", [], "not valid yaml"),
    ("hardware/cpu.yaml", "workers:", "wokers:", ["hardware=cpu"], "did you mean hardware.workers?"),
    (
        "adapter/unicon.yaml",
        "copy:",
        "cpy:",
        [],
        "adapter.cpy=full is no argument of src.adapters.unicon.UniCon; did you mean adapter.copy?",
    ),
    ("adapter/unicon.yaml", "copy: full", "copy: ful", [], "adapter.copy=ful should be encoder | decoder | skip_layer | full"),
    (
        "optimizer/adamw.yaml",
        "lr: 2.0e-3",
        "learning_rate: 1e-3",
        [],
        "optimizer.algorithm.learning_rate=0.001 is no argument of",
    ),
    ("callbacks/default.yaml", "keep: 2", "keep: two", [], "callbacks.checkpoints.keep=two should be int"),
    ("logger/wandb.yaml", "mode: auto", "mode: on", [], "logger.mode"),
]


@pytest.mark.parametrize("case", WRONG_FILES, ids=lambda case: f"{case[0]}: {case[2]}")
def test_a_wrong_file_is_named(case, conf, capsys):
    file, right, wrong, argv, says = case
    text = (conf / file).read_text()
    assert right in text
    (conf / file).write_text(text.replace(right, wrong, 1))
    line = refusal(capsys, "train", argv, conf)
    assert str(conf / file) in line
    assert says in line


def test_a_wrong_experiment_file_is_named(conf, capsys):
    file, argv = conf / "experiment" / "mine.yaml", ["+experiment=mine", "seed=3"]
    for text, says in [
        ("adapterr:\n  copy: full\n", "did you mean adapter?"),
        ("defaults:\n  - override /adapter: unicorn\n", "adapter=unicorn is not in conf/adapter"),
        ("defaults:\n  - override /adaptr: unicon\n", "no such group; did you mean adapter?"),
        ("data:\n  micro_bach: 3\n", "data.micro_bach=3 is no argument of"),
        ("budget:\n  images: 16\n", "write budget.images=32"),
    ]:
        file.write_text(f"# @package _global_\n{text}")
        line = refusal(capsys, "train", argv, conf)
        assert str(file) in line
        assert says in line


def test_a_file_of_an_extra_config_folder_is_named(tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    file = tmp_path / "adapter" / "mine.yaml"
    file.write_text(f"{(CONF / 'adapter' / 'unicon.yaml').read_text()}\nstrength: 2\n")
    line = refusal(capsys, "train", ["--config-dir", str(tmp_path), "adapter=mine"])
    assert f"{file}: adapter.strength=2 is no argument of" in line


# ---- science and speed ------------------------------------------------------------------------------------------------


def test_speed_does_not_change_the_identity_of_a_run():
    sha = config_sha(load("train"))
    assert len(sha) == 16
    assert int(sha, 16) >= 0
    for argv in (
        ["hardware=h200", "hardware.workers=3"],
        ["logger=local", "tags=[a]", "name=x", "output_dir=y", "cache_dir=z", "resume=auto", "budget.stop_at_images=64"],
        ["callbacks.checkpoints.keep=5", "~callbacks.progress"],
        ["optimizer.algorithm.weight_decay=0"],
        ["+experiment=unicon_sd3_canny"],
    ):
        assert config_sha(load("train", argv)) == sha, argv
    others = [
        "seed=1",
        "budget.images=64000",
        "adapter=unicon_half",
        "task.low=40",
        "optimizer.algorithm.lr=1e-4",
        "~callbacks.ema",
    ]
    assert len({sha, *(config_sha(load("train", [o])) for o in others)}) == len(others) + 1


def test_a_resumed_run_hears_which_science_keys_changed():
    old = OmegaConf.to_container(load("train"), resolve=True)  # as it is read back from a run folder
    assert science_diff(old, load("train", ["hardware=h200", "resume=auto"])) == []
    new = load(
        "train", ["seed=1", "adapter.copy=decoder", "optimizer.algorithm.betas=[0.9,0.999]", "data=folder", "data.path=x"]
    )
    changed = science_diff(old, new)
    assert {"seed", "adapter.copy", "optimizer.algorithm.betas", "data.path", "data.world_seed"} <= set(changed)
    assert changed == sorted(changed)
    assert "name" not in changed


def test_auto_is_the_cpu_profile_without_a_gpu_and_says_so(capsys):
    cfg = resolve_hardware(load("train", ["hardware.workers=5"]))
    assert capsys.readouterr().out == "hardware=auto is cpu here (no GPU)\n"
    hardware = cfg.hardware
    assert (hardware.name, hardware.accelerator, hardware.precision, hardware.micro_batch) == ("cpu", "cpu", "32-true", 32)
    assert hardware.workers == 5
    assert hardware.memory_gib is None
    assert resolve_hardware(cfg) == cfg
    assert capsys.readouterr().out == ""


AUTO = [
    ("a card", 12, "gpu_24g", None),
    ("a card", 24, "gpu_24g", None),
    ("a card", 79.2, "gpu_80g", None),
    ("NVIDIA GeForce RTX 4090", 23.5, "gpu_24g", 1008),
    ("NVIDIA A100-SXM4-80GB", 79.2, "gpu_80g", 2039),
    ("NVIDIA A100-SXM4-40GB", 39.4, "gpu_24g", None),
    ("NVIDIA H100 80GB HBM3", 79.2, "h100", 3350),
    ("NVIDIA H100 PCIe", 79.2, "gpu_80g", None),
    ("NVIDIA H200", 139.8, "h200", 4800),
    ("NVIDIA H200 MIG 1g.18gb", 16, "gpu_24g", None),
    ("NVIDIA GH200 480GB", 139.8, "h200", None),
    ("NVIDIA B200", 178.4, "h200", None),
]


@pytest.mark.parametrize(("name", "gib", "profile", "bandwidth"), AUTO)
def test_auto_follows_the_memory_of_the_gpu_and_has_no_rates_of_another(name, gib, profile, bandwidth, monkeypatch, capsys):
    facts = types.SimpleNamespace(name=name, total_memory=int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    hardware = resolve_hardware(configured("train")).hardware
    assert (hardware.name, hardware.accelerator, hardware.precision) == (profile, "gpu", "bf16-mixed")
    assert hardware.memory_gib <= gib + 0.01
    assert hardware.rates.get("bandwidth_gb_s") == bandwidth
    assert ("its rates are not known: no bound on time, no MFU" in capsys.readouterr().out) == (bandwidth is None)
    assert hardware.keys() == configured("train", f"hardware={profile}").hardware.keys()
    own = configured("train")
    own.hardware.rates = {"gpu": "mine"}
    assert resolve_hardware(own).hardware.rates == {"gpu": "mine"}
    assert "rates" not in capsys.readouterr().out


def test_a_gpu_profile_without_a_gpu_is_refused_when_it_runs():
    with pytest.raises(Incompatible, match="write hardware=cpu"):
        resolve_hardware(load("train", ["hardware=h200"]))


def test_accumulation_is_derived_and_the_micro_batch_never_exceeds_a_step(capsys):
    for argv, steps in [
        (["hardware=cpu"], 1),
        (["hardware=cpu", "hardware.micro_batch=8"], 4),
        (["hardware=gpu_24g"], 16),
        (["hardware=gpu_80g", "hardware.devices=2", "hardware.micro_batch=8"], 2),
    ]:
        assert accumulation(load("train", argv)) == steps
    cfg = load("train", ["budget.effective_batch=8"])
    assert accumulation(cfg) == 1
    assert resolve_hardware(cfg).hardware.micro_batch == 8
    assert "hardware.micro_batch lowered from 32 to 8" in capsys.readouterr().out


# ---- signatures -------------------------------------------------------------------------------------------------------


def test_annotations_judge_yaml_values():
    assert fits(1, float)
    assert fits(None, int | None)
    assert fits([0.9, 0.99], tuple[float, float])
    assert fits([], list[str])
    assert not fits(True, int)
    assert not fits("1", float)
    assert not fits([1], tuple[int, int])
    assert not fits(0.5, int)
    assert not fits("x", torch.Tensor)
    assert fits("x", Path)
    assert fits({"a": 1}, dict[str, int])
    assert hint_name(int | None) == "int | null"


def test_a_class_names_its_own_injected_arguments(monkeypatch):
    module = types.ModuleType("fake_callbacks")

    class Fake:
        injected = ("run",)

        def __init__(self, every: int, *, run: object):
            pass

    module.Fake = Fake
    monkeypatch.setitem(sys.modules, "fake_callbacks", module)

    @dataclass
    class Schema:
        callbacks: dict[str, Any] = field(default="???", metadata={"kind": "nodes"})

    def check(**node) -> None:
        cfg = OmegaConf.create({"callbacks": {"one": {"_target_": "fake_callbacks.Fake", **node}}})
        check_names(cfg, Schema, lambda key: "here")
        tree = resolve(cfg, lambda key: "here")
        check_values(tree, Schema, lambda key: "here")
        check_nodes(tree, Schema, lambda key: "here")

    check(every=3)
    with pytest.raises(ConfigError, match=r"here: callbacks\.one\.run=1 is filled in"):
        check(every=3, run=1)
    with pytest.raises(ConfigError, match=r"callbacks\.one\.every is missing"):
        check()
    assert issubclass(ConfigError, UserError)


# ---- the way in -------------------------------------------------------------------------------------------------------

ENTRY = """
import sys
from src.config import cli
from src.types import UserError

def main(cfg):
    if cfg.seed == 13:
        raise UserError("seed 13 is unlucky")
    print("ran", cfg.seed, flush=True)

cli("sample", main)
"""


def run_entry(folder: Path, *argv: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"} | {"PYTHONPATH": str(CONF.parent)}
    command = [sys.executable, "-c", ENTRY, *argv]
    return subprocess.run(command, check=False, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_an_entry_refuses_before_anything_runs(tmp_path):
    done = run_entry(tmp_path, "hardware=gpu_80gb")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: command line: hardware=gpu_80gb is not in conf/hardware; did you mean gpu_80g?\n"
    assert list(tmp_path.iterdir()) == []


def test_a_refused_job_of_a_multirun_does_not_stop_the_others(tmp_path):
    done = run_entry(tmp_path, "-m", "seed=1,13,2", "run=kept", *SAMPLE[1:])
    assert done.returncode == 2
    assert "ran 1" in done.stdout
    assert "ran 2" in done.stdout
    assert "error: job 1: seed 13 is unlucky" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
