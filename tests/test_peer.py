"""The comparison with diffusers' script: what both sides are given, how a program is watched from outside, and the sums.

The script itself is never in the repository: another real training stands in for it where a program is run.
"""

import json

import pytest
import torch

from src.bench.peer import PEER, compare, ours, theirs
from src.bench.peer_world import CLIP_TOKENS, model_folder, pictures, smaller_copy
from src.config import load
from src.types import UserError
from tests.conftest import CPU, run_entry

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
