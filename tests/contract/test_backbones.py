"""What every registered backbone promises. Full-size ones are held to it by their class; their weights are not here."""

import pytest
import torch
from hydra.utils import instantiate

from src.backbones.base import Backbone
from src.support import options
from tests.conftest import CPU
from tests.contract.registry import EMBEDDED_BACKBONES, node


@pytest.fixture(scope="module", params=EMBEDDED_BACKBONES)
def backbone(request):
    return instantiate(node("backbone", request.param)).load(CPU, torch.float32)


@pytest.fixture
def state_inputs(backbone):
    gen, facts = torch.Generator().manual_seed(0), backbone.facts
    side = backbone.native_resolution // facts.factor
    text = backbone.encode_text(["a large red ball, gray floor", ""], CPU)
    return torch.randn(2, facts.latent_channels, side, side, generator=gen), torch.tensor([0.2, 0.8]), text


def test_every_option_names_a_backbone_class():
    from hydra.utils import get_class

    for option in options("backbone"):
        assert issubclass(get_class(node("backbone", option)["_target_"]), Backbone), option


def test_facts_describe_the_network(backbone, state_inputs):
    x, t, text = state_inputs
    facts = backbone.facts
    with torch.no_grad():
        state = backbone.begin(x, t, text)
    assert state.x.shape[1 if facts.spatial else -1] == facts.width == facts.widths[0]
    assert len(facts.widths) == facts.depth + 1
    assert text.tokens_BLD.shape[1:] == (facts.text_tokens, facts.text_width)
    assert len(backbone.steps()) == facts.depth
    assert facts.multiple % facts.factor == 0


def test_prediction_has_the_shape_of_the_latent(backbone, state_inputs):
    with torch.no_grad():
        assert backbone.predict(*state_inputs).shape == state_inputs[0].shape


def test_copies_run_like_the_originals(backbone, state_inputs):
    copies = backbone.copy_steps(list(range(backbone.facts.depth)))
    with torch.no_grad():
        state = backbone.begin(*state_inputs)
        for copied in copies:
            state = backbone.run(copied, state)
        assert torch.equal(backbone.end(state, backbone.copy_head()), backbone.predict(*state_inputs))


def test_codec_round_trip_keeps_real_pictures(backbone):
    from src.data.scenes import render, sample_scene
    from src.data.stores import to_unit

    codec = backbone.load_codec(CPU)
    real = to_unit([render(sample_scene(1, i), backbone.native_resolution)["image"] for i in range(8)])
    mse = (codec.decode(codec.encode(real)) - real).square().mean()
    assert float(-10 * mse.log10()) > 28  # dB


def test_objective_recovers_the_clean_latent(backbone, state_inputs):
    x0, t, _ = state_inputs
    noise = torch.randn_like(x0)
    x_t, target = backbone.objective.corrupt(x0, noise, t)
    assert torch.allclose(backbone.objective.to_x0(x_t, target, t), x0, atol=1e-5)
    assert float(backbone.objective.loss(target, target, t).max()) == 0


def test_weight_hash_sees_one_changed_number(backbone):
    before = backbone.weight_hash()
    parameter = next(backbone.net.parameters())
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.view(-1)[0] += 1e-3
    changed = backbone.weight_hash()
    with torch.no_grad():
        parameter.copy_(kept)
    assert changed != before
    assert backbone.weight_hash() == before
