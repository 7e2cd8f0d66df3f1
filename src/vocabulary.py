"""Words that a configuration is made of, for whoever must not wait for torch: help, and what is refused by its words alone."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

ConditionSpace = Literal["latent", "pixel"]
Checkpointing = Literal["none", "adapter", "both"]  # whose blocks are recomputed in the backward pass
Compile = Literal["none", "frozen", "all"]  # whose blocks torch.compile takes
EIGHT_BIT = ("bitsandbytes.optim.Adam8bit", "bitsandbytes.optim.AdamW8bit")  # others in 8 bits keep other moments
Fit = Literal["refuse", "warn", "auto"]  # what a training does that should not fit the memory
TIME_LAWS = ("native", "cubic")  # at which noise levels an objective is trained: see `src.objectives`
OWN = "auto"  # the solver that every other entry draws with
SOLVERS: dict[str, tuple[str, ...]] = {  # name -> kinds of models that it can solve
    OWN: ("flow", "diffusion"),
    "euler": ("flow",),
    "heun": ("flow",),  # two predictions per step
    "ddim": ("diffusion",),
    "dpmpp_2m": ("flow", "diffusion"),
    "unipc": ("flow", "diffusion"),
}


class UserError(Exception):
    """Something the person at the keyboard can mend: printed as one line, exit code 2, no traceback."""


def resolution_fault(key: str, side: int, multiple: int, largest: int | None, source: str) -> str | None:
    """Why a backbone cannot have pictures of a side in pixels, with the nearest that it can; None if it can.

    key: where it was written; multiple, largest: of `BackboneFacts`; source: whose position embedding ends at largest."""
    if side % multiple or side < multiple:
        low = max(multiple, side // multiple * multiple)
        return f"{key}={side} is not a multiple of {multiple} (autoencoder x patch): use {low} or {low + multiple}"
    if largest is not None and side > largest:
        return f"{key}={side}: the position embedding of {source} ends at {largest} pixels a side"
    return None


@contextmanager
def refused_in_one_line() -> Iterator[None]:
    """Around an entry that is no configured command: a UserError is printed as one line and ends the process with code 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
