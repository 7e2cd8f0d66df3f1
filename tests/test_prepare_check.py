"""`python -m src.prepare check`, and how the verbs of prepare are found."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src import prepare
from src.backbones.source import EMBEDDED_ROOT
from src.config import load
from src.construct import construct
from src.data import picture
from src.data.check import check_sources, drawn_rows, sign_test
from src.data.folder import FolderSource
from src.data.scenes import SceneSource
from src.data.tokens import token_counts
from src.types import Sample, UserError
from tests.conftest import run_entry, run_folder

SIZE = 64
PLAIN = {"sample": None, "seed": 0, "workers": 0, "tokenizer": None, "depth_is": "distance"}


def noise(key: int, size: tuple[int, int] = (80, 72)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(key).integers(0, 256, (*size, 3), np.uint8))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Sixteen good pictures; the last four are held out."""
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(16):
        noise(i).save(root / f"{i:02d}.png")
        (root / f"{i:02d}.txt").write_text(f"picture number {i}")
    return root


def split(root: Path, **rules) -> dict[str, FolderSource]:
    common = {"name": "folder", "path": str(root), "val_images": 4, "resolution": SIZE}
    return {name: FolderSource(split=name, **common, **rules) for name in ("train", "val")}


def words(root: Path, out: Path, *more: str) -> list[str]:
    common = ["data=folder", f"data.path={root}", "data.val_images=4", f"output_dir={out}", f"resolution={SIZE}"]
    return [*common, "workers=0", *more]


def found(report: dict, kind: str) -> list[str]:
    return [f["id"] for f in (*report["problems"], *report["hints"]) if f["kind"] == kind]


# ---- what is found ----------------------------------------------------------------------------------------------------


def test_a_good_folder_has_nothing_to_say(folder, tmp_path, capsys):
    prepare.check(load("prepare_check", words(folder, tmp_path / "runs")))
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith(f"run: {tmp_path / 'runs'}/check_folder/")
    assert "train: 12 samples (PNG RGB 12)" in printed
    assert "problems: 0, hints: 0" in printed
    report = json.loads((Path(printed[-1].removeprefix("run: ")) / "report.json").read_text())
    facts = report["splits"]["train"]
    assert (report["problems"], report["hints"]) == ([], [])
    assert (facts["count"], facts["decoded"], facts["unreadable_of_decoded"]) == (12, 12, 0)
    assert facts["shorter_side_px"] == [72, 72, 72]
    assert facts["commonest_sizes"] == [[80, 72, 12]]
    assert facts["caption_words"] == [3, 3, 3]
    assert facts["captions_different"] == 12


def test_every_kind_of_problem_is_named_with_its_file_and_exits_1(folder, tmp_path, capsys):
    half = noise(99)
    half.save(folder / "02.jpg", quality=95)
    (folder / "02.png").unlink()
    (folder / "02.jpg").write_bytes((folder / "02.jpg").read_bytes()[:3000])
    (folder / "03.png").write_bytes(b"")
    (folder / "04.png").write_text("<html>not found</html>")
    (folder / "05.txt").unlink()
    Image.new("RGB", (80, 80), "black").save(folder / "06.png")
    (folder / "07.png").write_bytes((folder / "08.png").read_bytes())
    (folder / "14.png").write_bytes((folder / "00.png").read_bytes())
    (folder / "09.txt").write_text("word " * 500)
    noise(50, (32, 40)).save(folder / "10.png")
    with pytest.raises(SystemExit) as stop:
        prepare.check(load("prepare_check", words(folder, tmp_path / "runs")))
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    report = json.loads((Path(printed.splitlines()[-1].removeprefix("run: ")) / "report.json").read_text())
    assert [Path(f).name for f in found(report, "unreadable")] == ["02.jpg", "03.png", "04.png"]
    assert found(report, "caption") == ["05.png"]
    assert found(report, "in both splits") == ["14.png"]
    assert found(report, "twice") == ["08.png"]
    assert found(report, "flat picture") == ["06.png"]
    assert {f["kind"] for f in report["problems"]} == {"unreadable", "caption", "in both splits"}
    assert "problems: 5, hints: 2, the worst:" in printed
    assert re.search(r"unreadable: train: .*02\.jpg: not whole \(.*; mend or remove it", printed)
    assert "1 pictures are smaller than the resolution" in printed
    assert report["splits"]["train"]["caption_words"][-1] == 500
    assert report["splits"]["train"]["captions_empty"] == 1


def test_only_the_worst_are_printed_and_the_rest_is_counted(folder, tmp_path, capsys):
    for i in range(8):
        (folder / f"{i:02d}.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        prepare.check(load("prepare_check", words(folder, tmp_path / "runs", "worst=3")))
    printed = capsys.readouterr().out
    assert printed.count("empty, 0 bytes") == 3
    assert "and 5 more: 5 unreadable" in printed


def test_a_missing_caption_says_what_was_there_instead(folder, tmp_path, capsys):
    for i in range(16):
        (folder / f"{i:02d}.txt").rename(folder / f"{i:02d}.TXT")
    with pytest.raises(SystemExit):
        prepare.check(load("prepare_check", words(folder, tmp_path / "runs", "worst=1")))
    said = "caption: train: 00.png: its caption is missing (no caption file of the same name (.txt; 16 files end in '.TXT'))"
    assert said in capsys.readouterr().out


def test_no_kind_pushes_another_out_of_the_list(folder, tmp_path, capsys):
    for i in range(8):
        (folder / f"{i:02d}.png").write_bytes(b"")
    (folder / "08.txt").unlink()
    (folder / "11.png").write_bytes((folder / "10.png").read_bytes())
    with pytest.raises(SystemExit):
        prepare.check(load("prepare_check", words(folder, tmp_path / "runs", "worst=4")))
    printed = capsys.readouterr().out
    listed = [line.strip().split(": train: ")[0] for line in printed.splitlines() if ": train: " in line]
    assert listed == ["unreadable", "unreadable", "caption", "hint: twice"]
    assert "and 6 more: 6 unreadable" in printed


def test_a_sample_is_decoded_and_all_with_full(folder, tmp_path, monkeypatch):
    decoded, read = [], picture.read_rgb
    monkeypatch.setattr(picture, "read_rgb", lambda raw, *rest: (decoded.append(raw.name), read(raw, *rest))[1])
    report = check_sources(split(folder), **{**PLAIN, "sample": 5})
    assert len(decoded) == 5 + 4
    assert report["splits"]["train"]["decoded"] == 5
    again, decoded = decoded[:], decoded.clear() or []
    drawn = [f"{row:02d}.png" for row in drawn_rows(12, 5, 0, "train")]
    assert again[:5] == drawn
    assert drawn_rows(12, 5, 0, "train") != drawn_rows(12, 5, 1, "train")
    assert drawn_rows(12, None, 0, "train") == drawn_rows(12, 99, 0, "train") == list(range(12))
    outside = next(i for i in range(12) if f"{i:02d}.png" not in drawn)
    file = folder / f"{outside:02d}.png"
    file.write_bytes(file.read_bytes()[:-2000])  # its header is whole
    assert found(check_sources(split(folder), **{**PLAIN, "sample": 5}), "unreadable") == []
    assert [Path(f).name for f in found(check_sources(split(folder), **PLAIN), "unreadable")] == [file.name]


def test_workers_find_the_same(folder):
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:-2000])
    alone = check_sources(split(folder), **PLAIN)
    assert check_sources(split(folder), **{**PLAIN, "workers": 2}) == alone
    assert len(alone["problems"]) == 1


def test_several_captions_of_one_picture_are_no_duplicates(folder):
    rows = [{"file_name": f"{i:02d}.png", "text": f"{way} {i}"} for i in range(12) for way in ("a", "another")]
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check_sources(split(folder, table="table.jsonl"), **PLAIN)
    assert report["hints"] == []
    assert report["problems"] == []
    report = check_sources(
        {name: FolderSource("folder", str(folder), 3, name, SIZE, table="table.jsonl") for name in ("train", "val")}, **PLAIN
    )
    assert found(report, "in both splits") == ["10.png#2"]  # a split through the captions of one picture


# ---- conditions -------------------------------------------------------------------------------------------------------


def paired(folder: Path, tmp_path: Path, draw, suffix: str = "png") -> dict[str, FolderSource]:
    maps = tmp_path / "maps"
    maps.mkdir()
    for i in range(16):
        made = draw(i)
        if isinstance(made, Image.Image):
            made.save(maps / f"{i:02d}.{suffix}")
        else:
            np.save(maps / f"{i:02d}.npy", made)
    return split(folder, signals={"canny" if suffix == "png" else "depth": str(maps)})


def test_suspicious_edges_are_hints(folder, tmp_path):
    def draw(i: int) -> Image.Image:
        canvas = np.zeros((80, 72), np.uint8)
        canvas[::9] = 255
        return Image.fromarray({1: 255 - canvas, 2: np.zeros_like(canvas), 3: np.full_like(canvas, 90)}.get(i, canvas))

    report = check_sources(paired(folder, tmp_path, draw), **PLAIN)
    assert found(report, "inverted edges") == ["01.png"]
    assert found(report, "black condition") == ["02.png"]
    assert found(report, "flat condition") == ["03.png"]
    assert report["problems"] == []
    assert report["splits"]["train"]["conditions"]["canny"]["maps"] == 12
    assert 0.05 < report["splits"]["train"]["conditions"]["canny"]["white"] < 0.2


@pytest.mark.parametrize("depth_is", ["distance", "nearness"])
def test_flipped_depth_is_told_from_right_depth(folder, tmp_path, depth_is):
    ramp = np.linspace(2, 9, 80, dtype=np.float32)[:, None] * np.ones((80, 72), np.float32)  # larger below

    sources = paired(folder, tmp_path, lambda i: ramp + i, "npy")
    report = check_sources(sources, **{**PLAIN, "depth_is": depth_is})
    flipped = [f for f in report["hints"] if f["kind"] == "flipped depth"]
    assert len(flipped) == (1 if depth_is == "distance" else 0)  # of 12; four held-out maps are too few to tell
    if flipped:
        assert "in 12 of 12 depth maps" in flipped[0]["reason"]
        assert "task.signal_is=nearness" in flipped[0]["fix"]


def test_the_depth_of_scenes_is_the_right_way_round():
    class Upside(SceneSource):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return Sample(sample.id, sample.image, sample.caption, {**sample.signals, "depth": 9 - sample.signals["depth"]})

    right, wrong = (
        check_sources({"train": kind("scenes", 0, 24, 8, "train", SIZE)}, **PLAIN) for kind in (SceneSource, Upside)
    )
    assert found(right, "flipped depth") == []
    assert len(found(wrong, "flipped depth")) == 1
    assert {f["kind"] for f in right["hints"]} <= {"black condition"}  # scenes without a person
    assert right["duplicates_among"] == "decoded samples"


def test_a_finished_depth_map_is_judged_as_the_training_scales_it(folder, tmp_path):
    ramp = np.linspace(0, 1, 80 * 72, dtype=np.float32).reshape(80, 72)
    odd = {1: (200 * ramp).astype(np.uint16), 2: 3 * ramp - 1, 3: 900 * ramp, 4: np.full((80, 72), 9000, np.uint16)}

    def draw(i: int) -> np.ndarray:
        return odd[i] if i in odd else (ramp, (255 * ramp).astype(np.uint8), (65535 * ramp).astype(np.uint16))[i % 3]

    sources = paired(folder, tmp_path, draw, "npy")
    report = check_sources(sources, **{**PLAIN, "depth_is": "map"})
    assert found(report, "twelve bits") == ["01.png"]
    assert found(report, "unreadable") == ["02.png", "03.png"]
    assert found(report, "flat condition") == ["04.png"]
    assert len(report["problems"]) + len(report["hints"]) == 4
    said = r"its depth, read as a finished map, has float32 values of -?[\d.]+\.\.[\d.]+, neither 8 or 16 bits"
    assert all(re.match(said, f["reason"]) for f in report["problems"])
    said = r"its depth map is nearly black: its 16-bit values stay at or below 1\d\d, and white is 65535"
    assert any(re.match(said, f["reason"]) for f in report["hints"])
    assert found(check_sources(sources, **PLAIN), "unreadable") == []


@pytest.mark.parametrize("rules", [{}, {"flip": True, "crop": "random"}], ids=["plain", "flip"])
def test_joints_in_shares_or_of_another_picture_are_hints(folder, tmp_path, rules):
    maps = tmp_path / "joints"
    maps.mkdir()
    place = np.random.default_rng(0).uniform(0.1, 0.9, (2, 17, 2)) * (72, 80)  # columns, rows
    for i in range(16):
        joints = np.concatenate([place, np.full((2, 17, 1), 2)], 2)
        if i == 1:
            joints[..., :2] /= 72, 80
        elif i == 2:
            joints[..., :2] *= 8
        elif i == 3:
            joints[0, :, 0] -= 72  # one of two people: cut off by the edge
        elif i == 4:
            joints[:, 1:, 2] = 0
            joints[:, 1:, :2] = -9
        np.save(maps / f"{i:02d}.npy", joints)
    report = check_sources(split(folder, signals={"joints": str(maps)}, **rules), **PLAIN)
    assert {f["kind"] for f in (*report["problems"], *report["hints"])} == {"odd joints"}
    told = {f["id"]: f for f in report["hints"] if "~" not in f["id"]}
    assert sorted(told) == ["01.png", "02.png"]
    assert re.search(r"within 0\.1\d*\.\.0\.8\d*, as shares of a side do", told["01.png"]["reason"])
    assert told["01.png"]["fix"] == "multiply columns by 72 and rows by 80"
    assert re.search(r"\d+ of its 34 visible joints lie outside of its 72 x 80 pixels, at columns", told["02.png"]["reason"])


def test_conditions_that_the_task_makes_are_judged(folder, tmp_path, capsys):
    plain = np.tile(np.linspace(60, 200, 72), (80, 1)).astype(np.uint8)  # a picture without one edge
    Image.fromarray(np.repeat(plain[..., None], 3, 2)).save(folder / "01.png")
    square = np.full((80, 72, 3), 90, np.uint8)
    square[30:50, 30:50] = 200
    for i in (0, *range(2, 12)):
        square[0, 0] = i
        Image.fromarray(square).save(folder / f"{i:02d}.png")
    report = check_sources(split(folder), **PLAIN)
    assert report["hints"] == []
    task = construct(load("train", ["task=canny"]).task)
    report = check_sources(split(folder), **{**PLAIN, "workers": 2}, task=task)
    assert found(report, "black condition") == ["01.png"]
    assert "its condition of task=canny is black all over" in [f["reason"] for f in report["hints"]]
    prepare.check(load("prepare_check", words(folder, tmp_path / "runs", "task=canny")))
    assert "hint: black condition: train: 01.png: its condition of task=canny is black all over" in capsys.readouterr().out
    with pytest.raises(UserError, match="knows the project's rendered scenes and no photos"):
        prepare.check(load("prepare_check", words(folder, tmp_path / "runs", "task=depth")))


def test_a_map_from_which_the_task_makes_nothing_is_a_problem(folder, tmp_path):
    maps = tmp_path / "joints"
    maps.mkdir()
    for i in range(16):
        np.save(maps / f"{i:02d}.npy", np.random.default_rng(0).uniform(9, 60, (1, 17, 2)))
    sources = split(folder, signals={"joints": str(maps)})
    wrong, right = (construct(load("train", ["task=pose", f"task.layout={x}"]).task) for x in ("scene14", "coco17"))
    report = check_sources(sources, **PLAIN, task=wrong)
    assert len(found(report, "unreadable")) == 16
    first = report["problems"][0]
    assert first["reason"].startswith("joints of the layout scene14 are")
    assert first["fix"] == "write task.layout=coco17"
    assert check_sources(sources, **PLAIN, task=right)["problems"] == []


def test_the_sign_test_counts_throws_of_a_coin():
    assert sign_test(10, 10) == 1 / 1024
    assert sign_test(0, 7) == 1
    assert sign_test(3, 4) == (4 + 1) / 16


# ---- tokens -----------------------------------------------------------------------------------------------------------


def test_captions_beyond_77_tokens_are_counted():
    tokenizer = str(EMBEDDED_ROOT / "sd21_tiny" / "tokenizer")
    counts = token_counts(["a large red ball", "a large red ball " * 30], tokenizer)
    assert counts["limit"] == 77
    assert counts["beyond"] == 1
    assert counts["longest"] > 100


def test_a_tokenizer_is_taken_from_this_machine_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    assert token_counts(["a ball"], "openai/clip-vit-large-patch14") is None
    assert token_counts(["a ball"], None) is None
    with pytest.raises(UserError, match=r"no tokenizer\.json or vocab\.json there"):
        token_counts(["a ball"], str(tmp_path))
    with pytest.raises(UserError, match="is not a folder"):
        token_counts(["a ball"], "./nowhere")


# ---- verbs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch):
    """What would be run: (configuration, words, function)."""
    calls = []
    monkeypatch.setattr(prepare, "cli", lambda name, run: calls.append((name, prepare.sys.argv[1:], run)))
    monkeypatch.setattr(prepare.sys, "argv", ["prepare"])
    return calls


def test_a_verb_chooses_configuration_and_function(called):
    from src.embedded import stages

    for verb, name in (("check", "prepare_check"), ("cache", "train"), ("shards", "prepare_shards"), ("speed", "train")):
        prepare.main([verb, "seed=3"])
        assert called.pop() == (name, ["seed=3"], getattr(prepare, verb))
    prepare.main(["backbone=sd21_tiny", "seed=1"])
    assert called.pop() == ("prepare", ["backbone=sd21_tiny", "seed=1"], stages.main)
    prepare.main([])
    assert called.pop() == ("prepare", [], stages.main)


def test_help_lists_the_verbs(called, capsys):
    prepare.main(["--help"])
    printed = capsys.readouterr().out
    assert all(re.search(rf"^  {verb} +\S", printed, re.MULTILINE) for verb in prepare.VERBS)
    assert called.pop()[1] == ["--help"]
    prepare.main(["cache", "--help"])
    assert called.pop()[1] == ["--help", "hydra.help.app_name='python -m src.prepare cache'"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["chek", "data=folder"], "chek is no verb of src.prepare; did you mean check?"),
        (["caches"], "did you mean cache?"),
        (["zzz"], "known: cache, check, probe, shards, speed"),
        (["data=folder", "check"], "the verb comes first: python -m src.prepare check"),
    ],
)
def test_a_wrong_verb_is_refused_in_one_line(argv, says, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main(argv)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: command line: ")
    assert printed.err.count("\n") == 1
    assert says in printed.err


def test_the_command_line_ends_with_1_where_there_are_problems(folder, tmp_path):
    (folder / "03.png").write_bytes(b"")
    done = run_entry("prepare", "check", *words(folder, tmp_path / "runs"))
    assert done.returncode == 1
    assert "03.png: empty, 0 bytes" in done.stdout
    assert done.stderr == ""
    assert (run_folder(done) / "report.json").is_file()


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.path='nowhere' is not a folder"):
        prepare.check(load("prepare_check", words(Path("nowhere"), tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()
