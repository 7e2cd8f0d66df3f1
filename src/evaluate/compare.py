"""What adapters differ by on the same conditions and noise: paired differences with their intervals."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from src.config.loader import ROOT
from src.evaluate.manifest import check_like, conditions_hash, read_manifest
from src.evaluate.pictures import Say
from src.metrics.distances import SMALL_N, set_distances
from src.metrics.intervals import paired_metric
from src.results import dated_origin, write_atomic
from src.results.evaluation import read_evaluation
from src.types import UserError

FILE = "comparison.json"


def compare_folders(cfg: DictConfig) -> Path:
    """`compare=[...]`: the paired differences of evaluations that are there. -> the folder of the comparison."""
    folders = [Path(folder) for folder in cfg.compare]
    if cfg.run is not None or cfg.checkpoint is not None:
        raise UserError("compare= reads what was drawn before; leave run= and checkpoint= out")
    if len(folders) < 2:
        raise UserError(f"compare={list(cfg.compare)} names one evaluation; a difference wants two")
    first = read_manifest(folders[0])
    name = f"{first['conditions']['evaluation_set']['name']}-compared-{conditions_hash({'of': sorted(map(str, folders))})[:8]}"
    return compare(folders, Path(cfg.output_dir) / name)


def compare(folders: Sequence[Path], out: Path, said: Say = print) -> Path:
    """Write comparison.json into `out`, every evaluation minus every earlier one, and tell it. -> out.

    Raises UserError for evaluations of unlike manifests, naming what differs.
    """
    manifests = [read_manifest(folder) for folder in folders]
    for other in manifests[1:]:
        check_like(manifests[0], other)
    pairs = []
    for (a, one), (b, two) in combinations(zip(folders, manifests, strict=True), 2):
        entries = differences(b, a)
        labels = [f"{m['subject']['label']}, {m['subject']['adapter']}" for m in (two, one)]
        pairs.append({"of": labels[0], "minus": labels[1], "metrics": entries})
        said(f"\n{labels[0]}\n  minus {labels[1]}:")
        for line in told(entries, signed=True):
            said(line)
    found = {
        "kind": "comparison",
        "manifest": manifests[0]["conditions_hash"],
        "conditions": manifests[0]["conditions"],
        "subjects": [manifest["subject"] for manifest in manifests],
        "pairs": pairs,
        **dated_origin(ROOT),
    }
    write_atomic(out / FILE, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    said(f"differences: {out / FILE}")
    return out


def differences(one: Path, two: Path) -> dict[str, dict[str, Any]]:
    """Metric -> one minus two, over the same conditions, of every number about the right condition's pictures."""
    results, kept = [read_evaluation(f / "results.json") for f in (one, two)], [_outcome(f) for f in (one, two)]
    found = {}
    for name, entry in results[0].metrics.items():
        if "/" not in name and all(name in k["scores"] for k in kept):
            values = [np.array(k["scores"][name]) for k in kept]
            found[name] = paired_metric(*values, entry["unit"], entry["better"])
    for suffix in kept[0]["features"].keys() & kept[1]["features"].keys():
        sets = [set_distances(*(np.load(folder.parent / k["features"][suffix][part]) for part in ("pictures", "images")))
                for folder, k in zip((one, two), kept, strict=True)]  # fmt: skip
        gaps = sets[0].entries_minus(sets[1], suffix)
        found |= {name: gap for name, gap in gaps.items() if all(name in r.metrics for r in results)}
    return found


def told(entries: Mapping[str, dict[str, Any]], signed: bool = False) -> Iterator[str]:
    """A line per number, with its interval and how many images stand behind it."""
    plus = "+" if signed else ""
    for name, m in entries.items():
        interval = f"95 % [{m['ci95'][0]:{plus}.4f}, {m['ci95'][1]:{plus}.4f}]" if m["ci95"] else "no interval"
        small = f" (fewer than {SMALL_N:,})" if m.get("small_n") else ""
        yield f"  {name:<40} {m['value']:>{plus}10.4f} {m['unit']:<16} {interval:<28} n={m['n']}{small}"


def _outcome(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "outcome.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder}: no whole outcome.json there; evaluate again") from None
