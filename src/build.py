"""Configuration to objects: the adapter, its data streams, callbacks and trainer. What they work on: `src.world`."""

import functools
import logging
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import LightningEnvironment
from omegaconf import DictConfig, OmegaConf

from src.adapters.base import ControlAdapter, OptimizerRecipe, unreached
from src.adapters.frozen import Reads
from src.adapters.passes import Passes
from src.backbones import switches
from src.backbones.base import Backbone
from src.backbones.codec import Codec
from src.callbacks.base import RunContext
from src.checkpoint import AdapterCheckpointIO, fitting_weights, read_meta
from src.config import accumulation, config_sha
from src.construct import construct, partial
from src.data.datamodule import ControlData, ImageStream
from src.data.feature_cache import AheadData, FeatureStore, RepeatingStream
from src.features import features_on_disk
from src.profiling.memory import blank_batch
from src.ranks.place import ALONE, Ranks, device_count
from src.tasks.base import Task
from src.types import UserError
from src.world import Plan, World, backbone_dtype, cached, device_of, load_world, load_worlds, plan

__all__ = ["Plan", "World", "backbone_dtype", "cached", "device_of", "load_world", "load_worlds", "plan"]
CALLBACK_ORDER = (
    "vitals",
    "meter",
    "ema",
    "guard",
    "control",
    "checkpoints",
    "stopper",
    "progress",
)  # validate before saving, save before leaving
_dead: dict[str, list[str]] = {}  # see `_dead_names`


@dataclass
class Sampler:
    """A trained adapter with what drawing a picture needs."""

    backbone: Backbone
    codec: Codec
    task: Task
    adapter: ControlAdapter


def quiet() -> None:
    """Silence libraries that talk about what this project decides itself."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def new_adapter(cfg: DictConfig, backbone: Backbone, training: bool = True) -> ControlAdapter:
    """The untrained adapter; its random parts depend on the seed alone. Parameters that cannot matter are frozen: a twin
    without data finds them."""
    recipe = None
    if training:
        recipe = OptimizerRecipe(
            algorithm=construct(cfg.optimizer.algorithm),
            warmup_images=cfg.optimizer.warmup_images,
            decay=cfg.optimizer.decay,
            clip_norm=cfg.optimizer.clip_norm or 0.0,
            effective_batch=cfg.budget.effective_batch,
            total_images=total_images(cfg),
        )
    node = {k: v for k, v in cfg.adapter.items() if k != "params_match"}  # its outcome stands in the other keys
    make = partial(node)

    def made(on: Backbone) -> ControlAdapter:
        torch.manual_seed(cfg.seed)
        return make(on, on.objective.with_time_law(cfg.time_law), recipe, checkpointing=cfg.hardware.checkpointing or "none")

    dead = _dead_names(OmegaConf.to_yaml(OmegaConf.create(node), resolve=True), backbone, made)
    adapter = made(backbone)
    adapter.freeze_unreached(dead)
    return adapter


def _dead_names(words: str, backbone: Backbone, made: Callable[[Backbone], ControlAdapter]) -> list[str]:
    """`unreached` of an adapter on a twin of the backbone without data. words: the adapter's options; found once for each kind
    of network, since whoever estimates a training builds its adapter twice."""
    key = words + backbone.shape_key()
    if key not in _dead:
        is_hollow = backbone.net is not None and next(backbone.net.parameters()).is_meta
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            probe = made(backbone if is_hollow else backbone.hollow(torch.float32))
            # not the smallest size: at one pixel every shape fits every other
            batch = blank_batch(backbone.facts, probe.condition_space, 1, 2 * backbone.facts.multiple)
            _dead[key] = unreached(probe, batch)
    return _dead[key]


def load_sampler(cfg: DictConfig, checkpoint: Path) -> Sampler:
    """Backbone, codec, task and the adapter's averaged weights from a checkpoint folder. Refuses one that does not fit."""
    device = device_of(cfg)
    # in the precision of the training first, in which its hash was taken
    trained_in = getattr(torch, read_meta(checkpoint).get("backbone_dtype", "float32"))
    backbone = construct(cfg.backbone, resolution=cfg.resolution).load(device, trained_in)
    adapter = new_adapter(cfg, backbone, training=False)
    meta = {"adapter": cfg.adapter.name, "backbone": backbone.facts.source, "backbone_hash": backbone.weight_hash()}
    adapter.load_state_dict(fitting_weights(checkpoint, adapter.state_dict(), meta))
    torch.nn.Module.to(backbone.net, backbone_dtype(cfg))
    given = {k: None if k == "lpips_weights" else v for k, v in cfg.task.items()}  # a metric's weights are not drawn with
    return Sampler(backbone, backbone.load_codec(device), construct(given), adapter.to(device).eval())


def union_of(adapters: Sequence[ControlAdapter]) -> Reads | None:
    """What several adapters read of one frozen pass; None if one of them writes into the backbone."""
    reads = [adapter.reads() for adapter in adapters]
    return None if None in reads else functools.reduce(operator.or_, reads)


def share_passes(cfg: DictConfig, world: World, adapters: Sequence[ControlAdapter]) -> FeatureStore | None:
    """Let adapters that train on the same batches have their frozen passes from one place, if there is anything to share.

    -> the features of these passes, where the configuration wants them kept on disk.
    """
    reuse, cache, device = cfg.get("reuse", 1), cfg.get("feature_cache"), device_of(cfg)
    overlap, kept = bool(cfg.hardware.get("overlap")), cache is not None and cache.dtype is not None
    union, first = union_of(adapters), adapters[0]
    if overlap and (union is None or kept or device.type == "cpu"):
        why = "on a CPU, which does one thing at a time" if union and not kept else "where no frozen pass is to be made"
        _say(f"hardware.overlap saves nothing {why}")
    if union is None or not (overlap or kept or reuse > 1 or len(adapters) > 1):
        return None
    uses, most = len(adapters) * reuse, accumulation(cfg) if reuse > 1 else 1
    passes = Passes(lambda batch: first.frozen_pass(batch, union), uses, most, overlap and not kept, device)
    for adapter in adapters:
        adapter.passes = passes
    return features_on_disk(cfg, world.train, adapters, union, _say) if kept else None


def train_stream(cfg: DictConfig, world: World, with_condition: bool, features: FeatureStore | None) -> ImageStream:
    """The training images, with as much repetition as the configuration wants."""
    given = (world.train, cfg.seed, cfg.caption_dropout, with_condition)
    reuse, cache, batch = cfg.get("reuse", 1), cfg.get("feature_cache"), cfg.budget.effective_batch
    draws = None if cache is None else cache.draws
    if reuse == 1 and draws is None and not cfg.hardware.get("overlap"):
        return ImageStream(*given, effective_batch=batch)
    return RepeatingStream(*given, effective_batch=batch, reuse=reuse, draws=draws, features=features)


def speed_up(cfg: DictConfig, backbone: Backbone, adapter: ControlAdapter) -> None:
    """Set a loaded backbone and an adapter to the switches of `hardware/`."""
    chosen = {key: cfg.hardware[key] for key in ("compile", "cuda_graphs", "channels_last")}
    crosses = adapter.grad_through_backbone
    for line in switches.speed_up(backbone, adapter.parts().values(), grad_through_backbone=crosses, **chosen):
        _say(line)
    if device_count(cfg.hardware) > 1 and cfg.hardware.strategy == "fsdp":
        from src.ranks.strategies import shard

        frozen = backbone.steps() if cfg.hardware.shard == "both" else ()
        kind = "cuda" if cfg.hardware.accelerator == "gpu" else "cpu"
        adapter.shards = functools.partial(shard, frozen_steps=frozen, count=device_count(cfg.hardware), device_type=kind)


def total_images(cfg: DictConfig) -> int:
    """The budget in whole optimizer steps."""
    return cfg.budget.images // cfg.budget.effective_batch * cfg.budget.effective_batch


def identity(cfg: DictConfig, world: World) -> dict:
    """What a checkpoint says about itself."""
    facts = world.backbone.facts
    return {
        "adapter": cfg.adapter.name,
        "backbone": facts.source,
        "backbone_revision": facts.revision,
        "backbone_hash": world.backbone_hash,
        "quantize": world.backbone.quantize,
        "backbone_dtype": str(backbone_dtype(cfg)).removeprefix("torch."),
        "task": cfg.task.name,
        "config_sha": config_sha(cfg),
    }


def run_context(
    cfg: DictConfig,
    world: World,
    root: Path,
    folder: Path,
    loggers: list,
    with_condition: bool,
    features: FeatureStore | None = None,
    ranks: Ranks = ALONE,
) -> RunContext:
    """Data streams and everything that callbacks need; with_condition=False makes a no-control arm.

    features: from `share_passes`; ranks: with whom the run is trained.
    """
    batch, loads = cfg.budget.effective_batch, AheadData if cfg.hardware.get("overlap") else ControlData
    train = train_stream(cfg, world, with_condition, features)
    val = ImageStream(world.val, cfg.validation.seed, 0.0, with_condition, stream="val")
    total, held = total_images(cfg), len(world.held.images)  # held: fewer than asked for where bad ones are left out
    counts = {key: min(cfg.validation[key], held) for key in ("images", "final_images")}
    data = loads(train, val, total, cfg.hardware.micro_batch, cfg.hardware.workers, counts["final_images"])
    data.rank, data.ranks, data.step = ranks.rank, ranks.count, batch
    return RunContext(
        root=root,
        folder=folder,
        effective_batch=batch,
        total_images=total,
        stop_at_images=cfg.budget.stop_at_images,
        with_condition=with_condition,
        data=data,
        held=world.held,
        validation={**cfg.validation, **counts},
        ema_decay=cfg.ema_decay,
        meta=identity(cfg, world) | {"with_condition": with_condition},
        loggers=loggers,
        ranks=ranks,
    )


def callbacks(cfg: DictConfig, run: RunContext) -> list[pl.Callback]:
    """The configured callbacks in the order in which they must act."""
    named = {name: node for name, node in cfg.callbacks.items() if node}
    missing = [name for name in CALLBACK_ORDER if name not in named and name not in ("progress", "vitals")]
    if missing:
        raise UserError(f"callbacks {missing} are missing: a run cannot do without; ema_decay=0 switches the average off")
    ordered = [n for n in CALLBACK_ORDER if n in named] + [n for n in named if n not in CALLBACK_ORDER]
    return [partial(named[name])(run=run) for name in ordered]


def trainer(cfg: DictConfig, run: RunContext, made: list[pl.Callback]) -> pl.Trainer:
    """A Lightning trainer that counts in optimizer steps and leaves validation, logging and saving to our callbacks."""
    from src.ranks.strategies import strategy_for

    hardware, several = cfg.hardware, run.ranks.several
    return pl.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        num_nodes=hardware.nodes,
        strategy=strategy_for(hardware),
        precision=hardware.precision,
        max_steps=run.total_images // run.effective_batch,
        max_epochs=1,
        accumulate_grad_batches=accumulation(cfg),
        callbacks=made,
        # our launcher's variables and torchrun's say where a rank stands; Lightning would ask Slurm, and Slurm knows nodes
        plugins=[AdapterCheckpointIO(), *([LightningEnvironment()] if several else [])],
        default_root_dir=run.folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def _say(line: str) -> None:
    print(line, flush=True)
