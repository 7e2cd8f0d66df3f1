"""Keyed randomness, and the objectives: flow matching and diffusion, the latter against diffusers' own scheduler."""

import numpy as np
import pytest
import torch

from src import rng
from src.objectives import EpsilonPrediction, FlowMatching, VPrediction, diffusion_of
from src.types import UserError


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


# ---- diffusion --------------------------------------------------------------------------------------------------------

BETAS = {
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
}
EVERY_STEP = torch.arange(1000)


@pytest.fixture(params=[(b, p) for b in BETAS for p in ("epsilon", "v_prediction")], ids="-".join)
def pair(request):
    """An objective, and diffusers' scheduler of the same configuration."""
    from diffusers import DDPMScheduler

    schedule, prediction = request.param
    stock = DDPMScheduler(**BETAS[schedule], prediction_type=prediction)
    return diffusion_of(dict(stock.config)), stock


def drawn(seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(1000, 2, 3, 3, generator=gen), torch.randn(1000, 2, 3, 3, generator=gen)


def t_of(steps):
    return (steps + 1) / 1000


def test_noise_levels_and_targets_are_those_of_diffusers(pair):
    objective, stock = pair
    x0, noise = drawn()
    x_t, target = objective.corrupt(x0, noise, t_of(EVERY_STEP))
    assert torch.allclose(objective.signal_T.float(), stock.alphas_cumprod, rtol=1e-4, atol=0)
    assert torch.allclose(x_t, stock.add_noise(x0, noise, EVERY_STEP), atol=1e-5)
    wanted = noise if stock.config.prediction_type == "epsilon" else stock.get_velocity(x0, noise, EVERY_STEP)
    assert torch.allclose(target, wanted, atol=1e-5)
    assert type(objective) is (EpsilonPrediction if stock.config.prediction_type == "epsilon" else VPrediction)


def test_a_prediction_gives_the_clean_latent_back(pair):
    objective, _ = pair
    x0, noise = (x.double() for x in drawn(1))
    x_t, target = objective.corrupt(x0, noise, t_of(EVERY_STEP))
    assert torch.allclose(objective.to_x0(x_t, target, t_of(EVERY_STEP)), x0, atol=1e-9)
    assert float(objective.loss(target, target, t_of(EVERY_STEP)).max()) == 0


def test_model_time_is_the_step_and_back(pair):
    objective, _ = pair
    t = torch.tensor([objective.from_model_time(float(k)) for k in range(1000)])  # float32, as a solver hands them on
    assert torch.equal(objective.to_model_time(t), EVERY_STEP)
    assert objective.to_model_time(t).dtype == torch.int64
    assert objective.to_model_time(torch.tensor([0.0, 1.0])).tolist() == [0, 999]


def test_every_step_is_drawn_equally_often(pair):
    objective, _ = pair
    drawn_at = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    assert torch.equal(objective.steps(objective.sample_t(drawn_at)).bincount(), torch.full((1000,), 5))
    ends = objective.sample_t(torch.tensor([0.0, 1 - 2**-24]))
    assert objective.steps(ends).tolist() == [0, 999]


@pytest.mark.parametrize("kind", [EpsilonPrediction, VPrediction])
def test_min_snr_weights(kind):
    """min(snr, 5) / snr for noise, / (snr + 1) for v (2303.09556, section 3.4): the same weight of the clean latent's error."""
    t, bare, weighed = t_of(EVERY_STEP), kind(), kind(min_snr_gamma=5.0)
    snr = bare.signal_T / (1 - bare.signal_T)
    assert float(snr[0]) > 5 > float(snr[-1])
    wanted = snr.clamp(max=5) / (snr if kind is EpsilonPrediction else snr + 1)
    assert torch.allclose(weighed.weight(t).double(), wanted)
    assert torch.equal(bare.weight(t), torch.ones(1000))
    target = torch.zeros(1000, 1, 2, 2)
    assert torch.allclose(weighed.loss(target + 2, target, t).double(), 4 * wanted)


@pytest.mark.parametrize("objective", [FlowMatching(), EpsilonPrediction()], ids=["flow", "diffusion"])
def test_cubic_times_favour_noise(objective):
    cubic = objective.with_time_law("cubic")
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    t = cubic.sample_t(u)
    assert abs(float(t.mean()) - 0.75) < 2e-3  # the mean of 1 - u^3
    assert float(t.min()) > 0
    assert float(t.max()) <= 1
    assert objective.time_law == "native"
    assert not torch.equal(objective.sample_t(u), t)
    with pytest.raises(ValueError, match="time_law='square' is not one of"):
        objective.with_time_law("square")


def test_a_configuration_that_says_nothing_is_diffusers_default():
    from diffusers import DDPMScheduler

    assert torch.allclose(diffusion_of({}).signal_T.float(), DDPMScheduler().alphas_cumprod, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"prediction_type": "sample"}, "prediction_type='sample'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas=True"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule='squaredcos_cap_v2'"),
    ],
)
def test_unknown_schedulers_are_refused(config, said):
    with pytest.raises(UserError, match=said) as caught:
        diffusion_of(BETAS["linear"] | config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [EpsilonPrediction, VPrediction])
def test_the_flow_law_draws_and_weighs_as_a_flow_does(kind):
    made = kind("linear", 1e-4, 0.02, native_law="flow")
    u = (torch.arange(999, dtype=torch.float64) + 0.5) / 999
    t = made.sample_t(u)
    ratio = made.snr(t).rsqrt()  # noise over signal
    time = FlowMatching().sample_t(u).double()
    inside = (ratio > 0.02) & (ratio < 50)  # the schedule's first and last steps stand for all beyond them
    assert inside.float().mean() > 0.99
    assert torch.allclose(ratio[inside] / (1 + ratio[inside]), time[inside], atol=0.01)
    # one wrong prediction, as an error of the flow's velocity noise - x0
    x0, noise, wrong = torch.randn(3, 999, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t, target = made.corrupt(x0, noise, t)
    said = made.to_x0(x_t, target + 1e-3 * wrong, t)
    a, s = made.scales(t, x0)
    velocity_error = ((x_t - a * said) / s - noise) - (said - x0)
    found = made.loss(target + 1e-3 * wrong, target, t).double()
    expected = velocity_error.square().flatten(1).mean(1)
    free = made.weight(t) < 25
    assert torch.allclose(found[free], expected[free], rtol=2e-3)  # the loss is in float32
    assert (found <= expected * (1 + 2e-3)).all()


def test_the_flow_law_has_its_own_weights():
    with pytest.raises(ValueError, match="leave min_snr_gamma=None"):
        VPrediction(native_law="flow", min_snr_gamma=5.0)
