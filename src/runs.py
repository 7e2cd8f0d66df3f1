"""Run folders: a new one, or an old one to continue. One process at a time trains in a folder."""

import datetime
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from src.config import NOT_SCIENCE, brought_up, config_sha, science_diff
from src.data.locks import RowLocks
from src.events import Heart, last_beat
from src.results import hide_secrets, write_atomic
from src.vocabulary import UserError

# 1: until hardware.compile and hardware.checkpointing became words, without run.json; 2: with guard and vitals
RUN_FORMAT = 2


@dataclass
class Run:
    """folder: where everything goes; cfg: what counts; resumed: whether the folder was there before."""

    folder: Path
    cfg: DictConfig
    resumed: bool

    def checkpoint(self, arm: str = "") -> Path | None:
        """The newest whole checkpoint of the run or of its arm; for whoever holds the run (`held`)."""
        from src.checkpoint import newest, tidy  # Lightning comes with it, and not every run trains

        if not self.resumed:
            return None
        tidy(self.folder / arm / "checkpoints")
        return newest(self.folder / arm / "checkpoints")


def machine_of(cfg: DictConfig, typed: list[str]) -> DictConfig:
    """The configuration whose hardware the run will have: a resumed run keeps its own, unless it is typed anew."""
    if cfg.resume is None or any(word.lstrip("+~").startswith("hardware") for word in typed):
        return cfg
    folder = unfinished(cfg, speaks=False) if cfg.resume == "auto" else Path(cfg.resume)
    if folder is None or not (folder / "config.yaml").is_file():
        return cfg
    return stored_config(folder)


def unfinished(cfg: DictConfig, speaks: bool = True) -> Path | None:
    """The newest unfinished run of this name and science."""
    for folder in sorted((Path(cfg.output_dir) / cfg.name).glob("*/"), reverse=True):
        left = (folder / "config.yaml").exists() and not (folder / "results.json").exists()
        if left and _sha_of(folder, speaks) == config_sha(cfg):
            return folder
    return None


def config_of(run: str) -> Path:
    """The stored configuration of a run folder. Raises UserError where there is none."""
    file = Path(run) / "config.yaml"
    if not file.is_file():
        raise UserError(f"run={run}: no config.yaml there; give a folder that `python -m src.train` printed as `run: ...`")
    return file


def trained_run(run: str) -> tuple[DictConfig, Path]:
    """-> configuration and newest checkpoint of a run folder, for whoever uses what it trained. Raises UserError without."""
    folder = config_of(run).parent
    from src.checkpoint import newest  # Lightning comes with it: a wrong folder is refused without

    checkpoint = newest(folder / "checkpoints")
    if checkpoint is None:
        raise UserError(f"run={run}: no checkpoint there; continue it: python -m src.train resume={run}")
    return stored_config(folder), checkpoint


def stored_config(folder: Path) -> DictConfig:
    """The configuration of a run folder as one of today, whatever the format it was stored in. Raises UserError for a format
    that came after this version."""
    file = folder / "run.json"
    try:
        found = json.loads(file.read_text())["format"] if file.exists() else 1
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} cannot be read; it says in which format the run is stored: put it back") from None
    if found not in range(1, RUN_FORMAT + 1):
        raise UserError(f"{folder} has run format {found}, this version reads 1 to {RUN_FORMAT}; use the version that made it")
    cfg = OmegaConf.load(folder / "config.yaml")
    return cfg if found == RUN_FORMAT else brought_up(cfg)


@contextmanager
def held(runs: Sequence["Run"]) -> Iterator[None]:
    """Inside, the folders are this process's. The kernel lets go of them with the process, however it ends.

    Raises UserError if another process trains in one of them.
    """
    locks = [RowLocks(run.folder) for run in runs]
    try:
        for run, lock in zip(runs, locks, strict=True):
            if not lock.take(range(1)):
                beat = last_beat(run.folder)
                who = f" ({beat['pid']} on {beat['host']}, last seen {beat['time']})" if beat else ""
                raise UserError(f"{run.folder}: another process{who} trains in this run folder; wait for it, or stop it")
            if not lock.work:
                print(f"{run.folder}: no locks on this file system; see to it that no other process trains here", flush=True)
            Heart(run.folder).beat(None, None, "starting")
        yield
    finally:
        for lock in locks:
            lock.close()


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


def _sha_of(folder: Path, speaks: bool) -> str | None:
    """The identity of a stored run; None, and a line, for one that this version cannot read."""
    try:
        return config_sha(stored_config(folder))
    except UserError as error:
        if speaks:
            print(f"resume=auto: passed over: {error}", flush=True)
        return None


def new_run(cfg: DictConfig) -> Run:
    """A folder of its own below cfg.output_dir, with the configuration in it."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for n in range(100):
        folder = Path(cfg.output_dir) / cfg.name / (stamp if n == 0 else f"{stamp}-{n}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        write_atomic(folder / "run.json", (json.dumps({"format": RUN_FORMAT}) + "\n").encode())
        # nothing to hide is left in a checked configuration (src/config/checks.py); this is the second lock on that door
        text = OmegaConf.to_yaml(OmegaConf.create(hide_secrets(OmegaConf.to_container(cfg, resolve=True))))
        write_atomic(folder / "config.yaml", text.encode())
        return Run(folder, cfg, resumed=False)
    raise UserError(f"{folder} exists a hundred times over; give another output_dir")


def _old(folder: Path, cfg: DictConfig, typed: list[str]) -> Run:
    saved = stored_config(folder)
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
        if "data.allow_outside" in keys:
            saved.data.allow_outside = cfg.data.allow_outside
    return Run(folder, saved, resumed=True)
