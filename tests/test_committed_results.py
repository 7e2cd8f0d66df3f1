"""Every committed result says how it came about, and no measured speed stands without its spread."""

import json
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

HOME = ROOT / "experiments"
FOLDERS = sorted(path.name for path in HOME.iterdir() if path.is_dir())
BESIDE = ("outcome.json", "manifest.json", "comparison.json")  # parts of the results in their folder or below
MACHINE = ("device", "machine", "hardware")
SPREAD = {"step_time_ms": "step_time_quartiles_ms", "img_per_s": "img_per_s_quartiles"}
SPREAD |= {"own_step_time_ms": "own_step_time_quartiles_ms"}


def files(folder: str) -> list[tuple[str, dict]]:
    return [(str(file.relative_to(HOME)), json.loads(file.read_text())) for file in sorted((HOME / folder).rglob("*.json"))]


def without_spread(node, place: str) -> Iterator[str]:
    """Speeds that are numbers with no quartiles beside them. A cost row's images/s are made of its time, which has them."""
    if isinstance(node, dict):
        for name, value in node.items():
            cost = node.get("kind") == "cost" and name == "img_per_s" and (node["latency_ms"] or node["step_time_ms"])
            if name in SPREAD and isinstance(value, int | float) and not node.get(SPREAD[name]) and not cost:
                yield f"{place}: {name}"
    if isinstance(node, dict | list):
        for name, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from without_spread(child, f"{place}: {name}")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_committed_result_names_its_command_commit_and_machine(folder):
    for place, found in files(folder):
        if place.rpartition("/")[2] not in BESIDE:
            said = found | found.get("settings", {})
            assert {"command", "git_sha", "git_dirty", "versions"} <= said.keys(), place
            assert any(said.get(name) for name in MACHINE), place


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_committed_speed_lacks_its_spread(folder):
    assert not [line for place, found in files(folder) for line in without_spread(found, place)]


def test_a_speed_without_its_spread_is_found():
    result = {"step_time_ms": 3.0, "img_per_s": 2.0, "img_per_s_quartiles": [1.0, 3.0], "flags": {"own_step_time_ms": 1.0}}
    assert list(without_spread({"a": [result]}, "x")) == ["x: a: 0: step_time_ms", "x: a: 0: flags: own_step_time_ms"]
    assert not list(without_spread({"kind": "cost", "img_per_s": 2.0, "latency_ms": None, "step_time_ms": {"total": {}}}, "x"))
