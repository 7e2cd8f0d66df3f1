"""The keys of `hardware`; what each means is beside its value in conf/hardware/cpu.yaml."""

import typing
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from src.config.keys import key
from src.vocabulary import Checkpointing, Compile, Fit


@dataclass
class HardwareConfig:
    """Speed only: nothing here may change a result. In `auto`, null is filled in from the profile that fits the machine."""

    name: str = MISSING
    accelerator: str = key(choices=("auto", "cpu", "gpu"))
    devices: int | None = key(least=1)
    precision: str | None = key(choices=("32-true", "bf16-mixed", "16-mixed"))
    micro_batch: int | None = key(least=1)
    workers: int | None = key(least=0)
    threads: int | None = key(least=1)
    checkpointing: str | None = key(choices=typing.get_args(Checkpointing))
    compile: str | None = key(choices=typing.get_args(Compile))
    cuda_graphs: bool | None = MISSING
    channels_last: bool | None = MISSING
    overlap: bool | None = MISSING
    strategy: str | None = key(choices=("auto", "ddp", "fsdp"))
    nodes: int | None = key(least=1)
    shard: str | None = key(choices=("adapter", "both"))
    timeout_s: float | None = key(least=1)
    memory_gib: float | None = key(least=0)
    fit: str | None = key(choices=typing.get_args(Fit))
    oom: str | None = key(choices=("stop", "halve"))
    rates: dict[str, Any] | None = MISSING
