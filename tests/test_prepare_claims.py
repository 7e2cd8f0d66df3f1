"""What `python -m src.prepare` refuses, and whose work it takes a cache folder to hold."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from src.config import load
from src.embedded import stages as prepare
from src.embedded.families import FAMILIES
from src.types import UserError


def settings(name: str, cache: Path, *overrides: str):
    return load("prepare", [f"backbone={name}", f"cache_dir={cache}", "world_images=140", *overrides])


def test_only_embedded_backbones_can_be_made(tmp_path):
    with pytest.raises(UserError, match="backbone=sd3_medium cannot be made here"):
        prepare.main(load("prepare", ["backbone=sd3_medium", f"cache_dir={tmp_path}"]))
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_another_recipe_is_refused(tmp_path):
    prepare.claim_cache(settings("sd3_tiny", tmp_path, "vae_steps=5"))
    with pytest.raises(UserError, match="vae_out is not there"):
        prepare.stage_assemble(settings("sd3_tiny", tmp_path, "vae_steps=5"))
    (tmp_path / "vae.pt").touch()
    prepare.claim_cache(settings("sd3_tiny", tmp_path, "vae_steps=5", "workers=0"))
    for name in ("sd3_tiny", "pixart_tiny"):
        with pytest.raises(UserError, match=r"vae_steps=5, not 6: .*delete vae\.pt in"):
            prepare.claim_cache(settings(name, tmp_path, "vae_steps=6"))
    (tmp_path / "vae.pt").unlink()
    prepare.claim_cache(settings("sd3_tiny", tmp_path, "vae_steps=6"))  # nothing is left to be mixed with


def test_backbones_share_a_cache_folder_each_with_its_own_recipe(tmp_path):
    for name, steps in (("sd3_tiny", 4), ("pixart_tiny", 6)):
        prepare.claim_cache(settings(name, tmp_path, f"backbone_steps={steps}"))
        (tmp_path / f"{name}.pt").touch()
    prepare.claim_cache(settings("sd3_tiny", tmp_path, "backbone_steps=4"))
    with pytest.raises(UserError, match=r"pixart_tiny\.steps=6, not 4: .*delete pixart_tiny\.pt in"):
        prepare.claim_cache(settings("pixart_tiny", tmp_path, "backbone_steps=4"))
    with pytest.raises(UserError, match=r"seed=0, not 1: .*delete pixart_tiny\.pt, sd3_tiny\.pt in"):
        prepare.claim_cache(settings("sd21_tiny", tmp_path, "seed=1"))
    claims = json.loads((tmp_path / "prepare.json").read_text())
    assert {name: recipe["steps"] for name, recipe in claims["backbones"].items()} == {"sd3_tiny": 4, "pixart_tiny": 6}


def test_an_earlier_claim_is_that_of_sd3(tmp_path):
    old = {"seed": 0, "world_images": 140, "vae_steps": 3200, "backbone_steps": 22000}
    (tmp_path / "prepare.json").write_text(json.dumps(old) + "\n")
    for file in ("vae.pt", "sd3_tiny.pt", "pixart_tiny.pt"):
        (tmp_path / file).touch()
    prepare.claim_cache(settings("pixart_tiny", tmp_path, "backbone_steps=7"))
    for _ in range(2):  # read from the old form, then from the new one
        with pytest.raises(UserError, match=r"sd3_tiny\.steps=22000, not 4: .*delete sd3_tiny\.pt in"):
            prepare.claim_cache(settings("sd3_tiny", tmp_path, "backbone_steps=4"))
        prepare.claim_cache(settings("sd3_tiny", tmp_path, "backbone_steps=22000"))
    claims = json.loads((tmp_path / "prepare.json").read_text())
    earlier = asdict(FAMILIES["sd3_tiny"].recipe) | {"steps": 22000, "restarts": []}
    assert claims["backbones"]["sd3_tiny"] == {k: v for k, v in earlier.items() if k != "seed"}
    assert claims["backbones"]["pixart_tiny"]["steps"] == 7


def test_too_small_a_world_is_refused(tmp_path):
    with pytest.raises(UserError, match="world_images=100 is too few: the scores want at least 130"):
        prepare.stage_world(settings("sd3_tiny", tmp_path, "world_images=100"))
