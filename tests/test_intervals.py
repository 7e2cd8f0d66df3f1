"""Whether 95 % intervals hold the truth 95 % of the time, on features whose true distances are known."""

import numpy as np
import pytest

from src.metrics.distances import frechet_estimate, set_distances
from src.metrics.frechet import moments
from src.metrics.intervals import GROUPS, bootstrap_ci, groups, jackknife, metric, paired_metric

WIDTH = 12


class World:
    """Two methods and a reference as normal features of known moments. The second method errs half as much, with the
    reference's own features in place of half of its own; a picture of both comes from one condition."""

    def __init__(self, width: int, flat: bool):
        rng = np.random.default_rng(width)
        spectrum = np.ones(width) if flat else 1 / np.arange(1, width + 1)
        turn = np.linalg.qr(np.eye(width) + 0.3 * rng.normal(size=(width, width)))[0]
        self.mix_a = np.diag(np.sqrt(spectrum))
        self.mix_b = (turn * np.sqrt(spectrum * np.linspace(0.5, 2, width))) @ turn.T
        self.mean_a = np.full(width, 0.3) / np.sqrt(width)
        self.mix_c, self.mean_c = (self.mix_a + self.mix_b) / 2, self.mean_a / 2

    def draw(self, key: int, n: int, m: int):
        rng = np.random.default_rng([key, n, m])
        common = rng.normal(size=(n, len(self.mean_a)))
        reference = rng.normal(size=(m, len(self.mean_a))) @ self.mix_b.T
        return common @ self.mix_a.T + self.mean_a, common @ self.mix_c.T + self.mean_c, reference

    def truths(self) -> dict[str, float]:
        frechet = [self._frechet(m, x) for m, x in ((self.mean_a, self.mix_a), (self.mean_c, self.mix_c))]
        kernel = [self._kernel(m, x) for m, x in ((self.mean_a, self.mix_a), (self.mean_c, self.mix_c))]
        return {"fid": frechet[0], "fid gap": frechet[0] - frechet[1], "kid": kernel[0], "kid gap": kernel[0] - kernel[1]}

    def _frechet(self, mean, mix):
        cov_a, cov_b = mix @ mix.T, self.mix_b @ self.mix_b.T
        values = np.linalg.eigvals(cov_a @ cov_b).real
        return mean @ mean + np.trace(cov_a + cov_b) - 2 * np.sqrt(values).sum()

    def _kernel(self, mean, mix):
        zero = np.zeros_like(mean)
        own, ref = (mean, mix @ mix.T), (zero, self.mix_b @ self.mix_b.T)
        return _mean_kernel(own, own) + _mean_kernel(ref, ref) - 2 * _mean_kernel(own, ref)


def _mean_kernel(one, two):
    """E (x.y / F + 1)^3 of independent normal x and y: by the moments of x.y, to the third."""
    (a, cov_a), (b, cov_b) = one, two
    first, width = a @ b, len(a)
    second = np.trace((cov_a + np.outer(a, a)) @ (cov_b + np.outer(b, b)))
    third = first**3 + 3 * first * (a @ cov_b @ a + b @ cov_a @ b + np.trace(cov_a @ cov_b)) + 6 * a @ cov_b @ cov_a @ b
    return 1 + 3 * first / width + 3 * second / width**2 + third / width**3


def coverage(world: World, n: int, m: int, repetitions: int) -> dict[str, tuple[int, int]]:
    """quantity -> (intervals that hold the truth, intervals that there are)."""
    truths, held = world.truths(), dict.fromkeys(world.truths(), (0, 0))
    for key in range(repetitions):
        one, two, reference = world.draw(key, n, m)
        a, b = set_distances(one, reference), set_distances(two, reference)
        entries, gaps = a.entries(""), a.entries_minus(b, "")
        found = {"fid": entries["fid"], "fid gap": gaps["fid"], "kid": entries["kid"], "kid gap": gaps["kid"]}
        for name, entry in found.items():
            if entry["ci95"] is not None:
                low, high = entry["ci95"]
                held[name] = held[name][0] + (low <= truths[name] <= high), held[name][1] + 1
    return held


def test_intervals_cover_about_95_percent():
    """120 repetitions in all: 95 % of n has a standard deviation of sqrt(0.0475 n), and four of them are allowed below."""
    total = {}
    for flat, n, m in ((False, 96, 96), (True, 96, 96), (False, 72, 240)):
        for name, (held, there) in coverage(World(WIDTH, flat), n, m, 40).items():
            before = total.get(name, (0, 0))
            total[name] = before[0] + held, before[1] + there
    for name, (held, there) in total.items():
        assert there > 90, (name, there)
        assert held >= 0.95 * there - 4 * np.sqrt(0.0475 * there), (name, held, there)
    assert any(held < there for held, there in total.values()), "intervals that always cover are too wide"


def test_the_number_itself_is_biased_and_its_interval_is_not():
    world = World(WIDTH, True)
    truth = world.truths()["fid"]
    found = [frechet_estimate(*world.draw(key, 96, 96)[::2]) for key in range(20)]
    assert min(f.value for f in found) > truth, "the plain number is above the truth every time"
    centres = [np.mean(f.left_out.ci95) for f in found]
    assert abs(np.mean(centres) - truth) < 4 * np.std(centres, ddof=1) / 20**0.5
    assert all(f.ci95 is None or f.ci95[0] < f.value for f in found)


def test_a_paired_difference_is_sharper_than_two_numbers():
    world = World(WIDTH, False)
    one, two, reference = world.draw(0, 200, 200)
    a, b = set_distances(one, reference), set_distances(two, reference)
    shuffled = set_distances(two[np.random.default_rng(0).permutation(200)], reference)
    for name in ("fid", "kid"):
        paired, unpaired = (np.diff(a.entries_minus(x, "")[name]["ci95"])[0] for x in (b, shuffled))
        assert paired < 0.8 * unpaired, name
    rng = np.random.default_rng(1)
    hard = rng.normal(size=300) * 3  # what is hard is hard for both
    better, worse = hard + 0.2 + 0.3 * rng.normal(size=300), hard + 0.3 * rng.normal(size=300)
    gap = paired_metric(better, worse, "dB", "higher")
    assert gap["ci95"][0] > 0
    assert gap["value"] == pytest.approx(better.mean() - worse.mean())
    assert np.diff(gap["ci95"])[0] < 0.2 * np.diff(metric(better, "dB", "higher")["ci95"])[0]
    assert gap["ci95"] == list(bootstrap_ci(better - worse))
    with pytest.raises(ValueError, match="as many conditions"):
        paired_metric(better, worse[1:], "dB", "higher")


def test_where_rows_are_too_few_there_is_no_interval():
    world = World(40, True)
    one, two, reference = world.draw(0, 60, 60)  # 1.5 rows per feature
    few = set_distances(one, reference)
    assert few.fid.ci95 is None
    assert few.entries("")["kid"]["ci95"] is not None
    one, two, reference = world.draw(0, 30, 30)
    fewer = set_distances(one, reference)
    assert fewer.entries_minus(set_distances(two, reference), "")["fid"]["ci95"] is None
    assert fewer.fid.left_out is None


def test_a_reference_of_moments_is_taken_as_it_is():
    """The interval is of the distance to this reference: it holds the distance of the true moments to it."""
    world, held, there = World(WIDTH, False), 0, 0
    for key in range(40):
        one, _, reference = world.draw(key, 96, 96)
        fixed = moments(reference)
        true = World(WIDTH, False)
        gap, cov = true.mean_a - fixed.mean_F, true.mix_a @ true.mix_a.T
        roots = np.sqrt(np.maximum(np.linalg.eigvals(cov @ fixed.cov_FF).real, 0)).sum()
        truth = gap @ gap + np.trace(cov) + np.trace(fixed.cov_FF) - 2 * roots
        ci95 = frechet_estimate(one, fixed).ci95
        if ci95 is not None:
            held, there = held + (ci95[0] <= truth <= ci95[1]), there + 1
    assert there >= 30
    assert held >= 0.95 * there - 4 * np.sqrt(0.0475 * there)


def test_the_jackknife_is_exact_for_what_it_is_made_for():
    values = np.random.default_rng(0).normal(size=20 * GROUPS)
    of = groups(len(values))
    assert np.bincount(of).tolist() == [20] * GROUPS
    assert np.array_equal(of, groups(len(values)))
    assert not np.array_equal(of, groups(len(values), seed=1))
    mean = jackknife(lambda g: float(values[of != g].mean()) if g is not None else float(values.mean()))
    assert mean.centre == pytest.approx(values.mean())
    assert mean.error == pytest.approx(values.reshape(-1).std(ddof=1) / len(values) ** 0.5, rel=0.5)
    biased = jackknife(lambda g: float((values if g is None else values[of != g]).var()))
    assert biased.centre == pytest.approx(values.var(ddof=1), rel=1e-3)  # the variance over N has a bias of 1 / N
    assert biased.minus(biased).ci95 == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(("n", "m"), [(32, 32), (64, 64), (128, 128), (512, 512), (64, 640)])
def test_the_coverage_that_is_stated(flat, n, m):
    """400 repetitions at F = 16; the shares that this gave stand in `src.metrics.distances.interval`."""
    found = coverage(World(16, flat), n, m, 400)
    print(f"flat={flat} n={n} m={m}", {k: f"{h / max(t, 1):.3f} of {t}" for k, (h, t) in found.items()})
    for name, (held, there) in found.items():
        if there >= 40:
            assert held >= 0.95 * there - 4 * np.sqrt(0.0475 * there) - 0.03 * there, (name, held, there)
