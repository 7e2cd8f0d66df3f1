"""Scores of single pictures by CLIP, pyiqa and LPIPS: their values, what is refused, and what is said of those not there."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from src.embedded.text import TEXT_TOKENS, clip_tokenizer
from src.metrics.clip import PROMPTS, ClipScores
from src.metrics.quality import PyiqaMetric, entries, picture_metrics, picture_scores
from src.tasks.picture_metrics import LPIPS
from src.types import UserError
from tests.conftest import ROOT

CAPTIONS = ["a large red ball, gray floor", "a small blue cube, brown floor", "a green cone, dark floor"]
SEED = 2  # of a network that finds some cosines above 0 and some below


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of random weights, two layers and 24 pixels, with the embedded world's words."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder, tokenizer = tmp_path_factory.mktemp("models") / "clip", clip_tokenizer()
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {**common, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": TEXT_TOKENS}
    vision = {**common, "image_size": 24, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn(p.shape))
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    sizes = ((40, 40), (64, 40), (24, 30))
    return [np.kron(rng.integers(0, 256, (h // 4, w // 4, 3)), np.ones((4, 4, 1))).astype(np.uint8) for h, w in sizes]


def test_clip_scores_are_the_cosines_of_the_model_itself(clip_folder, pictures):
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    clip = ClipScores(str(clip_folder))
    found = picture_scores([clip], pictures, CAPTIONS, batch=2)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(images=pictures, return_tensors="pt")["pixel_values"]
    words = CLIPTokenizer.from_pretrained(clip_folder)

    def logits(texts: list[str]) -> torch.Tensor:
        with torch.no_grad():
            return model(pixel_values=pixels, **words(texts, padding=True, return_tensors="pt")).logits_per_image

    cosines = (logits(CAPTIONS) / model.logit_scale.exp().item()).diagonal()
    assert found["clip_score"] == pytest.approx((100 * cosines.clamp(min=0)).numpy(), abs=1e-4)
    assert found["clip_score"].max() > 0
    for name, pair in PROMPTS.items():
        chance = torch.softmax(logits(list(pair)).double(), 1)[:, 0]
        assert found[name] == pytest.approx(chance.numpy(), abs=1e-5), name
        assert 0 < found[name].min() < found[name].max() < 1
    assert set(found) == set(clip.metrics)


def test_a_clip_score_depends_on_its_own_picture_and_caption_alone(clip_folder, pictures):
    clip = ClipScores(str(clip_folder))
    whole, alone = (picture_scores([clip], pictures, CAPTIONS, batch=n) for n in (3, 1))
    for name in whole:
        assert whole[name] == pytest.approx(alone[name], abs=1e-4), name
    other = picture_scores([clip], pictures, CAPTIONS[1:] + CAPTIONS[:1])
    assert np.abs(other["clip_score"] - whole["clip_score"]).max() > 0.1
    assert other["clip_iqa"] == pytest.approx(whole["clip_iqa"], abs=1e-6)
    assert np.isfinite(picture_scores([clip], pictures[:1], ["very long " * 200])["clip_score"]).all()
    with pytest.raises(ValueError, match="zip"):
        picture_scores([clip], pictures, CAPTIONS[:2])
    with pytest.raises(ValueError, match="no picture"):
        picture_scores([clip], [], [])


def test_scores_become_entries_with_number_unit_and_interval(clip_folder, pictures):
    clip = ClipScores(str(clip_folder))
    found = entries([clip], picture_scores([clip], pictures, CAPTIONS))
    assert found["clip_score"]["n"] == 3
    assert found["clip_score"]["unit"] == "100 cosine"
    assert found["clip_iqa"]["better"] == "higher"
    assert found["clip_iqa"]["ci95"][0] <= found["clip_iqa"]["value"] <= found["clip_iqa"]["ci95"][1]
    assert clip.settings()["prompts"]["clip_iqa"] == ["Good photo.", "Bad photo."]


def test_the_hash_of_a_clip_is_that_of_its_files(clip_folder, tmp_path):
    copy = shutil.copytree(clip_folder, tmp_path / "copy")
    assert ClipScores(str(copy)).hash == ClipScores(str(clip_folder)).hash
    weights = load_file(copy / "model.safetensors")
    save_file({**weights, "logit_scale": weights["logit_scale"] + 1}, copy / "model.safetensors", {"format": "pt"})
    assert ClipScores(str(copy)).hash != ClipScores(str(clip_folder)).hash
    save_file(
        {k: v for k, v in weights.items() if k != "visual_projection.weight"}, copy / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="lacks weights"):
        ClipScores(str(copy)).score([np.zeros((24, 24, 3), np.uint8)], ["a ball"], None)


def test_what_is_no_clip_is_refused_in_one_line(clip_folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    other = shutil.copytree(clip_folder, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    bare = shutil.copytree(clip_folder, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    for source, words in {
        str(empty): "holds no weights",
        str(other): "of the type 'bert'",
        str(bare): "has no preprocessor_config.json",
        str(tmp_path / "absent"): "no folder and no hub id",
        "nobody/no-such-clip": "not cached here and the hub cannot be reached",
    }.items():
        with pytest.raises(UserError, match=words) as refused:
            ClipScores(source)
        assert "\n" not in str(refused.value)
        assert f"metrics.clip={source!r}" in str(refused.value)


def test_what_is_not_there_is_said_and_what_was_asked_for_is_refused(clip_folder, tmp_path):
    present, absent = picture_metrics()
    assert present == []
    assert len(absent) == 4
    for line, words in zip(
        absent, ("metrics.clip=", "metrics.musiq_weights=", "metrics.maniqa_weights=", "metrics.lpips_weights="), strict=True
    ):
        assert line.startswith("no ")
        assert words in line
    present, absent = picture_metrics(clip=str(clip_folder))
    assert [type(m).__name__ for m in present] == ["ClipScores"]
    assert len(absent) == 3
    for key in ("musiq_weights", "maniqa_weights", "lpips_weights"):
        with pytest.raises(UserError, match=f"{key}=.*is not a file"):
            picture_metrics(**{key: str(tmp_path / "absent.pth")})
    (tmp_path / "there.pth").write_bytes(b"weights")
    if importlib.util.find_spec("pyiqa") is None:
        with pytest.raises(UserError, match=r"pip install 'controlbench\[iqa\]'"):
            picture_metrics(musiq_weights=str(tmp_path / "there.pth"))


def test_pyiqa_with_its_own_weights(tmp_path):
    """Only where the optional package is: the file's network is built without a download and gives pyiqa's own number."""
    pyiqa = pytest.importorskip("pyiqa")
    theirs = pyiqa.create_metric("musiq", device=torch.device("cpu"), pretrained=False)
    torch.save(theirs.net.state_dict(), tmp_path / "musiq.pth")
    picture = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    own = PyiqaMetric("musiq", str(tmp_path / "musiq.pth"))
    with torch.no_grad():
        wanted = float(theirs(torch.from_numpy(picture).movedim(-1, 0)[None].float() / 255))
    assert own.score([picture], [""], None)["musiq"] == pytest.approx([wanted], abs=1e-5)
    with pytest.raises(UserError, match="is not maniqa's"):
        PyiqaMetric("maniqa", str(tmp_path / "musiq.pth")).score([picture], [""], None)


def test_lpips_wants_originals_and_is_that_of_the_tasks(tmp_path, pictures):
    models = pytest.importorskip("torchvision").models
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        shapes = models.alexnet(weights=None).features.state_dict()
    gen, file = torch.Generator().manual_seed(0), tmp_path / "alexnet.safetensors"
    save_file({f"features.{k}": 0.1 * torch.randn(v.shape, generator=gen) for k, v in shapes.items()}, file)
    [lpips], absent = picture_metrics(lpips_weights=str(file))
    assert len(absent) == 3
    originals = [p[::-1].copy() for p in pictures[:2]]
    found = picture_scores([lpips], pictures[:2], CAPTIONS[:2], originals)
    direct = LPIPS(str(file))
    assert found["lpips"] == pytest.approx([direct(a, b) for a, b in zip(pictures[:2], originals, strict=True)])
    assert lpips.settings()["hash"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert picture_scores([lpips], pictures, CAPTIONS) == {}  # nothing to compare with


def test_optional_packages_are_imported_when_they_are_used():
    code = (
        "import sys; import src.metrics.crosscheck, src.metrics.distances, src.metrics.quality\n"
        "heavy = {'transformers', 'cleanfid', 'torchmetrics', 'pyiqa', 'scipy', 'torchvision'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
