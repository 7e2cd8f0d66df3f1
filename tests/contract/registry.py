"""What is registered: every file of conf/adapter, conf/backbone and conf/task, instantiated from its yaml."""

from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from src.config import CONF, load

EMBEDDED_BACKBONES = [
    p.stem
    for p in sorted((Path(CONF) / "backbone").glob("*.yaml"))
    if str(OmegaConf.load(p).get("source", "")).startswith("embedded:")
]


@cache
def _composed(entry: str, words: tuple[str, ...]):
    return load(entry, words)


def configured(entry: str, *words: str):
    """`load` for words that many tests share: composed once, which takes a third of a second; each gets a copy of its own."""
    return _composed(entry, words).copy()


def node(group: str, option: str):
    """The composed node of one option."""
    extra = [f"data.path={CONF}"] if group == "data" and option in ("folder", "hub", "shards") else []
    return configured("train", f"{group}={option}", *extra)[group]
