"""Noise levels for a given number of evaluations, optimised on data whose solution is known.

On N(0, v) the denoiser is a factor, x̂_0 = v/(v + (σ/α)²) · x/α, so a run of DPM-Solver++ 2M is a
product of factors, and its error is known for every v without drawing a sample. Images and mixtures
are made of Gaussians of many scales; the levels are those with the least squared error over scales
from 1e-3 to the whole variance of the data, 1. Optimising the grid for a solver and a number of
steps is the idea of Xue et al. 2024 (arXiv:2402.17376) and Sabour et al. 2024 (arXiv:2404.14507),
which take a bound and a network for what is a closed form here.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np

#: Beyond this many evaluations the shape no longer changes much.
MOST = 32
_START = 148.0  # σ/α of the first level, for which any that leaves only noise will do
_VARIANCES = np.geomspace(1e-3, 1.0, 25)
_HIGH, _LOW = np.geomspace(2.0, _START, 12), np.geomspace(2e-3, 0.6, 16)
_RHO = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0)


def _levels(count: int, high: float, low: float, rho: float) -> np.ndarray:
    """The first level, then what EDM's formula (arXiv:2206.00364, eq. 5) gives after `high`."""
    roots = np.linspace(high ** (1.0 / rho), low ** (1.0 / rho), count)
    return np.concatenate([[_START], roots[1:] ** rho])


def _errors(levels: np.ndarray) -> np.ndarray:
    """Relative error of DPM-Solver++ 2M on N(0, v), for levels (C, N) and each v: (C, K)."""
    rises = np.diff(-np.log(levels), axis=1)[..., None]
    gains = _VARIANCES / (_VARIANCES + levels[..., None] ** 2)  # (C, N, K)
    x = np.ones_like(gains[:, 0])  # x/α
    x_0 = last = gains[:, 0] * x
    for k in range(rises.shape[1]):
        x_0 = gains[:, k] * x
        bend = 0.5 * rises[:, k] / rises[:, k - 1] * (x_0 - last) if k else 0.0
        kept = np.exp(-rises[:, k])
        x, last = kept * x + (1.0 - kept) * (x_0 + bend), x_0
    exact = np.sqrt(_VARIANCES / (_VARIANCES + levels[:, :1] ** 2))
    return gains[:, -1] * x / exact - 1.0


@functools.cache
def shape(count: int) -> tuple[float, float, float]:
    """(high, low, ρ) of the best levels for a number of evaluations, at most `MOST`.

    The first level is that of pure noise, the others lie between high (left out) and low at equal
    distances of (σ/α)^(1/ρ).
    """
    if count == 1:
        return _START, _START, 1.0
    shapes = list(itertools.product(_HIGH, _LOW, _RHO))
    errors = _errors(np.array([_levels(count, *some) for some in shapes]))
    return shapes[int(np.argmin(np.sum(_VARIANCES * errors**2, axis=1)))]
