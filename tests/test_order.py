"""The order of training images, with one size and with several."""

import numpy as np
import pytest

from src import rng
from src.data.order import StreamOrder

SIZES = (7, 30, 1)
BUCKETS = [np.arange(0, 7), np.arange(7, 37), np.array([37])]


def rows_of(order, count, start=0):
    return [order.row(n) for n in range(start, start + count)]


def test_one_bucket_is_a_fresh_permutation_each_epoch():
    order = StreamOrder(3, [np.arange(10)], batch=4)
    first, second = rows_of(order, 10), rows_of(order, 10, start=10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first == list(rng.permutation(3, "order", 0, 10))


def test_every_step_is_of_one_bucket_and_every_image_is_seen_each_epoch():
    order = StreamOrder(0, BUCKETS, batch=4)
    assert order.epoch_length == 8 + 32 + 4
    for epoch in range(3):
        seen = rows_of(order, order.epoch_length, start=epoch * order.epoch_length)
        assert set(seen) == set(range(38))
        counts = np.bincount(seen, minlength=38)
        assert counts[:37].max() == 2  # whoever fills up a step
        assert counts[37] == 4
        for step in np.reshape(seen, (-1, 4)):
            assert sum(bool(set(step) & set(bucket)) for bucket in BUCKETS) == 1


def test_the_steps_of_all_buckets_are_mixed():
    order = StreamOrder(0, BUCKETS, batch=4)
    kinds = [next(k for k, b in enumerate(BUCKETS) if row in b) for row in rows_of(order, order.epoch_length)[::4]]
    assert kinds != sorted(kinds)
    assert kinds != [next(k for k, b in enumerate(BUCKETS) if r in b) for r in rows_of(order, 44, start=44)[::4]]


@pytest.mark.parametrize("start", [0, 13, 44, 90])
def test_a_position_means_the_same_row_wherever_one_begins(start):
    whole = rows_of(StreamOrder(5, BUCKETS, batch=4), 140)
    assert rows_of(StreamOrder(5, BUCKETS, batch=4), 30, start) == whole[start : start + 30]
