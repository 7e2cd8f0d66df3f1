"""One step of training, phase by phase, so that it can be watched, counted or timed; and what is seen when it is watched."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from src.profiling.counter import OpCounter
from src.profiling.meta import LOW_PRECISION, MetaKernels
from src.profiling.optimizer import OptimizerModel, state_tensors
from src.profiling.own import own_calls
from src.profiling.tracker import MemoryEstimate, StorageTracker
from src.types import Batch

# when gradients of the step before go: behind its update; in front of the backward pass, as Lightning clears them; or, in
# all micro-batches of a step but the first, not at all
Gradients = Literal["cleared", "until_backward", "kept"]


class Step:
    """Forward, backward and update of an adapter on one batch, in this order.

    optimizer: None leaves `update` without a step. clip_norm: largest gradient norm; average: copies of the trained
    weights that follow them (an exponential moving average), or none; autocast: makes the context of the forward pass;
    scaler: of the loss, for float16.
    """

    def __init__(
        self,
        adapter: Any,
        batch: Batch,
        optimizer: torch.optim.Optimizer | None = None,
        clip_norm: float = float("inf"),
        average: Sequence[Tensor] = (),
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        scaler: Any = None,
    ):
        self.adapter, self.batch, self.optimizer, self.clip_norm = adapter, batch, optimizer, clip_norm
        self.average, self.autocast, self.scaler = average, autocast, scaler
        self.trained = [p for p in adapter.parameters() if p.requires_grad]
        self._loss: Tensor | None = None

    def forward(self) -> None:
        """Up to the mean loss of the batch."""
        with self.autocast():
            self._loss = self.adapter.losses(self.batch).mean()

    def backward(self) -> None:
        """Gradients of the loss, which is given up. Nothing where there is no graph."""
        if not self._loss.requires_grad:
            self._loss = None
            return
        loss, self._loss = self._loss if self.scaler is None else self.scaler.scale(self._loss), None
        # by its edge, not as a tensor: a tensor would hand this call to `MetaKernels`, which is off while it serves a call,
        # and blocks that are recomputed inside would run without it
        edge, one = get_gradient_edge(loss), torch.ones_like(loss)
        del loss
        torch.autograd.backward(edge, one)

    def update(self) -> None:
        """Clip, move the weights and their average, drop the gradients. Those of the backbone, where it was left to gather
        some, stay: no optimizer knows of them."""
        if self.optimizer is None:
            return
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        with torch.no_grad():
            for mean, weight in zip(self.average, self.trained, strict=bool(self.average)):
                mean.lerp_(weight, 1e-3)
        self.clear()

    def clear(self) -> None:
        """Drop the adapter's gradients."""
        for p in self.trained:
            p.grad = None


def watch(
    step: Step,
    *,
    precision: str = "32-true",
    gradients: Gradients = "cleared",
    model: OptimizerModel | None = None,
    counter: OpCounter | None = None,
) -> MemoryEstimate:
    """Run one step where the tensors are, and account for it. Leaves the adapter without gradients.

    On `meta` the precision is emulated and attention is taken to be a flash kernel; elsewhere tensors are what they are. It
    is a later step of a run: the optimizer's state must exist (see `prime`). model: stands for the optimizer's step where it
    cannot be run. counter: also counts operations, in the same pass.
    """
    tracker = _books(step, gradients)
    numbers = sum(p.numel() for p in step.trained)
    if model is not None:
        tracker.reserve("optimizer", round(numbers * model.state_bytes))
    kernels = MetaKernels(LOW_PRECISION[precision], active=step.batch.latents_BCHW.is_meta)
    modes: list[Any] = [kernels, tracker, *([counter] if counter else [])]
    hooks = []
    with ExitStack() as stack:
        inside, _ = stack.enter_context(own_calls(step.adapter.backbone))
        if counter:
            counter.inside = inside
        for mode in modes:
            stack.enter_context(mode)
        step.forward()
        kernels.end_forward()
        saved = tracker.live["activations"]
        _begin("backward", tracker, counter)
        if gradients == "until_backward":
            step.clear()
        if gradients != "kept":
            hooks = [p.register_post_accumulate_grad_hook(lambda p: tracker.move("gradients", p.grad)) for p in _all(step)]
        step.backward()
        _begin("optimizer", tracker, counter)
        if model is not None:
            tracker.reserve("temporaries", round(numbers * model.temporary_bytes))
            if counter:
                counter.add_numbers(numbers * model.flops, round(numbers * model.traffic_bytes), torch.float32)
        step.update()
    for hook in hooks:
        hook.remove()
    step.clear()
    return tracker.estimate(saved)


def _begin(phase: str, tracker: StorageTracker, counter: OpCounter | None) -> None:
    tracker.begin_phase(phase)
    if counter:
        counter.phase = phase


def _all(step: Step) -> list[nn.Parameter]:
    """Every parameter that will gather gradients: the adapter's, and those of a backbone that was not frozen."""
    return [*step.trained, *(p for p in step.adapter.backbone.net.parameters() if p.requires_grad)]


def _books(step: Step, gradients: Gradients) -> StorageTracker:
    """A tracker that knows the weights, the optimizer's state, the batch, and the gradients of the step before."""
    tracker, adapter, net = StorageTracker(), step.adapter, step.adapter.backbone.net
    if gradients != "cleared":
        for p in step.trained:
            p.grad = torch.zeros_like(p)
    tracker.hold("trainable_weights", step.trained)  # first: what is known already is not counted as frozen
    tracker.hold("frozen_weights", [t for m in (net, adapter) for t in (*m.parameters(), *m.buffers())])
    tracker.hold("gradients", [p.grad for p in _all(step)])
    tracker.hold("optimizer", state_tensors(step.optimizer) if step.optimizer else [])
    tracker.hold("ema", list(step.average))
    inputs = [*vars(step.batch).values(), *vars(step.batch.text).values()]
    tracker.hold("activations", [t for t in inputs if isinstance(t, Tensor)])
    return tracker
