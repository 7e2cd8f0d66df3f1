"""The books of a step: bytes of every storage, by category and moment. Works on every device, also on torch's `meta`."""

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GIB = 2**30
CATEGORIES = ("frozen_weights", "trainable_weights", "gradients", "optimizer", "ema", "activations", "temporaries")


@dataclass(frozen=True)
class MemoryEstimate:
    """The largest moment of a step, in GiB; the categories add up to `peak_gib`.

    when: "forward", "backward" or "optimizer". optimizer_gib: the optimizer's state; ema_gib: the averaged copy of the
    adapter. activations_gib: what the forward pass made or was given (noise, latents, captions) and what still lives at
    the peak; temporaries_gib: what the backward pass (recomputation included) or the optimizer step made.
    saved_gib: activations that live when the forward pass ends, wherever the peak is. phases_gib: the peak of each phase.
    """

    peak_gib: float
    when: str
    frozen_weights_gib: float
    trainable_weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    ema_gib: float
    activations_gib: float
    temporaries_gib: float
    saved_gib: float
    phases_gib: dict[str, float]

    @property
    def split_gib(self) -> dict[str, float]:
        """Category -> GiB at the peak."""
        return {category: getattr(self, f"{category}_gib") for category in CATEGORIES}


def describe(estimate: MemoryEstimate) -> str:
    """One line for a person; empty categories are left out."""
    digits = 3 if estimate.peak_gib < 1 else 2
    sizes = {name.replace("_", " "): size for name, size in estimate.split_gib.items()}
    split = ", ".join(f"{name} {size:.{digits}f}" for name, size in sizes.items() if size)
    moment = "the optimizer step" if estimate.when == "optimizer" else f"the {estimate.when} pass"
    return f"estimated peak {estimate.peak_gib:.{digits}f} GiB in {moment} ({split})"


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside it make, from birth to death, and of what it is told to hold.

    live: bytes by category now; peak: those of the largest moment; phases: the largest total of each phase. A storage
    born in phase "forward" is an activation, in any other phase a temporary.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = dict.fromkeys(CATEGORIES, 0)
        self.peak, self.peak_phase, self.phases = dict(self.live), "forward", {}
        self.phase = "forward"
        self._known: dict[int, tuple[str, int, weakref.ref]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.hold("activations" if self.phase == "forward" else "temporaries", out)
        return out

    def hold(self, category: str, tensors: Any) -> None:
        """Count a tensor or lists of them; a storage that is known stays where it is."""
        if isinstance(tensors, (tuple, list)):
            for item in tensors:
                self.hold(category, item)
        elif isinstance(tensors, Tensor) and (key := tensors.untyped_storage()._cdata) not in self._known:
            storage = tensors.untyped_storage()
            self._known[key] = (category, storage.nbytes(), weakref.ref(storage, lambda _: self._forget(key)))
            self.live[category] += storage.nbytes()
            self._compare()

    def reserve(self, category: str, nbytes: int) -> None:
        """Count bytes that no tensor here stands for; they live to the end."""
        self.live[category] += nbytes
        self._compare()

    def move(self, category: str, tensor: Tensor) -> None:
        """Count a known tensor under another category from now on."""
        key = tensor.untyped_storage()._cdata
        old, nbytes, ref = self._known[key]
        self.live[old] -= nbytes
        self.live[category] += nbytes
        self._known[key] = (category, nbytes, ref)

    def begin_phase(self, phase: str) -> None:
        """What lives already counts in the phase that begins, too."""
        self.phase = phase
        self._compare()

    def estimate(self, saved: int) -> MemoryEstimate:
        """What was seen so far; saved: bytes of activations at the end of the forward pass."""
        return MemoryEstimate(
            peak_gib=sum(self.peak.values()) / GIB,
            when=self.peak_phase,
            saved_gib=saved / GIB,
            phases_gib={k: v / GIB for k, v in self.phases.items()},
            **{f"{k}_gib": v / GIB for k, v in self.peak.items()},
        )

    def _forget(self, key: int) -> None:
        category, nbytes, _ = self._known.pop(key)
        self.live[category] -= nbytes

    def _compare(self) -> None:
        total = sum(self.live.values())
        self.phases[self.phase] = max(total, self.phases.get(self.phase, 0))
        if total > sum(self.peak.values()):
            self.peak, self.peak_phase = dict(self.live), self.phase
