"""Training on pictures of several shapes, each at the size of its bucket."""

import json

import numpy as np
import pytest
from PIL import Image

from src import build
from src.config import load
from src.data.cache import TensorStore
from src.data.datamodule import ImageStream, Stores
from src.types import UserError
from tests.conftest import QUICK, run_entry, run_folder

BUCKETS = "data.buckets=[[64,64],[48,80],[80,48]]"
SHAPES = ((64, 64), (50, 90), (90, 50))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """40 training pictures of three shapes, and 16 held-out ones, with captions."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(56):
        h, w = SHAPES[i % 3]
        picture = np.full((h, w, 3), rng.integers(0, 256, 3), np.uint8)
        picture[h // 4 : h // 2, w // 4 : w // 2] = rng.integers(0, 256, 3)
        Image.fromarray(picture).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a picture of {h} by {w}")
    return folder


def words(pictures, *more):
    return [w for w in QUICK if not w.startswith("data.")] + [
        "data=folder", f"data.path={pictures}", "data.val_images=16", BUCKETS, *more
    ]  # fmt: skip


@pytest.mark.parametrize(
    "backbone", ["sd3_tiny", *(pytest.param(b, marks=pytest.mark.slow) for b in ("pixart_tiny", "sd21_tiny"))]
)
def test_an_adapter_trains_on_several_shapes_at_once(backbone, pictures, tmp_path):
    # the no-control arm needs a black condition of every shape
    done = run_entry(
        "train", *words(pictures, f"backbone={backbone}", "control_arm=true"), "budget.images=32", "budget.effective_batch=8",
        "hardware.micro_batch=8", "validation.every_images=32", f"output_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((run_folder(done) / "results.json").read_text())
    assert result["metrics"]["canny_f1/no_control_arm"]["n"] == 8
    assert result["resolution"] == 64


def test_a_bucket_that_the_backbone_cannot_take_is_refused(pictures):
    cfg = load("train", words(pictures, "data.buckets=[[64,64],[48,72]]"))
    with pytest.raises(UserError, match=r"a side of data\.buckets=72 is not a multiple of 16 .*use 64 or 80"):
        build.plan(cfg)
    cfg = load("train", words(pictures, "data.buckets=[[64,64],[160,288]]"))
    with pytest.raises(UserError, match=r"288: the position embedding of embedded:sd3_tiny ends at 256 pixels a side"):
        build.plan(cfg)


def test_a_batch_and_its_black_condition_have_one_shape(tmp_path):
    """Rows 0 and 2 are of one size, rows 1 and 3 of another."""
    import torch

    from src.data.cache import StoreOfSizes
    from src.types import TextCond

    def store(name, *shape):
        made = TensorStore(tmp_path / name, 2)
        made.write(range(2), {n: torch.randn(2, *shape) for n in ("latents", "condition")})
        return made

    rows = (np.array([0, 2]), np.array([1, 3]))
    both = StoreOfSizes([store("a", 16, 8, 8), store("b", 16, 6, 10)], rows)
    text = TensorStore(tmp_path / "text", 4)
    text.write(range(4), {"tokens": torch.randn(4, 3, 5)})
    zeros = (torch.zeros(1, 16, 8, 8), torch.zeros(1, 16, 6, 10))
    stores = Stores(list("abcd"), list("abcd"), both, text, both, TextCond(torch.zeros(1, 3, 5)), zeros, rows)
    stream = ImageStream(stores, 0, 0.0, with_condition=False, effective_batch=2)
    shapes = set()
    for first in range(0, 8, 2):
        batch = stream.__getitems__([first, first + 1])
        assert batch.condition.shape == batch.latents_BCHW.shape == batch.noise_BCHW.shape
        shapes.add(tuple(batch.latents_BCHW.shape[2:]))
    assert shapes == {(8, 8), (6, 10)}
    with pytest.raises(ValueError, match="2 sizes: a batch has one"):
        both.rows("latents", [0, 1])
