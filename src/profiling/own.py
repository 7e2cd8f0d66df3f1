"""When the frozen network's own modules run, and not copies of them that pass through the same methods."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from src.backbones.base import Backbone

NAMES = ("begin", "run", "end", "embed", "attention")


@contextmanager
def own_calls(backbone: Backbone | None) -> Iterator[tuple[list[str], Counter]]:
    """-> (names of the backbone's own calls that are under way, how often each was made); both go on changing inside.

    A step given by its number is the network's own, a module in its place is a copy; so are an entry and a head that are
    given.
    """
    inside: list[str] = []
    calls: Counter[str] = Counter()
    if backbone is None:
        yield inside, calls
        return

    def watch(name: str) -> Callable:
        method = getattr(backbone, name)

        @wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not _is_own(name, args, kwargs):
                return method(*args, **kwargs)
            calls[name] += 1
            inside.append(name)
            try:
                return method(*args, **kwargs)
            finally:
                inside.pop()

        return watched

    for name in NAMES:
        object.__setattr__(backbone, name, watch(name))
    try:
        yield inside, calls
    finally:
        for name in NAMES:
            object.__delattr__(backbone, name)


def _is_own(name: str, args: tuple, kwargs: dict) -> bool:
    if name in ("run", "attention"):
        return isinstance(args[0] if args else kwargs["step"], int)
    if name == "begin":
        return (args[3] if len(args) > 3 else kwargs.get("entry")) is None
    if name == "end":
        return (args[1] if len(args) > 1 else kwargs.get("head")) is None
    return True
