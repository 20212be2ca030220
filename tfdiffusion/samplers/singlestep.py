"""EDM's and DPM-Solver's steps: a mean of ε̂ from times on the way, nothing kept for the next step.

d(x/α) = ε̂ d(σ/α) is exact for any process; EDM takes the trapezoid rule in σ/α, DPM-Solver
interpolates along λ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from keras import ops

from tfdiffusion import _checks, random
from tfdiffusion._backend import rows
from tfdiffusion.denoiser import Denoiser
from tfdiffusion.samplers.base import Sampler, SamplerOfOrder, register
from tfdiffusion.samplers.extrapolation import (
    between,
    clean_and_noise,
    log_ratio,
    mean,
    move_noise,
)


@register("heun")
@dataclass(frozen=True)
class Heun(Sampler):
    """EDM's sampler: the trapezoid rule, after some fresh noise (arXiv:2206.00364, alg. 2).

    Args:
        churn: γ ≥ 0; before a step, noise raises σ/α by this share, √2 − 1 at most in the paper,
            and never beyond the process's end. EDM's S_churn is γ times the number of steps.
        churn_from: S_min, the least σ/α at which that happens.
        churn_to: S_max, the largest.
        noise: S_noise, standard deviation of the fresh noise.

    Raises:
        ValueError: If γ or the noise is negative.
    """

    churn: float = 0.0
    churn_from: float = 0.0
    churn_to: float = float("inf")
    noise: float = 1.0

    evaluations = 2

    @property
    def reversible(self) -> bool:
        """Without churn."""
        return self.churn == 0.0

    def __post_init__(self):
        _checks.number("churn", self.churn, "[0, inf)")
        _checks.number("churn_from", self.churn_from, "[0, inf]")
        _checks.number("churn_to", self.churn_to, "[0, inf]")
        _checks.number("noise", self.noise, "[0, inf)")

    def _stirred(self, denoiser: Denoiser, x_t, t, keys):
        """A state with more noise, and its time."""
        process = denoiser.process
        log_snr = process.log_snr(t)
        more = process.inverse_log_snr(log_snr - 2.0 * math.log1p(self.churn))
        level = ops.exp(-0.5 * log_snr)
        chosen = (level >= self.churn_from) & (level <= self.churn_to)
        more = ops.minimum(ops.cast(more, t.dtype), denoiser.latest)
        chosen = chosen & (more > t)
        more = ops.where(chosen, more, t)
        ratio, variance = process.transition(more, t)
        ratio, variance = ops.where(chosen, ratio, 1.0), ops.where(chosen, variance, 0.0)
        fresh = self.noise * random.normal(keys, x_t.shape[1:])
        return rows(ratio, x_t) * x_t + rows(ops.sqrt(variance), x_t) * fresh, more

    def step(self, denoiser: Denoiser, carry: tuple, t, s, keys) -> tuple:
        """See the class."""
        (x_t,) = carry
        if self.churn > 0.0:
            x_t, t = self._stirred(denoiser, x_t, t, keys)
        process = denoiser.process
        x_0, noise = clean_and_noise(denoiser, x_t, t)
        there = denoiser.noise(move_noise(process, x_0, noise, noise, t, s), s)
        return (move_noise(process, x_0, noise, 0.5 * (noise + there), t, s),)


@register("dpm_solver_1", order=1)
@register("dpm_solver_2", order=2)
@register("dpm_solver_3", order=3)
@dataclass(frozen=True)
class DPMSolver(SamplerOfOrder):
    """DPM-Solver of order 1 (DDIM), 2 or 3 (arXiv:2206.00927, alg. 1, 4 and 5).

    A step costs as many evaluations as its order: at 1/2, or at 1/3 and 2/3, of the way in λ.

    Args:
        order: 1, 2 or 3.

    Raises:
        ValueError: If there is no such order.
    """

    order: int = 2

    reversible = True

    highest = 3

    @property
    def evaluations(self) -> int:
        """The order."""
        return self.order

    def step(self, denoiser: Denoiser, carry: tuple, t, s, keys) -> tuple:
        """ε̂ at t and up to two times on the way; the mean of the line through first and last."""
        (x_t,) = carry
        process = denoiser.process
        x_0, noise = clean_and_noise(denoiser, x_t, t)

        def move(mean_noise, to):
            return move_noise(process, x_0, noise, mean_noise, t, to)

        last, place = noise, 0.0
        for k in range(1, self.order):
            u, rise = between(process, t, s, k / self.order)
            x_u = move(noise if k == 1 else _line(noise, last, place, rise), u)
            last, place = denoiser.noise(x_u, u), rise
        if self.order == 1:
            return (move(noise, s),)
        length = log_ratio(process, s) - log_ratio(process, t)
        return (move(_line(noise, last, place, length, at_middle=self.order == 2), s),)


def _line(first, last, place, length, at_middle: bool = False):
    """Mean of ε̂ over a step of a length in λ, on the line through first, at 0, and last."""
    places = (ops.zeros_like(place), place)
    return mean((first, last), places, 0.0, length, length, at_middle=at_middle)
