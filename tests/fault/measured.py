"""Writes what the fault tests did into the last column of the table in docs/faults.md.

    python -m pytest -m fault tests --junitxml=runs/faults.xml
    python -m tests.fault.measured runs/faults.xml            # or, of some tests that ran once more: again runs/more.xml

The tests of a row are those that its third column names: `test_killed_*`, or a file. Below the table stand commit and machine.
"""

import fnmatch
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from src.results import git_state
from tests.conftest import ROOT
from tests.fault.soak import cpu

PAGE = ROOT / "docs" / "faults.md"
LINE = re.compile(r"^Measured at .*$", re.MULTILINE)


@dataclass(frozen=True)
class Case:
    """file: such as tests/fault/test_faults.py; outcome: passed, skipped or failed; why: of a skipped one."""

    file: str
    name: str
    outcome: str
    seconds: float
    why: str = ""


def cases(report: Path) -> list[Case]:
    """Of a report that pytest wrote."""
    found = []
    for node in ElementTree.parse(report).iter("testcase"):
        skipped = node.find("skipped")
        failed = node.find("failure") is not None or node.find("error") is not None
        outcome = "failed" if failed else "passed" if skipped is None else "skipped"
        why = "" if skipped is None else skipped.get("message", "")
        file = node.get("classname", "").replace(".", "/") + ".py"
        found.append(Case(file, node.get("name", ""), outcome, float(node.get("time", 0)), why))
    return found


def measured(row: str, found: list[Case], again: bool = False) -> str:
    """A row of the table with its last column filled in; any other line as it is. A row whose tests did not run stays, too."""
    cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
    patterns = re.findall(r"`([^`]+)`", cells[2]) if len(cells) == 4 else []
    own = [c for c in found if any(fnmatch.fnmatch(c.file, p) or fnmatch.fnmatch(c.name, p) for p in patterns)]
    if not own:
        return row
    counts = Counter(case.outcome for case in own)
    told = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "skipped", "failed") if counts[outcome])
    why = "; ".join(sorted({case.why for case in own if case.why}))
    told = f"{told}, {sum(case.seconds for case in own):.0f} s{f' ({why})' if why else ''}"
    cells[3] = f"{cells[3]}; once more: {told}" if again else told
    return f"| {' | '.join(cells)} |"


def main(report: Path, again: bool = False) -> None:
    """Rewrite the page. again: only some tests ran, at a later commit: their rows and the line below tell both."""
    found, (sha, dirty) = cases(report), git_state(ROOT)
    page = "\n".join(measured(row, found, again) if row.startswith("| ") else row for row in PAGE.read_text().split("\n"))
    counts = Counter(case.outcome for case in found)
    told = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "skipped", "failed"))
    line = f"Measured at commit {sha[:12]}{' with changes' if dirty else ''} on {cpu()}: {told}; {len(found)} tests, "
    line += f"{sum(case.seconds for case in found) / 60:.0f} minutes."
    PAGE.write_text(LINE.sub(lambda old: f"{old[0]} Again, the failed ones alone: {line}" if again else line, page, count=1))
    print(line)


if __name__ == "__main__":
    main(Path(sys.argv[-1]), again=sys.argv[1] == "again")
