"""The committed pictures side by side: what the sheets hold, and that unlike scenes are refused."""

import numpy as np
import pytest

from src.report.side_by_side import SHARED, Shown, check_same, committed
from src.types import UserError


def test_the_thirteen_committed_cells_show_the_same_scenes():
    shown = committed("canny")
    check_same(shown, SHARED)
    cells = [(one.backbone, one.adapter) for one in shown]
    assert len(set(cells)) == len(cells) == 13
    assert cells[:4] == [("pixart_tiny", a) for a in ("unicon", "unicon_half", "dit_controlnet", "t2i_adapter")]


def test_other_scenes_in_a_row_are_refused_by_name():
    def run(name, value):
        return Shown(name, name, "sd3_tiny", [[np.zeros((2, 2, 3), np.uint8)] * 6, [np.full((2, 2, 3), value, np.uint8)] * 6])

    check_same([run("one", 5), run("two", 6)], SHARED)  # rounded on another machine
    with pytest.raises(UserError, match="two: row 2 has another source than in one"):
        check_same([run("one", 5), run("two", 7)], SHARED)
    larger = Shown("two", "two", "sd3_tiny", [[np.zeros((4, 4, 3), np.uint8)] * 6] * 2)
    with pytest.raises(UserError, match="two: row 1 has another source than in one"):
        check_same([run("one", 5), larger], SHARED)
    with pytest.raises(UserError, match="no experiment of task=nothing"):
        committed("nothing")
