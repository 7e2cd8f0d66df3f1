"""What the typed roots of configurations are made of: keys whose values stand in yaml, and nodes with a `_target_`."""

from dataclasses import field
from typing import Any

from omegaconf import MISSING

NODE, NODES = {"kind": "node"}, {"kind": "nodes"}  # a mapping with a `_target_`; a mapping of such


def key(**facts: Any) -> Any:
    """A key whose value stands in yaml. least, below: bounds; choices: the legal words."""
    return field(default=MISSING, metadata=facts)
