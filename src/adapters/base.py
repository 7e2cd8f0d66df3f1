"""The adapter interface: a LightningModule that trains a control method on a frozen backbone.

A subclass builds its modules and writes `encode_condition` and `predict`; everything else is here, once.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.adapters.frozen import FrozenPass, Reads, Walk
from src.adapters.passes import Passes
from src.backbones.base import Backbone
from src.objectives import Objective
from src.types import BackboneFacts, Batch, Checkpointing, ConditionSpace, Features, TextCond, UserError

FAMILY_NAMES = {"mmdit": "SD3 transformer (mmdit)", "dit": "PixArt transformer (dit)", "unet": "U-Net (unet)"}


@dataclass(frozen=True)
class OptimizerRecipe:
    """How the adapter's weights move. Everything is counted in images, so micro-batch and devices change nothing.

    algorithm: called with the parameters; warmup_images: linear rise; decay: "constant" or "cosine" (to zero at
    total_images); clip_norm: largest gradient norm (0: no clipping); effective_batch: images per optimizer step.
    """

    algorithm: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    warmup_images: int
    decay: str
    clip_norm: float
    effective_batch: int
    total_images: int

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0) as a fraction of the peak."""
        images = (step + 1) * self.effective_batch
        warm = min(1.0, images / self.warmup_images) if self.warmup_images else 1.0
        if self.decay == "constant":
            return warm
        rest = max(1, self.total_images - self.warmup_images)
        done = min(1.0, max(0.0, (images - self.warmup_images) / rest))
        return warm * 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi, dtype=torch.float64))))


class ControlAdapter(pl.LightningModule):
    """Base class of control methods.

    backbone: loaded and frozen; it is not a submodule, so that neither checkpoint nor optimizer can hold a tensor of it.
    objective: what the backbone predicts. optimizer: None for an adapter that is only sampled from.
    condition_space: in which space `encode_condition` wants the condition. checkpointing: which blocks are recomputed in the
    backward pass instead of stored, see `recompute`. options: the method's own choices, for `refusal`.

    Class attributes declare what the contract tests then hold the method to:
    families: backbone families it knows; grad_through_backbone: whether its backward pass enters the frozen network;
    identity_at_init: whether the untrained adapter gives exactly the backbone's prediction;
    steps_to_all: optimizer steps after which every trainable parameter has had a gradient, with the reason where it is more
    than two; idea: methods of one idea, each for other backbones, share a word: a refusal names the other;
    reaches_into_blocks: whether it changes what layers inside of the frozen blocks give, which compiled blocks would not see.
    Where a choice of the configuration decides one of them, the instance sets it.
    """

    families: ClassVar[tuple[str, ...]]
    grad_through_backbone: ClassVar[bool]
    identity_at_init: ClassVar[bool]
    steps_to_all: ClassVar[int] = 2
    idea: ClassVar[str] = ""
    reaches_into_blocks: ClassVar[bool] = False

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        optimizer: OptimizerRecipe | None,
        name: str,
        condition_space: ConditionSpace,
        checkpointing: Checkpointing = "none",
        **options: Any,
    ):
        super().__init__()
        reason = self.refusal(backbone.facts, condition_space=condition_space, **options)
        if reason:
            raise UserError(f"adapter={name} with {backbone.facts.source}: {reason}")
        self._frozen = (backbone,)  # a tuple hides it from the module tree
        self.objective, self.recipe, self.name, self.condition_space = objective, optimizer, name, condition_space
        self.checkpointing = checkpointing
        self.unreached: tuple[str, ...] = ()
        self.shards: Callable[[ControlAdapter], None] | None = None  # cuts the weights over devices, once there are some
        self.passes: Passes | None = None  # who makes the frozen pass of a training step, if not the adapter itself
        self.judge: Callable[[Tensor], bool] | None = None  # gradient norm -> whether the step may be taken

    @classmethod
    def refusal(cls, facts: BackboneFacts, **options: Any) -> str | None:
        """Why this method cannot work on a backbone with these options of its yaml; None if it can. Needs no weights."""
        if facts.family in cls.families:
            return None
        known = ", ".join(FAMILY_NAMES[f] for f in cls.families)
        return f"it works on {known}, and this backbone is a {FAMILY_NAMES[facts.family]}"

    @property
    def backbone(self) -> Backbone:
        return self._frozen[0]

    @classmethod
    def depths(cls, facts: BackboneFacts, **options: Any) -> list[dict[str, Any]]:
        """The options of every depth of this method on a backbone, from small to large, for `params_match` to choose from."""
        return []

    @classmethod
    def widened(cls, facts: BackboneFacts, width: int, **options: Any) -> dict[str, Any] | None:
        """The options of another width, of which the size is a rising function; None if the method has no such choice."""
        return None

    @abstractmethod
    def encode_condition(self, condition: Tensor) -> Features:
        """Condition in `condition_space` -> features; what depends on the condition alone, computed once per image."""

    @abstractmethod
    def controlled(
        self, backbone: Backbone, x_BCHW: Tensor, t_B: Tensor, text: TextCond, features: Features, scale: float
    ) -> Tensor:
        """The controlled prediction, (B, C, H, W), at a scale other than 0; 1 is the adapter as trained."""

    def predict(
        self, backbone: Backbone, x_BCHW: Tensor, t_B: Tensor, text: TextCond, features: Features, scale: float = 1.0
    ) -> Tensor:
        """The controlled prediction, (B, C, H, W). scale 0 is the backbone alone, at its own cost; 1 the adapter as trained."""
        if scale == 0:
            with torch.no_grad():
                return backbone.predict(x_BCHW, t_B, text)
        return self.controlled(backbone, x_BCHW, t_B, text, features, scale)

    def reads(self) -> Reads | None:
        """What the method reads of a frozen pass that it has no part in; None if it writes into the frozen stream.

        A method that gives something takes `frozen: FrozenPass | None` as the last argument of `controlled`.
        """
        return None

    def frozen_pass(self, batch: Batch, reads: Reads | None = None) -> FrozenPass:
        """The frozen network's pass of a training batch, as far as this adapter reads it, or `reads` (others with it) says.
        What the batch brings along of it is not computed again.

        Raises ValueError for a method that writes into the backbone.
        """
        reads = reads or self.reads()
        if reads is None:
            raise ValueError(f"{self.name} writes into the backbone: there is no pass without it")
        x_t, _, t_B = self.noised(batch)
        kept = getattr(batch, "states", None)  # see `src.data.feature_cache.StreamBatch`
        if kept is None:
            return FrozenPass.run(self.backbone, x_t, t_B, batch.text, reads)
        return FrozenPass.of(Walk(self.backbone, x_t, t_B, batch.text).at(0), kept, reads)

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """The trainable modules by role (copies, connectors, stem, head); together they are all of the adapter."""

    def trainable_parts_m(self) -> dict[str, float]:
        """Millions of trainable parameters per part."""
        return {k: sum(p.numel() for p in m.parameters() if p.requires_grad) / 1e6 for k, m in self.parts().items()}

    def frozen_dead_m(self) -> float:
        """Millions of parameters that `freeze_unreached` froze."""
        return sum(self.get_parameter(name).numel() for name in self.unreached) / 1e6

    def recompute(self, fn: Callable, *args: Any, frozen: bool = False) -> Any:
        """fn(*args); with checkpointing its activations are not stored but computed again in the backward pass.

        Trained and frozen blocks alike go through here: a method whose gradient crosses the backbone must store that too.
        frozen: the block is the backbone's own, which checkpointing="adapter" leaves alone, as public training scripts do.
        """
        if self.checkpointing in (("both",) if frozen else ("adapter", "both")) and torch.is_grad_enabled():
            return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)  # no block here draws numbers
        return fn(*args)

    def freeze_unreached(self, names: Iterable[str]) -> None:
        """Freeze parameters that the loss does not depend on (see `unreached`): a distributed trainer would wait for them."""
        self.unreached = tuple(names)
        for name in self.unreached:
            self.get_parameter(name).requires_grad_(False)

    def noised(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """-> x_t and the target, (B, C, H, W), and t, (B,), at the noise and level that the batch carries."""
        t_B = self.objective.sample_t(batch.uniform_B)
        return *self.objective.corrupt(batch.latents_BCHW, batch.noise_BCHW, t_B), t_B

    def losses(self, batch: Batch, frozen: FrozenPass | None = None) -> Tensor:
        """(B,) loss per image at the noise and t that the batch carries. frozen: the batch's pass, if it was made before."""
        x_t, target, t_B = self.noised(batch)
        features = self.encode_condition(batch.condition)
        if frozen is None:
            prediction = self.predict(self.backbone, x_t, t_B, batch.text, features)
        else:
            prediction = self.controlled(self.backbone, x_t, t_B, batch.text, features, 1.0, frozen)
        return self.objective.loss(prediction, target, t_B)

    def training_step(self, batch: Batch, _batch_idx: int) -> Tensor:
        loss = self.losses(batch, self.passes.take(batch) if self.passes else None).mean()
        self.last_loss = loss.detach()
        if self.passes:
            self.passes.ahead(batch)
        return loss

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def autocast(self) -> AbstractContextManager:
        """The precision of training for whoever calls the adapter outside of it: that of the backbone's weights."""
        dtype = next(self.backbone.net.parameters()).dtype
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)

    @torch.no_grad()
    def features_of(self, condition: Tensor) -> Features:
        """`encode_condition` for whoever draws pictures: on the adapter's device, in the precision of training."""
        with self.autocast():
            return self.called("encode_condition", condition.to(self.device))

    def predictor(self, scale: float = 1.0) -> Callable[..., Tensor]:
        """predict(x, t, text, features) at a scale, in the precision of training: what `sampling.denoise` asks for."""

        def predict(x_BCHW: Tensor, t_B: Tensor, text: TextCond, features: Features) -> Tensor:
            with self.autocast():
                return self.called("predict", self.backbone, x_BCHW, t_B, text, features, scale)

        return predict

    def called(self, method: str, *args: Any) -> Any:
        """A method by its name, for whoever stands outside of a training step: sharded weights are put together around it."""
        return getattr(self, method)(*args)

    def configure_model(self) -> None:
        if self.shards is not None:
            self.shards, shards = None, self.shards
            shards(self)

    def setup(self, stage: str) -> None:
        if self.backbone.net is not None:
            self.backbone.to(self.trainer.strategy.root_device)

    def configure_optimizers(self) -> dict:
        optimizer = self.recipe.algorithm([p for p in self.parameters() if p.requires_grad])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.recipe.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        limit = self.recipe.clip_norm or float("inf")
        self.last_grad_norm = nn.utils.clip_grad_norm_(self.parameters(), limit)  # a tensor: a number would wait for the device
        if self.judge is not None and not self.judge(self.last_grad_norm):
            for parameter in self.parameters():
                parameter.grad = None  # an optimizer leaves it alone then, and its own state of it


def unreached(adapter: ControlAdapter, batch: Batch) -> list[str]:
    """Names of trainable parameters that the loss does not depend on, found in autograd's graph, and of those that the
    backbone knows to be computed in vain. For example the text path of the last copied SD3 block.

    Works on `meta`, where it costs no arithmetic. There is no backward pass: the graph says already what one would reach.
    """
    with torch.enable_grad():
        left, met = [adapter.losses(batch).sum().grad_fn], set()
    while left:
        if (node := left.pop()) is not None and node not in met:
            met.add(node)
            left += [below for below, _ in node.next_functions]
    reached = {id(node.variable) for node in met if hasattr(node, "variable")}  # a leaf of the graph is a parameter's
    names = [name for name, p in adapter.named_parameters() if p.requires_grad and id(p) not in reached]
    for number, copied in enumerate(adapter.parts().get("copies", ())):
        prefix = f"copies.{number}."
        unread = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        names += [prefix + name for name in adapter.backbone.thrown_away(copied, unread) if name not in unread]
    return names
