"""What judges the long run, and what writes down what the fault tests did."""

import pytest

from tests.fault.measured import cases, measured
from tests.fault.soak import growth, judged


def held(megabytes, files):
    """A hundred looks at a run of 400 images, whose memory and open files grow by so much in all."""
    shares = [n / 100 for n in range(101)]
    return [{"images_seen": 400 * s, "rss_mib": 500 + megabytes * s, "open_files": 30 + round(files * s)} for s in shares]


LIVES = [{"signal": "SIGKILL", "held_at_most": {"rss_mib": 520.0, "open_files": 31}}] * 3
LIVES.append({"signal": None, "held_at_most": {"rss_mib": 520.0, "open_files": 31}})
MOST = {"rss_mib": 510.0, "open_files": 30}


def test_a_steady_run_passes():
    assert all(judged({"weights": True}, LIVES, 3, growth(held(10, 0), 400), MOST).values())


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({"equal": {"weights": True, "losses": False}}, "equal"),
        ({"kills": 4}, "kills_reached"),
        ({"grown": growth(held(80, 0), 400)}, "memory_does_not_grow"),
        ({"grown": growth(held(0, 4), 400)}, "open_files_do_not_grow"),
        ({"held": {"rss_mib": 300.0, "open_files": 30}}, "no_life_holds_more_memory"),
        ({"held": {"rss_mib": 510.0, "open_files": 20}}, "no_life_holds_more_files"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_each_fault_of_a_long_run_is_judged(changes, fails):
    given = {"equal": {"weights": True}, "lives": LIVES, "kills": 3, "grown": growth(held(10, 0), 400), "held": MOST}
    assert [name for name, fine in judged(**(given | changes)).items() if not fine] == [fails]


def test_growth_wants_looks_at_both_quarters():
    with pytest.raises(SystemExit, match="too short"):
        growth(held(0, 0)[:40], 400)


def test_the_last_column_is_what_the_tests_of_a_row_did(tmp_path):
    (tmp_path / "report.xml").write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.fault.test_faults" name="test_killed_in_a_step" time="10.4"/>
        <testcase classname="tests.fault.test_faults" name="test_killed_while_saving[weights]" time="20">
        <failure message="no">no</failure></testcase>
        <testcase classname="tests.fault.test_faults" name="test_a_full_disk" time="0.1">
        <skipped message="no user namespaces here, so no small disks"/></testcase>
        <testcase classname="tests.test_rank_faults" name="test_one_rank" time="3"/>
        </testsuite></testsuites>"""
    )
    found = cases(tmp_path / "report.xml")
    assert measured("| kill | saved | `test_killed_*` | not run |", found).endswith("| 1 passed, 1 failed, 30 s |")
    assert measured("| rank | all end | `tests/test_rank_faults.py` | 4 passed, 9 s |", found).endswith("| 1 passed, 3 s |")
    assert measured("| disk | goes on | `test_a_full_*` | |", found).endswith(
        "| 1 skipped, 0 s (no user namespaces here, so no small disks) |"
    )
    row = "| format | read | in `make test`: tests/test_runs.py | not run |"
    assert measured(row, found) == row
