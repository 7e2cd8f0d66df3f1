"""`python -m src.bench.speed`: switches against the plain training, and the tables made of what is measured."""

import json

import pytest
import torch

from src.bench import speed
from src.bench.speed import PLAIN, SWITCHES, Setting, Switch, measured, pairs, split_words, write
from src.config import load
from src.construct import construct
from src.types import UserError

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
    told = json.loads((write(cfg, found) / "speed.json").read_text())
    assert told["switches"].keys() == found.keys()
    assert told["device"].startswith("cpu: ")
    assert {"tf32_matmul", "tf32_conv", "cudnn_benchmark", "attention_enabled", "threads"} <= told["flags"].keys()
    assert {"date", "git_sha", "command", "versions"} <= told.keys()
    assert list(tmp_path.glob("speed_unicon_half_sd3_tiny/*/speed.json"))


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
