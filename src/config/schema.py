"""The typed roots of the entries' configurations: types and bounds live here, values in conf/*.yaml.

A default is written once, in yaml. Groups with a `_target_` are free mappings whose schema is the signature of the class
that they name.
"""

import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from src.objectives import TIME_LAWS
from src.types import Checkpointing

NODE, NODES = {"kind": "node"}, {"kind": "nodes"}  # a mapping with a `_target_`; a mapping of such


def _key(**facts: Any) -> Any:
    """A key whose value stands in yaml. least, below: bounds; choices: the legal words."""
    return field(default=MISSING, metadata=facts)


@dataclass
class BudgetConfig:
    """How much is learned, in images, whatever the machine."""

    images: int = _key(least=1)
    effective_batch: int = _key(least=1)
    stop_at_images: int | None = _key(least=1)


@dataclass
class ValidationConfig:
    """What is drawn and scored while training, and at its end."""

    every_images: int = _key(least=1)
    images: int = _key(least=1)
    final_images: int = _key(least=1)
    steps: int = _key(least=1)
    guidance: float = _key(least=0)


@dataclass
class HardwareConfig:
    """Speed only: nothing here may change a result. In `auto`, null is filled in from the profile that fits the machine."""

    name: str = MISSING
    accelerator: str = _key(choices=("auto", "cpu", "gpu"))
    devices: int | None = _key(least=1)
    precision: str | None = _key(choices=("32-true", "bf16-mixed", "16-mixed"))
    micro_batch: int | None = _key(least=1)
    workers: int | None = _key(least=0)
    threads: int | None = _key(least=1)
    checkpointing: str | None = _key(choices=typing.get_args(Checkpointing))
    compile: bool | None = MISSING
    strategy: str | None = MISSING
    memory_gib: float | None = _key(least=0)


@dataclass
class OptimizerConfig:
    """algorithm: a `_partial_` node that still wants the parameters."""

    algorithm: dict[str, Any] = field(default=MISSING, metadata=NODE)
    warmup_images: int = _key(least=0)
    decay: str = _key(choices=("constant", "cosine"))
    clip_norm: float | None = _key(least=0)


@dataclass
class LoggerConfig:
    """Where curves go besides the run folder. mode auto: online if there is a key, else offline with one line."""

    name: str = _key(choices=("wandb", "local"))
    project: str | None = MISSING
    entity: str | None = MISSING
    group: str | None = MISSING
    mode: str = _key(choices=("auto", "online", "offline", "disabled"))


@dataclass
class TrainConfig:
    """`python -m src.train`; the meaning of each key is beside its value in conf/train.yaml."""

    also: ClassVar = ("+experiment",)  # written on the command line, and no key of the configuration itself
    seed: int = _key(least=0)
    resolution: int = _key(least=1)
    budget: BudgetConfig = MISSING
    caption_dropout: float = _key(least=0, below=1)
    time_law: str = _key(choices=TIME_LAWS)
    ema_decay: float = _key(least=0, below=1)
    control_arm: bool = MISSING
    resume: str | None = MISSING
    output_dir: str = MISSING
    cache_dir: str = MISSING
    name: str = MISSING
    tags: list[str] = MISSING
    validation: ValidationConfig = MISSING
    backbone: dict[str, Any] = field(default=MISSING, metadata=NODE)
    adapter: dict[str, Any] = field(default=MISSING, metadata=NODE)
    task: dict[str, Any] = field(default=MISSING, metadata=NODE)
    data: dict[str, Any] = field(default=MISSING, metadata=NODE)
    hardware: HardwareConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    logger: LoggerConfig = MISSING
    callbacks: dict[str, Any] = field(default=MISSING, metadata=NODES)


@dataclass
class SampleConfig:
    """`python -m src.sample`: one condition and one prompt to one image."""

    run: str = MISSING
    prompt: str = MISSING
    condition: str = MISSING
    condition_is_image: bool = MISSING
    out: str | None = MISSING
    scale: float = MISSING
    seed: int = _key(least=0)
    steps: int = _key(least=1)
    guidance: float = _key(least=0)
    hardware: HardwareConfig = MISSING


@dataclass
class PrepareConfig:
    """`python -m src.prepare`: train an embedded backbone from nothing, on scenes that it renders itself."""

    seed: int = _key(least=0)
    world_images: int = _key(least=1)
    vae_steps: int | None = _key(least=1)
    backbone_steps: int | None = _key(least=1)
    reader_steps: int = _key(least=1)
    out: str | None = MISSING
    cache_dir: str = MISSING
    workers: int = _key(least=0)
    backbone: dict[str, Any] = field(default=MISSING, metadata=NODE)


@dataclass
class CheckConfig:
    """`python -m src.prepare check`: what is wrong with a data set."""

    seed: int = _key(least=0)
    resolution: int = _key(least=1)
    full: bool = MISSING
    sample: int = _key(least=1)
    worst: int = _key(least=1)
    tokenizer: str | None = MISSING
    depth_is: str = _key(choices=("distance", "nearness", "map"))
    workers: int = _key(least=0)
    output_dir: str = MISSING
    name: str = MISSING
    data: dict[str, Any] = field(default=MISSING, metadata=NODE)


@dataclass
class ShardsConfig:
    """`python -m src.prepare shards`: a source as WebDataset tar shards."""

    out: str = MISSING
    split: str = _key(choices=("all", "train", "val"))
    resolution: int = _key(least=1)
    shard_mib: float = _key(least=1)
    picture: str = _key(choices=("png", "jpg"))
    engine: str = _key(choices=("local", "ray"))
    workers: int = _key(least=0)
    data: dict[str, Any] = field(default=MISSING, metadata=NODE)


@dataclass
class ProbeConfig:
    """`python -m src.prepare probe`: the detector of depth and joints on scenes, trained from nothing."""

    seed: int = _key(least=0)
    steps: int = _key(least=1)
    workers: int = _key(least=0)
    out: str | None = MISSING
    cache_dir: str = MISSING


@dataclass
class ExportConfig:
    """`python -m src.export`: the trained adapter of a run for diffusers."""

    run: str = MISSING
    out: str = MISSING
    form: str = _key(choices=("auto", "diffusers", "dropin"))


@dataclass
class ReportConfig:
    """`python -m src.report`: tables and grids of finished runs."""

    runs: list[str] = MISSING
    out: str = MISSING


SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "sample": SampleConfig,
    "prepare": PrepareConfig,
    "prepare_check": CheckConfig,
    "prepare_shards": ShardsConfig,
    "prepare_probe": ProbeConfig,
    "export": ExportConfig,
    "report": ReportConfig,
}
for _name, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_schema, provider="src.config")
