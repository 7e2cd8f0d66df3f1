"""What `python -m src.bench` refuses within a second, and that it does so without waiting for torch."""

import json
import subprocess
import sys

import pytest

from src.bench.known import LIST, list_of_classes, refuse_known
from src.config import Unsupported, load
from src.types import UserError
from tests.conftest import ROOT

LIGHT = """
import json, runpy, sys
sys.argv = ["bench", *sys.argv[1:]]
try:
    runpy.run_module("src.bench", run_name="__main__", alter_sys=True)
except SystemExit:
    pass
heavy = ("torch", "pytorch_lightning", "diffusers", "transformers", "torchmetrics", "torchvision", "scipy")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


REFUSED = {
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
}


@pytest.mark.parametrize("words", REFUSED)
def test_help_and_refusals_import_nothing_heavy(words):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *words.split()], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [], done.stderr
    assert REFUSED[words] in done.stdout + done.stderr


def test_what_is_refused_by_words_alone_is_what_the_classes_refuse():
    """If they differ: python -m src.bench.known."""
    assert json.loads(LIST.read_text(encoding="utf-8")) == json.loads(json.dumps(list_of_classes()))


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
