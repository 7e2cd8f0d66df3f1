"""The nodes of conf/<group>/ as they stand in their files."""

from functools import cache
from typing import Any

from omegaconf import OmegaConf

from src.config.compose import CONF


@cache
def node_of(group: str, name: str) -> dict[str, Any]:
    """What a yaml of a group says on top of those in its defaults; shared, so copy it before a change.

    Groups of which this is asked lean on nothing outside of themselves, so their files are read as they are: to compose a
    whole configuration for each takes a third of a second.
    """
    own = OmegaConf.load(CONF / group / f"{name}.yaml")
    below = [node_of(group, base) for base in own.pop("defaults", [])]
    return OmegaConf.to_container(OmegaConf.merge(*below, own))  # type: ignore[return-value]
