"""The page of costs: its tables are what the commands print of the committed rows, and its other numbers those of the cells."""

import re

import pytest

from src.bench.markdown import markdown
from src.bench.pairs import pairs, read, tables
from src.results import read_cost
from src.types import UserError
from tests.conftest import ROOT

COST = ROOT / "experiments" / "cost"
PAGE = (COST / "README.md").read_text(encoding="utf-8")
TEXT = " ".join(PAGE.split())


@pytest.mark.parametrize("folder", ["estimates", "cpu"])
def test_tables_of_cells_are_printed_ones(folder):
    for table in tables(COST / folder).split("\n\n"):
        assert table in PAGE


@pytest.mark.parametrize("kind", ["switches", "peer", "quantized"])
def test_tables_of_comparisons_are_printed_ones(kind):
    printed = markdown([COST / kind]).splitlines()
    lines = [line for line in printed if line.startswith("|")]
    assert len(lines) > 2
    assert "\n".join(lines) in PAGE


def test_an_estimate_is_its_measurement_in_every_cell():
    rows = [read_cost(file) for file in sorted((COST / "cpu").rglob("results.json"))]
    assert f"{len(rows)} cells" in PAGE
    assert {row.backbone["name"] for row in rows} == {"sd3_tiny", "pixart_tiny", "sd21_tiny"}
    for row in rows:
        assert row.peak_mem_gib == row.predicted["peak_mem_gib"]
        assert not row.git_dirty
        assert row.device.startswith("cpu")


def test_ranges_of_the_text_are_those_of_the_pairs():
    found = [p for p in pairs(read(COST / "estimates")) if p.uni.backbone["name"] in ("pixart_alpha", "sd3_medium")]

    def bounds(value, scope, naive=False):
        own = [value(p) for p in found if (p.uni.flags["checkpointing"], p.net.flags["naive"]) == (scope, naive)]
        return f"{min(own):.2f} to {max(own):.2f}"

    assert f"bounds of {bounds(lambda p: p.time, 'none')}, of {bounds(lambda p: p.time, 'both')} with checkpointing" in TEXT
    assert f"of {bounds(lambda p: p.time, 'none', True)} against a backbone that nobody froze" in TEXT
    assert f"**it is gone** ({bounds(lambda p: p.memory, 'both')})" in TEXT
    study = (ROOT / "experiments" / "study" / "README.md").read_text(encoding="utf-8")
    assert f"takes {bounds(lambda p: p.memory, 'both')} times ControlNet's memory" in study
    assert f"adapters of one size, {bounds(lambda p: p.time, 'none')} by its bound" in study


def test_what_a_pass_paid_elsewhere_would_bring():
    def spare(backbone, side, share):
        net, uni = (
            read_cost(COST / "estimates" / f"{backbone}_{adapter}_{side}_8_none" / "results.json").step_time_ms
            for adapter in ("dit_controlnet", "unicon_half")
        )
        return f"{net['total'] / (uni['total'] - share * uni['frozen_forward']):.2f}"

    places = (("sd3_medium", 1024), ("sd3_medium", 512), ("pixart_alpha", 512))
    cached, shared = ([spare(*place, share) for place in places] for share in (1, 0.75))
    assert f"is {cached[0]} on SD3-medium at 1024 pixels, {cached[1]} at 512, {cached[2]} on PixArt-alpha" in TEXT
    assert f"for four adapters {shared[0]}, {shared[1]} and {shared[2]} for each" in TEXT


def test_a_folder_without_pairs_is_refused(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: no row of UniCon beside one of ControlNet at batch 8")):
        tables(tmp_path)
