"""The scene probe: how it is trained, shipped and refused, and how well it sees."""

import json

import cv2
import numpy as np
import pytest
import torch

from src.data.scenes import JOINTS, SceneSource, render, sample_people
from src.embedded import probe as training
from src.embedded.probe import Lessons, card, fit, heat_targets, judge, load_lessons, rounded, save_probe, train_probe
from src.tasks import scene_probe
from src.tasks.nearness import scene_nearness
from src.tasks.scene_probe import FACTS, FOLDER, WEIGHTS, SceneProbe, load_probe, look
from src.types import UserError


@pytest.fixture(scope="module")
def lessons(tmp_path_factory) -> Lessons:
    return load_lessons(3, 24, tmp_path_factory.mktemp("lessons"), 1)


# ---- training ---------------------------------------------------------------------------------------------------------


def test_lessons_are_scenes_of_both_kinds_and_are_rendered_once(lessons, tmp_path, monkeypatch):
    drawn = render(sample_people(3, 0), 64)
    assert np.array_equal(lessons.images[1], drawn["image"])
    assert np.allclose(lessons.nearness[1] / 255, scene_nearness(drawn["depth"]), atol=0.5 / 255 + 1e-6)
    assert np.array_equal(lessons.joints[1], drawn["joints"][0, :, :2])
    assert lessons.person[1::2].all()
    assert not lessons.person[::2].all()
    first = load_lessons(3, 4, tmp_path, 1)
    monkeypatch.setattr(training, "render", lambda *a: pytest.fail("rendered again"))
    again = load_lessons(3, 4, tmp_path, 1)
    assert all(
        np.array_equal(getattr(first, f), getattr(again, f)) for f in ("images", "trips", "nearness", "joints", "person")
    )


def test_trips_are_the_same_scenes_blurred(lessons):
    off = lessons.trips.astype(int) - lessons.images
    assert 1 < np.abs(off).mean() < 30
    assert np.abs(lessons.trips.astype(int)[:-1] - lessons.images[1:]).mean() > 2 * np.abs(off).mean()


def test_heat_targets_lie_where_the_joints_are():
    joints = torch.tensor([[[10.0, 40.0], [63.0, 1.0], [-5.0, 80.0]]])
    target = heat_targets(joints).unflatten(-1, (32, 32))
    centres = (torch.arange(32) + 0.5) * 2
    assert torch.allclose(target.sum((-1, -2)), torch.ones(1, 3))
    assert float((target[0, 0].sum(0) * centres).sum()) == pytest.approx(10, abs=0.05)  # columns
    assert float((target[0, 0].sum(1) * centres).sum()) == pytest.approx(40, abs=0.05)  # rows
    assert target[0, 2].argmax() == 31 * 32  # outside: the nearest corner


def test_a_few_steps_learn_and_are_a_function_of_the_seed(lessons, monkeypatch):
    monkeypatch.setattr(training, "BATCH", 12)
    rows = []
    one, two = (fit(lessons, 12, 0, rows.append) for _ in range(2))
    assert rows[0] | {"cpu_s": 0} == rows[1] | {"cpu_s": 0}
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    start = judge(SceneProbe().eval(), lessons.images, lessons, 0.3)
    assert judge(one, lessons.images, lessons, 0.3)["depth_rmse"] < start["depth_rmse"]


def test_training_writes_a_probe_that_loads_with_its_card(tmp_path, monkeypatch):
    for name, small in (("RENDERS", 8), ("HELD_OUT", 8), ("BATCH", 4)):
        monkeypatch.setattr(training, name, small)
    said = []
    folder = train_probe(tmp_path / "cache", 2, 1, said.append, folder=tmp_path / "probe")
    facts = json.loads((folder / FACTS).read_text())
    assert facts["joints"] == list(JOINTS)
    assert set(facts["quality"]) == {"renders", "autoencoder", "noised_latents"}
    assert facts["n_people"] >= 4
    held = load_lessons(1, 8, tmp_path / "cache", 1)
    seen = judge(load_probe(folder), held.images, held, facts["min_confidence"])
    assert seen == facts["quality"]["renders"], "the card speaks of the weights that are shipped"
    assert "| as rendered |" in (folder / "README.md").read_text()
    before = (folder / WEIGHTS).read_bytes()
    train_probe(tmp_path / "cache", 2, 1, said.append, folder=folder)
    assert "there already" in said[-1]
    assert (folder / WEIGHTS).read_bytes() == before


def test_a_perfect_and_an_absent_detection_are_judged_as_such(lessons):
    class Knows(SceneProbe):
        def __init__(self, confidence):
            super().__init__()
            self.confidence = confidence

        def read(self, pictures):
            joints = np.concatenate([lessons.joints, np.full((*lessons.joints.shape[:2], 1), self.confidence)], 2)
            joints[~lessons.person, :, 2] = 0
            return lessons.nearness.astype(np.float32) / 255, joints

    best = judge(Knows(1.0), lessons.images, lessons, 0.3)
    assert best == {"depth_rmse": 0, "found": 1, "joint_error_px": 0, "pck": 1, "oks": 1, "oks_map": 1, "invented": 0}


# ---- the shipped probe ------------------------------------------------------------------------------------------------


def test_the_shipped_probe_is_small_and_its_card_is_generated():
    facts = json.loads((FOLDER / FACTS).read_text())
    assert (FOLDER / WEIGHTS).stat().st_size < 1.5e6
    assert facts["n_held_out"] == 500
    assert sum(p.numel() for p in load_probe().parameters()) == facts["parameters"]
    assert (FOLDER / "README.md").read_text() == card(facts, scene_probe.probe_hash())
    assert torch.equal(rounded(load_probe()).depth.weight, load_probe().depth.weight)


def test_the_shipped_probe_sees_scenes_that_it_never_saw():
    facts = json.loads((FOLDER / FACTS).read_text())["quality"]["renders"]
    source = SceneSource("scenes_people", 7, 1, 24, "val", 64, people=True)
    samples = [source[i] for i in range(24)]
    nearness, joints = load_probe().read(np.stack([s.image for s in samples]))
    exact = np.stack([scene_nearness(s.signals["depth"]) for s in samples])
    assert np.sqrt(np.square(nearness - exact).mean((1, 2))).mean() < 1.5 * facts["depth_rmse"]
    off = np.hypot(*np.moveaxis(joints[..., :2] - np.stack([s.signals["joints"][0] for s in samples])[..., :2], -1, 0))
    assert off.mean() < 1.5 * facts["joint_error_px"] + 0.3
    assert np.median(joints[..., 2]) > 0.5


def test_other_sizes_are_seen_at_64_and_given_back_at_their_own():
    sample = SceneSource("scenes_people", 7, 1, 1, "val", 128, people=True)[0]
    image = cv2.resize(sample.image, (128, 192), interpolation=cv2.INTER_LINEAR)
    nearness, joints = look(image)
    assert nearness.shape == (192, 128)
    wanted = sample.signals["joints"][0, :, :2] * [1, 1.5]
    assert np.hypot(*(joints[:, :2] - wanted).T).mean() < 8


def test_pictures_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="64, 64, 3"):
        load_probe().read(np.zeros((1, 32, 32, 3), np.uint8))


def test_a_missing_or_outdated_probe_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match="prepare probe"):
        load_probe(tmp_path / "none")
    save_probe(SceneProbe(), tmp_path, json.loads((FOLDER / FACTS).read_text()))
    facts = json.loads((tmp_path / FACTS).read_text())
    (tmp_path / FACTS).write_text(json.dumps(facts | {"joints": ["nose"]}))
    with pytest.raises(UserError, match="not today's joints"):
        load_probe(tmp_path)
