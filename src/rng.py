"""Random numbers keyed by (seed, stream, index): the same image sees the same draws on any batch size or machine.

Paired randomness is what makes two methods comparable sample by sample, and a resumed run equal an uninterrupted one:
there is no generator state to save. Everything is drawn on the CPU and moved.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def key(seed: int, stream: str, index: int | str) -> int:
    """A 63-bit number from (seed, stream, index); unlike sums of seeds, near indices share nothing."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, stream: str, index: int) -> torch.Generator:
    """A fresh CPU generator for one draw of one image."""
    return torch.Generator().manual_seed(key(seed, stream, index))


def normal(seed: int, stream: str, indices: list[int], shape: tuple[int, ...]) -> Tensor:
    """(len(indices), *shape) standard normal numbers, one independent generator per index."""
    return torch.stack([torch.randn(shape, generator=generator(seed, stream, i)) for i in indices])


def uniform(seed: int, stream: str, indices: list[int]) -> Tensor:
    """(len(indices),) numbers in [0, 1), float64: a t so drawn keeps its precision near both ends."""
    return torch.tensor([key(seed, stream, i) / 2**63 for i in indices], dtype=torch.float64)


def permutation(seed: int, stream: str, index: int, count: int) -> np.ndarray:
    """A permutation of range(count), for example the order of one epoch."""
    return np.random.default_rng(key(seed, stream, index)).permutation(count)


def wrong_row(row: int, count: int) -> int:
    """The image whose condition stands in for the wrong one: half the set away."""
    return (row + count // 2) % count
