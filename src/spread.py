"""A quantity that was measured several times, as results keep it: no number without its spread."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def spread(values: Sequence[float]) -> dict[str, Any]:
    """{median, quartiles: [first, third], n}, in the unit of the values. Raises ValueError for none."""
    if not len(values):
        raise ValueError("a spread wants at least one value")
    low, middle, high = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": middle, "quartiles": [low, high], "n": len(values)}
