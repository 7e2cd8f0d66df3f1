"""Whose work a cache folder holds: parts that were made with other settings are never mixed with this preparation's.

prepare.json names the settings that all backbones of the folder share, and the recipe of each backbone. A claim counts while
one of its files is there; without them there is nothing to mix.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.results import write_atomic
from src.types import UserError

VAE_FILES = ("vae.pt", "vae.jsonl", "vae_out")
# what an earlier prepare.json does not say: it knew one backbone, of this name, and only its number of steps varied
OLD_NAME, OLD_RECIPE = "sd3_tiny", {"restarts": [], "batch": 32, "lr": 1.2e-3, "warmup": 300, "ema_decay": 0.9995}


def backbone_files(name: str) -> tuple[str, str, str]:
    """File names in the cache folder: checkpoint to go on from, log, and final weights."""
    return f"{name}.pt", f"{name}.jsonl", f"{name}.pt.final"


def claim(cache: Path, shared: Mapping[str, Any], name: str, recipe: Mapping[str, Any]) -> None:
    """Enter a backbone's preparation in prepare.json.

    shared: settings of everything in the folder; recipe: of the backbone `name` alone. Raises UserError if the folder holds
    files of this backbone, or of anything for `shared`, that were made with others.
    """
    path = cache / "prepare.json"
    theirs = _read(path)
    names = sorted({*theirs["backbones"], name})
    mine = backbone_files(name)
    every = [*VAE_FILES, *(file for n in names for file in backbone_files(n))]
    if theirs["shared"] is not None and _present(cache, every):
        _refuse_others(path, theirs["shared"], shared, "", _present(cache, every))
    if name in theirs["backbones"] and _present(cache, mine):
        _refuse_others(path, theirs["backbones"][name], recipe, f"{name}.", _present(cache, mine))
    content = {**shared, "backbones": {**theirs["backbones"], name: dict(recipe)}}
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def _read(path: Path) -> dict[str, Any]:
    """-> {"shared": settings or None, "backbones": name -> recipe}; reads the form with one `backbone_steps`, too."""
    if not path.exists():
        return {"shared": None, "backbones": {}}
    content = json.loads(path.read_text())
    backbones = content.pop("backbones", {})
    if "backbone_steps" in content:
        backbones = {OLD_NAME: {"steps": content.pop("backbone_steps"), **OLD_RECIPE}}
    return {"shared": content, "backbones": backbones}


def _present(cache: Path, files: tuple[str, ...] | list[str]) -> list[str]:
    return [file for file in files if (cache / file).exists()]


def _refuse_others(path: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any], prefix: str, files: list[str]) -> None:
    keys = [*mine, *(key for key in theirs if key not in mine)]
    other = [f"{prefix}{key}={theirs.get(key)}, not {mine.get(key)}" for key in keys if theirs.get(key) != mine.get(key)]
    if other:
        raise UserError(
            f"{path} is of a preparation with {'; '.join(other)}: name another folder with cache_dir=<folder>, "
            f"or delete {', '.join(files)} in {path.parent}"
        )
