"""`python -m src.bench.speed`: switches against the plain training, and the tables made of what is measured."""

import json
import shlex
import types
import weakref
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from src.bench import quantized, speed, table
from src.bench.estimate import estimate
from src.bench.markdown import markdown
from src.bench.plan import plan
from src.bench.speed import PLAIN, SWITCHES, Setting, Switch, measured, pairs, split_words, write
from src.config import load
from src.construct import construct
from src.results import read_cost
from src.types import UserError
from tests.conftest import QUICK, run_entry, run_folder

SMALL = ["hardware=cpu", "hardware.micro_batch=1"]


def configured(*words):
    return load("train", [*SMALL, *words])


@pytest.fixture(scope="module")
def facts():
    return construct(configured().backbone).facts


def test_switches_are_timed_in_turns_with_a_state_that_is_made_once(tmp_path, facts, monkeypatch):
    made, rounds = [], []
    begin, play = speed.Setting.__init__, torch.optim.AdamW._init_group
    monkeypatch.setattr(speed.Setting, "__init__", lambda self, *a: (made.append(a[1]), begin(self, *a))[1])
    cfg = configured("adapter=unicon_half", f"output_dir={tmp_path}")

    def watched(self, *args, **kwargs):
        rounds.append(len(self.state))
        return play(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "_init_group", watched)
    found = measured(cfg, facts, ["shared_2", "reuse_2", "adamw8bit", "graphs"], rounds=2, warm_up=1)
    assert made == [PLAIN, SWITCHES["shared_2"], SWITCHES["reuse_2"]]
    # one optimizer of the plain side, two that share, one that uses each pass twice: only their first step makes a state
    assert rounds.count(0) == 1 + 2 + 1
    for name in ("shared_2", "reuse_2"):
        one = found[name]
        assert one["ratio"]["n"] == 2
        assert one["memory_ratio"] == one["peak_bytes"] / one["plain_peak_bytes"] > 0
        assert one["pass_bytes"] > 0
    assert found["shared_2"]["memory_ratio"] > 1  # two adapters
    assert found["adamw8bit"] == {"skipped": "needs a GPU"}
    assert found["graphs"] == {"skipped": "needs a GPU"}
    (folder := tmp_path / "speed" / "stamp").mkdir(parents=True)
    write(cfg, found, list(found), folder)
    told = json.loads((folder / "speed.json").read_text())
    assert told["switches"].keys() == found.keys()
    assert told["device"].startswith("cpu: ")
    assert {"tf32_matmul", "tf32_conv", "cudnn_benchmark", "attention_enabled", "threads"} <= told["flags"].keys()
    assert {"date", "git_sha", "command", "versions"} <= told.keys()
    printed = markdown([tmp_path])
    one = found["reuse_2"]
    assert f"| reuse_2 | {one['plain_ms']['median']:.1f} [" in printed
    assert f"| {one['peak_bytes'] / 2**20:.0f} | {one['memory_ratio']:.2f}x |" in printed
    assert "adamw8bit was skipped: needs a GPU." in printed
    assert told["git_sha"][:12] in printed
    assert told["device"] in printed


def played(monkeypatch, faults):
    """Have sides and their times stand in for real ones. faults: switch -> what it raises. -> the speed.json that stood there
    when each side was made, with how many sides were alive."""
    alive, seen = weakref.WeakSet(), []

    class Side:
        peak_bytes, pass_bytes = 2**20, 0

        def __init__(self, cfg, switch, warm_up):
            alive.add(self)
            files = list(Path(cfg.output_dir).rglob("speed.json"))
            seen.append((json.loads(files[0].read_text())["switches"] if files else {}, len(alive)))
            self.switch, self.steps = switch, types.SimpleNamespace(time=lambda rounds: 1.0)
            for name, error in faults.items():
                if switch is (SWITCHES | {"plain": PLAIN})[name]:
                    raise error

    monkeypatch.setattr(speed, "Setting", Side)
    return seen


def test_a_switch_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    faults = {"int8": RuntimeError("no kernel | here\nand more"), "fused": torch.OutOfMemoryError("CUDA out of memory.")}
    seen = played(monkeypatch, faults)
    with pytest.raises(SystemExit) as left:
        speed.main(configured("adapter=unicon_half", f"output_dir={tmp_path}"), ["int8", "fused", "graphs", "reuse_2"])
    assert left.value.code == 1
    out, err = capsys.readouterr()
    assert "int8             failed: the switch: RuntimeError: no kernel | here\n" in err
    assert "fused            out of memory: the switch: OutOfMemoryError: CUDA out of memory.\n" in err
    assert "reuse_2          1.00x" in out
    folder = Path(out.splitlines()[-1].removeprefix("run: "))
    told = json.loads((folder / "speed.json").read_text())["switches"]
    assert list(told) == ["int8", "fused", "graphs", "reuse_2"]
    assert told["int8"] == {"failed": "the switch: RuntimeError: no kernel | here"}
    assert told["fused"] == {"oom": "the switch: OutOfMemoryError: CUDA out of memory."}
    # a plain side and a switched one for each; the file grows from switch to switch, and nothing of a failed one is kept
    assert [list(file) for file, _ in seen] == [[], [], ["int8"], ["int8"], *[["int8", "fused", "graphs"]] * 2]
    assert [count for _, count in seen] == [1, 2] * 3
    assert [file.name for file in folder.iterdir()] == ["speed.json"]
    printed = markdown([tmp_path])
    assert "| int8 | - | failed | - | - | - |" in printed
    assert "| fused | - | out of memory | - | - | - |" in printed
    assert "fused out of memory: the switch: OutOfMemoryError: CUDA out of memory.\n" in printed
    assert "graphs was skipped: needs a GPU." in printed


def test_a_plain_side_that_does_not_fit_is_not_blamed_on_the_switch(tmp_path, monkeypatch):
    played(monkeypatch, {"plain": RuntimeError("DefaultCPUAllocator: can't allocate memory")})
    with pytest.raises(SystemExit) as left:
        speed.main(configured("adapter=unicon_half", f"output_dir={tmp_path}"), ["fused"])
    assert left.value.code == 3
    (file,) = tmp_path.rglob("speed.json")
    (one,) = json.loads(file.read_text())["switches"].values()
    assert one["oom"].startswith("the plain training: RuntimeError: ")


def test_a_pass_made_ahead_is_one_per_step_when_timed_over_several(facts):
    other = Setting(configured("adapter=unicon_half"), Switch(shares={"overlap": True}, rounds=3), 1)
    before = other.steps.passes_made
    told = pairs(other, other, rounds=1)
    assert told["rounds"] == 3
    assert other.steps.passes_made - before == 2 * 3


def test_an_eight_bit_optimizer_wants_its_package_and_a_gpu(facts, monkeypatch):
    refused = SWITCHES["adamw8bit"].refused
    assert refused(configured(), facts) == "needs a GPU"
    on_gpu = load("train", ["hardware=h200"])
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    assert "pip install bitsandbytes" in refused(on_gpu, facts)
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: object())
    assert refused(on_gpu, facts) is None


def test_a_method_that_crosses_the_backbone_is_refused_before_a_weight_is_read(monkeypatch):
    monkeypatch.setattr(speed, "Setting", None)
    with pytest.raises(UserError, match="these switches are for adapter=unicon"):
        speed.main(configured("adapter=dit_controlnet"), ["fused"])


def test_names_of_switches_come_first():
    assert split_words(["int8,fused", "adapter=unicon"]) == (["int8", "fused"], ["adapter=unicon"])
    assert split_words(["adapter=unicon"]) == ([], ["adapter=unicon"])
    with pytest.raises(UserError, match="did you mean fused"):
        split_words(["fusd"])


# ---- tables -------------------------------------------------------------------------------------------------------------


def test_a_table_of_estimates_has_floor_and_naive_rows_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "BATCHES", (1,))
    monkeypatch.setattr(table, "SCOPES", ("none",))
    place = ["backbone=sd3_tiny", "adapter=dit_controlnet", "resolution=64"]
    places = [place, [*place, "floor=true", "what=training"]]
    table.main(tmp_path, places[:1])
    table.main(tmp_path, places)
    found = {f.parent.name: read_cost(f) for f in tmp_path.glob("*/results.json")}
    assert sorted(found) == [
        "sd3_tiny_64_floor_training_1_none",
        "sd3_tiny_dit_controlnet_64_1_inference",
        "sd3_tiny_dit_controlnet_64_1_naive",
        "sd3_tiny_dit_controlnet_64_1_none",
    ]
    assert len(capsys.readouterr().out.splitlines()) == 4  # each was made once
    floor, drawing, naive, plain = (found[name] for name in sorted(found))
    assert (floor.adapter, floor.trainable_m) == ("none", 0)
    assert naive.flags["naive"]
    assert not plain.flags["naive"]
    assert floor.peak_mem_gib < plain.peak_mem_gib < naive.peak_mem_gib
    assert (drawing.what, drawing.flops["backward"], drawing.trainable_m) == ("inference", 0, plain.trainable_m)
    words = shlex.split(floor.command)[3:]
    alone = estimate(plan(load("bench", words), lambda line: None))
    assert (floor.flops, floor.memory_gib) == (alone["flops"], alone["memory_gib"])


def test_the_full_table_has_every_method_and_the_floor():
    assert len(list(table.cells())) == 30
    names = [table.folder_name([*words, "batch=1"]) for words in (*table.cells(), *table.floors())]
    assert len(set(names)) == len(names) == 30 + 2 * len(table.PLACES)


def test_markdown_of_a_peer_says_the_spread_and_refuses_what_is_not_whole(tmp_path):
    def of(median, n=5):
        return {"median": median, "quartiles": [median - 1, median + 1], "n": n}

    sides = {name: {"images_per_s": of(10.0), "peak_mem_gib": of(3.0, n=1)} for name in ("diffusers", "unicon")}
    keys = ("speed", "speed_without_encoder", "speed_by_processor_time")
    ratios = {"unicon": {key: of(2.0) for key in keys} | {"memory": of(0.5, n=1)}}
    cfg = {
        "resolution": 64,
        "batch": 4,
        "hardware": {"precision": "32-true"},
        "shape": "sd3_tiny",
        "repetitions": 5,
        "steps": 12,
    }
    settings = {
        "configuration": cfg, "text_tokens": 93, "copied_blocks": 3, "memory": "live tensors", "device": "cpu: X",
        "latents": {"ours": "cached", "diffusers": "encoded"}, "versions": {"torch": "2"}, "git_sha": "a" * 40,
        "git_dirty": True, "date": "2026-01-01", "command": "python -m src.bench.peer",
    }  # fmt: skip
    file = tmp_path / "peer.json"
    file.write_text(json.dumps({"settings": settings, "sides": sides, "ratios": ratios}))
    lines = markdown([tmp_path]).splitlines()
    assert "| diffusers | 10.00 [9.00, 11.00] | 3.000 | - | - | - | - |" in lines
    assert "| unicon | 10.00 [9.00, 11.00] | 3.000 | " + "2.00x [1.00, 3.00] | " * 3 + "0.50x |" in lines
    assert "cpu: X; torch 2; commit aaaaaaaaaaaa with changes; 2026-01-01; `python -m src.bench.peer`" in lines
    file.write_text(json.dumps({"settings": settings, "sides": sides}))
    with pytest.raises(UserError, match=r"peer\.json is not whole: KeyError\('ratios'\); measure it again"):
        markdown([tmp_path])
    with pytest.raises(UserError, match=r"none of speed\.json"):
        markdown([tmp_path / "nowhere"])


# ---- a quantized backbone -----------------------------------------------------------------------------------------------


def a_run(place, *words):
    """A folder like a run's, with a configuration and a checkpoint that nobody reads."""
    folder = place / "name" / "stamp"
    (folder / "checkpoints" / "images-000000016").mkdir(parents=True)
    OmegaConf.save(load("train", ["hardware=cpu", *words]), folder / "config.yaml")
    return folder


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ([], "run= is missing"),
        (["run={run}"], "n= is missing"),
        (["run={run}", "n=1"], "n=1: give a number of held-out images, 2 at least"),
        (["run={run}", "n=8", "kin=int8"], "kin is no word here; did you mean kind"),
        (["run={run}", "n=8", "kind=int4", "hardware=cpu"], "kind=int4 is not one of int8, fp8"),
        (["run={run}", "n=8", "kind=fp8", "hardware=cpu"], "needs a Hopper GPU or newer, which is not here; write kind=int8"),
        (["run={run}", "n=9", "hardware=cpu"], "the run holds out 8 images; write n=8"),
        (["run={run}", "n=8", "hardware=h20"], "h200"),
        (["run=nowhere", "n=8", "hardware=cpu"], "no config.yaml there"),
    ],
)
def test_a_loss_in_low_precision_is_refused_before_a_weight_is_read(tmp_path, monkeypatch, typed, said):
    monkeypatch.setattr(quantized, "change_of_run", None)
    monkeypatch.setattr("src.checkpoint.newest", lambda folder: next(folder.iterdir(), None))
    run = a_run(tmp_path, "data.val_images=8", "validation.images=4", "validation.final_images=8")
    with pytest.raises(UserError, match=said) as refused:
        quantized.main([word.format(run=run) for word in typed])
    assert "\n" not in str(refused.value)


def test_a_run_in_eight_bits_has_no_exact_backbone_to_compare_with(tmp_path, monkeypatch):
    monkeypatch.setattr("src.checkpoint.newest", lambda folder: next(folder.iterdir(), None))
    run = a_run(tmp_path, "backbone.quantize=int8")
    with pytest.raises(UserError, match="its backbone is in int8 already"):
        quantized.main([f"run={run}", "n=8", "hardware=cpu"])


@pytest.mark.slow
def test_the_loss_of_a_trained_run_in_int8(tmp_path, cache_dir):
    words = [*QUICK, "adapter=unicon_half", "budget.images=32", f"cache_dir={cache_dir}", f"output_dir={tmp_path}"]
    done = run_entry("train", *words)
    run = run_folder(done)
    done = run_entry("bench.quantized", f"run={run}", "n=8", "hardware=cpu", f"output_dir={tmp_path / 'out'}")
    told = json.loads((run_folder(done) / "quantized.json").read_text())
    low, high = told["change"]["ci95"]
    assert (told["n"], told["quantize"], told["adapter"]) == (8, "int8", "unicon_half")
    assert low < told["change"]["value"] < high
    assert 0 < abs(told["relative"]) < 0.2
    assert told["device"].startswith("cpu: ")
    assert "src.bench.quantized" in told["command"]
    assert told["run"].endswith("checkpoints/images-000000032")
    assert f"| {told['run']} | {told['loss']['value']:.5f} |" in markdown([tmp_path / "out"])
