"""Where a number comes from: versions, commit and command, without paths and secrets of the machine."""

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.results.checks import plain

PACKAGES = ("torch", "diffusers", "transformers", "pytorch_lightning", "numpy")
HIDDEN = "<hidden>"
_SECRET_NAME = re.compile(r"(^|[_\-.+])(api_?key|access_?key|auth|token|secret|passwd|password|credentials?)$", re.IGNORECASE)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")  # as the hub makes them
_URL_USER = re.compile(r"(?<=://)[^/\s@]+@")
_ABSOLUTE = re.compile(r"(?:(?<=file://)|(?<![\w.:/~\-]))/[^\s,'\"\]\}=:]+")


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


def origin(root: str | Path) -> dict[str, Any]:
    """Command, commit and versions of this process; root: the checkout."""
    sha, dirty = git_state(root)
    return {"command": command_line(), "git_sha": sha, "git_dirty": dirty, "versions": environment()}


def dated_origin(root: str | Path) -> dict[str, Any]:
    """The same with the time of now, as rows of results have it."""
    return {**origin(root), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


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


def without_places(text: str) -> str:
    """A text with its absolute paths shortened as in a command line, so that no file tells how a machine is laid out."""
    return _ABSOLUTE.sub(_short_path, text)


def _short_path(match: re.Match) -> str:
    """Relative to the working folder or the home folder; of any other place only the last name."""
    path = Path(match.group())
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_relative_to(base) and base != Path("/"):
            return prefix + path.relative_to(base).as_posix()
    return f".../{path.name}"


def hide_secrets(value: Any, name: str = "") -> Any:
    """A copy fit for a file or a server: no value under a name like hf_token or api_key, no value of such an environment
    variable, no token of the hub, no user in a URL."""
    if isinstance(value, Mapping):
        return {key: hide_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_secrets(item, name) for item in value]
    if value and _SECRET_NAME.search(name):
        return HIDDEN
    if isinstance(value, str):
        return _URL_USER.sub("", _without(value, _secrets()))
    return plain(value)


def scrub(file: Path) -> None:
    """Hide the keys and tokens in a log that a process wrote, line by line. Leaves it alone where it cannot be written."""
    secrets, part = _secrets(), file.with_name(f".{file.name}.part")
    try:
        with file.open("r", encoding="utf-8", errors="surrogateescape", newline="") as log:
            if all(line == _without(line, secrets) for line in log):
                return
            log.seek(0)
            with part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as clean:
                clean.writelines(_without(line, secrets) for line in log)
        os.replace(part, file)
    except OSError:
        part.unlink(missing_ok=True)


def _secrets() -> list[str]:
    """The values of environment variables that are named like a key, the longest first: one may hold another."""
    found = {value for name, value in os.environ.items() if len(value) >= 8 and _SECRET_NAME.search(name)}
    return sorted(found, key=len, reverse=True)


def _without(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return _TOKEN.sub(HIDDEN, text)
