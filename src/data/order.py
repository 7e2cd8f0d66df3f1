"""The order in which images are trained on: a pure function of (seed, position), whatever the machine.

Position n counts images since the start of training. Images of one bucket have one size; an optimizer step takes its images
from one bucket, so that every micro-batch that divides it can be stacked.
"""

from collections.abc import Sequence

import numpy as np

from src import rng


class StreamOrder:
    """Position -> data row.

    buckets: one array of rows per image size; batch: images per optimizer step. With one bucket an epoch is a permutation
    of all rows, and a step may span two epochs. With several, each bucket is shuffled and cut into steps, and the steps are
    shuffled; a bucket's last step is filled up with rows of the same bucket, which are then seen twice in that epoch.
    """

    def __init__(self, seed: int, buckets: Sequence[np.ndarray], batch: int):
        self.seed, self.batch = seed, batch
        self.buckets = [np.asarray(rows) for rows in buckets if len(rows)]
        whole = [-(-len(rows) // batch) * batch for rows in self.buckets]
        self.epoch_length = sum(whole) if len(self.buckets) > 1 else len(self.buckets[0])
        self._epoch, self._rows = -1, np.empty(0, int)

    def row(self, position: int) -> int:
        epoch, place = divmod(position, self.epoch_length)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self._shuffled(epoch)
        return int(self._rows[place])

    def _shuffled(self, epoch: int) -> np.ndarray:
        if len(self.buckets) == 1:
            rows = self.buckets[0]
            return rows[rng.permutation(self.seed, "order", epoch, len(rows))]
        steps = []
        for number, rows in enumerate(self.buckets):
            mixed = rows[rng.permutation(self.seed, f"order-{number}", epoch, len(rows))]
            steps.append(np.resize(mixed, (-(-len(rows) // self.batch), self.batch)))  # repeats from the beginning
        together = np.concatenate(steps)
        return together[rng.permutation(self.seed, "order", epoch, len(together))].reshape(-1)
