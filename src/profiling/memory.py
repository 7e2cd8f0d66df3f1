"""How much memory a training step will take, told before any weight is read and without a device.

Backbone and adapter are built from the configuration on torch's `meta` device, where tensors have a shape and no data.
One real forward and backward pass of the adapter's own loss then runs on them, while `StorageTracker` keeps the books.

The estimate is a sum of tensor sizes, to be compared with `torch.cuda.max_memory_allocated`. Not in it: the CUDA context,
workspaces of cuBLAS, cuDNN and attention kernels, rounding and gaps of the allocator, buckets of multi-device training,
the text encoders, the autoencoder, and whatever validation needs.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from src.backbones.base import Backbone
from src.types import BackboneFacts, Batch, ConditionSpace, TextCond

GIB = 2**30
CATEGORIES = ("frozen_weights", "trainable_weights", "gradients", "optimizer", "ema", "activations", "temporaries")
LOW_PRECISION = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
ADAMW_STATE_BYTES = 8  # two float32 moments per trainable parameter

# What `torch.autocast("cuda")` runs in the low precision and in float32: those of its two lists that networks here use.
CAST_LOW = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.scaled_dot_product_attention, torch.einsum,
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm,
}  # fmt: skip
CAST_FLOAT = {
    F.layer_norm, F.group_norm, F.rms_norm, F.softmax, torch.softmax, torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt,
}  # fmt: skip


@dataclass(frozen=True)
class MemoryEstimate:
    """The largest moment of a training step, in GiB; the categories add up to `peak_gib`.

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


def describe(estimate: MemoryEstimate) -> str:
    """One line for a person; empty categories are left out."""
    digits = 3 if estimate.peak_gib < 1 else 2
    sizes = {c.replace("_", " "): getattr(estimate, f"{c}_gib") for c in CATEGORIES}
    split = ", ".join(f"{name} {size:.{digits}f}" for name, size in sizes.items() if size)
    moment = "the optimizer step" if estimate.when == "optimizer" else f"the {estimate.when} pass"
    return f"estimated peak {estimate.peak_gib:.{digits}f} GiB in {moment} ({split})"


def estimate_for(
    backbone: Backbone,
    build_adapter: Callable[[Backbone], Any],
    *,
    batch: int,
    resolution: int,
    precision: str,
    ema: bool,
    accumulates: bool = True,
    state_bytes: float = ADAMW_STATE_BYTES,
) -> MemoryEstimate:
    """Peak memory of one training step with `batch` images at once, `resolution` pixels wide.

    backbone: only its facts and configuration are read; its network may be absent and is never touched.
    build_adapter: makes the adapter on the backbone that it is given (one without data).
    precision: "32-true", "bf16-mixed" or "16-mixed", as Lightning names them. In the mixed ones frozen weights are kept
    in 16 bits and trainable weights, gradients and optimizer in 32, and autocast is emulated: matrix products,
    convolutions and attention in 16 bits, norms, softmax and powers in 32, everything else in the type that it meets;
    the 16-bit copies of trainable weights live until the forward pass ends, or longer where backward needs them.
    ema, accumulates, state_bytes: see `track_step`. Raises ValueError for another precision.
    """
    if precision not in LOW_PRECISION:
        raise ValueError(f"precision={precision!r} cannot be estimated: use one of {sorted(LOW_PRECISION)}")
    backbone.check_resolution(resolution)
    # the builder may seed and draw: whoever asks for an estimate must not get another training for it
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        hollow = backbone.hollow(LOW_PRECISION[precision] or torch.float32)
        adapter = build_adapter(hollow)
        step = blank_batch(backbone.facts, adapter.condition_space, batch, resolution)
    return track_step(adapter, step, precision=precision, ema=ema, accumulates=accumulates, state_bytes=state_bytes)


def blank_batch(facts: BackboneFacts, space: ConditionSpace, batch: int, resolution: int) -> Batch:
    """A micro-batch of the right shapes and of zeros, on torch's default device."""
    side = resolution // facts.factor
    latents = (batch, facts.latent_channels, side, side)
    text = {"tokens": torch.zeros(batch, facts.text_tokens, facts.text_width)}
    if facts.pooled_width is not None:
        text["pooled"] = torch.zeros(batch, facts.pooled_width)
    if facts.text_mask:
        text["mask"] = torch.ones(batch, facts.text_tokens)
    return Batch(
        index=list(range(batch)),
        ids=[""] * batch,
        latents_BCHW=torch.zeros(latents),
        noise_BCHW=torch.zeros(latents),
        uniform_B=torch.full((batch,), 0.5),
        text=TextCond.of(text),
        condition=torch.zeros(latents if space == "latent" else (batch, 3, resolution, resolution)),
    )


def track_step(
    adapter: Any,
    batch: Batch,
    *,
    precision: str = "32-true",
    ema: bool = False,
    accumulates: bool = True,
    state_bytes: float = ADAMW_STATE_BYTES,
) -> MemoryEstimate:
    """Run one training step where the tensors are, and account for it. Leaves the adapter without gradients.

    On `meta` the precision is emulated and attention is taken to be a flash kernel; elsewhere tensors are what they are.
    It is a later step of a run, so the optimizer's state exists, and so do gradients during the forward pass, since
    Lightning clears them only before the backward pass. accumulates: they stay in the backward pass too, as in all
    micro-batches of a step but the first. ema: an averaged copy of the trainable weights is kept beside them.
    state_bytes: the optimizer's state per trainable parameter (AdamW 8, 8-bit AdamW 2). AdamW's step is the `foreach`
    one, torch's choice on a GPU: it needs one more float32 number per parameter. Any other optimizer's is free here.
    """
    trained = [p for p in adapter.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    tracker = _books_of_a_later_step(adapter, trained, batch)
    tracker.reserve("optimizer", round(numbers * state_bytes))
    tracker.reserve("ema", sum(p.nbytes for p in trained) if ema else 0)
    kernels = MetaKernels(LOW_PRECISION[precision], active=batch.latents_BCHW.is_meta)
    hooks = []
    with kernels, tracker:
        loss = adapter.losses(batch).mean()
        kernels.end_forward()
        saved = tracker.live["activations"]
        tracker.phase = "backward"
        if not accumulates:
            adapter.zero_grad(set_to_none=True)
            hooks = [p.register_post_accumulate_grad_hook(lambda p: tracker.move("gradients", p.grad)) for p in trained]
        # by its edge, not as a tensor: a tensor would hand this call to `MetaKernels`, which is off while it serves a call,
        # and blocks that are recomputed inside would run without it
        edge, one = get_gradient_edge(loss), torch.ones_like(loss)
        del loss
        torch.autograd.backward(edge, one)
    tracker.phase = "optimizer"
    tracker.reserve("temporaries", 4 * numbers if state_bytes == ADAMW_STATE_BYTES else 0)
    for hook in hooks:
        hook.remove()
    adapter.zero_grad(set_to_none=True)
    return tracker.estimate(saved)


def _books_of_a_later_step(adapter: Any, trained: list[nn.Parameter], batch: Batch) -> "StorageTracker":
    """A tracker that knows the weights, the gradients of the step before, which it makes, and the batch."""
    tracker = StorageTracker()
    for p in trained:
        p.grad = torch.zeros_like(p)
    tracker.hold("trainable_weights", trained)  # first: what is known already is not counted as frozen
    tracker.hold("frozen_weights", [t for m in (adapter.backbone.net, adapter) for t in (*m.parameters(), *m.buffers())])
    tracker.hold("gradients", [p.grad for p in trained])
    inputs = [*vars(batch).values(), *vars(batch.text).values()]
    tracker.hold("activations", [t for t in inputs if isinstance(t, Tensor)])
    return tracker


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside it make, from birth to death, and of what it is told to hold.

    live: bytes by category now; peak: those of the largest moment; phases: the largest total of each phase. A storage
    born in phase "forward" is an activation, in any other phase a temporary. Works on every device.
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


class MetaKernels(TorchFunctionMode):
    """Lets tensors without data take the path that they would take on a GPU.

    Attention goes to a flash kernel: on `meta` torch would choose the form that writes out all tokens by all tokens.
    low: the low precision of autocast, or None for none; `torch.autocast` itself does not know `meta`.
    active: False makes it do nothing.
    """

    def __init__(self, low: torch.dtype | None, active: bool = True):
        super().__init__()
        self.low, self.active, self._casts = low, active, {}

    def end_forward(self) -> None:
        """Autocast ends here: drop its copies of weights and make no more that outlive their operation."""
        self._casts = None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.active and self.low is not None and (func in CAST_LOW or func in CAST_FLOAT):
            dtype = self.low if func in CAST_LOW else torch.float32
            args = self._cast(args, dtype)
            kwargs = {k: self._cast(v, dtype) for k, v in kwargs.items()}
        redirected = self.active and func is F.scaled_dot_product_attention
        return (_flash if redirected else func)(*args, **kwargs)

    def _cast(self, x: Any, dtype: torch.dtype) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)(self._cast(item, dtype) for item in x)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype in (dtype, torch.float64):
            return x
        if self._casts is None or not (torch.is_grad_enabled() and x.is_leaf and x.requires_grad):
            return x.to(dtype)
        if id(x) not in self._casts:
            self._casts[id(x)] = x.to(dtype)
        return self._casts[id(x)]


def _flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, *,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The CPU's kernel has shapes for `meta`, and saves what a GPU's do: query, key, value, output, one number per row."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
