"""A frozen pass made beforehand gives the losses and gradients of one made on the way, to the bit."""

import itertools

import pytest
import torch

from src import build
from src.adapters.frozen import FrozenPass, Reads, Walk
from src.adapters.parts import CONNECTORS
from src.adapters.passes import Passes
from src.config import load
from src.construct import construct
from src.profiling.tracker import StorageTracker
from src.support import refusal
from src.together.measure import measure_shared
from tests.conftest import CPU
from tests.contract.registry import EMBEDDED_BACKBONES, configured, node
from tests.contract.test_adapters import make_batch, shaken

DESIGNS = [(*cell, "adapter") for cell in itertools.product(("full", "decoder", "skip_layer"), CONNECTORS)]
DESIGNS += [("full", "zero_ft", "frozen")]


def each(design):
    """On every backbone what it knows of; what differs in the connector alone is quick on one of them."""
    for base in EMBEDDED_BACKBONES:
        if base == "sd21_tiny" and (design[0] == "skip_layer" or design[1] == "share_attn"):
            continue
        quick = base == "sd3_tiny" or design[1] == "zero_ft"
        yield pytest.param(base, design, marks=[] if quick else pytest.mark.slow, id="-".join((base, *design)))


@pytest.fixture(scope="module", params=EMBEDDED_BACKBONES)
def loaded(request):
    backbone = construct(node("backbone", request.param)).load(CPU, torch.float32)
    return request.param, backbone, backbone.encode_text(["a large red ball", "a small blue cube"], CPU), {}


def designed(loaded, copy, connector, shortcut="adapter"):
    """An adapter whose every weight was moved, and a batch; None where the backbone knows no such design."""
    base, backbone, text, made = loaded
    if (key := (copy, connector, shortcut)) in made:
        made[key][0].checkpointing = "none"
        return made[key]
    cfg = configured("train", "adapter=unicon", f"backbone={base}", "hardware=cpu")
    cfg.adapter.update(copy=copy, connector=connector, shortcut=shortcut)
    if refusal(cfg.adapter, backbone.facts) is not None:
        return None, None
    adapter = shaken(build.new_adapter(cfg, backbone, training=False))
    made[key] = adapter, make_batch(adapter, backbone, text)
    return made[key]


def learned(adapter, batch, frozen=None):
    """Losses and the gradient of every trained parameter."""
    adapter.zero_grad()
    losses = adapter.losses(batch, frozen)
    losses.mean().backward()
    return [losses.detach(), *(p.grad.clone() for p in adapter.parameters() if p.requires_grad)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def batch_bytes(batch):
    tensors = [*vars(batch).values(), *batch.text.fields().values()]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def everything(facts):
    places = frozenset(range(facts.depth + 1))
    return Reads(places, places, places if facts.spatial else frozenset())


@pytest.mark.parametrize(("loaded", "design"), [cell for d in DESIGNS for cell in each(d)], indirect=["loaded"])
def test_a_given_pass_gives_the_same_losses_and_gradients(loaded, design):
    adapter, batch = designed(loaded, *design)
    assert adapter is not None
    alone = learned(adapter, batch)
    assert all(g.abs().any() for g in alone)
    frozen = adapter.frozen_pass(batch)
    assert same(learned(adapter, batch, frozen), alone)
    read_back = FrozenPass.of(frozen.base, {k: t.clone() for k, t in frozen.tensors().items()}, adapter.reads())
    assert same(learned(adapter, batch, read_back), alone)


def test_recomputed_blocks_read_the_same_pass(loaded):
    adapter, batch = designed(loaded, "full", "zero_ft")
    frozen = adapter.frozen_pass(batch)
    plain = learned(adapter, batch, frozen)
    for scope in ("adapter", "both"):
        adapter.checkpointing = scope
        assert same(learned(adapter, batch, frozen), learned(adapter, batch))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, learned(adapter, batch, frozen), strict=True))


def test_only_what_is_read_is_kept(loaded):
    """The half copy needs nothing in front of its first block but, on a U-Net, the skips; nobody else's text is kept."""
    adapter, batch = designed(loaded, "decoder", "zero_ft")
    facts, frozen = adapter.backbone.facts, adapter.frozen_pass(batch)
    assert sorted(frozen.x) == list(range(facts.middle, facts.depth + 1))
    assert list(frozen.text) == [facts.middle]
    assert list(frozen.skips) == ([facts.middle] if facts.spatial else [])
    numbers = sum(t[0].numel() for t in frozen.tensors().values())
    widest = sum(t[0].numel() for t in adapter.frozen_pass(batch, everything(facts)).tensors().values())
    assert numbers < 0.8 * widest
    with pytest.raises(KeyError):
        frozen.at(facts.middle - 1)


def test_the_union_of_two_methods_serves_both(loaded):
    (full, batch), (half, _) = designed(loaded, "full", "zero_ft"), designed(loaded, "decoder", "zero_mlp")
    union = full.reads() | half.reads()
    assert union.last == full.backbone.facts.depth
    frozen = full.frozen_pass(batch, union)
    for adapter in (full, half):
        assert same(learned(adapter, batch, frozen), learned(adapter, batch))


def test_a_method_that_writes_into_the_backbone_has_no_pass(sd3_tiny):
    for words in (["adapter=dit_controlnet"], ["adapter=unicon", "adapter.flow=bidirectional"]):
        adapter = build.new_adapter(load("train", [*words, "hardware=cpu"]), sd3_tiny, training=False)
        assert adapter.reads() is None
        with pytest.raises(ValueError, match="writes into the backbone"):
            adapter.frozen_pass(make_batch(adapter, sd3_tiny, sd3_tiny.encode_text(["a", "b"], CPU)))


def test_a_walk_goes_forward_only(sd3_tiny):
    text = sd3_tiny.encode_text(["a", "b"], CPU)
    walk = Walk(sd3_tiny, torch.zeros(2, sd3_tiny.facts.latent_channels, 8, 8), torch.tensor([0.3, 0.6]), text)
    assert walk.at(2) is walk.at(2)
    with pytest.raises(ValueError, match="forward only"):
        walk.at(1)


# ---- who makes it -----------------------------------------------------------------------------------------------------


class Asked:
    """A batch as far as `Passes` looks at it."""

    def __init__(self, index, following=None):
        self.index, self.following = index, following

    def to(self, _device):
        return self


def test_a_pass_is_made_once_for_all_who_ask_and_then_let_go():
    made = []
    passes = Passes(lambda batch: made.append(batch.index) or len(made), uses=3)
    assert [passes.take(Asked([0, 1])) for _ in range(3)] == [1, 1, 1]
    assert not passes._kept
    assert passes.take(Asked([2, 3])) == 2
    assert made == [[0, 1], [2, 3]]


def test_passes_of_a_step_wait_for_its_repetition_and_leftovers_go():
    made = []
    passes = Passes(lambda batch: made.append(batch.index) or len(made), uses=2, most=2)
    for index in ([0], [1], [0], [1], [2], [3]):
        passes.take(Asked(index))
    assert made == [[0], [1], [2], [3]]
    for index in ([4], [5], [4], [5]):  # as if resumed before: 2 and 3 were asked for once only
        passes.take(Asked(index))
    assert made == [[0], [1], [2], [3], [4], [5]]
    assert not passes._kept


def test_the_next_pass_is_begun_once_and_taken_as_it_is(loaded):
    """The code path of the overlap; on a CPU its stream is nothing, and the order of the work is all that changes."""
    adapter, batch = designed(loaded, "decoder", "zero_ft")
    plain = learned(adapter, batch)
    made = []

    def make(asked):
        made.append(asked.index)
        return adapter.frozen_pass(batch)

    passes = Passes(make, overlap=True, device=CPU)
    first = Asked([7], following=Asked(list(batch.index)))
    passes.take(first)
    passes.ahead(first)
    passes.ahead(first)
    assert made == [[7], [0, 1]]
    assert same(learned(adapter, batch, passes.take(batch)), plain)
    assert made == [[7], [0, 1]]
    passes.ahead(batch)  # nothing follows
    assert not passes._kept


# ---- what it costs ----------------------------------------------------------------------------------------------------


def test_costs_are_those_of_real_steps_that_learn_the_same_however_passes_are_made(sd3_tiny):
    text = sd3_tiny.encode_text(["a large red ball", "a small blue cube"], CPU)
    found = {}
    for name, chosen in {
        "own": {"share": False},
        "shared": {},
        "ahead": {"overlap": True},
        "kept": {"cached": True},
        "twice": {"reuse": 2},
    }.items():
        cfgs = [configured("train", f"adapter={a}", "hardware=cpu") for a in ("unicon", "unicon_half")]
        adapters = [build.new_adapter(cfg, sd3_tiny) for cfg in cfgs]
        batch = make_batch(adapters[0], sd3_tiny, text)
        cost = measure_shared(adapters, batch, rounds=2, warmup=1, **chosen)
        found[name] = cost, [p.detach().clone() for adapter in adapters for p in adapter.parameters()]
    passes = {name: cost.passes for name, (cost, _) in found.items()}
    assert passes == {"own": 2, "shared": 1, "ahead": 1, "kept": 0, "twice": 1}
    assert all(len(cost.step_ms) == 2 and min(cost.step_ms) > 0 for cost, _ in found.values())
    assert all(same(found["own"][1], found[name][1]) for name in ("shared", "ahead", "kept"))
    assert not same(found["own"][1], found["twice"][1])
    tracker = StorageTracker()
    tracker.hold("frozen_weights", [*sd3_tiny.net.parameters(), *sd3_tiny.net.buffers()])
    weights = sum(tracker.live.values())
    with torch.no_grad(), tracker:
        adapters[0].frozen_pass(batch)
    # a second set of features, and the work on it while everything that the backward pass wants is still there
    waiting = found["ahead"][0].peak_bytes - found["shared"][0].peak_bytes
    assert found["shared"][0].pass_bytes < waiting <= sum(tracker.peak.values()) - weights + batch_bytes(batch)
