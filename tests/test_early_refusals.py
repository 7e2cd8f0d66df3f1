"""What the verbs refuse within a second: without waiting for torch."""

import json
import subprocess
import sys

import pytest

from src.bench.known import refuse_known
from src.config import Unsupported, arguments, load
from src.config.known import LIST, list_of_arguments, list_of_classes
from src.config.signatures import INJECTED, asked, fits, hint_name, locate
from src.types import UserError
from tests.conftest import ROOT

LIGHT = """
import json, runpy, sys
module, *words = sys.argv[1:]
sys.argv = [module, *words]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit:
    pass
heavy = ("torch", "pytorch_lightning", "diffusers", "transformers", "torchmetrics", "torchvision", "scipy")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


REFUSED_CELLS = {
    "--help": "hardware",
    "hardware=h20": "hardware",
    "hardwar=cpu": "hardware",
    "mode=mesure": "did you mean measure?",
    "batch=0": "batch=0 is below 1",
    "resolution=72": "use 64 or 80",
    "adapter=controlnet": "use adapter=dit_controlnet",
    "hardware.overlap=true": "no next pass",
    "naive=true floor=true": "write what=training floor=false",
    "adapter=controlnet resolution=72 batch=0": "3 problems",
    "optimizer.lr=1": "did you mean optimizer.algorithm.lr?",
    "+adapter.copi=full mode=estimate": "did you mean adapter.copy?",
}


REFUSED_TRAININGS = {
    "--help": "hardware",
    "adapter=unicorn": "did you mean unicon?",
    "taks=canny": "did you mean task?",
    "budget.images=0": "budget.images=0 is below 1",
    "adapter=controlnet": "use adapter=dit_controlnet",
    "adapter=controlnet resolution=72": "2 problems",
    "optimizer.lrr=3": "known: optimizer.algorithm",
    "optimizer.algorithm.lrr=3": "did you mean optimizer.algorithm.lr?",
    "+callbacks.guard.max=3": "callbacks.guard.max_in_a_row",
    "adapter.copy=ful": "did you mean full?",
    "data.people=true": "+data.people=...",
    "+data.people=3": "should be bool",
    "budget.imags=3 resolution=x": "budget.imags=3",
}


REFUSED_READERS = {
    "src.sample": ("run=absent prompt=x condition=y", "run=absent: no config.yaml there"),
    "src.export": ("run=absent out=x", "run=absent: no config.yaml there"),
    "src.evaluate": ("run=absent", "run=absent: there is no such folder"),
}


@pytest.mark.parametrize(("module", "words", "said"), [
    *(("src.bench", *row) for row in REFUSED_CELLS.items()), *(("src.train", *row) for row in REFUSED_TRAININGS.items()),
    *((module, *row) for module, row in REFUSED_READERS.items()),
])  # fmt: skip
def test_help_and_refusals_import_nothing_heavy(module, words, said):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, module, *words.split()], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [], done.stderr
    assert said in done.stdout + done.stderr


def test_what_is_refused_by_words_alone_is_what_the_classes_refuse():
    """If they differ: python -m src.config.known."""
    assert json.loads(LIST.read_text(encoding="utf-8")) == json.loads(json.dumps(list_of_classes()))


def test_listed_arguments_are_those_of_the_classes():
    """If they differ: python -m src.config.known."""
    rows = json.loads(json.dumps(list_of_arguments()))
    assert json.loads(arguments.LIST.read_text(encoding="utf-8")) == rows
    for target, row in rows.items():
        found, given = arguments.listed(target), asked(locate(target, "x", str))
        assert found["arguments"].keys() == given["arguments"].keys() == row["arguments"].keys()
        for name, (hint, needed) in given["arguments"].items():
            assert found["arguments"][name][1] == needed
            if name in INJECTED["optimizer.algorithm"]:
                continue  # iterables of tensors, which no yaml holds
            assert hint_name(found["arguments"][name][0]) == hint_name(hint), (target, name)
            for value in (None, True, 1, 0.5, "full", [1, 2], [0.5, 0.9], ["x"], {"a": "b"}, "latent"):
                assert fits(value, found["arguments"][name][0]) == fits(value, hint), (target, name, value)


def test_a_class_that_is_not_the_listed_one_is_asked_itself(monkeypatch, tmp_path):
    target = "src.adapters.unicon.UniCon"
    old = json.loads(arguments.LIST.read_text(encoding="utf-8"))
    for name in old[target]["of"]:
        row = {**old[target], "of": {**old[target]["of"], name: "0" * 16}}
        monkeypatch.setattr(arguments, "_rows", lambda row=row: {target: row})
        assert arguments.listed.__wrapped__(target) is None
    assert arguments.listed.__wrapped__("torch.optim.SGD") is None


def refused_early(*words):
    """What `refuse_known` says of a command line; None where it leaves the answer to the classes."""
    cfg, choices = load("bench", words), {"adapter": "unicon", "backbone": "sd3_tiny"}
    choices |= dict(word.split("=") for word in words if word.split("=")[0] in choices)
    try:
        refuse_known(cfg, choices)
    except UserError as error:
        return error
    return None


def test_words_that_leave_the_yaml_are_left_to_the_classes():
    assert isinstance(refused_early("adapter=controlnet"), Unsupported)
    assert refused_early("adapter=controlnet", "adapter.encoder_steps=3") is None
    assert refused_early("adapter=controlnet", "floor=true") is None
    assert refused_early("adapter=controlnet", "backbone.source=elsewhere/model") is None
    both = refused_early("adapter=controlnet", "resolution=72")
    assert len(both.parts) == 2
    assert not isinstance(both, Unsupported)
