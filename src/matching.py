"""Equal sizes for a fair comparison: the depth or width at which a method trains as many parameters as another one.

`adapter.params_match=unicon_half` or `adapter.params_match=400` (millions). Sizes are counted on twins without data, never
computed from formulas. The published shape is kept if it already fits; then another depth; then another width at the
nearest depth.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from src import build
from src.backbones.base import Backbone
from src.config import CONF, load
from src.support import NOT_OPTIONS, check_cell, options
from src.types import UserError

TOLERANCE = 0.03  # share of the target
WIDEST = 16  # times the backbone's width, or where that is too little its widest level's


class NoMatch(UserError):
    """No depth and width of a method comes near a size."""


def matched(cfg: DictConfig, backbone: Backbone) -> tuple[DictConfig, str | None]:
    """-> the configuration with depth and width chosen, and one line on what was chosen (None: nothing asked).

    Raises NoMatch if no depth and width of this method comes within 3 % of the target, with the direction that does work.
    """
    if cfg.adapter.get("params_match") is None:
        return cfg, None
    with torch.device("meta"):
        hollow = backbone.hollow(torch.float32)
    target = _target(cfg, hollow)

    try:
        changes = _search(cfg, hollow, target)
    except NoMatch as exc:
        raise NoMatch(f"{exc}{_other_way(cfg, hollow)}") from None
    cfg = _changed(cfg, changes)
    size, wanted = _trainable_m(cfg, hollow), cfg.adapter.params_match
    chosen = ", ".join(f"adapter.{k}={'null' if v is None else v}" for k, v in changes.items()) or "as it is"
    return cfg, f"adapter.params_match={wanted}: {target:.3f} M wanted, {size:.3f} M with {chosen}"


def _other_way(cfg: DictConfig, hollow: Backbone) -> str:
    """Whether the other adapter can be brought to the size of this one, tried: the end of a refusal."""
    wanted = cfg.adapter.params_match
    if not isinstance(wanted, str):
        return ""
    other = _with_adapter(cfg, wanted)
    try:
        _search(other, hollow, _trainable_m(_with_adapter(cfg, cfg.adapter.name), hollow))
    except NoMatch:
        return f"; nor can {wanted} be brought to the size of {cfg.adapter.name}: compare them as they are, with their sizes"
    return f"; the other way round works: adapter={wanted} adapter.params_match={cfg.adapter.name}"


def _with_adapter(cfg: DictConfig, name: str) -> DictConfig:
    """The configuration with another adapter, as its yaml has it."""
    other = cfg.copy()
    other.adapter = load("train", [f"adapter={name}"], Path(CONF)).adapter
    return other


def _target(cfg: DictConfig, hollow: Backbone) -> float:
    wanted = cfg.adapter.params_match
    if not isinstance(wanted, str):
        return float(wanted)
    if wanted not in options("adapter"):
        raise UserError(
            f"adapter.params_match={wanted!r} is neither a number of millions nor an adapter: {', '.join(options('adapter'))}"
        )
    other = _with_adapter(cfg, wanted)
    check_cell(other, hollow)
    return _trainable_m(other, hollow)


def _search(cfg: DictConfig, hollow: Backbone, target: float) -> dict:
    """The changes that bring the size near enough; the fewer the better. Raises NoMatch."""
    sizes: dict[str, float] = {}

    def count(changes: dict) -> float:
        if str(changes) not in sizes:
            sizes[str(changes)] = _trainable_m(_changed(cfg, changes), hollow)
        return sizes[str(changes)]

    method, facts = get_class(cfg.adapter._target_), hollow.facts
    given = {k: v for k, v in cfg.adapter.items() if k not in NOT_OPTIONS}

    def near(changes: dict) -> bool:
        return abs(count(changes) / target - 1) <= TOLERANCE

    if near({}):
        return {}
    depths = method.depths(facts, **given)
    if depths:
        place = _solve(0, len(depths) - 1, lambda i: count(depths[i]), target)
        depths = [depths[i] for i in (place, place - 1, place + 1) if 0 <= i < len(depths)]
        depths.sort(key=lambda d: abs(count(d) - target))
    for depth in depths:
        if near(depth):
            return depth
    found = []
    for depth in depths[:2] or [{}]:
        if method.widened(facts, 1, **given) is None:
            break

        def wide(width: int, depth: dict = depth) -> dict:
            return depth | method.widened(facts, width, **given)

        most = WIDEST * facts.width
        if max(facts.widths) > facts.width and count(wide(most)) < target:
            most = WIDEST * max(facts.widths)
        width = _solve(1, most, lambda w, wide=wide: count(wide(w)), target)
        if near(wide(width)):
            # two layers of half the width weigh as a square one; a bottleneck of one is further from it than a wide layer
            found.append((abs(math.log(2 * width / facts.width)), wide(width)))
    if not found:
        raise NoMatch(
            f"adapter.params_match={cfg.adapter.params_match}: adapter={cfg.adapter.name} on backbone={cfg.backbone.name} has "
            f"{count({}):.3f} M and no depth or width near {target:.3f} M"
        )
    return min(found, key=lambda pair: pair[0])[1]


def _solve(low: int, high: int, size: Callable[[int], float], target: float) -> int:
    """The number in low..high whose size, a rising function, is nearest to the target: by the rule of false position, for
    sizes are nearly linear in depth and width."""
    below, above = size(low), size(high)
    while high - low > 1 and below < target < above:
        guess = low + round((high - low) * (target - below) / (above - below))
        guess = min(max(guess, low + 1), high - 1)
        found = size(guess)
        if abs(found / target - 1) < TOLERANCE / 3:
            return guess
        low, below, high, above = (guess, found, high, above) if found < target else (low, below, guess, found)
    return low if abs(below - target) <= abs(above - target) else high


def _changed(cfg: DictConfig, changes: dict) -> DictConfig:
    cfg = cfg.copy()
    for key, value in changes.items():
        OmegaConf.update(cfg, f"adapter.{key}", value)
    return cfg


def _trainable_m(cfg: DictConfig, hollow: Backbone) -> float:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return sum(build.new_adapter(cfg, hollow, training=False).trainable_parts_m().values())
