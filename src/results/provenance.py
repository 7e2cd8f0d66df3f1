"""Where a number comes from: versions, commit and command, without paths and secrets of the machine."""

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
