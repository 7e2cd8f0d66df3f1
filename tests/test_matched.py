"""Budgets of equal compute: sums by hand, and real estimates of tiny backbones."""

import pytest

from src.bench import matched
from src.bench.estimate import estimate
from src.bench.matched import flops_per_image, images_for, main, split_words
from src.bench.plan import plan
from src.config import load
from src.types import UserError


def test_images_are_whole_steps_of_equal_flops():
    assert images_for({"a": 300.0, "b": 100.0, "c": 450.0}, 640, 32) == {"a": 640, "b": 1920, "c": 416}  # of 426.7
    with pytest.raises(UserError, match="b makes not one step of 32"):
        images_for({"a": 1.0, "b": 100.0}, 640, 32)


@pytest.mark.parametrize(
    ("backbone", "adapter"), [pytest.param("sd3_tiny", "unicon_half", marks=pytest.mark.slow), ("sd21_tiny", "controlnet")]
)
def test_an_image_costs_its_share_of_a_whole_step(backbone, adapter):
    """A step of 4 images at once has 4 images' passes and one optimizer."""
    words = [f"adapter={adapter}", f"backbone={backbone}", "hardware=h200", "batch=4"]
    flops = estimate(plan(load("bench", words), lambda line: None))["flops"]
    step = sum(flops[part] for part in ("frozen_forward", "adapter_forward", "backward", "optimizer"))
    given = [f"backbone={backbone}", "hardware.checkpointing=both", "optimizer.decay=constant", "task=depth"]
    assert 4 * flops_per_image([f"adapter={adapter}"], given, 4) == pytest.approx(step, rel=1e-9)


def test_the_commands_compose_and_their_totals_agree(capsys, monkeypatch):
    flops = {"unicon_half": 3e9, "dit_controlnet": 2.2e9}
    monkeypatch.setattr(matched, "flops_per_image", lambda adapter, words, step: flops[adapter[0].partition("=")[2]])
    words = ["backbone=sd3_tiny", "hardware=cpu", "budget.effective_batch=8"]
    main(["unicon_half,dit_controlnet blocks=1", "images=4000", *words])
    printed = capsys.readouterr().out.splitlines()
    commands = [line.split()[3:] for line in printed if not line.startswith("#")]
    trained = [load("train", command) for command in commands]
    assert [cfg.adapter.name for cfg in trained] == ["unicon_half", "dit_controlnet"]
    assert trained[0].budget.images == 4000
    assert trained[1].adapter.blocks == 1
    assert trained[1].budget.images % 8 == 0
    totals = [cfg.budget.images * each for cfg, each in zip(trained, flops.values(), strict=True)]
    assert abs(totals[1] - totals[0]) <= 4 * flops["dit_controlnet"]  # half a step
    assert trained[1].budget.images == 5456  # of 5454.5


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["backbone=sd3_tiny"], "name the methods first"),
        (["unicon", "images=10"], "nothing to be matched with"),
        (["unicon,unicon_half"], "images= is missing"),
        (["unicon,unicon_half", "images=10", "adapter=unicon"], "methods come first"),
    ],
)
def test_refusals(typed, said):
    with pytest.raises(UserError, match=said):
        split_words(typed)
