"""What a number was measured on, by name."""

import platform
from pathlib import Path

import torch


def processor() -> str:
    """The processor's model: what /proc/cpuinfo calls it, or else what the platform does."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return next(found, None) or platform.processor() or platform.machine() or "unknown"


def device_name(on_gpu: bool) -> str:
    """The GPU's name, or `cpu: ` and the processor's."""
    return torch.cuda.get_device_name() if on_gpu else f"cpu: {processor()}"
