"""Stock pipelines with a controlled network in the place of their own, and the command that exports a run."""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverSinglestepScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from omegaconf import OmegaConf
from PIL import Image

from src import build
from src.adapters.unicon import UniCon
from src.backbones.unet import UNet
from src.checkpoint import META_KEY, AdapterCheckpointIO
from src.config import ConfigError, load
from src.export.__main__ import main as export
from src.interop.dropin import ControlledNetwork, DropinError
from src.types import UserError
from tests.conftest import CPU, QUICK, noisy_inputs, run_entry, run_folder
from tests.contract.test_adapters import make_batch, shaken
from tests.interop_pipes import PROMPTS, STOCK, drawing, drift, gap, make, noise_for, ours, stock_pipe, theirs
from tests.unet_shapes import configs_of

__all__ = ["make"]  # a fixture
DROPINS = [(a, b) for a in ("unicon", "unicon_half") for b in STOCK] + [("dit_controlnet", "pixart_tiny")]


@pytest.mark.parametrize(("words", "base"), DROPINS, ids=lambda v: v)
def test_a_stock_pipeline_with_the_dropin_draws_what_we_draw_and_it_survives_a_folder(words, base, make, tmp_path):
    cfg, backbone, adapter = make(words, base)
    network, conditions = ControlledNetwork(backbone, adapter, cfg), [drawing(0), drawing(1)]
    plain = stock_pipe(STOCK[base], backbone)
    alone = theirs(plain, backbone)
    pipe = stock_pipe(STOCK[base], backbone, **{backbone.NET: network})
    pipe.to("cpu")
    pipe.enable_attention_slicing()
    network.set_condition(conditions)
    found = theirs(pipe, backbone)
    assert drift(found, ours(adapter, backbone, conditions)) < 1e-4
    assert drift(found, alone) > 1e-2
    network.save_pretrained(tmp_path / "network")
    other = ControlledNetwork.from_pretrained(tmp_path / "network").set_condition(conditions, scale=0.5)
    setattr(plain, backbone.NET, other)
    assert drift(theirs(plain, backbone), ours(adapter, backbone, conditions, scale=0.5)) < 1e-4
    other.scale = 0.0
    assert drift(theirs(plain, backbone), alone) < 1e-4
    size = sum(f.stat().st_size for f in (tmp_path / "network").iterdir())
    assert size < 1.1 * sum(t.nbytes for t in adapter.state_dict().values())  # nothing of the backbone


OTHER_SCHEDULERS = [
    (DPMSolverSinglestepScheduler, "unicon", "sd21_tiny"),
    (FlowMatchHeunDiscreteScheduler, "unicon_half", "sd3_tiny"),  # two calls of the network per step
    (UniPCMultistepScheduler, "dit_controlnet", "pixart_tiny"),
]


@pytest.mark.parametrize(("scheduler", "words", "base"), OTHER_SCHEDULERS, ids=lambda v: getattr(v, "__name__", v))
def test_other_schedulers_of_diffusers_draw_with_the_dropin(scheduler, words, base, make):
    cfg, backbone, adapter = make(words, base)
    plain = stock_pipe(STOCK[base], backbone)
    assert not isinstance(plain.scheduler, scheduler)
    usual = theirs(plain, backbone)
    chosen = scheduler.from_config(plain.scheduler.config)
    plain.scheduler = chosen
    alone = theirs(plain, backbone)
    assert drift(alone, usual) > 1e-3  # it is another way to draw
    network = ControlledNetwork(backbone, adapter, cfg).set_condition([drawing(0), drawing(1)])
    pipe = stock_pipe(STOCK[base], backbone, **{backbone.NET: network})
    pipe.scheduler = chosen
    controlled = theirs(pipe, backbone)
    assert bool(controlled.isfinite().all())
    assert drift(controlled, alone) > 1e-2
    network.set_condition([drawing(1), drawing(0)])
    assert drift(theirs(pipe, backbone), controlled) > 1e-2
    network.scale = 0.0
    assert drift(theirs(pipe, backbone), alone) < 1e-4


def test_a_whole_pipeline_with_the_dropin_is_saved_and_loaded(make, tmp_path):
    cfg, backbone, adapter = make("unicon_half", "sd3_tiny")
    network = ControlledNetwork(backbone, adapter, cfg).set_condition(drawing())
    pipe = stock_pipe(StableDiffusion3Pipeline, backbone, transformer=network)
    expected = theirs(pipe, backbone)  # one condition for both pictures
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"] == ["src.interop.dropin", "ControlledNetwork"]
    back = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    back.set_progress_bar_config(disable=True)
    back.transformer.set_condition(drawing())
    assert torch.equal(theirs(back, backbone), expected)


def test_model_offloading_of_diffusers_takes_the_dropin_along(make):
    cfg, backbone, adapter = make("unicon_half", "sd3_tiny")
    network = ControlledNetwork(backbone, adapter, cfg).set_condition(drawing())
    pipe = stock_pipe(StableDiffusion3Pipeline, backbone, transformer=network)
    expected = theirs(pipe, backbone)
    try:
        pipe.enable_model_cpu_offload(device="cpu")  # its hooks, on the one device that every machine has
        moved = []
        hook = network._hf_hook
        before = hook.pre_forward
        hook.pre_forward = lambda module, *args, **kwargs: (moved.append(module), before(module, *args, **kwargs))[1]
        assert torch.equal(theirs(pipe, backbone), expected)
        assert moved
        assert all(module is network for module in moved)
    finally:
        pipe.remove_all_hooks()
    assert torch.equal(theirs(pipe, backbone), expected)


def test_the_dropin_moves_and_is_cast_with_its_pipeline(make):
    cfg, backbone, _ = make("unicon_half", "sd3_tiny")
    twin = copy.copy(backbone)
    twin._modules = dict(backbone._modules)  # a shallow copy shares this table
    twin.attach(copy.deepcopy(backbone.net))
    adapter = shaken(build.new_adapter(cfg, twin, training=False))
    network = ControlledNetwork(twin, adapter, cfg).set_condition(drawing())
    pipe = stock_pipe(StableDiffusion3Pipeline, twin, transformer=network)
    full = theirs(pipe, twin)
    pipe.to(torch.bfloat16)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    network.set_condition(drawing())
    assert float((theirs(pipe, twin).float() - full).abs().mean()) < 0.1 * float(full.std())
    with pytest.raises(DropinError, match="save before casting"):
        network.save_pretrained("nowhere")
    network.to("meta")
    assert next(network.net.parameters()).device == next(adapter.parameters()).device == torch.device("meta")


def test_the_dropin_takes_and_gives_what_the_network_does(make):
    cfg, backbone, adapter = make("unicon_half", "pixart_tiny")
    network = ControlledNetwork(backbone, adapter, cfg)
    batch = make_batch(adapter, backbone, backbone.encode_text(PROMPTS, CPU))
    t, text = torch.tensor([500, 500]), batch.text
    named = {"encoder_hidden_states": text.tokens_BLD, "encoder_attention_mask": text.mask_BL, "timestep": t}
    named["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    network.scale = 0
    with torch.no_grad():
        alone = backbone.net(batch.latents_BCHW, **named).sample
        said = network(batch.latents_BCHW, **named).sample
        assert said.shape == alone.shape  # with room for the learned variance
        channels = backbone.facts.latent_channels
        assert gap(said[:, :channels], alone[:, :channels]) < 1e-5
        assert torch.equal(network(batch.latents_BCHW, **named, return_dict=False)[0], said)
    assert network.config.sample_size == backbone.net.config.sample_size
    assert (network.dtype, network.device) == (torch.float32, CPU)


@torch.no_grad()
def test_the_dropin_reads_the_pooled_text_of_sdxl(random_backbone):
    backbone = random_backbone(UNet, "StableDiffusionXLPipeline", configs_of("sdxl"))
    adapter = shaken(UniCon(backbone, backbone.objective, None, "unicon", condition_space="pixel")).eval()
    network, condition = ControlledNetwork(backbone, adapter), torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(4))
    x, t, text = noisy_inputs(backbone)
    sizes = torch.tensor([[64.0, 64.0, 0, 0, 64.0, 64.0]] * 2)
    added = {"added_cond_kwargs": {"text_embeds": text.pooled_BP, "time_ids": sizes}}
    call = (x, backbone.objective.to_model_time(t), text.tokens_BLD)
    network.scale = 0.0
    assert gap(network(*call, **added).sample, backbone.net(*call, **added).sample) < 1e-5
    expected = adapter.predict(backbone, x, t, text, adapter.encode_condition(condition.expand(2, -1, -1, -1)))
    assert gap(network.set_condition(condition)(*call, **added).sample, expected) < 1e-5
    assert gap(expected, backbone.net(*call, **added).sample) > 1e-3


def test_wrong_uses_of_the_dropin_are_refused_in_one_line(make, tmp_path):
    cfg, backbone, adapter = make("unicon_half", "sd3_tiny")
    network, side = ControlledNetwork(backbone, adapter), torch.rand(3, 64, 64)
    text = backbone.encode_text(PROMPTS, CPU)
    call = {"encoder_hidden_states": text.tokens_BLD, "pooled_projections": text.pooled_BP, "timestep": torch.tensor(500.0)}

    def refused(fn, said):
        with pytest.raises(DropinError, match=said) as error:
            fn()
        assert "\n" not in str(error.value)

    refused(lambda: network(noise_for(backbone), **call), "set_condition")
    refused(lambda: network.set_condition(side * 2 - 1), r"in \[0, 1\]")
    refused(lambda: network.set_condition(torch.rand(3, 60, 64)), "multiples of 16")
    refused(lambda: network.set_condition([drawing(), drawing().resize((32, 32))]), "several sizes")
    network.set_condition(torch.rand(3, 32, 32))
    refused(lambda: network(noise_for(backbone), **call), "32 x 32 pixels, the picture 64 x 64")
    network.set_condition(torch.rand(3, 3, 64, 64))
    refused(lambda: network(noise_for(backbone), **call), "3 conditions for a batch of 2")
    refused(lambda: network(noise_for(backbone), **call, skip_layers=[1]), "skip_layers is not supported")
    refused(lambda: network.save_pretrained(tmp_path), "needs the configuration")
    refused(lambda: ControlledNetwork.from_pretrained(tmp_path), "no folder that")
    ControlledNetwork(backbone, adapter, cfg).save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | {"backbone_hash": "0" * 16}))
    refused(lambda: ControlledNetwork.from_pretrained(tmp_path), "was trained on 0000")
    with pytest.raises(ValueError, match="another backbone object"):
        ControlledNetwork(make("unicon_half", "sd21_tiny")[1], adapter)


# ---- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_dir):
    """A very short run of DiT-ControlNet on the embedded SD3."""
    out = tmp_path_factory.mktemp("runs")
    short = ["data.train_images=32", "budget.images=32", "validation.every_images=32"]
    short += [f"output_dir={out}", f"cache_dir={cache_dir}"]
    return run_folder(
        run_entry("train", "adapter=dit_controlnet", "backbone=sd3_tiny", *QUICK, *short, f"cache_dir={cache_dir}")
    )


@pytest.fixture(scope="module")
def pretended(make, tmp_path_factory):
    """A run folder of UniCon-Half with nothing but what an export reads."""
    cfg, backbone, adapter = make("unicon_half", "sd3_tiny")
    run = tmp_path_factory.mktemp("run")
    (run / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    meta = {"adapter": "unicon_half", "backbone": backbone.facts.source, "backbone_hash": backbone.weight_hash()}
    content = {"state_dict": adapter.state_dict(), META_KEY: meta}
    AdapterCheckpointIO().save_checkpoint(content, run / "checkpoints" / "images-000000032")
    return run


def lines_of(said: str) -> str:
    """The Python of an export's output."""
    lines = [line for line in said.splitlines() if line.startswith(("from ", "network", "pipe"))]
    assert len(lines) == 6
    return "\n".join(lines)


def test_the_command_exports_a_run_and_the_lines_that_it_prints_draw_a_picture(trained, tmp_path, monkeypatch):
    out = tmp_path / "exported"
    done = run_entry("export", f"run={trained}", f"out={out}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SD3ControlNetModel, ")
    assert done.stdout.strip().endswith(f"out: {out}")
    monkeypatch.chdir(tmp_path)
    exec(lines_of(done.stdout), {})
    assert np.asarray(Image.open(tmp_path / "picture.png")).std() > 5


@pytest.mark.parametrize(("run", "form"), [("trained", "dropin"), ("pretended", "auto")])
def test_other_methods_are_exported_as_dropins(run, form, request, tmp_path, monkeypatch, capsys):
    run, out = request.getfixturevalue(run), tmp_path / "exported"
    export(load("export", [f"run={run}", f"out={out}", f"form={form}"]))
    said = capsys.readouterr().out
    assert said.startswith("ControlledNetwork, ")
    assert {p.name for p in out.iterdir()} == {"config.json", "adapter.safetensors"}
    monkeypatch.chdir(tmp_path)
    drawing().save("condition.png")  # what the lines name where a run left no example
    exec(lines_of(said).replace("num_inference_steps=20", "num_inference_steps=2"), {})
    assert np.asarray(Image.open("picture.png")).std() > 5


def test_a_method_without_a_class_is_refused_in_one_line(pretended, tmp_path):
    done = run_entry("export", f"run={pretended}", f"out={tmp_path / 'new'}", "form=diffusers")
    assert done.returncode == 2
    assert "diffusers has no class for it" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"run": "nowhere"}, "no config.yaml there"),
        ({"run": "{empty}"}, "no checkpoint there"),
        ({"form": "onnx"}, "dropin"),
        ({"out": "src"}, "not empty"),
    ],
)
def test_wrong_words_are_refused(change, said, pretended, tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1")
    given = {"run": pretended, "out": tmp_path / "new"} | {k: v.replace("{empty}", str(tmp_path)) for k, v in change.items()}
    with pytest.raises((UserError, ConfigError), match=said):
        export(load("export", [f"{k}={v}" for k, v in given.items()]))
