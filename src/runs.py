"""Run folders: a new one, or an old one to continue."""

import datetime
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from src.config import NOT_SCIENCE, config_sha, science_diff
from src.types import UserError


@dataclass
class Run:
    """folder: where everything goes; cfg: what counts; resumed: whether the folder was there before."""

    folder: Path
    cfg: DictConfig
    resumed: bool

    def checkpoint(self, arm: str = "") -> Path | None:
        """The newest whole checkpoint of the run or of its arm."""
        from src.checkpoint import newest  # Lightning comes with it, and not every run trains

        return newest(self.folder / arm / "checkpoints") if self.resumed else None


def machine_of(cfg: DictConfig, typed: list[str]) -> DictConfig:
    """The configuration whose hardware the run will have: a resumed run keeps its own, unless it is typed anew."""
    if cfg.resume is None or any(word.lstrip("+~").startswith("hardware") for word in typed):
        return cfg
    folder = unfinished(cfg) if cfg.resume == "auto" else Path(cfg.resume)
    if folder is None or not (folder / "config.yaml").is_file():
        return cfg
    return OmegaConf.load(folder / "config.yaml")


def unfinished(cfg: DictConfig) -> Path | None:
    """The newest unfinished run of this name and science."""
    for folder in sorted((Path(cfg.output_dir) / cfg.name).glob("*/"), reverse=True):
        file = folder / "config.yaml"
        if file.exists() and not (folder / "results.json").exists() and config_sha(OmegaConf.load(file)) == config_sha(cfg):
            return folder
    return None


def trained_run(run: str) -> tuple[DictConfig, Path]:
    """-> configuration and newest checkpoint of a run folder, for whoever uses what it trained. Raises UserError without."""
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"run={run}: no config.yaml there; give a folder that `python -m src.train` printed as `run: ...`")
    from src.checkpoint import newest  # Lightning comes with it: a wrong folder is refused without

    checkpoint = newest(folder / "checkpoints")
    if checkpoint is None:
        raise UserError(f"run={run}: no checkpoint there; continue it: python -m src.train resume={run}")
    return OmegaConf.load(folder / "config.yaml"), checkpoint


def open_run(cfg: DictConfig, typed: list[str]) -> Run:
    """A new run folder, or the one that cfg.resume names ("auto": the newest unfinished one of the same science).

    typed: the overrides of the command line. A resumed run keeps its own configuration; only speed, logging and places
    may be given anew. Raises UserError where there is nothing to resume, or where a typed key would change the science.
    """
    if cfg.resume is None:
        return new_run(cfg)
    if cfg.resume == "auto":
        if folder := unfinished(cfg):
            print(f"resume=auto: continuing {folder}", flush=True)
            return _old(folder, cfg, typed)
        root = Path(cfg.output_dir) / cfg.name
        print(f"resume=auto: no unfinished run of this configuration in {root}, starting a new one", flush=True)
        return new_run(cfg)
    folder = Path(cfg.resume)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"resume={cfg.resume}: no config.yaml there, so it is no run folder; try resume=auto")
    return _old(folder, cfg, typed)


def new_run(cfg: DictConfig) -> Run:
    """A folder of its own below cfg.output_dir, with the configuration in it."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for n in range(100):
        folder = Path(cfg.output_dir) / cfg.name / (stamp if n == 0 else f"{stamp}-{n}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        OmegaConf.save(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)), folder / "config.yaml")
        return Run(folder, cfg, resumed=False)
    raise UserError(f"{folder} exists a hundred times over; give another output_dir")


def _old(folder: Path, cfg: DictConfig, typed: list[str]) -> Run:
    saved = OmegaConf.load(folder / "config.yaml")
    keys = [t.lstrip("+~").split("=")[0] for t in typed]
    if any(not key.startswith(NOT_SCIENCE) for key in keys):
        changed = science_diff(saved, cfg)
        if changed:
            raise UserError(
                f"resume={folder}: these keys differ from the run's own: {', '.join(changed)}; drop them or start a new run"
            )
    with open_dict(saved):
        for part in ("hardware", "logger"):
            if any(key.startswith(part) for key in keys):
                saved[part] = cfg[part]
        saved.budget.stop_at_images = cfg.budget.stop_at_images
        saved.cache_dir = cfg.cache_dir
    return Run(folder, saved, resumed=True)
