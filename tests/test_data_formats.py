"""One data set as folder, table, hub data set and shards; and the geometry that image and signals share."""

import inspect
import io
import json
import os
import pickle
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from src.config import CONF, load
from src.construct import construct
from src.data.check import check_sources
from src.data.folder import FolderSource
from src.data.framing import Framing, same_aspect
from src.data.hub import HubSource
from src.data.records import RecordSource
from src.data.shard_index import braces, scan
from src.data.shards import ShardSource
from src.data.signals import MIRRORED, read_joints, read_map
from src.data.source import BadSample
from src.data.tolerant import tolerant
from src.tasks.degradations import resized
from src.tasks.depth import Depth
from src.types import UserError
from tests.bad_files import (
    CAPTIONS,
    depth_bytes,
    depth_of,
    edges_of,
    encoded,
    good_picture,
    joints_of,
    photo,
    turned_jpeg,
    write_good,
)

COUNT, SIZE = 64, 32
MAPS = {"depth": "depth", "canny": "canny", "joints": "joints"}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write_good(tmp_path_factory.mktemp("good"), COUNT)


def from_folder(good: Path, split: str = "train", val_images: int = 8, **rules) -> FolderSource:
    rules = {"signals": {s: str(good / s) for s in MAPS}, **rules}
    return FolderSource("folder", str(good / "images"), val_images, split, SIZE, **rules)


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return file


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    """The good tree in four shards; depth.png names every depth map, whatever it is."""
    root = tmp_path_factory.mktemp("shards")
    for shard in range(4):
        members = []
        for i in range(shard * 16, shard * 16 + 16):
            stem, suffix, picture = good_picture(i)
            facts = {"id": f"{stem}.{suffix}", "caption": CAPTIONS[i % len(CAPTIONS)]}
            members += [
                (f"{i:05d}.{suffix}", picture),
                (f"{i:05d}.txt", facts["caption"].encode()),
                (f"{i:05d}.json", json.dumps(facts).encode()),
                (f"{i:05d}.depth.png", depth_bytes(i)[0]),
                (f"{i:05d}.canny.png", encoded(edges_of(i), "PNG")),
                (f"{i:05d}.joints.json", json.dumps(joints_of(i)).encode()),
            ]
        write_tar(root / f"{shard:05d}.tar", members)
    return root


def from_shards(
    root: Path, split: str = "train", path: str = "{00000..00003}.tar", val_images: int = 8, **rules
) -> ShardSource:
    rules = {"signals": {"depth": "depth.png", "canny": "canny.png", "joints": "joints.json"}, **rules}
    return ShardSource("shards", str(root / path), val_images, split, SIZE, **rules)


def assert_equal(a: RecordSource, b: RecordSource, ids: bool = True) -> None:
    """The same captions, pixels and signals, bit by bit."""
    assert len(a) == len(b)
    assert a.signals == b.signals
    for i in range(len(a)):
        assert a.describe(i)[1 - ids :] == b.describe(i)[1 - ids :]
        one, other = a[i], b[i]
        assert (one.caption, one.image.shape) == (other.caption, other.image.shape)
        assert np.array_equal(one.image, other.image), one.id
        for signal in a.signals:
            assert one.signals[signal].dtype == other.signals[signal].dtype
            assert np.array_equal(one.signals[signal], other.signals[signal]), (one.id, signal)


# ---- the same data in every form --------------------------------------------------------------------------------------


def test_a_folder_in_every_format_is_read(good):
    source = from_folder(good)
    assert (len(source), len(from_folder(good, "val")), source.signals) == (56, 8, ("canny", "depth", "joints"))
    assert source.describe(1) == ("001_photo.jpg", CAPTIONS[1])
    assert source.describe(5)[1] == "caf\u00e9 noir"
    assert len({source.describe(i)[0] for i in range(len(source))}) == 56
    sample = source[0]
    assert sample.image.shape == (SIZE, SIZE, 3)
    assert (sample.signals["depth"].shape, sample.signals["depth"].dtype) == ((SIZE, SIZE), np.uint16)
    assert sample.signals["depth"].max() > 10_000  # not 255
    assert (sample.signals["canny"].shape, sample.signals["canny"].dtype) == ((SIZE, SIZE), np.uint8)
    assert set(np.unique(sample.signals["canny"])) <= {0, 255}
    assert sample.signals["joints"].shape == (1, 17, 3)
    with pytest.raises(IndexError):
        source[56]


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_hold_the_same_samples_as_the_folder(good, tars, split):
    assert_equal(from_folder(good, split), from_shards(tars, split))


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_table_names_the_same_samples(good, tmp_path, form):
    rows = []
    for i in range(COUNT):
        stem, suffix, _ = good_picture(i)
        maps = {s: str(next((good / s).glob(f"{stem}.*"))) for s in MAPS}
        rows.append({"text": CAPTIONS[i % len(CAPTIONS)], "file_name": f"{stem}.{suffix}", **maps})
    if form == "jsonl":
        text = "\ufeff" + "\n".join(json.dumps(r) for r in rows)
    else:
        text = "\ufeff" + "\r\n".join([",".join(rows[0]), *(",".join(f'"{v}"' for v in r.values()) for r in rows)])
    (tmp_path / f"table.{form}").write_bytes(text.encode())
    columns = {s: s for s in MAPS}
    table = str(tmp_path / f"table.{form}")
    rules = {"table": table, "signals": None, "signal_columns": columns}
    with pytest.raises(UserError, match=r"row 1: depth=.* write data\.allow_outside=true"):  # they lie beside the images
        from_folder(good, "val", **rules)
    assert_equal(from_folder(good, "val"), from_folder(good, "val", **rules, allow_outside=True))


def test_an_image_with_several_captions_is_several_records(good, tmp_path):
    stem, suffix, _ = good_picture(0)
    rows = [{"file_name": f"{stem}.{suffix}", "text": f"caption {i}"} for i in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    source = from_folder(good, val_images=1, table=str(tmp_path / "t.jsonl"))
    assert [source.describe(i) for i in range(2)] == [(f"{stem}.{suffix}", "caption 0"), (f"{stem}.{suffix}#2", "caption 1")]
    assert np.array_equal(source[0].signals["depth"], source[1].signals["depth"])  # partners of a table are found by stem


# ---- hub --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The library with its cache in a folder of the test, on a machine without a network."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", False)

    def refuse(*_args, **_options):
        raise AssertionError("a local data set went to the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return library


def from_hub(path: Path, split: str = "train", val_images: int = 8, **rules):
    rules = {"signal_columns": {s: s for s in MAPS}, **rules}
    return HubSource("hub", str(path), val_images, split, SIZE, **rules)


def hub_rows() -> dict:
    """The good tree as columns: pictures and maps with their bytes inside, joints as lists."""
    names = [f"{stem}.{suffix}" for stem, suffix, _ in map(good_picture, range(COUNT))]
    return {
        "image": [{"bytes": good_picture(i)[2], "path": names[i]} for i in range(COUNT)],
        "text": [CAPTIONS[i % len(CAPTIONS)] for i in range(COUNT)],
        "depth": [{"bytes": depth_bytes(i)[0], "path": None} for i in range(COUNT)],
        "canny": [{"bytes": encoded(edges_of(i), "PNG"), "path": None} for i in range(COUNT)],
        "joints": [joints_of(i) for i in range(COUNT)],
    }


def as_dataset(library, rows: dict):
    made = library.Dataset.from_dict(rows)
    for name in ("image", "depth", "canny"):
        made = made.cast_column(name, library.Image(decode=False))
    return made


@pytest.mark.parametrize("form", ["saved", "splits", "parquet", "parquet folder"])
def test_a_local_data_set_holds_the_same_samples_as_the_folder(good, tmp_path, datasets, form):
    made, place = as_dataset(datasets, hub_rows()), tmp_path / "made"
    if form == "saved":
        made.save_to_disk(place)
    elif form == "splits":
        datasets.DatasetDict({"train": made, "test": made.select(range(9))}).save_to_disk(place)
        assert len(from_hub(place, hub_split="test")) == 1
        with pytest.raises(UserError, match=r"data\.hub_split=tst: .* its splits are train, test"):
            from_hub(place, hub_split="tst")
    elif form == "parquet":
        place = tmp_path / "made.parquet"
        made.to_parquet(place)
    else:
        place.mkdir()
        for part in range(2):
            made.select(range(32 * part, 32 * part + 32)).to_parquet(place / f"train-{part:05d}-of-00002.parquet")
    assert_equal(from_folder(good, "val"), from_hub(place, "val"), ids=False)  # the library may keep the last part of a name
    source = from_hub(place)
    assert source.fingerprint() == from_hub(place).fingerprint() != from_hub(place, "val").fingerprint()
    assert np.array_equal(pickle.loads(pickle.dumps(source))[3].image, source[3].image)


def test_an_image_folder_of_the_library_and_paths_in_a_column(good, tmp_path, datasets):
    place = tmp_path / "place"
    place.mkdir()
    rows = []
    for i in range(6):
        (place / f"{i}.png").write_bytes(encoded(photo(i), "PNG"))
        rows.append({"file_name": f"{i}.png", "text": f"picture {i}", "depth": f"maps/{i}.png"})
    (place / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    source = from_hub(place, val_images=2, signal_columns=None)
    assert [source.describe(i) for i in range(4)] == [(f"{i}.png", f"picture {i}") for i in range(4)]
    (place / "maps").mkdir()
    for i in range(6):
        (place / "maps" / f"{i}.png").write_bytes(encoded(depth_of(i).astype(np.uint16), "PNG"))
    table = datasets.Dataset.from_list([{**r, "file_name": str(place / r["file_name"])} for r in rows])
    table.to_parquet(place / "table.parquet")
    paths = from_hub(place / "table.parquet", val_images=2, image_column="file_name", signal_columns={"depth": "depth"})
    assert np.array_equal(paths[1].image, source[1].image)
    assert paths[1].signals["depth"].max() > 1000
    before = paths.fingerprint()
    os.utime(place / "maps" / "0.png", ns=(1, 1))
    assert (
        from_hub(place / "table.parquet", val_images=2, image_column="file_name", signal_columns={"depth": "depth"}) is not None
    )
    assert paths.fingerprint() != before
    (place / "maps" / "2.png").unlink()
    with pytest.raises(BadSample, match=r"2\.png \(depth\): 'maps/2\.png' is no file, neither here nor below"):
        from_hub(place / "table.parquet", val_images=2, image_column="file_name", signal_columns={"depth": "depth"})


def test_wrong_columns_list_those_that_are_there(tmp_path, datasets):
    as_dataset(datasets, {k: v[:12] for k, v in hub_rows().items()}).save_to_disk(tmp_path / "made")
    for rules, key in (
        ({"image_column": "picture"}, "image_column=picture"),
        ({"caption_column": "caption"}, "caption_column=caption"),
        ({"signal_columns": {"depth": "d"}}, r"signal_columns\.depth=d"),
    ):
        with pytest.raises(UserError, match=rf"data\.{key}: .* its columns are image, text, depth, canny, joints"):
            from_hub(tmp_path / "made", **rules)
    with pytest.raises(UserError, match="neither a picture nor a path"):
        from_hub(tmp_path / "made", image_column="joints")
    bare = {k: v[:16] for k, v in hub_rows().items()} | {"text": [None] * 16}
    as_dataset(datasets, bare).save_to_disk(tmp_path / "bare")
    with pytest.raises(UserError, match=r"8 of 8 images of data\.path=.* have no caption: 000_rgb\.png \(none\)"):
        from_hub(tmp_path / "bare")


def test_what_is_not_there_is_refused_with_the_remedy(tmp_path, datasets, monkeypatch):
    with pytest.raises(UserError, match="is not here, and is not a hub id of the form owner/name"):
        from_hub(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be read as a data set"):
        from_hub(tmp_path / "empty")
    with pytest.raises(UserError, match=r"data\.revision=main: .* is on this machine"):
        from_hub(tmp_path / "empty", revision="main")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"the hub is switched off \(HF_HUB_OFFLINE\) and no copy is in the local cache"):
        from_hub("owner/name")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gated", r"accept the terms on https://huggingface\.co/datasets/owner/name and run `hf auth login`"),
        ("missing", r"not on the hub, or private; check its name"),
        ("revision", r"write a branch or a commit in data\.revision"),
        ("network", r"the hub cannot be reached; check the network, set HF_HUB_OFFLINE=1"),
        ("script", r"it is a loading script, which is not run; use a parquet copy"),
        ("split", r"Unknown split .*; write one of these in data\.hub_split"),
    ],
)
def test_every_failure_of_the_hub_is_one_line(datasets, monkeypatch, kind, said):
    import httpx
    from huggingface_hub import HfApi, errors

    def fail(*_args, **_options):
        answer = httpx.Response(401, request=httpx.Request("GET", "https://hub.test"))
        raise {
            "gated": errors.GatedRepoError("401 Client Error. Access to it is restricted", response=answer),
            "missing": errors.RepositoryNotFoundError("401 Client Error. Repository Not Found", response=answer),
            "revision": errors.RevisionNotFoundError("404 Client Error. Revision Not Found", response=answer),
            "network": httpx.ConnectError("[Errno -2] Name or service not known"),
            "script": RuntimeError("Dataset scripts are no longer supported, but found name.py"),
            "split": ValueError("Unknown split \"trian\". Should be one of ['train']."),
        }[kind]

    monkeypatch.setattr(HfApi, "dataset_info", fail)
    with pytest.raises(UserError, match=said) as caught:
        from_hub("owner/name")
    assert "\n" not in str(caught.value)


def test_a_hub_id_asks_for_its_revision(datasets, monkeypatch, good):
    from huggingface_hub import HfApi

    asked = []
    monkeypatch.setattr(HfApi, "dataset_info", lambda _self, path, revision, timeout: asked.append((path, revision)))
    made = as_dataset(datasets, hub_rows())
    monkeypatch.setattr(datasets, "load_dataset", lambda path, revision, split: asked.append((path, revision, split)) or made)
    assert len(from_hub("owner/name", revision="abc", hub_split="all")) == 56
    assert asked == [("owner/name", "abc"), ("owner/name", "abc", "all")]


# ---- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "*.tar", "{00000,00001,00002,00003}.tar", "0000{0..3}.tar"])
def test_every_way_to_name_shards_is_the_same_data(tars, path):
    source = from_shards(tars, path=path)
    assert source.fingerprint() == from_shards(tars).fingerprint()
    assert source.describe(17) == from_shards(tars).describe(17)


def test_braces_are_written_out():
    assert list(braces("a{08..11}.tar")) == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert list(braces("{x,y}/{0..1}")) == ["x/0", "x/1", "y/0", "y/1"]


def test_an_index_is_kept_until_its_shard_changes(tars, tmp_path, monkeypatch):
    for file in tars.glob("0000[01].tar"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    first = from_shards(tmp_path, path="*.tar")
    assert {p.name for p in tmp_path.glob("*.json")} == {"00000.tar.index.json", "00001.tar.index.json"}
    scans = []
    monkeypatch.setattr("src.data.shard_index.scan", lambda file: scans.append(file.name) or scan(file))
    again = from_shards(tmp_path, path="*.tar")
    assert again.fingerprint() == first.fingerprint()
    assert scans == []
    os.utime(tmp_path / "00001.tar", ns=(1, 1))
    assert from_shards(tmp_path, path="*.tar").fingerprint() != first.fingerprint()
    (tmp_path / "00000.tar.index.json").write_text('{"stamp": [1')
    from_shards(tmp_path, path="*.tar")
    assert scans == ["00001.tar", "00000.tar"]


def test_an_index_that_cannot_lie_beside_its_shard_goes_elsewhere(tars, tmp_path, monkeypatch, capsys):
    for kind, count in (("beside", 0), ("nowhere", 1)):
        (tmp_path / kind).mkdir()
        file = tmp_path / kind / "0.tar"
        file.write_bytes((tars / "00000.tar").read_bytes())
        replace = os.replace

        def refuse(source, target, kind=kind, replace=replace):
            if kind == "nowhere" or Path(target).parent.name == "beside":
                raise PermissionError(13, "Permission denied", str(target))
            replace(source, target)

        monkeypatch.setattr(os, "replace", refuse)
        assert len(from_shards(tmp_path / kind, path="0.tar", index_dir=str(tmp_path / "index"))) == 8
        monkeypatch.setattr(os, "replace", replace)
        assert not list((tmp_path / kind).glob("*.json"))
        assert capsys.readouterr().out.count("it is made at every start") == count
    assert len(list((tmp_path / "index").glob("0-*.index.json"))) == 1


def test_workers_and_pickles_read_the_same(tars):
    source = from_shards(tars, flip=True)
    rows = list(range(0, len(source), 3))
    alone = [source[i] for i in rows]
    many = list(DataLoader(source, sampler=rows, batch_size=None, num_workers=2))
    spawned = pickle.loads(pickle.dumps(source))
    assert spawned.records._open == {}
    for i, one, other in zip(rows, alone, many, strict=True):
        third = spawned[i]
        assert one.id == other.id == third.id == source.describe(i)[0]
        assert np.array_equal(one.image, np.asarray(other.image))
        assert np.array_equal(one.image, third.image)
        assert all(np.array_equal(one.signals[s], np.asarray(other.signals[s])) for s in source.signals)


def test_arrays_are_measured_once_and_by_their_header(tmp_path, monkeypatch):
    members = []
    for i in range(3):
        people = io.BytesIO()
        np.save(people, np.array(joints_of(i)))
        members += [(f"{i}.png", encoded(photo(i), "PNG")), (f"{i}.txt", b"a"), (f"{i}.depth.npy", depth_bytes(2)[0])]
        members.append((f"{i}.joints.npy", people.getvalue()))
    write_tar(tmp_path / "x.tar", members)
    maps = {"depth": "depth.npy", "joints": "joints.npy"}
    first = ShardSource("shards", str(tmp_path), 1, "train", SIZE, signals=maps)
    assert first.records.shards[0].headers[0]["depth.npy"] == [48, 64, "NPY"]
    monkeypatch.setattr("src.data.signals.npy_size", lambda *_: pytest.fail("a header was read again"))
    again = ShardSource("shards", str(tmp_path), 1, "train", SIZE, signals=maps)
    assert np.array_equal(again[0].signals["depth"], first[0].signals["depth"])
    turned = io.BytesIO()
    np.save(turned, depth_of(2).T)
    write_tar(tmp_path / "x.tar", [*members[:2], ("0.depth.npy", turned.getvalue()), *members[3:]])
    monkeypatch.undo()
    with pytest.raises(BadSample, match=r"0\.depth\.npy: the depth map is 48 x 64 pixels, its image 64 x 48"):
        ShardSource("shards", str(tmp_path), 1, "train", SIZE, signals=maps)


def test_names_may_begin_anew_in_each_shard(tmp_path):
    for shard in "ab":
        members = [(f"./{i}.PNG", encoded(photo(i), "PNG")) for i in range(3)]
        write_tar(tmp_path / f"{shard}.tar", [*members, *((f"./{i}.txt", b"a picture") for i in range(3)), ("README", b"x")])
    source = ShardSource("shards", str(tmp_path), 1, "train", SIZE)
    assert [source.describe(i)[0] for i in range(5)] == ["a/0", "a/1", "a/2", "b/0", "b/1"]


def test_captions_from_a_json_key(tars):
    by_key = from_shards(tars, caption="json:caption")
    assert [by_key.describe(i) for i in range(9)] == [from_shards(tars).describe(i) for i in range(9)]
    with pytest.raises(UserError, match=r"data\.caption=json:text: no such key .*; their keys are id, caption"):
        from_shards(tars, caption="json:text")
    with pytest.raises(UserError, match=r"data\.caption=json: write txt, or json:<key>"):
        from_shards(tars, caption="json")
    with pytest.raises(UserError, match=r"data\.caption=cap: 64 of 64 samples have no such member: .*their suffixes are .*txt"):
        from_shards(tars, caption="cap")


PNG = encoded(photo(0), "PNG")
WHOLE = [("0.png", PNG), ("0.txt", b"a"), ("1.png", PNG), ("1.txt", b"b")]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([*WHOLE, ("../2.png", PNG)], r"the member '\.\./2\.png' leaves its folder"),
        ([*WHOLE, ("/etc/2.png", PNG)], r"the member '/etc/2\.png' leaves its folder"),
        ([*WHOLE, ("1.png", PNG)], r"the member '1\.png' stands twice"),
        (
            [*WHOLE, ("0.jpg", PNG)],
            r"x\.tar: 0: holds png, txt, jpg: 2 pictures, where one is wanted; name the one that is meant",
        ),
        ([("0.txt", b"a"), *WHOLE[2:]], r"^[^ ]+x\.tar: 0: holds txt: 0 pictures, where one is wanted; write one picture per"),
        ([("0.txt", b"a"), ("1.txt", b"b")], r"2 of 2 samples are without their picture, such as .*0: holds txt: 0 pictures"),
        ([], r"holds no sample in 1 tar files"),
    ],
)
def test_a_shard_that_cannot_be_meant_is_refused(tmp_path, members, said):
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=said):
        ShardSource("shards", str(tmp_path / "x.tar"), 1, "train", SIZE)


def test_links_sparse_sizes_and_cut_ends_are_refused(tmp_path):
    file = write_tar(tmp_path / "x.tar", WHOLE)
    whole = file.read_bytes()
    end = 2 * (512 + -(-len(PNG) // 512) * 512) + 2 * 1024

    def refused(raw: bytes, said: str) -> None:
        file.write_bytes(raw)
        with pytest.raises(UserError, match=said):
            ShardSource("shards", str(file), 1, "train", SIZE)

    refused(whole[:end], rf"is cut or damaged at byte {end} of {end}")
    refused(whole[: end - 700], r"no whole tar file|ends behind the end of the file|is cut or damaged")
    refused(whole[: end - 1024] + b"x" * 2048, r"is cut or damaged")
    refused(b"\x1f\x8b" + whole, r"is compressed, and cannot be read at random; unpack it with gunzip")
    refused(b"no tar at all" * 100, r"is no whole tar file")
    with tarfile.open(file, "w") as tar:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    refused(file.read_bytes(), r"the member '0\.png' is no plain file, but a link or a device")
    huge = tarfile.TarInfo("0.png")
    huge.size = 10**12
    refused(huge.tobuf() + bytes(1024), r"claims 1000000000000 bytes, more than 512 MiB|no whole tar")
    with pytest.raises(UserError, match=r"2 of 2 shards do not exist: .*a\.tar, .*b\.tar"):
        ShardSource("shards", str(tmp_path / "{a,b}.tar"), 1, "train", SIZE)
    with pytest.raises(UserError, match="matches no file"):
        ShardSource("shards", str(tmp_path / "y*.tar"), 1, "train", SIZE)


def test_a_bad_picture_in_a_shard_is_named(tmp_path):
    members = [("0.png", b"<html>"), ("0.txt", b"a"), *((n.replace("0", "2"), b) for n, b in WHOLE[:2]), *WHOLE[2:]]
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(BadSample, match=r"x\.tar: 0\.png: a web page, not a picture"):
        ShardSource("shards", str(tmp_path / "x.tar"), 1, "train", SIZE)
    skipping = ShardSource("shards", str(tmp_path / "x.tar"), 1, "train", SIZE, on_bad_sample="skip")
    assert skipping.probe(0).problems
    assert skipping[1].image.shape == (SIZE, SIZE, 3)


def test_a_sample_without_its_picture_or_its_map_is_a_bad_one(tmp_path):
    depth = depth_bytes(0)[0]
    members = [m for i in range(8) for m in ((f"{i}.png", PNG), (f"{i}.txt", b"a"), (f"{i}.depth.tif", depth))]
    file = write_tar(tmp_path / "x.tar", [m for m in members if m[0] not in ("1.png", "3.depth.tif")])

    def source(on_bad: str, **more) -> ShardSource:
        rules = {"signals": {"depth": "depth.tif"}, "on_bad_sample": on_bad, "max_bad_share": 0.5, **more}
        return ShardSource("shards", str(file), 2, "train", SIZE, **rules)

    with pytest.raises(
        UserError, match=r"2 of 6 samples of .* cannot be read: .*x\.tar: 1 \(holds .*3\.depth\.tif \(no such"
    ) as e:
        source("raise")
    assert "\n" not in str(e.value)
    skipping = source("skip")
    assert [len(skipping.probe(i).problems) for i in range(6)] == [0, 1, 0, 1, 0, 0]
    whole = tolerant(skipping, tmp_path, say=lambda _: None)
    assert whole.replaced == {1: 2, 3: 4}
    assert whole[3].signals["depth"].shape == (SIZE, SIZE)
    problems = check_sources({"train": skipping}, None, 0, 0, None, "distance")["problems"]
    assert [(f["kind"], f["id"].rpartition("x.tar: ")[2]) for f in problems] == [
        ("unreadable", "1"),
        ("unreadable", "3.depth.tif"),
    ]
    with pytest.raises(UserError, match=r"data\.signals\.canny=edges\.png: 8 of 8 samples have no such member"):
        source("skip", signals={"canny": "edges.png"})
    with pytest.raises(UserError, match=r"8 of 8 samples are without their picture, such as .*: webp, where one is wanted"):
        source("skip", image="webp")


@pytest.mark.parametrize("make", [ShardSource, FolderSource, HubSource])
@pytest.mark.parametrize("url", ["s3://b/x.tar", "https://example.org/{00000..00009}.tar", "hf://datasets/owner/name"])
def test_a_url_is_no_path(make, url):
    with pytest.raises(UserError, match=r"data\.path='[a-z0-9]+://.* is a URL, and URLs are not read; download it, or mount"):
        make("any", url, 1, "train", SIZE)


def test_urls_in_a_table_are_named_as_such(tmp_path):
    rows = [{"file_name": f"https://example.org/{i}.png", "text": "a"} for i in range(3)]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"3 of 3 files of file_name do not exist: https://.*; URLs are not read: download"):
        FolderSource("folder", str(tmp_path), 1, "train", SIZE, table="table.jsonl")
    with pytest.raises(UserError, match=r"data\.table='https://.*' is a URL, and URLs are not read"):
        FolderSource("folder", str(tmp_path), 1, "train", SIZE, table="https://example.org/table.jsonl")


# ---- geometry ---------------------------------------------------------------------------------------------------------


def board(height: int, width: int, cell: int) -> np.ndarray:
    """(height, width) uint8 checkerboard with one bright corner, so that no turn and no mirror image equals it."""
    rows, columns = np.mgrid[:height, :width] // cell
    made = ((rows + columns) % 2 * 200).astype(np.uint8)
    made[: height // 3, : width // 3] = np.maximum(made[: height // 3, : width // 3], 120)
    return made


@pytest.fixture
def boards(tmp_path) -> Path:
    """Pictures that are their own maps: a checkerboard as image, depth, edges, and partner of a quarter size."""
    for name in ("images", "depth", "canny", "low_resolution", "joints"):
        (tmp_path / name).mkdir()
    for i, (height, width) in enumerate(((96, 160), (160, 96), (128, 128), (64, 128))):
        gray = board(height, width, 16)
        quarter = gray.reshape(height // 4, 4, width // 4, 4).mean((1, 3)).astype(np.uint8)
        Image.fromarray(np.repeat(gray[..., None], 3, 2)).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text("a board")
        Image.fromarray(gray.astype(np.uint16) * 100).save(tmp_path / "depth" / f"{i}.png")
        Image.fromarray(gray).save(tmp_path / "canny" / f"{i}.png")
        Image.fromarray(np.repeat(quarter[..., None], 3, 2)).save(tmp_path / "low_resolution" / f"{i}.png")
        corner = np.zeros((1, 17, 3))
        corner[..., :2] = (width / 3, height / 3)
        corner[0, 1, :2], corner[0, 2, :2] = (width / 4, height / 2), (width / 2, height / 2)
        np.save(tmp_path / "joints" / f"{i}.npy", corner)
    (tmp_path / "images" / "9.png").write_bytes(encoded(board(64, 64, 16), "PNG"))
    (tmp_path / "images" / "9.txt").write_text("held out")
    for name in ("depth", "canny", "low_resolution"):
        (tmp_path / name / "9.png").write_bytes(encoded(board(64, 64, 16), "PNG"))
    (tmp_path / "joints" / "9.json").write_text("[]")
    return tmp_path


@pytest.mark.parametrize("buckets", [None, [[64, 64], [48, 80], [80, 48], [40, 80]]], ids=["square", "buckets"])
@pytest.mark.parametrize("flip", [False, True], ids=["plain", "flip"])
@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("resolution", [32, 64, 160])
def test_image_and_signals_move_together(boards, resolution, crop, flip, buckets):
    maps = {s: str(boards / s) for s in ("depth", "canny", "low_resolution", "joints")}
    source = FolderSource(
        "b", str(boards / "images"), 1, "train", resolution, crop=crop, flip=flip, buckets=buckets, signals=maps
    )
    assert len(source) == 4 * (1 + flip)
    for i in range(len(source)):
        sample = source[i]
        gray = sample.image[..., 0].astype(float)
        assert sample.image.shape[:2] == source.size_of(i)
        small = sample.signals["low_resolution"]
        same = resized(sample.image, small.shape[:2], "area")  # it keeps its scale, so it is compared at that
        for name, values, wanted in (
            ("depth", sample.signals["depth"] / 100, gray),
            ("canny", sample.signals["canny"].astype(float), gray),
            ("low_resolution", small[..., 0].astype(float), same[..., 0].astype(float)),
        ):
            assert values.shape == wanted.shape, name
            # a shift by one cell would turn the board over: what differs are the borders between its cells
            assert (np.abs(values - wanted) > 60).mean() < 0.3, (i, name)
            if wanted.std() > 40:
                assert np.corrcoef(values.ravel(), wanted.ravel())[0, 1] > 0.85, (i, name)
        if flip and i % 2:
            twin = source[i - 1]
            assert sample.id == f"{twin.id}~flip"
            assert np.array_equal(sample.image, twin.image[:, ::-1])
            assert all(
                np.array_equal(sample.signals[s], twin.signals[s][:, ::-1]) for s in ("depth", "canny", "low_resolution")
            )


def test_joints_follow_the_picture(boards):
    maps = {"joints": str(boards / "joints")}
    source = FolderSource("b", str(boards / "images"), 1, "train", 48, flip=True, signals=maps)
    plain, twin = source[0].signals["joints"], source[1].signals["joints"]  # 160 x 96: scaled by 1/2, 16 columns cut left
    assert np.allclose(plain[0, 0], (160 / 3 / 2 - 16, 96 / 3 / 2, 0), atol=1e-4)
    assert np.allclose(plain[0, 1, :2], (160 / 4 / 2 - 16, 24), atol=1e-4)
    assert np.allclose(twin[0, 2, :2], (48 - plain[0, 1, 0], plain[0, 1, 1]), atol=1e-4)  # the right eye is now the left one
    assert np.allclose(twin[0, 1, :2], (48 - plain[0, 2, 0], plain[0, 2, 1]), atol=1e-4)
    assert np.allclose(twin[0, 0, 0], 48 - plain[0, 0, 0], atol=1e-4)


def test_mirrored_layouts_change_every_side_once():
    for count, pairs in MIRRORED.items():
        touched = [i for pair in pairs for i in pair]
        assert len(touched) == len(set(touched))
        assert max(touched) < count
    assert {i for p in MIRRORED[17] for i in p} == set(range(1, 17))  # all but the nose
    assert {i for p in MIRRORED[18] for i in p} == set(range(2, 18))  # all but nose and neck
    from src.data.scenes import JOINTS

    for a, b in MIRRORED[14]:
        assert JOINTS[a].replace("right_", "") == JOINTS[b].replace("left_", "")


def test_random_crops_are_drawn_by_seed_and_id(good):
    whole = {s: [from_folder(good, crop="random", crop_seed=s)[i].image for i in range(12)] for s in (0, 1)}
    again = [from_folder(good, crop="random", crop_seed=0)[i].image for i in reversed(range(12))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(whole[0], again, strict=True))
    assert sum(np.array_equal(a, b) for a, b in zip(whole[0], whole[1], strict=True)) < 6
    held = [from_folder(good, "val", crop=c)[2].image for c in ("center", "random")]
    assert np.array_equal(*held)
    offsets = {Framing(32, "random", 0, None).frame((32, 40), f"{i}").left for i in range(300)}
    assert offsets == set(range(9))


def test_each_picture_takes_the_bucket_of_its_shape():
    framing = Framing(64, "center", 0, ((64, 64), (48, 80), (80, 48)))
    shapes = {(100, 100): (64, 64), (90, 160): (48, 80), (400, 300): (80, 48), (300, 400): (48, 80), (10, 9): (64, 64)}
    assert {shape: framing.target(shape) for shape in shapes} == shapes
    assert framing.target((500, 300)) == (80, 48)
    assert Framing(64, "center", 0, ((40, 80), (80, 40))).target((64, 64)) == (40, 80)  # the first of equals
    frame = framing.frame((90, 160), "x")
    assert (frame.scaled, frame.top, frame.left) == ((48, 85), 0, 2)


def test_shapes_that_differ_by_rounding_are_one():
    assert same_aspect((97, 130), (24, 32))
    assert same_aspect((512, 512), (128, 128))
    assert not same_aspect((48, 64), (64, 48))
    assert not same_aspect((512, 512), (500, 512))


# ---- signals ----------------------------------------------------------------------------------------------------------


def test_depth_is_read_at_full_range_from_every_file():
    for i in range(3):
        raw, _ = depth_bytes(i)
        read = read_map("depth", raw, "d")
        assert read.dtype == (np.uint16 if i == 0 else np.float32)
        assert np.array_equal(read, depth_of(i))
    rgb = np.repeat((depth_of(0) / 100).astype(np.uint8)[..., None], 3, 2)
    assert np.array_equal(read_map("depth", encoded(rgb, "PNG"), "d"), rgb[..., 0])
    holes = np.array([[np.nan, 1.0], [np.inf, 7.0]] * 2, np.float32).repeat(4, 1)
    stream = io.BytesIO()
    np.save(stream, holes)
    assert set(np.unique(read_map("depth", stream.getvalue(), "d"))) == {0.0, 1.0, 7.0}
    assert np.array_equal(read_map("depth", turned_jpeg(photo(0)[..., 0]), "d").shape, (48, 64))


@pytest.mark.parametrize(
    ("signal", "raw", "said"),
    [
        ("depth", encoded(photo(0), "PNG"), r"a coloured picture \(RGB\) where depth is expected; write one channel of 8, 16"),
        ("segmentation", encoded(photo(0), "PNG"), r"a coloured picture \(RGB\) where segmentation is expected"),
        ("depth", b"\x93NUMPY\x01\x00", r"not a whole \.npy file"),
        ("depth", encoded(np.full((8, 8), np.nan, np.float32), "TIFF"), r"a depth map without one finite value"),
        ("canny", b"", r"empty, 0 bytes"),
        ("joints", b"{}", r"no list of joints"),
        ("joints", b"[[[1, 2, 3]]]", r"joints of shape \(1, 1, 3\); write .* with 14, 17, 18 joints a person"),
        ("joints", b"not json", r"not JSON"),
        ("joints", json.dumps([[[float("nan")] * 3] * 17]).encode(), r"joints that are not finite; write 0, 0, 0"),
    ],
)
def test_a_bad_map_is_named_with_a_fix(signal, raw, said):
    with pytest.raises(BadSample, match=rf"x: {said}"):
        read_map(signal, raw, "x")


@pytest.mark.parametrize("side", [16, 32, 80])
def test_a_finished_depth_map_is_the_same_picture_in_every_number_type(tmp_path, side):
    task, ramp = Depth("depth", "scene_probe", "auto", "map"), np.linspace(0.02, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    forms = {
        "8.png": np.round(255 * ramp).astype(np.uint8),
        "16.png": np.round(65535 * ramp).astype(np.uint16),
        "16.tif": np.round(65535 * ramp).astype(np.uint16),
        "1.tif": ramp,
        "255.tif": 255 * ramp,
    }
    made = {}
    for name, values in forms.items():
        Image.fromarray(values).save(tmp_path / name)
        read = Framing(side, "center", 0, None).frame((32, 32), name).signal("depth", read_map("depth", tmp_path / name, name))
        made[name] = task.measured(read, name)
        assert np.abs(made[name] - made["8.png"]).max() < 0.006, name
    dark = np.full((8, 8), 200, np.uint16)
    np.save(tmp_path / "dark.npy", dark.astype(">u2"))
    read = read_map("depth", tmp_path / "dark.npy", "dark")
    assert task.measured(read, "dark").max() == np.float32(200 / 65535), "the type decides, and no picture's own range"
    for bad, said in (
        (dark.astype(np.int32) * 9, r"float32 values of 1800\.\.1800"),
        (ramp - 1, r"float32 values of -0\.98\.\.0"),
    ):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(UserError, match=rf"^bad: its depth, read as a finished map, has {said}, neither .*; scale them to"):
            task.measured(read_map("depth", tmp_path / "bad.npy", "bad"), "bad")


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
@pytest.mark.parametrize("size", [(480, 640), (64, 80), (24, 32), (70, 67)])
def test_a_hole_in_a_depth_map_leaves_no_rim(size, dtype):
    rows, columns = np.mgrid[: size[0], : size[1]]
    depth = np.where(columns < size[1] / 2, 5, 7).astype(dtype)
    hole = np.hypot(rows - size[0] / 2, columns - 0.35 * size[1]) < 0.11 * size[0]
    frame = Framing(64, "center", 0, None).frame(size, "x")
    whole, made = (frame.signal("depth", np.where(gone, 0, depth).astype(dtype)) for gone in (False, hole))
    assert made.dtype == dtype
    share = frame.apply(np.where(hole, 0, 1).astype(np.float32), "depth" if size == (64, 80) else "picture")
    assert 0.02 < (made == 0).mean() < 0.1, "the hole is there"
    kept = made > 0
    assert np.allclose(made[kept], whole[kept], atol=1e-4), "and nothing else has changed"
    assert kept[share > 0.6].all()
    assert not kept[share < 0.4].any()


def test_a_map_with_holes_is_scaled_by_what_was_measured(tmp_path):
    depth = np.full((128, 128), 5, np.float32)
    depth[40:61, 40:61] = np.nan
    depth[0, 0] = 3
    Image.fromarray(depth).save(tmp_path / "d.tif")
    read = read_map("depth", tmp_path / "d.tif", "d")
    for side in (48, 200):
        made = Framing(side, "center", 0, None).frame((128, 128), "x").signal("depth", read)
        assert set(np.unique(made[8:].round(4))) == {0, 5}
    task = Depth("depth", "scene_probe", "auto", "distance")
    assert set(np.unique(task.measured(made[8:], "d").round(4))) == {0, 0.5}, "a hole is not the nearest of all"


@pytest.mark.parametrize("size", [(480, 640), (512, 512), (333, 250), (70, 67), (65, 64)])
@pytest.mark.parametrize("colour", [False, True], ids=["gray", "rgb"])
def test_no_line_of_an_edge_map_is_lost_when_it_shrinks(size, colour):
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    frame = Framing(64, "center", 0, None).frame(size, "x")
    inside = (rows >= 0.1 * height) & (rows < 0.9 * height) & (abs(columns - width / 2) < 0.3 * width)
    for at in range(11):
        row, column = (round(side * (0.4 + at / 50)) for side in size)
        for line in (rows == row, columns == column, columns - width // 2 == rows - row, columns - width // 2 == row - rows):
            drawn = np.where(line & inside, 255, 0).astype(np.uint8)
            made = frame.signal("canny", np.repeat(drawn[..., None], 3, 2) if colour else drawn)
            assert made.shape[:2] == (64, 64)
            assert set(np.unique(made)) == {0, 255}
            white = (made if made.ndim == 2 else made[..., 0]) > 0
            spans = [np.flatnonzero(white.any(axis)) for axis in (0, 1)]
            assert all(len(span) == np.ptp(span) + 1 for span in spans), "without a gap"
            long = max(len(span) for span in spans)
            assert long >= 0.55 * 64
            assert white.sum() <= (long if min(map(len, spans)) == 1 else 3 * long), "and no wider"
    grown = Framing(64, "center", 0, None).frame((32, 32), "x").signal("canny", np.eye(32, dtype=np.uint8) * 255)
    assert np.array_equal(grown, np.kron(np.eye(32, dtype=np.uint8), np.full((2, 2), 255, np.uint8)))


def test_labels_keep_their_numbers():
    labels = (np.arange(64, dtype=np.uint8).reshape(8, 8) % 5).astype(np.uint8)
    image = Image.fromarray(labels).convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette([v for k in range(256) for v in (255 - k, k, 0)])
    assert np.array_equal(read_map("segmentation", encoded(image, "PNG"), "s"), labels)
    framed = Framing(4, "center", 0, None).frame((8, 8), "s").signal("segmentation", labels)
    assert set(np.unique(framed)) <= set(np.unique(labels))
    assert framed.dtype == np.uint8


def test_joints_are_understood_in_the_forms_of_the_field():
    flat = [float(v) for v in range(54)]
    for given in (
        json.dumps({"people": [{"pose_keypoints_2d": flat}]}).encode(),
        json.dumps({"joints": [flat]}).encode(),
        np.array(flat).reshape(1, 18, 3),
        [flat],
    ):
        assert np.array_equal(read_joints(given, "j"), np.array(flat, np.float32).reshape(1, 18, 3))
    coco = {"annotations": [{"keypoints": flat[:51]}, {"keypoints": flat[:51]}]}
    assert read_joints(json.dumps(coco).encode(), "j").shape == (2, 17, 3)
    assert (read_joints([[[1, 2]] * 17], "j")[..., 2] == 1).all()
    assert read_joints(b"[]", "j").shape == (0, 0, 3)
    assert read_joints(np.zeros((0, 14, 3)), "j").shape == (0, 14, 3)


# ---- keys and configuration -------------------------------------------------------------------------------------------


def test_whatever_changes_a_sample_changes_the_fingerprint(good):
    plain = from_folder(good).fingerprint()
    assert from_folder(good).fingerprint() == plain
    rules = ({"crop": "random"}, {"flip": True}, {"matte": "black"}, {"buckets": [[32, 40]]}, {"signals": None})
    changed = [from_folder(good, **rule).fingerprint() for rule in rules]
    changed.append(from_folder(good, crop="random", crop_seed=1).fingerprint())
    assert len({plain, *changed}) == 7
    assert from_folder(good, crop_seed=1, max_bad_share=0.5).fingerprint() == plain  # neither has a say here
    map_file = next((good / "depth").glob("000*"))
    os.utime(map_file, ns=(5, map_file.stat().st_mtime_ns + 1))
    assert from_folder(good).fingerprint() != plain


@pytest.mark.parametrize("name", ["folder", "hub", "shards"])
def test_the_files_say_what_the_constructors_default_to(name):
    node = OmegaConf.to_container(load("train", [f"data={name}", "data.path=x"])["data"])
    module, _, target = node["_target_"].rpartition(".")
    own = getattr(__import__(module, fromlist=[target]), target)
    known = {**inspect.signature(RecordSource.__init__).parameters, **inspect.signature(own.__init__).parameters}
    for key, value in node.items():
        if key not in ("_target_", "name", "path", "val_images"):
            assert known[key].default == value, key
    missing = set(known) - set(node) - {"self", "records", "split", "resolution", "rules"}
    assert not missing, f"conf/data/{name}.yaml does not name {missing}"
    assert (Path(CONF) / "data" / "common" / "pictures.yaml").is_file()


def test_a_configured_source_is_made_by_the_program(good):
    words = ["data=folder", f"data.path={good}/images", "data.val_images=8", "validation.images=8", "validation.final_images=8"]
    words.append(f"data.signals={{depth: {good}/depth}}")
    node = load("train", [*words, "data.buckets=[[32, 32], [24, 40]]"])["data"]
    source = construct(node, split="train", resolution=SIZE)
    assert (len(source), source.signals) == (56, ("depth",))
    assert source.size_of(0) == source[0].image.shape[:2] == (24, 40)
    assert pickle.loads(pickle.dumps(source)).fingerprint() == source.fingerprint()
