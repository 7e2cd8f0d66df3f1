"""Where a process stands among those that train one run, and what they tell each other beside gradients.

The words are torch's: a rank is one process with one device; rank 0 leads. What is told goes over gloo, through the host's
memory, so that no step waits for a GPU.
"""

import datetime
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from src.types import UserError

T = TypeVar("T")
BEAT_S = 5.0  # while the others wait for long work of the first


def device_count(hardware: Mapping[str, Any]) -> int:
    """How many processes train a run, on all nodes together."""
    return hardware["devices"] * hardware["nodes"]


def is_rank(env: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher (ours, or torchrun) started this process as one of several."""
    return "LOCAL_RANK" in env and "WORLD_SIZE" in env


class RankFailed(Exception):
    """Another rank failed at what all of them wait for; it tells why."""


@dataclass(frozen=True)
class Ranks:
    """One process among `count`. local: its number on its own node; group: over which they talk; None for one alone.

    cuts: whether each may draw pictures of its own while the others draw theirs. Where weights are sharded, every rank has
    to take part in every forward pass.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    group: Any = None
    cuts: bool = True

    @property
    def first(self) -> bool:
        """Whether this process leads: it alone writes files and logs."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.count > 1

    def agree(self, value: T) -> T:
        """The first rank's value, on all."""
        if not self.several:
            return value
        told = [value if self.first else None]
        torch.distributed.broadcast_object_list(told, src=0, group=self.group)
        return told[0]

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in the order of ranks, on all."""
        if not self.several:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        if not self.several:
            return flag
        told = torch.tensor(int(flag))
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(told)

    def mean(self, values: Sequence[float]) -> list[float]:
        """Element by element, over all ranks. Every rank gives as many."""
        if not self.several or not values:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total, group=self.group)
        return (total / self.count).tolist()

    def wait(self) -> None:
        """Return when all have come here."""
        if self.several:
            torch.distributed.barrier(group=self.group)

    def first_does(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first rank, on all. Raises its error there, and `RankFailed` on the others."""
        return self.first_works(lambda _: work())

    def first_works(self, work: Callable[[Callable[[], None]], T]) -> T:
        """`first_does` of what may take longer than ranks wait for each other: work calls what it is given whenever it has got
        on a little, and the others hear of it every `BEAT_S`."""
        if not self.several:
            return work(lambda: None)
        value, error, told = None, None, time.monotonic()

        def beat() -> None:
            nonlocal told
            if time.monotonic() - told > BEAT_S:
                self.agree((False, None, None))
                told = time.monotonic()

        if self.first:
            try:
                value = work(beat)
            except Exception as found:
                error = found
        done, fault = False, None if error is None else f"{type(error).__name__}: {error}"
        while not done:
            done, value, fault = self.agree((True, value, fault))
        if error is not None:
            raise error
        if fault is not None:
            raise RankFailed(fault)
        return value

    def mine(self, rows: Sequence[int], batch: int) -> list[int]:
        """This rank's part of rows that are worked on `batch` at a time: whole batches in turn, so that each picture has the
        neighbours that it has with one process, and the same last bit."""
        if not self.cuts:
            return list(rows)
        return [row for place, row in enumerate(rows) if place // batch % self.count == self.rank]


ALONE = Ranks()


def join(hardware: Mapping[str, Any]) -> Ranks:
    """Meet the other ranks of a resolved hardware profile. A process alone is `ALONE`. Raises UserError where the number of
    processes that were started is not the number of devices."""
    count = device_count(hardware)
    if not is_rank():
        if count > 1:
            asked = f"hardware.devices={hardware['devices']}"
            raise UserError(f"{asked}: start it with `python -m src.train`, which makes a process for each device")
        return ALONE
    started, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if started != count:
        asked = f"hardware.devices={hardware['devices']} hardware.nodes={hardware['nodes']}"
        raise UserError(f"{asked}: {started} processes were started for {count} devices; start as many as there are devices")
    limit, on_gpu = datetime.timedelta(seconds=hardware["timeout_s"]), hardware["accelerator"] == "gpu"
    if on_gpu:
        torch.cuda.set_device(local)
    if not torch.distributed.is_initialized():
        more = {"device_id": torch.device("cuda", local)} if on_gpu else {}
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=limit, **more)
    talk = torch.distributed.new_group(backend="gloo", timeout=limit)
    cuts = hardware["strategy"] != "fsdp"
    return Ranks(torch.distributed.get_rank(), count, local, talk, cuts)


def leave() -> None:
    """Close the connections of a run that has ended well."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def whole(value: Tensor) -> Tensor:
    """A plain tensor of what may lie in parts on all ranks, as the norm of sharded gradients; all must ask."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def local_part(value: Tensor) -> Tensor:
    """What this rank has of a tensor that may be sharded."""
    return value.to_local() if hasattr(value, "to_local") else value
