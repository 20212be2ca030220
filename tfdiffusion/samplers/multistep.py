"""Multistep solvers: one evaluation a step, and the polynomial through the last few answers.

| name          | interpolates | along       | mean over the step | source                         |
|---------------|--------------|-------------|--------------------|--------------------------------|
| dpmpp_2m      | x̂_0          | λ           | at its middle      | Lu et al. 2022, 2211.01095     |
| dpmpp_3m      | x̂_0          | λ           | exact              | the same                       |
| sde_dpmpp_2m  | x̂_0          | λ           | at its middle      | the same, with fresh noise     |
| unipc_2, _3   | x̂_0          | λ           | exact              | Zhao et al. 2023, 2302.04867   |
| deis          | ε̂            | λ           | exact              | Zhang & Chen 2022, 2204.13902  |
| lms           | ε̂            | σ/α         | exact              | Adams–Bashforth                |
| plms          | ε̂            | step number | exact              | Liu et al. 2022, 2202.09778    |

They begin with order 1 and gain one with every step, so any number of steps will do; `FAR` places
in the history do that without a branch.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

from keras import ops

from tfdiffusion import _backend, random
from tfdiffusion._backend import rows
from tfdiffusion.denoiser import Denoiser
from tfdiffusion.processes import Process
from tfdiffusion.samplers.base import Sampler, register
from tfdiffusion.samplers.extrapolation import (
    EXACT,
    FAR,
    MIDDLE,
    finished,
    log_ratio,
    mean,
    move_clean,
    move_noise,
)


def _far(i: int):
    return ops.convert_to_tensor((i + 1) * FAR, _backend.TIME_DTYPE)


def _nothing_yet(x_t, count: int) -> tuple:
    """(values, places) of an empty history."""
    return (ops.zeros_like(x_t),) * count, tuple(_far(i) for i in range(count))


def _rise(process: Process, t, s):
    """λ_s − λ_t."""
    return log_ratio(process, s) - log_ratio(process, t)


def _with_now(places: tuple, length) -> tuple:
    """Places of the present value, 0, and of earlier ones, in the precision of the step."""
    return tuple(ops.cast(place, length.dtype) for place in (0.0, *places))


def _seen_from(new, places) -> tuple:
    """Places on a clock whose zero moves to `new`."""
    return tuple(ops.cast(place - new, _backend.TIME_DTYPE) for place in places)


def _check_order(sampler: Sampler, most: int) -> None:
    if sampler.order not in range(1, most + 1):
        raise ValueError(
            f"{type(sampler).__name__} has orders 1 to {most}. Received order={sampler.order!r}."
        )


class _Multistep(Sampler):
    """Carries x; earlier values, and their places on a clock that now stands at 0; and for the end
    the last x̂_0, and what λ has risen by since.
    """  # noqa: D205

    order: int
    #: Whether the way is smooth, so that its end can be foreseen.
    smooth = True

    def start(self, x_t) -> tuple:
        """No values yet."""
        values, places = _nothing_yet(x_t, self.order - 1)
        return x_t, values, places, ops.zeros_like(x_t), -_far(0)

    def length(self, process: Process, t, s):
        """Of the step from t to s on the clock, positive; here λ."""
        return _rise(process, t, s)

    @abc.abstractmethod
    def move(self, denoiser: Denoiser, x_t, x_0, past: tuple, places: tuple, t, s, keys):
        """(x_s, value at t), given x̂_0, earlier values, and the places of that value and these."""

    def step(self, denoiser: Denoiser, carry: tuple, t, s, keys) -> tuple:
        """One evaluation; the history moves on by one."""
        x_t, past, places, *_ = carry
        process, count = denoiser.process, self.order - 1
        length = self.length(process, t, s)
        places = _with_now(places, length)
        x_0 = denoiser(x_t, t)
        x_s, value = self.move(denoiser, x_t, x_0, past, places, t, s, keys)
        past, places = (value, *past)[:count], _seen_from(length, places[:count])
        return x_s, past, places, x_0, ops.cast(_rise(process, t, s), _backend.TIME_DTYPE)

    def finish(self, denoiser: Denoiser, carry: tuple, t):
        """x̂_0, or from order 2 on what it tends to; see `extrapolation.finished`."""
        x_t, _, _, last_x_0, rise = carry
        x_0 = denoiser(x_t, t)
        return finished(x_0, last_x_0, rise) if self.smooth and self.order > 1 else x_0


@register("dpmpp_2m", order=2)
@register("dpmpp_3m", order=3)
@dataclass(frozen=True)
class DPMSolverPP(_Multistep):
    """DPM-Solver++ multistep (arXiv:2211.01095, alg. 2): x̂_0 along λ.

    At order 3 the polynomial is integrated exactly; the published code halves its curvature, which
    leaves order 2.

    Args:
        order: 1 (DDIM), 2 or 3.

    Raises:
        ValueError: If there is no such order.
    """

    order: int = 2

    def __post_init__(self):
        _check_order(self, 3)

    def move(self, denoiser, x_t, x_0, past, places, t, s, keys):
        """See base class."""
        process = denoiser.process
        length = self.length(process, t, s)
        quadrature = MIDDLE if self.order == 2 else EXACT
        mean_x_0 = mean((x_0, *past), places, 0.0, length, -length, quadrature)
        return move_clean(process, x_t, mean_x_0, t, s), x_0


@register("sde_dpmpp_2m")
@dataclass(frozen=True)
class SDEDPMSolverPP(_Multistep):
    """SDE-DPM-Solver++ (arXiv:2211.01095, app. B.5): DDPM's step with x̂_0's mean over the step.

    Args:
        order: 1 (DDPM with β̃) or 2.

    Raises:
        ValueError: If there is no such order.
    """

    order: int = 2

    smooth = False

    def __post_init__(self):
        _check_order(self, 2)

    def move(self, denoiser, x_t, x_0, past, places, t, s, keys):
        """See base class."""
        process = denoiser.process
        length = self.length(process, t, s)
        mean_x_0 = mean((x_0, *past), places, 0.0, length, -2.0 * length, MIDDLE)
        c_0, c_t, variance = process.posterior(t, s)
        fresh = rows(ops.sqrt(variance), x_t) * random.normal(keys, x_t.shape[1:])
        return rows(c_0, x_t) * mean_x_0 + rows(c_t, x_t) * x_t + fresh, x_0


class _NoiseMultistep(_Multistep):
    """Interpolates ε̂."""

    def rate(self, length):
        """Of the weight within a step; 0 for a clock in which the weight is even."""
        return ops.zeros_like(length)

    def move(self, denoiser, x_t, x_0, past, places, t, s, keys):
        """See base class."""
        process = denoiser.process
        noise = denoiser.noise_from(x_t, x_0, t)
        length = self.length(process, t, s)
        mean_noise = mean((noise, *past), places, 0.0, length, self.rate(length))
        return move_noise(process, x_0, noise, mean_noise, t, s), noise


@register("deis")
@dataclass(frozen=True)
class DEIS(_NoiseMultistep):
    """Adams–Bashforth exponential integrator for ε̂ along λ (arXiv:2204.13902, eq. 15).

    Args:
        order: 1 (DDIM) to 4.

    Raises:
        ValueError: If there is no such order.
    """

    order: int = 3

    def __post_init__(self):
        _check_order(self, 4)

    def rate(self, length):
        """ε̂ weighs as σ/α does."""
        return length


@register("lms")
@dataclass(frozen=True)
class LMS(_NoiseMultistep):
    """Adams–Bashforth with steps of any length in σ/α, for d(x/α) = ε̂ d(σ/α).

    Args:
        order: 1 (DDIM) to 4.

    Raises:
        ValueError: If there is no such order.
    """

    order: int = 4

    def __post_init__(self):
        _check_order(self, 4)

    def length(self, process: Process, t, s):
        """What σ/α falls by."""
        return ops.exp(-log_ratio(process, t)) - ops.exp(-log_ratio(process, s))


@register("plms")
@dataclass(frozen=True)
class PLMS(_NoiseMultistep):
    """Pseudo linear multistep (PNDM, arXiv:2202.09778, eq. 12): as if all steps were of one length.

    Its coefficients, (55, −59, 37, −9)/24 at order 4, are those of even steps.

    Args:
        order: 1 (DDIM) to 4.

    Raises:
        ValueError: If there is no such order.
    """

    order: int = 4

    def __post_init__(self):
        _check_order(self, 4)

    def length(self, process: Process, t, s):
        """One."""
        return ops.ones_like(t)


@register("unipc_2", order=2)
@register("unipc_3", order=3)
@dataclass(frozen=True)
class UniPC(Sampler):
    """Unified predictor–corrector (arXiv:2302.04867, alg. 5-6), of order p + 1 at no extra cost.

    The answer at t, which the next step needs anyway, first repeats the step that led to t with one
    value more; the state at t, so corrected, then moves on with the same answer.

    Args:
        order: p, of the predictor: 1, 2 or 3.

    Raises:
        ValueError: If there is no such order.
    """

    order: int = 2

    def __post_init__(self):
        _check_order(self, 3)

    def start(self, x_t) -> tuple:
        """No step to repeat yet."""
        return x_t, *_nothing_yet(x_t, self.order), x_t, ops.ones((), _backend.TIME_DTYPE)

    def step(self, denoiser: Denoiser, carry: tuple, t, s, keys) -> tuple:
        """Corrects the step that led here, then predicts the next."""
        x_t, past, places, x_r, r = carry
        process, x_0, length = denoiser.process, denoiser(x_t, t), _rise(denoiser.process, t, s)
        values, places = (x_0, *past), _with_now(places, length)
        again = mean(values, places, places[1], 0.0, places[1])
        begun = places[1] > 0.5 * FAR
        x_t = ops.where(begun, move_clean(process, x_r, again, r, t), x_t)
        values, places = values[:-1], places[:-1]
        mean_x_0 = mean(values, places, 0.0, length, -length)
        x_s = move_clean(process, x_t, mean_x_0, t, s)
        return x_s, values, _seen_from(length, places), x_t, ops.cast(t, _backend.TIME_DTYPE)

    def finish(self, denoiser: Denoiser, carry: tuple, t):
        """What x̂_0 tends to; see `extrapolation.finished`."""
        x_t, past, places, *_ = carry
        return finished(denoiser(x_t, t), past[0], -places[0])
