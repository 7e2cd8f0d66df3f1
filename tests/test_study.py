"""The study's page: its commands are commands, and its numbers are those of its committed cells."""

import json
import re
from collections import defaultdict
from statistics import mean

import pytest

from src.config import preflight
from src.results import read_results
from tests.conftest import ROOT
from tests.test_end_to_end import commands_of

STUDY = ROOT / "experiments" / "study"
PAGE = "experiments/study/README.md"
TRAININGS = [words for words in commands_of(PAGE) if words[:3] == ["python", "-m", "src.train"]]


def cells(table):
    """The trainings of a table; beside them are costs and evaluations."""
    found = [(file, json.loads(file.read_text())) for file in sorted((STUDY / table).rglob("results.json"))]
    return [read_results(file) for file, raw in found if raw.get("kind", "train") == "train"]


def score(table, metric="canny_f1", **design):
    """Mean of a score over the seeds of a design."""
    found = [r for r in cells(table) if all(r.design.get(key, getattr(r, key, None)) == value for key, value in design.items())]
    assert sorted(r.seed for r in found) == [0, 1, 2], design
    return mean(r.metrics[metric]["value"] for r in found)


def row_of(start, heading):
    """The numbers of the row that begins so, below a heading of the page."""
    section = next(x for x in re.split(r"^#+ ", (ROOT / PAGE).read_text(), flags=re.MULTILINE) if x.startswith(heading))
    (line,) = (x for x in section.splitlines() if re.match(rf"\| {start}\b(?!-)", x))
    return [float(x) for x in re.findall(r"(?<=\| )\d+\.\d+", line)]


@pytest.mark.parametrize("words", TRAININGS, ids=lambda words: " ".join(words)[:70])
def test_every_command_composes(words):
    assert (preflight("train", words[3:]) is not None) == ("-m" in words[3:])


@pytest.mark.parametrize("copy", ["full", "decoder", "skip_layer"])
def test_table_1a_states_its_cells(copy):
    _, uni, bi = row_of(copy, "Tables 1a")[:3]
    for said, flow in ((uni, "unidirectional"), (bi, "bidirectional")):
        assert said == round(score("table_1a", copy=copy, flow=flow), 3)


@pytest.mark.parametrize("connector", ["zero_mlp", "share_attn"])
def test_table_1b_states_its_cells(connector):
    assert row_of(connector, "Table 1b")[0] == round(score("table_1b", connector=connector), 3)


HALF = {"copy": "decoder", "flow": "unidirectional"}
TABLE_2 = {  # heading -> folder, score and its digits
    "Canny on sd3_tiny": ("sd3_canny", "canny_f1", 3),
    "Super-resolution on sd3_tiny": ("sd3_super_resolution", "psnr", 2),
    "Canny on sd21_tiny": ("sd21_canny", "canny_f1", 3),
    "Super-resolution on sd21_tiny": ("sd21_super_resolution", "psnr", 2),
}
NAMES = {"UniCon-Half": "unicon_half", "DiT-ControlNet": "dit_controlnet", "ControlNet": "controlnet"}
NAMES |= {"T2I-Adapter": "t2i_adapter", "Control LoRA": "control_lora", "SCEdit": "scedit"}


def matched(folder):
    """adapter -> its trainings of a part of table 2; UniCon-Half on sd3_tiny with edges is a row of table 1a."""
    found = {}
    for r in cells(f"table_2/{folder}") + (cells("table_1a") if folder == "sd3_canny" else []):
        if r.adapter != "unicon" or all(r.design[key] == value for key, value in HALF.items()):
            found.setdefault("unicon_half" if r.adapter == "unicon" else r.adapter, []).append(r)
    return found


@pytest.mark.parametrize("heading", TABLE_2)
def test_table_2_states_its_cells_and_they_are_of_one_size(heading):
    folder, metric, digits = TABLE_2[heading]
    found = matched(folder)
    for name, adapter in NAMES.items():
        if adapter not in found:
            continue
        size, value, *_ = row_of(name, heading)
        runs = found.pop(adapter)
        assert sorted(r.seed for r in runs) == [0, 1, 2]
        assert value == round(mean(r.metrics[metric]["value"] for r in runs), digits), adapter
        assert {round(r.trainable_m, 2) for r in runs} == {size}
        assert size == pytest.approx(row_of("UniCon-Half", heading)[0], rel=0.03)
    assert not found


@pytest.mark.parametrize(
    ("name", "adapter", "images"), [("DiT-ControlNet", "dit_controlnet", 7072), ("UniCon", "unicon", 5728)]
)
def test_the_table_of_equal_operations_states_its_cells(name, adapter, images):
    assert row_of(name, "Table 2 again")[1] == round(score("equal_flops", adapter=adapter, images_seen=images), 3)


@pytest.mark.parametrize(
    ("name", "folder", "adapter"),
    [
        ("ControlNet", "sd21_canny_published", "controlnet"),
        ("SCEdit", "sd21_canny_small", "scedit"),
        ("UniCon-Half", "sd21_canny_small", "unicon_half"),
    ],
)
def test_the_table_of_other_sizes_states_its_cells(name, folder, adapter):
    size, value, *_ = row_of(name, "As published, and small")
    (found,) = {round(r.trainable_m, 2) for r in cells(f"table_2/{folder}") if r.adapter == adapter}
    assert (size, value) == (found, round(score(f"table_2/{folder}", adapter=adapter), 3))


def test_the_table_of_repeated_passes_states_its_cells():
    """Short trainings by the mean of three seeds, longer ones by their own."""
    repeated, heading = cells("repeated"), "Frozen passes that are used again"
    by_way = defaultdict(list)
    for r in repeated:
        by_way[r.design["reuse"], r.design["feature_cache.draws"], r.images_seen].append(r.metrics["canny_f1"]["value"])
    assert len(by_way) == 6
    for (reuse, draws, images), values in by_way.items():
        name = f"`reuse={reuse}`" if reuse > 1 else f"`draws={draws}`"
        assert row_of(f"{name}, {images:,}", heading)[0] == round(mean(values), 3)
        assert len(values) == (1 if images == 32000 else 3)


def test_every_cell_of_the_study_was_made_from_a_commit_alone():
    """But for those of which the page says so: a cache folder that git did not know lay in their checkout."""
    tables = sorted(p.name for p in STUDY.iterdir() if p.is_dir())
    assert {"small", "table_1a", "table_1b", "table_2", "equal_flops", "repeated"} <= set(tables)
    told = re.search(r"(\d+) of the cells.* say `git_dirty`", (ROOT / PAGE).read_text())
    flagged = [result.command for table in tables for result in cells(table) if result.git_dirty]
    assert len(flagged) == int(told[1])
    assert all("cache_dir=.cache1" in command or "cache_dir=.cache2" in command for command in flagged)
    for table in tables:
        for result in cells(table):
            assert result.metrics[next(iter(result.metrics))]["n"] >= 64
