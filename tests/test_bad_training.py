"""Files, captions and folders as people have them through the verbs: every good format is checked and trained on; bad ones are
counted by `check`, refused by a training, or replaced and listed. Row numbers are those of `tests/bad_files.py`."""

import json
import multiprocessing
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from src import build, prepare
from src.config import load, resolve_hardware
from src.results import read_results
from src.train.flow import train
from src.types import UserError
from src.world import watched
from tests.bad_files import BAD, CAPTIONS, GOOD_FORMS, ODD, deny, encoded, photo, write_cases
from tests.conftest import QUICK, run_entry, run_folder

HELD_OUT = 8
TINY = ["validation.images=2", "validation.final_images=2", "validation.steps=1", "budget.images=32"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Every bad and odd file, every good format, and 40 good pictures, of which the last by name are held out."""
    folder = write_cases(tmp_path_factory.mktemp("tree"), (*BAD, *ODD))
    for i, (name, make) in enumerate(GOOD_FORMS.items()):
        file = folder / f"{i:02d}_{name}"
        file.write_bytes(make(i))
        file.with_suffix(".txt").write_text(CAPTIONS[i % len(CAPTIONS)], encoding="utf-8")
    for i in range(40):
        Image.fromarray(photo(i, 80, 100)).save(folder / f"z{i:02d}.png")
        (folder / f"z{i:02d}.txt").write_text(f"picture {i}")
    return folder


def words(tree, tmp_path):
    quick = [w for w in QUICK if not w.startswith("data.")]
    data = ["data=folder", f"data.path={tree}", f"data.val_images={HELD_OUT}"]
    return [*quick, *TINY, "budget.images=64", *data, f"output_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}"]


def test_check_counts_every_bad_file_by_name(tree, tmp_path):
    done = run_entry(
        "prepare", "check", "data=folder", f"data.path={tree}", "data.val_images=8", "full=true", f"output_dir={tmp_path}"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((run_folder(done) / "report.json").read_text())
    named = json.dumps(report["problems"])
    assert all(case.name in named for case in BAD)
    assert not any(f"_{name}" in named for name in GOOD_FORMS)
    assert not any(case.name in named for case in ODD)


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
    cfg = resolve_hardware(load("train", [*words(tree, tmp_path), *skip, "data.max_bad_share=0.1"]))
    made = build.plan(cfg)
    with pytest.raises(UserError, match=r"samples are bad, more than data\.max_bad_share=0\.1"):
        watched(cfg, made, [made.task])


# ---- one small tree for each row, in this process ---------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch) -> set[str]:
    """Ids that training steps were given."""
    from src.adapters.base import ControlAdapter

    ids: set[str] = set()
    original = ControlAdapter.training_step

    def spy(self, batch, i):
        ids.update(batch.ids)
        return original(self, batch, i)

    monkeypatch.setattr(ControlAdapter, "training_step", spy)
    return ids


def small(root: Path, count: int = 8) -> Path:
    """`0.png` and so on with captions, below `images`."""
    (root / "images").mkdir(parents=True)
    for i in range(count):
        (root / "images" / f"{i}.png").write_bytes(encoded(photo(i), "PNG"))
        (root / "images" / f"{i}.txt").write_text(f"picture {i}")
    return root


def checked(root: Path, *more: str) -> tuple[int, list[dict]]:
    """`prepare check` -> (exit code, findings); 2 stands for a refusal, as in `src.config.cli`."""
    given = ["data=folder", f"data.path={root}/images", "data.val_images=2", f"output_dir={root}/runs", "workers=0"]
    code = 0
    try:
        prepare.check(load("prepare_check", [*given, "resolution=64", *more]))
    except SystemExit as stop:
        code = stop.code
    report = json.loads(next((root / "runs").glob("*/*/report.json")).read_text())
    return code, report["problems"] + report["hints"]


def training(root: Path, *more: str) -> list[str]:
    """The words of a tiny training on `root/images`."""
    quick = [w for w in QUICK if not w.startswith(("data.", "validation.", "budget.images"))]
    data = ["data=folder", f"data.path={root}/images", "data.val_images=2", f"output_dir={root}/runs"]
    return [*quick, "validation.every_images=1000", *TINY, *data, *more]


def refused(root: Path, *more: str) -> str:
    """The one line with which a training is refused before a weight is read; its exit code is 2 (`src.config.cli`)."""
    with pytest.raises(UserError) as error:
        build.plan(load("train", training(root, *more)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_good_format_is_checked_and_trained_on(tmp_path, cache_dir, seen, capsys, monkeypatch):
    """Rows 3, 4, 6 to 10 and 14: alpha, palettes, gray, CMYK, 16 bits, wide gamut, EXIF, animations, small pictures, and
    captions of 500 words and of other alphabets; none is a problem, none is lost, and the cut captions are told."""
    monkeypatch.setattr("src.data.source._noted", set())
    images = small(tmp_path, 0) / "images"
    odd = tuple(case for case in ODD if case.name != "wide.png")  # 20 megapixels, which the tree above has
    write_cases(images, odd)
    for i, (name, make) in enumerate(GOOD_FORMS.items()):
        (images / f"{i:02d}_{name}").write_bytes(make(i))
        (images / f"{i:02d}_{name}").with_suffix(".txt").write_text(CAPTIONS[i % len(CAPTIONS)], encoding="utf-8")
    for i in range(2):
        (images / f"z{i}.png").write_bytes(encoded(photo(90 + i), "PNG"))
        (images / f"z{i}.txt").write_text("held out")
    code, found = checked(tmp_path, "full=true")
    assert (code, [f for f in found if f["kind"] != "flat picture"]) == (0, [])
    assert "GIF files of several frames, such as" in capsys.readouterr().out
    typed = training(tmp_path, f"cache_dir={cache_dir}", "budget.effective_batch=8", "hardware.micro_batch=8")
    folder = train(load("train", typed), typed)
    said = capsys.readouterr().out
    assert read_results(folder / "results.json").images_seen == 32
    assert len(seen) == len(GOOD_FORMS) + len(odd)
    assert {f"{i:02d}_{name}" for i, name in enumerate(GOOD_FORMS)} < seen
    cut = re.search(
        r"(\d+) of 22 captions \(.*%\) are cut at the 24 tokens that the tokenizer of (\S+) reads; .* (\d+): (.+)", said
    )
    assert cut is not None, said
    assert 2 <= int(cut[1]) < 22
    assert int(cut[3]) > 500
    assert (cut[2], cut[4]) == ("embedded:sd3_tiny", "06_plain.tif")  # the first of those with 500 words


def caption_missing(root: Path) -> None:
    (root / "images" / "3.txt").unlink()


def mismatched_pair(root: Path) -> None:
    (root / "depth").mkdir()
    for i in range(8):
        shape = (64, 48) if i == 3 else (48, 64)
        (root / "depth" / f"{i}.png").write_bytes(encoded(np.full(shape, 900 + i, np.uint16), "PNG"))


def pair_lacks_a_map(root: Path) -> None:
    (root / "depth").mkdir()
    for i in (0, 1, 2, 4, 5, 6, 7, 9):
        (root / "depth" / f"{i}.png").write_bytes(encoded(photo(i)[..., 0].astype(np.uint16) + 900, "PNG"))


def duplicate_stems(root: Path) -> None:
    (root / "images" / "3.jpg").write_bytes(encoded(photo(30), "JPEG"))


def unreadable(root: Path) -> None:
    (root / "images" / "3.png").unlink()
    (root / "images" / "3.png").symlink_to("3.png")  # a link to itself: no permission helps, also not root's


def too_few(root: Path) -> None:
    for i in range(2, 8):
        (root / "images" / f"{i}.png").unlink()
        (root / "images" / f"{i}.txt").unlink()


def table_names_what_is_not_there(root: Path) -> None:
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in range(8)]
    rows[2]["file_name"], rows[4] = "gone.png", {"text": "no path"}
    (root / "images" / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


DEPTH = "data.signals={depth: ../depth}"
TABLE = "data.table=table.jsonl"
ROWS = [  # row, what is wrong, words, kind of the finding, what the report says, what a training is refused with
    (
        1,
        caption_missing,
        (),
        "caption",
        r"caption is missing",
        "no caption file of the same name .*3.png.*missing_caption=empty",
    ),
    (12, mismatched_pair, (DEPTH,), "pair", "the depth map is 48 x 64", "3.png: the depth map is 48 x 64 .*crop and turn"),
    (15, pair_lacks_a_map, (DEPTH,), "data set", "1 images have no map there: 3.png", "have no map .*same names below"),
    (15, duplicate_stems, (), "data set", "2 files share a stem", "share a stem, .*: 3.jpg, 3.png; rename or remove"),
    (11, unreadable, (), "unreadable", "cannot be opened", "3.png: cannot be opened .*; check its permissions and links"),
    (
        11,
        table_names_what_is_not_there,
        (TABLE,),
        "unreadable",
        "does not exist, and row 3 of .*table.jsonl names it",
        r"2 of 6 samples .* cannot be read: .*gone.png \(does not .*table.jsonl, row 5 \(no path in file_name\); .*=skip",
    ),
    (17, too_few, (), "data set", "holds 2 images, and data.val_images=2", "leaves none to train on; write data.val_images=1"),
]


@pytest.mark.parametrize(("row", "spoil", "more", "kind", "report", "line"), ROWS, ids=lambda v: getattr(v, "__name__", None))
def test_what_is_wrong_is_reported_by_check_and_refused_in_one_line(tmp_path, row, spoil, more, kind, report, line):
    spoil(small(tmp_path))
    more = tuple(word.replace("../depth", f"{tmp_path}/depth") for word in more)
    code, found = checked(tmp_path, *more)
    assert code == 1
    assert any(f["kind"] == kind and re.search(report, f["reason"]) for f in found), found
    assert re.search(line, refused(tmp_path, *more)), row


def test_rows_of_a_table_without_their_file_are_replaced(tmp_path):
    from src.data.folder import FolderSource
    from src.data.tolerant import tolerant

    table_names_what_is_not_there(small(tmp_path))
    mismatched_pair(tmp_path)
    Image.fromarray(np.full((48, 64), 903, np.uint16)).save(tmp_path / "depth" / "3.png")
    (tmp_path / "depth" / "2.png").unlink()  # of the picture that is not there either
    rules = {
        "on_bad_sample": "skip",
        "max_bad_share": 0.5,
        "table": "table.jsonl",
        "signals": {"depth": str(tmp_path / "depth")},
    }
    source = FolderSource("folder", f"{tmp_path}/images", 2, "train", 64, **rules)
    whole = tolerant(source, tmp_path, say=lambda _: None)
    assert whole.replaced == {2: 3, 4: 5}
    assert [whole.describe(i)[1] for i in range(6)] == [f"picture {i}" for i in (0, 1, 3, 3, 5, 5)]
    assert source.describe(4)[0] == "row 5"
    before = source.fingerprint()
    (tmp_path / "images" / "gone.png").write_bytes(encoded(photo(2), "PNG"))
    (tmp_path / "depth" / "gone.png").write_bytes((tmp_path / "depth" / "1.png").read_bytes())
    source = FolderSource("folder", f"{tmp_path}/images", 2, "train", 64, **rules)
    assert source.fingerprint() != before
    assert tolerant(source, tmp_path, say=lambda _: None).replaced == {4: 5}


def test_a_loop_of_links_is_walked_once(tmp_path):
    """Row 11 of links between folders: nothing is read twice, and nothing hangs."""
    images = small(tmp_path) / "images"
    (images / "deeper").mkdir()
    (images / "deeper" / "up").symlink_to(images, target_is_directory=True)
    (images / "self").symlink_to(images, target_is_directory=True)
    code, found = checked(tmp_path)
    assert (code, found) == (0, [])
    assert len(build.plan(load("train", training(tmp_path))).train_source) == 6


def test_a_file_without_permission_is_skipped_until_it_is_given(tmp_path):
    """Row 11: its size and time stay, so only asking again can tell."""
    from src.data.folder import FolderSource
    from src.data.tolerant import tolerant

    file = small(tmp_path) / "images" / "3.png"
    denied = deny(file)
    rules = {"on_bad_sample": "skip", "max_bad_share": 0.5}
    source = FolderSource("folder", f"{tmp_path}/images", 2, "train", 64, **rules)
    if not denied:
        pytest.skip("nothing is unreadable for root")
    assert tolerant(source, tmp_path, say=lambda _: None).replaced == {3: 4}
    os.chmod(file, 0o644)
    source = FolderSource("folder", f"{tmp_path}/images", 2, "train", 64, **rules)
    assert tolerant(source, tmp_path, say=lambda _: None).replaced == {}


def test_a_bad_held_out_image_is_left_out_of_training_scores(tmp_path, cache_dir, capsys):
    """A second copy of its neighbour would count twice in n, and stand for another image's condition."""
    images = small(tmp_path, 12) / "images"
    for name in ("3.png", "8.png"):  # in the order of names 8 and 9 are held out, behind 7
        (images / name).write_bytes((images / name).read_bytes()[:-200])
    more = ["data.on_bad_sample=skip", "data.max_bad_share=0.5", "data.val_images=3", "validation.final_images=3"]
    typed = training(tmp_path, f"cache_dir={cache_dir}", "budget.effective_batch=8", "hardware.micro_batch=8", *more)
    folder = train(load("train", typed), typed)
    said = capsys.readouterr().out
    assert "1 of 9 samples of folder are bad and replaced" in said
    assert "1 of 3 samples of folder are bad and left out, and 2 stay" in said
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["ids"] == ["7.png", "9.png"]
    assert {len(values) for values in outcome["scores"].values()} == {2}
    assert read_results(folder / "results.json").metrics["val_loss"]["n"] == 2
    made = build.plan(cfg := resolve_hardware(load("train", typed)))
    whole = made.val_source.pictures_fingerprint()
    _, val = watched(cfg, made, [made.task])
    assert val.pictures_fingerprint().startswith(f"{whole}-without1-")  # the key of its caches
    assert [val.describe(i)[0] for i in range(len(val))] == ["7.png", "9.png"]
    with pytest.raises(IndexError):
        val[2]


def as_rank(rank: int, root: Path, source: str, share: float, told: multiprocessing.Queue) -> None:
    """One of two ranks that ask which samples are bad; the second has a folder of its own, and can read no picture."""
    import torch.distributed

    from src.data.folder import FolderSource
    from src.ranks import place

    place.BEAT_S = 0.0  # tells after each sample that it goes on
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/meet-{share}", rank=rank, world_size=2)
    rules = {"on_bad_sample": "skip", "max_bad_share": share}
    made = SimpleNamespace(**{f"{s}_source": FolderSource("folder", source, 3, s, 64, **rules) for s in ("train", "val")})
    cfg = SimpleNamespace(cache_dir=f"{root}/{rank}", hardware=SimpleNamespace(workers=0))
    if rank:
        FolderSource.__getitem__ = lambda self, index: 1 / 0
    try:
        train, val = watched(cfg, made, [], place.Ranks(rank, 2))
        told.put((rank, train.replaced, val.left_out, len(list(Path(cfg.cache_dir).glob("skipped-*")))))
    except Exception as error:
        told.put((rank, type(error).__name__, str(error)))


def test_the_first_rank_reads_and_says_what_is_bad(tmp_path):
    """An error that passes on one of them would give each another list, and another order of images."""
    images = small(tmp_path, 10) / "images"
    for name in ("3.png", "8.png"):
        (images / name).write_bytes((images / name).read_bytes()[:-200])
    fork = multiprocessing.get_context("fork")

    def both(share: float) -> list[tuple]:
        told = fork.Queue()
        ranks = [fork.Process(target=as_rank, args=(rank, tmp_path, str(images), share, told)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        found = sorted(told.get(timeout=120) for _ in ranks)
        for rank in ranks:
            rank.join(60)
        return found

    assert both(0.5) == [(0, {3: 4}, (1,), 2), (1, {3: 4}, (1,), 0)]
    first, second = both(0.01)
    assert first[1] == "UserError"
    assert second[1] == "RankFailed"
    assert "1 of 7 samples are bad, more than data.max_bad_share=0.01" in first[2]
    assert first[2] in second[2]


def test_fewer_images_than_a_step_takes_is_told(tmp_path, capsys):
    """Row 17."""
    small(tmp_path)
    build.plan(load("train", training(tmp_path)))
    said = capsys.readouterr().out
    assert "6 training images of data=folder are fewer than budget.effective_batch=16: none is left out" in said
    assert "write budget.effective_batch=6 or less" in said
    build.plan(load("train", training(tmp_path, "budget.effective_batch=6", "hardware.micro_batch=6", "budget.images=36")))
    assert "fewer than" not in capsys.readouterr().out


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    """Rows 13 and 18."""
    small(tmp_path)
    assert "final_images=3 is more than the 2 held-out images" in refused(tmp_path, "validation.final_images=3")
    assert "resolution=60 is not a multiple of 16" in (line := refused(tmp_path, "resolution=60"))
    assert "write resolution=48 or resolution=64" in line


def test_twelve_bits_in_sixteen_are_named(tmp_path):
    """Row 9: the high byte of a camera's raw values is nearly black."""
    images = small(tmp_path) / "images"
    (images / "3.png").write_bytes(encoded(photo(3)[..., 0].astype(np.uint16) * 16, "PNG"))
    (images / "4.png").write_bytes(encoded(photo(4)[..., 0].astype(np.uint16) * 257, "PNG"))
    code, found = checked(tmp_path)
    assert code == 0
    assert [f["id"] for f in found if f["kind"] == "twelve bits"] == ["3.png"]


def test_photos_are_refused_for_the_scene_probe(tmp_path, capsys):
    small(tmp_path)
    for task, signal in (("depth", "depth"), ("pose", "joints")):
        line = refused(tmp_path, f"task={task}")
        assert "data=folder are photos: write task.detector=<hub id or folder of a" in line
        assert f"data.signals={{{signal}: <folder>}}" in line
        build.plan(load("train", training(tmp_path, f"task={task}", "data.are_scenes=true")))
    mismatched_pair(tmp_path)
    Image.fromarray(np.full((48, 64), 903, np.uint16)).save(tmp_path / "depth" / "3.png")
    capsys.readouterr()
    build.plan(load("train", training(tmp_path, "task=depth", f"data.signals={{depth: {tmp_path}/depth}}")))
    assert "the scores depth_rmse and depth_mse mean nothing" in capsys.readouterr().out
