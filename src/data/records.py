"""What folder, hub and shards have in common: raw records in a fixed order, and the source that makes samples of them.

Everything that headers and captions tell is checked when a source is made, much of it by `src.data.set_checks`; pictures are
decoded when they are asked for.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from src.data import captions, picture, signals
from src.data.framing import Aspect, Crop, Framing, Small
from src.data.set_checks import Scan, check_pair, check_shapes, refuse_bad, refuse_twins, split_rows, without_small
from src.data.source import BadSample, Probe, Source, Split
from src.types import Sample, UserError

READING_VERSION = 3  # part of every fingerprint: raise it when a rule of picture, signals, captions or framing changes
IMAGE = "image"  # the part of a record that is no signal


class Records(ABC):
    """The files of a data set as they stand, in a fixed order; nothing is decoded.

    ids: one per record, unique. signals: names of the maps that every record has. where: how messages name the data set;
    no_caption: what they say of one record, or of several, without one.
    """

    ids: list[str]
    signals: tuple[str, ...] = ()
    where: str
    no_caption: str = "no caption"

    @abstractmethod
    def raw(self, row: int, part: str) -> Any:
        """A path or bytes of the image or of a signal; nested lists where a data set holds joints as such."""

    @abstractmethod
    def name(self, row: int, part: str) -> str:
        """How messages call this file."""

    @abstractmethod
    def caption(self, row: int) -> Any:
        """The raw caption. Raises BadSample where it cannot be read."""

    @abstractmethod
    def stamp(self, row: int) -> str:
        """Changes when the image or a signal does."""

    def header(self, row: int) -> picture.Header:
        """Of the image. Raises BadSample."""
        return picture.header(self.raw(row, IMAGE), self.name(row, IMAGE))

    def map_size(self, row: int, signal: str) -> tuple[int, int] | None:
        """(height, width) of a map, None for joints. Raises BadSample."""
        return signals.map_size(signal, self.raw(row, signal), self.name(row, signal))


class RecordSource(Source):
    """Samples of records: the last `val_images` are held out. Raises UserError for whatever can be refused from headers.

    Ids are those of the records; a mirrored twin's ends in `~flip`.
    Rules of training images: crop, crop_seed, flip (doubles the rows: 2i is the picture, 2i + 1 its mirror image, with its
    signals), buckets (see `Framing`). Held-out images are squares cropped in the middle and never mirrored.
    Rules of both: small_images: what becomes of pictures that must grow to fill their frame;
    aspect: `refuse` pictures that lose an edge to the crop; matte: the colour behind transparency; missing_caption,
    caption_seed: see `captions`. on_bad_sample, max_bad_share: see `Source`; with `skip`, unreadable headers are no reason
    to refuse the whole. are_scenes: see `Source`.
    """

    injected: ClassVar = ("records",)
    form: ClassVar[str]

    def __init__(
        self,
        records: Records,
        name: str,
        val_images: int,
        split: Split,
        resolution: int,
        *,
        crop: Crop = "center",
        crop_seed: int = 0,
        flip: bool = False,
        buckets: list[list[int]] | None = None,
        small_images: Small = "upscale",
        aspect: Aspect = "crop",
        matte: str = "white",
        missing_caption: captions.Missing = "refuse",
        caption_seed: int = 0,
        on_bad_sample: Literal["raise", "skip"] = "raise",
        max_bad_share: float = 0.01,
        are_scenes: bool = False,
    ):
        self.name, self.resolution, self.records, self.signals = name, resolution, records, records.signals
        self.matte, self.on_bad_sample, self.max_bad_share = matte, on_bad_sample, max_bad_share
        self.are_scenes = are_scenes
        picture.check_matte(matte)
        if not 0 <= max_bad_share < 1:
            raise UserError(f"data.max_bad_share={max_bad_share:g} is not a share; write a number from 0 to below 1")
        train = split == "train"
        sizes = None if buckets is None else tuple(tuple(b) for b in buckets)
        self.framing = Framing(resolution, crop if train else "center", crop_seed, sizes if train else None)
        self.copies = 2 if train and flip else 1
        self._missing, self._caption_seed = missing_caption, caption_seed

        rows = list(range(len(records.ids)))
        scans = [self._scan(r) for r in rows] if small_images == "drop" else None
        if scans:
            rows = without_small(rows, scans, self.framing, records.where)
        self.rows = split_rows(rows, val_images, split, records.where)
        refuse_twins(records.ids, records.where)
        self._scans = [scans[r] if scans else self._scan(r) for r in self.rows]
        if on_bad_sample == "raise":
            refuse_bad(self._scans, records.where)
        squared = not train and sizes is not None  # scores are compared on squares, whatever shapes are trained on
        ids = [records.ids[r] for r in self.rows]
        check_shapes(ids, self._scans, self.framing, small_images, "crop" if squared else aspect, records.where)
        self._captions = self._read_captions()

    def __len__(self) -> int:
        return len(self.rows) * self.copies

    def __getitem__(self, index: int) -> Sample:
        place, flip = self._place(index)
        row, scan = self.rows[place], self._scans[place]
        if isinstance(scan, BadSample):
            raise scan
        id, caption = self.describe(index)
        name = self.records.name(row, IMAGE)
        image = picture.read_rgb(self.records.raw(row, IMAGE), name, self.matte)
        size = image.shape[:2]
        if size != (scan.height, scan.width):
            was = f"{size[1]} x {size[0]} pixels, where its header said {scan.width} x {scan.height}"
            raise BadSample(name, was, "save it again, and start again if it was changed meanwhile")
        frame = self.framing.frame(size, self.records.ids[row], flip)
        maps = {}
        for signal in self.signals:
            raw, file = self.records.raw(row, signal), self.records.name(row, signal)
            values = signals.read_map(signal, raw, file, self.matte)
            if signals.SIGNALS[signal] != "joints":
                check_pair(file, signal, values.shape[:2], size)
            maps[signal] = frame.signal(signal, values)
        return Sample(id=id, image=frame.apply(image), caption=caption, signals=maps)

    def describe(self, index: int) -> tuple[str, str]:
        place, flip = self._place(index)
        id = self.records.ids[self.rows[place]]
        return (f"{id}~flip" if flip else id), self._captions[place]

    def fingerprint(self) -> str:
        return self._digest(self._captions)

    def pictures_fingerprint(self) -> str:
        return self._digest([""] * len(self.rows))

    def _digest(self, captions: Sequence[str]) -> str:
        digest = hashlib.blake2b(digest_size=8)
        rules = {**self.framing.settings(), "matte": self.matte, "copies": self.copies, "reading": READING_VERSION}
        digest.update(f"{sorted(rules.items())}{self.signals}\n".encode())
        for row, caption in zip(self.rows, captions, strict=True):
            digest.update(f"{self.records.ids[row]}|{caption}|{self.records.stamp(row)}\n".encode())
        return f"{self.form}-{digest.hexdigest()}-{self.resolution}px-n{len(self)}"

    def size_of(self, index: int) -> tuple[int, int]:
        """(height, width) of the image that `source[index]` gives: its bucket, or the square; a square also where the
        header is bad, and then nothing is given."""
        scan = self._scans[self._place(index)[0]]
        if isinstance(scan, BadSample):
            return self.resolution, self.resolution
        return self.framing.target((scan.height, scan.width))

    def probe(self, index: int) -> Probe:
        place, _ = self._place(index)
        row, scan = self.rows[place], self._scans[place]
        id, caption = self.describe(index)
        problems = [scan] if isinstance(scan, BadSample) else []
        try:
            raw = self.records.caption(row)
            if captions.caption_of(raw, id, self._caption_seed) is None:
                why = captions.why_missing(raw) if raw is not None else self.records.no_caption
                problems.append(BadSample(id, f"its caption is missing ({why})", "write it"))
        except BadSample as bad:
            problems.append(bad)
        header = None if isinstance(scan, BadSample) else scan
        size, kind = ((header.height, header.width), header.kind) if header else (None, "")
        return Probe(id, caption, size, kind, tuple(problems))

    def _place(self, index: int) -> tuple[int, bool]:
        """(place in self.rows, whether it is the mirrored twin)"""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.records.where}")
        return index // self.copies, index % self.copies == 1

    def _scan(self, row: int) -> Scan:
        """The image's header, after those of its maps were compared with it."""
        try:
            found = self.records.header(row)
            for signal in self.signals:
                size = self.records.map_size(row, signal)
                if size is not None:
                    check_pair(self.records.name(row, signal), signal, size, (found.height, found.width))
        except BadSample as bad:
            return bad
        return found

    def _read_captions(self) -> list[str]:
        raws: dict[int, Any] = {}
        for place, row in enumerate(self.rows):
            try:
                raws[place] = self.records.caption(row)
            except BadSample as bad:
                self._scans[place] = bad
        if self.on_bad_sample == "raise":
            refuse_bad(self._scans, self.records.where)
        ids = [self.records.ids[self.rows[p]] for p in raws]
        where, rules = self.records.where, (self._missing, self._caption_seed)
        found = captions.settle(list(raws.values()), ids, *rules, where, self.records.no_caption)
        there = dict(zip(raws, found, strict=True))
        return [there.get(p, "") for p in range(len(self.rows))]


def column(columns: Sequence[str], wanted: str, key: str, where: str) -> str:
    """A column by its name. Raises UserError, listing those that are there."""
    if wanted not in columns:
        raise UserError(f"{key}={wanted}: {where} has no such column; its columns are {', '.join(columns)}")
    return wanted


def as_names(given: Mapping[str, Any] | None) -> dict[str, str]:
    """A mapping of the configuration as a plain dictionary of words."""
    return {str(k): str(v) for k, v in (given or {}).items()}
