"""Caches, streams, sources and the codec's road for conditions."""

import os

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from src.data.cache import TensorStore, store_key
from src.data.datamodule import ImageStream, PositionSampler
from src.data.folder import FolderSource, read_picture
from src.data.scenes import SceneSource
from src.data.stores import build_stores, condition_tensor, to_bytes, to_unit
from src.tasks.canny import Canny, edge_f1
from src.types import UserError
from tests.conftest import CPU

CANNY = {"name": "canny", "low": 50, "high": 120, "sigma": 0.8}


def scenes(count: int = 20, resolution: int = 64) -> SceneSource:
    return SceneSource("scenes", 0, count, 8, "train", resolution)


@pytest.fixture
def codec(sd3_tiny):
    return sd3_tiny.load_codec(CPU)


def stores(backbone, codec, folder, source=None, said=None, space="latent", **canny):
    task = Canny(**{**CANNY, **canny})
    say = (said if said is not None else []).append
    return build_stores([source or scenes()], task, backbone, codec, space, folder, CPU, 0, 0, say)[0]


# ---- cache ------------------------------------------------------------------------------------------------------------


def test_cached_rows_equal_fresh_ones(sd3_tiny, codec, tmp_path):
    made, source = stores(sd3_tiny, codec, tmp_path), scenes()
    task = Canny(**CANNY)
    for i in (0, 13):
        sample = source[i]
        assert torch.allclose(made.latents.rows("latents", [i]), codec.encode(to_unit([sample.image])), atol=1e-5)
        fresh = condition_tensor(task.make_condition(sample, np.random.default_rng(0))[None], "latent", codec)
        assert torch.allclose(made.condition_rows([i]), fresh, atol=1e-5)
        assert made.captions[i] == sample.caption
        text = sd3_tiny.encode_text([sample.caption], CPU)
        assert torch.allclose(made.text_rows([i]).tokens_BLD, text.tokens_BLD, atol=2e-2, rtol=1e-3)


def test_pixel_conditions_are_stored_as_bytes(sd3_tiny, codec, tmp_path):
    made = stores(sd3_tiny, codec, tmp_path, space="pixel")
    condition = made.condition_rows([3])
    assert condition.shape == (1, 3, 64, 64)
    assert set(condition.unique().tolist()) <= {0.0, 1.0}


def test_the_size_is_said_once_and_a_second_build_does_nothing(sd3_tiny, codec, tmp_path, monkeypatch):
    said = []
    stores(sd3_tiny, codec, tmp_path, said=said)
    assert len(said) == 3
    assert all("MiB" in line for line in said)
    monkeypatch.setattr(type(codec), "encode", lambda *a: torch.zeros(1, 16, 8, 8))  # only the black picture is encoded
    monkeypatch.setattr(SceneSource, "__getitem__", lambda *a: pytest.fail("an image was made again"))
    again = []
    stores(sd3_tiny, codec, tmp_path, said=again)
    assert again == []


def test_a_changed_threshold_renews_conditions_and_keeps_latents(sd3_tiny, codec, tmp_path):
    stores(sd3_tiny, codec, tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    stores(sd3_tiny, codec, tmp_path, low=80)
    new = {p.name for p in tmp_path.iterdir()} - before
    assert len(new) == 1
    assert next(iter(new)).startswith("conditions-")


def test_a_changed_caption_renews_the_text_only(sd3_tiny, codec, tmp_path, monkeypatch):
    stores(sd3_tiny, codec, tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    original = SceneSource.describe
    monkeypatch.setattr(SceneSource, "describe", lambda self, i: (original(self, i)[0], original(self, i)[1] + ", blue"))
    stores(sd3_tiny, codec, tmp_path)
    new = {p.name.split("-")[0] for p in {*tmp_path.iterdir()} if p.name not in before}
    assert new == {"text"}


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"resolution": 128}, {"codec": "another"}])
def test_every_part_of_a_key_counts(change):
    parts = {"source": "s", "codec": "c", "resolution": 64, "dtype": "float32"}
    assert store_key(**parts) != store_key(**{**parts, **change})


def test_a_killed_build_goes_on_at_the_next_shard(tmp_path):
    store = TensorStore(tmp_path / "s", 600)
    assert [r.start for r in store.missing()] == [0, 256, 512]
    store.write(range(256), {"x": torch.arange(256)})
    (tmp_path / "s" / f".rows-00000256.safetensors.{os.getpid() + 1}").write_bytes(b"half")
    fresh = TensorStore(tmp_path / "s", 600)
    assert [r.start for r in fresh.missing()] == [256, 512]
    fresh.write(range(256, 512), {"x": torch.arange(256, 512)})
    assert fresh.rows("x", [3, 300]).tolist() == [3, 300]


def test_rows_outside_are_refused(tmp_path):
    store = TensorStore(tmp_path / "s", 4)
    store.write(range(4), {"x": torch.arange(4)})
    with pytest.raises(IndexError, match="row 4 of 4"):
        store.rows("x", [4])


# ---- streams ----------------------------------------------------------------------------------------------------------


def test_batches_do_not_depend_on_the_micro_batch(sd3_tiny, codec, tmp_path):
    made = stores(sd3_tiny, codec, tmp_path)
    stream = ImageStream(made, seed=0, caption_dropout=0.5)
    whole = stream.__getitems__(list(range(30)))
    parts = [stream.__getitems__(p) for p in PositionSampler(0, 30, 7)]
    for name in ("latents_BCHW", "noise_BCHW", "uniform_B", "condition"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts])), name
    assert whole.ids == [i for p in parts for i in p.ids]
    assert torch.equal(whole.text.tokens_BLD, torch.cat([p.text.tokens_BLD for p in parts]))


def test_caption_dropout_is_drawn_per_image(sd3_tiny, codec, tmp_path):
    made = stores(sd3_tiny, codec, tmp_path)
    positions = list(range(400))
    text = ImageStream(made, 0, 0.25).__getitems__(positions).text
    dropped = [(x == made.empty_text.tokens_BLD[0]).all().item() for x in text.tokens_BLD]
    assert 0.17 < np.mean(dropped) < 0.33
    assert not any(
        (x == made.empty_text.tokens_BLD[0]).all() for x in ImageStream(made, 0, 0.0).__getitems__(positions).text.tokens_BLD
    )


def test_without_condition_everything_else_stays(sd3_tiny, codec, tmp_path):
    made = stores(sd3_tiny, codec, tmp_path)
    own, bare = (ImageStream(made, 0, 0.1, with_condition=c).__getitems__([5, 6]) for c in (True, False))
    assert torch.equal(own.noise_BCHW, bare.noise_BCHW)
    assert own.ids == bare.ids
    assert torch.equal(bare.condition[0], made.zero_conditions[0][0])
    assert not torch.equal(own.condition, bare.condition)


# ---- folder source ----------------------------------------------------------------------------------------------------


def folder_of(tmp_path, count=3, size=(40, 30)):
    for i in range(count):
        Image.new("RGB", size, (40 * i, 10, 10)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}\n")
    return tmp_path


def test_folder_splits_by_name(tmp_path):
    folder_of(tmp_path)
    train, val = (FolderSource("folder", str(tmp_path), 1, s, 32) for s in ("train", "val"))
    assert [train.describe(i) for i in range(2)] == [("0.png", "picture 0"), ("1.png", "picture 1")]
    assert val[0].id == "2.png"
    assert val[0].image.shape == (32, 32, 3)


def test_folder_fingerprint_sees_a_changed_caption(tmp_path):
    folder_of(tmp_path)
    before = FolderSource("folder", str(tmp_path), 1, "train", 32).fingerprint()
    (tmp_path / "0.txt").write_text("another caption, of another length")
    assert FolderSource("folder", str(tmp_path), 1, "train", 32).fingerprint() != before


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: [f.unlink() for f in p.glob("*.png")], "holds no image"),
        (lambda p: (p / "1.txt").unlink(), r"no caption file.*1\.png"),
        (lambda p: [f.unlink() for f in p.glob("[12].*")], "leaves none to train on"),
    ],
)
def test_folder_refusals_name_what_was_found(tmp_path, spoil, said):
    spoil(folder_of(tmp_path))
    with pytest.raises(UserError, match=said):
        FolderSource("folder", str(tmp_path), 1, "train", 32)


def test_a_cut_jpeg_is_named(tmp_path):
    file = tmp_path / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(UserError, match=r"cut\.jpg"):
        read_picture(file, 32)


def test_transparency_lies_over_white_and_exif_is_applied(tmp_path):
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png", 32) == 255).all()
    picture = Image.new("RGB", (64, 32), "black")
    picture.paste("white", (0, 0, 16, 32))
    exif = picture.getexif()
    exif[0x0112] = 3  # turned by half a circle
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    read = read_picture(tmp_path / "turned.jpg", 32)
    assert read[:, :2].mean() < 10  # the middle square, whose white stripe is now far right and cropped


# ---- edges ------------------------------------------------------------------------------------------------------------


def test_edges_between_equal_luminance_colours_are_found():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, :32], picture[:, 32:] = (200, 60, 60), (60, 128, 95)
    gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    assert abs(int(gray[0, 0]) - int(gray[0, 63])) <= 3
    edges = Canny(**CANNY).edges(picture)
    assert (edges[:, 30:34].max(1) > 0).mean() > 0.9


def test_edge_f1_tolerates_one_pixel_and_no_more():
    line = np.zeros((32, 32), bool)
    line[:, 10] = True
    assert edge_f1(line, line) == 1
    assert edge_f1(np.roll(line, 1, 1), line) == 1
    assert edge_f1(np.roll(line, 2, 1), line) == 0
    assert edge_f1(np.zeros_like(line), line) == 0
    assert edge_f1(np.zeros_like(line), np.zeros_like(line)) == 1


def test_bytes_and_floats_round_trip():
    picture = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    assert np.array_equal(to_bytes(to_unit(picture)), picture)
