"""Profiles of conf/hardware/ as they stand in their files, and which of them is a card's."""

import re
from typing import Any

from src.config.nodes import node_of

# from how many GiB of one device; profiles of that size: that of any card, and those that differ in whose rates they have
PROFILES = ((120, ("h200",)), (70, ("gpu_80g", "h100")), (0, ("gpu_24g",)))


def profile(name: str) -> dict[str, Any]:
    """The keys of a profile, those of what it builds on included."""
    return dict(node_of("hardware", name))


def profile_of(gpu: str, memory_gib: float) -> dict[str, Any]:
    """The profile of a card: of its size, and its own by name if there is one. Of another card's, no rates."""
    sized = [profile(name) for name in next(names for least, names in PROFILES if memory_gib >= least)]
    own = next((found for found in sized if is_gpu(gpu, found["rates"]["gpu"])), {**sized[0], "rates": {}})
    return {**own, "memory_gib": min(own["memory_gib"], memory_gib)}


def is_gpu(device: str, model: str) -> bool:
    """Whether a device's name, as torch has it, names a model in whole words: a GH200 is no H200."""
    return re.search(rf"(?<!\w){re.escape(model)}(?!\w)", device) is not None
