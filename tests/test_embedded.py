"""The embedded world and what is trained on it: scenes, words, the reader that judges, the shipped backbones."""

import dataclasses
import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from src.backbones.source import EMBEDDED_ROOT
from src.data.scenes import COLOURS, SHAPES, SIZES, Thing, render, sample_scene
from src.embedded.card import write_card
from src.embedded.families import FAMILIES
from src.embedded.reader import FEATURES, FOLDER, KINDS, SIZE, accuracy, labels, load_reader, reader_hash, rejection, unit
from src.embedded.score import load_pipeline, sample_captions
from src.embedded.text import TEXT_TOKENS, clip_tokenizer, scene_words, silent_t5, t5_tokenizer
from src.types import UserError

PLACES = {
    "left",
    "right",
    "centre",
    "center",
    "middle",
    "front",
    "behind",
    "back",
    "near",
    "far",
    "above",
    "below",
    "beside",
    "next",
}
SHIPPED = sorted(path.parent for path in EMBEDDED_ROOT.glob("*/model_index.json"))
CAPTIONS_SHA = "2e5dc51ba4a9eb79"  # of the first 200 captions of world 0
GOLDEN = {  # scene of world 0 -> mean level of each 16 x 16 block of its render at 64 px
    0: [[109.7, 109.7, 109.7, 109.7], [109.3, 110.3, 108.0, 107.7], [102.3, 96.4, 100.9, 90.6], [80.5, 83.4, 90.9, 71.6]],
    12: [[109.7, 108.7, 109.6, 109.7], [109.7, 87.1, 102.8, 109.2], [95.0, 72.0, 99.4, 102.8], [80.3, 74.7, 68.9, 81.6]],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=SHIPPED, ids=lambda folder: folder.name)
def shipped(request):
    """Each folder that ships with the project, in turn."""
    return request.param


@pytest.fixture(scope="module")
def held_out():
    """Scenes that no training and no choice of a setting has seen: 150 of world 1, from number 5000 on."""
    scenes = [sample_scene(1, 5000 + i) for i in range(150)]
    return scenes, [render(s, SIZE) for s in scenes]


# ---- scenes -----------------------------------------------------------------------------------------------------------


def test_scenes_are_a_pure_function_of_seed_and_index():
    alone = sample_scene(7, 3)
    sample_scene(7, 2)
    np.random.rand(5)
    again = sample_scene(7, 3)
    assert again.caption == alone.caption
    assert all(np.array_equal(a, b) for a, b in zip(render(alone, 32).values(), render(again, 32).values(), strict=True))
    assert len({sample_scene(s, i).view for s, i in ((7, 3), (7, 4), (8, 3))}) == 3


def test_scenes_are_those_that_the_weights_were_trained_on():
    captions = "\n".join(sample_scene(0, i).caption for i in range(200))
    assert hashlib.sha256(captions.encode()).hexdigest()[:16] == CAPTIONS_SHA
    for index, blocks in GOLDEN.items():
        drawn = render(sample_scene(0, index), 64)["image"]
        assert drawn.reshape(4, 16, 4, 16, 3).mean((1, 3, 4)) == pytest.approx(np.array(blocks), abs=0.6)


def test_captions_say_what_but_never_where():
    scenes = [sample_scene(0, i) for i in range(3000)]
    words = {w for s in scenes for w in s.caption.replace(",", "").split()}
    assert words <= set(scene_words())
    assert not words & PLACES
    pairs = [[(t.x - s.view.x) / t.z for t in s.things] for s in scenes if len(s.things) == 2]
    first_is_left = np.mean([a < b for a, b in pairs])
    assert abs(first_is_left - 0.5) < 3 * 0.5 / len(pairs) ** 0.5  # the order of the words is no position either


def test_maps_fit_the_picture(held_out):
    inside, seen = [], []
    for scene, drawn in zip(*held_out, strict=True):
        people = [k for k, t in enumerate(scene.things) if t.joints is not None]
        assert drawn["image"].shape == (SIZE, SIZE, 3)
        assert drawn["image"].dtype == np.uint8
        assert drawn["depth"].shape == drawn["segmentation"].shape == (SIZE, SIZE)
        assert np.isfinite(drawn["depth"]).all()
        assert drawn["depth"].min() > 0
        assert drawn["joints"].shape == (len(people), 14, 3)
        assert set(np.unique(drawn["segmentation"])) <= {0, 1, *(2 + k for k in range(len(scene.things)))}
        for k, thing in enumerate(scene.things):
            mask = drawn["segmentation"] == 2 + k
            seen.append(mask.any())
            if mask.sum() > 30:
                assert _colour_name(drawn["image"][mask]) == thing.colour
                assert drawn["depth"][mask].max() < drawn["depth"][drawn["segmentation"] == 0].max()
        for person, joints in zip(people, drawn["joints"], strict=True):
            for u, v, _ in joints[(joints[:, :2] > 1).all(1) & (joints[:, :2] < SIZE - 1).all(1)]:
                around = drawn["segmentation"][int(v) - 1 : int(v) + 2, int(u) - 1 : int(u) + 2]
                inside.append((around == 2 + person).any())
    assert len(inside) > 50
    assert np.mean(inside) > 0.9
    assert np.mean(seen) > 0.97


def _colour_name(pixels: np.ndarray) -> str:
    """The colour whose direction in RGB is nearest to that of the mean pixel: shading changes length, not direction."""
    mean = pixels.astype(float).mean(0)
    return max(COLOURS, key=lambda name: np.dot(mean, COLOURS[name]) / np.linalg.norm(COLOURS[name]))


# ---- words ------------------------------------------------------------------------------------------------------------


def test_each_word_is_one_token_and_the_longest_caption_fits():
    tokenizer = clip_tokenizer()
    assert [w for w in scene_words() if len(tokenizer(w).input_ids) != 3] == []
    size, pose = max(SIZES, key=len), "with arms down"
    things = tuple(Thing(s, "purple", size, 1.0, 0, 4, 0) for s in SHAPES[:3])
    longest = replace(sample_scene(0, 0), things=(replace(things[0], shape="person", pose=pose), *things[1:]), floor="brown")
    ids = tokenizer(longest.caption).input_ids
    assert len(ids) <= TEXT_TOKENS
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == longest.caption.replace(",", " ,").split()
    assert max(len(tokenizer(sample_scene(0, i).caption).input_ids) for i in range(500)) <= len(ids)
    assert len(tokenizer("an unforeseen zebra").input_ids) > 5  # unknown words fall apart into letters


def test_the_t5_is_silent():
    tokenizer = t5_tokenizer()
    ids = tokenizer(["a large red ball, gray floor", ""], padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        assert silent_t5(tokenizer, 128)(ids).last_hidden_state.abs().max() == 0


# ---- reading and scoring ----------------------------------------------------------------------------------------------


def test_labels_say_what_the_caption_says():
    scenes = [sample_scene(0, i) for i in range(200)]
    kinds, floors = labels(scenes)
    for scene, row, floor in zip(scenes, kinds, floors, strict=True):
        said = {(c, KINDS[k]) for c, k in zip(COLOURS, row, strict=True) if k}
        assert said == {(t.colour, t.shape) for t in scene.things}
        assert all(f"{colour} {kind}" in scene.caption for colour, kind in said)
        assert scene.caption.endswith(f"{['brown', 'gray', 'dark'][floor]} floor")


def test_the_reader_reads_held_out_scenes(held_out):
    scenes, drawn = held_out
    pictures, reader = np.stack([d["image"] for d in drawn]), load_reader()
    right = accuracy(reader, pictures, scenes)
    bounds = {"colour": 0.97, "shape": 0.94, "floor": 0.98, "scene": 0.9}
    assert {name: right[name] for name, bound in bounds.items() if right[name] < bound} == {}
    noise = torch.rand(unit(pictures).shape, generator=torch.Generator().manual_seed(0)) * 0.04
    soft = torch.nn.functional.avg_pool2d(unit(pictures) + noise, 3, 1, 1).clamp(0, 1) * 255
    blurred = accuracy(reader, soft.to(torch.uint8).movedim(1, -1).numpy(), scenes)
    assert blurred["shape"] > right["shape"] - 0.06, blurred  # a decoder's blur is not punished
    other = accuracy(reader, pictures, scenes[1:] + scenes[:1])
    assert max(other["shape"], other["scene"]) < 0.15, other
    assert reader.read(pictures[:3])[2].shape == (3, FEATURES)
    assert FEATURES <= 64
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 0.6e6


def test_the_reader_calls_no_heap_a_shape():
    pictures = np.stack([render(sample_scene(1, i), SIZE)["image"] for i in range(120)])
    refused = rejection(load_reader(), pictures, 1)
    assert min(refused.values()) > 0.75, refused


def test_the_reader_refuses_other_pictures(tmp_path):
    with pytest.raises(ValueError, match=r"wants \(N, 64, 64, 3\) uint8, got \(1, 32, 32, 3\)"):
        load_reader().read(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="no scene reader in"):
        load_reader(tmp_path)


# ---- the shipped backbones --------------------------------------------------------------------------------------------


def test_all_of_them_are_small_and_hold_one_autoencoder():
    assert SHIPPED, "the embedded backbones are missing: make them with `python -m src.prepare`"
    assert sum(f.stat().st_size for folder in SHIPPED for f in folder.rglob("*") if f.is_file()) < 30e6
    weights = {(folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() for folder in SHIPPED}
    assert len(weights) == 1  # or their latents would not compare


def test_shipped_sd3_loads_with_its_silent_t5():
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(EMBEDDED_ROOT / "sd3_tiny", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    noise = [torch.Generator().manual_seed(0)]
    plain = pipeline("a large red ball, gray floor", max_sequence_length=1, generator=noise, **call).images
    assert plain.shape == (1, 64, 64, 3)
    assert np.isfinite(plain).all()
    assert plain.std() > 0.05


def test_the_snippet_of_the_card_draws_a_picture(shipped, monkeypatch):
    code = (shipped / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(shipped.parent)
    names = {}
    exec(code, names)
    assert names["picture"].size == (SIZE, SIZE)
    assert np.asarray(names["picture"]).std() > 0.05 * 255


def test_a_shipped_backbone_draws_what_it_is_told(shipped):
    scores = json.loads((shipped / "scores.json").read_text())
    reader, scenes = load_reader(), [sample_scene(1, i) for i in range(24)]
    drawn = sample_captions(load_pipeline(shipped), [s.caption for s in scenes], 0, 12, 3.0)
    right = accuracy(reader, drawn, scenes)
    assert min(right["colour"], right["floor"]) > 0.85, right
    said, unsaid = (scores["arms"][arm]["colour"]["value"] for arm in ("samples", "other_captions"))
    assert said > 0.85
    assert unsaid < 0.4
    assert scores["reader"]["hash"] == reader_hash(FOLDER)  # or scores and reader are of different days


def test_the_card_is_the_generated_one(shipped, tmp_path):
    copy = shutil.copytree(shipped, tmp_path / shipped.name, ignore=shutil.ignore_patterns("*.safetensors"))
    write_card(copy)
    assert (copy / "README.md").read_text() == (shipped / "README.md").read_text()


def test_the_recipe_is_the_one_that_families_name(shipped):
    said = json.loads((shipped / "recipe.json").read_text())["backbone"]
    named = json.loads(json.dumps(dataclasses.asdict(FAMILIES[shipped.name].recipe)))
    assert {key: said.get(key, []) for key in named} == named  # the older cards say nothing of restarts, and had none
