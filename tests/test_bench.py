"""Costs: the estimate against real steps on every tiny cell, operations counted by hand, bounds, rows and refusals."""

import re
import sys
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src.bench import cell as cells
from src.bench.estimate import estimate, hollow
from src.bench.measure import device_memory, measure
from src.bench.plan import plan, rates_of
from src.bench.work import Drawing, watch_drawing
from src.config import ConfigError, load
from src.profiling.counter import OpCounter, Rates, aten
from src.profiling.device import processor
from src.profiling.optimizer import ADAMW, FUSED_ADAMW, model_of, prime, state_tensors
from src.profiling.tracker import CATEGORIES
from src.results import read_cost
from src.spread import spread
from src.support import matrix
from src.types import UserError
from tests.conftest import run_entry, run_folder
from tests.contract.registry import EMBEDDED_BACKBONES

TINY = ["hardware=cpu", "batch=2", "warm_up=1", "repeats=1", "steps=2"]
RATES = Rates("test", {"fp32": 2.0, "bf16": 4.0, "tf32": 3.0}, bandwidth_gb_s=1.0, tf32_conv=False)
SLOW = {("unicon_half", "sd3_tiny"), ("unicon_half", "pixart_tiny"), ("t2i_adapter", "pixart_tiny")}  # shapes seen otherwise
PAIRS = [
    pytest.param(a, b, marks=[pytest.mark.slow] if (a, b) in SLOW or a == "template" else [], id=f"{a}-{b}")
    for a, found in matrix().items()
    for b in EMBEDDED_BACKBONES
    if found[b] is None
]
RECOMPUTED = [
    ("dit_controlnet", "sd3_tiny", "adapter"),
    pytest.param("dit_controlnet", "sd3_tiny", "both", marks=pytest.mark.slow),
    pytest.param("unicon_half", "pixart_tiny", "both", marks=pytest.mark.slow),
    ("controlnet", "sd21_tiny", "both"),
    pytest.param("controlnet", "sd21_tiny", "adapter", marks=pytest.mark.slow),
]
OTHER = [
    ("ema=true",),
    ("optimizer=adamw_fused",),
    pytest.param(("optimizer.clip_norm=null",), marks=pytest.mark.slow),
    pytest.param(("batch=16",), marks=pytest.mark.slow),
]


def planned(*overrides, **given):
    said = []
    made = plan(load("bench", [*overrides, *(f"{k}={v}" for k, v in given.items())]), said.append)
    made.said = said
    return made


@cache
def both(*overrides):
    """-> the estimate and the measurement of a tiny cell."""
    made = planned(*TINY, *overrides)
    told = estimate(made)
    return told, measure(made)[0]


def same(told, real):
    """Weights, gradients and optimizer to the byte, FLOPs to the last one, the rest to 1 %."""
    assert told["flops"] == real["flops"]
    assert told["peak_when"] == real["peak_when"]
    exact = ("frozen_weights", "trainable_weights", "gradients", "optimizer", "ema")
    assert {k: told["memory_gib"][k] for k in exact} == {k: real["memory_gib"][k] for k in exact}
    assert told["peak_mem_gib"] == pytest.approx(real["peak_mem_gib"], rel=0.01)
    assert told["saved_gib"] == pytest.approx(real["saved_gib"], rel=0.01)
    assert told["phases_gib"] == pytest.approx(real["phases_gib"], rel=0.01)
    for name in ("activations", "temporaries"):
        assert told["memory_gib"][name] == pytest.approx(real["memory_gib"][name], rel=0.01, abs=0.001 * told["peak_mem_gib"])


# ---- the estimate against real steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("adapter", "backbone"), PAIRS)
def test_the_estimate_equals_a_real_step_of_every_tiny_cell(adapter, backbone):
    told, real = both(f"adapter={adapter}", f"backbone={backbone}")
    same(told, real)
    assert told["flops"]["recomputed"] == 0
    assert told["flops"]["frozen_forward"] > 0
    assert told["flops"]["backward"] > 0


@pytest.mark.parametrize(("adapter", "backbone", "scope"), RECOMPUTED)
def test_the_estimate_equals_a_real_step_with_checkpointing(adapter, backbone, scope):
    plain = both(f"adapter={adapter}", f"backbone={backbone}")[0]
    told, real = both(f"adapter={adapter}", f"backbone={backbone}", f"hardware.checkpointing={scope}")
    same(told, real)
    again = told["flops"]["recomputed"]
    assert again > 0
    assert told["flops"]["backward"] - again == plain["flops"]["backward"]
    assert told["saved_gib"] < plain["saved_gib"]


@pytest.mark.parametrize("options", OTHER)
def test_the_estimate_equals_a_real_step_with_other_switches(options):
    told, real = both("adapter=unicon", *options)
    if options[0].startswith("optimizer=adamw_fused"):
        # on tensors without data the fused step is known by its numbers; the counters of steps are four bytes each
        assert told["memory_gib"]["optimizer"] == pytest.approx(real["memory_gib"]["optimizer"], rel=1e-3)
        assert told["peak_mem_gib"] == pytest.approx(real["peak_mem_gib"], rel=0.01)
        return
    same(told, real)
    assert (told["memory_gib"]["ema"] > 0) == ("ema=true" in options)


def test_a_backbone_that_was_not_frozen_costs_more():
    frozen, _ = both("adapter=dit_controlnet")
    told, real = both("adapter=dit_controlnet", "naive=true")
    same(told, real)
    assert told["flops"]["backward"] > 1.1 * frozen["flops"]["backward"]
    assert told["saved_gib"] > 1.05 * frozen["saved_gib"]
    assert told["memory_gib"]["gradients"] > frozen["memory_gib"]["gradients"]
    assert both("adapter=unicon", "naive=true")[0]["flops"] == both("adapter=unicon")[0]["flops"]  # nothing flows back there


@pytest.mark.parametrize(
    ("adapter", "backbone"), [("unicon", "sd3_tiny"), ("t2i_adapter", "sd21_tiny"), ("unicon", "pixart_tiny")]
)
def test_drawing_is_estimated_as_it_is(adapter, backbone):
    told, real = both(f"adapter={adapter}", f"backbone={backbone}", "what=inference")
    same(told, real)
    assert told["flops"]["backward"] == told["flops"]["optimizer"] == 0
    assert told["flops"]["condition"] > 0
    single, _ = both(f"adapter={adapter}", f"backbone={backbone}", "what=inference", "guidance=1")
    assert told["flops"]["adapter_forward"] == 2 * single["flops"]["adapter_forward"]
    assert told["flops"]["condition"] == single["flops"]["condition"]  # once per image, guided or not
    step = real["latency_ms"]["step"]["median"]
    whole = real["latency_ms"]["batch"]["median"]
    assert whole == pytest.approx(2 * step + real["latency_ms"]["condition"]["median"], rel=1e-6)  # two solver steps
    assert real["img_per_s"] == pytest.approx(1000 * 2 / whole)  # of two pictures


@pytest.mark.parametrize("what", ["training", "inference"])
def test_the_floor_is_the_backbone_alone(what):
    told, real = both("floor=true", f"what={what}")
    same(told, real)
    assert told["flops"]["frozen_forward"] > 0
    assert sum(told["flops"].values()) == told["flops"]["frozen_forward"]
    assert told["memory_gib"]["trainable_weights"] == told["memory_gib"]["gradients"] == 0
    above = estimate(planned(*TINY, f"what={what}"))
    # UniCon runs every block of the backbone, and a head of its own
    assert 0.95 < above["flops"]["frozen_forward"] / told["flops"]["frozen_forward"] <= 1


def test_weights_in_sixteen_bits_are_cast_once_per_prediction():
    """Drawing in mixed precision: autocast keeps copies of the adapter's weights until the prediction ends."""
    overrides = ("hardware=cpu", "hardware.precision=bf16-mixed", "what=inference")
    told = estimate(planned(*overrides))
    made = planned(*overrides)
    adapter = made.make(made.backbone.load(torch.device("cpu"), torch.bfloat16))
    real, _ = watch_drawing(Drawing(made, adapter, torch.device("cpu")), OpCounter())
    assert told["memory_gib"]["activations"] == pytest.approx(real.activations_gib, rel=0.03)


def test_the_frozen_pass_of_unicon_stores_nothing():
    """Its activations are the same whether the frozen blocks are recomputed or not: there is nothing of them to recompute."""
    for name, stores in {"unicon": False, "dit_controlnet": True}.items():
        made = planned(*TINY, f"adapter={name}")
        adapter, found = hollow(made), []
        for adapter.checkpointing in ("adapter", "both"):
            found.append(estimate(made, adapter))
        assert (found[0] != found[1]) == (found[1]["saved_gib"] < found[0]["saved_gib"]) == stores, name


# ---- operations by hand -----------------------------------------------------------------------------------------------


def counted(fn, *, phase="forward", rates=RATES):
    with OpCounter(rates) as counter:
        counter.phase = phase
        fn()
    return counter.tally


def test_a_linear_layer_by_hand():
    layer, x = nn.Linear(64, 32, bias=False), torch.randn(8, 64)
    tally = counted(lambda: layer(x))
    assert tally.flops == {"adapter_forward": 2 * 8 * 64 * 32}
    assert tally.nbytes["adapter_forward"] == 4 * (8 * 64 + 64 * 32 + 8 * 32)
    assert tally.arithmetic_ms["adapter_forward"] == pytest.approx(2 * 8 * 64 * 32 / 2e9)  # 2 TFLOP/s
    assert tally.bound_ms["adapter_forward"] == pytest.approx(4 * (8 * 64 + 64 * 32 + 8 * 32) / 1e6)  # 1 GB/s is slower
    y = layer(x).sum()
    # weights alone want a gradient: one product of the same size
    assert counted(y.backward, phase="backward").flops["backward"] == 2 * 8 * 64 * 32


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_by_hand_is_not_written_out(device):
    b, h, n, d = 2, 3, 512, 16
    q, k, v = (torch.randn(b, h, n, d, device=device, requires_grad=True) for _ in range(3))
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    attend = F.scaled_dot_product_attention if device == "cpu" else lambda q, k, v: kernel(q, k, v)[0]
    out = []
    tally = counted(lambda: out.append(attend(q, k, v)))
    assert tally.flops["adapter_forward"] == 2 * 2 * b * h * n * n * d
    # queries, keys, values, output, and a float32 per row; the scores would be n / d times as much
    assert tally.nbytes["adapter_forward"] == 4 * b * h * (4 * n * d + n)
    assert tally.attention == {"flash_cpu"}
    gradient = torch.ones_like(out[0])
    back = counted(lambda: torch.autograd.backward(out[0], gradient), phase="backward")
    assert back.flops["backward"] == 5 * 2 * b * h * n * n * d
    assert back.nbytes["backward"] < 4 * b * h * n * n


def test_a_convolution_by_hand():
    layer, x = nn.Conv2d(4, 8, 3, padding=1, bias=False), torch.randn(2, 4, 16, 16, requires_grad=True)
    forward = 2 * 2 * 16 * 16 * 8 * 4 * 9
    assert counted(lambda: layer(x)).flops["adapter_forward"] == forward
    y = layer(x).sum()
    assert counted(y.backward, phase="backward").flops["backward"] == 2 * forward  # of the weight and of the input


def test_views_are_free_and_writes_are_counted_once():
    x, y = torch.zeros(100), torch.ones(100)
    free = counted(lambda: (x.view(10, 10).t()[:3], x.expand(5, 100), torch.empty(50), x.detach()))
    assert free.nbytes["adapter_forward"] == 0
    assert counted(lambda: x.add_(y)).nbytes["adapter_forward"] == 3 * 400
    assert counted(lambda: x.copy_(y)).nbytes["adapter_forward"] == 2 * 400
    assert counted(lambda: y[:1].expand(100) + x).nbytes["adapter_forward"] == 4 + 2 * 400
    assert counted(x.zero_).nbytes["adapter_forward"] == 400


def test_a_product_under_inference_mode_is_counted_too():
    layer, x = nn.Linear(64, 32), torch.randn(8, 64)
    with torch.inference_mode():
        assert counted(lambda: layer(x)).flops["adapter_forward"] == 2 * 8 * 64 * 32


def test_rates_by_type_of_the_operands():
    a = torch.randn(32, 32)
    half = counted(lambda: a.bfloat16() @ a.bfloat16()).arithmetic_ms["adapter_forward"]
    assert half == pytest.approx(2 * 32**3 / 4e9)
    in_tf32 = Rates("test", RATES.tflops, 1.0, tf32_matmul=True)
    assert counted(lambda: a @ a, rates=in_tf32).arithmetic_ms["adapter_forward"] == pytest.approx(2 * 32**3 / 3e9)
    with pytest.raises(UserError, match=r"hardware\.rates\.tflops has no fp16 for test"):
        counted(lambda: a.half() @ a.half())


def numbers_of(optimizer, layer):
    """(bytes of state, temporaries, FLOPs, traffic) per parameter of a real step."""
    from src.profiling.tracker import StorageTracker

    prime(optimizer, layer.parameters())
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    tracker, counter, count = StorageTracker(), OpCounter(), sum(p.numel() for p in layer.parameters())
    tracker.hold("optimizer", [*layer.parameters(), *(p.grad for p in layer.parameters()), *state_tensors(optimizer)])
    tracker.phase = counter.phase = "optimizer"
    with tracker, counter:
        optimizer.step()
    state = sum(t.nbytes for t in state_tensors(optimizer) if t.ndim)
    found = (state, tracker.peak["temporaries"], counter.tally.flops["optimizer"], counter.tally.nbytes["optimizer"])
    return [x / count for x in found]


@pytest.mark.parametrize(("model", "kernel"), [(ADAMW, "foreach"), (FUSED_ADAMW, "fused")])
def test_the_models_of_adamw_are_its_real_steps(model, kernel):
    layer = nn.Linear(512, 512)
    found = numbers_of(torch.optim.AdamW(layer.parameters(), weight_decay=0.1, **{kernel: True}), layer)
    wanted = [model.state_bytes, model.temporary_bytes, model.flops, model.traffic_bytes]
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-3)


def test_which_optimizers_are_known_by_their_numbers():
    assert model_of(load("bench", ["optimizer=adamw"]).optimizer.algorithm) is ADAMW
    assert model_of(load("bench", ["optimizer=adamw_fused"]).optimizer.algorithm) is FUSED_ADAMW
    eight = model_of({"_target_": "bitsandbytes.optim.AdamW8bit"})
    assert 2 < eight.state_bytes < 2.1
    assert model_of({"_target_": "torch.optim.SGD"}) is None
    assert model_of({"_target_": "bitsandbytes.optim.Lion8bit"}) is None  # one moment


# ---- full size --------------------------------------------------------------------------------------------------------

# TFLOP per image with 154 text tokens, counted on other implementations of the same shapes, whose connectors and entries
# differ a little: frozen forward, adapter forward, backward
TABLE = [
    ("unicon", 1024, (8.44, 9.36, 19.13)),
    pytest.param("unicon_half", 1024, (8.44, 4.68, 9.56), marks=pytest.mark.slow),
    pytest.param("dit_controlnet", 1024, (8.44, 4.45, 21.47), marks=pytest.mark.slow),
    pytest.param("unicon", 512, (1.80, 2.03, 3.93), marks=pytest.mark.slow),
    pytest.param("unicon_half", 512, (1.80, 1.01, 1.96), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "side", "wanted"), TABLE)
def test_the_flops_of_sd3_medium(name, side, wanted):
    sizes = ("hardware=h200", f"resolution={side}", "backbone.t5_tokens=77")
    made = planned("backbone=sd3_medium", f"adapter={name}", *sizes)
    assert made.said == [
        "backbone=sd3_medium: the shape of stabilityai/stable-diffusion-3-medium-diffusers with random weights; "
        "cost does not depend on them"
    ]
    told = estimate(made)
    found = [told["flops"][part] / 1e12 for part in ("frozen_forward", "adapter_forward", "backward")]
    assert found == pytest.approx(wanted, rel=0.05)
    total = sum(told["flops"][part] for part in ("frozen_forward", "adapter_forward", "backward"))
    arithmetic = told["arithmetic_ms"]["total"]
    assert total / 989e9 <= 1.000001 * arithmetic < 1.02 * total / 989e9  # nearly all of it in bf16
    assert told["step_time_ms"]["total"] >= arithmetic
    assert told["step_time_ms"]["bound"] is True
    assert sum(told["memory_gib"].values()) == pytest.approx(told["peak_mem_gib"])


@pytest.mark.parametrize(
    "backbone", ["pixart_tiny", *(pytest.param(b, marks=pytest.mark.slow) for b in EMBEDDED_BACKBONES if b != "pixart_tiny")]
)
def test_mixed_precision_is_estimated_on_every_backbone(backbone):
    """PixArt's text mask is in the frozen weights' precision, which autocast alone brings together with the copies' queries."""
    made = planned("hardware=h200", f"backbone={backbone}", "batch=2", "hardware.checkpointing=both")
    told, full = estimate(made), estimate(planned(*TINY, f"backbone={backbone}", "hardware.checkpointing=both"))
    dead = full["memory_gib"]["frozen_weights"] - 2 * (
        full["memory_gib"]["frozen_weights"] - told["memory_gib"]["frozen_weights"]
    )
    assert 0 <= dead < 0.02 * full["memory_gib"]["frozen_weights"]  # what never trains in the copy stays in float32
    assert told["flops"] | {"optimizer": 0} == full["flops"] | {"optimizer": 0}


@pytest.mark.slow
def test_memory_is_linear_in_the_batch():
    made = planned("backbone=sd3_medium", "adapter=unicon_half", "hardware=h200", "resolution=512")
    adapter, saved = hollow(made), []
    for batch in (1, 2, 4):
        made.cfg.batch = batch
        saved.append(estimate(made, adapter)["saved_gib"])
    assert saved[2] - saved[1] == pytest.approx(2 * (saved[1] - saved[0]), rel=1e-6)


# ---- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adapter=controlnet"], "use adapter=dit_controlnet"),
        (["resolution=72"], "64 or 80"),
        (["naive=true", "what=inference"], "write what=training"),
        (["naive=true", "floor=true"], "write what=training floor=false"),
        (["hardware=h200", "mode=measure"], "write hardware=cpu"),
        (["hardware=h200", "hardware.devices=2"], "hardware.devices=1"),
        (["hardware=h200", "hardware.rates.gpu=null"], "hardware.rates has no gpu"),
        (["hardware.overlap=true"], "python -m src.bench.speed overlap"),
        (["hardware.compile=frozen"], "write mode=measure, or hardware.compile=none"),
        (["backbone=sd21_tiny", "hardware.channels_last=true"], "write mode=measure, or hardware.channels_last=false"),
    ],
)
def test_refusals(overrides, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError) as refused:
        planned(*(["hardware=cpu"] if not any("hardware=" in o for o in overrides) else []), *overrides)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_optimizer_that_cannot_be_estimated_is_refused():
    made = planned("hardware=h200")
    made.cfg.optimizer.algorithm = {"_target_": "bitsandbytes.optim.Lion", "_partial_": True}
    with pytest.raises(UserError, match=r"Lion cannot be estimated.*mode=measure"):
        estimate(made)


def test_shapes_are_known_without_a_download():
    assert (
        planned("backbone=sd21", "adapter=controlnet", "hardware=cpu", "resolution=512").backbone.facts.source == "random:sd21"
    )
    assert planned("hardware=cpu").said == []
    other = ["backbone=sd21", "adapter=controlnet", "backbone.source=./nowhere"]
    with pytest.raises(UserError, match="nowhere"):
        planned("hardware=cpu", *other)


@pytest.mark.slow
def test_matched_sizes_are_chosen():
    made = planned("hardware=cpu", "adapter=t2i_adapter", "adapter.params_match=unicon_half")
    assert "adapter.params_match=unicon_half" in made.said[0]


@pytest.mark.parametrize("profile", ["gpu_24g", "gpu_80g", "h100", "h200"])
def test_every_gpu_profile_names_its_rates(profile):
    hardware = load("bench", [f"hardware={profile}"]).hardware
    rates = rates_of(hardware)
    assert rates.tflops["bf16"] > rates.tflops["tf32"] >= rates.tflops["fp32"]
    assert rates.per_ms(torch.bfloat16) == rates.tflops["bf16"] * 1e9
    assert 500 < rates.bandwidth_gb_s < 10000
    assert rates_of(load("bench", ["hardware=cpu"]).hardware) is None


def test_a_measured_cell_may_have_the_switches_that_an_estimate_refuses():
    assert planned("hardware=cpu", "mode=measure", "hardware.compile=frozen").cfg.hardware.compile == "frozen"


def test_the_drivers_peak_is_what_it_counts_beside_the_allocator_and_the_allocators_peak(monkeypatch):
    known = {"max_memory_allocated": 5, "max_memory_reserved": 8, "memory_reserved": 6}
    for name, gib in known.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, gib=gib: gib * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (91 * 2**30, 100 * 2**30))
    found = device_memory(torch.device("cuda", 0))["device_memory_gib"]
    assert found == {"allocated": 5, "reserved": 8, "driver": 3 + 8}  # 9 in use now, of which 6 are the allocator's


def test_spread():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "quartiles": [2.0, 4.0], "n": 5}


# ---- the entry --------------------------------------------------------------------------------------------------------


def test_an_estimate_through_the_entry(tmp_path):
    done = run_entry("bench", "hardware=h200", "adapter=unicon_half", "batch=8", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    row = read_cost(run_folder(done) / "results.json")
    assert (row.mode, row.what, row.status, row.adapter, row.batch) == ("estimate", "training", "done", "unicon_half", 8)
    assert row.flags["optimizer_kernel"] == "foreach"
    assert row.flags["attention"] == "flash"
    assert row.rates["gpu"] == "H200"
    assert row.predicted is None
    assert "bound: H200 takes no less than" in done.stdout
    assert (run_folder(done) / "config.yaml").is_file()


def test_an_optimizer_that_is_known_by_numbers_is_estimated_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim", raising=False)
    words = ["hardware=h200", "optimizer=adamw8bit", "adapter=unicon_half"]
    row = read_cost(cells.run(load("bench", [*words, f"output_dir={tmp_path}"])) / "results.json")
    assert (row.flags["optimizer"], row.flags["optimizer_kernel"]) == ("bitsandbytes.optim.AdamW8bit", "bitsandbytes")
    assert row.memory_gib["optimizer"] == pytest.approx((2 + 8 / 256) * 1e6 * row.trainable_m / 2**30, rel=1e-3)
    for refused in (["mode=measure"], ["optimizer.algorithm._target_=bitsandbytes.optim.Lion8bit"]):
        with pytest.raises(ConfigError, match=r"bitsandbytes\.optim\.\w+ (is not here|does not exist)"):
            load("bench", [*words, *refused])
    with pytest.raises(ConfigError, match=r"adapter\.blokcs=1 is no argument .*did you mean adapter\.blocks"):
        load("bench", [*words, "+adapter.blokcs=1"])


def test_a_measurement_through_the_entry(tmp_path, capsys):
    folder = cells.run(load("bench", [*TINY, "mode=measure", "adapter=unicon_half", f"output_dir={tmp_path}", "repeats=3"]))
    row = read_cost(folder / "results.json")
    assert (row.mode, row.device, row.mfu, row.device_memory_gib) == ("measure", f"cpu: {processor()}", None, None)
    assert row.flags["overlap"] is False
    assert row.flags["optimizer_kernel"] == "for_loop"
    assert row.flags["attention"] == "flash_cpu"
    assert row.predicted["peak_mem_gib"] == pytest.approx(row.peak_mem_gib, rel=0.01)
    for phase, times in row.step_time_ms.items():
        assert times["n"] == 3
        assert times["quartiles"][0] <= times["median"] <= times["quartiles"][1], phase
    assert set(row.memory_gib) == set(CATEGORIES)
    printed = capsys.readouterr().out
    assert re.search(r"ms per step, median \[quartiles\]: forward [\d.]+ \[", printed)
    assert printed.rstrip().endswith(f"run: {folder}")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("can't allocate memory: 9 bytes")],
)
def test_running_out_of_memory_is_a_result(error, tmp_path, monkeypatch, capsys):
    def fails(_cell):
        raise error

    monkeypatch.setattr(cells, "measure", fails)
    with pytest.raises(cells.OutOfMemory) as found:
        cells.run(load("bench", [*TINY, "mode=measure", f"output_dir={tmp_path}"]))
    assert found.value.report() == 3
    printed = capsys.readouterr()
    assert "error: out of memory: " in printed.err
    assert re.search(r"estimated [\d.]+ GiB at the peak", printed.err)
    assert printed.out.rstrip().endswith(f"run: {found.value.folder}")
    row = read_cost(found.value.folder / "results.json")
    assert (row.status, row.peak_mem_gib, row.step_time_ms) == ("oom", None, None)
    assert row.predicted["peak_mem_gib"] > 0
    assert row.trainable_m > 0


def test_another_error_of_a_measurement_is_not_called_memory(tmp_path, monkeypatch):
    def fails(_cell):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(cells, "measure", fails)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        cells.run(load("bench", [*TINY, "mode=measure", f"output_dir={tmp_path}"]))
    assert not list(tmp_path.rglob("results.json"))


def test_mfu_leaves_out_what_is_recomputed():
    made = planned("hardware=h200", "hardware.precision=bf16-mixed")
    flops = {"frozen_forward": 4e12, "adapter_forward": 3e12, "backward": 9e12, "recomputed": 2e12, "optimizer": 1e12}
    found = {"flops": flops, "step_time_ms": {"total": spread([28.0])}}
    assert cells.mfu(made, found) == pytest.approx(14e12 / (28.0 * 989e9))
    made.rates = None
    assert cells.mfu(made, found) is None


def test_a_measurement_is_held_against_no_rates_of_another_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, profile, theirs in (
        ("NVIDIA H100 80GB HBM3", "h100", None),
        ("NVIDIA H100 80GB HBM3", "gpu_80g", "A100-SXM4-80GB"),
        ("NVIDIA GH200 480GB", "h200", "H200"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        made = planned(f"hardware={profile}", "mode=measure")
        assert (made.rates is None) == bool(theirs)
        line = f"hardware={profile} has the rates of {theirs}, and this is {name}: no bound on time, no MFU"
        assert made.said == ([line] if theirs else [])
        assert planned(f"hardware={profile}").rates is not None  # an estimate is for the GPU that the profile names
