"""UniCon (ICLR 2025, arXiv 2503.17221): the copy reads the frozen backbone and makes the prediction itself.

The frozen network runs forward only, under no_grad: nothing flows back into it and none of its activations is stored.
There is no public code of the authors; `lixirui142/UniCon` is another method of the same name. The same engine spans the
paper's table of designs on transformers: copy x flow x connector.

Where the paper is silent: the copies' own stream is the shortcut of the connectors (see `UniCon.shortcut`), the copies
carry their own text stream, the head is copied too, so that no gradient has to cross a frozen layer; a block that is not
copied passes on by the difference that it makes to the frozen stream; on a U-Net the copied encoder has its own skips, and
the copied decoder of UniCon-Half reads the frozen skips, each joined with the condition at its size.
"""

from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.adapters.base import ControlAdapter, OptimizerRecipe
from src.adapters.frozen import FrozenPass, Reads, Walk
from src.adapters.parts import CONNECTORS, ConditionStem, Copy, Pyramid, ZeroMLP, attend, copied_steps
from src.backbones.base import Backbone
from src.objectives import Objective
from src.types import BackboneFacts, Checkpointing, ConditionSpace, Features, StreamState, TextCond

Flow = Literal["unidirectional", "bidirectional"]
Connector = Literal["zero_ft", "zero_mlp", "share_attn"]
INEFFECTIVE = (
    "adapter.copy=encoder with adapter.flow=unidirectional is the cell that the UniCon paper reports as ineffective: no "
    "trained block is left that could turn the features into the output; use copy=decoder or full, or flow=bidirectional"
)
NO_UNET = (
    "these designs are defined on transformers; on a U-Net use copy=full or decoder with flow=unidirectional, "
    "or adapter=controlnet"
)


class UniCon(ControlAdapter):
    """UniCon, UniCon-Half and the ablations around them.

    copy: which steps are copied: "full" (UniCon), "decoder" (UniCon-Half: a transformer's second half, a U-Net's middle and
    up blocks), "encoder", "skip_layer" (every other one); blocks: another number of them (see `copied_steps`); on a U-Net it
    counts layers and samplers from the end, and the copy may not begin at an upsampler, where no skip has the stream's size;
    flow: "unidirectional": the copies read the frozen features and their output is the prediction. "bidirectional": the
    copies read once, at their first block, and write into the frozen stream behind each of theirs, as ControlNet does;
    connector: how two features join, a key of `CONNECTORS`; connector_width: hidden width of its layers (None: no hidden
    layer). share_attn adds what the stream's own queries find in the other side's keys and values;
    shortcut: which of the two goes on unchanged while the connectors are untrained. "adapter": the copies' stream, into
    which frozen features flow. "frozen": the frozen feature, so that the copies speak only through zero-initialised
    layers, K + 1 of them in a row between condition and output; it learns far more slowly (experiments/README.md);
    condition_space: "latent" sends the condition through the autoencoder, as the paper does; "pixel" does not;
    checkpointing: see `ControlAdapter.recompute`.

    Unidirectional, with copied blocks i = first..K-1, frozen features h_i before block i and condition features c:
    a = join(h_first, c), then a = copy_i(a), a = join(a, h_(i+1)) for each i; prediction = head(a).
    With shortcut="frozen" the later joins are join(h_(i+1), a). Both give exactly the backbone before training.
    """

    families: ClassVar = ("mmdit", "dit", "unet")
    grad_through_backbone: ClassVar = False
    identity_at_init: ClassVar = True

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        optimizer: OptimizerRecipe | None,
        name: str,
        copy: Copy = "full",
        flow: Flow = "unidirectional",
        connector: Connector = "zero_ft",
        shortcut: Literal["adapter", "frozen"] = "adapter",
        blocks: int | None = None,
        connector_width: int | None = None,
        condition_space: ConditionSpace = "latent",
        checkpointing: Checkpointing = "none",
    ):
        chosen = {"copy": copy, "flow": flow, "connector": connector, "blocks": blocks}
        super().__init__(backbone, objective, optimizer, name, condition_space, checkpointing, **chosen)
        facts = backbone.facts
        self.indices = copied_steps(facts, copy, blocks)
        self.shares, self.shortcut, self.one_way = connector == "share_attn", shortcut, flow == "unidirectional"
        self.grad_through_backbone = not self.one_way
        self.copies = backbone.copy_steps(self.indices)
        width = [facts.widths[i + 1] for i in self.indices]
        self.connectors = nn.ModuleList(CONNECTORS[connector](w, facts.spatial, connector_width) for w in width)
        self.stem = self._make_stem(backbone, condition_space)
        # the condition is no stream of blocks with queries and keys: with share_attn it enters by plain addition
        enter = ZeroMLP if self.shares else CONNECTORS[connector]
        reads = [facts.widths[self.indices[0]]]
        if facts.spatial and self.indices[0]:  # the copied decoder reads the frozen skips that still wait there
            reads += facts.widths[: facts.stacked[self.indices[0]]]
        self.entries = nn.ModuleList(enter(w, facts.spatial, connector_width) for w in reads)
        self.head = backbone.copy_head() if self.one_way else None

    @classmethod
    def refusal(cls, facts: BackboneFacts, **options: Any) -> str | None:
        copy, flow, depth = options.get("copy", "full"), options.get("flow", "unidirectional"), facts.depth
        if (copy, flow) == ("encoder", "unidirectional"):
            return INEFFECTIVE
        shares = options.get("connector") == "share_attn"
        if facts.spatial and (copy in ("encoder", "skip_layer") or flow == "bidirectional" or shares):
            return NO_UNET
        blocks = options.get("blocks")
        if blocks is not None and (copy == "skip_layer" or not 1 <= blocks <= depth):
            return f"adapter.blocks={blocks} wants copy=full, decoder or encoder, and 1 to {depth} blocks of this backbone"
        if blocks is not None and depth - blocks in facts.samples_up:
            return (
                f"adapter.blocks={blocks}: the copy would begin at an upsampler of this U-Net; use {blocks - 1} or {blocks + 1}"
            )
        return super().refusal(facts)

    @classmethod
    def depths(cls, facts: BackboneFacts, **options: Any) -> list[dict[str, Any]]:
        if options.get("copy") == "skip_layer":
            return []
        return [{"blocks": n} for n in range(1, facts.depth + 1) if facts.depth - n not in facts.samples_up]

    @classmethod
    def widened(cls, facts: BackboneFacts, width: int, **options: Any) -> dict[str, Any]:
        return {"connector_width": width}

    def parts(self) -> dict[str, nn.Module]:
        made = {"copies": self.copies, "connectors": self.connectors, "stem": self.stem, "entries": self.entries}
        return made | ({"head": self.head} if self.one_way else {})

    def encode_condition(self, condition: Tensor) -> Features:
        """-> condition features for each entry: (B, T, D), or on a U-Net the map for the first copy and those for its skips."""
        c = self.stem["embed"](condition)
        if "pyramid" not in self.stem:
            return c
        maps = self.stem["pyramid"](c)
        first = self.stem["turn"](F.silu(maps[-1])) if "turn" in self.stem else maps[-1]
        return (first, *maps)

    def reads(self) -> Reads | None:
        if not self.one_way:
            return None
        facts, first = self.backbone.facts, self.indices[0]
        passed_on = [k for k in range(first, facts.depth) if k not in self.indices]  # by their difference
        text = {first, *passed_on, *(k + 1 for k in passed_on)}
        skips = frozenset([first]) if facts.spatial else frozenset()
        return Reads(frozenset(range(first, facts.depth + 1)), frozenset(text), skips)

    def controlled(
        self,
        backbone: Backbone,
        x_BCHW: Tensor,
        t_B: Tensor,
        text: TextCond,
        features: Features,
        scale: float,
        frozen: FrozenPass | None = None,
    ) -> Tensor:
        states = frozen or Walk(backbone, x_BCHW, t_B, text)
        state = states.at(self.indices[0])
        own = self._enter(state, features)
        return self._read(backbone, states, own, scale) if self.one_way else self._write(backbone, state, own, scale)

    # ---- unidirectional -------------------------------------------------------------------------------------------------

    def _read(self, backbone: Backbone, states: FrozenPass | Walk, own: StreamState, scale: float) -> Tensor:
        """The copies follow the frozen stream block by block and make the prediction."""
        chosen = dict(zip(self.indices, range(len(self.indices)), strict=True))
        frozen = states.at(self.indices[0])
        for k in range(self.indices[0], backbone.facts.depth):
            before, frozen = frozen, states.at(k + 1)
            if k in chosen:
                own = self.recompute(self._follow, backbone, k, chosen[k], before, frozen, own)
            else:
                text = None if frozen.text is None else own.text + (frozen.text - before.text)
                own = own.with_(x=own.x + (frozen.x - before.x), text=text)
        out = backbone.end(own, self.head)
        if scale == 1:
            return out
        with torch.no_grad():
            alone = backbone.end(frozen)
        return alone + scale * (out - alone)

    def _follow(
        self, backbone: Backbone, k: int, n: int, before: StreamState, after: StreamState, own: StreamState
    ) -> StreamState:
        """Copy number n of step k, and the join with the frozen feature behind that step."""
        new = backbone.run(self.copies[n], own)
        mine, theirs = (new.x, after.x) if self.shortcut == "adapter" else (after.x, new.x)
        if self.shares:
            theirs = self._shared(backbone, (self.copies[n], own), (k, before))
        x = self.connectors[n](mine, theirs)
        # an encoder step has put its feature on the stack of skips: the decoder must read the joined one
        pushed = len(new.skips) > len(own.skips)
        return new.with_(x=x, skips=(*new.skips[:-1], x) if pushed else new.skips)

    # ---- bidirectional --------------------------------------------------------------------------------------------------

    def _write(self, backbone: Backbone, frozen: StreamState, own: StreamState, scale: float) -> Tensor:
        """The copies run beside the frozen blocks and add to their stream; the frozen head makes the prediction."""
        chosen = dict(zip(self.indices, range(len(self.indices)), strict=True))
        for k in range(self.indices[0], backbone.facts.depth):
            frozen, own = self.recompute(self._beside, backbone, k, chosen.get(k), frozen, own, scale, frozen=True)
        return backbone.end(frozen)

    def _beside(
        self, backbone: Backbone, k: int, n: int | None, frozen: StreamState, own: StreamState, scale: float
    ) -> tuple[StreamState, StreamState]:
        after = backbone.run(k, frozen)
        if n is None:
            return after, own
        # with "both" all of this is recomputed as one
        run = backbone.run if self.checkpointing == "both" else partial(self.recompute, backbone.run)
        new = run(self.copies[n], own)
        source = self._shared(backbone, (k, frozen), (self.copies[n], own)) if self.shares else new.x
        return after.with_(x=after.x + scale * (self.connectors[n](after.x, source) - after.x)), new

    # ---- both -----------------------------------------------------------------------------------------------------------

    def _enter(self, state: StreamState, features: Features) -> StreamState:
        """The copies' stream: the frozen one, joined with the condition."""
        if isinstance(features, Tensor):
            x = self.entries[0](state.x, features)
            return state.with_(x=x, skips=(x,) if state.skips else ())
        skips = (join(s, c) for join, s, c in zip(self.entries[1:], state.skips, features[1:], strict=True))
        return state.with_(x=self.entries[0](state.x, features[0]), skips=tuple(skips))

    def _shared(self, backbone: Backbone, reader: tuple, read: tuple) -> Tensor:
        """What the queries of one (step, state) find in the keys and values of another, (B, T, D)."""
        queries, _, _ = backbone.attention(*reader)
        _, keys, values = backbone.attention(*read)
        return attend(queries, keys, values)

    def _make_stem(self, backbone: Backbone, space: ConditionSpace) -> nn.ModuleDict:
        facts, first = backbone.facts, self.indices[0]
        stem = nn.ModuleDict({"embed": ConditionStem(backbone, space)})
        if facts.spatial and first:
            skips = facts.stacked[first]
            plans = backbone.step_plans()[: skips - 1]
            stem["pyramid"] = Pyramid(list(facts.widths[:skips]), [p.kind == "downsample" for p in plans])
            if facts.widths[skips - 1] != facts.widths[first]:  # behind the middle the stream may be wider than the skip
                stem["turn"] = nn.Conv2d(facts.widths[skips - 1], facts.widths[first], 1)
        return stem
