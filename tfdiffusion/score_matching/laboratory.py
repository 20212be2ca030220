"""Experiments in the plane, where scores can be looked at and held against the exact ones.

Of any set of points, the density smoothed with N(0, σ² I) is a mixture with a Gaussian at each of
them, so its score is known at every σ: it is what denoising score matching on these points learns
in the end. Of the mixtures of `tfdiffusion.exact` the score is that of the true density.

>>> points = tfd.data.toy("swiss_roll", 2000)
>>> exact = exact_score(points, sigmas)
>>> field_error(model, exact, level=3, x=points)  # 0 is perfect, 1 is no better than no score
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from keras import ops

from tfdiffusion import _backend, _checks, random
from tfdiffusion.exact import GaussianMixture
from tfdiffusion.processes import Tabulated
from tfdiffusion.score_matching import langevin
from tfdiffusion.score_matching.ladders import check_ladder, geometric


def exact_score(data, sigmas: Sequence[float]) -> Callable:
    """The score of smoothed data at every level of a ladder.

    Args:
        data: points (N, D), or an `exact.GaussianMixture`, of which only means, variances and
            weights are looked at.
        sigmas: the ladder, falling.

    Returns:
        (x, level) → ∇ log q_σ(x), (B, D), for an integer level or scalar tensor; 0 is the largest
        σ.

    Raises:
        ValueError: If the points are not (N, D) or the ladder does not fall.
    """
    sigmas = check_ladder(sigmas)
    chain = Tabulated.from_sigmas(sigmas[::-1])
    if isinstance(data, GaussianMixture):
        mixture = GaussianMixture(data.means, data.variances, data.weights, process=chain)
    else:
        mixture = GaussianMixture(data, variances=0.0, process=chain)
    levels = len(sigmas)

    def score(x, level):
        return mixture.score(x, (levels - ops.cast(level, "float32")) / levels)

    return score


def field_error(model, exact: Callable, level: int, x) -> float:
    """How far a learned field is from the exact one: √(E‖s − s*‖²/E‖s*‖²) over points.

    Args:
        model: a `ScoreModel`.
        exact: (x, level) → score; see `exact_score`.
        level: which.
        x: float (N, D), where to look: points of the data *with the noise of the level*, as
            elsewhere the model has learned nothing.

    Returns:
        0 for the exact field, 1 for no field at all.

    Raises:
        ValueError: If the level is none, or the points are not finite.
    """
    x = ops.convert_to_numpy(_checks.examples("x", x))
    _checks.integer("level", level, 0)
    true = ops.convert_to_numpy(exact(x, level))
    learned = ops.convert_to_numpy(model.score(x, level))
    return float(np.sqrt(np.sum((learned - true) ** 2) / np.sum(true**2)))


@dataclass(frozen=True)
class UnequalModes:
    """What two ways of sampling made of a mixture of unequal modes.

    Attributes:
        truth: share of the second mode.
        plain: its share among the samples of plain Langevin dynamics.
        annealed: and of annealed Langevin dynamics.
        plain_samples: float32 (num, 2).
        annealed_samples: float32 (num, 2).
        error: standard error of the shares.
    """

    truth: float
    plain: float
    annealed: float
    plain_samples: np.ndarray
    annealed_samples: np.ndarray
    error: float


def unequal_modes(num: int = 2000, weights: Sequence[float] = (1, 4), seed: int = 0):
    """The mixture whose weights plain Langevin dynamics cannot see (arXiv:1907.05600, sec. 3.2.2).

    Two Gaussians far apart, with their exact score. Near either of them the score is that of this
    one alone, whatever the weights: chains that begin evenly spread end in equal parts at both.
    With enough noise the two overlap, and the annealed chains divide as they should.

    Args:
        num: chains.
        weights: of the two modes.
        seed: of the noise.

    Returns:
        `UnequalModes`.

    Raises:
        ValueError: If the weights are not two positive numbers.
    """
    _checks.integer("num", num)
    _checks.integer("seed", seed, 0)
    weights = _checks.array("weights", weights, "two positive numbers", rank=1)
    if len(weights) != 2:
        raise ValueError(f"weights must be two positive numbers. Received {weights}.")
    sigmas = geometric(8.0, 0.1, 24)
    mixture = GaussianMixture([[-4.0, -4.0], [4.0, 4.0]], 0.25, weights)
    score, last = exact_score(mixture, sigmas), len(sigmas) - 1
    keys = random.keys(np.arange(num, dtype=np.int64) + seed)
    start = np.random.default_rng(seed).uniform(-8, 8, size=(num, 2)).astype("float32")
    plain = langevin.langevin(
        lambda x: score(x, last),
        start,
        keys,
        step_size=0.05,
        steps=400,
        convention="ncsnv2",
        smallest_sigma=0.5,
    )

    def anneal(keys):
        noise = langevin.noise_of(keys, (2,))
        step_size = 0.2 * sigmas[-1] ** 2
        return langevin.annealed(score, sigmas, noise, step_size=step_size, steps_per_level=20)

    annealed = _backend.compiled(anneal, ())(keys)
    plain, annealed = (ops.convert_to_numpy(x) for x in (plain, annealed))
    truth = float(mixture.weights[1])
    return UnequalModes(
        truth=truth,
        plain=float((plain.sum(-1) > 0).mean()),
        annealed=float((annealed.sum(-1) > 0).mean()),
        plain_samples=plain,
        annealed_samples=annealed,
        error=float(np.sqrt(truth * (1 - truth) / num)),
    )
