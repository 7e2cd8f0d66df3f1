"""Hours, bytes and money of a long training: arithmetic on the estimate of one step."""

import pytest

from src.bench.budget import Budget, budget
from src.types import UserError
from tests.conftest import run_entry

WORDS = ["backbone=sd3_tiny", "adapter=unicon", "hardware=h100_2", "hardware.micro_batch=8", "budget.effective_batch=32"]


def test_hours_are_steps_times_what_a_step_takes():
    made = Budget(4, 64, turns=2, pass_ms=100, optimizer_ms=50, peak_gib=1, pictures=0, texts=0, checkpoint=0)
    assert made.hours(36_000, 1) == pytest.approx(2.5)
    assert made.hours(36_000, 0.5) == pytest.approx(5)


def test_the_budget_of_a_tiny_training():
    """Two devices take 32 images in two turns of 8; a 64-pixel latent has 16 channels of 8 x 8 in float32."""
    made = budget(WORDS, images=1000)
    assert (made.devices, made.per_step, made.turns) == (2, 32, 2)
    assert made.pictures == 1000 * 2 * 4 * 16 * 8 * 8  # the condition is a latent, too
    assert made.checkpoint == pytest.approx(16 * 3.61e6, rel=0.01)
    assert made.pass_ms > 0
    assert made.texts > 0


def test_a_profile_without_rates_is_refused():
    with pytest.raises(UserError, match="has no rates to bound a step with"):
        budget(["backbone=sd3_tiny", "hardware=cpu"], images=1000)


def test_a_missing_word_is_named():
    done = run_entry("bench.budget", "images=3")
    assert done.returncode == 2
    assert done.stderr.startswith("error: steps= is missing")
