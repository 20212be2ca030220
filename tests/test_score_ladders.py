"""Noise ladders against NCSNv2's published numbers and its theory."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from tfdiffusion.score_matching import ladders

# What NCSNv2 published (arXiv:2006.09011, table 3 and app. B): D, σ_1, L; σ_L = 0.01 throughout.
PUBLISHED = {
    "cifar10": (3 * 32**2, 50.0, 232),
    "celeba": (3 * 64**2, 90.0, 500),
    "lsun": (3 * 128**2, 190.0, 1086),
    "ffhq": (3 * 256**2, 348.0, 2311),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_numbers_of_levels(name):
    dimension, sigma_max, levels = PUBLISHED[name]
    ladder = ladders.for_dimension(sigma_max, 0.01, dimension)
    assert abs(len(ladder) - levels) <= 0.001 * levels
    assert (ladder[0], ladder[-1]) == (sigma_max, 0.01)
    ratio = (sigma_max / 0.01) ** (1 / (levels - 1))
    assert 0.5 < ladders.shell_overlap(ratio, dimension) < 0.6  # "about 0.5"


def test_cifars_232_levels_and_step_size():
    ladder = ladders.for_dimension(50.0, 0.01, 3072)
    assert len(ladder) == 232
    step_size = ladders.best_step_size(ladder, steps=5)
    assert f"{step_size:.1e}" == "6.2e-06"
    assert ladders.variance_ratio(6.2e-6, 5, 0.01, ladder[0] / ladder[1]) == pytest.approx(
        1.056, abs=1e-3
    )


def test_the_best_step_size_is_the_best():
    ladder = ladders.geometric(10.0, 0.1, 20)
    ratio = ladder[0] / ladder[1]
    for steps in (1, 3, 20):
        best = ladders.best_step_size(ladder, steps)
        errors = [
            abs(ladders.variance_ratio(factor * best, steps, 0.1, ratio) - 1)
            for factor in (0.9, 1.0, 1.1)
        ]
        assert errors[1] == min(errors)
    assert 0 < ladders.best_step_size([0.5], 5) < 0.5


@pytest.mark.parametrize("ratio", [1.1, 1.5])
def test_variance_ratio_is_the_recursion_of_the_chain(ratio):
    """Var(x + α s + √(2α) z) = (1 − α/σ²)² Var x + 2α, step by step."""
    sigma, step_size, variance = 0.7, 0.05, (0.7 * ratio) ** 2
    for steps in range(1, 8):
        variance = (1 - step_size / sigma**2) ** 2 * variance + 2 * step_size
        closed = ladders.variance_ratio(step_size, steps, sigma, ratio)
        assert closed == pytest.approx(variance / sigma**2, rel=1e-9)


def test_shells_overlap_as_their_samples_do():
    """Radii of N(0, σ² I), against three deviations about the neighbour's radius."""
    dimension, ratio, rng = 500, 1.09, np.random.default_rng(0)
    radii = np.linalg.norm(rng.normal(size=(4000, dimension)), axis=1)
    assert radii.mean() == pytest.approx(math.sqrt(dimension), rel=2e-3)
    assert radii.std() == pytest.approx(1 / math.sqrt(2), rel=0.05)
    neighbour, spread = math.sqrt(dimension) * ratio, ratio / math.sqrt(2)
    share = np.mean(np.abs(radii - neighbour) < 3 * spread)
    assert ladders.shell_overlap(ratio, dimension) == pytest.approx(share, abs=0.03)


def test_more_dimensions_need_more_levels():
    ratios = [ladders.ratio_for(d) for d in (10, 100, 784, 3072, 10**5)]
    assert all(a > b > 1 for a, b in itertools.pairwise(ratios))
    assert ladders.shell_overlap(ladders.ratio_for(784, 0.3), 784) == pytest.approx(0.3, abs=1e-6)


def test_largest_distance():
    x = np.random.default_rng(0).normal(size=(300, 5)).astype("float32") + 100.0
    assert ladders.largest_distance(x) == pytest.approx(pdist(x).max(), rel=1e-4)
    part = ladders.largest_distance(x, num_examples=30)
    assert 0 < part <= ladders.largest_distance(x) * (1 + 1e-5)
    assert part == ladders.largest_distance(x, num_examples=30)
    two = np.zeros((2, 2, 2, 1), "float32")
    two[1] = 1.0
    assert ladders.largest_distance(two) == pytest.approx(2.0)


def test_from_data():
    x = np.random.default_rng(0).uniform(-1, 1, size=(100, 6, 6, 1)).astype("float32")
    ladder = ladders.from_data(x, 0.02)
    assert ladder[0] == pytest.approx(pdist(x.reshape(100, -1)).max(), rel=1e-4)
    assert ladder[-1] == 0.02
    assert ladder[0] / ladder[1] == pytest.approx(ladders.ratio_for(36), rel=0.05)


def test_geometric():
    ladder = ladders.geometric(4.0, 0.25, 5)
    np.testing.assert_allclose(ladder, [4.0, 2.0, 1.0, 0.5, 0.25])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ladders.check_ladder([1.0, 2.0]), "must fall strictly, most noise first"),
        (lambda: ladders.check_ladder([3.0, 1.0, 1.0]), "from level 1 to level 2: received"),
        (lambda: ladders.check_ladder([1.0, -0.5]), "positive noise levels"),
        (lambda: ladders.check_ladder([]), "at least one"),
        (lambda: ladders.check_ladder([[1.0], [0.5]]), "vector"),
        (lambda: ladders.geometric(1.0, 2.0, 5), "0 < sigma_min < sigma_max"),
        (lambda: ladders.geometric(1.0, 0.1, 1), "num_levels >= 2"),
        (lambda: ladders.largest_distance(np.zeros((1, 3))), "two examples"),
        (lambda: ladders.ratio_for(2), "In few dimensions use geometric"),
        (lambda: ladders.ratio_for(100, 1.5), "overlap=1.5"),
        (lambda: ladders.variance_ratio(0.5, 5, 0.5, 1.1), r"must lie in \(0, 0.5\), 2 sigma\^2"),
        (lambda: ladders.best_step_size([1.0, 0.1], 0), "steps must be an integer >= 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
