"""Noise ladders σ_1 > σ_2 > … > σ_L, and NCSNv2's rules to choose them from the data.

NCSN counts from the largest noise, which is level 0 here; σ is in units of the data. Song & Ermon
2020 (arXiv:2006.09011) derive the ladder from two facts: a sample of N(0, σ² I) in D dimensions
lies in a shell of radius about √D σ and thickness about σ/√2, so neighbouring shells must overlap;
and Langevin dynamics at one level moves the variance from the last level's towards its own along a
closed form, which tells the step size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tfdiffusion import _checks

#: Overlap of neighbouring shells in the published ladders, which the paper gives as "about 0.5".
#: CIFAR-10's 232 levels, CelebA's 500, LSUN's 1086 and FFHQ's 2311 all have this one.
PUBLISHED_OVERLAP = 0.567


def check_ladder(sigmas: Sequence[float]) -> np.ndarray:
    """Checks that noise levels fall strictly and are positive.

    Args:
        sigmas: σ_1 > … > σ_L > 0.

    Returns:
        float64 (L,).

    Raises:
        ValueError: If they do not.
    """
    ladder = _checks.array("A ladder", sigmas, "a vector of positive numbers").astype("float64")
    if ladder.ndim != 1 or not ladder.size or (ladder <= 0).any():
        raise ValueError(
            "A ladder must be a vector of positive noise levels, at least one. Received shape "
            f"{ladder.shape}{f' from {ladder.min():g}' if ladder.size else ''}."
        )
    rising = np.flatnonzero(np.diff(ladder) >= 0)
    if rising.size:
        i = int(rising[0])
        raise ValueError(
            f"A ladder must fall strictly, most noise first. It does not from level {i} to level "
            f"{i + 1}: received {ladder[i]:g} and {ladder[i + 1]:g}. Reverse it, or use "
            "score_matching.geometric(sigma_max, sigma_min, num_levels)."
        )
    return ladder


def geometric(sigma_max: float, sigma_min: float, num_levels: int) -> np.ndarray:
    """A ladder of constant ratio (NCSN, arXiv:1907.05600, sec. 4).

    Args:
        sigma_max: σ_1.
        sigma_min: σ_L, below σ_1 and above 0.
        num_levels: L >= 2.

    Returns:
        float64 (L,), falling.

    Raises:
        ValueError: If the numbers are out of range.
    """
    _checks.numbers(sigma_max=sigma_max, sigma_min=sigma_min)
    _checks.integer("num_levels", num_levels, -_checks.LARGEST)  # its range comes with the others
    if not 0.0 < sigma_min < sigma_max or num_levels < 2:
        raise ValueError(
            "A geometric ladder needs 0 < sigma_min < sigma_max and num_levels >= 2. Received "
            f"sigma_max={sigma_max}, sigma_min={sigma_min}, num_levels={num_levels}."
        )
    ladder = np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), int(num_levels)))
    ladder[[0, -1]] = sigma_max, sigma_min
    return ladder


def largest_distance(x, num_examples: int | None = None, seed: int = 0) -> float:
    """The largest Euclidean distance between two examples: technique 1's σ_1.

    With that much noise one can get from any example to any other. The cost grows with the square
    of the number of examples.

    Args:
        x: (N, ...), N >= 2.
        num_examples: look at so many, drawn at random; None for all.
        seed: of that draw.

    Returns:
        The distance, in units of the data.

    Raises:
        ValueError: If there are fewer than two examples.
    """
    flat = _examples(x)
    if num_examples is not None:
        _checks.integer("num_examples", num_examples, 2)
    _checks.integer("seed", seed, 0)
    if num_examples is not None and num_examples < len(flat):
        flat = flat[np.random.default_rng(seed).choice(len(flat), num_examples, replace=False)]
    flat = flat.reshape(len(flat), -1)
    flat = flat - flat.mean(axis=0)  # distances stay, rounding errors shrink
    squares = np.sum(flat**2, axis=1)
    largest = 0.0
    for first in range(0, len(flat), 1024):
        rows = slice(first, first + 1024)
        distances = squares[rows, None] + squares[None] - 2.0 * flat[rows] @ flat.T
        largest = max(largest, float(distances.max()))
    return math.sqrt(largest)


def _examples(x) -> np.ndarray:
    """Two examples or more, float32 (N, ...)."""
    flat = _checks.array("x", x, "numbers of shape (N, ...)")
    if flat.ndim < 2 or len(flat) < 2 or not flat.size:
        raise ValueError(f"A distance needs two examples (N, ...). Received shape {flat.shape}.")
    return flat.astype("float32")


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


def shell_overlap(ratio: float, dimension: int) -> float:
    """How much of one level's shell lies within three deviations of the next one's radius.

    Φ(√(2D)(γ − 1) + 3γ) − Φ(√(2D)(γ − 1) − 3γ) (arXiv:2006.09011, sec. 3.2).

    Args:
        ratio: γ = σ_{i−1}/σ_i, above 1.
        dimension: D of the data, H·W·C for images.

    Returns:
        A share in (0, 1).

    Raises:
        ValueError: If a number is out of range.
    """
    _checks.number("ratio", ratio, "[1, inf)")
    _checks.number("dimension", dimension, "(0, inf)")
    distance = math.sqrt(2.0 * dimension) * (ratio - 1.0)
    return _normal_cdf(distance + 3.0 * ratio) - _normal_cdf(distance - 3.0 * ratio)


def ratio_for(dimension: int, overlap: float = PUBLISHED_OVERLAP) -> float:
    """The ratio γ at which neighbouring shells overlap so much: technique 2.

    Args:
        dimension: D of the data. In few dimensions shells overlap whatever the ratio; D must
            exceed 4.5 for an answer to exist.
        overlap: share in (0, 1).

    Raises:
        ValueError: If there is no such ratio.
    """
    _checks.numbers(dimension=dimension, overlap=overlap)
    if not 0.0 < overlap < 1.0 or dimension <= 4.5:
        raise ValueError(
            "Shells of neighbouring noise levels separate in more than 4 dimensions only, and "
            f"their overlap lies in (0, 1). Received dimension={dimension}, overlap={overlap}. In "
            "few dimensions use geometric(sigma_max, sigma_min, num_levels) with a ratio of 2 or "
            "less."
        )
    low, high = 1.0, 2.0
    while shell_overlap(high, dimension) > overlap:
        high = 2.0 * high
        if high > 1e6:
            raise ValueError(f"No ratio gives an overlap of {overlap} in {dimension} dimensions.")
    for _ in range(80):
        middle = 0.5 * (low + high)
        if shell_overlap(middle, dimension) > overlap:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def for_dimension(
    sigma_max: float, sigma_min: float, dimension: int, overlap: float = PUBLISHED_OVERLAP
) -> np.ndarray:
    """NCSNv2's ladder between two noise levels: technique 2.

    >>> len(for_dimension(50.0, 0.01, 32 * 32 * 3))
    232

    Args:
        sigma_max: σ_1, of the order of the largest distance between two examples.
        sigma_min: σ_L, which one does not see in a sample.
        dimension: D of the data.
        overlap: of neighbouring shells; see `PUBLISHED_OVERLAP`.

    Returns:
        float64 (L,), falling.

    Raises:
        ValueError: If the numbers are out of range.
    """
    geometric(sigma_max, sigma_min, 2)  # looks at the two
    steps = math.log(sigma_max / sigma_min) / math.log(ratio_for(dimension, overlap))
    return geometric(sigma_max, sigma_min, max(round(steps) + 1, 2))


def from_data(
    x,
    sigma_min: float = 0.01,
    *,
    overlap: float = PUBLISHED_OVERLAP,
    num_examples: int | None = 10_000,
    seed: int = 0,
) -> np.ndarray:
    """NCSNv2's ladder from the data alone: techniques 1 and 2.

    Args:
        x: (N, ...), the training examples.
        sigma_min: σ_L; 0.01 in the paper, for images in [0, 1].
        overlap: see `for_dimension`.
        num_examples: how many to compare with each other; see `largest_distance`.
        seed: of their draw.

    Returns:
        float64 (L,), falling.

    Raises:
        ValueError: If the numbers are out of range.
    """
    x = _examples(x)
    dimension = int(np.prod(x.shape[1:]))
    return for_dimension(largest_distance(x, num_examples, seed), sigma_min, dimension, overlap)


def variance_ratio(step_size: float, steps: int, sigma: float, ratio: float) -> float:
    """s_T²/σ²: the variance after T steps at a level, when it began as the last level's.

    On N(0, σ² I) each step x ← x + α s(x) + √(2α) z multiplies the variance's deviation from its
    fixed point b σ² by (1 − α/σ²)² (arXiv:2006.09011, prop. 4):

        s_T²/σ² = (1 − α/σ²)^{2T} (γ² − b) + b,    b = (2α/σ²)/(1 − (1 − α/σ²)²).

    Args:
        step_size: α at that level, in (0, 2σ²).
        steps: T.
        sigma: σ of the level.
        ratio: γ.

    Returns:
        The ratio; 1 would be perfect.

    Raises:
        ValueError: If the step size is not below the limit of stability.
    """
    _checks.number("sigma", sigma, "(0, inf)")
    _checks.number("ratio", ratio, "(0, inf)")
    _checks.numbers(step_size=step_size)
    _checks.integer("steps", steps, 0)
    share = step_size / sigma**2
    if not 0.0 < share < 2.0:
        raise ValueError(
            f"step_size must lie in (0, {2.0 * sigma**2:g}), 2 sigma^2, where Langevin dynamics is "
            f"stable. Received {step_size:g}."
        )
    keep = (1.0 - share) ** 2
    fixed_point = 2.0 * share / (1.0 - keep)
    return keep**steps * (ratio**2 - fixed_point) + fixed_point


def best_step_size(sigmas: Sequence[float], steps: int) -> float:
    """ε of annealed Langevin dynamics, for so many steps a level: technique 4.

    The ε at which `variance_ratio` comes nearest to one. The step at level i is α_i = ε σ_i²/σ_L².

    >>> f"{best_step_size(for_dimension(50.0, 0.01, 3072), steps=5):.1e}"
    '6.2e-06'

    Args:
        sigmas: the ladder. Of a single level, where there is no variance to bring down, ε = 0.1 σ².
        steps: T, as many as one can afford.

    Returns:
        ε, in the convention x + α s + √(2α) z.

    Raises:
        ValueError: If the ladder does not fall, or steps < 1.
    """
    sigmas = check_ladder(sigmas)
    _checks.integer("steps", steps)
    smallest = sigmas[-1]
    if len(sigmas) == 1:
        return 0.1 * smallest**2
    ratio = (sigmas[0] / smallest) ** (1.0 / (len(sigmas) - 1))
    shares = np.exp(np.linspace(math.log(1e-6), 0.0, 100_001))
    keep = (1.0 - shares) ** 2
    fixed_point = 2.0 / (2.0 - shares)
    errors = np.abs(keep**steps * (ratio**2 - fixed_point) + fixed_point - 1.0)
    return float(shares[np.argmin(errors)] * smallest**2)
