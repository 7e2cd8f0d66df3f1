"""`results.json`: what one run found and under which conditions. `report` joins these files and reads nothing else."""

import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from src.types import UserError

SCHEMA_VERSION = 1
PACKAGES = ("torch", "diffusers", "transformers", "pytorch_lightning", "numpy")
HIDDEN = "<hidden>"
_SECRET_NAME = re.compile(r"(^|[_\-.+])(api_?key|access_?key|auth|token|secret|passwd|password|credentials?)$", re.IGNORECASE)
_URL_USER = re.compile(r"(?<=://)[^/\s@]+@")
_ABSOLUTE = re.compile(r"(?:(?<=file://)|(?<![\w.:/~\-]))/[^\s,'\"\]\}=:]+")


class ResultError(UserError):
    """A result that must not be written or compared; the message names the field."""


@dataclass
class Result:
    """One run. Sizes in millions of parameters, times in the unit of the name; None only where "or None" is said.

    backbone: {id, revision, hash}; trainable_parts_m: part of the adapter -> millions; flags: everything that changes
    speed or memory without changing the method (checkpointing, compile, micro_batch, ...), never empty.
    metrics: name -> {value, n, unit, better: "higher" | "lower" | None, ci95: [low, high] | None}.
    step_time_ms, img_per_s, peak_mem_gib: None where not measured. arms: control arm -> metrics of that arm, or None.
    git_sha: "unknown" outside a checkout; git_dirty: None when not known. command: as typed, without absolute paths.
    """

    experiment: str
    adapter: str
    backbone: dict[str, Any]
    task: str
    seed: int
    images_seen: int
    effective_batch: int
    resolution: int
    trainable_m: float
    frozen_m: float
    trainable_parts_m: dict[str, float]
    train_seconds: float
    step_time_ms: float | None
    img_per_s: float | None
    peak_mem_gib: float | None
    device: str
    precision: str
    flags: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    config_sha: str
    git_sha: str
    versions: dict[str, str]
    date: str
    command: str
    arms: dict[str, dict[str, dict[str, Any]]] | None = None
    git_dirty: bool | None = None
    schema_version: int = SCHEMA_VERSION


def write_results(path: str | Path, result: Result | Mapping[str, Any]) -> None:
    """Check a result and put it at `path` in one step: the old file stays whole until the new one is on the disk.

    Raises ResultError naming the field that is missing, unknown, of the wrong kind or not finite.
    """
    checked = check_result(asdict(result) if isinstance(result, Result) else result)
    write_atomic(Path(path), (json.dumps(asdict(checked), indent=2, allow_nan=False) + "\n").encode())


def read_results(path: str | Path) -> Result:
    """Read and check one results.json. Raises ResultError naming the file and the field."""
    try:
        return check_result(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}; give the path of a results.json") from None
    except ValueError as error:
        raise ResultError(f"{path} is not JSON ({error}); it was cut off or edited: run the evaluation again") from None
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None


def check_result(raw: Mapping[str, Any]) -> Result:
    """A mapping -> Result with plain Python numbers. Raises ResultError."""
    if not isinstance(raw, Mapping):
        raise ResultError(f"a result is a mapping of fields, got {type(raw).__name__}")
    raw = plain(raw)
    if raw.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise ResultError(f"schema_version is {raw['schema_version']!r}, this code reads {SCHEMA_VERSION}: evaluate again")
    known = {field.name: field for field in fields(Result)}
    for name in raw.keys() - known.keys():
        raise ResultError(f"{name} is not a field of a result; known are {', '.join(known)}")
    for name, field in known.items():
        if name not in raw and field.default is MISSING:
            raise ResultError(f"{name} is missing")
    result = Result(**raw)
    for name in ("experiment", "adapter", "task", "device", "precision", "config_sha", "git_sha", "command"):
        _text(name, getattr(result, name))
    for name, least in {"seed": 0, "images_seen": 0, "effective_batch": 1, "resolution": 1}.items():
        _number(name, getattr(result, name), least, whole=True)
    for name in ("trainable_m", "frozen_m", "train_seconds", "step_time_ms", "img_per_s", "peak_mem_gib"):
        if getattr(result, name) is not None or name not in ("step_time_ms", "img_per_s", "peak_mem_gib"):
            _number(name, getattr(result, name), 0)
    for name in ("id", "revision", "hash"):
        _text(f"backbone.{name}", _mapping("backbone", result.backbone).get(name))
    for name, value in _mapping("trainable_parts_m", result.trainable_parts_m).items():
        _number(f"trainable_parts_m.{name}", value, 0)
    for name, value in _mapping("versions", result.versions, empty=False).items():
        _text(f"versions.{name}", value)
    _all_finite("flags", _mapping("flags", result.flags, empty=False))
    if result.git_dirty is not None and not isinstance(result.git_dirty, bool):
        raise ResultError(f"git_dirty is {result.git_dirty!r}, wanted true, false or null")
    _date("date", result.date)
    _metrics("metrics", result.metrics)
    for arm, metrics in _mapping("arms", result.arms or {}).items():
        _metrics(f"arms.{arm}", metrics)
    return result


def _metrics(where: str, metrics: Any) -> None:
    for name, entry in _mapping(where, metrics).items():
        at = f"{where}.{name}"
        if not isinstance(entry, dict):
            raise ResultError(f"{at} is {entry!r}, wanted {{value, n, unit, better, ci95}}: a number carries its conditions")
        for key in sorted(entry.keys() ^ {"value", "n", "unit", "better", "ci95"}):
            fault = "is not a field of a metric" if key in entry else "is missing: a number carries its conditions"
            raise ResultError(f"{at}.{key} {fault}")
        _number(f"{at}.value", entry["value"])
        _number(f"{at}.n", entry["n"], 1, whole=True)
        if not isinstance(entry["unit"], str):
            raise ResultError(f"{at}.unit is {entry['unit']!r}, wanted a text ('' for a number without a unit)")
        if entry["better"] not in ("higher", "lower", None):
            raise ResultError(f"{at}.better is {entry['better']!r}, wanted 'higher', 'lower' or null")
        if entry["ci95"] is not None:
            if not isinstance(entry["ci95"], list) or len(entry["ci95"]) != 2:
                raise ResultError(f"{at}.ci95 is {entry['ci95']!r}, wanted [low, high] or null")
            low, high = (_number(f"{at}.ci95", bound) for bound in entry["ci95"])
            if low > high:
                raise ResultError(f"{at}.ci95 is {entry['ci95']}: low is above high")


def _number(name: str, value: Any, least: float | None = None, whole: bool = False) -> float:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ResultError(f"{name} is {value!r}, wanted {'a whole number' if whole else 'a number'}")
    if not math.isfinite(value):
        raise ResultError(f"{name} is {value}: a result holds finite numbers only")
    if least is not None and value < least:
        raise ResultError(f"{name} is {value}, wanted at least {least}")
    return value


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ResultError(f"{name} is {value!r}, wanted a text" if value is not None else f"{name} is missing")


def _mapping(name: str, value: Any, empty: bool = True) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) and key for key in value):
        raise ResultError(f"{name} is {value!r}, wanted a mapping from names")
    if not value and not empty:
        raise ResultError(f"{name} is empty: a number carries its conditions")
    return value


def _all_finite(name: str, value: Any) -> None:
    if isinstance(value, float):
        _number(name, value)
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        _all_finite(f"{name}.{key}", item)


def _date(name: str, value: Any) -> None:
    try:
        if datetime.fromisoformat(value).utcoffset() == timedelta(0):
            return
    except (TypeError, ValueError):
        pass
    raise ResultError(f"{name} is {value!r}, wanted ISO 8601 in UTC, as datetime.now(UTC).isoformat(timespec='seconds')")


def plain(value: Any) -> Any:
    """Numbers of numpy and torch -> Python, tuples -> lists, paths -> text; everything else as it is."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside the target, flush to the disk, rename: a reader or a crash sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSONL log. A torn last line, left by a killed process, is left out; any other is a ResultError."""
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if line and number < len(lines):
                raise ResultError(f"{path}, line {number} is not JSON: {line[:60]!r}; mend or delete the line") from None
    return rows


def environment() -> dict[str, str]:
    """Versions of what a number depends on, without importing any of it."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def git_state(root: str | Path) -> tuple[str, bool]:
    """(commit, whether the tree differs from it, new files included); ("unknown", False) outside a checkout."""
    outputs = []
    for arguments in (["rev-parse", "--verify", "HEAD"], ["status", "--porcelain"]):
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return "unknown", False
        outputs.append(done.stdout.strip())
    return outputs[0], bool(outputs[1])


def command_line() -> str:
    """The command of this process as a person would type it: the module for its file, no absolute paths, no secrets."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = f"-m {spec.name.removesuffix('.__main__')}" if spec else _ABSOLUTE.sub(_short_path, sys.argv[0])
    arguments = []
    for argument in sys.argv[1:]:
        name, equals, value = argument.partition("=")
        shown = f"{name}={HIDDEN}" if equals and value and _SECRET_NAME.search(name) else hide_secrets(argument)
        arguments.append(shlex.quote(_ABSOLUTE.sub(_short_path, shown)))
    return " ".join(["python", program, *arguments])


def _short_path(match: re.Match) -> str:
    """Relative to the working folder or the home folder; of any other place only the last name."""
    path = Path(match.group())
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_relative_to(base) and base != Path("/"):
            return prefix + path.relative_to(base).as_posix()
    return f".../{path.name}"


def hide_secrets(value: Any, name: str = "") -> Any:
    """A copy fit for a file or a server: no value under a name like hf_token or api_key, no value of such an environment
    variable, no user in a URL."""
    if isinstance(value, Mapping):
        return {key: hide_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_secrets(item, name) for item in value]
    if value and _SECRET_NAME.search(name):
        return HIDDEN
    if isinstance(value, str):
        for variable, secret in os.environ.items():
            if len(secret) >= 8 and _SECRET_NAME.search(variable):
                value = value.replace(secret, HIDDEN)
        return _URL_USER.sub("", value)
    return plain(value)
