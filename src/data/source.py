"""The source interface: where images and captions come from."""

from abc import ABC, abstractmethod
from typing import Literal

from src.types import Sample

Split = Literal["train", "val"]


class Source(ABC):
    """A finite, ordered set of samples. Item i is always the same sample; the order of training is made elsewhere."""

    name: str
    resolution: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, its image (resolution, resolution, 3) uint8."""

    @abstractmethod
    def describe(self, index: int) -> tuple[str, str]:
        """(id, caption) of a sample, without making its image."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A string that changes when any image or caption does: part of every cache's key."""
