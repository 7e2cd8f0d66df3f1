"""Where the numbers of a JSON file beside the rows come from, and the folder that it is left in."""

import datetime
import json
from pathlib import Path
from typing import Any

from src.bench.flags import torch_flags
from src.profiling.device import device_name
from src.results import dated_origin, write_atomic

ROOT = Path(__file__).resolve().parents[2]


def origin(on_gpu: bool) -> dict[str, Any]:
    """Command, commit, versions, date and device of this process."""
    return {**dated_origin(ROOT), "device": device_name(on_gpu)}


def origin_of_times(on_gpu: bool) -> dict[str, Any]:
    """The same with torch's switches, for numbers that were taken in this process."""
    return {"flags": torch_flags(), **origin(on_gpu)}


def stamped(output_dir: str | Path, name: str) -> Path:
    """Make the folder <output_dir>/<name>/<stamp>."""
    folder = Path(output_dir) / name / datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    folder.mkdir(parents=True)
    return folder


def leave(told: dict[str, Any], folder: Path) -> None:
    """Write `told` as <kind>.json, in one step."""
    write_atomic(folder / f"{told['kind']}.json", json.dumps(told, indent=1).encode())
