"""The page of a report in a browser: it opens from the disk, says what it should, sorts, answers, fits a telephone."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from src.report.groups import cost_groups, groups
from src.report.page import SIDE, data_uri, page
from src.report.rows import read_all
from src.report.svg import chart_svg
from src.report.write import write_report
from tests.conftest import ROOT
from tests.report_rows import cells, estimate, make_cell, make_run

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
COMMITTED = [*sorted((ROOT / "experiments").glob("*_canny")), ROOT / "experiments" / "unicon_sd3_depth"]
NASTY = '<img src=x onerror="console.error(1)"></script><script>console.error(2)</script> {{ 7 * 7 }} "\''

# of a run folder; a slash makes two names of it, and one tag of the path that is shown
NASTY_FOLDER = (
    "\"q' <img src=y onerror=console.error(3)> \u2603 \u202e&amp; {{ 7 }} x</script><script>console.error(4)</script>"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of committed experiments and of runs with hostile names, captions and commands, curves and costs."""
    folder = tmp_path_factory.mktemp("report")
    for i, adapter in enumerate(("unicon", "zebra" + NASTY)):
        where = make_run(
            folder,
            f"run{i}{NASTY_FOLDER}",
            np.linspace(0, 1, 50) + i / 100,
            adapter=adapter,
            command=f"python {NASTY}",
            images_seen=9600,
            date="2026-01-04T00:00:00+00:00",
        )
        cells(where, seed=1, controlled=i)
        rows = [{"images_seen": n, "train/seconds": n / 100, "val/canny_f1": n / 40000 + i / 10} for n in (3200, 6400, 9600)]
        (where / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (where / "tables" / "val").mkdir(parents=True)
        samples = [{"images_seen": 9600, "id": str(scene), "caption": f"a ball {NASTY}"} for scene in range(2)]
        (where / "tables" / "val" / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    make_cell(folder, "measured")
    make_cell(folder, "measured-2", adapter="dit_controlnet", flags={"checkpointing": "both"})
    make_cell(folder, "estimated", **estimate())
    write_report([folder / "runs", *COMMITTED], folder / "out")
    return folder / "out" / "report.html"


@pytest.fixture(scope="module")
def browser():
    """An installed Chromium, or one that Playwright has fetched before, driven without downloading one."""
    sync = pytest.importorskip("playwright.sync_api", reason="the page is not tried in a browser: pip install playwright")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync.sync_playwright() as playwright:
        try:  # without a program: Playwright's own, if it is there
            chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except sync.Error:
            if program is not None:
                raise
            pytest.skip("the page is not tried in a browser: apt-get install chromium, or playwright install chromium")
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, report):
    """opened(width, scheme) -> the page in a window of that width, and a list of everything that went wrong or out."""
    contexts = []

    def open_page(width=1280, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme))
        window, faults = contexts[-1].new_page(), []
        window.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
        window.on("pageerror", lambda error: faults.append(str(error)))
        window.on("request", lambda r: None if r.url.startswith(("data:", report.as_uri())) else faults.append(r.url))
        window.goto(report.as_uri())
        return window, faults

    yield open_page
    for context in contexts:
        context.close()


# ---- without a browser ------------------------------------------------------------------------------------------------


def test_the_page_is_one_light_file_that_asks_for_nothing(report):
    text = report.read_text()
    assert len(text) < 3_000_000
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    assert "default-src 'none'" in text


def test_names_captions_and_commands_are_escaped(report):
    text = report.read_text()
    assert "<img src=x" not in text
    assert "<img src=y" not in text
    assert "<script>console" not in text
    assert "\u2603" in text  # the folder's name is shown, as text
    assert text.count("</script>") == 2  # the page's own: its data and its program
    assert "{{ 7 * 7 }}" in text
    assert "&lt;img src=x onerror=" in text


def test_every_run_has_its_command_commit_and_seed(report):
    text = report.read_text()
    for folder in COMMITTED:
        raw = json.loads((folder / "results.json").read_text())
        assert raw["command"].replace("+", "&#43;") in text or raw["command"] in text
        assert raw["git_sha"] in text


def test_the_same_rows_give_the_same_page():
    found = read_all([ROOT / "experiments" / "unicon_sd3_canny"])
    made = [page(found, groups(found.trained), [], cost_groups(found.costs)) for _ in range(2)]
    assert made[0] == made[1]


def test_pictures_are_exact_up_to_a_size():
    import base64
    import io

    small = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for picture, size in ((small, 64), (small.repeat(8, 0).repeat(8, 1), SIDE)):
        shown = Image.open(io.BytesIO(base64.b64decode(data_uri(picture).partition(",")[2])))
        assert shown.size == (size, size)
        assert size != 64 or np.array_equal(np.asarray(shown), picture)


def test_a_chart_of_a_single_value_can_be_drawn():
    from src.report.charts import Chart, Point, Series

    for value in (0.0, 5.0, -3.0):
        drawn = chart_svg(Chart("t", "x", "y", (Series("a", (Point(value, value, tip='<"'),), 0),)), 340)
        assert "nan" not in drawn
        assert "&lt;&quot;" in drawn


# ---- in Chromium ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_opens_whole_and_fits(opened, width, scheme):
    window, faults = opened(width, scheme)
    assert window.evaluate("document.documentElement.scrollWidth") == width
    pictures = window.evaluate("[...document.images].map((i) => i.complete && i.naturalWidth > 0)")
    assert len(pictures) > 100
    assert all(pictures)
    paper = window.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(paper.removeprefix("rgb(").split(",")[0]) < 60) == (scheme == "dark")
    for shown, hidden in (("narrow", "wide") if width == 390 else ("wide", "narrow"),):
        assert window.locator(f".chart .{shown} svg").first.is_visible()
        assert not window.locator(f".chart .{hidden} svg").first.is_visible()
    assert faults == []


def test_a_table_sorts_by_any_column_both_ways_with_empty_fields_last(opened):
    window, faults = opened()
    section = window.locator("#s-sd21_tiny-canny table:not(.pictures)")
    table, paired = section.nth(0), section.nth(1)

    def column(number):
        texts = table.locator(f"tbody tr > :nth-child({number})").all_inner_texts()
        return [text.strip() for text in texts]

    titles = [t.strip() for t in table.locator("thead th").all_inner_texts()]
    trained = titles.index("trained, M") + 1
    head = table.locator("thead th").nth(trained - 1)
    before = [float(text) for text in column(trained)]
    assert len(set(before)) == 5
    assert before not in (sorted(before), sorted(before, reverse=True))  # else sorting could do nothing, and pass
    head.locator("button").click()
    up = [float(text) for text in column(trained)]
    assert up == sorted(before)
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    assert [float(text) for text in column(trained)] == up[::-1]
    assert head.get_attribute("aria-sort") == "descending"
    table.locator("thead th").first.locator("button").click()
    assert column(1) == sorted(column(1))
    for _ in range(2):
        paired.locator("thead th").last.locator("button").click()
        last = paired.locator("tbody tr td:last-child").all_inner_texts()
        assert [bool(text.strip()) for text in last] == sorted((bool(text.strip()) for text in last), reverse=True)
    assert faults == []


def test_a_number_tells_its_command_commit_n_seed_and_interval(opened):
    window, faults = opened()
    raw = json.loads((ROOT / "experiments" / "unicon_sd3_depth" / "results.json").read_text())
    mine = "[data-runs*=unicon_sd3_depth]"
    window.locator(f"#s-sd3_tiny-depth .num[data-metric=depth_rmse]{mine}").first.click()
    said = window.locator("#proof").inner_text()
    low, high = raw["metrics"]["depth_rmse"]["ci95"]
    for words in (raw["command"], raw["git_sha"][:7], "256", f"{low} to {high}", str(raw["metrics"]["depth_rmse"]["value"])):
        assert words in said
    assert "seed\n0" in said
    window.keyboard.press("Escape")
    assert not window.locator("#proof").is_visible()
    assert faults == []


def test_charts_answer_to_the_pointer_and_to_the_keyboard(opened):
    window, faults = opened()
    point = window.locator(".wide g.tip").first
    point.hover()
    assert window.locator("#tip").inner_text() == point.get_attribute("data-tip")
    window.mouse.move(0, 0)
    assert not window.locator("#tip").is_visible()
    point.focus()
    assert window.locator("#tip").is_visible()
    bar = window.locator("details.cost[open] .wide rect.tip").first
    bar.hover()
    assert "frozen weights" in window.locator("#tip").inner_text()
    assert faults == []
