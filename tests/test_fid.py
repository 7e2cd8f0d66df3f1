"""FID and KID: against closed forms, against clean-fid and torchmetrics, on features and on folders of pictures."""

import hashlib
import importlib.util
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from src.metrics import extractors
from src.metrics.crosscheck import by_torchmetrics, cross_checked
from src.metrics.distances import SMALL_N, set_distances
from src.metrics.extractors import Inception, TorchScript, extract, inception_file, read_pictures
from src.metrics.frechet import FOLD, Moments, MomentStream, frechet_distance, frechet_infinity, moments, partition
from src.metrics.kernel import BLOCK, kernel_distance
from src.types import UserError

needs_cleanfid = pytest.mark.skipif(importlib.util.find_spec("cleanfid") is None, reason="clean-fid is not installed")


def features(key: int, count: int, width: int, shift: float = 0.0, spread: float = 1.0) -> np.ndarray:
    """Correlated features, float64; the mixing matrix depends on the width alone."""
    mix = np.random.default_rng(width).normal(size=(width, width)) / width**0.5
    return np.random.default_rng([key, count]).normal(size=(count, width)) @ (np.eye(width) + spread * mix) + shift


# ---- Frechet distance ----


def test_the_distance_is_the_closed_form():
    a, b = features(0, 400, 8), features(1, 300, 8, shift=1.0, spread=2.0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(8 * 4)
    assert frechet_distance(a, 3 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(4 * np.trace(np.cov(a, rowvar=False)))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    dead = np.concatenate([a, np.zeros((400, 2))], 1)  # features that never fire
    assert frechet_distance(dead, dead + 1) == pytest.approx(10)
    diagonal = Moments(np.zeros(3), np.diag([1.0, 4.0, 9.0]), 10), Moments(np.ones(3), np.diag([4.0, 4.0, 0.0]), 10)
    assert frechet_distance(*diagonal) == pytest.approx(3 + (1 - 2) ** 2 + 0 + 3**2)


def test_golden_values_of_fixed_features():
    """The first, second and fourth were computed with 60 digits from the definitions."""
    grid = np.sin(np.outer(np.arange(1, 41), np.arange(1, 7)) ** 1.5)
    other = np.cos(np.outer(np.arange(1, 61), np.arange(1, 7)) ** 1.25) + 0.1
    assert frechet_distance(grid, other) == pytest.approx(0.28147476516594084, rel=1e-10)
    assert frechet_distance(grid[:5], other[:4]) == pytest.approx(5.363286765191425, rel=1e-10)
    assert frechet_infinity(grid, other) == pytest.approx(-0.13067114216442252, rel=1e-9)
    assert kernel_distance(grid, other).value == pytest.approx(-0.017413524974646122, rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(300, 200), (20, 300), (300, 20), (12, 9), (24, 24), (2, 2)])
def test_every_way_to_it_gives_one_number(n, m):
    """Few rows or many on each side, stored or as moments: rows, moments and one of each."""
    a, b = features(2, n, 24, 0.3), features(3, m, 24, spread=2.0)
    stored = frechet_distance(a, b)
    assert stored == pytest.approx(frechet_distance(moments(a), moments(b)), rel=1e-6)
    assert stored == pytest.approx(frechet_distance(a, moments(b)), rel=1e-6)
    scaled = frechet_distance(1000 * a, 1000 * b)
    assert scaled == pytest.approx(1e6 * stored, rel=1e-8)


@needs_cleanfid
@pytest.mark.parametrize(("n", "m", "width"), [(300, 200, 24), (24, 24, 24), (15, 40, 24), (500, 400, 64)])
def test_it_is_the_number_of_cleanfid_and_of_torchmetrics(n, m, width):
    a, b = features(4, n, width, 0.2), features(5, m, width, spread=1.5)
    found = cross_checked(a, b)
    # where covariances are singular, the others take roots of rounding errors
    close = 1e-6 if min(n, m) <= width else 1e-9
    assert found["clean-fid"] == pytest.approx(found["ours"], rel=close)
    assert found["torchmetrics"] == pytest.approx(found["ours"], rel=close)
    assert found["agree"]


def test_without_cleanfid_the_cross_check_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    a, b = features(4, 100, 8), features(5, 100, 8, 0.5)
    found = cross_checked(a, b)
    assert "pip install" in found["clean-fid"]
    assert found["torchmetrics"] == pytest.approx(by_torchmetrics(a, b))
    assert found["agree"]


def test_streamed_moments_do_not_depend_on_the_batch():
    a = features(6, 2 * FOLD + 77, 16, shift=1e4)  # a mean that would eat the covariance in one pass of squares
    whole = moments(a)
    for batch in (1, 64, FOLD + 1):
        stream = MomentStream()
        for first in range(0, len(a), batch):
            stream.add(a[first : first + batch])
            if first == 0 and batch > 1:
                stream.moments()  # looking changes nothing
        found = stream.moments()
        assert found.n == len(a)
        assert np.array_equal(found.mean_F, whole.mean_F)
        assert np.array_equal(found.cov_FF, whole.cov_FF)
    assert whole.mean_F == pytest.approx(a.mean(0), rel=1e-13)
    assert whole.cov_FF == pytest.approx(np.cov(a, rowvar=False), rel=1e-9, abs=1e-9)


def test_bad_features_are_refused():
    a = features(0, 10, 4)
    with pytest.raises(ValueError, match="one width"):
        frechet_distance(a, features(0, 10, 5))
    with pytest.raises(ValueError, match="row 3"):
        frechet_distance(np.where(np.arange(10)[:, None] == 3, np.nan, a), a)
    for few in (a[:1], a[:0], a[0]):
        with pytest.raises(ValueError, match=r"at least 2|of shape"):
            frechet_distance(few, a)
    stream = MomentStream()
    stream.add(a)
    with pytest.raises(ValueError, match="width 4"):
        stream.add(a[:, :3])
    with pytest.raises(ValueError, match="N > 2"):
        kernel_distance(a[:2], a)


def test_infinity_takes_the_bias_away():
    width, truth = 16, 16 * 0.3**2
    plain, corrected = [], []
    for key in range(12):
        a, b = features(100 + key, 320, width, 0.3), features(200 + key, 320, width)
        plain.append(frechet_distance(a, b))
        corrected.append(frechet_infinity(a, b))
    error = np.std(corrected, ddof=1) / len(corrected) ** 0.5
    assert np.mean(plain) > truth + 5 * np.std(plain, ddof=1) / len(plain) ** 0.5
    assert abs(np.mean(corrected) - truth) < 4 * error
    assert frechet_infinity(a, b) == corrected[-1], "the draws are fixed"
    assert frechet_infinity(a, moments(b)) == pytest.approx(corrected[-1], abs=plain[-1] - corrected[-1])
    assert frechet_infinity(a[: 4 * width - 1], b) is None


def test_a_partition_is_one():
    parts = partition(10, 3, seed=1)
    assert sorted(np.concatenate(parts)) == list(range(10))
    assert sorted(map(len, parts)) == [3, 3, 4]
    assert not np.array_equal(partition(10, 3, seed=2)[0], parts[0])


# ---- kernel distance ----


def naive_kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The definition, pair by pair; row i of two sets of one size is never set against row i."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / len(x) + 1) ** 3

    same = [np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]) for x in (a, b)]
    across = [kernel(a[i], b[j]) for i in range(len(a)) for j in range(len(b)) if len(a) != len(b) or i != j]
    return sum(same) - 2 * np.mean(across)


@pytest.mark.parametrize(("n", "m"), [(7, 7), (9, 6)])
def test_the_kernel_distance_and_each_of_its_leave_one_outs(n, m):
    a, b = features(7, n, 5, 0.5), features(8, m, 5)
    found = kernel_distance(a, b)
    assert found.value == pytest.approx(naive_kernel_distance(a, b))
    without = [naive_kernel_distance(np.delete(a, i, 0), np.delete(b, i, 0) if n == m else b) for i in range(n)]
    assert found.left_out[0] == pytest.approx(np.array(without))
    if n != m:
        assert found.left_out[1] == pytest.approx(np.array([naive_kernel_distance(a, np.delete(b, i, 0)) for i in range(m)]))


def test_blocks_do_not_change_the_kernel_distance(monkeypatch):
    a, b = features(9, 150, 6), features(10, 130, 6, 0.3)
    whole = kernel_distance(a, b)
    monkeypatch.setattr("src.metrics.kernel.BLOCK", 16)
    blocks = kernel_distance(a, b)
    assert BLOCK > 150
    assert blocks.value == pytest.approx(whole.value, rel=1e-10)
    assert blocks.error == pytest.approx(whole.error, rel=1e-10)


@needs_cleanfid
def test_the_kernel_distance_is_that_of_cleanfid_on_average():
    """clean-fid averages over random subsets. With one subset of everything the two differ by the pairs (i, i) alone; with
    many small ones, clean-fid's mean is ours up to the error of drawing subsets."""
    from cleanfid.fid import kernel_distance as cleanfid_kernel_distance

    a, b = features(11, 200, 8, 0.2), features(12, 200, 8)
    ours = kernel_distance(a, b).value
    np.random.seed(0)
    across = (a @ b.T / 8 + 1) ** 3
    without_own = (across.sum() - across.trace()) / (200 * 199)
    theirs = cleanfid_kernel_distance(a, b, num_subsets=1) + 2 * across.mean() - 2 * without_own
    assert theirs == pytest.approx(ours, rel=1e-9)
    subsets = [cleanfid_kernel_distance(a, b, num_subsets=1, max_subset_size=50) for _ in range(400)]
    assert abs(np.mean(subsets) - ours) < 4 * np.std(subsets, ddof=1) / 20


def test_rows_that_belong_together_do_not_make_the_kernel_distance_smaller():
    """Two samples of one law whose rows i are alike have the distance 0 on average, as if they were not."""
    found = []
    for seed in range(200):
        a = features(seed, 20, 4)
        found.append(kernel_distance(a + 0.1 * features(1000 + seed, 20, 4), a).value)
    assert abs(np.mean(found)) < 4 * np.std(found, ddof=1) / np.sqrt(200)


# ---- pictures ----


class SmallExtractor(nn.Module):
    """(B, 3, 299, 299) in [0, 255] -> (B, 12): random convolutions with a squashed output."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 9, 8), nn.Conv2d(16, 12, 5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first((x - 128.0) / 64.0))
        return torch.tanh(self.second(x)).mean([2, 3])


class SmallInception(nn.Module):
    """A file of the layout of Inception's: `layers` behind the normalization."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers((x - 128.0) / 128.0)


def script(module: nn.Module, file) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for p in module.parameters():
            nn.init.normal_(p, std=0.1)
    torch.jit.script(module.eval()).save(str(file))
    return str(file)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Noisy blobs of different sizes as PNG; the same shifted in brightness by 6 and by 24 levels; another draw."""
    root, made = tmp_path_factory.mktemp("pictures"), {}
    for name, key, shift in (("real", 0, 0), ("near", 0, 6), ("far", 0, 24), ("other", 1, 0)):
        rng = np.random.default_rng(key)
        made[name] = root / name
        made[name].mkdir()
        for i in range(24):
            size = (32, 48) if i % 3 else (70, 40)
            base = rng.normal(size=(4, 4, 3)) * 40 + rng.normal(size=3) * 25 + 110
            picture = np.kron(base, np.ones((20, 20, 1)))[: size[0], : size[1]] + rng.normal(size=(*size, 3)) * 5 + shift
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(made[name] / f"{i:03}.png")
    return made


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return TorchScript(script(SmallExtractor(), tmp_path_factory.mktemp("weights") / "small.pt"), "small")


def of_folder(extractor, folder, batch=64):
    return extract(extractor, read_pictures(sorted(folder.glob("*.png"))), batch)


@needs_cleanfid
def test_folders_give_the_number_of_cleanfid_at_every_batch_size(folders, small):
    from cleanfid import fid

    options = {"mode": "clean", "custom_feat_extractor": small.net, "num_workers": 0, "verbose": False}
    theirs = fid.compute_fid(str(folders["real"]), str(folders["other"]), device=torch.device("cpu"), **options)
    one, many = (
        frechet_distance(of_folder(small, folders["real"], batch), of_folder(small, folders["other"], batch))
        for batch in (1, 64)
    )
    assert many == pytest.approx(theirs, rel=1e-6)
    assert one == pytest.approx(many, rel=1e-6)
    with pytest.raises(ValueError, match="no picture"):
        extract(small, [])
    with pytest.raises(ValueError, match="uint8"):
        extract(small, [np.zeros((4, 4, 3), np.float32)])


@needs_cleanfid
def test_a_shifted_copy_scores_worse_in_proportion(folders, small):
    real = of_folder(small, folders["real"])
    near, far = (frechet_distance(of_folder(small, folders[name]), real) for name in ("near", "far"))
    assert frechet_distance(real, real) < 1e-9
    assert 0 < 4 * near < far
    shift = np.full(real.shape[1], 0.01)
    ladder = [frechet_distance(real + k * shift, real) for k in (1, 2, 4)]
    assert ladder == pytest.approx([ladder[0], 4 * ladder[0], 16 * ladder[0]])
    distances = [kernel_distance(of_folder(small, folders[name]), real).value for name in ("real", "near", "far")]
    assert distances == sorted(distances)


@needs_cleanfid
def test_the_name_fid_is_inceptions_alone(small, tmp_path, monkeypatch):
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 7, 30, 30)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).mean([2, 3])

    file = script(SmallInception(Layers()), tmp_path / "inception-2015-12-05.pt")
    with pytest.raises(UserError, match=r"metrics.inception_weights: .* is not inception-2015-12-05.pt: its sha256"):
        Inception(file)
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", hashlib.sha256(Path(file).read_bytes()).hexdigest())
    inception = Inception(file)
    assert (inception.suffix, small.suffix) == ("", "_small")
    assert inception.settings()["hash"] == extractors.INCEPTION_SHA256
    assert "bicubic" in inception.settings()["resize"]
    # clean-fid's own wrapper reads the same file in the same way
    from cleanfid.inception_torchscript import InceptionV3W

    picture = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    sized = torch.from_numpy(inception._resize(picture)).movedim(-1, 0)[None]
    theirs = InceptionV3W(str(tmp_path), download=False).base.layers((sized - 128) / 128)
    assert inception.read([picture]) == pytest.approx(theirs.detach().numpy(), rel=1e-6)


@needs_cleanfid
def test_inception_is_looked_for_then_fetched_then_refused(tmp_path, monkeypatch):
    from cleanfid import downloads_helper

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(extractors, "CLEANFID_FOLDER", tmp_path / "tmp")
    monkeypatch.setattr(downloads_helper, "inception_url", (tmp_path / "absent.pt").as_uri())
    said = []
    began = time.monotonic()
    with pytest.raises(UserError, match=r"its server does not answer.*metrics.inception_weights=<file>"):
        inception_file(None, said.append)
    assert said == []
    assert time.monotonic() - began < 30  # a hang, not a speed
    with pytest.raises(UserError, match="is not a file"):
        inception_file(str(tmp_path / "nothing.pt"), said.append)
    (tmp_path / "there.pt").write_bytes(b"weights")
    monkeypatch.setattr(downloads_helper, "inception_url", (tmp_path / "there.pt").as_uri())
    home = tmp_path / "torch" / "hub" / "checkpoints" / extractors.INCEPTION_FILE
    assert inception_file(None, said.append) == home
    assert home.read_bytes() == b"weights"
    assert len(said) == 1
    assert [f.name for f in home.parent.iterdir()] == [home.name]  # no part of a file is left
    assert inception_file(None, said.append) == home
    assert len(said) == 1
    home.unlink()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / extractors.INCEPTION_FILE).write_bytes(b"weights")
    assert inception_file(None, said.append).parent == tmp_path / "tmp"


def test_an_extractor_without_its_file_or_package_is_refused(tmp_path, monkeypatch):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        list(read_pictures([tmp_path / "torn.png"]))
    if importlib.util.find_spec("cleanfid") is not None:
        with pytest.raises(UserError, match="is not a file"):
            TorchScript(tmp_path / "absent.pt", "own")
        (tmp_path / "broken.pt").write_bytes(b"no zip")
        with pytest.raises(UserError, match="no TorchScript"):
            TorchScript(tmp_path / "broken.pt", "own").read([np.zeros((8, 8, 3), np.uint8)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'controlbench\[fid\]'"):
        Inception(None)


# ---- entries ----


def test_entries_carry_their_label_and_number():
    a, b, c = features(13, 90, 4, 0.5), features(14, 90, 4), features(15, 90, 4, 0.1)
    found = set_distances(a, b)
    entries = found.entries("_scenes")
    assert set(entries) == {"fid_scenes", "fid_inf_scenes", "kid_scenes"}
    for entry in entries.values():
        assert entry["n"] == 90
        assert entry["small_n"] is True
        assert entry["better"] == "lower"
        assert entry["ci95"][0] < entry["ci95"][1]
    assert entries["fid_scenes"]["value"] == pytest.approx(frechet_distance(a, b))
    gap = found.entries_minus(set_distances(c, b), "_scenes")
    assert gap["fid_scenes"]["value"] == pytest.approx(frechet_distance(a, b) - frechet_distance(c, b))
    assert gap["kid_scenes"]["ci95"][0] > 0
    with pytest.raises(ValueError, match="unlike sets"):
        found.entries_minus(set_distances(c[:50], b), "")
    against_moments = set_distances(a, moments(b)).entries("")
    assert set(against_moments) == {"fid", "fid_inf"}
    assert against_moments["fid"]["value"] == pytest.approx(entries["fid_scenes"]["value"])


def test_too_few_pictures_get_a_label_and_no_interval():
    few = set_distances(features(16, 60, 32, 0.2), features(17, 60, 32)).entries("")
    assert set(few) == {"fid", "kid"}
    assert few["fid"]["ci95"] is None
    assert few["kid"]["ci95"] is not None
    many = set_distances(features(18, SMALL_N, 3, 0.2), features(19, SMALL_N, 3)).entries("")
    assert "small_n" not in many["fid"]


def test_scenes_have_their_own_extractor_and_name():
    from src.data.scenes import render, sample_scene
    from src.embedded.reader import load_reader
    from src.embedded.scene_features import SceneFeatures

    pictures = [render(sample_scene(1, i), 64)["image"] for i in range(12)]
    scenes = SceneFeatures()
    assert scenes.suffix == "_scenes"
    assert scenes.hash in scenes.described
    assert "held-out renders" in scenes.described
    found = [extract(scenes, pictures, batch) for batch in (1, 12)]
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[1] == pytest.approx(load_reader().read(np.stack(pictures))[2], abs=1e-5)
    with pytest.raises(UserError, match="64 pixels a side"):
        scenes.read([np.zeros((32, 64, 3), np.uint8)])
