"""DPM-Solver: exponential Runge–Kutta steps for ε̂, which keep nothing from one to the next."""

from __future__ import annotations

from dataclasses import dataclass

from tfdiffusion.denoiser import Denoiser
from tfdiffusion.samplers.base import Sampler, register
from tfdiffusion.samplers.extrapolation import (
    EXACT,
    MIDDLE,
    between,
    clean_and_noise,
    log_ratio,
    mean,
    move_noise,
)


@register("dpm_solver_1", order=1)
@register("dpm_solver_2", order=2)
@register("dpm_solver_3", order=3)
@dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver of order 1 (DDIM), 2 or 3 (arXiv:2206.00927, alg. 1, 4 and 5).

    A step costs as many evaluations as its order: at 1/2, or at 1/3 and 2/3, of the way in λ.

    Args:
        order: 1, 2 or 3.

    Raises:
        ValueError: If there is no such order.
    """

    order: int = 2

    def __post_init__(self):
        if self.order not in (1, 2, 3):
            raise ValueError(f"DPMSolver has orders 1 to 3. Received order={self.order!r}.")

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
            x_u = move(noise if k == 1 else _line(noise, last, place, rise, EXACT), u)
            last, place = denoiser.noise(x_u, u), rise
        if self.order == 1:
            return (move(noise, s),)
        length = log_ratio(process, s) - log_ratio(process, t)
        quadrature = MIDDLE if self.order == 2 else EXACT
        return (move(_line(noise, last, place, length, quadrature), s),)


def _line(first, last, place, length, quadrature):
    """Mean of ε̂ over a step of a length in λ, on the line through first, at 0, and last."""
    return mean((first, last), (0.0 * place, place), 0.0, length, length, quadrature)
