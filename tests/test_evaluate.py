"""`python -m src.evaluate`: pictures that are drawn once, numbers that repeat, what may be compared, and what is refused."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from src import build, control_score
from src.adapters.base import ControlAdapter
from src.checkpoint import META_KEY, AdapterCheckpointIO
from src.config import load, resolve_hardware
from src.control_score import NONE, RIGHT, WRONG, sample_arm
from src.evaluate.compare import compare_folders, differences
from src.evaluate.early import absent
from src.evaluate.flow import evaluate
from src.evaluate.manifest import check_like, read_manifest, write_manifest
from src.evaluate.pictures import PictureFolder
from src.evaluate.sets import open_set, plan_set
from src.evaluate.subjects import find_subjects, trained_below
from src.interop.export import export_adapter
from src.metrics.intervals import metric
from src.results.design import design_of
from src.results.evaluation import read_evaluation
from src.sampling import Batches
from src.types import UserError
from src.world import held_out, plan
from tests.conftest import ROOT, run_entry, run_folder
from tests.contract.test_adapters import shaken

N, BATCH = 5, 2
QUICK = [f"n={N}", f"batch={BATCH}", "steps=2", "hardware=cpu", "hardware.workers=0"]
ARMS = ("right", WRONG, NONE)


def make_run(folder: Path, *overrides: str, amount: float = 1.0) -> tuple[Path, ControlAdapter]:
    """A run folder as a training leaves it, of an adapter whose weights were moved instead of trained."""
    build.quiet()
    cfg = load("train", ["hardware=cpu", "hardware.workers=0", "adapter=t2i_adapter", *overrides])
    backbone = build.construct(cfg.backbone).load(torch.device("cpu"), torch.float32)
    fresh = build.new_adapter(cfg, backbone, training=False)
    start = {name: x.clone() for name, x in fresh.state_dict().items()}
    adapter = shaken(fresh).eval()
    adapter.load_state_dict({name: start[name] + amount * (x - start[name]) for name, x in adapter.state_dict().items()})
    meta = {
        "adapter": cfg.adapter.name, "backbone": backbone.facts.source, "backbone_hash": backbone.weight_hash(),
        "backbone_dtype": "float32", "images_seen": 64, "config_sha": "0" * 16,
    }  # fmt: skip
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)), folder / "config.yaml")
    AdapterCheckpointIO().save_checkpoint(
        {"state_dict": adapter.state_dict(), META_KEY: meta}, folder / "checkpoints" / "images-000000064"
    )
    return folder, adapter


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Two runs of one method that differ in their weights."""
    root = tmp_path_factory.mktemp("runs")
    return make_run(root / "one" / "stamp")[0], make_run(root / "two" / "stamp", "seed=1", amount=0.5)[0]


@pytest.fixture(scope="session")
def places(tmp_path_factory, cache_dir):
    """A new output_dir below one folder, and the shared cache."""
    root, count = tmp_path_factory.mktemp("evaluations"), iter(range(100))
    return lambda: [f"output_dir={root / str(next(count))}", f"cache_dir={cache_dir}"]


@pytest.fixture(scope="session")
def first(runs, places):
    """One evaluation that others compare with: its folder and where it was put."""
    place = places()
    return evaluation(f"run={runs[0]}", *place), place


def evaluation(*overrides: str) -> Path:
    words = [*QUICK, *overrides]
    cfg = resolve_hardware(load("evaluate", words))
    return evaluate(cfg, find_subjects(cfg, words))


def test_a_folder_stands_for_the_finished_runs_below_it(tmp_path):
    for name, finished in (("a/1", True), ("b/2", True), ("b/3", False)):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
        if finished:
            (tmp_path / name / "results.json").touch()
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "results.json").touch()  # of a benchmark: nothing was trained
    assert trained_below(str(tmp_path)) == [str(tmp_path / "a" / "1"), str(tmp_path / "b" / "2")]
    assert trained_below(str(tmp_path / "b" / "3")) == [str(tmp_path / "b" / "3")]
    assert trained_below("nowhere") == ["nowhere"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.png"))}


def times_of(folder: Path) -> dict[str, int]:
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in sorted(folder.rglob("*.png"))}


# ---- the same again ---------------------------------------------------------------------------------------------------


def test_two_evaluations_give_equal_pictures_manifests_and_numbers(first, runs, places):
    one, two = first[0], evaluation(f"run={runs[0]}", *places())
    assert one != two
    assert files_of(one) == files_of(two)
    assert len(files_of(one)) == N * len(ARMS)
    assert files_of(one.parent / "set") == files_of(two.parent / "set")
    assert read_manifest(one) == read_manifest(two)
    results = [read_evaluation(folder / "results.json") for folder in (one, two)]
    assert results[0].metrics == results[1].metrics
    assert (one / "outcome.json").read_text() == (two / "outcome.json").read_text()
    assert all(m["n"] == N for m in results[0].metrics.values())
    assert results[0].design == design_of(OmegaConf.load(runs[0] / "config.yaml"))
    assert results[0].crosscheck is None  # no Inception here
    assert results[0].metrics["fid_scenes"]["small_n"] is True
    assert results[0].manifest == read_manifest(one)["conditions_hash"]


def test_a_manifest_from_another_shell_differs_in_its_command_alone(first, tmp_path, monkeypatch):
    """Another output_dir is another command; what two evaluations must share, and the hash of it, know nothing of that."""
    written = read_manifest(first[0])
    parts = {key: written[key] for key in ("conditions", "subject", "drawing", "files")}
    monkeypatch.setattr(sys, "argv", ["evaluate", "output_dir=elsewhere"])
    other = write_manifest(tmp_path, **parts)
    assert "output_dir=elsewhere" in other["command"] != written["command"]
    assert {k: v for k, v in other.items() if k != "command"} == {k: v for k, v in written.items() if k != "command"}
    assert other["content_hash"] == written["content_hash"]
    check_like(written, read_manifest(tmp_path))
    changed = parts | {"files": [{**parts["files"][0], "sha256": "0" * 64}, *parts["files"][1:]]}
    assert write_manifest(tmp_path, **changed)["content_hash"] != written["content_hash"]


def test_the_manifest_names_what_decides_a_number(first):
    manifest = read_manifest(first[0])
    conditions = manifest["conditions"]
    chosen = conditions["evaluation_set"]
    assert (chosen["name"], chosen["n"], chosen["crop"]) == ("scenes_heldout_v1", N, "none")
    assert len(chosen["hash"]) == 32
    sampler = conditions["sampler"]
    assert (sampler["solver"], sampler["steps"], sampler["guidance"], sampler["seed"]) == (
        "FlowMatchEulerDiscreteScheduler", 2, 3.0, 0,
    )  # fmt: skip
    assert conditions["measures"]["extractors"][0]["extractor"] == "scenes"
    assert conditions["measures"]["extractors"][0]["hash"]
    assert manifest["subject"]["images_seen"] == 64
    assert manifest["command"]
    text = (first[0] / "manifest.json").read_text() + (first[0] / "results.json").read_text()
    assert str(first[0].parents[1]) not in text  # no place of this machine


@pytest.fixture(scope="module")
def validated(runs, cache_dir):
    """A run's adapter, and the held-out set as its own training would make it of the same scenes and seed."""
    model = build.load_sampler(OmegaConf.load(runs[0] / "config.yaml"), runs[0] / "checkpoints" / "images-000000064")
    few = [f"data.val_images={N}", f"validation.final_images={N}", "validation.images=2", "data.train_images=2"]
    words = ["adapter=t2i_adapter", "hardware=cpu", "hardware.workers=0", "validation.steps=2", f"cache_dir={cache_dir}"]
    cfg = load("train", [*words, *few])
    made = plan(cfg)
    made.backbone = model.backbone
    return model.adapter, held_out(cfg, made, build.cached(cfg, made, model.codec)[1], model.codec)


@pytest.fixture(scope="module")
def at_once(runs, places):
    """All arms with all pictures in one batch, as a validation of so few draws them."""
    return evaluation(f"run={runs[0]}", "batch=32", "arms=[wrong_condition,zero_condition,no_condition]", *places())


def test_pictures_and_scores_are_those_of_trainings_validation(at_once, validated):
    """One implementation: bit for bit the same."""
    scores = json.loads((at_once / "outcome.json").read_text())["scores"]
    for arm in control_score.ARMS:
        drawn = sample_arm(*validated, arm, list(range(N)))
        kept = np.stack([np.asarray(Image.open(at_once / (arm or "right") / f"{r:05d}.png")) for r in range(N)])
        assert np.array_equal(drawn, kept), arm
        for name, values in control_score.score_rows(validated[1], range(N), drawn).items():
            assert scores[control_score.named(name, arm)] == values.tolist()


def test_a_batch_changes_its_pictures_by_rounding_alone(at_once, first, validated):
    """1e-5 of their range before they become bytes, one level at most afterwards. Moved at random, an adapter makes more of
    a rounded bit than a trained one does: its pictures are within 1e-5 on average."""
    for name in files_of(first[0]):
        a, b = (np.asarray(Image.open(p / name), np.int16) for p in (first[0], at_once))
        assert np.abs(a - b).max() <= 1, name
    assert read_manifest(at_once)["conditions"] == read_manifest(first[0])["conditions"]
    adapter, held = validated

    def drawn(arm: str, size: int) -> torch.Tensor:
        latents = Batches(size).over(range(N), lambda some: control_score._latents(adapter, held, arm, some))
        return torch.cat([held.codec.decode(z) for _, z in latents])

    for size in (1, 2):
        assert float((drawn(NONE, size) - drawn(NONE, N)).abs().max()) < 1e-5
        assert float((drawn(RIGHT, size) - drawn(RIGHT, N)).abs().mean()) < 1e-5


def test_a_fid_is_checked_against_other_packages_where_it_is_taken(runs, places, tmp_path, monkeypatch, capsys):
    pytest.importorskip("cleanfid", reason="clean-fid is not installed: pip install 'controlbench[fid]'")
    from src.metrics import extractors
    from tests.test_fid import SmallInception, script

    file = script(SmallInception(torch.nn.Conv2d(3, 4, 200, 200)), tmp_path / "inception-2015-12-05.pt")
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", extractors.sha256(Path(file)))
    words, sent = ["n=4", "arms=[]", "metrics.names=[fid]", f"metrics.inception_weights={file}", "logger=wandb"], []
    monkeypatch.setattr("src.loggers.results.log_result", lambda *row: sent.append(row))
    found = read_evaluation(evaluation(f"run={runs[0]}", *words, *places()) / "results.json")
    assert found.crosscheck.keys() == {"ours", "clean-fid", "torchmetrics", "agree"}
    assert found.crosscheck["ours"] == found.metrics["fid"]["value"]
    assert found.crosscheck["torchmetrics"] == pytest.approx(found.crosscheck["ours"], rel=1e-4)
    assert found.crosscheck["agree"] is True
    assert "fid agrees: ours" in capsys.readouterr().out
    ((logger, folder, _, config, result),) = sent
    assert (logger.project, result, config["adapter"]["name"]) == ("controlbench", found, "t2i_adapter")
    assert config["evaluation"]["evaluation_set"]["n"] == 4
    assert (folder / "results.json").is_file()


# ---- killed, damaged, too large ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(runs, places):
    changed = [f"run={runs[0]}", "steps=6", "batch=1", "n=3"]
    words, whole, place = [*QUICK, *changed], evaluation(*changed, *places()), places()
    out = Path(place[0].split("=")[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "src.evaluate", *words, *place], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    until = time.monotonic() + 240
    while not (logs := list(out.glob("*/one_stamp-*/files.jsonl"))) or logs[0].read_text().count("\n") < 2:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until, "no picture in four minutes"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    folder = logs[0].parent
    before = times_of(folder)
    assert 2 <= len(before) < 9
    with logs[0].open("a") as log:
        log.write('{"file": "right/000')  # as a kill in the middle of a line would leave it
    done = run_entry("evaluate", *words, *place)
    assert done.returncode == 0, done.stderr
    assert run_folder(done) == folder
    assert f"of {3 * len(ARMS)} pictures are there, going on behind them" in done.stdout
    after = times_of(folder)
    logged = [json.loads(line)["file"] for line in logs[0].read_text().splitlines()]
    assert sorted(logged) == sorted(after)
    assert sum(after[name] == when for name, when in before.items()) >= len(before) - 1  # one may have been unlogged
    assert files_of(folder) == files_of(whole)
    assert read_manifest(folder)["files"] == read_manifest(whole)["files"]
    assert read_evaluation(folder / "results.json").metrics == read_evaluation(whole / "results.json").metrics


def test_damaged_and_lost_pictures_are_drawn_again_and_no_others(runs, first, capsys):
    folder, place = first
    whole, before = files_of(folder), times_of(folder)
    manifest, results = (folder / "manifest.json").read_text(), read_evaluation(folder / "results.json")
    (folder / "right/00003.png").write_bytes(b"not a picture")
    (folder / NONE / "00004.png").unlink()
    (folder.parent / "set/condition/00001.png").write_bytes(b"")
    capsys.readouterr()
    assert evaluation(f"run={runs[0]}", *place) == folder
    said = capsys.readouterr().out
    assert f"2 of {N * len(ARMS)} pictures are damaged or gone" in said
    assert f"1 of {2 * N} pictures are damaged or gone" in said
    assert f"{N * len(ARMS) - 2} of {N * len(ARMS)} pictures are there, going on behind them" in said
    assert files_of(folder) == whole
    after = times_of(folder)
    assert {name for name in after if after[name] != before[name]} == {"right/00003.png", f"{NONE}/00004.png"}
    assert (folder / "manifest.json").read_text() == manifest
    assert read_evaluation(folder / "results.json").metrics == results.metrics


def test_too_large_a_batch_is_halved_and_said(runs, first, places, monkeypatch, capsys):
    real, asked = control_score._latents, []

    def full(adapter, held, arm, rows):
        asked.append(len(rows))
        if len(rows) > BATCH:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(adapter, held, arm, rows)

    monkeypatch.setattr(control_score, "_latents", full)
    folder = evaluation(f"run={runs[0]}", f"batch={2 * BATCH}", *places())
    assert asked[:3] == [4, 2, 2]
    assert max(asked[1:]) == BATCH
    assert "out of memory with 4 pictures at once: going on with 2" in capsys.readouterr().out
    assert files_of(folder) == files_of(first[0])  # which was drawn in batches of two


def test_two_processes_do_not_draw_into_one_folder(tmp_path):
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # holds the folder until it is told
        PictureFolder(tmp_path, print)
        os.write(ready[1], b"1")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        with pytest.raises(UserError, match="another process is drawing there"):
            PictureFolder(tmp_path, print)
    finally:
        os.write(done[1], b"1")
        os.waitpid(child, 0)
    PictureFolder(tmp_path, print).close()


# ---- several ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pair(runs, places):
    place = places()
    return evaluation(f"run=[{runs[0]},{runs[1]}]", *place), place


def test_several_runs_are_compared_pair_by_pair(pair, runs, first):
    group = pair[0]
    one, two = (next(group.glob(f"{name}_stamp-*")) for name in ("one", "two"))
    assert files_of(one) == files_of(first[0])
    found = json.loads((group / "comparison.json").read_text())
    assert {"command", "git_sha", "git_dirty", "versions", "date"} <= found.keys()
    ((_, entries),) = [(p["of"], p["metrics"]) for p in found["pairs"]]
    scores = [json.loads((f / "outcome.json").read_text())["scores"]["canny_f1"] for f in (one, two)]
    assert entries["canny_f1"] == metric(np.array(scores[1]) - np.array(scores[0]), "fraction", "higher")
    values = [read_evaluation(f / "results.json").metrics["fid_scenes"]["value"] for f in (one, two)]
    assert entries["fid_scenes"]["value"] == pytest.approx(values[1] - values[0], rel=1e-9)
    assert entries["fid_scenes"]["small_n"] is True
    assert found["pairs"][0]["of"].startswith("two_stamp")
    assert found["manifest"] == read_manifest(one)["conditions_hash"]


def test_the_frozen_backbone_is_drawn_once_for_all(pair, runs, monkeypatch):
    one, two = (next(pair[0].glob(f"{name}_stamp-*")) for name in ("one", "two"))
    assert files_of(one / NONE) == files_of(two / NONE)
    assert files_of(one / "right") != files_of(two / "right")
    assert [(f["file"], f["sha256"]) for f in read_manifest(two)["files"] if f["file"].startswith(NONE)]
    asked = []
    real = control_score._latents
    monkeypatch.setattr(control_score, "_latents", lambda a, h, arm, rows: asked.append(arm) or real(a, h, arm, rows))
    for file in (two / NONE).glob("*.png"):
        file.unlink()
    assert evaluation(f"run={runs[1]}", *pair[1]) == two
    assert asked == []
    assert files_of(one / NONE) == files_of(two / NONE)


def test_finished_evaluations_are_compared_and_unlike_ones_refused(pair, runs, first, places):
    one, two = (next(pair[0].glob(f"{name}_stamp-*")) for name in ("one", "two"))
    out = compare_folders(load("evaluate", [f"compare=[{one},{two}]", *places()]))
    found = json.loads((out / "comparison.json").read_text())["pairs"][0]["metrics"]
    assert found == json.loads((pair[0] / "comparison.json").read_text())["pairs"][0]["metrics"]
    assert found == differences(two, one)
    other = evaluation(f"run={runs[1]}", "steps=3", *places())
    with pytest.raises(UserError, match=r"do not compare: sampler\.steps differs, 2 and 3;"):
        compare_folders(load("evaluate", [f"compare=[{first[0]},{other}]", *places()]))
    with pytest.raises(UserError, match="no whole manifest"):
        compare_folders(load("evaluate", [f"compare=[{first[0]},{runs[0]}]", *places()]))


# ---- adapters of diffusers, own pictures ------------------------------------------------------------------------------


def test_an_adapter_in_diffusers_form_is_evaluated_like_the_run_it_came_from(tmp_path, places):
    run, adapter = make_run(tmp_path / "net" / "stamp", "adapter=controlnet", "backbone=sd21_tiny")
    export_adapter(adapter, tmp_path / "exported")
    words = ["n=3", "solver=unipc", "arms=[]"]
    ours = evaluation(f"run={run}", *words, *places())
    theirs = evaluation(f"checkpoint={tmp_path / 'exported'}", "backbone=sd21_tiny", "task=canny", *words, *places())
    assert files_of(ours) == files_of(theirs)
    assert read_manifest(ours)["conditions"] == read_manifest(theirs)["conditions"]
    assert read_manifest(ours)["subject"]["hash"] == read_manifest(theirs)["subject"]["hash"]
    found = read_evaluation(theirs / "results.json")
    assert (found.seed, found.subject, found.flags["solver"]) == (None, "exported", "UniPCMultistepScheduler")


def test_what_never_trained_is_not_counted_as_trained(tmp_path, places):
    """The text path of the last copied block, as training counts it."""
    run, adapter = make_run(tmp_path / "net" / "stamp", "adapter=dit_controlnet")
    found = read_evaluation(evaluation(f"run={run}", "n=3", "arms=[]", *places()) / "results.json")
    assert adapter.frozen_dead_m() > 0.1
    assert found.trainable_m == pytest.approx(sum(p.numel() for p in adapter.parameters()) / 1e6 - adapter.frozen_dead_m())


def test_own_pictures_and_a_task_that_compares_with_the_original(tmp_path, places, capsys):
    data = tmp_path / "data"
    data.mkdir()
    draws = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(draws.integers(0, 255, (90, 70, 3), np.uint8)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"picture {i}")
    own = ["data=folder", f"data.path={data}", "data.val_images=3", "validation.images=3", "validation.final_images=3"]
    run, _ = make_run(tmp_path / "run" / "stamp", "task=deblur", *own)
    words = [f"run={run}", "evaluation_set=folder", f"data.path={data}", "n=null", *places()]
    folder = evaluation(*words, "data.val_images=3", "metrics.names=[]")
    conditions = read_manifest(folder)["conditions"]
    assert conditions["evaluation_set"]["n"] == 3
    assert conditions["evaluation_set"]["crop"] == "center"
    assert conditions["evaluation_set"]["resize"] == "OpenCV area where it shrinks, cubic where it grows"
    found = read_evaluation(folder / "results.json").metrics
    assert {"psnr", "ssim", f"psnr/gain_over_{WRONG}"} <= found.keys()
    assert not [name for name in found if name.startswith("fid")]
    with pytest.raises(UserError, match=r"was trained on 2 of the 5 images of this set.*data\.val_images=3"):
        evaluation(*words, "data.val_images=5", "metrics.names=[]")
    capsys.readouterr()


@pytest.fixture
def posed(tmp_path):
    """-> words of a set of photos, each with a person's joints, of which the sixth are of another skeleton."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "joints").mkdir()
    draws = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(draws.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "photos" / f"{i}.png")
        (tmp_path / "photos" / f"{i}.txt").write_text(f"picture {i}")
        people = [[[1.0 + j, 2.0 + j, 2.0] for j in range(18 if i == 5 else 17)]]
        (tmp_path / "joints" / f"{i}.json").write_text(json.dumps({"joints": people}))
    words = ["checkpoint=nowhere", "evaluation_set=folder", f"data.path={tmp_path / 'photos'}", "data.val_images=4"]
    return [*words, "n=null", "hardware=cpu", "hardware.workers=0", f"cache_dir={tmp_path / 'cache'}"]


@pytest.mark.parametrize(("task", "signal"), [("depth", "depth"), ("pose", "joints")])
def test_photos_are_refused_for_the_scene_probe(task, signal, posed, capsys):
    fault = rf"data=folder are photos: write task\.detector=.*data\.signals={{{signal}: <folder>}}"
    with pytest.raises(UserError, match=fault):
        evaluation(*posed, f"task={task}")
    cfg = resolve_hardware(load("evaluate", [*posed, f"task={task}"]))
    with pytest.raises(UserError, match=r"photos: train with task\.detector="):  # a run brings its task along
        plan_set(cfg, build.construct(cfg.task), True, 64, print)
    cfg = resolve_hardware(load("evaluate", [*posed, f"task={task}", "data.are_scenes=true"]))
    capsys.readouterr()
    assert len(plan_set(cfg, build.construct(cfg.task), False, 64, print)) == 4
    assert "photos" not in capsys.readouterr().out


def test_a_map_that_the_task_cannot_read_is_left_out_or_ends_an_evaluation(posed, tmp_path, capsys):
    words = [*posed, "task=pose", "task.layout=coco17", "data.max_bad_share=0.5"]
    words += [f"data.signals={{joints: {tmp_path / 'joints'}}}"]
    cfg = resolve_hardware(load("evaluate", [*words, "data.on_bad_sample=skip"]))
    task, said = build.construct(cfg.task), []
    made = plan_set(cfg, task, False, 64, said.append)
    assert "the scores pose_oks_map and pose_pck mean nothing" in capsys.readouterr().out
    assert [made.source.describe(row)[0] for row in range(len(made))] == ["4.png", "6.png", "7.png"]  # none counts twice
    assert any("1 of 4 samples of folder are bad and left out, and 3 stay" in line for line in said)
    assert "evaluation_set=folder: n=3, where 4 were asked for: bad samples are left out" in said
    opened = open_set(made, task, tmp_path / "set", said.append)
    assert len(opened.conditions) == 3
    cfg.n = 2
    assert [plan_set(cfg, task, False, 64, said.append).source.describe(row)[0] for row in range(2)] == ["4.png", "6.png"]
    cfg.n = None
    cfg.data.max_bad_share = 0.1
    with pytest.raises(UserError, match=r"1 of 4 samples are bad, more than data\.max_bad_share=0\.1"):
        plan_set(cfg, task, False, 64, said.append)
    cfg = resolve_hardware(load("evaluate", words))
    with pytest.raises(UserError, match=r"5\.png: .*18"):
        open_set(plan_set(cfg, task, False, 64, said.append), task, tmp_path / "other", said.append)


# ---- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["n=1001"], r"n=1001, but evaluation_set=scenes_heldout_v1 has 1000 images; write n=1000"),
        (["metrics.names=[clip_score]"], r"asks for clip_score, and metrics\.clip=null"),
        (["metrics.names=[musiq]"], r"asks for musiq, and metrics\.musiq_weights=null"),
        (["metrics.names=[fid]", "metrics.inception_weights=nowhere.pt"], r"nowhere\.pt"),
        (["metrics.names=[fidd]"], r"fidd is not a metric of task=canny; did you mean fid"),
        (["arms=[wrong]"], r"arms: 'wrong' is not one of wrong_condition, zero_condition, no_condition"),
        (["data.world_seed=3"], r"evaluation_set=scenes_heldout_v1 is scenes-v1-world1-64px-n1000, and the data here is"),
        (["backbone=sd21_tiny"], r"backbone: a run brings its own backbone and task"),
        (["task.low=10"], r"task\.low: a run brings its own"),
        (["checkpoint=somewhere"], r"one of the two"),
        (["solver=ddim"], r"solver=ddim is not for flow models"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(words, said, runs, places):
    with pytest.raises(UserError, match=said):
        evaluation(f"run={runs[0]}", *places(), *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["checkpoint=nowhere"], "checkpoint=nowhere is neither a folder nor a hub id"),
        (
            ["checkpoint=owner/name", "metrics.inception_weights=nowhere.pt"],
            "metrics.inception_weights='nowhere.pt' is not a file",
        ),
        (["run=[src,nowhere/at/all]"], "run=nowhere/at/all: there is no such folder"),
        (["checkpoint=owner/name", "metrics.inception_weights=null", "n=8"], None),
        (["run=${oc.env:HOME}/runs"], None),
        (["-m", "run=one,two"], None),
    ],
)
def test_what_is_not_there_is_told_from_the_words_alone(words, said):
    found = next(absent(words), None)
    assert found is None if said is None else found.startswith(said)


def test_a_word_that_names_nothing_is_refused_before_anything_heavy_is_imported(tmp_path):
    """By a process in which importing torch or hydra is an error."""
    for name in ("torch", "hydra", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('heavy')")
    words = [
        "checkpoint=nowhere",
        "backbone=sd21_tiny",
        "task=canny",
        "metrics.names=[fid]",
        "metrics.inception_weights=nowhere.pt",
    ]
    done = run_entry("evaluate", *words, fresh=True, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: checkpoint=nowhere is neither a folder")


def test_runs_that_cannot_share_a_set_are_refused_by_what_differs(runs, tmp_path, places):
    with pytest.raises(UserError, match=r"no config\.yaml there"):
        evaluation(f"run={tmp_path}", *places())
    with pytest.raises(UserError, match="stands there twice"):
        evaluation(f"run=[{runs[0]},{runs[0]}]", *places())
    other = tmp_path / "other" / "stamp"
    other.mkdir(parents=True)
    cfg = OmegaConf.load(runs[0] / "config.yaml")
    cfg.task.low = 60
    OmegaConf.save(cfg, other / "config.yaml")
    (other / "checkpoints").symlink_to(runs[0] / "checkpoints")
    with pytest.raises(UserError, match=r"one_stamp and other_stamp do not compare: task\.low differs, 50 and 60"):
        evaluation(f"run=[{runs[0]},{other}]", *places())


def test_jobs_that_draw_parts_give_what_one_job_gives(runs, first, places):
    """Each draws whole batches in a folder of its own; together they are the pictures of one job, and the numbers, too."""
    place = places()
    folders = {evaluation(f"run={runs[0]}", f"part={n}/2", *place) for n in (1, 0)}
    (folder,) = folders
    assert not (folder / "results.json").exists()
    parts = [{f.name for f in (folder / f"parts/{n}-of-2/right").glob("*.png")} for n in range(2)]
    assert parts[0]
    assert parts[1]
    assert not parts[0] & parts[1]
    assert evaluation(f"run={runs[0]}", *place) == folder
    mine = {name: data for name, data in files_of(folder).items() if not str(name).startswith("parts/")}
    assert mine == files_of(first[0])
    assert read_evaluation(folder / "results.json").metrics == read_evaluation(first[0] / "results.json").metrics


@pytest.mark.parametrize("given", ["4/4", "1", "a/b", "-1/2"])
def test_a_part_that_is_none_is_refused(runs, places, given):
    with pytest.raises(UserError, match=r"write part=0/4"):
        evaluation(f"run={runs[0]}", f"part={given}", *places())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'controlbench[ray]'")
def test_ray_draws_the_same_pictures(runs, first, places):
    import ray

    try:
        folder = evaluation(f"run={runs[0]}", "engine=ray", "parts=2", *places())
    finally:
        ray.shutdown()
    assert all(list((folder / f"parts/{n}-of-2/right").glob("*.png")) for n in range(2)), "a part drew nothing"
    mine = {name: data for name, data in files_of(folder).items() if not str(name).startswith("parts/")}
    assert mine == files_of(first[0])
    assert read_evaluation(folder / "results.json").metrics == read_evaluation(first[0] / "results.json").metrics


def test_ray_is_asked_for_only_where_it_is(runs, places, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(UserError, match=r"pip install 'controlbench\[ray\]', or write engine=local"):
        evaluation(f"run={runs[0]}", "engine=ray", *places())
    with pytest.raises(UserError, match="engine=ray makes parts itself"):
        evaluation(f"run={runs[0]}", "engine=ray", "part=0/2", *places())
