"""The source interface: where images and captions come from, and how a source says that one of them is bad."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from src.types import Sample, UserError

Split = Literal["train", "val"]


class BadSample(UserError):
    """One sample that cannot be read as it should be. The message is one line: `id: reason; fix`.

    id: of the sample, or the file that is wrong; reason: what is wrong, with the value; fix: what to do about it.
    """

    def __init__(self, id: str, reason: str = "", fix: str = ""):
        if not reason:  # a loader's worker hands on one text, the traceback, whose last line is the message
            line = (id.strip().splitlines() or [""])[-1].rpartition(f"{type(self).__name__}: ")[2]
            id, _, rest = line.partition(": ")
            reason, _, fix = rest.rpartition("; ")
        super().__init__(f"{id}: {reason}; {fix}")
        self.id, self.reason, self.fix = id, reason, fix

    def __reduce__(self) -> tuple:
        return type(self), (self.id, self.reason, self.fix)


class BadPair(BadSample):
    """A map that does not belong to its image: each can be read, and together they make no sample."""


@dataclass(frozen=True)
class Probe:
    """What is known of a sample without decoding it.

    size: (height, width) of its picture as it stands on disk, turned upright; None where the header cannot be read.
    kind: format and mode, such as "JPEG RGB" or "PNG I;16". problems: all that is wrong, as far as headers and captions
    tell; a picture that is cut in the middle is found by reading it only.
    """

    id: str
    caption: str
    size: tuple[int, int] | None
    kind: str = ""
    problems: tuple[BadSample, ...] = ()


class Source(ABC):
    """A finite, ordered set of samples. Item i is always the same sample; the order of training is made elsewhere.

    signals: names of the exact maps in `Sample.signals`; every sample carries all of them.
    on_bad_sample, max_bad_share: what the run wants to happen when `source[i]` raises `BadSample`: `raise` stops it, `skip`
    asks for `src.data.tolerant.tolerant`, which puts a good sample in its place and stops above that share of bad ones.
    A source itself always raises.
    copies: rows in a run that come of the same files, as a picture and its mirror image do: bad together or not at all.
    are_scenes: whether its pictures are the project's own rendered scenes, which the scene probe can see.
    """

    name: str
    resolution: int
    signals: tuple[str, ...] = ()
    on_bad_sample: Literal["raise", "skip"] = "raise"
    max_bad_share: float = 0.0
    copies: int = 1
    are_scenes: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, its image (height, width, 3) uint8 of the size that `size_of` says.

        Raises BadSample where its picture or one of its maps cannot be read whole, IndexError outside of 0..len-1.
        """

    @abstractmethod
    def describe(self, index: int) -> tuple[str, str]:
        """(id, caption) of a sample, without making its image. Ids are unique within a source."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A string that changes when any image, map or caption does, or how they are read."""

    def pictures_fingerprint(self) -> str:
        """The same without the captions, which latents and conditions do not depend on: part of their caches' keys."""
        return self.fingerprint()

    def size_of(self, index: int) -> tuple[int, int]:
        """(height, width) of the image that `source[index]` gives; differs between samples only with aspect buckets."""
        return self.resolution, self.resolution

    def probe(self, index: int) -> Probe:
        """What can be said of a sample in well under a millisecond: for lists of 10,000. Never raises BadSample."""
        id, caption = self.describe(index)
        return Probe(id, caption, self.size_of(index))


_faults: list[list[UserError]] = []


@contextmanager
def faults_kept() -> Iterator[list[UserError]]:
    """Inside of the block `refuse_set` keeps its errors in the list that this gives, and raises none: for reports."""
    kept: list[UserError] = []
    _faults.append(kept)
    try:
        yield kept
    finally:
        _faults.pop()


def refuse_set(error: UserError) -> None:
    """Raise an error that is no single sample's, such as unequal numbers of images and maps; see `faults_kept`."""
    if not _faults:
        raise error
    if str(error) not in map(str, _faults[-1]):  # both splits are made of the same files
        _faults[-1].append(error)


_noted: set[str] = set()


def note_once(topic: str, line: str) -> None:
    """Print what is worth a line once per topic, however many samples it is true of (each worker has its own once)."""
    if topic not in _noted:
        _noted.add(topic)
        print(f"note: {line}", flush=True)
