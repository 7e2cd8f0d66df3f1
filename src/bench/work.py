"""What a cell runs, on tensors without data and on a device alike: a step of training, or a step of drawing pictures."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from src.bench.plan import Cell
from src.construct import construct
from src.profiling.counter import OpCounter
from src.profiling.memory import blank_batch
from src.profiling.meta import LOW_PRECISION, MetaKernels
from src.profiling.optimizer import in_groups, needs_model
from src.profiling.own import own_calls
from src.profiling.step import Step
from src.profiling.tracker import MemoryEstimate, StorageTracker
from src.sampling import double
from src.types import Batch, Features, TextCond


def inputs(cell: Cell, adapter: Any, device: torch.device) -> Batch:
    """A batch of the cell's shapes: without data on `meta`, elsewhere of keyed random numbers."""
    cfg = cell.cfg
    with torch.device(device):
        batch = blank_batch(cell.backbone.facts, adapter.condition_space, cfg.batch, cfg.resolution)
    if device.type == "meta":
        return batch
    gen = torch.Generator(device).manual_seed(cfg.seed)
    for tensor in (batch.latents_BCHW, batch.noise_BCHW, batch.condition, batch.text.tokens_BLD, batch.text.pooled_BP):
        if tensor is not None:
            tensor.normal_(generator=gen)
    batch.uniform_B.uniform_(0.05, 0.95, generator=gen)
    return batch


def training_step(cell: Cell, adapter: Any, device: torch.device, autocast: Callable[[], AbstractContextManager]) -> Step:
    """A step whose optimizer has no state yet; without an optimizer where nothing trains, or none can run on `meta`."""
    cfg, batch = cell.cfg, inputs(cell, adapter, device)
    trained = [p for p in adapter.parameters() if p.requires_grad]
    on_meta, node = device.type == "meta", cfg.optimizer.algorithm
    optimizer = None
    if trained and not (on_meta and needs_model(node)):
        algorithm = construct(node)
        optimizer = algorithm(trained, **(in_groups(algorithm, cfg.hardware.accelerator == "gpu") if on_meta else {}))
    average = [p.detach().clone() for p in trained] if cfg.ema else []
    scaler = torch.amp.GradScaler(device.type) if cfg.hardware.precision == "16-mixed" and not on_meta else None
    return Step(adapter, batch, optimizer, cfg.optimizer.clip_norm or float("inf"), average, autocast, scaler)


class Drawing:
    """One denoising step as `sampling.denoise` takes it: the guided batch is twice as large, control acts on both halves.

    What depends on the condition alone is computed once, before.
    """

    def __init__(self, cell: Cell, adapter: Any, device: torch.device):
        self.adapter, self.batch = adapter, inputs(cell, adapter, device)
        self.guided = cell.cfg.guidance != 1
        self.guidance, self.precision = cell.cfg.guidance, cell.cfg.hardware.precision
        self.features: Features | None = None

    def encode(self) -> None:
        """The condition's features, kept."""
        if self.batch.condition.is_meta:
            with torch.no_grad():
                self.features = self.adapter.encode_condition(self.batch.condition)
        else:
            self.features = self.adapter.features_of(self.batch.condition)

    def text(self) -> TextCond:
        """Captions of the guided batch: the empty ones first."""
        return TextCond.cat([self.batch.text[:1].expand(len(self.batch)), self.batch.text]) if self.guided else self.batch.text

    @torch.no_grad()
    def step(self, text: TextCond, features: Features | None) -> Tensor:
        """One prediction, with guidance applied."""
        x, t_B = self.batch.noise_BCHW, self.batch.uniform_B
        if self.guided:
            x, t_B = torch.cat([x, x]), torch.cat([t_B, t_B])
        if x.is_meta:
            said = self.adapter.predict(self.adapter.backbone, x, t_B, text, features).float()
        else:
            said = self.adapter.predictor()(x, t_B, text, features).float()
        if not self.guided:
            return said
        free, told = said.chunk(2)
        return free + self.guidance * (told - free)


def watch_drawing(drawing: Drawing, counter: OpCounter) -> tuple[MemoryEstimate, int]:
    """Account for one denoising step where the tensors are. -> its memory, and the FLOPs of the condition's encoding."""
    adapter, batch, tracker = drawing.adapter, drawing.batch, StorageTracker()
    net = adapter.backbone.net
    tracker.hold("trainable_weights", [p for p in adapter.parameters() if p.requires_grad])
    tracker.hold("frozen_weights", [t for m in (net, adapter) for t in (*m.parameters(), *m.buffers())])
    tracker.hold("activations", [t for t in (*vars(batch).values(), *vars(batch.text).values()) if isinstance(t, Tensor)])
    on_meta = batch.noise_BCHW.is_meta
    once = OpCounter()
    with _emulated(drawing.precision, on_meta), tracker, once:
        drawing.encode()
    kernels = _emulated(drawing.precision, on_meta)
    with ExitStack() as stack:
        counter.inside, _ = stack.enter_context(own_calls(adapter.backbone))
        for mode in (kernels, tracker, counter):
            stack.enter_context(mode)
        drawing.step(drawing.text(), double(drawing.features) if drawing.guided else drawing.features)
    return tracker.estimate(0), sum(once.tally.flops.values())


def _emulated(precision: str, on_meta: bool) -> MetaKernels:
    return MetaKernels(LOW_PRECISION[precision], active=on_meta)


def no_autocast() -> AbstractContextManager:
    """The forward pass as it is."""
    return nullcontext()
