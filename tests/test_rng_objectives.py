"""Keyed randomness and the flow-matching objective."""

import numpy as np
import pytest
import torch

from src import rng
from src.objectives import FlowMatching


def test_draws_are_keyed_by_seed_stream_and_index_alone():
    a = rng.normal(0, "noise", [3, 7, 5], (4,))
    assert torch.equal(a[1], rng.normal(0, "noise", [7], (4,))[0])
    assert not torch.equal(a[1], rng.normal(1, "noise", [7], (4,))[0])
    assert not torch.equal(a[1], rng.normal(0, "other", [7], (4,))[0])
    assert torch.equal(rng.uniform(0, "t", [9, 2])[1:], rng.uniform(0, "t", [2]))


def test_neighbouring_indices_share_nothing():
    x = rng.normal(0, "noise", list(range(400)), (64,))
    correlation = np.corrcoef(x.numpy())
    off = correlation[~np.eye(400, dtype=bool)]
    assert abs(off.mean()) < 0.01
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02


def test_uniform_is_uniform_and_a_permutation_permutes():
    u = rng.uniform(0, "t", list(range(4000)))
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 0.02
    assert sorted(rng.permutation(0, "order", 3, 50)) == list(range(50))


@pytest.mark.parametrize("mean", [0.0, 0.7])
def test_logit_normal_times(mean):
    t = FlowMatching(logit_mean=mean).sample_t(rng.uniform(0, "t", list(range(20000))))
    logit = torch.logit(t.double())
    assert abs(float(logit.mean()) - mean) < 0.03
    assert abs(float(logit.std()) - 1) < 0.03
    assert 0 < float(t.min()) < float(t.max()) < 1


def test_extreme_draws_stay_inside():
    t = FlowMatching().sample_t(torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64))
    assert torch.isfinite(t).all()
    assert 0 < float(t[0]) < float(t[1]) < 1


def test_corruption_is_a_straight_line():
    objective, x0, noise = FlowMatching(), torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    for t in (0.0, 0.25, 1.0):
        x_t, target = objective.corrupt(x0, noise, torch.full((3,), t))
        assert torch.allclose(x_t, (1 - t) * x0 + t * noise)
        assert torch.allclose(target, noise - x0)
    assert float(objective.to_model_time(torch.tensor(0.5))) == 500
