"""Runge–Kutta methods for the probability-flow ODE.

Scaled to z = x/√(α² + σ²), every process moves along one circle, z = cos φ x_0 + sin φ ε with
tan φ = σ/α, and its flow is (Salimans & Ho 2022, arXiv:2202.00512, app. D)

    dz/dφ = v̂ = cos φ ε̂ − sin φ x̂_0 = (cos φ z − x̂_0)/sin φ.

φ runs from π/2 at most to 0 at least, v̂ is of the size of the data, and nothing is infinite where
there is no signal. This is EDM's general form (Karras et al. 2022, arXiv:2206.00364, alg. 1) with
scale cos φ and noise level tan φ; its own choice, 1 and σ, is the same thing for small σ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from keras import ops

from tfdiffusion import _checks, _states
from tfdiffusion._backend import rows
from tfdiffusion.denoiser import Denoiser
from tfdiffusion.processes import Process
from tfdiffusion.samplers.base import Sampler, register

_TINY = 1e-12


@register("euler")
@dataclass(frozen=True)
class Euler(Sampler):
    """x_s = x_t − (t − s) dx/dt, in the process's own time (arXiv:2011.13456, eq. 13).

    On a rectified flow that is DDIM.
    """

    reversible = True

    def step(self, denoiser: Denoiser, carry: tuple, t, s, keys) -> tuple:
        """See the class."""
        (x_t,) = carry
        return (x_t - rows(t - s, x_t) * denoiser.velocity(x_t, t),)


def _angle(process: Process, t):
    """φ = atan2(σ, α)."""
    return ops.arctan2(process.sigma(t), process.alpha(t))


def _time(process: Process, phi):
    """The time at which the angle is φ; on a chain the nearest."""
    cosine, sine = ops.maximum(ops.cos(phi), _TINY), ops.maximum(ops.sin(phi), _TINY)
    return process.inverse_log_snr(2.0 * (ops.log(cosine) - ops.log(sine)))


def _scale(process: Process, t):
    return ops.sqrt(process.alpha(t) ** 2 + process.sigma(t) ** 2)


def _velocity(denoiser: Denoiser, z, phi):
    """dz/dφ at angles () or (B,)."""
    t = _time(denoiser.process, phi)
    x_0 = denoiser(rows(_scale(denoiser.process, t), z) * z, t)
    return (rows(ops.cos(phi), z) * z - x_0) / rows(ops.sin(phi), z)


class _Tableau:
    """Coefficients of an explicit Runge–Kutta method (Butcher's tableau).

    Args:
        matrix: rows of a, from the second stage on; c are their sums.
        weights: b, of the result.
        error: b − b̂ with the weights of the result to compare with, if there is one.
    """

    def __init__(self, matrix, weights, error=None):
        self.count = len(weights)
        self.a = np.zeros((self.count, self.count))
        for i, row in enumerate(matrix, start=1):
            self.a[i, : len(row)] = row
        self.c = self.a.sum(axis=1)
        self.b = np.array(weights)
        self.error = None if error is None else np.array(error)


_CLASSICAL = _Tableau([[1 / 2], [0, 1 / 2], [0, 0, 1]], [1 / 6, 1 / 3, 1 / 3, 1 / 6])
# Dormand & Prince (1980), RK5(4)7M. The last stage is at the result.
_DORMAND_PRINCE = _Tableau(
    [
        [1 / 5],
        [3 / 40, 9 / 40],
        [44 / 45, -56 / 15, 32 / 9],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
    ],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0],
    [71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40],
)


def _stages(denoiser: Denoiser, tableau: _Tableau, z, phi, h, first):
    """The slopes k_1 … k_S, (S, B, ...), given k_1: one denoiser in the graph, whatever S."""
    a, c = ops.cast(tableau.a, z.dtype), ops.cast(tableau.c, phi.dtype)
    rest = ops.zeros_like(ops.broadcast_to(z[None], (tableau.count - 1, *ops.shape(z))))

    def add(i, slopes):
        inner = z + rows(h, z) * ops.tensordot(a[i], slopes, axes=1)
        slope = _velocity(denoiser, inner, phi + c[i] * h)
        return _states.put(slopes, i, slope)

    return ops.fori_loop(1, tableau.count, add, ops.concatenate([first[None], rest]))


def _combined(weights, slopes):
    return ops.tensordot(ops.cast(weights, slopes.dtype), slopes, axes=1)


@register("rk4")
@dataclass(frozen=True)
class RK4(Sampler):
    """The classical Runge–Kutta method, of order 4."""

    evaluations = 4
    reversible = True

    def step(self, denoiser: Denoiser, carry: tuple, t, s, keys) -> tuple:
        """See the class."""
        (x_t,) = carry
        process = denoiser.process
        z, begin = x_t / rows(_scale(process, t), x_t), _angle(process, t)
        h = _angle(process, s) - begin
        first = _velocity(denoiser, z, begin)
        slopes = _stages(denoiser, _CLASSICAL, z, begin, h, first)
        z = z + rows(h, z) * _combined(_CLASSICAL.b, slopes)
        return (rows(_scale(process, s), z) * z,)


@register("rk45")
@dataclass(frozen=True)
class RK45(Sampler):
    """Dormand and Prince's method of order 5 with steps of its own choice.

    Each sample has its own steps, so that it does not depend on its batch. The grid's times are
    only where it stops on its way: two will do, such as `steps=2`. A sample whose steps would need
    more evaluations than allowed is NaN, and `sample` says so.

    Args:
        rtol: error of a step, relative to z, which is about 1.
        atol: error of a step, absolute.
        max_evaluations: a sample.

    Raises:
        ValueError: If a number is out of range.
    """

    rtol: float = 1e-4
    atol: float = 1e-4
    max_evaluations: int = 1000

    def __post_init__(self):
        _checks.number("rtol", self.rtol, "(0, inf)")
        _checks.number("atol", self.atol, "(0, inf)")
        _checks.integer("max_evaluations", self.max_evaluations, 7)

    def start(self, x_t, evaluations=None) -> tuple:
        """x, the next step in φ, evaluations so far, and the time reached, one a sample."""
        each = ops.zeros_like(ops.reshape(x_t, (ops.shape(x_t)[0], -1))[:, 0])
        return x_t, each + 0.05, ops.cast(each, "int32"), each + 1.0, each < 1.0

    def step(self, denoiser: Denoiser, carry: tuple, t, s, keys) -> tuple:
        """As many steps as the tolerance asks for, the last of them to s."""
        x_t, size, count, *_ = carry
        process, tableau = denoiser.process, _DORMAND_PRINCE
        z, end = x_t / rows(_scale(process, t), x_t), _angle(process, s)
        phi = ops.broadcast_to(_angle(process, t), ops.shape(size))

        def active(phi, count):
            return (phi > end) & (count + 6 <= self.max_evaluations)

        def attempt(z, phi, size, count, first):
            on = active(phi, count)
            left = phi - end
            h = ops.where(on, ops.minimum(ops.cast(size, phi.dtype), left), 0.0)
            slopes = _stages(denoiser, tableau, z, phi, -h, first)
            new = z - rows(h, z) * _combined(tableau.b, slopes)
            error = rows(h, z) * _combined(tableau.error, slopes)
            allowed = self.atol + self.rtol * ops.maximum(ops.abs(z), ops.abs(new))
            flat = ops.reshape(error / allowed, (ops.shape(z)[0], -1))
            error = ops.maximum(ops.sqrt(ops.mean(flat**2, axis=-1)), 1e-10)
            accepted = on & (error <= 1.0)
            size = ops.where(on, ops.cast(h, size.dtype) * _growth(error), size)
            phi = ops.where(accepted, ops.where(h < left, phi - h, end), phi)
            chosen = ops.reshape(accepted, (-1,) + (1,) * (len(z.shape) - 1))
            first = ops.where(chosen, slopes[-1], first)
            return ops.where(chosen, new, z), phi, size, count + 6 * ops.cast(on, "int32"), first

        z, phi, size, count, _ = ops.while_loop(
            lambda z, phi, size, count, first: ops.any(active(phi, count)),
            attempt,
            (z, phi, size, count + 1, _velocity(denoiser, z, phi)),
        )
        finished = phi <= end
        reached = ops.where(finished, s, ops.cast(_time(process, phi), s.dtype))
        x_s = rows(_scale(process, s), z) * z
        x_s = ops.where(ops.reshape(finished, (-1,) + (1,) * (len(z.shape) - 1)), x_s, float("nan"))
        return x_s, size, count, ops.cast(reached, size.dtype), finished

    def report(self, carry: tuple, steps) -> dict:
        """Evaluations (B,), the time that each sample reached (B,), and whether it is the last."""
        _, _, count, reached, finished = carry
        return {"evaluations": count, "reached": reached, "finished": finished}

    def check(self, report: dict) -> None:
        """Raises a RuntimeError if the tolerance could not be met, with how far it got."""
        failed = ~ops.convert_to_numpy(report["finished"])
        if failed.any():
            reached = ops.convert_to_numpy(report["reached"])[failed].max()
            raise RuntimeError(
                f"RK45 got no further than t = {reached:.4g} in {self.max_evaluations} evaluations "
                f"({failed.sum()} of {failed.size} samples). Allow more with max_evaluations, or "
                f"larger errors than rtol={self.rtol:g} and atol={self.atol:g}."
            )


def _growth(error):
    """Factor of the step for an error, in units of what is allowed (order 5, safety 0.9)."""
    return ops.clip(0.9 * error**-0.2, 0.2, 5.0)
