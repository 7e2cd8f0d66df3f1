"""The SD3 backbone: unrolled exactly, frozen, and refused with a remedy when its files cannot be had."""

import json
import shutil

import pytest
import torch

from src import build
from src.backbones.mmdit import SD3
from src.backbones.source import EMBEDDED_ROOT, ModelSource, SourceError
from src.config import load
from src.profiling.memory import blank_batch
from src.sampling import denoise, solver_for
from src.types import UserError
from tests.conftest import CPU, ROOT, noisy_inputs, run_entry


def tiny(source="embedded:sd3_tiny", **options):
    """An SD3 of which nothing is loaded."""
    return SD3(**{"name": "x", "source": source, "native_resolution": 64, "t5_tokens": 0} | options)


@pytest.fixture
def inputs(sd3_tiny):
    return noisy_inputs(sd3_tiny)


@pytest.fixture
def sd35_random(sd3_tiny, random_backbone):
    """SD3.5-medium in small: RMS-normed queries and keys, dual attention in the first blocks."""
    configs = {part: sd3_tiny.model.config(part) for part in ("transformer", "vae", "text_encoder", "scheduler")}
    configs["transformer"] |= {"qk_norm": "rms_norm", "dual_attention_layers": [0, 1, 2]}
    configs["tokenizer"] = {}
    return random_backbone(SD3, "StableDiffusion3Pipeline", configs, t5_tokens=0)


def reference(backbone, x, t, text):
    """The forward of diffusers, untouched."""
    return backbone.net(
        hidden_states=x,
        timestep=t * 1000,
        encoder_hidden_states=text.tokens_BLD,
        pooled_projections=text.pooled_BP,
        return_dict=False,
    )[0]


def stock_pipeline():
    """Without the T5, which the embedded model does not read: transformers cannot cut a prompt to no token at all."""
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(
        EMBEDDED_ROOT / "sd3_tiny", text_encoder_3=None, tokenizer_3=None, dtype=torch.float32, local_files_only=True
    )


@pytest.mark.parametrize("name", ["sd3_tiny", "sd35_random"])
def test_unrolled_equals_diffusers_exactly(name, request, inputs):
    backbone = request.getfixturevalue(name)
    with torch.no_grad():
        ours, theirs = backbone.predict(*inputs), reference(backbone, *inputs)
    assert theirs.std() > 0.01
    assert torch.equal(ours, theirs)


def test_unrolled_on_a_rectangular_latent(sd3_tiny, inputs):
    x = torch.randn(2, 16, 6, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(sd3_tiny.predict(x, *inputs[1:]), reference(sd3_tiny, x, *inputs[1:]))


def test_run_returns_a_new_state(sd3_tiny, inputs):
    with torch.no_grad():
        state = sd3_tiny.begin(*inputs)
        before = state.x.clone(), state.text.clone()
        sd3_tiny.run(0, state)
    assert torch.equal(state.x, before[0])
    assert torch.equal(state.text, before[1])


def test_copies_do_not_touch_the_backbone(sd3_tiny):
    config, digest = dict(sd3_tiny.net.config), sd3_tiny.weight_hash()
    copies = sd3_tiny.copy_steps([0, 5])
    with torch.no_grad():
        for p in copies.parameters():
            p.zero_()
    assert all(p.dtype == torch.float32 for p in copies.parameters())
    assert all(p.requires_grad for p in copies.parameters())
    assert sd3_tiny.weight_hash() == digest
    assert dict(sd3_tiny.net.config) == config


def test_what_the_last_copy_computes_in_vain_is_frozen(sd3_tiny):
    """Of the last block's text only keys and values are read. Autograd finds what is not reached; the queries it reaches,
    but what they give is cut off."""
    queries = ["copies.5.attn.add_q_proj.weight", "copies.5.attn.add_q_proj.bias"]
    full = build.new_adapter(load("train", ["adapter=unicon", "hardware=cpu"]), sd3_tiny, training=False)
    assert [n for n, p in full.named_parameters() if not p.requires_grad] == queries
    # a copy of an inner block has a text output, which nobody reads behind the last copy
    inner = build.new_adapter(load("train", ["adapter=dit_controlnet", "hardware=cpu"]), sd3_tiny, training=False)
    dead = {n for n, p in inner.named_parameters() if not p.requires_grad}
    inside = ("attn.add_q_proj.", "attn.to_add_out.", "ff_context.net.0.proj.", "ff_context.net.2.")
    assert dead == {f"copies.2.{part}{kind}" for part in inside for kind in ("weight", "bias")}
    # the rest of what is dead are rows of a weight: gate, and shift, scale and gate of the layers behind the attention
    with torch.no_grad():
        for p in inner.parameters():
            p.add_(0.02)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        batch = blank_batch(sd3_tiny.facts, "latent", 2, 64)
        for x in (batch.latents_BCHW, batch.noise_BCHW, batch.condition, batch.text.tokens_BLD):
            x.normal_()
    inner.losses(batch).sum().backward()
    rows = inner.copies[2].norm1_context.linear.weight.grad.abs().amax(1).unflatten(0, (6, 128)).amax(1)
    assert (rows > 0).tolist() == [True, True, False, False, False, False]


def test_stays_frozen_and_in_evaluation_mode(sd3_tiny):
    sd3_tiny.train()
    assert not any(m.training for m in sd3_tiny.net.modules())
    assert not any(p.requires_grad for p in sd3_tiny.parameters())


def test_facts_come_from_the_model_files(sd3_tiny):
    facts = sd3_tiny.facts
    assert (facts.depth, facts.width, facts.latent_channels, facts.factor, facts.multiple) == (6, 128, 16, 8, 16)


def test_text_and_codec_match_the_stock_pipeline(sd3_tiny):
    pipe = stock_pipeline()
    caption = "a large red ball and a small blue cube, brown floor"
    ours = sd3_tiny.encode_text([caption], CPU)
    tokens, _, pooled, _ = pipe.encode_prompt(caption, None, None, do_classifier_free_guidance=False, max_sequence_length=0)
    assert torch.equal(ours.tokens_BLD, tokens)
    assert torch.equal(ours.pooled_BP, pooled)
    codec, picture = sd3_tiny.load_codec(CPU), torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert codec.decode(codec.encode(picture)).shape == picture.shape


def test_codec_refuses_pictures_out_of_range(sd3_tiny):
    codec = sd3_tiny.load_codec(CPU)
    with pytest.raises(ValueError, match=r"wants \[0, 1\]"):
        codec.encode(torch.full((1, 3, 64, 64), -0.5))


def test_sampler_equals_the_stock_pipeline(sd3_tiny):
    """Same noise, levels and guidance: our loop over the unrolled network and diffusers' own make the same picture."""
    pipe = stock_pipeline()
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    caption = "a large green cone, dark floor"
    theirs = pipe(
        caption, height=64, width=64, num_inference_steps=5, guidance_scale=3.0, max_sequence_length=0,
        latents=noise.clone(), output_type="latent",
    ).images  # fmt: skip
    text, empty = sd3_tiny.encode_text([caption], CPU), sd3_tiny.encode_text([""], CPU)
    solver = solver_for(sd3_tiny.objective, sd3_tiny.scheduler())
    ours = denoise(lambda x, t, c, _: sd3_tiny.predict(x, t, c), noise, solver, sd3_tiny.objective, 5, text, empty, None, 3.0)
    assert torch.allclose(ours, theirs, atol=1e-4)


# ---- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("resolution", "near"), [(920, "912 or 928"), (70, "64 or 80"), (8, "16 or 32")])
def test_resolution_names_the_nearest_legal_ones(resolution, near):
    with pytest.raises(UserError, match=near):
        tiny(resolution=resolution)


def test_unknown_embedded_name_says_how_to_make_it():
    with pytest.raises(SourceError, match=r"python -m src\.prepare"):
        tiny("embedded:sd3_huge")


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_path_that_is_no_folder_never_reaches_the_hub(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(SourceError, match="is not a folder"):
        ModelSource(source).check(("transformer",))


def test_a_local_folder_never_reaches_the_hub(tmp_path, monkeypatch):
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", lambda *a, **k: pytest.fail("the hub was asked"))
    folder = shutil.copytree(EMBEDDED_ROOT / "sd3_tiny", tmp_path / "model")
    backbone = tiny(str(folder)).load(CPU, torch.float32)
    backbone.encode_text(["a red ball"], CPU)
    backbone.load_codec(CPU)
    assert backbone.scheduler() is not None


def test_a_folder_without_a_part_names_it(tmp_path):
    folder = shutil.copytree(EMBEDDED_ROOT / "sd3_tiny", tmp_path / "model")
    shutil.rmtree(folder / "vae")
    with pytest.raises(SourceError, match="vae/ is missing"):
        tiny(str(folder))


def test_a_folder_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["d", "U"]}))
    with pytest.raises(SourceError, match="names no 'transformer'"):
        tiny(str(tmp_path))


def _hub_error(kind):
    import httpx
    from huggingface_hub import errors

    response = httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
    made = {
        "gated": lambda: errors.GatedRepoError("gated", response=response),
        "missing": lambda: errors.RepositoryNotFoundError("missing", response=response),
        "revision": lambda: errors.RevisionNotFoundError("revision", response=response),
        "offline": lambda: errors.LocalEntryNotFoundError("offline"),
        "network": lambda: httpx.ConnectError("no route"),
    }
    return made[kind]()


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("gated", "accept its licence at https://licence.example"),
        ("missing", "check the spelling"),
        ("revision", "has no revision"),
        ("offline", "backbone.source=<that folder>"),
        ("network", "backbone.source=<that folder>"),
    ],
)
def test_hub_failures_are_one_line_with_the_remedy(kind, remedy, monkeypatch):
    def fail(*_args, **_kwargs):
        raise _hub_error(kind)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(SourceError, match=remedy) as caught:
        tiny("owner/model", revision="abc", licence_url="https://licence.example")
    assert "\n" not in str(caught.value)


def test_a_backbone_that_cannot_be_had_ends_with_code_2_and_the_remedy():
    done = run_entry("train", "backbone=sd3_medium", "hardware=cpu", "logger=local", timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2
    assert len(errors) == 1
    # this machine may lack other things too, such as room for its checkpoints: then it is a line of the list below
    said = done.stderr[done.stderr.index(errors[0]) :]
    assert "backbone.source=stabilityai/stable-diffusion-3-medium-diffusers: the model is gated, and no token is here" in said
    assert "Traceback" not in done.stderr
    assert not list((ROOT / "runs").glob("*sd3_medium*/*"))
