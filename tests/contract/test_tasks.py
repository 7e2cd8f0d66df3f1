"""What every registered task promises."""

import numpy as np
import pytest
from hydra.utils import instantiate

from src.data.scenes import SceneSource
from src.support import options
from tests.contract.registry import node

SIZE = 64


@pytest.fixture(params=options("task"))
def task(request):
    return instantiate(node("task", request.param))


@pytest.fixture(scope="module")
def samples():
    source = SceneSource("scenes", 0, 12, 12, "val", SIZE)
    return [source[i] for i in range(12)]


def condition(task, sample):
    return task.make_condition(sample, np.random.default_rng(0))


def test_conditions_are_pictures(task, samples):
    for sample in samples:
        made = condition(task, sample)
        assert made.shape == (SIZE, SIZE, 3)
        assert made.dtype == np.uint8
    assert np.stack([condition(task, s) for s in samples]).std() > 1


def test_conditions_are_a_function_of_sample_and_generator(task, samples):
    assert all(np.array_equal(condition(task, s), condition(task, s)) for s in samples)


def test_a_sample_is_not_changed(task, samples):
    before = samples[0].image.copy()
    task.score(samples[1].image, condition(task, samples[0]), samples[0].image)
    assert np.array_equal(samples[0].image, before)


def test_the_perfect_image_scores_best(task, samples):
    metrics = task.metrics
    for name, (_, better) in metrics.items():
        sign = 1 if better == "higher" else -1
        own = [sign * task.score(s.image, condition(task, s), s.image)[name] for s in samples]
        shuffled = [
            sign * task.score(o.image, condition(task, s), s.image)[name]
            for s, o in zip(samples, samples[1:] + samples[:1], strict=True)
        ]
        assert all(a >= b for a, b in zip(own, shuffled, strict=True)), name
        assert np.mean(own) - np.mean(shuffled) > 0.2, name


def test_every_metric_is_finite_for_any_picture(task, samples):
    made = condition(task, samples[0])
    for odd in (np.zeros((SIZE, SIZE, 3), np.uint8), np.full((SIZE, SIZE, 3), 255, np.uint8)):
        assert all(np.isfinite(v) for v in task.score(odd, made, samples[0].image).values())
        assert set(task.score(odd, made, samples[0].image)) == set(task.metrics)


def test_settings_are_part_of_the_cache_key(task):
    from src.data.cache import store_key

    assert store_key(task=task.settings()) != store_key(task={**task.settings(), "another": 1})
