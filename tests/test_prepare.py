"""How the embedded backbones are made: training, pipeline folder, scores, card, the shared autoencoder."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ModelMixin

from src.backbones.source import EMBEDDED_ROOT
from src.config import load
from src.embedded import plan, training
from src.embedded import stages as prepare
from src.embedded.card import snippet
from src.embedded.families import FAMILIES, VAE_OWNER, of_folder, of_pipeline
from src.embedded.reader import SIZE
from src.embedded.score import load_pipeline, sample_captions
from src.types import UserError

NAMES = list(FAMILIES)
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
SMALL = ["world_images=140", "workers=1"]
CAPTIONS = ["a large red ball, gray floor", "a small blue cube and a large white cone, brown floor"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(name: str, cache: Path, *overrides: str):
    return load("prepare", [f"backbone={name}", f"cache_dir={cache}", *SMALL, *overrides])


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A cache folder with small worlds and an autoencoder of four steps."""
    cache = tmp_path_factory.mktemp("workshop")
    prepare.stage_vae(settings(VAE_OWNER, cache, "vae_steps=4"))
    return cache


def another_cache(workshop: Path, folder: Path) -> Path:
    """A cache folder with the same worlds and nothing else."""
    folder.mkdir()
    for world in workshop.glob("world-*"):
        (folder / world.name).symlink_to(world)
    return folder


def lively(name: str) -> training.TinyModel:
    """An untrained model without its zeros: text, time and place all change what it says."""
    model, noise = FAMILIES[name].model(0), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise), alpha=0.05)
    return model.eval()


def put_trained(model: training.TinyModel, name: str, cache: Path) -> None:
    """Leave a model in a cache folder as a training of four steps would."""
    torch.save(model.state_dict(), cache / f"{name}.pt.final")
    row = {"step": 4, "images_seen": 128, "cpu_s": 1.0, "val_loss": 1.0, "val_loss_ema": 1.0}
    (cache / f"{name}.jsonl").write_text(json.dumps(row) + "\n")


@pytest.fixture(scope="module", params=NAMES)
def made(request, workshop, tmp_path_factory):
    """(name, model, folder) of a lively backbone that has gone through assembly, scores and card."""
    name, model = request.param, lively(request.param)
    put_trained(model, name, workshop)
    folder = tmp_path_factory.mktemp(name) / "made"
    cfg = settings(name, workshop, "vae_steps=4", "backbone_steps=4", f"out={folder}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "SCORE_STEPS", 2)
        for stage in (prepare.stage_assemble, prepare.stage_score, prepare.stage_card):
            stage(cfg)
    return name, model, folder


# ---- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(  # one loop trains them all
    "name", [pytest.param(name, marks=() if name == "pixart_tiny" else pytest.mark.slow) for name in NAMES]
)
def test_a_killed_training_goes_on_as_if_nothing_had_been(name, workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOG_EVERY", 2)
    whole, killed = (another_cache(workshop, tmp_path / folder) for folder in ("whole", "killed"))
    prepare.stage_backbone(settings(name, whole, "backbone_steps=4"))

    def kill_at_the_end(path):
        def log(row):
            if row["step"] == 4:
                raise KeyboardInterrupt
            path.write_text(json.dumps(row) + "\n")

        return log

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_log_to", kill_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            prepare.stage_backbone(settings(name, killed, "backbone_steps=4"))
    assert torch.load(killed / f"{name}.pt", weights_only=True)["step"] == 2
    assert not (killed / f"{name}.pt.final").exists()
    prepare.stage_backbone(settings(name, killed, "backbone_steps=4"))

    one, two = (torch.load(cache / f"{name}.pt.final", weights_only=True) for cache in (whole, killed))
    start = FAMILIES[name].model(0).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert sum(not torch.equal(one[key], start[key]) for key in one) > len(one) / 2
    assert _losses(whole / f"{name}.jsonl") == _losses(killed / f"{name}.jsonl")
    if name == "pixart_tiny":  # the learned variance stays what it was: nothing
        said = _whole_output(name, one)
        assert said[:, 16:].abs().max() == 0
        assert said[:, :16].abs().max() > 0


def _losses(log: Path) -> list[tuple]:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [(row["step"], row["val_loss"], row["val_loss_ema"]) for row in rows]


def _whole_output(name: str, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """All 32 output channels of the PixArt transformer, (1, 32, 8, 8)."""
    model = FAMILIES[name].model(0)
    model.load_state_dict(weights)
    noise, text = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((1, 16, 8, 8), (1, 24, 64)))
    added = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        return model.transformer(noise, text, torch.tensor([500]), added, return_dict=False)[0]


def test_a_restarted_rate_begins_again_and_ends_low_each_time():
    recipe = training.Recipe(steps=2600, restarts=(1000, 2000))
    rates = [training.rate(step, recipe) for step in range(2600)]
    assert max(rates) == pytest.approx(1, abs=1e-3)
    assert max(rates[999], rates[1999], rates[2599]) < 1e-4
    assert rates[:1000] == rates[1000:2000]
    assert rates[2000] == rates[0]
    for restarts in ((2600,), (0,), (5, 5), (7, 3)):
        with pytest.raises(UserError, match="must rise, between 0 and the 2600 steps"):
            training.Recipe(steps=2600, restarts=restarts)


def test_a_shorter_training_drops_the_restarts_beyond_it(workshop):
    cfg = settings("sd3_tiny", workshop, "backbone_steps=4")
    assert plan.backbone_recipe(cfg) == training.Recipe(steps=4, lr=FAMILIES["sd3_tiny"].recipe.lr)


# ---- what is made -----------------------------------------------------------------------------------------------------


def test_the_stock_class_reads_back_what_was_trained(made, monkeypatch):
    name, model, folder = made
    names = {}
    monkeypatch.chdir(folder.parent)
    exec(snippet(folder.name, FAMILIES[name], 2, 3.0), names)
    assert type(names["pipeline"]) is FAMILIES[name].pipeline
    assert names["picture"].size == (SIZE, SIZE)
    memory = model.pipeline(AutoencoderKL.from_pretrained(folder / "vae"))
    for part, module in names["pipeline"].components.items():
        if isinstance(module, torch.nn.Module):
            wanted = getattr(memory, part).state_dict()
            if isinstance(module, ModelMixin):
                wanted = {key: value.half().float() for key, value in wanted.items()}
            found = module.state_dict()
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted), part
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 12e6


def test_the_stock_pipeline_samples_from_what_training_trains(made):
    """The pipeline's latents are those of a loop around `TinyModel.forward`: same text, times, masks and target."""
    name, _, folder = made
    family, pipeline = FAMILIES[name], load_pipeline(folder)
    scheduler, model = copy.deepcopy(pipeline.scheduler), family.model(0).eval()
    model.load_state_dict(_weights_of(pipeline, model))
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {"height": SIZE, "width": SIZE, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    stock = pipeline(CAPTIONS, latents=x.clone(), **call, **family.call).images
    scheduler.set_timesteps(3)
    offset = 0 if name == "sd3_tiny" else 1  # step k of a diffusion in 1000 steps is t = (k + 1) / 1000
    with torch.no_grad():
        for time in scheduler.timesteps:
            level = ((time + offset) / 1000).float().expand(2)
            plain, said = (model(x, level, model.tokens(captions)) for captions in (["", ""], CAPTIONS))
            x = scheduler.step(plain + 3.0 * (said - plain), time, x, return_dict=False)[0]
    assert x.std() > 0.1
    assert torch.allclose(stock, x, rtol=1e-3, atol=1e-3), (stock - x).abs().max()


def _weights_of(pipeline, model: training.TinyModel) -> dict[str, torch.Tensor]:
    """The pipeline's weights under the names that the trainable model has for them."""
    parts = {"transformer": "transformer", "unet": "unet", "text.one": "text_encoder", "text.two": "text_encoder_2"}
    if not hasattr(model.text, "one"):
        parts["text"] = "text_encoder"
    found = {
        f"{ours}.{key}": value
        for ours, theirs in parts.items()
        for key, value in (getattr(pipeline, theirs).state_dict() if theirs in pipeline.components else {}).items()
    }
    return {key: found[key] for key in model.state_dict()}


def test_every_family_is_scored(made):
    name, _, folder = made
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["conditions"] == {"n": 70, "seed": 0, "steps": 2, "guidance": 3.0, **FAMILIES[name].call}
    assert set(scores["arms"]) == {"samples", "renders", "reconstructions", "other_captions"}
    assert scores["arms"]["renders"]["floor"]["value"] > 0.98
    assert scores["fid_scenes"]["samples"] > scores["fid_scenes"]["renders"]
    assert list(scores.get("t5_tokens", {})) == (["0", "1", "256"] if name == "sd3_tiny" else [])
    assert ("padding" in scores) == (name == "pixart_tiny")


def test_the_noise_of_a_picture_is_its_own_and_its_caption_counts(made):
    pipeline = load_pipeline(made[2])
    both = sample_captions(pipeline, CAPTIONS, 0, 2, 3.0).astype(int)
    swapped = sample_captions(pipeline, CAPTIONS[::-1], 0, 2, 3.0).astype(int)
    assert abs(both[:1] - sample_captions(pipeline, CAPTIONS[:1], 0, 2, 3.0)).max() <= 1
    assert abs(both - swapped).max() > 8


def test_pixart_draws_the_same_however_far_a_caption_is_padded(made):
    name, _, folder = made
    if name == "pixart_tiny":
        padding = json.loads((folder / "scores.json").read_text())["padding"]
        assert padding["n"] == 8
        assert padding["largest_difference"] <= 1
        assert set(padding["cpu_s_per_image"]) == {"24", "120"}


def test_every_family_has_a_card(made):
    name, _, folder = made
    card, scores = (folder / "README.md").read_text(), json.loads((folder / "scores.json").read_text())
    assert "license: apache-2.0" in card
    assert snippet("made", FAMILIES[name], 2, 3.0) in card
    assert f"{100 * scores['arms']['renders']['floor']['value']:.1f}" in card
    assert not re.search(r"\{\w*\}", card)
    assert {"samples.png", "curve_vae.png", "curve_backbone.png"} <= {file.name for file in folder.iterdir()}
    assert ("The other embedded backbones take over" in card) == (name == VAE_OWNER)
    assert ("does not compare" in card or "do not compare" in card) == (name != VAE_OWNER)


def test_a_folder_is_known_by_its_class(made):
    assert of_folder(made[2]) == made[0]
    with pytest.raises(UserError, match="no embedded backbone is a FluxPipeline"):
        of_pipeline("FluxPipeline")


# ---- whose autoencoder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name != VAE_OWNER])
def test_the_shipped_autoencoder_is_taken_over(name, workshop, tmp_path, monkeypatch):
    cache, out = another_cache(workshop, tmp_path / "cache"), tmp_path / "made"
    put_trained(FAMILIES[name].model(0), name, cache)
    cfg = settings(name, cache, "backbone_steps=4", f"out={out}")
    with pytest.raises(UserError, match="world_images=140 spans other latents than those of the autoencoder"):
        prepare.main(cfg)
    monkeypatch.setattr(plan, "BASIS_PICTURES", 140)
    prepare.stage_vae(cfg)
    assert not (cache / "vae_out").exists()
    prepare.stage_assemble(cfg)
    recipe = json.loads((out / "recipe.json").read_text())
    assert (out / VAE_WEIGHTS).read_bytes() == (EMBEDDED_ROOT / VAE_OWNER / VAE_WEIGHTS).read_bytes()
    assert (recipe["vae"]["same_as"], recipe["vae"]["steps"]) == (VAE_OWNER, 3200)
    assert recipe["command"] == f"python -m src.prepare backbone={name} seed=0 world_images=140 backbone_steps=4"


def test_an_autoencoder_of_the_cache_folder_or_of_its_own_comes_first(workshop, tmp_path):
    assert plan.shared_vae(settings("pixart_tiny", workshop, "world_images=4000")) is None
    assert plan.shared_vae(settings("pixart_tiny", tmp_path, "vae_steps=4")) is None
    assert plan.shared_vae(settings(VAE_OWNER, tmp_path)) is None
    assert plan.shared_vae(settings("pixart_tiny", tmp_path, "world_images=4000")) == EMBEDDED_ROOT / VAE_OWNER / "vae"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_everything_can_be_made_from_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "READER_FOLDER", tmp_path / "scene_reader")
    steps = ["vae_steps=4", "backbone_steps=4", "reader_steps=4"]
    cfg, made = settings(name, tmp_path / "cache", *steps, f"out={tmp_path / 'made'}"), tmp_path / "made"
    prepare.main(cfg)
    scores, recipe = (json.loads((made / name).read_text()) for name in ("scores.json", "recipe.json"))
    assert scores["conditions"]["n"] == 70
    assert scores["fid_scenes"]["samples"] > scores["fid_scenes"]["renders"]
    assert recipe["vae"]["curve"][-1]["step"] == recipe["backbone"]["curve"][-1]["step"] == 4
    assert recipe["command"].endswith("backbone_steps=4 vae_steps=4")
    assert "license: apache-2.0" in (made / "README.md").read_text()

    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").rglob("*") if f.suffix != ".json"}
    prepare.stage_vae(cfg)
    prepare.stage_backbone(cfg)
    prepare.stage_reader(cfg)
    assert {f: f.stat().st_mtime_ns for f in before} == before  # what is done is not done again
    (tmp_path / "cache" / f"{name}.jsonl").write_text('{"step": 3}\n')
    with pytest.raises(UserError, match="ends at step 3, not at backbone_steps=4"):
        prepare.stage_assemble(cfg)
