"""The study's page: its commands are commands, and its numbers are those of its committed cells."""

import json
import re
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


def row_of(start):
    """The numbers of the page's row that begins so."""
    (line,) = (x for x in (ROOT / PAGE).read_text().splitlines() if x.startswith(f"| {start}"))
    return [float(x) for x in re.findall(r"(?<=\| )\d+\.\d+", line)]


@pytest.mark.parametrize("words", TRAININGS, ids=lambda words: " ".join(words)[:70])
def test_every_sweep_composes(words):
    assert preflight("train", words[3:]) is not None


@pytest.mark.parametrize("copy", ["full", "decoder", "skip_layer"])
def test_table_1a_states_its_cells(copy):
    _, uni, bi = row_of(copy)[:3]
    for said, flow in ((uni, "unidirectional"), (bi, "bidirectional")):
        assert said == round(score("table_1a", copy=copy, flow=flow), 3)


@pytest.mark.parametrize("connector", ["zero_mlp", "share_attn"])
def test_table_1b_states_its_cells(connector):
    assert row_of(connector)[0] == round(score("table_1b", connector=connector), 3)


METHODS = [("DiT-ControlNet", "dit_controlnet"), ("T2I-Adapter", "t2i_adapter"), ("Control LoRA", "control_lora")]


@pytest.mark.parametrize(("name", "adapter"), METHODS)
def test_table_2_states_its_cells_and_they_are_of_one_size(name, adapter):
    size, f1 = row_of(name)[:2]
    assert f1 == round(score("table_2", adapter=adapter), 3)
    half = {r.trainable_m for r in cells("table_1a") if (r.design["copy"], r.design["flow"]) == ("decoder", "unidirectional")}
    (found,) = {r.trainable_m for r in cells("table_2") if r.adapter == adapter}
    assert size == round(found, 2)
    assert found == pytest.approx(half.pop(), rel=0.03)


def test_every_cell_of_the_study_was_made_from_a_commit_alone():
    tables = sorted(p.name for p in STUDY.iterdir() if p.is_dir())
    assert {"small", "table_1a", "table_1b", "table_2"} <= set(tables)
    for table in tables:
        for result in cells(table):
            assert not result.git_dirty, (table, result.command)
            assert result.metrics[next(iter(result.metrics))]["n"] >= 64
