"""What the command line names and is not there, refused before torch is imported: with the standard library alone.

It reads words as they were typed; whatever it does not understand is left to the configuration.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

FILES = tuple(f"metrics.{name}_weights" for name in ("inception", "musiq", "maniqa", "lpips"))
SWEEPS = ("-m", "--multirun")


def refuse_absent(words: Sequence[str]) -> None:
    """End the process with a line and exit code 2 if a file of weights, a run folder or a checkpoint is absent."""
    fault = next(absent(words), None)
    if fault is not None:
        print(f"error: {fault}", file=sys.stderr, flush=True)
        raise SystemExit(2)


def absent(words: Sequence[str]) -> Iterator[str]:
    """What is wrong with each word that names nothing. Of a sweep nothing is judged: its cells are other command lines."""
    if any(word in SWEEPS for word in words):
        return
    for key, value in (word.lstrip("+").split("=", maxsplit=1) for word in words if "=" in word):
        named = [part.strip().strip("'\"") for part in value.strip("[]").split(",")]
        named = [name for name in named if name not in ("", "null") and "$" not in name and "\\" not in name]
        if key in FILES:
            yield from (f"{key}={name!r} is not a file" for name in named if not Path(name).expanduser().is_file())
        elif key == "run":
            yield from (
                f"run={name}: there is no such folder; give one that `python -m src.train` printed as `run: ...`"
                for name in named
                if not Path(name).is_dir()
            )
        elif key == "checkpoint":
            yield from (
                f"checkpoint={name} is neither a folder nor a hub id (owner/name); name the folder that `save_pretrained` wrote"
                for name in named
                if not Path(name).exists() and "/" not in name
            )
