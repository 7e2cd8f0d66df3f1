"""How a wrong configuration is told, in one line: the place it stands in, the key, the value, the nearest right one."""

import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from src.vocabulary import UserError

COMMAND_LINE = "command line"
Where = Callable[[str], str]  # a dotted key -> the yaml file, or the command line, that set it


class ConfigError(UserError):
    """A configuration that cannot run; the message is one line, or a list of them.

    parts: the faults of such a list; key: whose value is wrong whatever the others are; between: keys that do not go together.
    """

    parts: "tuple[ConfigError, ...]" = ()
    key: str = ""
    between: tuple[str, ...] = ()

    def of(self, key: str = "", between: tuple[str, ...] = ()) -> "ConfigError":
        """Itself, with the keys that it is about."""
        self.key, self.between = key, between
        return self


class Incompatible(ConfigError):
    """Values that are legal one by one, but not together or not on this machine: a sweep loses this cell only."""


class Unsupported(Incompatible):
    """An adapter on a backbone that it was never made for: a sweep skips this cell and is none the worse."""


def listed(lines: Sequence[str]) -> str:
    """The one form of everything that is told at once: the line alone, or its count and a numbered list."""
    if len(lines) == 1:
        return lines[0]
    return "\n".join([f"{len(lines)} problems:", *(f"  {number}. {line}" for number, line in enumerate(lines, 1))])


class Gather:
    """Runs checks one after the other and keeps what they refuse, so that all of it is told at once.

    A check behind a refusal may trip over the very value that was refused, or refuse it once more: then, and only then, it is
    left out.
    """

    def __init__(self) -> None:
        self.found: list[ConfigError] = []

    def __call__(self, check: Callable[..., Any], *given: Any) -> Any:
        """What the check returns; None where it refuses."""
        try:
            return check(*given)
        except ConfigError as error:
            wrong = {one.key for one in self.found if one.key}
            self.found += [one for one in error.parts or (error,) if not wrong.intersection(one.between)]
        except Exception:
            if not self.found:
                raise
        return None

    def done(self) -> None:
        """Raise what was found: the one fault, or a list of all. What a sweep would bear alone, it bears together."""
        if len(self.found) < 2:
            for error in self.found:
                raise error
            return
        kind = Incompatible if all(isinstance(error, Incompatible) for error in self.found) else ConfigError
        error = kind(listed([str(one) for one in self.found]))
        error.parts = tuple(self.found)
        raise error


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


def quote_hint(text: str) -> str:
    """What to write instead of a word of the command line that Hydra cannot read, or reads as a sweep."""
    key, _, value = text.partition("=")
    return f"quote a value with special characters twice: '{key}=\"{value}\"'" if value else f"write {key}=value"


def flat(exc: BaseException) -> str:
    """Hydra's own words on one line, for what has no better message."""
    words = [str(e) for e in (exc, exc.__cause__) if e is not None]
    return " ".join(" ".join(words).split())
