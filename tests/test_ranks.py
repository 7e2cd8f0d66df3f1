"""Several devices: the same images, noise, t and loss as one process, one checkpoint for all, and what is refused."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.adapters.base import ControlAdapter
from src.config import accumulation, load, resolve_hardware
from src.config.devices import check_devices
from src.config.messages import Incompatible
from src.data.datamodule import PositionSampler
from src.ranks.launch import first_host, this_node
from src.ranks.place import ALONE, Ranks, device_count, join
from src.results import read_rows
from src.train.flow import train
from src.types import UserError
from tests.conftest import QUICK, ROOT, run_entry
from tests.ranks_spy import spy

# 4 optimizer steps of 8 images, over more than one epoch; two ranks see micro-batches of 4, as one process in two turns
RUN = [*QUICK, "data.train_images=24", "budget.images=32", "budget.effective_batch=8", "hardware.micro_batch=4"]
RUN += ["callbacks.meter.every_steps=1", "caption_dropout=0.3", "optimizer.warmup_images=16", "hardware.timeout_s=60"]
RUN += ["validation.every_images=1000", "validation.images=2", "validation.final_images=2"]
TWO, SHARDED = ["hardware.devices=2"], ["hardware.devices=2", "hardware.strategy=fsdp"]
SPY = "tests.ranks_spy"  # src.train, with the images of every micro-batch written down


def go(out: Path, cache: Path, *extra: str, **env: str) -> subprocess.CompletedProcess:
    """A training in processes of its own, of which the one that starts the ranks is forked; what they saw goes into `out`."""
    out.mkdir(exist_ok=True)
    return run_entry(SPY, *extra, f"cache_dir={cache}", SPY_FOLDER=str(out), **env)


def run_of(done: subprocess.CompletedProcess) -> Path:
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(done.stdout.strip().splitlines()[-1].removeprefix("run: "))


def seen(out: Path) -> dict[int, tuple]:
    """Position -> what was learned from there: id, noise and t by their bytes' hash."""
    lines = [json.loads(line) for file in out.glob("seen-*.jsonl") for line in file.read_text().splitlines()]
    assert len({line[0] for line in lines}) == len(lines), "a position was seen twice"
    return {line[0]: tuple(line[1:]) for line in lines}


def rows(folder: Path) -> list[tuple]:
    wanted = ("images_seen", "train/loss", "train/lr", "train/grad_norm")
    return [tuple(r[k] for k in wanted) for r in read_rows(folder / "metrics.jsonl") if "train/loss" in r]


def weights(folder: Path, name: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(sorted((folder / "checkpoints").glob("images-*"))[-1] / f"{name}.safetensors")


def outcome(folder: Path) -> dict:
    return json.loads((folder / "outcome.json").read_text())


def assert_near(one: Path, other: Path) -> None:
    """Sums in another order: a rounding per step, which AdamW's quotient of two small numbers may enlarge."""
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for name in ("adapter", "adapter_ema"):
        a, b = weights(one, name), weights(other, name)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=2e-5, msg=key)


# ---- equality ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache_dir) -> tuple[Path, Path]:
    """One process: where its images are written, and its run."""
    out = tmp_path_factory.mktemp("alone")
    typed = [*RUN, f"output_dir={out}", f"cache_dir={cache_dir}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ControlAdapter, "training_step", spy)
        patch.setenv("SPY_FOLDER", str(out))
        return out, train(load("train", typed), typed)


def test_two_processes_learn_bit_for_bit_what_one_does(alone, tmp_path, cache_dir):
    """With two ranks a sum has two terms, and halves are exact: nothing is left to round otherwise."""
    folder = run_of(go(tmp_path, cache_dir, *RUN, *TWO, f"output_dir={tmp_path}"))
    assert len(list(tmp_path.glob("seen-*.jsonl"))) == 2
    assert seen(tmp_path) == seen(alone[0])
    assert sorted(seen(tmp_path)) == list(range(32))
    assert rows(folder) == rows(alone[1])
    assert len(rows(folder)) == 4
    for name in ("adapter", "adapter_ema"):
        a, b = weights(alone[1], name), weights(folder, name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), name
    assert outcome(folder)["scores"] == outcome(alone[1])["scores"]
    assert len(list((tmp_path / "unicon_sd3_tiny_canny").iterdir())) == 1, "one run folder, made by the first rank"
    assert json.loads((folder / "results.json").read_text())["flags"]["devices"] == 2


@pytest.mark.slow
def test_copies_whose_dead_parameters_are_frozen_wait_for_no_gradient(tmp_path, cache_dir):
    """The text path of SD3's last copy is read by nobody, and DDP is not told to look for such: thawed, it ends the run."""
    words = [*RUN, "adapter=dit_controlnet", "backbone=sd3_tiny"]
    one = run_of(go(tmp_path / "one", cache_dir, *words, f"output_dir={tmp_path / 'one'}"))
    two = run_of(go(tmp_path / "two", cache_dir, *words, *TWO, f"output_dir={tmp_path / 'two'}"))
    assert rows(two) == rows(one)
    assert len(rows(two)) == 4
    assert all(torch.equal(a, b) for a, b in zip(weights(two).values(), weights(one).values(), strict=True))
    assert outcome(two)["frozen_dead_m"] > 0
    thawed = go(tmp_path / "thawed", cache_dir, *words, *TWO, f"output_dir={tmp_path / 'thawed'}", THAW="1")
    assert thawed.returncode not in (0, 2)
    assert "has parameters that were not used" in thawed.stdout + thawed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["adapter", "both"])
def test_sharded_weights_learn_the_same_to_rounding(alone, tmp_path, cache_dir, shard):
    folder = run_of(go(tmp_path, cache_dir, *RUN, *SHARDED, f"hardware.shard={shard}", f"output_dir={tmp_path}"))
    assert seen(tmp_path) == seen(alone[0])
    assert_near(alone[1], folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [
        ["adapter=dit_controlnet"],
        ["adapter=controlnet", "backbone=sd21_tiny"],
        ["adapter=unicon", "backbone=sd21_tiny"],
        ["adapter=t2i_adapter", "backbone=pixart_tiny"],
    ],
    ids=lambda cell: "-".join(word.partition("=")[2] for word in cell),
)
def test_methods_of_every_kind_can_be_sharded(tmp_path, cache_dir, cell):
    """Gradients through the backbone, copies of a U-Net's steps, no copies at all; the backbone sharded, too."""
    one = run_of(go(tmp_path / "one", cache_dir, *RUN, *cell, f"output_dir={tmp_path / 'one'}"))
    two = run_of(
        go(tmp_path / "two", cache_dir, *RUN, *cell, *SHARDED, "hardware.shard=both", f"output_dir={tmp_path / 'two'}")
    )
    assert_near(one, two)


@pytest.mark.slow
@pytest.mark.parametrize(("begun", "ended"), [(TWO, ["hardware.devices=1"]), (SHARDED, TWO), (["hardware.devices=1"], SHARDED)])
def test_a_run_goes_on_with_other_devices(alone, tmp_path, cache_dir, begun, ended):
    first = run_of(go(tmp_path, cache_dir, *RUN, *begun, "budget.stop_at_images=16", f"output_dir={tmp_path}"))
    hardware = ["hardware=cpu", "hardware.micro_batch=4", "hardware.workers=0", "hardware.timeout_s=60"]
    assert run_of(go(tmp_path, cache_dir, f"resume={first}", *hardware, *ended)) == first
    assert seen(tmp_path) == seen(alone[0])
    assert_near(alone[1], first)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_devices_and_its_bits(alone, tmp_path, cache_dir):
    first = run_of(go(tmp_path, cache_dir, *RUN, *TWO, "budget.stop_at_images=16", f"output_dir={tmp_path}"))
    assert run_of(go(tmp_path, cache_dir, f"resume={first}")) == first
    assert rows(first) == rows(alone[1])
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(alone[1]).values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_all_ranks_after_the_same_step(tmp_path, cache_dir, number):
    """The signal reaches the process that watches; the ranks hear of it at moments of their own."""
    command = [sys.executable, "-m", "src.train", *RUN, *TWO, "budget.images=8000", f"output_dir={tmp_path}"]
    process = subprocess.Popen([*command, f"cache_dir={cache_dir}"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("*/*/metrics.jsonl")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 143, out
    assert f"stopped by {number.name}" in out
    (saved,) = tmp_path.glob("*/*/checkpoints/images-*")
    assert json.loads((saved / "meta.json").read_text())["images_seen"] % 8 == 0


# ---- who takes what ---------------------------------------------------------------------------------------------------


def test_ranks_cut_every_step_and_leave_nothing_out():
    for ranks, micro in ((2, 4), (4, 1), (8, 1), (2, 2)):
        parts = [list(PositionSampler(16, 48, micro, rank, ranks, 8)) for rank in range(ranks)]
        assert len({len(part) for part in parts}) == 1
        assert all(len(part) == len(PositionSampler(0, 32, micro, 0, ranks, 8)) for part in parts)
        per_step = 8 // (ranks * micro)
        for step in range(4):
            cut = [n for part in parts for batch in part[step * per_step : (step + 1) * per_step] for n in batch]
            assert sorted(cut) == list(range(16 + 8 * step, 24 + 8 * step))


def test_pictures_are_shared_by_whole_batches():
    parts = [Ranks(rank=r, count=3).mine(range(100), 32) for r in range(3)]
    assert [part[0] for part in parts] == [0, 32, 64]
    assert sorted(n for part in parts for n in part) == list(range(100))
    assert Ranks(rank=1, count=3, cuts=False).mine(range(5), 2) == [0, 1, 2, 3, 4]  # sharded weights: everybody, everything


def test_one_process_asks_nobody():
    assert (ALONE.agree(3), ALONE.gather(3), ALONE.any(True), ALONE.mean([1.0])) == (3, [3], True, [1.0])
    assert ALONE.first_does(lambda: 4) == 4


# ---- the configuration ------------------------------------------------------------------------------------------------


def test_accumulation_counts_the_devices_of_all_nodes():
    cfg = load("train", ["hardware=h100_8", "hardware.nodes=2", "hardware.micro_batch=2", "budget.effective_batch=128"])
    assert accumulation(cfg) == 4
    assert device_count(cfg.hardware) == 16
    assert device_count(load("train", ["hardware=h100_8x4", "budget.effective_batch=256"]).hardware) == 32


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["hardware=cpu", "hardware.strategy=ddp"], "write hardware.strategy=auto or hardware.devices=2"),
        ([*TWO, "hardware=cpu", "hardware.shard=both"], "write hardware.strategy=fsdp or hardware.shard=adapter"),
        ([*TWO, "hardware=cpu", "together=[unicon_half]"], "write hardware.devices=1"),
        ([*SHARDED, "hardware=cpu", "hardware.compile=all"], "write hardware.compile=none"),
        ([*SHARDED, "hardware=h200", "hardware.precision=16-mixed"], "write hardware.precision=bf16-mixed"),
        ([*SHARDED, "hardware=cpu", "hardware.shard=both", "control_arm=true"], "write hardware.shard=adapter"),
        (["hardware=cpu", "hardware.devices=3"], "write hardware.devices=2 or budget.effective_batch=33"),
        (["hardware=h100_8", "hardware.nodes=3"], "budget.effective_batch=48"),
    ],
)
def test_what_several_devices_cannot_do_is_refused_with_what_would_do(words, fix):
    with pytest.raises(Incompatible) as refused:
        load("train", words)
    assert fix in str(refused.value)
    assert "\n" not in str(refused.value)


def test_eight_bits_of_optimizer_state_cannot_be_sharded():
    """Asked of the rule itself: the library is not here on every machine."""
    hardware = dict(load("train", [*SHARDED, "hardware=h200", "hardware.fit=warn"]).hardware)
    tree = {"optimizer": {"algorithm": {"_target_": "bitsandbytes.optim.AdamW8bit"}}}
    with pytest.raises(UserError, match=r"write optimizer=adamw or hardware\.strategy=ddp"):
        check_devices(tree, hardware, lambda keys, fault: UserError(fault))


@pytest.mark.parametrize("profile", ["h100_2", "h100_8", "h100_8x4", "h200_8"])
def test_profiles_of_many_gpus_are_refused_where_there_are_none(profile):
    cfg = load("train", [f"hardware={profile}", "budget.effective_batch=256"])
    if torch.cuda.is_available():
        pytest.skip("there are GPUs")
    with pytest.raises(Incompatible, match=f"hardware={profile} wants .* write hardware=cpu or hardware=auto"):
        resolve_hardware(cfg)


def test_a_process_that_was_not_started_as_a_rank_says_how(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    hardware = load("train", ["hardware=cpu", *TWO]).hardware
    with pytest.raises(UserError, match="which makes a process for each device"):
        join(hardware)
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="3 processes were started for 2 devices"):
        join(hardware)


# ---- nodes ------------------------------------------------------------------------------------------------------------


def test_slurm_tells_where_the_nodes_meet():
    assert [first_host(s) for s in ("gpu[03-05,9]", "gpu03,gpu04", "a-b12", "n[7]-x")] == ["gpu03", "gpu03", "a-b12", "n7-x"]
    slurm = {"SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "41234", "SLURM_NNODES": "2"}
    nodes = [this_node(2, {**slurm, "SLURM_NODEID": n}) for n in "01"]
    assert [(n.number, n.address) for n in nodes] == [(0, "gpu03"), (1, "gpu03")]
    assert nodes[0].port == nodes[1].port
    assert this_node(2, {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}).port == 29400
    for env, said in (
        ({}, "srun --ntasks-per-node=1"),
        ({**slurm, "SLURM_LOCALID": "1"}, "srun --ntasks-per-node=1"),
        ({**slurm, "SLURM_NNODES": "4"}, "write hardware.nodes=4"),
    ):
        with pytest.raises(UserError, match=said):
            this_node(2, env)
