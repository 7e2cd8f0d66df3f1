"""How a wrong configuration is told, in one line: the place it stands in, the key, the value, the nearest right one."""

import difflib
import json
from collections.abc import Callable, Iterable
from typing import Any

from src.vocabulary import UserError

Where = Callable[[str], str]  # a dotted key -> the yaml file, or the command line, that set it


class ConfigError(UserError):
    """A configuration that cannot run; the message is one line."""


class Incompatible(ConfigError):
    """Values that are legal one by one, but not together or not on this machine: a sweep loses this cell only."""


class Unsupported(Incompatible):
    """An adapter on a backbone that it was never made for: a sweep skips this cell and is none the worse."""


def key_is(place: str, key: str, value: Any, fault: str) -> str:
    """The one form of every message: `<place>: <key>=<value> <fault>`."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return f"{place}: {key}={text if len(text) <= 60 else text[:57] + '...'} {fault}"


def guess(word: str, known: Iterable[str]) -> str:
    """`; did you mean x?`, or nothing when nothing is near."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1) or [k for k in known if word and k.startswith(word)]
    return f"; did you mean {close[0]}?" if close else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """Like `guess`, with the list to choose from when nothing is near."""
    return guess(word, known) or f"; known: {', '.join(sorted(known)) or 'none'}"


def nearest_key(key: str, legal: set[str]) -> str:
    """The nearest of dotted keys: among the neighbours, then the same name elsewhere, then, without neighbours, anything."""
    head, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in sorted(legal) if k.rpartition(".")[0] == head}
    twins = sorted((k for k in legal if k.rpartition(".")[2] == leaf), key=lambda k: (k.count("."), k))[:3]
    if close := difflib.get_close_matches(leaf, siblings, n=1):
        return f"; did you mean {siblings[close[0]]}?"
    if twins:
        return f"; did you mean {' or '.join(twins)}?"
    if not siblings and (close := difflib.get_close_matches(key, sorted(legal), n=1)):
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(siblings.values()) or ', '.join(sorted(k for k in legal if '.' not in k))}"
