"""A row of the house imports only from rows above it, and from its own."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
ROWS = [
    {"vocabulary", "types", "rng", "hub", "objectives", "parent", "spread"},
    {"backbones", "tasks", "text", "data"},
    {"sampling", "checkpoint", "profiling", "metrics"},
    {"adapters"},
    {
        "callbacks", "collect", "config", "build", "construct", "control_score", "embedded", "events", "faults",
        "features", "fit", "interop", "loggers", "matching", "plots", "preflight", "ranks", "results", "room", "runs",
        "support", "sweep", "together", "world",
    },
    {"train", "evaluate", "sample", "bench", "prepare", "report", "export", "doctor"},
]  # fmt: skip
ROW = {name: number for number, names in enumerate(ROWS) for name in names}
# adapters never import a task, tasks never import a backbone, a backbone knows no adapter
FORBIDDEN = {
    ("adapters", "tasks"),
    ("tasks", "backbones"),
    ("backbones", "adapters"),
    ("backbones", "tasks"),
    ("backbones", "data"),
}
FILES = sorted(p for p in SRC.rglob("*.py") if p != SRC / "__init__.py")


def module_of(path: Path) -> str:
    return path.relative_to(SRC).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """First names below `src` that a file imports, at any depth of it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)] if node.module == "src" else [node.module]
        found |= {n.split(".")[1] for n in names if n and n.startswith("src.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_upwards(path):
    own = module_of(path)
    assert own in ROW, f"src/{own} stands in no row: give it one in {Path(__file__).name} and in CONTRIBUTING.md"
    for other in imports_of(path):
        assert ROW[other] <= ROW[own], (
            f"{path.relative_to(SRC.parent)} (row {ROW[own] + 1}) imports src.{other} (row {ROW[other] + 1})"
        )
        assert (own, other) not in FORBIDDEN, f"{path.relative_to(SRC.parent)} imports src.{other}"


def test_heavy_optional_packages_are_imported_where_they_are_used():
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            optional = {"wandb", "cleanfid", "matplotlib", "bitsandbytes", "datasets", "pyarrow", "ray", "submitit"}
            heavy = {n.split(".")[0] for n in names} & optional
            assert not heavy, f"{path.relative_to(SRC.parent)} imports {heavy} at its top"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 310, f"{path.name} has {text.count(chr(10))} lines: look for the part that wants its own room"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno
            assert length <= 65, f"{path.name}:{node.lineno} {node.name} has {length} lines"
