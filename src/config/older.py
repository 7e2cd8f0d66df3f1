"""Configurations of stored runs, brought to the keys of today."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.config.compose import CONF
from src.config.rules import of_today

LATER_CALLBACKS = ("guard", "vitals")  # since run format 2


def brought_up(saved: DictConfig) -> DictConfig:
    """The configuration of a run of format 1 as one of today: words where there were switches, and the callbacks and keys of
    callbacks that came later, at what they stand at today. None of them changes what is learned."""
    cfg = OmegaConf.to_container(saved, resolve=True)
    today: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(CONF / "callbacks" / "default.yaml"))
    nodes = cfg.get("callbacks") or {}
    for name, node in today.items():
        if name in nodes and nodes[name] and nodes[name].get("_target_") == node["_target_"]:
            nodes[name] = {**node, **nodes[name]}
        elif name in LATER_CALLBACKS and nodes:
            nodes[name] = node
    if cfg.get("validation"):
        cfg["validation"].setdefault("seed", cfg["seed"])  # it was the run's own
    if cfg.get("hardware"):
        cfg["hardware"] = of_today(cfg["hardware"])
    return OmegaConf.create(cfg)
