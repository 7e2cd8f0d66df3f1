"""How long captions are to a text encoder, where its tokenizer is on this machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.types import UserError

CLIP_TOKENS = 77  # what CLIP reads of a caption, with the marks of its beginning and end
FILES = ("tokenizer.json", "vocab.json")  # either is enough


def token_counts(captions: Sequence[str], tokenizer: str | None) -> dict[str, Any] | None:
    """{"limit", "beyond": captions that are cut, "longest": tokens}; None without a tokenizer on this machine.

    tokenizer: a folder, or a hub id, which is looked for in the hub's cache and never downloaded. Raises UserError for a
    folder that holds none.
    """
    folder = _folder(tokenizer) if tokenizer else None
    if folder is None:
        return None
    from transformers import AutoTokenizer

    try:
        reader = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"tokenizer={tokenizer}: cannot be read ({' '.join(str(error).split())[:120]})") from error
    lengths = [len(ids) for ids in reader(list(captions), verbose=False)["input_ids"]]
    return {"limit": CLIP_TOKENS, "beyond": sum(n > CLIP_TOKENS for n in lengths), "longest": max(lengths)}


def _folder(tokenizer: str) -> Path | None:
    folder = Path(tokenizer).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in FILES):
            raise UserError(f"tokenizer={tokenizer}: no {' or '.join(FILES)} there; name a tokenizer's own folder")
        return folder
    if tokenizer.startswith((".", "/", "~")):
        raise UserError(f"tokenizer={tokenizer} is not a folder")
    from huggingface_hub import try_to_load_from_cache

    for name in FILES:
        found = try_to_load_from_cache(tokenizer, name)
        if isinstance(found, str):
            return Path(found).parent
    return None
