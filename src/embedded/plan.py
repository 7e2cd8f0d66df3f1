"""What a configuration of `python -m src.prepare` asks for: which backbone, by which recipe, with whose autoencoder."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from omegaconf import DictConfig

from src.backbones.source import EMBEDDED_ROOT
from src.embedded.claims import claim
from src.embedded.families import FAMILIES, VAE_OWNER, VAE_STEPS, Family
from src.embedded.training import Recipe
from src.types import UserError

BASIS_PICTURES = 4000  # the first renders, and as many maps, that the latent space is fitted to


def out_folder(cfg: DictConfig) -> Path:
    """Where the pipeline goes; null in the configuration is the folder that ships with the project."""
    return Path(cfg.out) if cfg.out else EMBEDDED_ROOT / cfg.backbone.name


def family_of(cfg: DictConfig) -> Family:
    """Raises UserError for a backbone that is none of ours to make."""
    if cfg.backbone.name not in FAMILIES:
        raise UserError(
            f"backbone={cfg.backbone.name} cannot be made here: only the embedded ones are trained from nothing "
            f"({', '.join(FAMILIES)}); others are downloaded when a training names them"
        )
    return FAMILIES[cfg.backbone.name]


def backbone_recipe(cfg: DictConfig) -> Recipe:
    """The family's shipped recipe, with this configuration's seed and steps; a shorter training drops the later restarts."""
    shipped = family_of(cfg).recipe
    steps = cfg.backbone_steps or shipped.steps
    return replace(shipped, seed=cfg.seed, steps=steps, restarts=tuple(r for r in shipped.restarts if r < steps))


def vae_steps(cfg: DictConfig) -> int:
    return cfg.vae_steps or VAE_STEPS


def shared_vae(cfg: DictConfig) -> Path | None:
    """The shipped autoencoder if this preparation takes it over, or None if its own is or will be in the cache folder.

    Raises UserError if the world is too small for the shipped one: another basis makes other latents.
    """
    owner = EMBEDDED_ROOT / VAE_OWNER
    own = cfg.backbone.name == VAE_OWNER or cfg.vae_steps or (Path(cfg.cache_dir) / "vae_out").exists()
    if own or not (owner / "vae").is_dir():
        return None
    if min(cfg.world_images, json.loads((owner / "recipe.json").read_text())["renders"]) < BASIS_PICTURES:
        raise UserError(
            f"world_images={cfg.world_images} spans other latents than those of the autoencoder in {owner}: take at least "
            f"{BASIS_PICTURES}, or train an autoencoder with vae_steps={VAE_STEPS}"
        )
    return owner / "vae"


def claim_cache(cfg: DictConfig) -> None:
    """Refuse a cache folder that holds a preparation with other settings, whose parts would be mixed with this one's."""
    recipe = asdict(backbone_recipe(cfg))
    recipe["restarts"] = list(recipe["restarts"])  # as JSON gives it back
    shared = {"seed": recipe.pop("seed"), "world_images": cfg.world_images, "vae_steps": vae_steps(cfg)}
    claim(Path(cfg.cache_dir), shared, cfg.backbone.name, recipe)
