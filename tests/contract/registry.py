"""What is registered: every file of conf/adapter, conf/backbone and conf/task, instantiated from its yaml."""

from pathlib import Path

from omegaconf import OmegaConf

from src.config import CONF, load

EMBEDDED_BACKBONES = [
    p.stem
    for p in sorted((Path(CONF) / "backbone").glob("*.yaml"))
    if str(OmegaConf.load(p).get("source", "")).startswith("embedded:")
]


def node(group: str, option: str):
    """The composed node of one option."""
    extra = [f"data.path={CONF}"] if group == "data" and option in ("folder", "hub", "shards") else []
    return load("train", [f"{group}={option}", *extra])[group]
