"""Which copy's residual goes behind which block: the four rules of the field, in numbers."""

import pytest

from src.adapters.dit_controlnet import RULES

# rule, blocks, copies -> the copy behind each block but the last; None: no residual
CASES = [
    ("proportional", 24, 12, [i // 2 for i in range(23)]),  # 0, 0, 1, 1, ..., 10, 10, 11: the last is used once
    ("proportional", 24, 6, [*(c for c in range(5) for _ in range(4)), 5, 5, 5]),
    ("proportional", 24, 23, [0, *range(22)]),  # copy 22 is never asked
    ("ceil", 19, 4, [*[0] * 5, *[1] * 5, *[2] * 5, *[3] * 3]),
    ("ceil", 19, 2, [*[0] * 10, *[1] * 8]),
    ("ceil", 24, 23, [c for c in range(12) for _ in range(2)][:23]),  # differs from proportional: half of the copies idle
    ("repeat", 19, 2, [i % 2 for i in range(18)]),
    ("repeat", 19, 4, [0, 1, 2, 3] * 4 + [0, 1]),
    ("one_to_one", 28, 13, [*range(13), *[None] * 14]),
    ("one_to_one", 28, 27, [*range(27)]),
]


@pytest.mark.parametrize(("rule", "depth", "copies", "expected"), CASES)
def test_index_rules(rule, depth, copies, expected):
    found = [RULES[rule](i, depth, copies) for i in range(depth - 1)]
    assert [index if index < copies else None for index in found] == expected


def test_every_rule_is_tried():
    assert {case[0] for case in CASES} == set(RULES)
