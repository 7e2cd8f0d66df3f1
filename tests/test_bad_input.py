"""Bad files, captions and folders: each is read by a stated rule, or refused in one line with file, value and fix."""

import errno
import json
import os
import pickle
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.data import picture
from src.data.captions import caption_of, decode_text, settle
from src.data.folder import FolderSource
from src.data.pairs import walk
from src.data.picture import header, read_rgb
from src.data.source import BadSample
from src.data.tolerant import tolerant
from src.tasks.pose import Pose
from src.types import UserError
from tests.bad_files import BAD, CAPTIONS, GOOD_FORMS, LONG, ODD, P3, clear, deny, encoded, photo, turned_jpeg, write_cases

SIZE = 32


def folder(path: Path, split: str = "train", val_images: int = 1, **rules) -> FolderSource:
    return FolderSource("folder", str(path), val_images, split, SIZE, **rules)


def pictures(path: Path, count: int = 4, **captions: str) -> Path:
    """`0.png` and so on, each with its caption."""
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(photo(i)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(captions.get(f"c{i}", f"picture {i}"), encoding="utf-8")
    return path


# ---- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BAD, ids=lambda c: c.name)
def test_a_bad_file_is_named_with_its_fault_and_a_fix(case, tmp_path):
    file = tmp_path / case.name
    case.make(file)
    with pytest.raises(BadSample, match=case.said) as caught:
        read_rgb(file, case.name)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{case.name}: ")
    assert caught.value.fix
    assert caught.value.reason in line


@pytest.mark.parametrize("case", ODD, ids=lambda c: c.name)
def test_an_odd_file_is_read_by_a_rule(case, tmp_path):
    source = folder(write_cases(pictures(tmp_path, 1), (case,)), "val")
    assert source.describe(0)[0] == case.name
    image = source[0].image
    assert image.shape == (SIZE, SIZE, 3)
    assert image.std() > 1


@pytest.mark.parametrize("name", GOOD_FORMS)
def test_every_good_form_shows_its_picture(name):
    read = read_rgb(GOOD_FORMS[name](7), name)
    assert read.shape == (48, 64, 3)
    shown, wanted = read[:, 40:].astype(float), photo(7)[:, 40:].astype(float)
    if name in ("gray.png", "gray_alpha.png", "deep_gray.png", "black_white.png", "palette_alpha.png"):
        return  # other colours: compared below, each by its own rule
    assert np.abs(shown - wanted).mean() < (30 if name == "wide_gamut.png" else 12), name


def test_hidden_colours_do_not_show_and_the_background_can_be_chosen():
    for mode, options in (("RGBA", {}), ("LA", {}), ("P", {"transparency": 0})):
        raw = encoded(clear(3, mode), "PNG", **options)
        assert (read_rgb(raw, mode)[:, :32] == 255).all(), mode
        assert (read_rgb(raw, mode, "#102030")[:, :32] == (16, 32, 48)).all(), mode
        assert not (read_rgb(raw, mode)[:, 32:] == 255).all(), mode
    half = np.dstack([np.full((8, 8, 3), 100, np.uint8), np.full((8, 8), 128, np.uint8)])
    assert np.abs(read_rgb(encoded(half, "PNG"), "half").astype(int) - round(100 * 128 / 255 + 255 * 127 / 255)).max() <= 1


def test_deep_pictures_keep_their_range():
    deep = (np.arange(64 * 64, dtype=np.uint32) * 16).reshape(64, 64).astype(np.uint16)
    assert np.array_equal(read_rgb(encoded(deep, "PNG"), "deep")[..., 1], (deep >> 8).astype(np.uint8))
    unit = (np.arange(64 * 64, dtype=np.float32) / 4095).reshape(64, 64)
    assert np.array_equal(read_rgb(encoded(unit, "TIFF"), "unit")[..., 0], np.round(unit * 255).astype(np.uint8))
    assert np.array_equal(read_rgb(encoded(unit * 200, "TIFF"), "255")[..., 0], np.round(unit * 200).astype(np.uint8))


def test_a_wide_gamut_is_converted_as_its_primaries_say():
    raw = GOOD_FORMS["wide_gamut.png"](2)
    srgb = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.7141]])
    linear = (photo(2) / 255.0) ** 2.2 @ np.array(P3) @ np.linalg.inv(srgb)
    linear = np.clip(linear, 0, 1)
    wanted = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    read = read_rgb(raw, "wide")
    assert np.abs(read - wanted).max() < 4
    assert np.abs(read.astype(int) - photo(2)).mean() > 3  # the profile does something


def test_a_broken_profile_is_told_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("src.data.source._noted", set())
    for name in ("a.png", "b.png"):
        raw = encoded(photo(20), "PNG", icc_profile=b"no profile at all" * 20)
        assert np.array_equal(read_rgb(raw, name), photo(20))
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "a.png: its ICC profile cannot be used" in out


def test_ink_is_read_as_light():
    ink = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # cyan
    red, green, blue = read_rgb(encoded(ink, "TIFF"), "ink")[8, 8]
    assert red < 20
    assert min(green, blue) > 230


def test_a_telephone_picture_stands_upright(tmp_path):
    raw = turned_jpeg(photo(1))
    found = header(raw, "turned")
    assert (found.height, found.width) == (48, 64)
    assert np.abs(read_rgb(raw, "turned").astype(int) - photo(1)).mean() < 6
    with_xmp = encoded(photo(1), "PNG", exif=_turned())
    assert (header(with_xmp, "png").height, header(with_xmp, "png").width) == (64, 48)
    assert read_rgb(with_xmp, "png").shape == (64, 48, 3)


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_animations_give_their_first_frame_and_say_so(capsys, monkeypatch):
    monkeypatch.setattr("src.data.source._noted", set())
    for case in ODD[:2]:
        path = Path(case.name)
        read = read_rgb(_made(case), path.name)
        assert np.abs(read.astype(int) - photo(10 if path.suffix == ".gif" else 13)).mean() < 12
    assert re.findall(r"(GIF|WEBP) files of several frames", capsys.readouterr().out) == ["GIF", "WEBP"]


def _made(case) -> bytes:
    caught: list[bytes] = []

    class Sink:
        def write_bytes(self, raw: bytes) -> None:
            caught.append(raw)

    case.make(Sink())
    return caught[0]


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    file = tmp_path / "secret.png"
    file.write_bytes(encoded(photo(0), "PNG"))
    if not deny(file):  # root reads everything
        file.chmod(0o644)

        def refuse(*_args, **_options):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))

        monkeypatch.setattr(picture.Image, "open", refuse)
        monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BadSample, match=r"secret\.png: cannot be opened \(Permission denied\); check its permissions"):
        read_rgb(file, "secret.png")


def test_a_bad_sample_crosses_process_borders():
    bad = BadSample("a/b.jpg", "empty, 0 bytes", "remove it")
    again = pickle.loads(pickle.dumps(bad))
    assert (str(again), again.id, again.reason, again.fix) == (str(bad), bad.id, bad.reason, bad.fix)
    traceback = f"Caught BadSample in DataLoader worker process 0.\nTraceback:\n  x\nsrc.data.source.BadSample: {bad}\n"
    assert str(BadSample(traceback)) == str(bad)


# ---- folders ----------------------------------------------------------------------------------------------------------


def test_unreadable_headers_are_refused_together_when_a_source_is_made(tmp_path):
    write_cases(pictures(tmp_path), BAD)
    with pytest.raises(
        UserError, match=r"of 1\d samples of data\.path=.* cannot be read: .*bomb\.png \(.*on_bad_sample=skip"
    ) as e:
        folder(tmp_path)
    assert "\n" not in str(e.value)


def test_one_unreadable_header_speaks_for_itself(tmp_path):
    (pictures(tmp_path) / "1.png").write_bytes(b"")
    with pytest.raises(BadSample, match=r"1\.png: empty, 0 bytes; download it again"):
        folder(tmp_path)


def test_files_that_share_a_stem_are_refused(tmp_path):
    Image.fromarray(photo(0)).save(pictures(tmp_path) / "2.jpg")
    with pytest.raises(UserError, match=r"2 files share a stem.*2\.jpg, 2\.png"):
        folder(tmp_path)


def test_a_map_for_every_image_and_an_image_for_every_map(tmp_path):
    pictures(tmp_path / "images", 12)
    (tmp_path / "depth").mkdir()
    for name in ("0", "1", "x", "y"):
        Image.fromarray(photo(0)[..., 0]).save(tmp_path / "depth" / f"{name}.png")
    with pytest.raises(
        UserError, match=r"holds 4 maps for 12 images; 10 images have no map there: 10\.png, .*; 2 maps .*x\.png, y"
    ):
        folder(tmp_path / "images", signals={"depth": str(tmp_path / "depth")})
    Image.fromarray(photo(0)).save(tmp_path / "depth" / "x.jpg")
    with pytest.raises(UserError, match=r"2 files share a stem.*x\.jpg, x\.png"):
        folder(tmp_path / "images", signals={"depth": str(tmp_path / "depth")})
    with pytest.raises(UserError, match=r"data\.signals\.depht is not a signal; known: canny, segmentation, depth"):
        folder(tmp_path / "images", signals={"depht": str(tmp_path / "depth")})
    with pytest.raises(UserError, match=r"data\.signals\.depth='nowhere' is not a folder, neither here nor below"):
        folder(tmp_path / "images", signals={"depth": "nowhere"})


def test_a_turned_photo_with_a_map_that_is_not_is_refused(tmp_path):
    pictures(tmp_path / "images", 2)
    (tmp_path / "images" / "0.png").unlink()
    (tmp_path / "images" / "0.jpg").write_bytes(turned_jpeg(photo(0)))
    (tmp_path / "depth").mkdir()
    for i in range(2):
        Image.fromarray(photo(i)[..., 0]).save(tmp_path / "depth" / f"{i}.png")
    assert folder(tmp_path / "images", signals={"depth": str(tmp_path / "depth")})[0].signals["depth"].shape == (SIZE, SIZE)
    Image.fromarray(np.rot90(photo(0)[..., 0])).save(tmp_path / "depth" / "0.png")
    with pytest.raises(
        BadSample, match=r"0\.png: the depth map is 48 x 64 pixels, its image 64 x 48 \(upright\); crop and turn"
    ):
        folder(tmp_path / "images", signals={"depth": str(tmp_path / "depth")})


def test_loops_of_links_end_and_hidden_files_are_passed_over(tmp_path):
    pictures(tmp_path / "a", 2)
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "b").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "a" / "._0.png").write_bytes(b"a resource fork")
    assert [str(p.relative_to(tmp_path)) for p in walk(tmp_path)] == ["a/0.png", "a/0.txt", "a/1.png", "a/1.txt"]
    assert len(folder(tmp_path)) == 1


def test_an_empty_folder_and_too_few_images_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no image .*\.png.*; its files end in \[\]"):
        folder(tmp_path)
    with pytest.raises(UserError, match=r"holds 2 images, and data\.val_images=2 leaves none"):
        folder(pictures(tmp_path, 2), val_images=2)
    with pytest.raises(UserError, match=r"data\.val_images=0"):
        folder(tmp_path, val_images=0)


def test_small_and_misshapen_pictures_follow_the_policy(tmp_path, capsys):
    pictures(tmp_path, 6)
    Image.fromarray(photo(9, 20, 30)).save(tmp_path / "0.png")
    assert len(folder(tmp_path)) == 5
    assert "1 of 5 pictures" in (said := capsys.readouterr().out)
    assert "smaller than their frame and scaled up" in said
    dropped = folder(tmp_path, small_images="drop")
    assert [dropped.describe(i)[0] for i in range(len(dropped))] == ["1.png", "2.png", "3.png", "4.png"]
    assert "1 of 6 pictures" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"smaller than their frame: 0\.png \(30 x 20\); write data\.small_images=upscale or drop"
    ):
        folder(tmp_path, small_images="refuse")
    with pytest.raises(UserError, match=r"5 of 5 pictures .* would lose an edge: 0\.png \(30 x 20\), .*data\.aspect=crop"):
        folder(tmp_path, aspect="refuse")
    buckets = [[24, 32], [64, 64]]
    (tmp_path / "0.png").rename(tmp_path / "9.png")
    (tmp_path / "0.txt").rename(tmp_path / "9.txt")  # the odd one is held out now
    assert folder(tmp_path, aspect="refuse", buckets=buckets).size_of(0) == (24, 32)
    assert folder(tmp_path, "val", aspect="refuse", buckets=buckets).size_of(0) == (SIZE, SIZE)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"matte": "whiet"}, r"data\.matte='whiet' is not a colour"),
        ({"max_bad_share": 1.5}, r"data\.max_bad_share=1\.5 is not a share"),
        ({"buckets": []}, r"data\.buckets=\[\] is empty"),
        ({"buckets": [[64, 30]]}, r"data\.buckets: \[64, 30\] is not \[height, width\] in multiples of 8"),
        ({"buckets": [[64, 64], [64, 64]]}, r"names a size twice"),
    ],
)
def test_rules_that_nothing_can_follow_are_refused(tmp_path, rules, said):
    with pytest.raises(UserError, match=said):
        folder(pictures(tmp_path), **rules)


def test_ten_thousand_files_are_looked_at_in_seconds(tmp_path):
    raw = encoded(photo(0), "JPEG")
    for i in range(10_000):
        file = tmp_path / f"{i % 100:02d}" / f"{i:05d}.jpg"
        if i < 100:
            file.parent.mkdir()
        file.write_bytes(raw)
        file.with_suffix(".txt").write_text(f"picture {i}")
    began = time.perf_counter()
    source = folder(tmp_path, val_images=100)
    source.fingerprint()
    assert len(source) == 9900
    assert time.perf_counter() - began < 30  # 3 s on an idle core


# ---- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "rules", "said"),
    [
        ("m.jsonl", '{"file_name": "0.png", "caption": "x"}', {}, r"caption_column=text: .*its columns are file_name, caption"),
        ("m.csv", "image,text\n0.png,x\n", {}, r"data\.image_column=file_name: .* its columns are image, text"),
        ("m.csv", "file_name,text\n0.png,a, b\n", {}, r"line 2 has not the 2 fields"),
        ("m.csv", "file_name,text\n0.png\n", {}, r"line 2 has not the 2 fields"),
        ("m.csv", 'file_name,text\n0.png,"open\n', {}, r"line \d cannot be read"),
        ("m.csv", "file_name,text,text\n0.png,a,b\n", {}, r"columns text stand twice"),
        ("m.jsonl", '{"file_name": "0.png", "text": "x"}\n{broken', {}, r"line 2 is not JSON"),
        ("m.jsonl", '["0.png", "x"]', {}, r"line 1 is a list; write one object per line"),
        ("m.jsonl", "\n\n", {}, r"holds no row"),
        ("m.jsonl", '{"file_name": "7.png", "text": "x"}', {}, r"1 of 1 files of file_name do not exist: 7\.png"),
        ("m.jsonl", '{"file_name": null, "text": "x"}', {}, r"1 of 1 rows hold no path in file_name: rows 1"),
        ("m.txt", "0.png x", {}, r"ends in '\.txt'; write the table as \.jsonl or \.csv"),
        (
            "m.jsonl",
            '{"file_name": "0.png", "text": "x"}',
            {"signal_columns": {"depth": "d"}},
            r"signal_columns\.depth=d: .*no such",
        ),
    ],
)
def test_a_wrong_table_is_refused_with_what_is_there(tmp_path, name, text, rules, said):
    pictures(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        folder(tmp_path, table=name, **rules)


def test_signal_columns_need_a_table(tmp_path):
    with pytest.raises(UserError, match=r"needs a table to read them from; write data\.table"):
        folder(pictures(tmp_path), signal_columns={"depth": "d"})


# ---- captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [None, float("nan"), "", "  \n", "NaN", "none", "null", 5, 2.5, True, [], [None, ""]])
def test_what_is_no_caption_is_missing(raw, capsys, monkeypatch):
    monkeypatch.setattr("src.data.source._noted", set())
    assert caption_of(raw, "a", 0) is None
    with pytest.raises(UserError, match=r"1 of 2 images of data\.path=x have no caption: a \(.+\); .*missing_caption=empty"):
        settle([raw, "there"], ["a", "b"], "refuse", 0, "data.path=x")
    assert settle([raw, "there"], ["a", "b"], "empty", 0, "data.path=x") == ["", "there"]
    assert "1 of 2 captions of data.path=x are missing" in capsys.readouterr().out


def test_captions_stay_whole_and_in_their_alphabet(tmp_path):
    pictures(tmp_path, len(CAPTIONS))
    for i, caption in enumerate(CAPTIONS):
        (tmp_path / f"{i}.txt").write_bytes(b"\xef\xbb\xbf" + caption.encode())
    (tmp_path / "3.txt").write_text(CAPTIONS[3], encoding="utf-16")
    source = folder(tmp_path)
    read = [source.describe(i)[1] for i in range(len(source))]
    assert read[:5] == list(CAPTIONS[:5])
    assert read[5] == "caf\u00e9 noir"  # NFC
    assert read[6] == LONG
    assert caption_of(CAPTIONS[7], "a", 0) == "crlf\nand more"


def test_one_of_several_captions_is_drawn_by_seed_and_id():
    several = [f"caption {i}" for i in range(5)]
    drawn = [caption_of([None, *several], f"image {i}", 0) for i in range(200)]
    assert {*drawn} == {*several}
    assert drawn == [caption_of([None, *several], f"image {i}", 0) for i in range(200)]
    assert drawn != [caption_of([None, *several], f"image {i}", 1) for i in range(200)]
    assert caption_of(np.array(several, object), "image 0", 0) == caption_of(several, "image 0", 0)


def test_text_in_another_encoding_is_named_with_its_byte(tmp_path):
    with pytest.raises(BadSample, match=r"a\.txt: not UTF-8 text: byte 0xfc at 3; save it as UTF-8"):
        decode_text("grün".encode("latin-1").replace(b"r", b"rx"), "a.txt")
    (pictures(tmp_path) / "1.txt").write_bytes(b"gr\xfcn")
    with pytest.raises(BadSample, match=r"1\.txt: not UTF-8 text: byte 0xfc at 2"):
        folder(tmp_path)
    (tmp_path / "1.txt").write_bytes(b"a\0b")
    with pytest.raises(BadSample, match=r"a zero byte at 1"):
        folder(tmp_path)


def test_captions_elsewhere_or_of_another_ending_are_pointed_at(tmp_path):
    pictures(tmp_path / "images", 3)
    (tmp_path / "captions").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.txt").rename(tmp_path / "captions" / f"{i}.txt")
    with pytest.raises(
        UserError, match=r"2 of 2 .*no caption file of the same name \(\.txt; 3 \.txt files lie elsewhere.* captions/0\.txt"
    ):
        folder(tmp_path)
    for i in range(3):
        (tmp_path / "captions" / f"{i}.txt").rename(tmp_path / "images" / f"{i}.caption")
    with pytest.raises(
        UserError, match=r"no caption file of the same name \(\.txt; 3 files end in '\.caption'\): images/0\.png \(none\)"
    ):
        folder(tmp_path)


def test_only_empty_prompts_work_with_a_line(tmp_path, capsys):
    source = folder(pictures(tmp_path, 3, c0="", c1="", c2=""), missing_caption="empty")
    assert {source.describe(i)[1] for i in range(2)} == {""}
    assert "text has no say in what is learned" in capsys.readouterr().out


# ---- bad samples in a run ---------------------------------------------------------------------------------------------


def half_bad(tmp_path: Path, share: float = 0.5, **rules) -> FolderSource:
    pictures(tmp_path, 12)
    for i in (2, 3, 10):
        (tmp_path / f"{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes()[:-300] if i != 3 else b"")
    return folder(tmp_path, on_bad_sample="skip", max_bad_share=share, **rules)


def test_bad_samples_are_replaced_and_listed(tmp_path):
    source, said = half_bad(tmp_path / "data"), []  # in the order of names: 0, 1, 10, 11, 2, 3, 4, ... without the last, 9
    assert [source.describe(i)[0] for i in (2, 4, 5)] == ["10.png", "2.png", "3.png"]
    whole = tolerant(source, tmp_path, say=said.append)
    assert len(whole) == len(source) == 11
    listed = [json.loads(line) for line in next(tmp_path.glob("skipped-*.jsonl")).read_text().splitlines()]
    assert [(s["id"], s["replaced_by"]) for s in listed] == [("10.png", "11.png"), ("2.png", "4.png"), ("3.png", "4.png")]
    assert all(s["reason"] and s["fix"] for s in listed)
    for bad, good in ((2, 3), (4, 6), (5, 6)):
        assert whole.describe(bad) == source.describe(good)
        assert np.array_equal(whole[bad].image, source[good].image)
        assert whole[bad].caption == source.describe(good)[1]
        assert whole.size_of(bad) == source.size_of(good)
    assert whole.fingerprint() != source.fingerprint()
    assert [line.split(":")[0] for line in said] == ["data.on_bad_sample=skip", said[1].split(":")[0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_replacements_do_not_depend_on_workers_and_are_found_once(tmp_path, workers, monkeypatch):
    source = half_bad(tmp_path / "data", flip=True)
    whole = tolerant(source, tmp_path / str(workers), workers, say=lambda _: None)
    assert whole.replaced == {4: 6, 5: 6, 8: 12, 9: 12, 10: 12, 11: 12}
    assert whole.describe(9)[0] == "4.png"
    monkeypatch.setattr(FolderSource, "__getitem__", lambda *_: pytest.fail("a sample was read again"))
    assert tolerant(source, tmp_path / str(workers), workers, say=lambda _: None).replaced == whole.replaced


def test_the_whole_tree_of_bad_files_goes_through(tmp_path):
    source = folder(write_cases(pictures(tmp_path / "data", 8), (*BAD, *ODD)), on_bad_sample="skip", max_bad_share=0.9)
    whole = tolerant(source, tmp_path, say=lambda _: None)
    listed = [json.loads(line) for line in next(tmp_path.glob("skipped-*.jsonl")).read_text().splitlines()]
    assert {s["id"] for s in listed} == {c.name for c in BAD}
    assert all(whole[i].image.std() > 1 and whole[i].caption for i in range(len(whole)))  # nothing is silently black
    assert {whole.describe(i)[0] for i in range(len(whole))} >= {c.name for c in ODD if c.name != "wide.png"}


def test_a_map_from_which_the_task_makes_nothing_is_a_bad_sample(tmp_path):
    """One person of OpenPose's 18 joints in a set of COCO's 17: its file is whole, and the skeleton is another."""
    pictures(tmp_path / "images", 5)
    (tmp_path / "joints").mkdir()
    for i in range(5):
        people = [[[1.0 + j, 2.0 + j, 2.0] for j in range(18 if i == 1 else 17)]]
        (tmp_path / "joints" / f"{i}.json").write_text(json.dumps({"joints": people}))
    rules = {"on_bad_sample": "skip", "max_bad_share": 0.5, "signals": {"joints": str(tmp_path / "joints")}}
    source, pose = folder(tmp_path / "images", **rules), Pose("pose", "scene_probe", "coco17", 0.3)
    with pytest.raises(UserError, match=r"1\.png: .*18"):
        pose.condition_of(source[1], 0)
    assert tolerant(source, tmp_path, say=lambda _: None).replaced == {}  # a task that reads no joints has them all
    whole = tolerant(source, tmp_path, say=lambda _: None, tasks=[pose])
    assert whole.replaced == {1: 2}
    assert all(pose.condition_of(whole[i], 0).shape == (SIZE, SIZE, 3) for i in range(len(whole)))


def test_what_the_system_would_not_give_is_asked_for_again(tmp_path, monkeypatch):
    """An error of a disk or of a network passes; a broken file stays in the list until it is changed."""
    source = half_bad(tmp_path / "data")
    reads, failing = [], [6]

    def now_and_then(self, index):
        reads.append(index)
        if index in failing:
            try:
                raise OSError(errno.EIO, "Input/output error")
            except OSError as error:
                raise BadSample(f"{index}", "cannot be read now", "look at the disk") from error
        return original(self, index)

    original = FolderSource.__getitem__
    monkeypatch.setattr(FolderSource, "__getitem__", now_and_then)
    assert tolerant(source, tmp_path, say=lambda _: None).replaced == {2: 3, 4: 7, 5: 7, 6: 7}
    reads.clear()
    assert tolerant(source, tmp_path, say=lambda _: None).replaced == {2: 3, 4: 7, 5: 7, 6: 7}
    assert reads == [6]
    failing.clear()
    said = []
    assert tolerant(source, tmp_path, say=said.append).replaced == {2: 3, 4: 6, 5: 6}
    assert said[0] == "1 of 4 bad samples of folder can be read now"
    reads.clear()
    assert tolerant(source, tmp_path, say=said.append).replaced == {2: 3, 4: 6, 5: 6}
    assert reads == []


def test_the_last_bad_sample_is_replaced_by_the_first_good_one(tmp_path):
    pictures(tmp_path / "data", 4)
    (tmp_path / "data" / "2.png").write_bytes(b"")
    source = folder(tmp_path / "data", on_bad_sample="skip", max_bad_share=0.5)
    assert tolerant(source, tmp_path, say=lambda _: None).replaced == {2: 0}


def test_too_many_bad_samples_stop_the_run_with_the_list(tmp_path):
    source = half_bad(tmp_path / "data", share=0.2)
    with pytest.raises(
        UserError, match=r"3 of 11 samples are bad, more than data\.max_bad_share=0\.2: 10\.png .*skipped-.*jsonl"
    ):
        tolerant(source, tmp_path, say=lambda _: None)
    for file in (tmp_path / "data").glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"11 of 11 samples are bad"):
        tolerant(folder(tmp_path / "data", on_bad_sample="skip", max_bad_share=0.2), tmp_path, say=lambda _: None)


def test_raise_is_the_source_itself_and_good_data_keeps_its_key(tmp_path):
    plain = folder(pictures(tmp_path / "data"))
    assert tolerant(plain, tmp_path) is plain
    skipping = tolerant(folder(tmp_path / "data", on_bad_sample="skip"), tmp_path, say=lambda _: None)
    assert skipping.fingerprint() == plain.fingerprint()


def test_a_caption_that_is_no_text_is_a_bad_sample(tmp_path):
    (pictures(tmp_path / "data") / "1.txt").write_bytes(b"gr\xfcn")
    source = folder(tmp_path / "data", on_bad_sample="skip", max_bad_share=0.5)
    whole = tolerant(source, tmp_path, say=lambda _: None)
    assert whole.replaced == {1: 2}
    assert source.probe(1).problems


def test_probe_tells_what_is_wrong_without_decoding(tmp_path):
    write_cases(pictures(tmp_path), (BAD[4], BAD[5]))
    (tmp_path / "0.txt").write_text("")
    source = folder(tmp_path, on_bad_sample="skip", missing_caption="empty")
    found = {source.probe(i).id: source.probe(i) for i in range(len(source))}
    assert found["1.png"].problems == ()
    assert (found["1.png"].size, found["1.png"].kind) == ((48, 64), "PNG RGB")
    assert [p.reason for p in found["0.png"].problems] == ["its caption is missing (empty)"]
    assert found["empty.jpg"].size is None
    assert found["empty.jpg"].problems[0].reason == "empty, 0 bytes"


def test_a_file_that_changed_meanwhile_is_named(tmp_path):
    source = folder(pictures(tmp_path))
    Image.fromarray(photo(0, 30, 80)).save(tmp_path / "0.png")
    with pytest.raises(BadSample, match=r"0\.png: 80 x 30 pixels, where its header said 64 x 48"):
        source[0]
    os.remove(tmp_path / "1.png")
    with pytest.raises(BadSample, match=r"1\.png: cannot be opened \(No such file"):
        source[1]
    with pytest.raises(IndexError):
        source[3]
