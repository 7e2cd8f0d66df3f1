"""The comparison with diffusers' script: what both sides are given, how a program is watched from outside, and the sums.

The script itself is never in the repository: another real training stands in for it where a program is run.
"""

import hashlib
import json
import time
from pathlib import Path

import pytest
import torch

from src.bench import peer
from src.bench.markdown import markdown
from src.bench.peer import PEER, compare, ours, run_in_turns, run_side, theirs
from src.bench.peer_world import CLIP_TOKENS, model_folder, pictures, smaller_copy
from src.config import load
from src.types import UserError
from tests.conftest import CPU, run_entry, run_folder

TRAINING = """
import sys
import torch
steps, width = (int(word) for word in sys.argv[1:])
layer = torch.nn.Linear(width, width, bias=False)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
for step in range(steps):
    layer(torch.ones(1, width)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
print("made all steps")
"""

# with the command line of train_controlnet_sd3.py: an unknown flag ends it, and so does a missing folder
STAND_IN = """
import argparse
import time
from pathlib import Path
import torch
from diffusers import AutoencoderKL
parser = argparse.ArgumentParser()
for name in ("pretrained_model_name_or_path", "controlnet_model_name_or_path", "dataset_name", "cache_dir", "output_dir"):
    parser.add_argument(f"--{name}", type=Path, required=True)
for name in ("resolution", "train_batch_size", "max_train_steps", "checkpointing_steps", "lr_warmup_steps"):
    parser.add_argument(f"--{name}", type=int, required=True)
for name in ("max_sequence_length", "dataloader_num_workers", "seed"):
    parser.add_argument(f"--{name}", type=int, required=True)
for name in ("learning_rate", "adam_beta1", "adam_beta2", "adam_weight_decay", "max_grad_norm"):
    parser.add_argument(f"--{name}", type=float, required=True)
parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), required=True)
parser.add_argument("--gradient_checkpointing", action="store_true")
args = parser.parse_args()
if args.learning_rate == 0:
    raise ValueError("a rate of zero")
while args.max_grad_norm == 0:
    time.sleep(1)
assert (args.controlnet_model_name_or_path / "config.json").is_file()
assert (args.dataset_name / "metadata.jsonl").is_file()
vae = AutoencoderKL.from_pretrained(args.pretrained_model_name_or_path, subfolder="vae").requires_grad_(False)
layer = torch.nn.Linear(64, 64)
optimizer = torch.optim.AdamW(layer.parameters(), lr=args.learning_rate)
for step in range(args.max_train_steps):
    vae.encode(torch.zeros(args.train_batch_size, 3, args.resolution, args.resolution))
    layer(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""
SMALL = ["hardware=cpu", "hardware.workers=0", "batch=2", "steps=2", "warm_up=1", "repetitions=2", "images=8"]


@pytest.fixture
def script(tmp_path):
    (file := tmp_path / "train_controlnet_sd3.py").write_text(STAND_IN)
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer") / "model"
    return folder, model_folder("sd3_tiny", folder, seed=0)


def watched(tmp_path, steps, warm_up=1, memory=False, made=9, width=64):
    """The result of a real training of `made` steps under the watch, and the process."""
    script, spec, out = tmp_path / "training.py", tmp_path / "spec.json", tmp_path / "out.json"
    script.write_text(TRAINING)
    told = {"device": "cpu", "threads": 1, "script": str(script), "argv": [str(made), str(width)]}
    spec.write_text(json.dumps(told | {"warm_up": warm_up, "steps": steps, "memory": memory, "out": str(out)}))
    done = run_entry("bench.peer_side", str(spec))
    return json.loads(out.read_text()) if out.exists() else None, done


def test_the_model_folder_loads_as_a_backbone_and_encodes_to_the_shapes_of_both_sides(model):
    from src.construct import construct

    folder, transformer = model
    words = ["backbone=sd3_medium", f"backbone.source={folder}", "backbone.t5_tokens=16", "resolution=64", "hardware=cpu"]
    backbone = construct(load("train", words).backbone, resolution=64)
    assert backbone.facts.text_tokens == CLIP_TOKENS + 16
    assert backbone.facts.depth == transformer["num_layers"]
    text = backbone.encode_text(["a red ball"], CPU)
    assert text.tokens_BLD.shape == (1, CLIP_TOKENS + 16, transformer["joint_attention_dim"])
    assert text.pooled_BP.shape == (1, transformer["pooled_projection_dim"])
    assert backbone.load_codec(CPU).encode(torch.rand(1, 3, 64, 64)).shape == (1, 16, 8, 8)


def test_the_peers_smaller_copy_has_the_wanted_blocks_and_no_extra_channels(model, tmp_path):
    from diffusers import SD3ControlNetModel

    smaller_copy(model[0], 2, tmp_path / "copy")
    net = SD3ControlNetModel.from_pretrained(tmp_path / "copy")
    assert len(net.transformer_blocks) == len(net.controlnet_blocks) == 2
    assert net.pos_embed_input.proj.in_channels == model[1]["in_channels"]


def test_an_unknown_shape_is_refused_with_those_that_there_are(tmp_path):
    with pytest.raises(UserError, match=r"shape=sdxl: .* sd3_tiny, sd3_medium"):
        model_folder("sdxl", tmp_path / "model", seed=0)


def test_both_sides_read_the_same_pictures(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures(tmp_path / "data", 3, 64, seed=0)
    rows = datasets.load_dataset(str(tmp_path / "data" / "theirs"), cache_dir=str(tmp_path / "cache"))["train"]
    assert set(rows.column_names) == {"image", "conditioning_image", "text"}
    assert len(rows) == 3
    from src.construct import construct

    own = [f"data.path={tmp_path / 'data' / 'ours'}", "data.val_images=4", "resolution=64", "hardware=cpu"]
    source = construct(load("train", ["data=folder", *own, "validation.images=1", "validation.final_images=1"]).data,
                       split="train", resolution=64)  # fmt: skip
    assert len(source) == 3
    for n in range(3):
        assert source[n].caption == rows[n]["text"]
        assert (source[n].image == rows[n]["image"].convert("RGB")).all()


def test_both_command_lines_say_the_same(tmp_path):
    cfg = load("bench_peer", ["script=x", "hardware=cpu", "batch=3", "steps=5", "warm_up=2", "resolution=128"])
    peer = dict(word.removeprefix("--").split("=", 1) for word in theirs(cfg, tmp_path, tmp_path / "s.py")["argv"])
    side = ours(cfg, tmp_path, "dit_controlnet", 3)
    train = load("train", [w for w in side["argv"] if not w.startswith(("data", "validation.", "backbone.source"))])
    assert int(peer["train_batch_size"]) == train.budget.effective_batch == train.hardware.micro_batch == 3
    assert int(peer["resolution"]) == train.resolution == 128
    assert int(peer["max_train_steps"]) == train.budget.images // 3 == 8  # one more than is timed: nothing of an end is
    assert float(peer["learning_rate"]) == train.optimizer.algorithm.lr
    assert [float(peer["adam_beta1"]), float(peer["adam_beta2"])] == list(train.optimizer.algorithm.betas)
    assert float(peer["adam_weight_decay"]) == train.optimizer.algorithm.weight_decay
    assert float(peer["max_grad_norm"]) == train.optimizer.clip_norm
    assert (peer["mixed_precision"], train.hardware.precision) == ("no", "32-true")
    assert train.adapter.blocks == 3
    assert train.ema_decay == 0


def test_a_gpu_profile_goes_to_our_side_as_it_is(tmp_path):
    cfg = load("bench_peer", ["script=x", "hardware=h200", "batch=2"])
    side = ours(cfg, tmp_path, "dit_controlnet", 3)
    given = [w for w in side["argv"] if not w.startswith(("data", "validation.", "backbone.source"))]
    own = load("train", ["hardware=h200"]).hardware
    assert load("train", given).hardware == {**own, "micro_batch": 2}
    assert own.rates.gpu == "H200"


def test_recomputing_both_networks_is_refused_for_the_peer_cannot(tmp_path):
    cfg = load("bench_peer", ["script=x", "hardware=cpu", "hardware.checkpointing=both"])
    with pytest.raises(UserError, match="write adapter or none"):
        theirs(cfg, tmp_path, tmp_path / "s.py")


def test_a_program_is_timed_behind_its_warm_up_and_stopped(tmp_path):
    result, done = watched(tmp_path, steps=4, warm_up=2)
    assert done.returncode == 0, done.stderr
    assert "made all steps" not in done.stdout
    assert len(result["step_ms"]) == 4
    assert all(t > 0 for t in result["step_ms"])
    assert result["cpu_ms"] > 0
    assert result["encoder_ms"] == 0
    assert {"tf32_matmul", "cudnn_benchmark", "attention_enabled", "threads"} <= result["flags"].keys()


def test_the_memory_of_a_step_is_the_bytes_of_its_tensors(tmp_path):
    width = 1024
    result, done = watched(tmp_path, steps=1, warm_up=2, memory=True, width=width)
    assert done.returncode == 0, done.stderr
    square = 4 * width**2  # weight and gradient; the rest is vectors
    assert 2 * square <= result["peak_gib"] * 2**30 <= 2 * square + 100 * width


@pytest.mark.slow
def test_a_program_that_ends_early_is_an_error_and_leaves_no_result(tmp_path):
    result, done = watched(tmp_path, steps=4, made=2)
    assert result is None
    assert done.returncode != 0
    assert "ended after 2 optimizer steps; 5 were wanted" in done.stderr


def test_rates_and_ratios_by_hand():
    def run(step_ms, encoder_ms, peak, cpu_ms):
        return {"step_ms": [step_ms] * 4, "encoder_ms": encoder_ms, "peak_gib": peak, "cpu_ms": cpu_ms}

    runs = {PEER: [run(200, 400, 2.0, 900), run(400, 800, 2.0, 900)], "unicon": [run(100, 0, 1.0, 300), run(100, 0, 1.5, 450)]}
    told = compare(runs, batch=8)
    assert told["sides"]["unicon"]["images_per_s"]["median"] == pytest.approx(80)
    assert told["sides"][PEER]["images_per_s"]["median"] == pytest.approx(30)  # of 40 and 20
    assert told["sides"][PEER]["images_per_s_without_encoder"]["median"] == pytest.approx(60)
    ratio = told["ratios"]["unicon"]
    assert ratio["speed"]["median"] == pytest.approx(3)  # of 2 and 4: pair by pair
    assert ratio["speed"]["quartiles"] == pytest.approx([2.5, 3.5])
    assert ratio["speed_without_encoder"]["median"] == pytest.approx(1.5)
    assert ratio["speed_by_processor_time"]["median"] == pytest.approx(2.5)
    assert ratio["memory"] == {"median": 0.625, "quartiles": [0.5625, 0.6875], "n": 2}
    assert told["sides"]["unicon"]["peak_mem_gib"]["median"] == 1.25
    for side in runs.values():
        del side[1]["peak_gib"]  # as on a CPU, where one process of each side tells it
    told = compare(runs, batch=8)
    assert told["ratios"]["unicon"]["memory"] == {"median": 0.5, "quartiles": [0.5, 0.5], "n": 1}
    assert told["ratios"]["unicon"]["speed"]["n"] == 2


def test_a_missing_script_is_refused_with_the_one_that_is_meant():
    done = run_entry("bench.peer", "script=/nowhere.py", "hardware=cpu")
    assert done.returncode == 2
    assert "examples/controlnet/train_controlnet_sd3.py of diffusers" in done.stderr
    assert "Traceback" not in done.stderr


# ---- the entry ----------------------------------------------------------------------------------------------------------


def side_of(tmp_path, script, *changes):
    """The peer's side with flags changed, as `run_in_turns` hands it to a process."""
    cfg = load("bench_peer", [*SMALL, f"script={script}"])
    side = theirs(cfg, tmp_path / "world", script)
    common = {"device": "cpu", "threads": 1, "warm_up": cfg.warm_up, "steps": cfg.steps, "memory": False}
    return common | {"script": side["script"], "argv": [*side["argv"], *changes]}


def test_a_side_that_fails_is_refused_with_its_last_error_and_its_log(tmp_path, script):
    with pytest.raises(UserError, match=r"^side-0 ended with code 1: ValueError: a rate of zero; its log: .*side-0\.log$"):
        run_side(side_of(tmp_path, script, "--learning_rate=0"), tmp_path / "side-0", tmp_path, 300)
    assert 'raise ValueError("a rate of zero")' in (tmp_path / "side-0.log").read_text()
    assert json.loads((tmp_path / "side-0.spec.json").read_text())["script"] == str(script)
    assert not (tmp_path / "side-0.json").exists()


def test_a_side_that_hangs_is_ended_and_refused_with_its_log(tmp_path, script):
    began = time.monotonic()  # it hangs, if it has come that far
    with pytest.raises(UserError, match=r"^side-0 took more than timeout_s=2; its log: .*side-0\.log$"):
        run_side(side_of(tmp_path, script, "--max_grad_norm=0"), tmp_path / "side-0", tmp_path, 2)
    assert time.monotonic() - began < 60


def test_sides_take_turns_and_tell_a_cpus_memory_once(tmp_path, monkeypatch):
    played = []

    def run(spec, base, world, timeout_s):
        played.append((base.name, spec["steps"], spec["memory"], spec["argv"], timeout_s))
        return {"peak_gib": 1.0} if spec["memory"] else {"step_ms": [1.0]}

    monkeypatch.setattr(peer, "run_side", run)
    cfg = load("bench_peer", [*SMALL, "script=x", "timeout_s=7"])
    runs = run_in_turns(cfg, {PEER: {"argv": ["a"]}, "unicon": {"argv": ["b"]}}, tmp_path, tmp_path)
    turns = [(f"{name}-{turn}", 2, False, argv, 7) for turn in (0, 1) for name, argv in ((PEER, ["a"]), ("unicon", ["b"]))]
    assert played == [*turns, (f"{PEER}-memory", 1, True, ["a"], 7), ("unicon-memory", 1, True, ["b"], 7)]
    assert runs == {key: [{"step_ms": [1.0], "peak_gib": 1.0}, {"step_ms": [1.0]}] for key in (PEER, "unicon")}


def test_what_is_left_says_where_it_comes_from(tmp_path, script, monkeypatch, capsys):
    def run(spec, base, world, timeout_s):
        assert (world / "copy" / "config.json").is_file()
        assert len(list((world / "data" / "theirs" / "images").iterdir())) == 8
        mine = 1 if "module" in spec else 2
        return {"step_ms": [10.0 * mine] * 2, "cpu_ms": 20.0 * mine, "encoder_ms": 5.0 * (mine - 1), "peak_gib": 0.5 * mine}

    monkeypatch.setattr(peer, "run_side", run)
    peer.main(load("bench_peer", [*SMALL, f"script={script}", f"output_dir={tmp_path}"]))
    folder = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("run: "))
    assert folder.parent == tmp_path / "peer_sd3_tiny"
    check_peer(folder, script)
    told = json.loads((folder / "peer.json").read_text())
    assert told["ratios"]["dit_controlnet"]["speed"] == {"median": 2.0, "quartiles": [2.0, 2.0], "n": 2}


def check_peer(folder, script):
    """peer.json as a reader wants it."""
    told = json.loads((folder / "peer.json").read_text())
    assert told["kind"] == "peer"
    settings = told["settings"]
    assert settings["device"].startswith("cpu: ")
    assert len(settings["git_sha"]) == 40
    assert {"command", "date", "versions", "git_dirty"} <= settings.keys()
    assert settings["script_sha256"] == hashlib.sha256(script.read_bytes()).hexdigest()
    assert settings["configuration"]["hardware"]["name"] == "cpu"
    assert not settings["configuration"]["script"].startswith("/")  # no file tells where things lie on a machine
    assert settings["copied_blocks"] == settings["transformer"]["num_layers"] // 2
    assert told["sides"].keys() == told["runs"].keys() == {PEER, "dit_controlnet"}
    for side in told["sides"].values():
        assert side["images_per_s"]["n"] == 2
        assert side["images_per_s"]["quartiles"][0] > 0
        assert side["peak_mem_gib"]["median"] > 0
    assert told["ratios"]["dit_controlnet"].keys() == {*peer.SPEEDS, "memory"}
    assert "| dit_controlnet |" in markdown([folder])


@pytest.mark.slow  # six processes, of which three are trainings: with `make test-all`
def test_both_programs_run_against_each_other(tmp_path, script):
    done = run_entry("bench.peer", *SMALL, f"script={script}", f"output_dir={tmp_path}", timeout=900)
    assert done.returncode == 0, done.stderr
    folder = run_folder(done)
    check_peer(folder, script)
    runs = json.loads((folder / "peer.json").read_text())["runs"]
    assert all(len(run["step_ms"]) == 2 for side in runs.values() for run in side)
    assert all(run["encoder_ms"] > 0 for run in runs[PEER])  # in every step; ours are cached before the first
    assert all(run["encoder_ms"] == 0 for run in runs["dit_controlnet"])
    assert "src.bench.peer" in json.loads((folder / "peer.json").read_text())["settings"]["command"]
