"""Equal sizes: params_match finds a depth or width, or says that there is none; recipes and their noise levels."""

import re

import pytest
import torch
from omegaconf import OmegaConf

from src import build
from src.config import ConfigError, Request, TrainConfig, composed, load
from src.config.recipes import PUBLISHED
from src.construct import construct
from src.matching import TOLERANCE, NoMatch, matched
from src.objectives import EpsilonPrediction, FlowMatching
from src.results.design import design_of, flat
from src.types import UserError
from tests.conftest import CPU, ROOT


def found(adapter, backbone, target):
    """-> (configuration with what was chosen, trainable millions as built on real weights)."""
    cfg = load("train", [f"adapter={adapter}", f"backbone={backbone}", f"adapter.params_match={target}", "hardware=cpu"])
    base = construct(cfg.backbone)
    cfg, line = matched(cfg, base)
    made = build.new_adapter(cfg, base.load(CPU, torch.float32), training=False)
    return cfg, sum(p.numel() for p in made.parameters() if p.requires_grad) / 1e6, line


def wanted_m(line):
    return float(re.search(r": ([0-9.]+) M wanted", line)[1])


@pytest.mark.parametrize(
    ("adapter", "backbone", "target", "size"),
    [
        ("unicon", "sd3_tiny", "dit_controlnet", 1.781),  # by depth
        ("dit_controlnet", "sd3_tiny", "3", 3.0),  # by depth and width
        ("t2i_adapter", "pixart_tiny", "unicon_half", 1.939),  # by width
        ("t2i_adapter", "sd21_tiny", "controlnet", 2.120),
        ("controlnet", "sd21_tiny", "unicon_half", 2.953),
        ("dit_controlnet", "sd3_tiny", "unicon_half", 1.732),  # fits as it is
        ("unicon", "sd21_tiny", "controlnet", 2.120),  # a part of the decoder
        pytest.param("unicon_half", "sd21_tiny", "controlnet", 2.120, marks=pytest.mark.slow),
        pytest.param("controlnet", "sd21_tiny", "unicon", 3.291, marks=pytest.mark.slow),  # wider than its first level allows
        pytest.param("controlnet", "sd21_tiny", "1", 1.0, marks=pytest.mark.slow),  # a part of the encoder
    ],
)
def test_sizes_agree_within_three_percent(adapter, backbone, target, size):
    cfg, millions, line = found(adapter, backbone, target)
    assert abs(millions / wanted_m(line) - 1) <= TOLERANCE
    assert wanted_m(line) == pytest.approx(size, abs=6e-4)
    assert f"{millions:.3f} M with" in line
    assert cfg.adapter.params_match in (target, float(target) if target.isdigit() else target)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "target"),
    [("unicon", "controlnet"), ("unicon_half", "controlnet"), ("controlnet", "unicon_half"), ("controlnet", "unicon")],
)
def test_sizes_of_full_stable_diffusion_agree_or_the_refusal_names_the_direction_that_does(adapter, target):
    """On `meta`. 549 M more are too much for the 13 zero convolutions of ControlNet: UniCon has to come down."""
    words = [f"adapter={adapter}", "backbone=sd21", "backbone.source=random:sd21", f"adapter.params_match={target}"]
    cfg = load("train", [*words, "hardware=cpu"])
    base = construct(cfg.backbone)
    if (adapter, target) == ("controlnet", "unicon"):
        with pytest.raises(NoMatch, match=r"the other way round works: adapter=unicon adapter\.params_match=controlnet$"):
            matched(cfg, base)
        return
    cfg, line = matched(cfg, base)
    assert wanted_m(line) == pytest.approx({"controlnet": 364.228, "unicon_half": 696.900}[target], abs=6e-4)
    with torch.device("meta"):
        made = build.new_adapter(cfg, base.hollow(torch.float32), training=False)
    assert abs(sum(made.trainable_parts_m().values()) / wanted_m(line) - 1) <= TOLERANCE


def test_a_method_that_already_fits_keeps_its_published_shape():
    cfg, _, line = found("dit_controlnet", "sd3_tiny", "unicon_half")
    assert (cfg.adapter.blocks, cfg.adapter.connector_width) == (None, None)
    assert line.endswith("as it is")


def test_without_it_nothing_is_changed():
    cfg = load("train", ["hardware=cpu"])
    assert matched(cfg, construct(cfg.backbone)) == (cfg, None)


@pytest.mark.parametrize(
    ("adapter", "backbone", "target", "message"),
    [
        ("template", "sd3_tiny", "unicon", "no depth or width near 3.6.* nor can unicon be brought to the size of template"),
        pytest.param(
            "controlnet",
            "sd21_tiny",
            "t2i_adapter",
            r"other way round works: adapter=t2i_adapter adapter\.params_match=controlnet$",
            marks=pytest.mark.slow,
        ),
        ("unicon", "sd3_tiny", "controlnet", "on this backbone: .*dit_controlnet"),
        ("unicon", "sd3_tiny", "unicorn", "neither a number of millions nor an adapter"),
    ],
)
def test_what_cannot_be_matched_is_refused(adapter, backbone, target, message):
    with pytest.raises(UserError, match=message):
        found(adapter, backbone, target)


def test_a_list_is_no_size():
    with pytest.raises(ConfigError, match="params_match"):
        load("train", ["adapter.params_match=[1]"])


# ---- recipes ----------------------------------------------------------------------------------------------------------


def test_every_recipe_composes_and_states_its_source():
    for file in sorted((ROOT / "conf" / "recipe").glob("*.yaml")):
        cfg = load("train", [f"recipe={file.stem}", "hardware=cpu"])
        assert cfg.time_law in ("native", "cubic")
        assert file.stem in ("fair", "own") or "arXiv" in file.read_text() or "diffusers examples" in file.read_text(), file


def test_a_recipe_changes_how_and_not_what():
    fair, own = load("train", ["hardware=cpu"]), load("train", ["recipe=t2i_adapter", "hardware=cpu"])
    assert (own.time_law, own.caption_dropout) == ("cubic", 0.0)
    assert own.optimizer.algorithm.lr == 1e-5
    assert fair.optimizer.algorithm.lr != own.optimizer.algorithm.lr
    assert own.adapter == fair.adapter


def recipe_note(*words: str) -> tuple[dict, list[str]]:
    """-> what a command line trains by, and what `recipe=own` says of it."""
    cfg, notes = composed(Request("train", TrainConfig, (*words, "hardware=cpu", "task=deblur")))
    return OmegaConf.to_container(cfg, resolve=True), [note for note in notes if note.startswith("recipe=own: ")]


OWN_RECIPES = {
    ("controlnet", "sd21_tiny"): "controlnet",
    ("dit_controlnet", "sd3_tiny"): "controlnet_sd3",
    ("dit_controlnet", "pixart_alpha"): "pixart_delta",
    ("t2i_adapter", "sd21_tiny"): "t2i_adapter",
    ("t2i_adapter", "pixart_tiny"): "t2i_adapter",
    ("unicon", "sd3_tiny"): "fair",
    ("unicon_half", "sd21_tiny"): "fair",
    ("control_lora", "sd3_tiny"): "fair",
    ("scedit", "sd21_tiny"): "scedit",
    ("template", "pixart_tiny"): "fair",
}


@pytest.mark.parametrize(("cell", "named"), OWN_RECIPES.items(), ids=lambda v: "-".join(v) if isinstance(v, tuple) else v)
def test_own_is_the_recipe_of_the_adapter_and_says_which(cell, named):
    own, (said,) = recipe_note(f"adapter={cell[0]}", f"backbone={cell[1]}", "recipe=own")
    values = flat(OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "recipe" / f"{named}.yaml")))
    values.pop("defaults", None)
    assert {key: flat(own)[key] for key in values} == values
    assert said.endswith(f"recipe={named}")
    assert ("no recipe was published" in said) == (named == "fair")
    assert design_of(own)["recipe"] == named


def test_every_adapter_is_in_the_list_of_recipes():
    assert {adapter for adapter, _ in OWN_RECIPES} == {file.stem for file in (ROOT / "conf" / "adapter").glob("*.yaml")}
    assert {name for of in PUBLISHED.values() for name in of.values()} | {"fair", "own"} == {
        file.stem for file in (ROOT / "conf" / "recipe").glob("*.yaml")
    }


def test_own_follows_an_experiment_and_gives_way_to_the_command_line(tmp_path):
    own, (said,) = recipe_note("+experiment=dit_controlnet_pixart_canny", "recipe=own", "optimizer.algorithm.lr=0.5")
    assert "recipe=pixart_delta" in said
    assert (own["optimizer"]["algorithm"]["lr"], own["optimizer"]["clip_norm"]) == (0.5, 0.01)
    assert design_of(own)["recipe"] == "pixart_delta"  # a rate is a column of its own
    own["caption_dropout"] = 0.25
    assert design_of(own)["recipe"] == "other"
    assert recipe_note("adapter=unicon", "together=[template]", "recipe=own")[1][0].endswith("who trains together with it")
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "mine.yaml").write_text((ROOT / "conf" / "backbone" / "sd3_tiny.yaml").read_text())
    words = ("backbone=mine", "adapter=dit_controlnet", "hardware=cpu", "recipe=own")
    with pytest.raises(ConfigError, match=r"recipe=own knows the backbones of conf/ alone; write recipe=controlnet_sd3"):
        composed(Request("train", TrainConfig, words, extra_dir=str(tmp_path)))


def test_what_own_stands_for_is_checked_as_any_option():
    with pytest.raises(ConfigError, match="recipe=owm is not in conf/recipe; did you mean own"):
        load("train", ["recipe=owm"])
    with pytest.raises(ConfigError, match="adapter=unicorn is not in conf/adapter; did you mean unicon"):
        load("train", ["recipe=own", "adapter=unicorn"])
    with pytest.raises(ConfigError, match="backbone=sd3_tin is not in conf/backbone; did you mean sd3_tiny"):
        load("train", ["recipe=own", "backbone=sd3_tin"])


@pytest.mark.parametrize("objective", [FlowMatching(), EpsilonPrediction()])
def test_the_cubic_law_prefers_high_noise(objective):
    u = (torch.arange(1000) + 0.5) / 1000
    t = objective.with_time_law("cubic").sample_t(u)
    assert torch.allclose(t, (1 - u.double() ** 3).float(), atol=1.1e-3)
    assert float(t.mean()) == pytest.approx(0.75, abs=2e-3)
    assert float(objective.sample_t(u).mean()) == pytest.approx(0.5, abs=2e-3)
    assert objective.time_law == "native"


def test_an_unknown_law_is_refused():
    with pytest.raises(ConfigError, match="time_law=cubick is not one of native, cubic; did you mean cubic"):
        load("train", ["time_law=cubick"])
