"""Depth and pose: conditions from exact maps, from data and from detectors; scores; scenes with people."""

import hashlib
import json
import time

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from src.data.scenes import BONES, JOINTS, SceneSource, render, sample_people
from src.data.signals import MIRRORED
from src.embedded.text import scene_words
from src.tasks.depth import Depth
from src.tasks.detectors import depth_detector, pose_detector
from src.tasks.nearness import depth_picture, relative_nearness, scene_nearness
from src.tasks.pose import Pose, oks, pck
from src.tasks.skeleton import LAYOUTS, coco_to_openpose, draw_skeletons, layout_of, skeleton_map
from src.types import Sample, UserError
from tests.contract.registry import node

POSE = {"name": "pose", "detector": "scene_probe", "layout": "scene14", "min_confidence": 0.3}
DEPTH = {"name": "depth", "detector": "scene_probe", "predicts": "auto", "signal_is": "distance"}


def scenes(count: int, people: bool = True, split: str = "val") -> list[Sample]:
    source = SceneSource("scenes", 0, count, count, split, 64, people)
    return [source[i] for i in range(count)]


@pytest.fixture(scope="module")
def people() -> list[Sample]:
    return scenes(10)


@pytest.fixture(scope="module")
def mixed() -> list[Sample]:
    return scenes(16, people=False)


def hashed(parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:32]


def condition(task, sample: Sample) -> np.ndarray:
    return task.make_condition(sample, np.random.default_rng(0))


def bare(sample: Sample, **signals) -> Sample:
    """The same picture, with other exact maps or none."""
    return Sample(sample.id, sample.image, sample.caption, signals)


def refused(build, message: str) -> None:
    """Refused within seconds, with these words."""
    began = time.monotonic()
    with pytest.raises(UserError, match=message):
        build()
    assert time.monotonic() - began < 10


# ---- scenes with people -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("with_people", "captions", "wanted"),
    [
        (
            False,
            "bf776f6cc28e22dbb89926d20e001386",
            [
                (99.4123, 5.48641),
                (48.3934, 5.52065),
                (102.5155, 5.31564),
                (50.2042, 5.84196),
                (98.2387, 5.51726),
                (89.3702, 5.49687),
                (103.1549, 4.92004),
                (55.9079, 5.45392),
            ],
        ),
        (
            True,
            "09fa6fe6c8687cf866ead1793f6253da",
            [
                (52.0416, 5.27648),
                (86.7963, 5.81816),
                (98.4154, 5.20817),
                (52.7313, 6.10847),
                (51.0145, 5.52576),
                (50.885, 5.92735),
                (54.9307, 5.86703),
                (52.6995, 5.10206),
            ],
        ),
    ],
)
def test_both_kinds_of_scenes_stay_as_they_are(with_people, captions, wanted):
    """The first are of the world that the embedded models learned from. What is drawn at random is equal to the bit; sines and
    roots differ in the last one between processors, so pixels are compared by the means of image and depth."""
    samples = scenes(40, with_people, "train")
    assert hashed(s.caption for s in samples) == captions
    means = [[s.image.mean(), s.signals["depth"].mean(dtype=np.float64)] for s in samples]
    assert np.array(means)[: len(wanted)] == pytest.approx(np.array(wanted), rel=1e-4)


def test_fingerprints_and_ids_tell_the_kinds_apart():
    sources = [SceneSource("scenes", 0, 20, 8, "train", 64, people) for people in (False, True)]
    assert sources[0].fingerprint() == "scenes-v1-world0-64px-n20"
    assert sources[1].fingerprint() == "scenes-v1-people-v1-world0-64px-n20"
    assert [s.describe(3)[0] for s in sources] == ["scene-0-3", "people-0-3"]
    assert SceneSource("scenes", 0, 20, 8, "train", 64).fingerprint() == sources[0].fingerprint()


def test_the_configured_source_has_people():
    source = instantiate(node("data", "scenes_people"), split="val", resolution=64)
    assert len(source[0].signals["joints"]) == 1
    assert set(source.signals) == set(source[0].signals)


def test_people_are_large_whole_and_freely_posed():
    found = [sample_people(2, i) for i in range(300)]
    persons = [next(t for t in s.things if t.joints is not None) for s in found]
    joints = np.stack([s.view.project(p.joints, 64) for s, p in zip(found, persons, strict=True)])
    assert ((joints[..., :2] > 0) & (joints[..., :2] < 64)).all((1, 2)).mean() > 0.99
    tall = np.ptp(joints[..., 1], axis=1) / 64
    assert tall.min() > 0.5
    assert tall.max() < 0.9
    words = set(scene_words())
    assert all(w in words for s in found for w in s.caption.replace(",", " ").split() if w != "an")
    hands = {pose: [] for pose in {p.pose for p in persons}}
    for person, (right, left) in zip(persons, joints[:, [4, 7], 1], strict=True):
        hands[person.pose].append((right, left))
    assert len(hands) == 4
    assert all(np.std(rows, axis=0).min() > 2 for rows in hands.values()), "hands move within each named pose"
    raised = np.array(hands["waving"])
    assert 0.2 < (raised[:, 0] < raised[:, 1]).mean() < 0.8, "both hands wave"


def test_people_fill_the_stated_share_of_the_frame():
    for index in range(12):
        scene = sample_people(2, index)
        owner = 2 + [t.shape for t in scene.things].index("person")
        rows = np.flatnonzero((render(scene, 64)["segmentation"] == owner).any(1))
        assert 0.58 < (rows.max() - rows.min() + 1) / 64 < 0.92


# ---- depth: the maps --------------------------------------------------------------------------------------------------


def test_depth_of_scenes_has_a_fixed_scale(mixed):
    assert np.allclose(scene_nearness(np.array([0, 2.5, 5, 7.5, 9], np.float32)), [1, 1, 0.5, 0, 0])
    task, sample = Depth(**DEPTH), mixed[0]
    made = condition(task, sample)
    assert (made == made[..., :1]).all()
    assert np.array_equal(made[..., 0], depth_picture(sample.signals["depth"]))
    assert made[-1].mean() > made[10].mean() + 50, "the floor at the camera's feet is nearer than the wall"


def test_sixteen_bits_and_floats_are_read_at_full_range():
    depth = np.linspace(500, 60000, 64 * 64).reshape(64, 64)
    sixteen, metres = depth.astype(np.uint16), (depth / 1000).astype(np.float32)
    near = [relative_nearness(values, "distance") for values in (sixteen, metres, depth)]
    assert np.abs(near[0] - near[2]).max() < 2e-3
    assert np.abs(near[1] - near[2]).max() < 1e-5
    assert (np.diff(near[0].ravel()) <= 0).all(), "farther is never lighter"
    inverse = relative_nearness((1e7 / depth).astype(np.uint16), "nearness")
    assert np.abs(inverse - near[2]).max() < 2e-3
    assert len(np.unique(np.round(255 * inverse))) > 200
    even = relative_nearness(np.arange(0, 65536, 16, np.uint16).reshape(64, 64), "nearness")
    assert len(np.unique(np.round(255 * even))) == 256, "all 16 bits count"


def test_a_few_wild_pixels_do_not_decide_the_scale_and_holes_are_far():
    depth = np.full((50, 50), 2.0)
    depth[:, 25:] = 4.0
    depth[0, :3], depth[0, 3:6], depth[0, 6], depth[0, 7] = 0, np.nan, np.inf, 1e-4
    near = relative_nearness(depth, "distance")
    assert (near[1:, :25] == 1).all()
    assert (near[1:, 25:] == 0).all()
    assert (near[0, :7] == 0).all()
    assert near[0, 7] == 1
    assert not relative_nearness(np.full((4, 4), 3.0), "distance").any(), "nothing differs"
    assert not relative_nearness(np.full((4, 4), np.nan), "distance").any(), "nothing was measured"


def test_a_data_sets_own_depth_is_read_as_it_is_meant(mixed, tiny_depth):
    sample, ramp = mixed[0], np.linspace(1, 8, 64 * 64, dtype=np.float32).reshape(64, 64)
    far_to_near = {
        m: condition(Depth("depth", tiny_depth, "auto", m), bare(sample, depth=ramp))[..., 0] for m in ("distance", "nearness")
    }
    assert far_to_near["distance"][0, 0] == 255
    assert far_to_near["nearness"][0, 0] == 0
    finished = np.arange(64 * 64).reshape(64, 64) % 256
    for given in (finished.astype(np.uint8), finished.astype(np.float32), np.repeat(finished[..., None], 3, 2)):
        assert np.array_equal(condition(Depth(**DEPTH | {"signal_is": "map"}), bare(sample, depth=given))[..., 0], finished)


def test_depth_that_cannot_be_read_so_is_refused(mixed):
    task, sample = Depth(**DEPTH), mixed[0]
    refused(lambda: condition(task, bare(sample, depth=np.ones((32, 64), np.float32))), f"{sample.id}: its depth is.*same size")
    refused(lambda: condition(task, bare(sample, depth=sample.image)), "different channels")
    refused(lambda: condition(task, bare(sample, depth=np.ones((64, 64), np.uint16))), "name a depth model")


# ---- depth: scores ----------------------------------------------------------------------------------------------------


def test_depth_is_judged_by_one_detector_on_both_pictures(mixed):
    task = Depth(**DEPTH)
    own = [task.score(s.image, condition(task, s), s.image) for s in mixed]
    assert all(score == {"depth_rmse": 0, "depth_mse": 0} for score in own), "whatever the exact depth is"
    pairs = list(zip(mixed, mixed[1:] + mixed[:1], strict=True))
    shuffled = [task.score(o.image, condition(task, s), s.image) for s, o in pairs]
    assert np.mean([s["depth_rmse"] for s in shuffled]) > 2 * task.control_gap
    exact = [
        np.sqrt(np.square(scene_nearness(s.signals["depth"]) - scene_nearness(o.signals["depth"])).mean()) for s, o in pairs
    ]
    assert np.allclose([s["depth_rmse"] for s in shuffled], exact, atol=0.06), "on the scale of the maps"
    assert all(s["depth_mse"] == pytest.approx(s["depth_rmse"] ** 2) for s in shuffled)
    with pytest.raises(ValueError, match="one size"):
        task.score(mixed[0].image[:32], condition(task, mixed[0]), mixed[0].image)


# ---- pose: skeletons --------------------------------------------------------------------------------------------------


def figure(layout: str, size: int = 128) -> np.ndarray:
    """(1, J, 3): the joints on a circle, no two bones on top of each other."""
    count = len(LAYOUTS[layout].joints)
    turn = np.arange(count) * 2.399963  # the golden angle: neighbours in the list lie far apart
    place = size / 2 + 0.42 * size * np.stack([np.cos(turn), np.sin(turn)], 1)
    return np.concatenate([place, np.ones((count, 1))], 1)[None].astype(np.float32)


def test_skeletons_of_scenes_are_drawn_as_before():
    found = [sample_people(0, i) for i in range(40)]
    joints = [np.stack([s.view.project(t.joints, 64) for t in s.things if t.joints is not None]) for s in found]
    assert hashed(draw_skeletons(j, BONES, 64) for j in joints) == "4d60c082838814c91273d48aee638024"
    assert np.array_equal(skeleton_map(joints[0], "scene14", (64, 64)), draw_skeletons(joints[0], BONES, 64))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_has_its_hues_and_leaves_out_what_is_not_there(layout):
    joints = figure(layout)
    drawn = skeleton_map(joints, layout, (128, 160))
    assert drawn.shape == (128, 160, 3)
    shown, shape = (joints, LAYOUTS[layout]) if layout != "coco17" else (coco_to_openpose(joints), LAYOUTS["openpose18"])
    hues = {tuple(c) for c in drawn.reshape(-1, 3)}
    assert len(hues) > len(shape.bones)
    ankle = next(k for k, name in enumerate(shape.joints) if name == "left_ankle")
    if shape.dots:
        u, v = np.round(shown[0, ankle, :2]).astype(int)
        assert tuple(drawn[v, u]) == (85, 0, 255), "hue 13 of 18"
    gone = joints.copy()
    gone[0, LAYOUTS[layout].joints.index("left_ankle"), 2] = 0
    less = skeleton_map(gone, layout, (128, 160))
    knee = shape.joints.index("left_knee")
    middle = np.round(shown[0, [ankle, knee], :2].mean(0)).astype(int)
    assert drawn[middle[1], middle[0]].any()
    assert (less > 0).any(2).sum() < (drawn > 0).any(2).sum()
    assert skeleton_map(np.zeros((0, 0, 3), np.float32), layout, (8, 8)).max() == 0, "nobody is there"


def test_bones_of_openpose_have_the_fields_colours():
    joints = np.zeros((1, 18, 3), np.float32)
    joints[0, [1, 2]] = (256, 100, 1), (356, 100, 1)  # neck and right shoulder: the first bone, red
    joints[0, [3, 4]] = (100, 300, 1), (100, 400, 1)  # right elbow and wrist: the fourth, yellow
    drawn = skeleton_map(joints, "openpose18", (512, 512))
    assert tuple(drawn[100, 306]) == (153, 0, 0), "0.6 of its colour"
    assert tuple(drawn[350, 100]) == (153, 153, 0)
    assert 7 <= (drawn[90:110, 306] > 0).any(1).sum() <= 9, "8 pixels wide at 512"
    assert tuple(drawn[100, 256]) == (255, 85, 0), "the neck is the second joint"


def test_coco_gets_a_neck_between_its_shoulders():
    coco = LAYOUTS["coco17"].joints
    joints = np.random.default_rng(0).uniform(1, 60, (2, 17, 2)).astype(np.float32)
    made = coco_to_openpose(joints)
    for name in coco:
        assert np.array_equal(made[:, LAYOUTS["openpose18"].joints.index(name), :2], joints[:, coco.index(name)])
    assert np.allclose(made[:, 1, :2], joints[:, [5, 6]].mean(1))
    hidden = np.concatenate([joints, np.ones((2, 17, 1), np.float32)], 2)
    hidden[0, 5, 2] = 0
    assert coco_to_openpose(hidden)[:, 1, 2].tolist() == [0, 1]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda x: x.name)
def test_layouts_agree_with_the_mirror_of_the_data(layout):
    names = list(layout.joints)
    for a, b in MIRRORED[len(names)]:
        assert {names[a].replace("right", "left"), names[b].replace("right", "left")} == {names[a].replace("right", "left")}
        names[a], names[b] = names[b], names[a]
    swapped = [n.replace("left", "?").replace("right", "left").replace("?", "right") for n in names]
    assert swapped == list(layout.joints)
    assert len(layout.sigmas) == len(names)


def test_joints_of_another_layout_are_refused(people):
    given = bare(people[0], joints=figure("coco17"))
    refused(lambda: condition(Pose(**POSE), given), f"{people[0].id}: joints of the layout scene14.*task.layout=coco17")
    refused(lambda: layout_of("coco"), "openpose18")
    assert condition(Pose(**POSE | {"layout": "coco17"}), given).any()


# ---- pose: scores -----------------------------------------------------------------------------------------------------


def test_oks_of_a_case_worked_out_by_hand():
    wanted = np.zeros((14, 3))
    wanted[:, :2] = 10, 20
    wanted[13, :2] = 40, 60  # a box of 30 x 40
    wanted[:, 2] = 1
    wanted[5, 2] = 0  # not there: has no say
    sigmas, area = LAYOUTS["scene14"].sigmas, 0.53 * 30 * 40
    assert sigmas[[0, 1, 2, 3, 4]].tolist() == [0.079, 0.079, 0.079, 0.072, 0.062]
    assert sigmas[[8, 9, 10]].tolist() == [0.107, 0.087, 0.089]
    assert oks(wanted, wanted, sigmas) == 1
    found = wanted.copy()
    found[4, :2] += 3, 4  # a wrist 5 pixels off: exp(-25 / (2 * 636 * 0.124^2))
    found[0, 2] = 0  # a head that was missed
    found[5] = 99, 99, 1
    by_hand = (11 + np.exp(-25 / (2 * area * 0.124**2)) + 0) / 13
    assert by_hand == pytest.approx(0.867579, abs=1e-6)
    assert oks(found, wanted, sigmas) == pytest.approx(by_hand)
    with pytest.raises(ValueError, match="one joint"):
        oks(found, wanted * [1, 1, 0], sigmas)


def test_pck_counts_what_is_within_a_tenth_of_the_box():
    wanted = np.zeros((14, 3))
    wanted[:, 2] = 1
    wanted[13, :2] = 20, 50  # the longer side is 50: 5 pixels
    found = wanted.copy()
    found[0, 0], found[1, 0], found[2, 2] = 5, 5.01, 0
    assert pck(found, wanted, 0.1) == pytest.approx(12 / 14)


class Sees:
    """A detector that knows the joints of pictures by their first pixel."""

    layout, described = "scene14", "a table"

    def __init__(self, *people):
        self.people = people

    def joints(self, image):
        return self.people[image[0, 0, 0]].copy()


def test_pose_scores_follow_their_definition():
    task = Pose(**POSE)
    joints = np.zeros((14, 3), np.float32)
    joints[:, 0], joints[:, 1], joints[:, 2] = np.linspace(20, 44, 14), np.linspace(8, 56, 14), 0.9
    off, unsure = joints + [2.5, 0, 0], joints * [1, 1, 0.3]
    task.detector = Sees(joints, off.astype(np.float32), unsure.astype(np.float32))
    picture = [np.full((64, 64, 3), k, np.uint8) for k in range(3)]
    assert task.score(picture[0], picture[0], picture[0]) == {"pose_oks_map": 1, "pose_pck": 1}
    similarity = oks(off, joints, LAYOUTS["scene14"].sigmas)
    assert 0.5 < similarity < 0.95
    reached = sum(similarity >= t for t in (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)) / 10
    assert task.score(picture[1], picture[0], picture[0])["pose_oks_map"] == pytest.approx(reached)
    assert task.score(picture[2], picture[0], picture[0]) == {"pose_oks_map": 0, "pose_pck": 0}, "nobody was found"
    assert task.score(picture[0], picture[2], picture[2]) == {"pose_oks_map": 0, "pose_pck": 0}, "nobody should be there"
    assert task.score(picture[2], picture[2], picture[2]) == {"pose_oks_map": 1, "pose_pck": 1}


def test_a_perfect_picture_poses_best_and_a_shuffled_one_clearly_worse(people):
    task = Pose(**POSE)
    for metric in task.metrics:
        own = [task.score(s.image, condition(task, s), s.image)[metric] for s in people]
        shuffled = [
            task.score(o.image, condition(task, s), s.image)[metric]
            for s, o in zip(people, people[1:] + people[:1], strict=True)
        ]
        assert own == [1] * len(people), "a person is found in each"
        assert np.mean(shuffled) < 0.7, metric


def test_conditions_of_detector_and_truth_show_the_same(people, mixed):
    """What an adapter is shown for a picture without exact maps is what it learned from."""
    pose, depth = Pose(**POSE), Depth(**DEPTH)
    for sample in people[:5]:
        exact, seen = (condition(pose, s).max(2) > 0 for s in (sample, bare(sample)))
        near = np.pad(exact, 2)
        wide = np.max([near[i : i + 64, j : j + 64] for i in range(5) for j in range(5)], 0)
        assert (seen & wide).sum() / seen.sum() > 0.9
        assert np.abs(condition(depth, sample).astype(int) - condition(depth, bare(sample))).mean() < 10
    nobody = next(s for s in mixed if not len(s.signals["joints"]))
    assert not condition(pose, nobody).any()
    assert not condition(pose, bare(nobody)).any()


@pytest.mark.parametrize(("kind", "settings"), [(Depth, DEPTH), (Pose, POSE)])
def test_settings_name_the_detector_and_its_weights(kind, settings):
    made = kind(**settings).settings()
    assert made["detector"] == "scene_probe"
    assert len(made["weights"]) == 16
    assert json.dumps(made)


# ---- models for photos ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_depth(tmp_path_factory) -> str:
    """A Depth Anything of random weights, as its own `save_pretrained` writes it."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny_depth")
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=16, neck_hidden_sizes=[4, 8, 8, 8],
        fusion_hidden_size=8, head_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 56, "width": 56}, ensure_multiple_of=14).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny_pose(tmp_path_factory) -> str:
    """A ViTPose of random weights."""
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation, VitPoseImageProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny_pose")
    backbone = VitPoseBackboneConfig(
        image_size=[64, 48], hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, out_indices=[2]
    )
    VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone.to_dict(), num_labels=17)).save_pretrained(folder)
    VitPoseImageProcessor(size={"height": 64, "width": 48}).save_pretrained(folder)
    return str(folder)


def photo(seed: int, height: int = 80, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_a_depth_model_in_a_folder_gives_conditions_and_scores(tiny_depth):
    task, sample = Depth("depth", tiny_depth, "auto", "distance"), Sample("photo", photo(0), "a photo")
    made = condition(task, sample)
    assert made.shape == (80, 64, 3)
    assert (made.min(), made.max()) == (0, 255), "relative to the picture"
    assert task.score(sample.image, made, sample.image)["depth_rmse"] == 0
    assert task.score(photo(1), made, sample.image)["depth_rmse"] > 0
    assert task.settings()["predicts"] == "nearness"
    assert "scene" not in str(task.settings()["detector"])


def test_metric_models_predict_distance(tiny_depth, tmp_path):
    import shutil

    folder = tmp_path / "metric"
    shutil.copytree(tiny_depth, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"depth_estimation_type": "metric", "max_depth": 20}))
    relative, metric = depth_detector(tiny_depth), depth_detector(str(folder))
    assert (relative.predicts, metric.predicts) == ("nearness", "distance")
    assert relative.settings()["weights"] != metric.settings()["weights"]
    as_distance = metric.nearness(photo(0)).ravel()
    told = depth_detector(str(folder), "nearness").nearness(photo(0)).ravel()
    assert np.corrcoef(as_distance, told)[0, 1] < -0.5, "the same numbers mean the opposite"


def test_a_keypoint_model_in_a_folder_gives_conditions_and_scores(tiny_pose):
    task = Pose("pose", tiny_pose, "coco17", 0.05)
    sample = Sample("photo", photo(0), "a photo")
    found = task.detector.joints(sample.image)
    assert found.shape == (17, 3)
    assert condition(task, sample).shape == (80, 64, 3)
    assert task.score(sample.image, condition(task, sample), sample.image) == {"pose_oks_map": 1, "pose_pck": 1}
    assert task.settings()["layout"] == "coco17"


def test_detectors_that_cannot_be_had_are_refused_in_seconds(tiny_depth, tiny_pose, tmp_path):
    refused(lambda: depth_detector("depth-anything/none-of-ours"), "hf download depth-anything/none-of-ours")
    refused(lambda: pose_detector("usyd-community/none-of-ours"), "hf download")
    refused(lambda: depth_detector("scene_prob"), "owner/name")
    refused(lambda: depth_detector("./nowhere"), "no folder")
    refused(lambda: depth_detector(str(tmp_path)), "no config.json")
    refused(lambda: depth_detector(tiny_pose), "type 'vitpose', no depth model.*dpt")
    refused(lambda: pose_detector(tiny_depth), "no keypoint model.*vitpose")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dpt"}))
    refused(lambda: depth_detector(str(tmp_path)), "no preprocessor_config.json")
    (tmp_path / "preprocessor_config.json").write_text("{}")
    refused(lambda: depth_detector(str(tmp_path)), "no weights")
    refused(lambda: depth_detector("scene_probe", "distance"), "task.predicts=auto")
    refused(lambda: Pose(**POSE | {"min_confidence": 0.0}), "between 0 and 1")


def test_a_model_that_lacks_weights_is_refused_instead_of_filled_with_noise(tiny_depth, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "half"
    shutil.copytree(tiny_depth, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "head" not in k}, folder / "model.safetensors", {"format": "pt"})
    refused(lambda: depth_detector(str(folder)).nearness(photo(0)), "lacks weights")


def test_joints_are_named_once():
    assert LAYOUTS["scene14"].joints is JOINTS
    assert LAYOUTS["scene14"].bones is BONES
