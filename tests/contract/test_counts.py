"""Sizes that committed results and the notebook state are those of adapters built today."""

import json
import re
from functools import cache

import pytest
import torch
from omegaconf import OmegaConf

from src import build
from src.config import CONF, load
from src.construct import construct
from tests.conftest import ROOT

NAMES = {"UniCon": "unicon", "UniCon-Half": "unicon_half", "ControlNet": "controlnet", "DiT-ControlNet": "dit_controlnet"}
NAMES |= {"T2I-Adapter": "t2i_adapter", "Control LoRA": "control_lora", "SCEdit": "scedit"}
RESULTS = {f.parent.name: json.loads(f.read_text()) for f in sorted((ROOT / "experiments").glob("*/results.json"))}
TRAINED = {name: row for name, row in RESULTS.items() if row.get("kind", "train") == "train"}


@cache
def hollow(base):
    return construct(load("train", [f"backbone={base}"]).backbone).hollow(torch.float32)


@cache
def parts_m(name, base, options):
    """Part -> millions that train, on `meta`. options: what an experiment sets of its adapter, as JSON."""
    words = [f"adapter.{k}={v}" for k, v in json.loads(options).items()]
    cfg = load("train", [f"adapter={name}", f"backbone={base}", "hardware=cpu", *words])
    with torch.device("meta"):
        return build.new_adapter(cfg, hollow(base), training=False).trainable_parts_m()


@pytest.mark.parametrize("experiment", TRAINED)
def test_a_committed_result_states_the_size_that_its_adapter_has(experiment):
    row, given = TRAINED[experiment], OmegaConf.load(f"{CONF}/experiment/{experiment}.yaml")
    chosen = {k.split("/")[1]: v for item in given.defaults for k, v in item.items()}
    found = parts_m(row["adapter"], chosen["backbone"], json.dumps(dict(given.get("adapter", {}))))
    assert found == pytest.approx(row["trainable_parts_m"])
    assert sum(found.values()) == pytest.approx(row["trainable_m"])
    frozen = sum(p.numel() for p in hollow(chosen["backbone"]).net.parameters()) / 1e6
    assert frozen == pytest.approx(row["frozen_m"])


def test_the_notebook_states_the_sizes_of_the_results():
    """The column "trained" of its tables, by the experiments that the section names."""
    seen = 0
    for section in (ROOT / "experiments" / "README.md").read_text().split("\n## ")[1:]:
        bases = re.findall(r"experiment=\w+?_(sd3|sd21|pixart)_canny", section)
        stated = re.findall(r"^\| ([\w -]+?)(?: \(.*\))? \| ([\d.]+) M \|", section, re.MULTILINE)
        method = None
        for name, millions in stated:
            method = method if name == "the same" else NAMES[name]
            assert f"{TRAINED[f'{method}_{bases[0]}_canny']['trainable_m']:.2f}" == millions, (name, bases[0])
            seen += 1
    assert seen >= 12
