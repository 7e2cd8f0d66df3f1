"""Degradations, the picture metrics, and the tasks that they make: super-resolution, deblurring, and canny from the data."""

import hashlib

import cv2
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from src import rng
from src.construct import construct
from src.data.cache import store_key
from src.data.folder import FolderSource
from src.data.framing import Framing
from src.tasks.canny import Canny
from src.tasks.deblur import Deblur
from src.tasks.degradations import SHIPPED, Degradation, blurred, degradation, jpeg, resized
from src.tasks.picture_metrics import LPIPS, PSNR_CAP_DB, psnr, ssim
from src.tasks.super_resolution import SuperResolution
from src.types import Sample, UserError
from tests.conftest import ROOT


def draws(sample_id: str, seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(rng.key(seed, "condition", sample_id))


def task(name: str, **changes):
    return construct({**OmegaConf.load(ROOT / "conf" / "task" / f"{name}.yaml"), **changes})


def picture(height: int = 50, width: int = 67) -> np.ndarray:
    """Soft colours with a few hard edges; whole numbers only, so that it is the same everywhere."""
    y, x = np.mgrid[:height, :width]
    made = np.stack([3 * x + y, 5 * y + 40, 2 * (x - y) + 120], 2) % 256
    made[10:30, 20:45] = (220, 30, 60)
    made[:, 5:8] = (10, 240, 10)
    return made.astype(np.uint8)


@pytest.fixture
def super_resolution():
    return task("super_resolution")


@pytest.fixture
def deblur():
    return task("deblur")


# ---- degradations -----------------------------------------------------------------------------------------------------

GOLDEN = {
    "bicubic_x4_v1": "be54e92b9baf8060",
    "gaussian_blur_x4_v1": "d493dca09fda4203",
    "mixed_x4_v1": "53fcd39871b76a52",
}


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_degradation_keeps_its_pixels(name):
    # a change here needs a new version in the name, or trained adapters and caches would silently mean something else
    made = SHIPPED[name](picture(), draws("photo-7.png", seed=3))
    assert made.shape == (50, 67, 3)
    assert hashlib.sha256(made.tobytes()).hexdigest()[:16] == GOLDEN[name]


def test_downsampling_is_the_antialiased_bicubic_filter_of_the_field():
    image = picture(64, 96)
    small = SHIPPED["bicubic_x4_v1"].low_resolution(image, draws("a"))
    as_floats = torch.from_numpy(image.copy()).movedim(-1, 0)[None].double()
    other = torch.nn.functional.interpolate(as_floats, (16, 24), mode="bicubic", antialias=True, align_corners=False)
    expected = other[0].movedim(0, -1).clamp(0, 255).numpy()
    assert small.shape == (16, 24, 3)
    assert np.abs(small - expected).max() < 1.25  # Pillow rounds and clips after each axis


def test_odd_sizes_are_rounded_up_and_come_back():
    made = SHIPPED["bicubic_x4_v1"]
    assert made.low_resolution(picture(50, 67), draws("a")).shape == (13, 17, 3)
    assert made(picture(50, 67), draws("a")).shape == (50, 67, 3)
    assert made(picture(3, 2), draws("a")).shape == (3, 2, 3)


@pytest.mark.parametrize(
    ("sigmas", "angle"), [((3.0, 3.0), 0.0), ((3.0, 1.0), 0.0), ((3.0, 1.0), np.pi / 2), ((2.5, 0.8), 0.7)]
)
def test_a_point_becomes_the_gaussian_that_is_named(sigmas, angle):
    point = np.zeros((41, 41, 3), np.uint8)
    point[20, 20] = 255
    spread = blurred(point, *sigmas, angle)[..., 0].astype(float)
    cov = np.diag(np.square(sigmas))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = np.linalg.inv(turn @ cov @ turn.T)
    y, x = np.mgrid[-20:21, -20:21]
    density = np.exp(-0.5 * (inverse[0, 0] * x**2 + 2 * inverse[0, 1] * x * y + inverse[1, 1] * y**2))
    assert np.abs(spread - 255 * density / density.sum()).max() < 0.75  # cut at three sigmas, and 8 bits


def test_blur_keeps_flat_pictures_and_their_borders():
    flat = np.full((9, 12, 3), (13, 130, 251), np.uint8)
    assert np.array_equal(blurred(flat, 3.0, 3.0, 0.0), flat)
    assert np.array_equal(blurred(flat, 3.0, 0.7, 0.4), flat)
    assert np.array_equal(SHIPPED["gaussian_blur_x4_v1"](flat, draws("a")), flat)


def test_blurring_loses_more_than_downsampling_alone():
    image, (low, deblurred) = picture(64, 64), (SHIPPED[n] for n in ("bicubic_x4_v1", "gaussian_blur_x4_v1"))
    assert psnr(low(image, draws("a")), image) > psnr(deblurred(image, draws("a")), image) + 0.5


def test_two_jpeg_libraries_agree_to_the_pixel():
    image = picture(64, 64)
    for quality in (30, 75, 95):
        coded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        assert np.array_equal(jpeg(image, quality), cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1])
    assert psnr(jpeg(image, 95), image) > psnr(jpeg(image, 30), image) + 1


def test_draws_belong_to_seed_and_sample_alone():
    mixed, image = SHIPPED["mixed_x4_v1"], picture()
    ids = [f"{i}.png" for i in range(8)]
    forwards = {i: mixed(image, draws(i)) for i in ids}
    backwards = {i: mixed(image, draws(i)) for i in reversed(ids)}
    assert all(np.array_equal(forwards[i], backwards[i]) for i in ids)
    assert len({m.tobytes() for m in forwards.values()}) == len(ids)
    assert not np.array_equal(mixed(image, draws("0.png", seed=1)), forwards["0.png"])


def test_a_sample_is_degraded_alike_at_any_resolution():
    noisy = Degradation("noisy", scale=1, noise=(2.0, 60.0))
    levels = {size: [] for size in (64, 128)}
    for size, found in levels.items():
        flat = np.full((size, size, 3), 128, np.uint8)
        found += [(noisy(flat, draws(f"{i}.png")) - 128.0).std() for i in range(6)]
    assert np.allclose(levels[64], levels[128], rtol=0.05)
    assert np.ptp(levels[64]) > 10


def test_gray_noise_is_gray_and_colour_noise_is_not():
    flat = np.full((32, 32, 3), 128, np.uint8)
    gray, colour = (
        Degradation("noisy", scale=1, noise=(20.0, 20.0), gray_noise_share=share)(flat, draws("a")) for share in (1.0, 0.0)
    )
    assert np.array_equal(gray[..., 0], gray[..., 2])
    assert abs(np.corrcoef(colour[..., 0].ravel(), colour[..., 2].ravel())[0, 1]) < 0.15
    assert (gray - 128.0).std() == pytest.approx(20, rel=0.1)


def test_what_varies_says_so():
    assert {n: d.varies for n, d in SHIPPED.items()} == {
        "bicubic_x4_v1": False, "gaussian_blur_x4_v1": False, "mixed_x4_v1": True
    }  # fmt: skip
    for options in (
        {"blur_px": (1.0, 2.0)},
        {"noise": (5.0, 5.0)},
        {"filters": ("area", "bicubic")},
        {"jpeg_quality": (50, 60)},
    ):
        mine = Degradation("mine", **options)
        assert mine.varies
        assert len({mine(picture(), draws(str(i))).tobytes() for i in range(6)}) > 1, options
    assert not Degradation("mine", jpeg_quality=(50, 50), blur_px=(1.0, 1.0)).varies


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("bicubic_x8_v1", r"'bicubic_x8_v1' is none of \['bicubic_x4_v1'"),
        (4, "wants a name"),
        ({"scale": 4}, "no name"),
        ({"name": "mine", "sigma": 2}, "unknown key 'sigma'"),
        ({"name": "mixed_x4_v1", "noise": [0, 0]}, "keeps its constants"),
        ({"name": ""}, "wants a name"),
        ({"name": "mine", "blur_px": 2.0}, r"blur_px wants \[low, high\] with 0 <= low <= high <= 20, got 2.0"),
        ({"name": "mine", "blur_px": [3.0, 1.0]}, "low <= high"),
        ({"name": "mine", "blur_px": [0.0, 99.0]}, "high <= 20"),
        ({"name": "mine", "noise": [-1.0, 3.0]}, "noise wants"),
        ({"name": "mine", "noise": [0.0, float("nan")]}, "noise wants"),
        ({"name": "mine", "jpeg_quality": [0, 95]}, "jpeg_quality wants"),
        ({"name": "mine", "jpeg_quality": [30.5, 95]}, "whole numbers"),
        ({"name": "mine", "gray_noise_share": 1.5}, "a share from 0 to 1"),
        ({"name": "mine", "scale": 2.0}, "a whole number"),
        ({"name": "mine", "scale": True}, "a whole number"),
        ({"name": "mine", "filters": ["nearest"]}, "some of"),
        ({"name": "mine", "filters": []}, "some of"),
    ],
)
def test_wrong_constants_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        degradation(given)


def test_a_degradation_of_ones_own_comes_from_the_command_line():
    from src.config import ConfigError, load

    words = ["task=deblur", "task.degradation={name: soft_x2, blur_px: [1.0, 2.0], scale: 2}"]
    made = construct(load("train", words).task)
    assert made.degradation == Degradation("soft_x2", blur_px=(1.0, 2.0), scale=2)
    assert made.varies
    assert not task("deblur").varies
    with pytest.raises(ConfigError, match=r"task\.degradation=4 should be str \| dict"):
        load("train", ["task=deblur", "task.degradation=4"])


def test_every_constant_of_a_degradation_keys_the_cache(super_resolution):
    keys = {store_key(task=super_resolution.settings())}
    for options in ({}, {"scale": 2}, {"noise": [0, 1]}, {"jpeg_quality": [50, 60]}, {"filters": ["area"]}):
        keys.add(store_key(task=SuperResolution("sr", {"name": "mine", **options}, None).settings()))
    assert len(keys) == 6


# ---- metrics ----------------------------------------------------------------------------------------------------------


def test_psnr_by_its_formula():
    image = np.full((8, 8, 3), 100, np.uint8)
    off = image.copy()
    off[..., 1] += 6  # mean squared error 12
    assert psnr(off, image) == pytest.approx(10 * np.log10(65025 / 12), abs=1e-9)
    assert psnr(np.zeros_like(image), np.full_like(image, 255)) == pytest.approx(0, abs=1e-9)  # and no wrap-around of bytes
    assert psnr(image, image) == PSNR_CAP_DB
    off = image.copy()
    off[0, 0, 0] += 1
    assert psnr(off, image) < PSNR_CAP_DB


@pytest.mark.parametrize("shape", [(40, 33), (40, 33, 3), (11, 11, 3)])
def test_ssim_equals_an_independent_one(shape):
    from torchmetrics.functional.image import structural_similarity_index_measure

    gen = np.random.default_rng(0)
    image = cv2.GaussianBlur(gen.integers(0, 256, shape, np.uint8), (0, 0), 2)
    worse = np.clip(image + gen.normal(0, 15, shape), 0, 255).astype(np.uint8)
    pair = [torch.from_numpy(x.reshape(*shape[:2], -1).copy()).movedim(-1, 0)[None].double() for x in (worse, image)]
    # torchmetrics' own mean counts windows over a mirrored border too, which Wang's does not
    _, every = structural_similarity_index_measure(*pair, data_range=255.0, return_full_image=True)
    assert ssim(worse, image) == pytest.approx(float(every[..., 5:-5, 5:-5].mean()), abs=1e-4)
    assert ssim(image, image) == pytest.approx(1, abs=1e-12)


def test_ssim_sees_a_colour_of_equal_luminance():
    image = np.full((32, 32, 3), (200, 60, 60), np.uint8)
    other = np.full((32, 32, 3), (60, 128, 95), np.uint8)
    image[8:24, 8:24] = other[8:24, 8:24] = 90
    luma = [cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) for x in (image, other)]
    assert ssim(*luma) > 0.95
    assert ssim(image, other) < 0.9


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_metrics_refuse_what_cannot_be_compared(metric):
    image = np.zeros((32, 32, 3), np.uint8)
    for other in (np.zeros((32, 31, 3), np.uint8), np.zeros((32, 32, 3), np.float32)):
        with pytest.raises(ValueError, match="uint8 pictures of one shape"):
            metric(other, image)


@pytest.mark.parametrize(("metric", "least"), [(ssim, 11), (LPIPS.__new__(LPIPS), 32)], ids=["ssim", "lpips"])
def test_pictures_too_small_for_a_metric_are_refused_in_one_line(metric, least):
    image = np.zeros((40, least - 1, 3), np.uint8)
    said = rf"at least {least} pixels on a side, these are {least - 1} x 40; write resolution={least} or more"
    with pytest.raises(UserError, match=said) as caught:
        metric(image, image)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def alexnet_file(tmp_path_factory):
    """A random AlexNet as torchvision stores it, without its classifier's 218 MiB."""
    models = pytest.importorskip("torchvision").models
    folder = tmp_path_factory.mktemp("hub") / "checkpoints"
    folder.mkdir()
    with torch.random.fork_rng(), torch.device("meta"):
        shapes = models.alexnet(weights=None).state_dict()
    gen = torch.Generator().manual_seed(0)
    state = {k: 0.1 * torch.randn(v.shape, generator=gen) for k, v in shapes.items() if k.startswith("features.")}
    file = folder / "alexnet-owt-7be5be79.pth"
    torch.save(state, file)
    return file


def test_lpips_equals_torchmetrics_own(alexnet_file, monkeypatch):
    import torchvision
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    def stored(weights=None, **_):
        net = real(weights=None)
        if weights is not None:
            net.load_state_dict(torch.load(alexnet_file, weights_only=True), strict=False)
        return net

    real = torchvision.models.alexnet
    image, worse = picture(64, 64), SHIPPED["bicubic_x4_v1"](picture(64, 64), draws("a"))
    state = torch.get_rng_state()
    ours = LPIPS(str(alexnet_file))
    assert torch.equal(torch.get_rng_state(), state)  # a run with the metric draws what one without it draws
    monkeypatch.setattr(torchvision.models, "alexnet", stored)
    theirs = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    pair = [torch.from_numpy(x.copy()).movedim(-1, 0)[None].float() / 255 for x in (worse, image)]
    assert ours(worse, image) == pytest.approx(float(theirs(*pair)), rel=1e-5)
    assert ours(worse, image) > ours(image, image) == 0


def test_lpips_is_a_metric_only_with_its_weights(alexnet_file, super_resolution):
    assert list(super_resolution.metrics) == ["psnr", "ssim"]
    assert len(super_resolution.notes) == 1
    assert "no lpips" in super_resolution.notes[0]
    given = task("super_resolution", lpips_weights=str(alexnet_file))
    assert given.metrics == {**super_resolution.metrics, "lpips": ("distance", "lower")}
    digest = hashlib.sha256(alexnet_file.read_bytes()).hexdigest()[:8]
    assert digest in given.notes[0]
    assert list(SuperResolution.metrics) == ["psnr", "ssim"]
    image, other = picture(64, 64), picture(64, 64)[::-1].copy()
    assert set(given.score(other, image, image)) == set(given.metrics)
    assert given.settings() == super_resolution.settings()  # a score's weights change no condition


def test_lpips_weights_are_refused_before_anything_is_trained(tmp_path, alexnet_file):
    with pytest.raises(UserError, match=r"lpips_weights='/nowhere/alex\.pth' is not a file.*or null"):
        Deblur("deblur", "gaussian_blur_x4_v1", "/nowhere/alex.pth")
    state = torch.load(alexnet_file, weights_only=True)
    for name, content, said in [
        ("other", {**state, "features.3.weight": torch.zeros(2, 2)}, r"features\.3\.weight should have shape .*\(2, 2\)"),
        ("part", {"classifier.1.weight": torch.zeros(1)}, r"features\.0\.weight.*it has nothing"),
    ]:
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=said):
            LPIPS(str(tmp_path / f"{name}.pth"))
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(UserError, match="cannot be read"):
        LPIPS(str(tmp_path / "page.pth"))


# ---- tasks ------------------------------------------------------------------------------------------------------------


def test_a_restoration_is_judged_by_the_image_and_not_by_what_was_shown(super_resolution):
    image, output = picture(), picture()[:, ::-1].copy()
    shown = super_resolution.condition_of(Sample("a", image, ""), seed=0)
    expected = {"psnr": psnr(output, image), "ssim": ssim(output, image)}
    assert super_resolution.score(output, shown, image) == expected
    assert super_resolution.score(output, 255 - shown, image) == expected


@pytest.mark.parametrize(("name", "signal"), [("super_resolution", "low_resolution"), ("deblur", "blurred")])
def test_a_partner_picture_takes_the_place_of_the_degradation(name, signal):
    made, image = task(name), picture(64, 48)
    for size in ((16, 12), (32, 24), (64, 48)):
        partner = resized(255 - image, size, "area")
        shown = made.condition_of(Sample("a", image, "", {signal: partner}), seed=0)
        assert np.array_equal(shown, resized(partner, (64, 48)))
    odd = resized(255 - image[:50, :33], (13, 9))  # 50 x 33 by 4, rounded up as degradations do
    assert made.condition_of(Sample("a", image[:50, :33], "", {signal: odd}), 0).shape == (50, 33, 3)
    other = Sample("a", image, "", {"depth": image[..., 0]})
    assert np.array_equal(made.condition_of(other, 0), made.degradation(image, draws("a")))


@pytest.mark.parametrize(
    ("partner", "said"),
    [
        (np.zeros((16, 16, 3), np.uint8), r"photo-1: its low_resolution picture is 16 x 16 pixels, the image 48 x 64"),
        (np.zeros((128, 96, 3), np.uint8), "not larger"),
        (np.zeros((16, 12, 3), np.float32), r"float32 of shape \(16, 12, 3\); give 8-bit"),
        (np.zeros((16, 12, 4), np.uint8), "give 8-bit gray or RGB"),
        (np.zeros((0, 0, 3), np.uint8), "give 8-bit gray or RGB"),
    ],
)
def test_partners_that_do_not_fit_are_named(super_resolution, partner, said):
    sample = Sample("photo-1", picture(64, 48), "", {"low_resolution": partner})
    with pytest.raises(UserError, match=said):
        super_resolution.condition_of(sample, 0)


@pytest.mark.parametrize(
    ("name", "signal", "size", "rules"),
    [
        ("super_resolution", "low_resolution", (64, 64), {}),
        ("super_resolution", "low_resolution", (64, 64), {"flip": True}),
        ("deblur", "blurred", (64, 64), {}),
        ("super_resolution", "low_resolution", (96, 64), {}),
        ("super_resolution", "low_resolution", (88, 64), {"crop": "random"}),
    ],
)
def test_a_given_partner_is_the_condition_that_would_be_made(tmp_path, name, signal, size, rules):
    """Of noise, where another filter would show at once: to the bit without a crop, and inside of its border with one."""
    for folder in ("images", "small"):
        (tmp_path / folder).mkdir()
    made, noise = task(name), np.random.default_rng(0)
    for i in range(2):
        image = noise.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text("noise")
        Image.fromarray(made.degradation.low_resolution(image, draws(f"{i}.png"))).save(tmp_path / "small" / f"{i}.png")
    signals = {signal: str(tmp_path / "small")}
    source = FolderSource("folder", str(tmp_path / "images"), 1, "train", 64, signals=signals, **rules)
    for sample in (source[i] for i in range(len(source))):
        assert sample.signals[signal].shape == (16, 16, 3)
        given = made.condition_of(sample, 0).astype(int)
        fresh = made.condition_of(Sample(sample.id, sample.image, ""), 0).astype(int)
        if size == (64, 64):
            off = np.abs(given - fresh).max()
            assert off <= (1 if rules else 0)  # a mirrored picture is rounded from the other side
        elif "crop" not in rules:
            assert np.array_equal(given[16:-16], fresh[16:-16])
        else:  # the crop may begin inside of a pixel of the partner
            assert np.corrcoef(given[16:-16].ravel(), fresh[16:-16].ravel())[0, 1] > 0.7


def test_a_partner_shrinks_and_grows_as_its_image_does():
    partner = resized(picture(96, 96), (24, 24), "area")
    for side, wanted in ((48, 12), (96, 24), (192, 24)):
        frame = Framing(side, "center", 0, None).frame((96, 96), "a")
        small = frame.signal("low_resolution", partner)
        assert small.shape == (wanted, wanted, 3)
        if wanted == 24:
            assert np.array_equal(small, partner)
    whole = Framing(48, "center", 0, None).frame((96, 96), "a")
    assert np.array_equal(whole.signal("blurred", picture(96, 96)), whole.apply(picture(96, 96)))


def test_deblurring_wants_a_blur():
    with pytest.raises(UserError, match="bicubic_x4_v1 does not blur; task=super_resolution"):
        Deblur("deblur", "bicubic_x4_v1", None)


def test_conditions_are_keyed_by_seed_and_id(deblur):
    mixed = Deblur("deblur", "mixed_x4_v1", None)
    sample = Sample("x/1.png", picture(), "")
    assert np.array_equal(mixed.condition_of(sample, 5), mixed.make_condition(sample, draws("x/1.png", seed=5)))
    assert not np.array_equal(mixed.condition_of(sample, 5), mixed.condition_of(sample, 6))
    assert np.array_equal(deblur.condition_of(sample, 5), deblur.condition_of(sample, 6))


def test_canny_judges_with_one_detector_whatever_was_shown():
    canny, image, output = Canny("canny", 50, 120, 0.8), picture(64, 64), picture(64, 64)[:, ::-1].copy()
    edges = canny.edges(image)
    for given in (255 - edges, edges > 0, np.repeat(edges[..., None], 3, 2)):  # 8 bits or a mask, one channel or three
        sample = Sample("a", image, "", {"canny": given})
        shown = canny.condition_of(sample, 0)
        expected = given if given.dtype == np.uint8 else edges
        assert np.array_equal(shown, expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, 2))
        assert canny.score(output, shown, image) == canny.score(output, canny.condition_of(Sample("a", image, ""), 0), image)
        assert canny.score(image, shown, image) == {"canny_f1": 1.0, "canny_ssim": pytest.approx(1)}
    with pytest.raises(UserError, match="a: its canny map is 32 x 64 pixels, the image 64 x 64"):
        canny.condition_of(Sample("a", image, "", {"canny": edges[:, :32]}), 0)
