"""The paper's table of designs: copy x flow x connector, one engine, on every embedded transformer."""

import itertools

import pytest
import torch

from src import build
from src.adapters.unicon import INEFFECTIVE, UniCon
from src.backbones.unet import UNet
from src.config import Unsupported, load
from src.construct import construct
from src.profiling.saved import saved_bytes
from src.support import check_cell
from src.types import UserError
from tests.conftest import CPU, noisy_inputs
from tests.contract.registry import configured, node
from tests.contract.test_adapters import alone, controlled, make_batch, shaken
from tests.unet_shapes import configs_of

COPIES = ("encoder", "decoder", "skip_layer", "full")
FLOWS = ("unidirectional", "bidirectional")
CONNECTORS = ("zero_mlp", "share_attn", "zero_ft")
DESIGNS = list(itertools.product(COPIES, FLOWS, CONNECTORS))
EFFECTIVE = [d for d in DESIGNS if d[:2] != ("encoder", "unidirectional")]
TRANSFORMERS = ("sd3_tiny", "pixart_tiny")


@pytest.fixture(scope="module", params=TRANSFORMERS)
def loaded(request):
    backbone = construct(node("backbone", request.param)).load(CPU, torch.float32)
    return request.param, backbone, backbone.encode_text(["a large red ball", "a small blue cube"], CPU)


def designed(base, copy, flow, connector, blocks=None):
    cfg = configured("train", "adapter=unicon", f"backbone={base}", "hardware=cpu")
    cfg.adapter.update(copy=copy, flow=flow, connector=connector, blocks=blocks)
    return cfg


def each(design):
    """All on one backbone; on the others those of one connector, and the rest when there is time."""
    for base in TRANSFORMERS:
        quick = base == TRANSFORMERS[0] or design[2] == "zero_ft"
        yield pytest.param(base, design, marks=[] if quick else pytest.mark.slow, id="-".join((base, *design)))


@pytest.mark.parametrize(("loaded", "design"), [cell for d in EFFECTIVE for cell in each(d)], indirect=["loaded"])
def test_a_design_starts_as_the_backbone_and_trains_all_of_itself(loaded, design):
    base, backbone, text = loaded
    adapter = build.new_adapter(designed(base, *design), backbone, training=False)
    batch = make_batch(adapter, backbone, text)
    start = (controlled(adapter, backbone, batch) - alone(adapter, backbone, batch)).abs().max()
    assert float(start.detach()) <= 1e-5
    report = saved_bytes(lambda: shaken(adapter).losses(batch).mean(), [adapter], backbone)
    assert (report.backbone_bytes > 0) == adapter.grad_through_backbone == (design[1] == "bidirectional")
    adapter.losses(batch).mean().backward()
    bare = [n for n, p in adapter.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().any())]
    assert bare == []
    with torch.no_grad():
        one = controlled(adapter, backbone, batch)
        batch.condition = batch.condition.flip(0)
        assert (controlled(adapter, backbone, batch) - one).abs().max() > 1e-4


def test_the_table_has_the_papers_cells():
    assert len(DESIGNS) == 24
    assert len(EFFECTIVE) == 21


@pytest.mark.parametrize("connector", CONNECTORS)
def test_the_ineffective_cell_is_refused_with_the_papers_reason(loaded, connector):
    base, backbone, _ = loaded
    with pytest.raises(Unsupported, match="ineffective"):
        check_cell(designed(base, "encoder", "unidirectional", connector), backbone)
    with pytest.raises(UserError, match="no trained block is left"):
        build.new_adapter(designed(base, "encoder", "unidirectional", connector), backbone, training=False)
    assert "copy=decoder" in INEFFECTIVE


@pytest.mark.parametrize("change", ["adapter.copy=skip_layer", "adapter.flow=bidirectional", "adapter.connector=share_attn"])
def test_a_u_net_is_refused_what_is_defined_on_transformers(change):
    cfg = load("train", ["adapter=unicon", "backbone=sd21_tiny", "hardware=cpu", change])
    with pytest.raises(
        Unsupported,
        match=r"defined on transformers.*on this backbone: adapter=unicon with its yaml's own options; with",
    ):
        check_cell(cfg, construct(cfg.backbone))


# on the embedded U-Net, of nine steps: where the copy begins, or how much of the encoder is copied
PARTS = [("unicon", f"blocks={n}") for n in (2, 5, 8)] + [("controlnet", f"encoder_steps={n}") for n in (1, 3)]


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_part_of_a_u_net_starts_as_the_backbone_and_trains_all_of_itself(sd21_tiny, name, part):
    cfg = load("train", [f"adapter={name}", f"adapter.{part}", "backbone=sd21_tiny", "hardware=cpu"])
    adapter = build.new_adapter(cfg, sd21_tiny, training=False)
    batch = make_batch(adapter, sd21_tiny, sd21_tiny.encode_text(["a large red ball", "a small blue cube"], CPU))
    with torch.no_grad():
        start = (controlled(adapter, sd21_tiny, batch) - alone(adapter, sd21_tiny, batch)).abs().max()
    assert float(start) <= 1e-5
    shaken(adapter).losses(batch).mean().backward()
    bare = [n for n, p in adapter.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().any())]
    assert bare == []
    assert len(adapter.copies) == int(part.partition("=")[2])


def test_parts_of_a_wider_u_net_fit_each_other(random_backbone):
    """Two layers a level, and decoder levels whose stream is wider than the skip that joins it."""
    backbone = random_backbone(UNet, "StableDiffusionPipeline", configs_of("sd21"))
    places = UniCon.depths(backbone.facts)
    assert backbone.facts.samples_up == {15, 19, 23}
    assert [p["blocks"] for p in places] == [n for n in range(1, 28) if n not in (12, 8, 4)]
    x, t, text = noisy_inputs(backbone)
    with torch.no_grad():
        frozen = backbone.predict(x, t, text)
        for options in ({"blocks": n} for n in (1, 3, 7, 11, 14, 20)):
            adapter = UniCon(backbone, backbone.objective, None, "unicon", **options)
            found = adapter.predict(backbone, x, t, text, adapter.encode_condition(x))
            assert torch.allclose(found, frozen, atol=1e-5), options


@pytest.mark.parametrize(("name", "part", "said"), [
    ("unicon", "blocks=3", "begin at an upsampler of this U-Net; use 2 or 4"),
    ("unicon", "blocks=10", "1 to 9 blocks"),
    ("controlnet", "encoder_steps=4", "1 to 3; null copies the middle"),
])  # fmt: skip
def test_parts_that_a_u_net_has_not_are_refused(name, part, said):
    cfg = load("train", [f"adapter={name}", f"adapter.{part}", "backbone=sd21_tiny", "hardware=cpu"])
    with pytest.raises(Unsupported, match=said):
        check_cell(cfg, construct(cfg.backbone))


@pytest.mark.parametrize(("copy", "blocks", "indices"), [("full", 2, [-2, -1]), ("decoder", 1, [-1]), ("encoder", 2, [0, 1])])
def test_another_number_of_blocks(loaded, copy, blocks, indices):
    base, backbone, _ = loaded
    flow = "bidirectional" if copy == "encoder" else "unidirectional"
    cfg = designed(base, copy, flow, "zero_ft", blocks)
    adapter = build.new_adapter(cfg, backbone, training=False)
    assert adapter.indices == [i % backbone.facts.depth for i in indices]


def test_too_many_blocks_are_refused(loaded):
    base, backbone, _ = loaded
    with pytest.raises(Unsupported, match=f"1 to {backbone.facts.depth} blocks"):
        check_cell(designed(base, "full", "unidirectional", "zero_ft", 99), backbone)
