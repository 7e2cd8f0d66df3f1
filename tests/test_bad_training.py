"""A folder full of bad files through the verbs: counted by `check`, refused by a training, or replaced and listed."""

import json

import pytest
from PIL import Image

from src.results import read_results
from tests.bad_files import BAD, ODD, photo, write_cases
from tests.conftest import QUICK, run_entry, run_folder

HELD_OUT = 8


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Every bad and odd file, and 40 good pictures, of which the last by name are held out."""
    folder = write_cases(tmp_path_factory.mktemp("tree"), (*BAD, *ODD))
    for i in range(40):
        Image.fromarray(photo(i, 80, 100)).save(folder / f"z{i:02d}.png")
        (folder / f"z{i:02d}.txt").write_text(f"picture {i}")
    return folder


def words(tree, tmp_path):
    quick = [w for w in QUICK if not w.startswith("data.")]
    data = ["data=folder", f"data.path={tree}", f"data.val_images={HELD_OUT}"]
    return [*quick, *data, f"output_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}"]


def test_check_counts_every_bad_file_by_name(tree, tmp_path):
    done = run_entry(
        "prepare", "check", "data=folder", f"data.path={tree}", "data.val_images=8", "full=true", f"output_dir={tmp_path}"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.dumps(json.loads((run_folder(done) / "report.json").read_text()))
    assert all(case.name in report for case in BAD)


def test_a_training_refuses_the_tree_in_one_line(tree, tmp_path):
    done = run_entry("train", *words(tree, tmp_path))
    assert done.returncode == 2
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "cannot be read" in line
    assert "data.on_bad_sample=skip" in line


def test_a_training_replaces_bad_files_and_lists_them(tree, tmp_path):
    skip = ["data.on_bad_sample=skip", "data.max_bad_share=0.5"]
    done = run_entry("train", *words(tree, tmp_path), *skip)
    assert done.returncode == 0, done.stdout + done.stderr
    lists = list((tmp_path / "cache").glob("skipped-*.jsonl"))  # one for each split
    listed = [json.loads(line)["id"] for file in lists for line in file.read_text().splitlines()]
    assert sorted(listed) == sorted(case.name for case in BAD)
    assert any(str(file) in done.stdout for file in lists)
    assert read_results(run_folder(done) / "results.json").images_seen == 64
    again = run_entry("train", *words(tree, tmp_path), *skip, "data.max_bad_share=0.1")
    assert again.returncode == 2
    assert "samples are bad, more than data.max_bad_share=0.1" in again.stderr
