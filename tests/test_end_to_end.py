"""The entries as a person runs them: every README command, what a run leaves behind."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from src.bench.speed import split_words
from src.config import load
from src.prepare import VERBS
from src.results import read_results, read_rows
from src.train.flow import train
from tests.conftest import QUICK, ROOT, SMALL, run_entry, run_folder
from tests.wandb_reader import finished_run

KEYS = {
    "HF_TOKEN": "hf_tokenOfNobodyForTheTests000000001",
    "HUGGING_FACE_HUB_TOKEN": "nobodysHubTokenForTheTests0002",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef00000003",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache_dir):
    """A quick run of the main experiment with a control arm and W&B offline, through the real entry."""
    out = tmp_path_factory.mktemp("runs")
    places = [f"output_dir={out}", f"cache_dir={cache_dir}"]
    speak = ["control_arm=true", "logger=wandb", "logger.group=tests", "tags=[quick]"]
    done = run_entry("train", "+experiment=unicon_sd3_canny", *QUICK, *speak, *places, **KEYS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, run_folder(done)


def test_no_key_of_the_environment_is_kept_or_said(finished):
    done, folder = finished
    kept = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert {"config.yaml", "results.json", "events.jsonl"} <= set(kept)
    assert any(name.startswith("wandb/") and name.endswith(".wandb") for name in kept)
    for name, key in KEYS.items():
        assert key not in done.stdout + done.stderr, name
        assert [file for file, data in kept.items() if key.encode() in data] == [], name


def test_the_run_says_what_a_person_wants_to_know(finished):
    out = finished[0].stdout
    for words in ("frozen 3.5", "trainable 3.6", "estimated peak", "validation at 64 images", "next: python -m src.sample"):
        assert words in out, words
    assert out.strip().splitlines()[-1] == f"run: {finished[1]}"


def test_results_hold_every_arm_with_its_interval(finished):
    result = read_results(finished[1] / "results.json")
    arms = ("wrong_condition", "no_condition", "zero_condition", "no_control_arm")
    for metric in ("canny_f1", "canny_ssim"):
        for name in (metric, *(f"{metric}/{a}" for a in arms), *(f"{metric}/gain_over_{a}" for a in arms)):
            assert result.metrics[name]["n"] == 8
            low, high = result.metrics[name]["ci95"]
            assert low <= result.metrics[name]["value"] <= high
    assert result.metrics["canny_f1/autoencoder_ceiling"]["value"] > 0.85
    assert (result.experiment, result.adapter, result.task) == ("unicon_sd3_canny", "unicon", "canny")
    assert (result.images_seen, result.effective_batch, result.seed) == (64, 16, 0)
    assert result.command.startswith("python -m src.train +experiment=unicon_sd3_canny")
    assert set(result.trainable_parts_m) == {"copies", "connectors", "entries", "stem", "head"}
    low, high = result.step_time_quartiles_ms
    assert 0 < low <= result.step_time_ms <= high
    assert result.img_per_s == pytest.approx(1000 * 16 / result.step_time_ms)
    assert result.img_per_s_quartiles == pytest.approx([16000 / high, 16000 / low])
    assert result.peak_mem_gib > 0


def test_the_gain_is_the_paired_difference(finished):
    result = read_results(finished[1] / "results.json").metrics
    gap = result["canny_f1"]["value"] - result["canny_f1/no_condition"]["value"]
    assert result["canny_f1/gain_over_no_condition"]["value"] == pytest.approx(gap, abs=1e-9)


def test_the_checkpoint_holds_the_adapter_and_nothing_else(finished, sd3_tiny):
    folder = next((finished[1] / "checkpoints").glob("images-*"))
    frozen = sd3_tiny.net.state_dict()
    for name in ("adapter.safetensors", "adapter_ema.safetensors"):
        weights = load_file(folder / name)
        assert {k.split(".")[0] for k in weights} == {"stem", "entries", "copies", "connectors", "head"}
        assert sum(t.numel() for t in weights.values()) < 3.7e6
    state = torch.load(folder / "state.pt", weights_only=True)
    assert "state_dict" not in state
    moments = [t for s in state["optimizer_states"][0]["state"].values() for t in s.values()]
    assert sum(t.numel() for t in moments) < 2.1 * 3.7e6
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["backbone_hash"] == sd3_tiny.weight_hash()  # the backbone is as it was before training
    assert len(frozen) > 100


def test_metrics_are_on_disk_with_units_and_images(finished):
    rows = read_rows(finished[1] / "metrics.jsonl")
    last = {k: v for row in rows for k, v in row.items()}
    for name in ("train/img_per_s", "train/step_time_ms", "train/peak_mem_gib", "train/lr", "val/loss"):
        assert np.isfinite(last[name]), name
    assert np.isfinite(last["val/canny_f1/wrong_condition"])
    assert all("images_seen" in row for row in rows)
    assert (finished[1] / "metrics.csv").exists()


def test_pictures_are_there_and_not_empty(finished):
    for name in ("curves.png", "grids/images-000000064.png", "examples/condition-0.png"):
        with Image.open(finished[1] / name) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 5, name


def test_the_offline_wandb_run_holds_what_was_logged(finished):
    file = next((finished[1] / "wandb").glob("offline-run-*/run-*.wandb"))
    run = finished_run(file)
    assert run.group == "tests"
    assert "quick" in run.tags
    keys = {k for row in run.history for k in row}
    assert {"train/loss", "val/canny_f1", "images_seen", "val/grid"} <= keys
    assert any("val/samples" in k for k in keys)
    assert run.config["adapter"]["name"] == "unicon"
    assert "git_sha" in run.config["facts"]


def test_sample_draws_what_validation_drew(finished, tmp_path):
    """The same condition, prompt and noise as row 0 of the validation grid: the same picture, whichever entry drew it."""
    run = finished[1]
    prompt = (run / "examples" / "condition-0.txt").read_text().strip()
    condition, out = run / "examples" / "condition-0.png", tmp_path / "one.png"
    overrides = [f"run={run}", f"prompt='{prompt}'", f"condition={condition}", f"out={out}", "steps=2", "hardware=cpu"]
    done = run_entry("sample", *overrides)
    assert done.returncode == 0, done.stderr
    assert re.search(r"2 steps in [\d.]+ s, [\d.]+ GiB", done.stdout)
    drawn, seen = (np.asarray(Image.open(f)).astype(int) for f in (out, run / "grids" / "cells-000000064" / "0-3.png"))
    assert np.abs(drawn - seen).max() <= 2  # captions are cached in 16 bits


def test_sample_makes_the_condition_of_a_photo_and_says_that_it_was_cropped(finished, tmp_path):
    run, photo = finished[1], tmp_path / "photo.png"
    source = Image.open(run / "grids" / "cells-000000064" / "0-0.png")
    source.resize((160, 128), Image.Resampling.BICUBIC).save(photo)
    common = [f"run={run}", "prompt='a small blue cube, brown floor'", "steps=1", "hardware=cpu", "condition_is_image=true"]
    done = run_entry("sample", *common, f"condition={photo}", f"out={tmp_path / 'one.png'}")
    assert done.returncode == 0, done.stderr
    assert "160 x 128 pixels, read as a photo, scaled and cropped to 64" in done.stdout
    assert (tmp_path / "one.png").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"run": "nowhere"}, "no config.yaml there"),
        ({"condition": "nowhere.png"}, "no such file"),
        ({"prompt": None}, "prompt"),
    ],
)
def test_sample_refusals_are_one_line(finished, change, said):
    given = {"run": finished[1], "prompt": "a ball", "condition": finished[1] / "examples" / "condition-0.png"} | change
    done = run_entry("sample", *(f"{k}={v}" for k, v in given.items() if v is not None))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_finished_run_is_not_run_again(finished):
    done = run_entry("train", f"resume={finished[1]}")
    assert done.returncode == 0
    assert "already finished" in done.stdout


# ---- the documents ----------------------------------------------------------------------------------------------------


def commands_of(document: str) -> list[list[str]]:
    """The words of each line of the shell blocks; continued lines are joined, comments dropped."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")]


COMMANDS = [(d, words) for d in ("README.md", "CONTRIBUTING.md") for words in commands_of(d)]


@pytest.mark.parametrize(("document", "words"), COMMANDS, ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else v)
def test_every_command_of_the_documents_works(document, words, finished, tmp_path, cache_dir, monkeypatch):
    """Training runs as a quick try; what needs a GPU or a gated model is composed and checked; NAME/STAMP is filled in."""
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    assert words[:2] == ["python", "-m"]
    entry, overrides = words[2].removeprefix("src."), words[3:]
    if entry == "export":
        filled = [o.replace("runs/NAME/STAMP", str(finished[1])).replace("EXPORTED", str(tmp_path / "made")) for o in overrides]
        done = run_entry(entry, *filled)
        assert done.returncode == 0, done.stderr
    elif entry == "sample":
        filled = [o.replace("runs/NAME/STAMP", str(finished[1])) for o in overrides]
        done = run_entry(entry, *filled, f"out={tmp_path}/one.png", "steps=2")
        assert done.returncode == 0, done.stderr
    elif entry == "report":
        done = run_entry(entry, *[o.replace("[runs]", f"[{finished[1]}]") for o in overrides[:1]], f"out={tmp_path}")
        assert done.returncode == 0, done.stderr
        assert "| unicon |" in (tmp_path / "table.md").read_text()
    elif entry == "prepare" and overrides[0] in VERBS:
        for i in range(16):
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
            (tmp_path / f"{i}.txt").write_text("noise")
        filled = [o.replace("DATA", str(tmp_path)).replace("SHARDS", str(tmp_path / "out")) for o in overrides]
        quick = [w for w in QUICK if not w.startswith("data.")] if overrides[0] == "cache" else []
        places = [f"cache_dir={tmp_path / 'cache'}"] if quick else []
        done = run_entry(entry, *filled, "data.val_images=8", *quick, *places)
        assert done.returncode == 0, done.stdout + done.stderr
    elif "--list" in overrides:
        done = run_entry(entry, *overrides)
        assert done.returncode == 0, done.stderr
        assert "| unicon |" in done.stdout
    elif entry == "train" and not any("hardware=gpu" in o for o in overrides):
        ours = [o for o in overrides if not o.startswith("budget")]
        typed = [*ours, *SMALL, f"output_dir={tmp_path}", f"cache_dir={cache_dir}"]
        if "-m" in ours:
            done = run_entry(entry, *typed)
            assert done.returncode == 0, done.stdout + done.stderr
            folders = [line.removeprefix("run: ") for line in done.stdout.splitlines() if line.startswith("run: ")]
            assert len(folders) == done.stderr.count("skipped: job") == 2
            assert all((Path(folder) / "results.json").exists() for folder in folders)
        else:  # in this process: `finished` went through the entry, and loading torch costs more than such a run
            folder = train(load("train", typed), typed)
            assert (folder / "results.json").exists()
    elif entry == "bench.speed":
        names, rest = split_words(overrides)
        assert names
        load("train", rest)
    else:
        load(entry, overrides)


def test_readme_is_short_and_its_files_exist():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") < 200
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", text):
        assert (ROOT / target).exists(), target
