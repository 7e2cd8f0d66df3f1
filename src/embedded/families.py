"""The embedded backbones: what each is trained as, how long, and how its stock pipeline wants to be loaded and called."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, PixArtAlphaPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline

from src.embedded.pixart import TinyPixArt
from src.embedded.sd3 import TinySD3
from src.embedded.sd21 import TinySD21
from src.embedded.text import TEXT_TOKENS
from src.embedded.training import Recipe, TinyModel
from src.types import UserError

VAE_OWNER, VAE_STEPS = "sd3_tiny", 3200  # who learns the autoencoder that all of them hold, and for how long


@dataclass(frozen=True)
class Family:
    """model: what is trained; recipe: as shipped, for seed 0; pipeline: the stock class that loads the folder.

    load, call: keyword arguments of its `from_pretrained` and of each call, without which it would do something else than
    what was trained, or nothing at all.
    """

    model: type[TinyModel]
    recipe: Recipe
    pipeline: type[DiffusionPipeline]
    load: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    "sd3_tiny": Family(
        TinySD3,
        Recipe(steps=36_000, restarts=(22_000,), lr=1.2e-3),
        StableDiffusion3Pipeline,
        load={"text_encoder_3": None, "tokenizer_3": None},  # the one way to add no T5 token at all, as in training
        call={"max_sequence_length": 0},
    ),
    "pixart_tiny": Family(
        TinyPixArt,
        Recipe(steps=34_000, restarts=(18_000,), lr=1.2e-3),
        PixArtAlphaPipeline,
        call={  # the pipeline knows aspect ratios of 256 to 2048 pixels only; cleaning captions wants packages of its own
            "use_resolution_binning": False,
            "clean_caption": False,
            "max_sequence_length": TEXT_TOKENS,
        },
    ),
    "sd21_tiny": Family(TinySD21, Recipe(steps=20_000, lr=1.0e-3), StableDiffusionPipeline),
}


def of_pipeline(class_name: str) -> str:
    """Name of the family whose folder a stock pipeline class loads. Raises UserError if there is none."""
    for name, family in FAMILIES.items():
        if family.pipeline.__name__ == class_name:
            return name
    known = ", ".join(family.pipeline.__name__ for family in FAMILIES.values())
    raise UserError(f"no embedded backbone is a {class_name}; they are of the classes {known}")


def of_folder(folder: str | Path) -> str:
    """Name of the family that a pipeline folder holds, whatever the folder is called."""
    return of_pipeline(json.loads((Path(folder) / "model_index.json").read_text())["_class_name"])
