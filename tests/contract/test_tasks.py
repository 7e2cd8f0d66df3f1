"""What every registered task promises: of its conditions, and of its scores."""

import hashlib
import json
import subprocess
import sys
from functools import cache

import numpy as np
import pytest

from src.construct import construct
from src.data.cache import store_key
from src.metrics.intervals import bootstrap_ci
from src.support import options
from src.tasks.base import Task
from src.types import Sample
from tests.conftest import ROOT
from tests.contract.registry import node

SIZE, COUNT, SEED = 64, 12, 3
DATA = {"joints": "scenes_people"}  # signal -> scenes in which every sample has what the task is about; the default else


@pytest.fixture(scope="module", params=options("task"))
def task(request):
    return task_of(request.param)


@pytest.fixture
def samples(task):
    return samples_of(DATA.get(task.signal, "scenes"))


@cache
def task_of(name: str) -> Task:
    return construct(node("task", name))


@cache
def samples_of(data: str) -> list[Sample]:
    source = construct(node("data", data), split="val", resolution=SIZE)
    return [source[i] for i in range(COUNT)]


def digests(name: str, backwards: bool) -> dict[str, str]:
    """Sample id -> hash of its condition."""
    task = task_of(name)
    samples = samples_of(DATA.get(task.signal, "scenes"))[:: -1 if backwards else 1]
    return {s.id: hashlib.sha256(task.condition_of(s, SEED).tobytes()).hexdigest() for s in samples}


# ---- conditions -------------------------------------------------------------------------------------------------------


def test_conditions_are_pictures(task, samples):
    made = [task.condition_of(s, SEED) for s in samples]
    for one in made:
        assert one.shape == (SIZE, SIZE, 3)
        assert one.dtype == np.uint8
    assert np.stack(made).std() > 1
    assert len({one.tobytes() for one in made}) == COUNT


@pytest.fixture(scope="module")
def elsewhere():
    """The conditions of every task, made in another process and the other way round."""
    program = "import json; from src.support import options; from tests.contract.test_tasks import digests\n"
    program += "print(json.dumps({n: digests(n, True) for n in reversed(options('task'))}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_conditions_are_a_function_of_seed_and_sample(task, elsewhere):
    here = digests(task.name, backwards=False)
    assert here == digests(task.name, backwards=True)
    assert here == elsewhere[task.name]


def test_only_a_task_that_varies_draws(task, samples):
    one, other = ([task.condition_of(s, seed).tobytes() for s in samples] for seed in (SEED, SEED + 1))
    assert (one != other) == task.varies


def test_a_condition_from_the_data_is_used(task, samples):
    if task.signal is None:
        pytest.skip("no map of the data stands in for this task's detector")
    first, second = samples[:2]
    expected = task.condition_of(second, SEED)
    # scenes know depth and joints; a signal that they lack is a picture, and the task's own condition stands for it
    signals = {task.signal: expected, **second.signals}
    made = task.condition_of(Sample(first.id, first.image, first.caption, signals), SEED)
    assert np.array_equal(made, expected)
    assert not np.array_equal(made, task.condition_of(first, SEED))


def test_a_sample_is_not_changed(task, samples):
    before = [s.image.copy() for s in samples[:2]]
    shown = task.condition_of(samples[0], SEED)
    held = shown.copy()
    task.score(samples[1].image, shown, samples[0].image)
    assert all(np.array_equal(s.image, b) for s, b in zip(samples, before, strict=False))
    assert np.array_equal(shown, held)


def test_settings_are_part_of_the_cache_key(task):
    assert json.loads(json.dumps(task.settings()))
    again = construct(node("task", task.name))
    assert store_key(task=task.settings()) == store_key(task=again.settings())
    assert store_key(task=task.settings()) != store_key(task={**task.settings(), "another": 1})


# ---- scores -----------------------------------------------------------------------------------------------------------


def test_metrics_say_what_they_are(task):
    assert task.metrics
    for name, (unit, better) in task.metrics.items():
        assert name.isidentifier()
        assert unit
        assert better in ("higher", "lower")
    assert task.control_gap > 0
    assert all(isinstance(note, str) and "\n" not in note for note in task.notes)


def test_the_perfect_image_scores_best_and_a_shuffled_one_clearly_worse(task, samples):
    others = samples[1:] + samples[:1]
    noise = np.random.default_rng(0).integers(-12, 13, samples[0].image.shape)
    worse = [np.clip(s.image + noise, 0, 255).astype(np.uint8) for s in samples]
    shown = [task.condition_of(s, SEED) for s in samples]

    def scores(pictures: list[np.ndarray], metric: str) -> np.ndarray:
        judged = zip(pictures, shown, samples, strict=True)
        return np.array([task.score(p, c, s.image)[metric] for p, c, s in judged])

    for rank, (metric, (_, better)) in enumerate(task.metrics.items()):
        sign = 1 if better == "higher" else -1
        own, noisy, shuffled = (
            sign * scores(p, metric) for p in ([s.image for s in samples], worse, [o.image for o in others])
        )
        assert (own >= noisy).all(), metric
        assert (own >= shuffled).all(), metric
        # the first is the one that validation watches, by the gap that it calls control
        assert bootstrap_ci(own - shuffled)[0] > (task.control_gap if rank == 0 else 0), metric


def test_every_metric_is_finite_for_any_picture(task, samples):
    shown = task.condition_of(samples[0], SEED)
    for odd in (np.zeros((SIZE, SIZE, 3), np.uint8), np.full((SIZE, SIZE, 3), 255, np.uint8)):
        found = task.score(odd, shown, samples[0].image)
        assert list(found) == list(task.metrics)
        assert all(isinstance(v, float) and np.isfinite(v) for v in found.values())
