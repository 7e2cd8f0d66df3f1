"""A copy of a run's logs in Weights & Biases, which may be absent, unreachable, slow or broken at any moment."""

import logging
import netrc
import os
import secrets
import socket
import threading
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from pytorch_lightning.loggers.logger import DummyExperiment
from pytorch_lightning.utilities import rank_zero_only

from src.loggers.aside import Aside
from src.loggers.base import RunLogger, scalar_row
from src.results import hide_secrets, plain, write_atomic
from src.types import UserError

log = logging.getLogger(__name__)

MODES = {"auto": "auto", "online": "online", "offline": "offline", "disabled": "disabled", "run": "online", "dryrun": "offline"}
CONNECT_S, INIT_S, FINISH_S = 3.0, 10.0, 120.0  # the longest waits for a server
MOST_WAITING = 1000  # calls that W&B has not taken yet: then it hangs


class WandbRun(RunLogger):
    """Any exception from W&B costs one warning line and switches it off for the rest of this run. It is called from a thread
    of its own, so that no step waits for it, even if it hangs.

    All of its files, staged tables and caches included, lie in <run_dir>/wandb, so that the folder can be moved and
    synced elsewhere. A resumed run keeps its W&B id. Checkpoints are never handed over, nor anything that may hold a key:
    sys.argv, the console, the git remote.
    """

    def __init__(self, cfg: Any, run_dir: Path, run_name: str, config: Mapping[str, Any], tags: Sequence[str]) -> None:
        super().__init__(run_dir, run_name)
        self._logger: Any = None
        self._environ: dict[str, str | None] = {}
        self._aside: Aside | None = None
        asked, why = asked_mode(cfg.mode)
        if rank_zero_only.rank != 0:
            return
        if asked == "disabled":
            log.info("W&B disabled: %s", why)
            return
        try:
            import wandb
        except ImportError:
            log.warning("W&B is not installed (pip install wandb): this run has its local logs only")
            return
        try:
            self._begin(wandb, asked, why, cfg, hide_secrets(config), list(tags))
        except Exception as error:
            self._switch_off("could not start", error)

    def _begin(self, wandb: Any, asked: str, why: str, cfg: Any, config: dict[str, Any], tags: list[str]) -> None:
        from pytorch_lightning.loggers import WandbLogger

        if wandb.run is not None:  # a second run in one process must not continue the first
            wandb.finish()
        folder = self.run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        for name, place in {"WANDB_DATA_DIR": folder / "data", "WANDB_CACHE_DIR": folder / "cache"}.items():
            self._environ[name] = os.environ.get(name)
            os.environ[name] = str(place)
        mode, why = (asked, why) if asked == "offline" else reachable(server())
        options = {"id": _run_id(folder / "run-id.txt"), "resume": "allow", "dir": str(self.run_dir), "config": config}
        group = cfg.group or os.environ.get("WANDB_RUN_GROUP")  # which a sweep sets for its cells
        options |= {"project": cfg.project, "entity": cfg.entity, "group": group, "tags": tags, "name": self.name}
        quiet = {"silent": True, "console": "off", "disable_git": True, "x_disable_meta": True, "save_code": False}
        waits = {"init_timeout": INIT_S, "finish_timeout": FINISH_S, "x_transaction_log_flush_interval": 0.5}
        options |= {"settings": wandb.Settings(**quiet, **waits)}
        try:
            run = wandb.init(mode=mode, **options)
        except Exception as error:
            if mode == "offline":
                raise
            mode, why = "offline", f"the server refused or was too slow ({_first_line(error)})"
            wandb.teardown(1)  # until then the id counts as in use
            run = wandb.init(mode=mode, **options)
        run.define_metric("images_seen")
        run.define_metric("*", step_metric="images_seen")
        self._aside = Aside("wandb", MOST_WAITING)
        self._logger = WandbLogger(project=cfg.project, save_dir=str(self.run_dir), experiment=run)
        if mode == "offline":
            log.warning("W&B offline: %s; to upload later: wandb sync %s/offline-run-*", why, _near(folder))
        else:
            log.info("W&B online: %s", run.url)

    @property
    def experiment(self) -> Any:
        """The live wandb run, or a dummy that takes any call."""
        return self._logger.experiment if self._logger else DummyExperiment()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send one row of scalars with its images_seen. Raises TypeError for no scalar."""
        row = scalar_row(metrics, step)
        self._guard(lambda: self._logger.log_metrics(row))

    @rank_zero_only
    def log_grid(self, name: str, path_png: str | Path, images_seen: int) -> None:
        """Send the picture."""
        self._guard(lambda: self._logger.log_metrics({name: _picture(path_png), "images_seen": int(images_seen)}))

    @rank_zero_only
    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], images_seen: int) -> None:
        """Send the table, its paths as pictures."""

        def send() -> None:
            import wandb

            data = [[_picture(cell) if isinstance(cell, Path) else plain(cell) for cell in row] for row in rows]
            self._logger.log_metrics({name: wandb.Table(columns=list(columns), data=data), "images_seen": int(images_seen)})

        self._guard(send)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Lightning's call after each fit and validate: a failed run ends here, a good one stays open until `close`."""
        if status != "success":
            self.close(status)

    @rank_zero_only
    def close(self, status: str = "success") -> None:
        """Finish the W&B run, within two minutes; what is logged later goes to the local files only."""
        if self._logger is not None and self._aside is not None:
            run, code = self._logger.experiment, 0 if status in ("success", "finished") else 1
            if not (self._aside.put(lambda: _finish(run, code, log.warning)) and self._aside.drain(FINISH_S + 5)):
                log.warning("W&B did not finish within %g s: to upload what it has, wandb sync", FINISH_S)
                _end_service()
        self._logger = None
        self._restore()

    def _guard(self, send: Callable[[], None]) -> None:
        logger = self._logger

        def tried() -> None:
            if self._logger is logger:
                try:
                    send()
                except Exception as error:
                    self._switch_off("failed", error)

        if logger is not None and not self._aside.put(tried):
            self._switch_off("hangs", TimeoutError(f"{MOST_WAITING} calls wait for it"))
            _end_service()

    def _switch_off(self, what: str, error: Exception) -> None:
        log.warning("W&B %s and is off for this run, the local logs are whole: %s", what, _first_line(error))
        if self._logger is not None:  # finishing may wait for a server: not in the way of the next step
            run = self._logger.experiment
            threading.Thread(target=_finish, args=(run, 1, log.debug), daemon=True).start()
        self._logger = None
        self._restore()

    def _restore(self) -> None:
        for name, value in self._environ.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._environ = {}


def asked_mode(configured: str) -> tuple[str, str]:
    """(auto | online | offline | disabled, where it was said). WANDB_MODE wins over the config."""
    said = os.environ.get("WANDB_MODE", "").strip()
    where, mode = ("WANDB_MODE", said) if said else ("logger.mode", configured)
    if mode not in MODES:
        raise UserError(f"{where} is {mode!r}; use one of auto, online, offline, disabled")
    if said and configured not in ("auto", said):
        log.warning("WANDB_MODE=%s wins over logger.mode=%s", said, configured)
    return MODES[mode], f"{where}={mode}"


def server() -> str:
    """The address that W&B itself takes from the environment and its settings."""
    import wandb

    return wandb.setup().settings.base_url


def reachable(base_url: str) -> tuple[str, str]:
    """Online or offline, and why not online: a key and an answering host are both needed. At most CONNECT_S seconds."""
    url = urlsplit(base_url)
    if not _has_key(url):
        return "offline", f"no key for {url.hostname} (run wandb login, or set WANDB_API_KEY)"
    if not _connects(url):
        return "offline", f"{url.hostname} did not answer within {CONNECT_S:g} s"
    return "online", ""


def _has_key(url: SplitResult) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for place in (Path(place).expanduser() for place in places):
        try:
            entries = netrc.netrc(place)
        except (OSError, netrc.NetrcParseError):
            continue
        # the public service answers under two names, and a key for the older one is good for both
        names = [url.netloc, "api.wandb.ai"] if (url.hostname or "").endswith(".coreweave.com") else [url.netloc]
        return any(entries.authenticators(name) for name in names)
    return False


def _connects(url: SplitResult) -> bool:
    """A TCP connection to the host, or to the proxy that leads to it. In a thread: a name server may hang for minutes."""
    proxy = None if urllib.request.proxy_bypass(url.hostname or "") else urllib.request.getproxies().get(url.scheme)
    target = urlsplit(proxy if "//" in proxy else f"//{proxy}") if proxy else url
    address = (target.hostname, target.port or (443 if target.scheme == "https" else 80))
    answered = threading.Event()

    def attempt() -> None:
        try:
            socket.create_connection(address, timeout=CONNECT_S).close()
            answered.set()
        except OSError:
            pass

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(CONNECT_S)
    return answered.is_set()


def _run_id(path: Path) -> str:
    """The id of this run folder's W&B run, kept from the first start on; a sweep agent gives its own."""
    if not os.environ.get("WANDB_RUN_ID") and path.exists():
        return path.read_text().strip()
    run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    write_atomic(path, f"{run_id}\n".encode())
    return run_id


def _picture(path: str | Path) -> Any:
    """uint8 on purpose: wandb 0.31 turns floats in [0, 1] black."""
    import wandb
    from PIL import Image

    with Image.open(path) as image:
        return wandb.Image(image.convert("RGB"))


def _finish(run: Any, exit_code: int, say: Callable[..., None]) -> None:
    try:
        run.finish(exit_code=exit_code)
    except Exception as error:
        say("W&B did not finish: %s", _first_line(error))


def _end_service() -> None:
    """End W&B's own process, which hangs: Python would wait for it at the end of this one."""
    try:
        import wandb

        wandb.setup()._connection._proc._process.kill()  # no public name leads there
    except Exception as error:
        log.debug("W&B's service is left alone: %s", _first_line(error))


def _near(folder: Path) -> str:
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def _first_line(error: Exception) -> str:
    return hide_secrets(f"{type(error).__name__}: {error}".splitlines()[0])
