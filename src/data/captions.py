"""The rules by which what stands for a caption becomes one.

- Text is kept whole and in its own alphabet: Unicode NFC, line ends as \\n, a byte order mark and outer white space taken
  away. What is too long for a text encoder is cut there, not here, and
  counted when a cache is filled.
- Missing are: nothing, None, NaN, an empty text, the words nan, none and null alone, and numbers. They are counted when a
  source is made, and refused or read as the empty prompt, as `missing_caption` says.
- Of a list, one is drawn by (caption_seed, id); missing ones in it are passed over.
- Files are UTF-8, or UTF-16 with a byte order mark.
"""

import codecs
import math
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from src import rng
from src.data.source import BadSample, note_once
from src.types import UserError

Missing = Literal["refuse", "empty"]
STANDS_FOR_NOTHING = ("nan", "none", "null")


def decode_text(raw: bytes, name: str) -> str:
    """The text of a file. Raises BadSample, naming the first byte that is none."""
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text: byte 0x{raw[error.start]:02x} at {error.start}"
        raise BadSample(name, reason, "save it as UTF-8") from error
    if "\0" in text:
        raise BadSample(name, f"not text: a zero byte at {text.index(chr(0))}", "save it as UTF-8")
    return text


def caption_of(raw: Any, id: str, seed: int) -> str | None:
    """The caption that a raw value stands for; None where it is missing. id, seed: key the choice from a list."""
    if isinstance(raw, np.ndarray):
        raw = raw.tolist()
    if isinstance(raw, Sequence) and not isinstance(raw, str | bytes):
        there = [c for c in (caption_of(r, id, seed) for r in raw) if c is not None]
        return there[rng.key(seed, "caption", id) % len(there)] if there else None
    if not isinstance(raw, str):
        return None
    text = unicodedata.normalize("NFC", raw.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff").strip())
    return None if not text or text.casefold() in STANDS_FOR_NOTHING else text


def why_missing(raw: Any) -> str:
    """What a missing caption was, in a word."""
    if isinstance(raw, float) and math.isnan(raw):
        return "NaN"
    if isinstance(raw, str):
        return f"{raw.strip()!r}" if raw.strip() else "empty"
    if raw is None:
        return "none"
    return f"{raw!r}"[:20] if isinstance(raw, bool | int | float) else f"an empty {type(raw).__name__}"


def settle(
    raws: Sequence[Any], ids: Sequence[str], missing: Missing, seed: int, where: str, no_caption: str = "no caption"
) -> list[str]:
    """One caption per id. Raises UserError with the first 10 ids if some are missing and `missing` is `refuse`.

    where, no_caption: how messages name the data and what it lacks. Counts are told in one line each.
    """
    found = [caption_of(raw, id, seed) for raw, id in zip(raws, ids, strict=True)]
    bare = [i for i, caption in enumerate(found) if caption is None]
    if bare and missing == "refuse":
        first = ", ".join(f"{ids[i]} ({why_missing(raws[i])})" for i in bare[:10])
        raise UserError(
            f"{len(bare)} of {len(ids)} images of {where} have {no_caption}: {first}; "
            "write them, or data.missing_caption=empty to read them as the empty prompt"
        )
    if bare and len(bare) == len(ids):
        note_once(f"captions {where}", f"no image of {where} has a caption: text has no say in what is learned")
    elif bare:
        note_once(f"captions {where}", f"{len(bare)} of {len(ids)} captions of {where} are missing, read as the empty prompt")
    return ["" if caption is None else caption for caption in found]
