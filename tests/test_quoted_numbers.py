"""A number with an interval that a page quotes is one that committed results give."""

import json
import re
from collections import defaultdict
from functools import cache
from itertools import combinations

import pytest

from src.report.pairs import difference
from src.report.rows import Found, Row, read_all
from src.report.seeds import over_seeds
from tests.conftest import ROOT

HOME = ROOT / "experiments"
PAGES = ["README.md", "experiments/README.md", "experiments/study/README.md"]
PAGES += sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))
NUMBER = r"([-+]?\d+\.\d+)"
QUOTE = re.compile(rf"{NUMBER}\**(?: dB)? \[{NUMBER}, {NUMBER}\]")
LONG = 256  # held-out images of what a page compares image by image; the study's shorter trainings are compared over seeds

Triple = tuple[float, float, float]


@cache
def committed() -> Found:
    """Results with a folder of their own, and the few trainings that are one file."""
    alone = [file for file in sorted(HOME.glob("*/*.json")) if "images_seen" in json.loads(file.read_text())]
    return read_all([HOME, *(file for file in alone if file.name not in ("results.json", "outcome.json"))])


def own(rows: list[Row]) -> list[Triple]:
    """What a result says with its interval."""
    found = []
    for row in rows:
        for metrics in (row.result.metrics, *((getattr(row.result, "arms", None) or {}).values())):
            found += [(m["value"], *m["ci95"]) for m in metrics.values() if m.get("ci95")]
    return found


def alike(rows: list[Row]) -> list[list[Row]]:
    """Rows by backbone, task and held-out images."""
    groups = defaultdict(list)
    for row in rows:
        if row.scores is not None:
            groups[row.result.backbone["id"], row.result.task, row.ids].append(row)
    return list(groups.values())


def image_by_image(group: list[Row]) -> list[Triple]:
    """The control score of a run minus that of another, over the same images."""
    long = [row for row in group if len(row.ids) >= LONG]
    return [(value, *interval) for pair in combinations(long, 2) for value, interval in [difference(*pair)]]


def seed_by_seed(group: list[Row]) -> list[Triple]:
    """The same over seeds: folders that differ in their seed alone are one method."""
    methods = defaultdict(dict)
    for row in group:
        methods[re.sub(r"_?seed\d+", "", str(row.folder))][row.result.seed] = row.result.metrics[row.main_metric]["value"]
    found = []
    for one, other in combinations([seeds for seeds in methods.values() if len(seeds) > 1], 2):
        shared = one.keys() & other.keys()
        mean, interval = over_seeds([one[seed] - other[seed] for seed in sorted(shared)])
        found += [(mean, *interval)] if interval else []
    return found


@cache
def known() -> list[Triple]:
    found = own(committed().trained) + own(committed().evaluated)
    for group in alike(committed().trained):
        found += image_by_image(group) + seed_by_seed(group)
    return found + [(-value, -high, -low) for value, low, high in found]


def as_written(triple: Triple, like: tuple[str, ...]) -> tuple[float, ...]:
    """Rounded to as many digits as the page has."""
    return tuple(round(x, len(text.partition(".")[2])) for x, text in zip(triple, like, strict=True))


@pytest.mark.parametrize("page", PAGES)
def test_every_interval_of_a_page_is_one_of_committed_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    wrong = []
    for found in QUOTE.finditer(text):
        said = tuple(float(x) for x in found.groups())
        if not any(as_written(triple, found.groups()) == said for triple in known()):
            wrong.append(f"line {text[: found.start()].count(chr(10)) + 1}: {found[0]}")
    assert not wrong, wrong


def test_a_number_that_no_result_has_is_found():
    row = next(row for row in committed().trained if row.result.experiment == "unicon_sd3_canny")
    metric = row.result.metrics["canny_f1"]
    triple = (metric["value"], *metric["ci95"])
    assert triple in known()
    like = ("0.123", "+0.123", "-0.123")
    assert as_written(triple, like) == tuple(round(x, 3) for x in triple)
    assert not any(as_written((value + 0.001, low, high), like) == as_written(triple, like) for value, low, high in [triple])
