"""A node of the configuration to the object that it names. The only file that calls Hydra's `instantiate`."""

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from src.types import UserError


def construct(node: Mapping[str, Any], **given: Any) -> Any:
    """Call the `_target_` of a node with its other keys. A UserError of the constructor comes out as itself.

    given: plain values. Objects would become configuration: use `partial` for those.
    """
    try:
        return instantiate(node, **given)
    except InstantiationException as exc:
        if isinstance(exc.__cause__, UserError):
            raise exc.__cause__ from None
        raise


def partial(node: Mapping[str, Any]) -> Any:
    """The `_target_` with the node's other keys filled in: still to be called, with objects of any kind."""
    return instantiate(node, _partial_=True)
