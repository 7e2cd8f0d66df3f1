"""The typed roots of the entries' configurations: types and bounds live here, values in conf/*.yaml.

A default is written once, in yaml. Groups with a `_target_` are free mappings whose schema is the signature of the class
that they name.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from src.config.evaluation import EvaluateKeys
from src.config.hardware import HardwareConfig
from src.config.keys import NODE, NODES
from src.config.keys import key as _key
from src.vocabulary import TIME_LAWS


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
    seed: int = _key(least=0)


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
class SweepConfig:
    """What a multirun does with its cells; nothing here changes what a cell finds."""

    resume: str | None = MISSING
    jobs: int = _key(least=1)
    timeout_s: float | None = _key(least=1)
    grace_s: float = _key(least=0)


@dataclass
class FeatureCacheConfig:
    """A fixed set of noised images instead of ever new ones, and their frozen features on disk."""

    draws: int | None = _key(least=1)
    dtype: str | None = _key(choices=("fp32", "bf16"))
    budget_gib: float = _key(least=0)


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
    together: list[str] = MISSING
    together_tasks: list[str] = MISSING
    reuse: int = _key(least=1)
    feature_cache: FeatureCacheConfig = MISSING
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
    sweep: SweepConfig = MISSING


@dataclass
class BenchConfig:
    """`python -m src.bench`: what one adapter on one backbone costs."""

    seed: int = _key(least=0)
    mode: str = _key(choices=("estimate", "measure"))
    what: str = _key(choices=("training", "inference"))
    floor: bool = MISSING
    naive: bool = MISSING
    resolution: int = _key(least=1)
    batch: int = _key(least=1)
    ema: bool = MISSING
    steps: int = _key(least=1)
    guidance: float = _key(least=0)
    warm_up: int = _key(least=1)
    repeats: int = _key(least=1)
    output_dir: str = MISSING
    name: str = MISSING
    backbone: dict[str, Any] = field(default=MISSING, metadata=NODE)
    adapter: dict[str, Any] = field(default=MISSING, metadata=NODE)
    hardware: HardwareConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    logger: LoggerConfig = MISSING
    sweep: SweepConfig = MISSING


@dataclass
class PeerConfig:
    """`python -m src.bench.peer`: this project's training against diffusers' script."""

    script: str = MISSING
    shape: str = MISSING
    adapters: list[str] = MISSING
    blocks: int | None = _key(least=1)
    overrides: list[str] = MISSING
    resolution: int = _key(least=1)
    batch: int = _key(least=1)
    t5_tokens: int = _key(least=1)
    steps: int = _key(least=1)
    warm_up: int = _key(least=1)
    repetitions: int = _key(least=2)
    images: int = _key(least=1)
    seed: int = _key(least=0)
    timeout_s: float = _key(least=1)
    output_dir: str = MISSING
    name: str = MISSING
    hardware: HardwareConfig = MISSING


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
    task: dict[str, Any] | None = field(default=MISSING, metadata=NODE)


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
class EvaluateConfig(EvaluateKeys):
    """`python -m src.evaluate`: trained adapters on a named set, measured."""

    hardware: HardwareConfig = MISSING
    logger: LoggerConfig = MISSING


@dataclass
class ReportConfig:
    """`python -m src.report`: tables, charts and one page of what was found."""

    runs: list[str] = MISSING
    out: str = MISSING
    one_table: bool = MISSING


@dataclass
class DashboardConfig:
    """`python -m src.report wandb`: a W&B workspace of the same."""

    runs: list[str] = MISSING
    out: str = MISSING
    project: str = MISSING
    entity: str | None = MISSING
    name: str = MISSING
    push: bool = MISSING


SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "bench": BenchConfig,
    "bench_peer": PeerConfig,
    "sample": SampleConfig,
    "prepare": PrepareConfig,
    "prepare_check": CheckConfig,
    "prepare_shards": ShardsConfig,
    "prepare_probe": ProbeConfig,
    "export": ExportConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    "report_wandb": DashboardConfig,
}
for _name, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_schema, provider="src.config")


def only(config_name: str) -> None:
    """Forget the schemas of the other verbs: Hydra's help copies all that it knows, once for every yaml that there is."""
    for name in SCHEMAS.keys() - {config_name}:
        ConfigStore.instance().repo.pop(f"{name}_schema.yaml", None)
