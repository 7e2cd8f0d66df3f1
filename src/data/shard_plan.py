"""What each shard holds: which rows, and as which bytes.

A shard is a pure function of the sources and its number: its rows follow from `plan_shards`, its members have a fixed order
and no time stamp.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from src import rng
from src.data.cache import mib
from src.data.locks import WholeFile
from src.data.signals import SIGNALS
from src.data.source import Source
from src.types import Sample, UserError

SHARDS_VERSION = 1  # raise it when the bytes of a shard change
MEASURED = 64  # samples from which the size of all is estimated
TAR_RECORD = tarfile.RECORDSIZE
PICTURES = {"png": {}, "jpg": {"quality": 95, "subsampling": 0}}  # Pillow's options; jpg loses a little


@dataclass(frozen=True)
class ShardPlan:
    """What goes where. sources: written one behind the other; rows_per_shard: from `plan_shards`."""

    out: Path
    sources: tuple[Source, ...]
    picture: str
    rows_per_shard: int

    @property
    def rows(self) -> int:
        return sum(map(len, self.sources))

    @property
    def count(self) -> int:
        """Of shards."""
        return -(-self.rows // self.rows_per_shard)

    def path(self, shard: int) -> Path:
        return self.out / f"{shard:05d}.tar"

    def rows_of(self, shard: int) -> range:
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.rows))

    def sample(self, row: int) -> Sample:
        for source in self.sources:
            if row < len(source):
                return source[row]
            row -= len(source)
        raise IndexError(f"row {row} behind the end")

    def missing(self) -> list[int]:
        return [shard for shard in range(self.count) if not self.path(shard).exists()]


def plan_shards(sources: Sequence[Source], out: Path, shard_mib: float, picture: str, say: Callable[[str], None]) -> ShardPlan:
    """Settle how many rows a shard has, from the size of `MEASURED` drawn samples, and leave it in plan.json.

    Raises UserError if plan.json is of another source or other settings, or the disk has no room.
    """
    whole = ShardPlan(out, tuple(sources), picture, 1)
    wanted = {
        "version": SHARDS_VERSION,
        "sources": [source.fingerprint() for source in sources],
        "signals": list(sources[0].signals),
        "picture": picture,
        "shard_mib": shard_mib,
    }
    file = out / "plan.json"
    if file.exists():
        found = json.loads(file.read_text())
        other = [key for key in wanted if found.get(key) != wanted[key]]
        if other:
            was = ", ".join(f"{key}={found.get(key)}, not {wanted[key]}" for key in other)
            raise UserError(f"out={out} holds shards with {was}; name another folder, or delete that one")
        plan = ShardPlan(out, whole.sources, picture, found["rows_per_shard"])
        each = found["bytes_per_row"]
    else:
        drawn = rng.permutation(0, "shards", 0, whole.rows)[:MEASURED]
        each = float(np.mean([sum(512 + -(-len(d) // 512) * 512 for _, d in members(whole.sample(r), picture)) for r in drawn]))
        plan = ShardPlan(out, whole.sources, picture, max(1, round((shard_mib * 2**20 - TAR_RECORD / 2) / each)))
    left = plan.missing()
    left_bytes = int(each * sum(len(plan.rows_of(shard)) for shard in left))
    if left:
        at = f"{plan.rows} samples, about {mib(int(each * plan.rows))} in {plan.count} shards of {plan.rows_per_shard} in {out}"
        say(at if len(left) == plan.count else f"{at}, {len(left)} of them to do")
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if left_bytes > (free := shutil.disk_usage(there).free):
        raise UserError(
            f"out={out}: about {mib(left_bytes)} are to be written and the disk has {mib(free)} free; name another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    with WholeFile(file) as part:
        part.write_text(
            json.dumps({**wanted, "rows_per_shard": plan.rows_per_shard, "bytes_per_row": round(each, 1)}, indent=1) + "\n"
        )
    return plan


# ---- one shard --------------------------------------------------------------------------------------------------------


def members(sample: Sample, picture: str) -> list[tuple[str, bytes]]:
    """(suffix, bytes) of a sample's files, in their order in a shard: the picture, its caption, its id, its signals."""
    found = [(picture, _encoded(sample.image, picture)), ("txt", sample.caption.encode())]
    found.append(("json", json.dumps({"id": sample.id}, ensure_ascii=False).encode()))
    return found + [(suffix_of(name), _signal_bytes(name, sample.signals[name])) for name in sorted(sample.signals)]


def suffix_of(signal: str) -> str:
    """How a signal's file ends: pictures and labels are lossless PNG, numbers .npy."""
    return f"{signal}.{'npy' if SIGNALS.get(signal, 'depth') in ('depth', 'joints') else 'png'}"


def _signal_bytes(name: str, values: np.ndarray) -> bytes:
    if suffix_of(name).endswith("png"):
        return _encoded(values, "png")
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def _encoded(picture: np.ndarray, form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, {"png": "PNG", "jpg": "JPEG"}[form], **PICTURES[form])
    return buffer.getvalue()


def write_shard(plan: ShardPlan, shard: int) -> None:
    """Put one shard in place, whole; the caller holds its lock, or another process writes the same bytes."""
    with WholeFile(plan.path(shard)) as part, tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in plan.rows_of(shard):
            for suffix, content in members(plan.sample(row), plan.picture):
                entry = tarfile.TarInfo(f"{row:08d}.{suffix}")  # its owner, mode and time are constants
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
