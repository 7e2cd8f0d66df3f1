"""Does a training fit the memory of its device, and if not, what would make it fit. Told before any weight is read.

Every way out is one more estimate (about five seconds for a full-size model), made when it is its turn and never twice. Ways
that leave the result as it is come first and are all that `hardware.fit=auto` takes by itself; the others are only ever
suggested. Each single way that would do is named; several at once are tried where no single one does.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from src import build
from src.backbones.base import Backbone
from src.config import accumulation, load
from src.profiling.memory import MemoryEstimate, describe, estimate_for
from src.profiling.optimizer import ADAMW, model_of
from src.types import UserError

ADAM8BIT = "bitsandbytes.optim.AdamW8bit"
Estimate = Callable[[DictConfig], MemoryEstimate]
_made: dict[str, MemoryEstimate] = {}  # see `training_estimate`


@dataclass(frozen=True)
class WayOut:
    """Another configuration, and what it would take. typed: what to write on the command line; neutral: whether results
    stay as they are."""

    typed: str
    cfg: DictConfig
    estimate: MemoryEstimate
    neutral: bool

    def fits(self, memory_gib: float) -> bool:
        """Whether the estimate is within the memory."""
        return self.estimate.peak_gib <= memory_gib

    def __str__(self) -> str:
        return f"{self.typed} ({self.estimate.peak_gib:.1f} GiB{'' if self.neutral else ', another result'})"


def training_estimate(cfg: DictConfig, backbone: Backbone) -> MemoryEstimate:
    """Peak memory of a training step of a resolved configuration. backbone: only its facts and configuration are read.

    Made once for each: whoever looks for room on the disk asks for the same weights, and so do runs of one process."""
    asked = {
        "batch": cfg.hardware.micro_batch,
        "resolution": cfg.resolution,
        "precision": cfg.hardware.precision,
        "ema": cfg.ema_decay > 0,
        "accumulates": accumulation(cfg) > 1,
    }
    built = {"adapter": cfg.adapter, "checkpointing": cfg.hardware.checkpointing, "optimizer": cfg.optimizer.algorithm}
    key = f"{asked} {OmegaConf.to_yaml(OmegaConf.create(built), resolve=True)} {backbone.shape_key()}"
    if key not in _made:
        optimizer = model_of(cfg.optimizer.algorithm) or ADAMW  # of an optimizer unknown here, AdamW's is the safe guess
        _made[key] = estimate_for(
            backbone, lambda hollow: build.new_adapter(cfg, hollow, training=False), optimizer=optimizer, **asked
        )
    return _made[key]


def fit(cfg: DictConfig, backbone: Backbone, estimate: Estimate) -> DictConfig:
    """Say what a training should take. -> the configuration to train with: the same, or with `hardware.fit=auto` one that fits.

    estimate: of any configuration on this backbone, see `training_estimate`. `hardware.memory_gib=null` is never too little.
    Raises UserError with `hardware.fit=refuse` where the memory should not do, and with auto where nothing neutral helps:
    by how much it is too little, and what would fit.
    """
    found, hardware = estimate(cfg), cfg.hardware
    print(describe(found), flush=True)
    if hardware.memory_gib is None or found.peak_gib <= hardware.memory_gib:
        return cfg
    surplus = found.peak_gib - hardware.memory_gib
    fault = f"training should take {found.peak_gib:.1f} GiB, {surplus:.1f} more than hardware={hardware.name} has"
    tried: list[WayOut] = []
    for way in neutral_ways(cfg, found, estimate):
        tried.append(way)
        if hardware.fit == "auto" and way.fits(hardware.memory_gib):
            print(f"{fault}: hardware.fit=auto takes {way}", flush=True)
            return way.cfg
    tried += other_ways(cfg, backbone, estimate)
    if not any(way.fits(hardware.memory_gib) for way in tried):
        tried.append(all_at_once(cfg, estimate))
    line = f"{fault}; {advice(tried, hardware.memory_gib)}"
    if hardware.fit != "warn":
        raise UserError(line)
    print(f"note: {line}", flush=True)
    return cfg


def advice(tried: list[WayOut], memory_gib: float) -> str:
    """What fits, or how near the nearest comes."""
    if ways := [way for way in tried if way.fits(memory_gib)]:
        return f"it would fit with {' or '.join(map(str, ways))}"
    nearest = min(tried, key=lambda way: way.estimate.peak_gib)
    return f"nothing tried fits, the nearest is {nearest}; use a larger device or a smaller backbone"


def neutral_ways(cfg: DictConfig, found: MemoryEstimate, estimate: Estimate) -> Iterator[WayOut]:
    """Fewer images at once; recomputed blocks, of no more networks than it takes; and both, where neither does: more time, the
    same result. found: the estimate of cfg itself."""

    def way(**hardware: Any) -> WayOut:
        other = changed(cfg, {f"hardware.{k}": v for k, v in hardware.items()})
        return WayOut(" ".join(f"hardware.{k}={v}" for k, v in hardware.items()), other, estimate(other), True)

    if never_below(found) > cfg.hardware.memory_gib:
        return
    scopes = {"none": ("adapter", "both"), "adapter": ("both",)}.get(cfg.hardware.checkpointing, ())
    limit, single, fits = cfg.hardware.memory_gib, None, False
    if cfg.hardware.micro_batch > 1:
        single = way(micro_batch=1)
        between = _largest_that_fits(cfg, found, single.estimate)
        yield way(micro_batch=between) if between > 1 else single
    for scope in scopes:
        yield (recomputed := way(checkpointing=scope))
        if fits := recomputed.fits(limit):
            break
    if scopes and single is not None and not single.fits(limit) and not fits:
        yield way(micro_batch=1, checkpointing=scopes[-1])


def never_below(found: MemoryEstimate) -> float:
    """GiB that the optimizer step takes however few images are learned at once: weights, gradients, state, average."""
    kept = found.frozen_weights_gib + 2 * found.trainable_weights_gib  # a gradient is as large as its weight
    return kept + found.optimizer_gib + found.ema_gib


def _largest_that_fits(cfg: DictConfig, found: MemoryEstimate, single: MemoryEstimate) -> int:
    """The largest micro batch that should fit: memory is a maximum of straight lines in the batch, so it lies on or below the
    chord between two of its points."""
    micro, effective, devices = cfg.hardware.micro_batch, cfg.budget.effective_batch, cfg.hardware.devices
    slope = (found.peak_gib - single.peak_gib) / (micro - 1)
    room = cfg.hardware.memory_gib - single.peak_gib
    most = 1 + (int(room / slope) if slope > 0 and room > 0 else 0)
    return next(m for m in range(min(most, micro - 1), 0, -1) if effective % (m * devices) == 0)


def other_ways(cfg: DictConfig, backbone: Backbone, estimate: Estimate) -> Iterator[WayOut]:
    """An optimizer, a method and a resolution; each of them trains something else."""

    def way(typed: str, changes: dict[str, Any]) -> WayOut:
        other = changed(cfg, changes)
        return WayOut(typed, other, estimate(other), False)

    for typed, changes in _smaller(cfg).items():
        yield way(typed, changes)
    multiple = backbone.facts.multiple
    if (side := cfg.resolution // 2 // multiple * multiple) >= multiple:
        yield way(f"resolution={side}", {"resolution": side})


def all_at_once(cfg: DictConfig, estimate: Estimate) -> WayOut:
    """A smaller optimizer and method with all that is neutral: what takes least at this resolution."""
    smaller = _smaller(cfg)
    changes: dict[str, Any] = {"hardware.micro_batch": 1, "hardware.checkpointing": "both"}
    for some in smaller.values():
        changes |= some
    other = changed(cfg, changes)
    typed = " ".join([*smaller, "hardware.micro_batch=1", "hardware.checkpointing=both"])
    return WayOut(typed, other, estimate(other), not smaller)


def _smaller(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """What to write -> the keys that it changes, of an optimizer and a method that take less than the configuration's."""
    found: dict[str, dict[str, Any]] = {}
    if "8bit" not in cfg.optimizer.algorithm["_target_"] and cfg.hardware.accelerator == "gpu":
        found["optimizer=adamw8bit"] = {"optimizer.algorithm._target_": ADAM8BIT}
    half = load("train", ["adapter=unicon_half"]).adapter
    if cfg.adapter.name != half.name:
        found[f"adapter={half.name}"] = {"adapter": half}
    return found


def changed(cfg: DictConfig, changes: dict[str, Any]) -> DictConfig:
    """A copy of a configuration with dotted keys replaced, whole nodes too."""
    other = cfg.copy()
    with open_dict(other):
        for key, value in changes.items():
            OmegaConf.update(other, key, value, merge=False)
    return other
