"""WebDataset shards: tar files of samples whose parts share a name, read at random by an index of offsets.

The index makes a shard as good as a folder: any order, any number of workers and ranks, and a resumed run goes on at the
very next sample. Rows follow the tar files, so whoever reads them in order reads the disk in order.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from src.data.captions import decode_text
from src.data.pairs import refuse_url
from src.data.picture import SUFFIXES, Header
from src.data.records import IMAGE, Records, RecordSource, as_names
from src.data.shard_index import Part, ShardIndex, shard_files
from src.data.signals import SIGNALS, check_signals
from src.data.source import BadSample, Split
from src.types import UserError

LOOKED_AT = 100  # .json members that are searched for a key before it is called unknown


class ShardRecords(Records):
    """path: a tar file, a folder of them, or a pattern: `shards/{00000..00009}.tar`, `shards/*.tar`, `{a,b}/x.tar`.

    image: suffix of the pictures, None where each sample has one picture only beside its signals. caption: the suffix of the
    captions, `txt`, or `json:<key>` for a key of the .json member. signals: name of a signal -> suffix, such as depth.png.
    A sample's id is the text `id` of its .json member, else <shard>/<name>: names may begin anew in each shard. One without
    its picture, or without a map, is a bad sample; shards where all are so are refused.
    """

    def __init__(self, path: str, image: str | None, caption: str, signals: Mapping[str, Any] | None, index_dir: str | None):
        self.where = f"data.path={path!r}"
        self._suffixes = {s: v.lstrip(".").lower() for s, v in as_names(signals).items()}
        self.signals = check_signals([*self._suffixes], "data.signals")
        self._caption_suffix, _, self._caption_key = caption.lstrip(".").partition(":")
        refuse_url(path, self.where)
        self.shards = [ShardIndex.of(file, index_dir) for file in shard_files(path, self.where)]
        self.rows = [(s, i) for s, shard in enumerate(self.shards) for i in range(len(shard.keys))]
        if not self.rows:
            raise UserError(f"{self.where} holds no sample in {len(self.shards)} tar files")
        self._open: dict[int, int] = {}
        self._image = image
        self._image_suffix = [self._picture_of(row) for row in range(len(self.rows))]
        if not any(self._image_suffix):
            count = len(self.rows)
            raise UserError(
                f"{self.where}: {count} of {count} samples are without their picture, such as {self._no_picture(0)}"
            )
        for signal, suffix in self._suffixes.items():
            self._require(suffix, f"data.signals.{signal}={suffix}")
        self._check_captions()
        self.ids = [self._id(row) for row in range(len(self.rows))]
        stats = [shard.file.stat() for shard in self.shards]
        self._stamps = [f"{shard.file.name} {s.st_size} {s.st_mtime_ns}" for shard, s in zip(self.shards, stats, strict=True)]

    def raw(self, row: int, part: str) -> bytes:
        suffix = self._suffix(row, part)
        if suffix is None:
            raise self._no_picture(row)
        if suffix not in self._parts(row):
            reason = f"no such member, which data.signals.{part}={suffix} wants; there are {', '.join(self._parts(row))}"
            raise BadSample(self._member(row, suffix), reason, "add it or remove the sample")
        return self._read(row, suffix)

    def name(self, row: int, part: str) -> str:
        return self._member(row, self._suffix(row, part))

    def caption(self, row: int) -> Any:
        parts, suffix = self._parts(row), self._caption_suffix
        if suffix not in parts:
            return None
        if suffix == "json":
            return self._json(row).get(self._caption_key)
        return decode_text(self._read(row, suffix), self._member(row, suffix))

    def stamp(self, row: int) -> str:
        shard, _ = self.rows[row]
        parts = (self._parts(row).get(self._suffix(row, part), ("none", "")) for part in (IMAGE, *self.signals))
        return f"{self._stamps[shard]} {', '.join(f'{offset}+{size}' for offset, size in parts)}"

    def header(self, row: int) -> Header:
        shard, place = self.rows[row]
        if self._image_suffix[row] is None:
            raise self._no_picture(row)
        found = self.shards[shard].headers[place][self._image_suffix[row]]
        if len(found) == 2:
            raise BadSample(self.name(row, IMAGE), *found)
        return Header(*found)

    def map_size(self, row: int, signal: str) -> tuple[int, int] | None:
        shard, place = self.rows[row]
        found = self.shards[shard].headers[place].get(self._suffixes[signal], [])
        return (found[0], found[1]) if len(found) == 3 and SIGNALS[signal] != "joints" else super().map_size(row, signal)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        for number in getattr(self, "_open", {}).values():
            os.close(number)

    def _suffix(self, row: int, part: str) -> str | None:
        """None where a picture is asked for and cannot be told."""
        return self._image_suffix[row] if part == IMAGE else self._suffixes[part]

    def _parts(self, row: int) -> dict[str, Part]:
        shard, place = self.rows[row]
        return self.shards[shard].parts[place]

    def _member(self, row: int, suffix: str | None) -> str:
        """A member's name; with None that of the whole sample."""
        shard, place = self.rows[row]
        return f"{self.shards[shard].file}: {self.shards[shard].keys[place]}{'' if suffix is None else f'.{suffix}'}"

    def _read(self, row: int, suffix: str) -> bytes:
        shard, _ = self.rows[row]
        offset, size = self._parts(row)[suffix]
        try:
            if shard not in self._open:
                self._open[shard] = os.open(self.shards[shard].file, os.O_RDONLY)
            found = os.pread(self._open[shard], size, offset)  # no shared position: safe in forked workers
        except OSError as error:
            raise BadSample(self._member(row, suffix), f"cannot be read ({error.strerror})", "check the disk") from error
        if len(found) < size:
            raise BadSample(
                self._member(row, suffix), f"ends after {len(found)} of {size} bytes", "start again: its shard changed"
            )
        return found

    def _json(self, row: int) -> dict:
        name = self._member(row, "json")
        try:
            found = json.loads(self._read(row, "json"))
        except ValueError as error:
            raise BadSample(name, f"not JSON ({error})", "mend or remove it") from error
        except RecursionError as error:
            raise BadSample(name, "JSON of too many brackets within brackets", "mend or remove it") from error
        if not isinstance(found, dict):
            raise BadSample(name, f"a {type(found).__name__}, not an object", "write {...}")
        return found

    def _facts(self, row: int) -> dict:
        """The .json member; nothing where there is none that can be read, which its caption, if it holds one, will tell."""
        try:
            return self._json(row) if "json" in self._parts(row) else {}
        except BadSample:
            return {}

    def _id(self, row: int) -> str:
        shard, place = self.rows[row]
        given = self._facts(row).get("id")
        return given if isinstance(given, str) and given else f"{self.shards[shard].file.stem}/{self.shards[shard].keys[place]}"

    def _picture_of(self, row: int) -> str | None:
        """The suffix of a sample's picture; None where `_no_picture` says why there is none."""
        pictures, parts = self._pictures(row), self._parts(row)
        wanted = [self._image.lstrip(".").lower()] if self._image else pictures
        return wanted[0] if len(wanted) == 1 and wanted[0] in parts else None

    def _pictures(self, row: int) -> list[str]:
        maps = self._suffixes.values()
        return [s for s in self._parts(row) if f".{s}" in SUFFIXES and s not in maps]

    def _no_picture(self, row: int) -> BadSample:
        pictures, there = self._pictures(row), ", ".join(self._parts(row))
        fix = "name the one that is meant in data.image" if pictures else "write one picture per sample"
        reason = f"holds {there}: {self._image or f'{len(pictures)} pictures'}, where one is wanted"
        return BadSample(self._member(row, None), reason, fix)

    def _require(self, suffix: str, key: str) -> None:
        """Refuse a suffix that no sample has: then it is a wrong one. Raises UserError."""
        count = len(self.rows)
        if any(suffix in self._parts(row) for row in range(count)):
            return
        there = ", ".join(sorted({s for row in range(count) for s in self._parts(row)}))
        first = ", ".join(self._member(row, suffix) for row in range(min(count, 10)))
        raise UserError(f"{key}: {count} of {count} samples have no such member: {first}; their suffixes are {there}")

    def _check_captions(self) -> None:
        suffix, key = self._caption_suffix, self._caption_key
        if (suffix == "json") != bool(key):
            raise UserError(f"data.caption={suffix}: write txt, or json:<key>, such as json:caption")
        having = [row for row in range(len(self.rows)) if suffix in self._parts(row)]
        self._require(suffix, f"data.caption={suffix}")
        keys = list(dict.fromkeys(name for row in having[:LOOKED_AT] for name in self._facts(row))) if key else []
        if keys and key not in keys:
            there = ", ".join(keys)
            raise UserError(f"data.caption=json:{key}: no such key in the .json members; their keys are {there}")
        self.no_caption = f"no caption in a .{suffix} member"


class ShardSource(RecordSource):
    """WebDataset shards: see `ShardRecords` for its own arguments, `RecordSource` for the rules."""

    form: ClassVar = "shards"

    def __init__(
        self,
        name: str,
        path: str,
        val_images: int,
        split: Split,
        resolution: int,
        *,
        image: str | None = None,
        caption: str = "txt",
        signals: dict[str, str] | None = None,
        index_dir: str | None = None,
        **rules: Any,
    ):
        records = ShardRecords(path, image, caption, signals, index_dir)
        super().__init__(records, name, val_images, split, resolution, **rules)
