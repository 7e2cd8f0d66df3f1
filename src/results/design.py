"""What a training was of, read from its configuration: the method's own keys, how it was trained, and on which data.

Kept in results, so that ablations and seeds are told apart where the configuration beside them is gone. Nothing in it names a
place on the machine.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import PurePath
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.config import CONF

NO_OPTIONS = ("_target_", "name", "params_match")  # of an adapter: what `params_match` chose stands in its other keys
RATE = "optimizer.algorithm.lr"
LEARNING = ("learning_rate", "recipe", "caption_dropout")  # what is said of every training beside its adapter's keys
OTHERS = ("time_law", "ema_decay", "reuse")
WHOLE = ("optimizer.", "feature_cache.", "budget.images")
UNNAMED = (RATE, "optimizer.algorithm._partial_", "optimizer.algorithm.fused", "feature_cache.budget_gib")
PLACES = ("path", "table", "index_dir")  # of data: where they lie
OTHER = "other"  # a recipe that has no file


def flat(tree: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay whole."""
    if not (isinstance(tree, Mapping) and tree):
        return {key: tree}
    return {k: v for name, item in tree.items() for k, v in flat(item, f"{key}.{name}" if key else str(name)).items()}


def design_of(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's options by their own names (copy, flow, ...), `LEARNING`, and the rest of how it was trained by dotted key.

    A key that the configuration lacks, as older ones do, is left out.
    """
    keys = flat(_plain(cfg))
    found = {k.removeprefix("adapter."): v for k, v in keys.items() if k.startswith("adapter.")}
    found = {k: v for k, v in found.items() if k not in NO_OPTIONS}
    if "caption_dropout" in keys:
        found |= {"learning_rate": keys.get(RATE), "recipe": recipe_of(keys), "caption_dropout": keys["caption_dropout"]}
    return found | {k: v for k, v in keys.items() if k in OTHERS or (k.startswith(WHOLE) and k not in UNNAMED)}


def options_of(design: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's own options in a design: what a benchmark of the same method has as `adapter_options`."""
    return {k: v for k, v in design.items() if k not in (*LEARNING, *OTHERS) and not k.startswith(WHOLE)}


def data_of(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any] | None:
    """The data's name and settings, without the folders above them; None where the configuration names none."""
    node = _plain(cfg).get("data")
    if node is None:
        return None
    found = {k: v for k, v in flat(node).items() if k not in ("_target_", "index_dir")}
    return {k: PurePath(v).name if isinstance(v, str) and (k in PLACES or v.startswith("/")) else v for k, v in found.items()}


def noise_seed_of(cfg: DictConfig | Mapping[str, Any]) -> int | None:
    """The seed of the noise that held-out images are drawn from; before it had a key of its own, that of the training."""
    tree = _plain(cfg)
    return (tree.get("validation") or {}).get("seed", tree.get("seed"))


def recipe_of(keys: Mapping[str, Any]) -> str:
    """The file of conf/recipe with whose every value these dotted keys agree, apart from the learning rate; the one that says
    most, if several do. `OTHER` for none."""
    fits = [(len(wanted), name) for name, wanted in _recipes().items() if all(keys.get(k) == v for k, v in wanted.items())]
    return max(fits)[1] if fits else OTHER


@cache
def _recipes() -> dict[str, dict[str, Any]]:
    read = {file.stem: OmegaConf.to_container(OmegaConf.load(file)) for file in sorted((CONF / "recipe").glob("*.yaml"))}
    read = {name: node for name, node in read.items() if node.keys() - {"defaults"}}  # `own` names one of the others
    bases = {name: [base for base in node.pop("defaults", []) if isinstance(base, str)] for name, node in read.items()}
    own = {name: {k: v for k, v in flat(node).items() if k != RATE} for name, node in read.items()}
    return {name: {**{k: v for base in bases[name] for k, v in own[base].items()}, **own[name]} for name in read}


def _plain(cfg: DictConfig | Mapping[str, Any]) -> Mapping[str, Any]:
    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
