"""What a training takes, what is done when it is too much, and that every way out is a real estimate."""

from typing import ClassVar

import pytest

from src import build, fit
from src.config import config_sha, load
from src.construct import construct
from src.profiling.optimizer import ADAMW_8BIT
from src.types import UserError

MIB = 2**-10


@pytest.fixture(scope="module")
def backbone():
    return construct(load("train", ["hardware=cpu"]).backbone)  # its network is never read


def configured(*overrides):
    return load("train", ["hardware=cpu", "adapter=unicon", *overrides])


class Asked:
    """Real estimates, counted; one that was made before is remembered."""

    known: ClassVar[dict] = {}

    def __init__(self, backbone):
        self.backbone, self.seen = backbone, []

    @property
    def count(self):
        return len(self.seen)

    def __call__(self, cfg):
        hardware = (cfg.hardware[k] for k in ("micro_batch", "checkpointing", "precision"))
        key = (cfg.adapter.name, cfg.resolution, cfg.optimizer.algorithm["_target_"], *hardware)
        self.seen.append(key)
        if key not in self.known:
            self.known[key] = fit.training_estimate(cfg, self.backbone)
        return self.known[key]


@pytest.fixture(scope="module")
def sizes(backbone):
    """GiB of the tiny training: as it is, with one image at once, and what it keeps in any case."""
    full, single = Asked(backbone)(configured()), Asked(backbone)(configured("hardware.micro_batch=1"))
    return full.peak_gib, single.peak_gib, fit.never_below(full)


def test_what_fits_or_has_no_limit_is_estimated_once_and_left_alone(backbone, sizes, capsys):
    for limit in ("null", sizes[0] + MIB):
        asked, cfg = Asked(backbone), configured(f"hardware.memory_gib={limit}")
        assert fit.fit(cfg, backbone, asked) is cfg
        assert asked.count == 1
        assert capsys.readouterr().out.startswith("estimated peak ")


def test_auto_takes_the_largest_micro_batch_that_fits_and_keeps_the_science(backbone, sizes, capsys):
    limit = (sizes[0] + sizes[1]) / 2
    cfg = configured(f"hardware.memory_gib={limit}", "hardware.fit=auto")
    made = fit.fit(cfg, backbone, Asked(backbone))
    assert 1 < made.hardware.micro_batch < cfg.hardware.micro_batch
    assert cfg.budget.effective_batch % made.hardware.micro_batch == 0
    assert config_sha(made) == config_sha(cfg)
    assert made.hardware.checkpointing == "none"
    assert Asked(backbone)(made).peak_gib <= limit
    twice = fit.changed(made, {"hardware.micro_batch": 2 * made.hardware.micro_batch})
    assert Asked(backbone)(twice).peak_gib > limit
    assert f"hardware.fit=auto takes hardware.micro_batch={made.hardware.micro_batch}" in capsys.readouterr().out


def test_auto_recomputes_blocks_where_there_is_nothing_left_to_split(backbone, capsys):
    cfg = configured("hardware.fit=auto", "hardware.micro_batch=1", "resolution=256", "adapter=dit_controlnet")
    plain, both = (Asked(backbone)(fit.changed(cfg, {"hardware.checkpointing": scope})).peak_gib for scope in ("none", "both"))
    assert both < plain
    cfg = fit.changed(cfg, {"hardware.memory_gib": (plain + both) / 2})
    made = fit.fit(cfg, backbone, Asked(backbone))
    assert made.hardware.checkpointing in ("adapter", "both")
    assert Asked(backbone)(made).peak_gib <= cfg.hardware.memory_gib
    assert "auto takes hardware.checkpointing=" in capsys.readouterr().out


def test_a_refusal_says_by_how_much_and_what_would_fit_each_with_its_estimate(backbone, sizes):
    limit = (sizes[0] + sizes[1]) / 2
    cfg = configured(f"hardware.memory_gib={limit}")
    with pytest.raises(UserError) as refused:
        fit.fit(cfg, backbone, Asked(backbone))
    line = str(refused.value)
    assert "\n" not in line
    assert f"training should take {sizes[0]:.1f} GiB, {sizes[0] - limit:.1f} more than hardware=cpu has" in line
    assert "hardware.micro_batch=" in line
    assert "hardware.checkpointing=" in line
    assert line.index("hardware.micro_batch=") < line.index("another result")  # what changes no result comes first


def test_each_way_that_fits_is_named_and_none_is_estimated_twice(backbone):
    cfg = configured("hardware=gpu_24g", "hardware.precision=32-true", "hardware.micro_batch=16", "adapter=unicon")
    full = Asked(backbone)(cfg)
    # nothing but a little more than what the smaller optimizer saves: every other way saves more
    saved = full.optimizer_gib * (1 - ADAMW_8BIT.state_bytes / 8)
    asked = Asked(backbone)
    with pytest.raises(UserError) as refused:
        fit.fit(fit.changed(cfg, {"hardware.memory_gib": full.peak_gib - saved / 2}), backbone, asked)
    line = str(refused.value)
    for way in (
        "hardware.micro_batch=",
        "hardware.checkpointing=adapter",
        "optimizer=adamw8bit",
        "adapter=unicon_half",
        "resolution=",
    ):
        assert f"{way}" in line, way
    assert line.count(" GiB") == 1 + 5  # the fault, and an estimate for each
    assert "micro_batch=1 hardware.checkpointing=both" not in line
    # itself, one image, the largest batch that fits, adapter, 8 bits, half, resolution
    assert asked.count == 7


def test_auto_goes_on_from_what_it_has_tried(backbone, sizes):
    asked = Asked(backbone)
    cfg = configured(f"hardware.memory_gib={sizes[2]}", "hardware.fit=auto")
    with pytest.raises(UserError, match="more than hardware=cpu has"):
        fit.fit(cfg, backbone, asked)
    assert len(asked.seen) == len(set(asked.seen))


def test_where_weights_alone_are_too_much_no_neutral_way_is_tried_and_the_nearest_is_named(backbone, sizes):
    cfg, asked = configured(f"hardware.memory_gib={sizes[2] / 4}"), Asked(backbone)
    assert list(fit.neutral_ways(cfg, asked(cfg), asked)) == []
    assert asked.count == 1
    for mode in ("refuse", "auto"):
        with pytest.raises(UserError, match=r"nothing tried fits, the nearest is .*adapter=unicon_half.* another result"):
            fit.fit(fit.changed(cfg, {"hardware.fit": mode}), backbone, asked)


def test_a_warning_goes_on_with_the_same_configuration(backbone, sizes, capsys):
    cfg = configured(f"hardware.memory_gib={(sizes[0] + sizes[1]) / 2}", "hardware.fit=warn")
    assert fit.fit(cfg, backbone, Asked(backbone)) is cfg
    assert "note: training should take" in capsys.readouterr().out


def test_the_floor_is_never_above_the_smallest_training(backbone, sizes):
    smallest = Asked(backbone)(configured("hardware.micro_batch=1", "hardware.checkpointing=both"))
    assert sizes[2] <= smallest.peak_gib


def test_another_optimizer_is_suggested_where_there_is_a_gpu_and_its_package_is_not_needed_to_say_so(backbone):
    cfg = configured("hardware=gpu_24g", "hardware.precision=32-true")
    ways = list(fit.other_ways(cfg, backbone, Asked(backbone)))
    assert [w.typed for w in ways][:2] == ["optimizer=adamw8bit", "adapter=unicon_half"]
    assert not any(w.neutral for w in ways)
    own = Asked(backbone)(cfg)
    assert ways[0].estimate.optimizer_gib == pytest.approx(own.optimizer_gib * ADAMW_8BIT.state_bytes / 8)
    assert ways[1].estimate.trainable_weights_gib < own.trainable_weights_gib
    assert any(w.typed.startswith("resolution=32") for w in ways)
    assert build.total_images(ways[0].cfg) == build.total_images(cfg)
