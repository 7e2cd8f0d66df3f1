"""What a stranger's data set, model or checkpoint can not do here, and where keys never get. The page: docs/security.md."""

import ast
import json
import os
import pickle
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from src.config import load
from src.data import cache
from src.data.folder import FolderSource
from src.data.shard_index import ShardIndex, scan
from src.data.shards import ShardSource
from src.data.signals import MAX_JOINT_NUMBERS, map_size, read_joints, read_map
from src.data.source import BadSample
from src.hub import from_safetensors
from src.ranks import launch
from src.results import HIDDEN
from src.runs import new_run
from src.sweep.process import CellProcess
from src.types import UserError
from tests.bad_files import encoded, photo
from tests.conftest import CPU, ROOT
from tests.test_data_formats import write_tar

SIZE = 32
KEYS = {
    "HF_TOKEN": "hf_tokenOfNobodyForTheTests000000001",
    "HUGGING_FACE_HUB_TOKEN": "nobodysHubTokenForTheTests0002",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef00000003",
}
DEEP = "[" * 200_000


@pytest.fixture
def pictures(tmp_path):
    """Three pictures with captions in `data`, and a secret one beside that folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(encoded(photo(i), "PNG"))
        (folder / f"{i}.txt").write_text(f"picture {i}")
    (tmp_path / "secret.png").write_bytes(encoded(photo(9), "PNG"))
    (tmp_path / "secret.txt").write_text("nobody should read this")
    return folder


def from_folder(path, **rules):
    return FolderSource("folder", str(path), 1, "train", SIZE, **rules)


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["../secret.png", "{tmp}/secret.png", "link.png", "up/secret.png", "x/../../secret.png"])
@pytest.mark.parametrize("part", ["image", "map"])
def test_a_path_in_a_table_stays_in_its_folder(pictures, tmp_path, word, part, capsys):
    (pictures / "link.png").symlink_to(tmp_path / "secret.png")
    (pictures / "up").symlink_to(tmp_path)
    (pictures / "x").mkdir()
    word = word.format(tmp=tmp_path)
    rows = [{"file_name": f"{i}.png", "depth": f"{i}.png", "text": "a"} for i in range(3)]
    column = "file_name" if part == "image" else "depth"
    rows[1][column] = word
    (pictures / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rules = {"table": "t.jsonl", "signal_columns": {"canny": "depth"}}
    with pytest.raises(UserError) as caught:
        from_folder(pictures, **rules)
    said = one_line(caught)
    assert f"t.jsonl: 1 of 3 paths lead out of data.path='{pictures}': row 2: {column}={word!r}" in said
    assert said.endswith("or write data.allow_outside=true if you trust whoever made them")
    read = from_folder(pictures, **rules, allow_outside=True)[1]
    assert np.array_equal(read.image if part == "image" else read.signals["canny"], from_folder_of(tmp_path, part, read))
    assert "they are read, for data.allow_outside=true" in capsys.readouterr().out


def from_folder_of(folder, part, sample):
    """The secret picture as the sample shows it."""
    from src.data.folder import read_picture

    return read_picture(folder / "secret.png", SIZE) if part == "image" else sample.signals["canny"]


@pytest.mark.parametrize("word", ["~nobody-of-this-name/0.png", "a\0b.png", "a" * 5000 + ".png"])
def test_a_word_that_is_no_path_is_refused_in_one_line(pictures, word):
    rows = [{"file_name": name, "text": "a"} for name in ("0.png", word, "1.png")]
    (pictures / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError) as caught:
        from_folder(pictures, table="t.jsonl")
    one_line(caught)


@pytest.mark.parametrize("what", ["picture", "caption", "folder"])
def test_a_link_out_of_the_folder_is_not_followed(pictures, tmp_path, what):
    (tmp_path / "more").mkdir()
    shutil.copy(tmp_path / "secret.png", tmp_path / "more" / "5.png")
    (pictures / "2.txt").unlink()
    link, target = {"picture": ("3.png", "secret.png"), "caption": ("2.txt", "secret.txt"), "folder": ("sub", "more")}[what]
    (pictures / link).symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=re.escape(f"links lead out of it: {link} -> {tmp_path / target}; put")) as caught:
        from_folder(pictures, missing_caption="empty")
    one_line(caught)
    assert len(from_folder(pictures, missing_caption="empty", allow_outside=True)) == (2 if what == "caption" else 3)


def test_links_within_the_folder_are_followed(pictures):
    (pictures / "3.png").symlink_to("0.png")
    (pictures / "3.txt").symlink_to(pictures / "0.txt")
    assert len(from_folder(pictures)) == 3


def test_a_hub_data_set_reads_what_lies_below_it(pictures, tmp_path):
    datasets = pytest.importorskip("datasets")
    from src.data.hub import HubSource

    def source(word, **rules):
        rows = [{"image": str(pictures / f"{i}.png"), "text": "a"} for i in range(2)] + [{"image": word, "text": "a"}]
        file = pictures / "t.parquet"
        made = datasets.Dataset.from_list(rows)
        made.to_parquet(file)
        return HubSource("hub", str(file), 1, "val", SIZE, **rules)

    for word in ("../secret.png", str(tmp_path / "secret.png")):
        with pytest.raises(UserError, match=rf"column image: 1 of 3 paths lead out of it: row 2: image='{re.escape(word)}'"):
            source(word)
        assert source(word, allow_outside=True)[0].image.shape == (SIZE, SIZE, 3)
    assert source("0.png")[0].image.shape == (SIZE, SIZE, 3)


def test_a_resumed_run_may_be_allowed_outside(tmp_path):
    from src.runs import open_run

    words = ["data=folder", "data.path=x", f"output_dir={tmp_path}", "hardware=cpu"]
    run = new_run(load("train", words))
    more = [f"resume={run.folder}", "data.allow_outside=true"]
    again = open_run(load("train", [*words, *more]), more)
    assert (run.cfg.data.allow_outside, again.cfg.data.allow_outside) == (False, True)


# ---- sizes ------------------------------------------------------------------------------------------------------------


def npy(shape, values=b"", dtype="<f4") -> bytes:
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n" + values


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (npy((10**12, 18, 3)), "more than 150 megapixels"),
        (npy((500_000, 18, 3)), f"more than {MAX_JOINT_NUMBERS} numbers"),
        (npy((1, 18, 3), dtype="<U99999999"), "its header claims 21599999784 bytes of values, and 0 are there"),
        (npy((2, 18, 3), b"1234"), "its header claims 432 bytes of values, and 4 are there"),
        (npy((-1, 18, 3), b"1234"), "write plain numbers"),
        (npy((1, 18, 3), b"1234", "|O"), "write plain numbers"),
        (b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000, "not a whole .npy file"),
        (b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"-" * 9000, "not a whole .npy file"),
        (DEEP.encode(), "too many brackets within brackets"),
        (b'{"joints": ' + b"[" * 5000 + b"]" * 5000 + b"}", "brackets"),
        (b"[[[1" + b"0" * 400 + b", 1]]]", "no list of joints"),
    ],
)
@pytest.mark.parametrize("form", ["bytes", "file"])
def test_a_bomb_of_joints_is_one_line(tmp_path, raw, said, form):
    (tmp_path / "j").write_bytes(raw)
    with pytest.raises(BadSample, match=re.escape(said)) as caught:
        read_joints(raw if form == "bytes" else tmp_path / "j", "0.joints")
    assert one_line(caught).startswith("0.joints: ")


def test_a_depth_array_is_judged_by_its_header():
    assert map_size("depth", npy((4, 6)), "d.npy") == (4, 6)
    for raw in (npy((0, 6)), npy((10**6, 10**6)), npy((4, 6), dtype="|O")):
        with pytest.raises(BadSample):
            map_size("depth", raw, "d.npy")
    with pytest.raises(BadSample, match="claims 96 bytes of values, and 0 are there"):
        read_map("depth", npy((4, 6)), "d.npy")


def test_json_without_end_is_one_line_in_tables_and_shards(pictures, tmp_path):
    (pictures / "t.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n' + DEEP)
    with pytest.raises(UserError, match="line 2 has too many brackets within brackets; mend or remove it"):
        from_folder(pictures, table="t.jsonl")
    members = [(f"{i}.{suffix}", raw) for i in range(2) for suffix, raw in (("png", encoded(photo(i), "PNG")), ("json", b"{}"))]
    members[1] = ("0.json", DEEP.encode())
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(BadSample, match="too many brackets within brackets"):
        ShardSource("shards", str(tmp_path / "x.tar"), 1, "train", SIZE, caption="json:caption")


def test_a_caption_file_without_end_is_one_line(pictures):
    (pictures / "1.txt").write_bytes(b"a" * (2 << 20))
    with pytest.raises(BadSample, match=r"1\.txt: a caption of more than 1024 KiB; cut it"):
        from_folder(pictures)


@pytest.mark.parametrize(
    "forge",
    [
        lambda i: i["parts"][0].update(png=[512, 10**13]),
        lambda i: i["parts"][0].update(png=[10**13, 512]),
        lambda i: i["parts"][0].update(png=[-512, 512]),
        lambda i: i["parts"][0].update(png=[True, 512]),
        lambda i: i["parts"][0].update(png="here"),
        lambda i: i["keys"].__setitem__(0, "../../0"),
        lambda i: i["keys"].__setitem__(0, i["keys"][1]),
        lambda i: i["keys"].append("one more"),
        lambda i: i["headers"][0].update(png=[0, 0, "PNG RGB"]),
        lambda i: i["headers"][0].clear(),
        lambda i: i.update(parts=7),
        lambda i: i.update(filler="x" * 100_000),
    ],
)
def test_a_forged_index_is_made_anew(tmp_path, forge):
    members = [(f"{i}.{s}", raw) for i in range(2) for s, raw in (("png", encoded(photo(i), "PNG")), ("txt", b"a"))]
    file = write_tar(tmp_path / "x.tar", members)
    right = ShardIndex.of(file, None)
    place = tmp_path / "x.tar.index.json"
    assert ShardIndex.of(file, None) == ShardIndex(
        file, *(json.loads(place.read_text())[k] for k in ("keys", "parts", "headers"))
    )
    index = json.loads(place.read_text())
    forge(index)
    place.write_text(json.dumps(index))
    made = ShardIndex.of(file, None)
    assert (made.keys, made.headers) == (right.keys, right.headers)
    assert [{s: tuple(p) for s, p in members.items()} for members in made.parts] == right.parts == scan(file).parts
    assert json.loads(place.read_text()).keys() == {"stamp", "keys", "parts", "headers"}


# ---- code -------------------------------------------------------------------------------------------------------------


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def copy_of(name, folder):
    shutil.copytree(ROOT / "src" / "embedded" / "weights" / name, folder, ignore=shutil.ignore_patterns("*.png", "*.md"))
    return folder


@pytest.mark.parametrize(
    ("part", "file"),
    [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")],
)
def test_weights_in_pickle_are_refused_and_never_run(tmp_path, part, file):
    from src.backbones.unet import UNet
    from src.text.stock import SDText

    folder, mark = copy_of("sd21_tiny", tmp_path / "model"), tmp_path / "ran"
    (weights,) = (folder / part).glob("*.safetensors")
    weights.unlink()
    (folder / part / f"{file}.bin").write_bytes(pickle.dumps(Evil(mark)))
    backbone = UNet("sd21_tiny", str(folder), 64)
    read = {"unet": lambda: backbone.load(CPU, torch.float32), "vae": lambda: backbone.load_codec(CPU)}
    with pytest.raises(
        UserError, match=rf"{part}/{file}\.bin is pickle, which can run any code, and is never read; .*"
    ) as caught:
        read.get(part, lambda: SDText(folder, CPU))()
    assert "save_pretrained(folder, safe_serialization=True)" in one_line(caught)
    assert not mark.exists()
    pickle.loads((folder / part / f"{file}.bin").read_bytes())
    assert mark.exists()  # it would have run


def test_a_model_that_brings_code_is_refused_and_never_run(tmp_path):
    from diffusers import StableDiffusionPipeline

    folder, mark = copy_of("sd21_tiny", tmp_path / "model"), tmp_path / "ran"
    index = json.loads((folder / "model_index.json").read_text()) | {"text_encoder": ["evil", "CLIPTextModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    evil = f"import os\nos.mkdir({str(mark)!r})\nfrom transformers import CLIPTextModel\n"
    (folder / "text_encoder" / "evil.py").write_text(evil)
    without = dict.fromkeys(("unet", "vae", "safety_checker", "feature_extractor", "image_encoder"))
    with pytest.raises(UserError, match=r"brings code of its own, which is never run: .*evil\.py") as caught:
        from_safetensors(StableDiffusionPipeline, folder, **without)
    one_line(caught)
    assert not mark.exists()


def test_nothing_in_src_runs_what_it_reads():
    """No trust_remote_code, no pickle, no eval; torch.load with weights_only, np.load without allow_pickle."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names]
                module = node.module if isinstance(node, ast.ImportFrom) else None
                unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "zipfile"}
                if unsafe & {module, *(names if module is None else [])} and names != ["UnpicklingError"]:
                    found.append(f"{where} imports {module or names}")
            if not isinstance(node, ast.Call):
                continue
            said, called = {k.arg: k.value for k in node.keywords}, ast.unparse(node.func)
            if "trust_remote_code" in said or (called in ("eval", "exec") and isinstance(node.func, ast.Name)):
                found.append(f"{where} {called}")
            if called == "torch.load" and not is_true(said.get("weights_only")):
                found.append(f"{where} torch.load without weights_only=True")
            if called in ("np.load", "numpy.load") and is_true(said.get("allow_pickle")):
                found.append(f"{where} np.load with allow_pickle")
            if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                found.append(f"{where} {called}")
    assert found == []


def is_true(node) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


# ---- keys and tokens --------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    return list(KEYS.values())


def test_a_key_in_a_configuration_is_refused_and_not_said(tmp_path, keys, capsys):
    from src.config import preflight

    for words in (
        [f"logger.group=run-{KEYS['WANDB_API_KEY']}"],
        ["logger.group=${oc.env:HF_TOKEN}"],
        ["-m", f"tags=[a,{KEYS['HF_TOKEN']}]", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}"],
    ):
        with pytest.raises(SystemExit, match="2"):
            preflight("train", [*words, f"output_dir={tmp_path}"])
        out, said = capsys.readouterr()
        assert re.match(rf"error: command line: (logger\.group|tags)={HIDDEN} holds a key or token: keys", said)
        assert not any(key in out + said for key in keys)
    assert list(tmp_path.iterdir()) == []


def test_keys_are_found_in_lists_files_and_names(keys):
    from src.config import ConfigError
    from src.config.checks import check_secrets, check_typed

    where = {"a.b": "x.yaml"}.get
    check_secrets({"a": {"b": [1, float("nan"), None, "fine"]}, "t5_tokens": 8}, where)
    check_typed(["seed=1", "backbone.t5_tokens=256", "~logger", "-m"])
    for value in (["x", keys[1]], f"x{keys[2]}y", "https://me:word@host/x", "hf_" + "a1" * 17):
        with pytest.raises(ConfigError, match=f"x.yaml: a.b={HIDDEN} holds a key"):
            check_secrets({"a": {"b": value}}, where)
    for word in ("+hub_token=x", f"seed={keys[0]}", "+hydra.job.env_set.HF_TOKEN=x"):
        with pytest.raises(ConfigError, match=HIDDEN) as caught:
            check_typed([word])
        assert not any(key in str(caught.value) for key in keys)


def test_a_configuration_is_written_without_keys(tmp_path, keys):
    cfg = load("train", [f"output_dir={tmp_path}", "hardware=cpu"])
    cfg.logger.group = f"x {keys[1]}"  # as no checked configuration can
    stored = (new_run(cfg).folder / "config.yaml").read_text()
    assert keys[1] not in stored
    assert OmegaConf.create(stored).logger.group == f"x {HIDDEN}"


def test_the_log_of_a_cell_is_kept_without_keys(tmp_path, keys):
    log, noise = tmp_path / "0.log", b"\xff not UTF-8 \r 50 %\n"
    said = b"".join(f"key {key}\n".encode() for key in keys) + noise
    code = f"import sys; sys.stdout.buffer.write({said!r})"
    process = CellProcess([sys.executable, "-c", code], log, {**os.environ}, None, 1.0)
    assert process.wait(0.01).code == 0
    assert log.read_bytes() == f"key {HIDDEN}\n".encode() * 3 + noise
    assert [f.name for f in tmp_path.iterdir()] == ["0.log"]


def test_what_ranks_said_is_kept_without_keys(tmp_path, keys, monkeypatch, capsys):
    monkeypatch.setenv(launch.FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    launch.record(ValueError(f"no such {keys[0]}"))
    (tmp_path / "rank-2.log").write_text(f"could not log in with {keys[2]}\n")
    assert launch._tell(tmp_path, 0, {1: 1, 2: -signal.SIGSEGV}, set()) == 1
    said = capsys.readouterr().err + "".join(file.read_text() for file in tmp_path.iterdir())
    assert f"could not log in with {HIDDEN}" in said
    assert not any(key in said for key in keys)


# ---- versions ---------------------------------------------------------------------------------------------------------


def test_a_cache_of_another_version_is_not_read(tmp_path, monkeypatch):
    """The version is part of the key, and the key is the folder: what another version wrote is made anew."""

    def store():
        return cache.TensorStore(tmp_path / f"latents-{cache.store_key(source='x')}", 4, 4)

    store().write(range(4), {"latents": torch.zeros(4, 1)})
    assert store().missing() == []
    monkeypatch.setattr(cache, "CACHE_VERSION", cache.CACHE_VERSION + 1)
    assert store().missing() == [range(4)]
    monkeypatch.undo()
    assert store().missing() == []
