"""The keys of `python -m src.evaluate`; what each means is beside its value in conf/evaluate.yaml."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from src.config.keys import NODE, key
from src.vocabulary import SOLVERS


@dataclass
class EvaluationSetConfig:
    """Which pictures, captions, conditions and noise: conf/evaluation_set/ names such sets."""

    name: str = MISSING
    split: str = key(choices=("train", "val"))
    images: int | None = key(least=2)
    seed: int = key(least=0)
    fingerprint: str | None = MISSING


@dataclass
class MetricsConfig:
    """What is measured beside control, and with whose weights."""

    names: list[str] | None = MISSING
    inception_weights: str | None = MISSING
    clip: str | None = MISSING
    musiq_weights: str | None = MISSING
    maniqa_weights: str | None = MISSING
    lpips_weights: str | None = MISSING


@dataclass
class EvaluateKeys:
    """`python -m src.evaluate`, apart from the machine it runs on. run: a run folder, or a list of them."""

    run: Any = MISSING
    checkpoint: str | None = MISSING
    compare: list[str] = MISSING
    n: int | None = key(least=3)
    arms: list[str] = MISSING
    part: str | None = MISSING
    engine: str = key(choices=("local", "ray"))
    parts: int | None = key(least=1)
    solver: str = key(choices=tuple(SOLVERS))
    steps: int = key(least=1)
    guidance: float = key(least=0)
    batch: int = key(least=1)
    resolution: int | None = key(least=1)
    output_dir: str = MISSING
    cache_dir: str = MISSING
    evaluation_set: EvaluationSetConfig = MISSING
    metrics: MetricsConfig = MISSING
    data: dict[str, Any] = field(default=MISSING, metadata=NODE)
    backbone: dict[str, Any] = field(default=MISSING, metadata=NODE)
    task: dict[str, Any] = field(default=MISSING, metadata=NODE)
