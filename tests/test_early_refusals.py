"""What `python -m src.bench` and `python -m src.train` refuse within a second: without waiting for torch."""

import json
import subprocess
import sys

import pytest

from src.bench.known import refuse_known
from src.config import Unsupported, load
from src.config.known import LIST, list_of_classes
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
}


REFUSED_TRAININGS = {
    "--help": "hardware",
    "adapter=unicorn": "did you mean unicon?",
    "taks=canny": "did you mean task?",
    "budget.images=0": "budget.images=0 is below 1",
    "adapter=controlnet": "use adapter=dit_controlnet",
    "adapter=controlnet resolution=72": "2 problems",
}


@pytest.mark.parametrize(("module", "words", "said"), [
    *(("src.bench", *row) for row in REFUSED_CELLS.items()), *(("src.train", *row) for row in REFUSED_TRAININGS.items()),
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
