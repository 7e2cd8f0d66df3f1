"""Configuration to objects, in the one legal order.

Cheap things come first: by the time a weight is read, everything that can be refused has been.
"""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from src.adapters.base import ControlAdapter, OptimizerRecipe, unreached
from src.backbones.base import Backbone
from src.backbones.codec import Codec
from src.callbacks.base import RunContext
from src.checkpoint import AdapterCheckpointIO, fitting_weights, read_meta
from src.config import accumulation, config_sha
from src.construct import construct, partial
from src.control_score import HeldOut
from src.data.datamodule import ControlData, ImageStream, Stores
from src.data.source import Source
from src.data.stores import build_stores
from src.data.tolerant import tolerant
from src.profiling.memory import blank_batch
from src.sampling import solver_for
from src.support import check_cell
from src.tasks.base import Task
from src.types import UserError

CALLBACK_ORDER = (
    "meter",
    "ema",
    "control",
    "checkpoints",
    "stopper",
    "progress",
)  # validate before saving, save before leaving


@dataclass
class Plan:
    """What a configuration names, made without reading a weight."""

    backbone: Backbone
    task: Task
    train_source: Source
    val_source: Source


@dataclass
class World:
    """What all trainings of one run share: loaded backbone, codec, cached data, the held-out set."""

    backbone: Backbone
    codec: Codec
    task: Task
    train: Stores
    val: Stores
    held: HeldOut
    backbone_hash: str


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


def device_of(cfg: DictConfig) -> torch.device:
    """The device that this process works on, from a resolved hardware profile."""
    return torch.device("cuda", torch.cuda.current_device()) if cfg.hardware.accelerator == "gpu" else torch.device("cpu")


def backbone_dtype(cfg: DictConfig) -> torch.dtype:
    """Frozen weights are kept in the precision that they compute in."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(cfg.hardware.precision, torch.float32)


def plan(cfg: DictConfig) -> Plan:
    """Construct backbone (facts only), task and sources; whatever is wrong with them is raised here."""
    backbone = construct(cfg.backbone, resolution=cfg.resolution)
    check_cell(cfg, backbone)
    task = construct(cfg.task)
    for note in task.notes:
        _say(note)
    train, val = (construct(cfg.data, split=split, resolution=cfg.resolution) for split in ("train", "val"))
    for side in {side for row in range(len(train)) for side in train.size_of(row)} - {cfg.resolution}:
        backbone.check_resolution(side, "a side of data.buckets")
    if len(val) < cfg.validation.final_images:
        raise UserError(f"validation.final_images={cfg.validation.final_images}, but data.val_images gives {len(val)}")
    return Plan(backbone, task, train, val)


def load_world(cfg: DictConfig, made: Plan) -> World:
    """Read the weights, fill the caches, and set up the held-out images."""
    device, backbone = device_of(cfg), made.backbone
    backbone.load(device, backbone_dtype(cfg))
    codec = backbone.load_codec(device)
    stores = cached(cfg, made, codec)
    backbone.drop_text()
    samples = [made.val_source[i] for i in range(cfg.validation.final_images)]
    conditions = [made.task.condition_of(s, cfg.seed) for s in samples]
    held = HeldOut(
        stores=stores[1],
        images=np.stack([s.image for s in samples]),
        conditions=np.stack(conditions),
        task=made.task,
        codec=codec,
        solver=solver_for(backbone.objective, backbone.scheduler()),
        steps=cfg.validation.steps,
        guidance=cfg.validation.guidance,
        seed=cfg.seed,
    )
    return World(backbone, codec, made.task, stores[0], stores[1], held, backbone.weight_hash())


def cached(cfg: DictConfig, made: Plan, codec: Codec) -> list[Stores]:
    """The caches of both splits, filled. Bad samples are replaced in `made`'s sources first, where the data says so."""
    folder, workers, space = Path(cfg.cache_dir), cfg.hardware.workers, cfg.adapter.condition_space
    made.train_source, made.val_source = (tolerant(s, folder, workers, _say) for s in (made.train_source, made.val_source))
    sources, device = [made.train_source, made.val_source], device_of(cfg)
    return build_stores(sources, made.task, made.backbone, codec, space, folder, device, cfg.seed, workers, _say)


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

    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        is_hollow = backbone.net is not None and next(backbone.net.parameters()).is_meta
        hollow = backbone if is_hollow else backbone.hollow(torch.float32)
        probe = made(hollow)
        # not the smallest size: at one pixel every shape fits every other
        dead = unreached(probe, blank_batch(hollow.facts, probe.condition_space, 1, 2 * hollow.facts.multiple))
    adapter = made(backbone)
    adapter.freeze_unreached(dead)
    return adapter


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


def compile_blocks(backbone: Backbone, adapter: ControlAdapter) -> None:
    """torch.compile, in place, of every block that runs: names in the state dictionary stay as they are."""
    for block in [*backbone.steps(), *(m for part in adapter.parts().values() for m in part.children())]:
        block.compile()


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
        "backbone_dtype": str(backbone_dtype(cfg)).removeprefix("torch."),
        "task": cfg.task.name,
        "config_sha": config_sha(cfg),
    }


def run_context(cfg: DictConfig, world: World, root: Path, folder: Path, loggers: list, with_condition: bool) -> RunContext:
    """Data streams and everything that callbacks need; with_condition=False makes a no-control arm."""
    batch = cfg.budget.effective_batch
    train = ImageStream(world.train, cfg.seed, cfg.caption_dropout, with_condition, effective_batch=batch)
    val = ImageStream(world.val, cfg.seed, 0.0, with_condition, stream="val")
    total = total_images(cfg)
    data = ControlData(train, val, total, cfg.hardware.micro_batch, cfg.hardware.workers, cfg.validation.final_images)
    return RunContext(
        root=root,
        folder=folder,
        effective_batch=batch,
        total_images=total,
        stop_at_images=cfg.budget.stop_at_images,
        with_condition=with_condition,
        data=data,
        held=world.held,
        validation=dict(cfg.validation),
        ema_decay=cfg.ema_decay,
        meta=identity(cfg, world) | {"with_condition": with_condition},
        loggers=loggers,
    )


def callbacks(cfg: DictConfig, run: RunContext) -> list[pl.Callback]:
    """The configured callbacks in the order in which they must act."""
    named = {name: node for name, node in cfg.callbacks.items() if node}
    missing = [name for name in CALLBACK_ORDER if name not in named and name != "progress"]
    if missing:
        raise UserError(f"callbacks {missing} are missing: a run cannot do without; ema_decay=0 switches the average off")
    ordered = [n for n in CALLBACK_ORDER if n in named] + [n for n in named if n not in CALLBACK_ORDER]
    return [partial(named[name])(run=run) for name in ordered]


def trainer(cfg: DictConfig, run: RunContext, made: list[pl.Callback]) -> pl.Trainer:
    """A Lightning trainer that counts in optimizer steps and leaves validation, logging and saving to our callbacks."""
    hardware = cfg.hardware
    return pl.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        strategy=hardware.strategy,
        precision=hardware.precision,
        max_steps=run.total_images // run.effective_batch,
        max_epochs=1,
        accumulate_grad_batches=accumulation(cfg),
        callbacks=made,
        plugins=[AdapterCheckpointIO()],
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
