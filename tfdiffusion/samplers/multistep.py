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

from tfdiffusion import _backend, _checks, _names, random
from tfdiffusion._backend import rows
from tfdiffusion.denoiser import Denoiser
from tfdiffusion.processes import Process
from tfdiffusion.samplers.base import SamplerOfOrder, register
from tfdiffusion.samplers.extrapolation import (
    FAR,
    clean_and_noise,
    log_ratio,
    mean,
    move_clean,
    move_noise,
)

_MANY = 2**30


def _nothing_yet(x_t, count: int) -> tuple:
    """(values, places) of an empty history."""
    far = [ops.convert_to_tensor((i + 1) * FAR, _backend.TIME_DTYPE) for i in range(count)]
    return (ops.zeros_like(x_t),) * count, tuple(far)


def _rise(process: Process, t, s):
    """λ_s − λ_t."""
    return log_ratio(process, s) - log_ratio(process, t)


def _places(places: tuple, left, dtype) -> tuple:
    """Places of the present value, 0, and of earlier ones, of no more than are `left`."""
    places = [ops.cast(place, dtype) for place in (0.0, *places)]
    return tuple(
        ops.where(j < left, place, ops.cast((j + 1) * FAR, dtype)) for j, place in enumerate(places)
    )


def _evaluations_left(evaluations, settles: int | None):
    """To count down from: so large that it limits nothing, unless the run is shorter."""
    if evaluations is None:
        return ops.convert_to_tensor(_MANY, "int32")
    evaluations = ops.cast(evaluations, "int32")
    return evaluations if settles is None else ops.where(evaluations < settles, evaluations, _MANY)


def _seen_from(new, places) -> tuple:
    """Places on a clock whose zero moves to `new`."""
    return tuple(ops.cast(place - new, _backend.TIME_DTYPE) for place in places)


class _Multistep(SamplerOfOrder):
    """Carries x, earlier values, their places on a clock that now stands at 0, and how many
    evaluations are left.
    """  # noqa: D205

    reversible = True
    #: Runs of fewer evaluations go back to lower orders in their last steps; None: all runs.
    settles: int | None = 15

    def start(self, x_t, evaluations=None) -> tuple:
        """No values yet."""
        history = _nothing_yet(x_t, self.order - 1)
        return x_t, *history, _evaluations_left(evaluations, self.settles)

    def length(self, process: Process, t, s):
        """Of the step from t to s on the clock, positive; here λ."""
        return _rise(process, t, s)

    @abc.abstractmethod
    def move(self, denoiser: Denoiser, x_t, past: tuple, places: tuple, t, s, keys):
        """(x_s, value at t), given earlier values, and the places of that value and of these."""

    def step(self, denoiser: Denoiser, carry: tuple, t, s, keys) -> tuple:
        """One evaluation; the history moves on by one."""
        x_t, past, places, left = carry
        length = self.length(denoiser.process, t, s)
        now = _places(places, left, length.dtype)
        x_s, value = self.move(denoiser, x_t, past, now, t, s, keys)
        count = self.order - 1
        return x_s, (value, *past)[:count], _seen_from(length, (0.0, *places)[:count]), left - 1


@register("dpmpp_2m", order=2)
@register("dpmpp_3m", order=3)
@dataclass(frozen=True)
class DPMSolverPP(_Multistep):
    """DPM-Solver++ multistep (arXiv:2211.01095, alg. 2): x̂_0 along λ.

    Args:
        order: 1 (DDIM), 2 or 3.
        curvature: share of the parabola's curvature that counts at order 3. The published code
            takes one half, which is steadier with few steps but leaves the error of order 2; with 1
            it is of order 3.
        midpoint: take a line's value at the middle of the step for its mean; False takes the mean
            itself, the "heun" of the published code.
        settles: runs of fewer evaluations go back to lower orders in their last steps.

    Raises:
        ValueError: If there is no such order, or a number is out of range.
    """

    order: int = 2
    curvature: float = 0.5
    midpoint: bool = True
    settles: int = 15

    highest = 3

    def __post_init__(self):
        super().__post_init__()
        _checks.number("curvature", self.curvature, "[0, 1]")
        _checks.integer("settles", self.settles, 0)

    def move(self, denoiser, x_t, past, places, t, s, keys):
        """See base class."""
        process, x_0 = denoiser.process, denoiser(x_t, t)
        length = self.length(process, t, s)
        shape = {"at_middle": self.midpoint, "curvature": self.curvature}
        mean_x_0 = mean((x_0, *past), places, 0.0, length, -length, **shape)
        return move_clean(process, x_t, mean_x_0, t, s), x_0


@register("sde_dpmpp_2m")
@dataclass(frozen=True)
class SDEDPMSolverPP(_Multistep):
    """SDE-DPM-Solver++ (arXiv:2211.01095, app. B.5): DDPM's step with x̂_0's mean over the step.

    Args:
        order: 1 (DDPM with β̃) or 2.
        midpoint: as in `DPMSolverPP`.
        settles: as in `DPMSolverPP`.

    Raises:
        ValueError: If there is no such order.
    """

    order: int = 2
    midpoint: bool = True
    settles: int = 15

    reversible = False

    highest = 2

    def __post_init__(self):
        super().__post_init__()
        _checks.integer("settles", self.settles, 0)

    def move(self, denoiser, x_t, past, places, t, s, keys):
        """See base class."""
        process, x_0 = denoiser.process, denoiser(x_t, t)
        length = self.length(process, t, s)
        values, rate = (x_0, *past), -2.0 * length
        mean_x_0 = mean(values, places, 0.0, length, rate, at_middle=self.midpoint)
        c_0, c_t, variance = process.posterior(t, s)
        fresh = rows(ops.sqrt(variance), x_t) * random.normal(keys, x_t.shape[1:])
        return rows(c_0, x_t) * mean_x_0 + rows(c_t, x_t) * x_t + fresh, x_0


class _NoiseMultistep(_Multistep):
    """Interpolates ε̂."""

    def rate(self, length):
        """Of the weight within a step; 0 for a clock in which the weight is even."""
        return ops.zeros_like(length)

    def move(self, denoiser, x_t, past, places, t, s, keys):
        """See base class."""
        process = denoiser.process
        x_0, noise = clean_and_noise(denoiser, x_t, t)
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

    highest = 4

    def rate(self, length):
        """ε̂ weighs as σ/α does."""
        return length


class _Adams(_NoiseMultistep):
    """On a clock that comes to σ = 0 in finite time, the last evaluation serves a step like any."""

    settles = 0

    @abc.abstractmethod
    def rest(self, process: Process, t):
        """Length of the step from t to no noise."""

    def finish(self, denoiser: Denoiser, carry: tuple, t, keys):
        """x/α less ⟨ε̂⟩ σ/α."""
        x_t, past, places, left = carry
        x_0, noise = clean_and_noise(denoiser, x_t, t)
        rest = self.rest(denoiser.process, t)
        places = _places(places, left, rest.dtype)
        mean_noise = mean((noise, *past), places, 0.0, rest, 0.0 * rest)
        level = ops.exp(-log_ratio(denoiser.process, t))
        return x_0 - rows(level, x_0) * (mean_noise - noise)


@register("lms")
@dataclass(frozen=True)
class LMS(_Adams):
    """Adams–Bashforth with steps of any length in σ/α, for d(x/α) = ε̂ d(σ/α).

    Args:
        order: 1 (DDIM) to 4.

    Raises:
        ValueError: If there is no such order.
    """

    order: int = 4

    highest = 4

    def length(self, process: Process, t, s):
        """What σ/α falls by."""
        return ops.exp(-log_ratio(process, t)) - ops.exp(-log_ratio(process, s))

    def rest(self, process: Process, t):
        """All of σ/α."""
        return ops.exp(-log_ratio(process, t))


@register("plms")
@dataclass(frozen=True)
class PLMS(_Adams):
    """Pseudo linear multistep (PNDM, arXiv:2202.09778, eq. 12): as if all steps were of one length.

    Its coefficients, (55, −59, 37, −9)/24 at order 4, are those of even steps.

    Args:
        order: 1 (DDIM) to 4.
        start_up: how the history is made. "low_orders" gains one with every step and costs nothing;
            "trapezoid" repeats the first step with the mean of ε̂ at both its ends, one evaluation
            more (latent diffusion's code); "runge_kutta" begins with order − 1 pseudo Runge–Kutta
            steps of four evaluations (PNDM, eq. 11).

    Raises:
        ValueError: If there is no such order or start-up.
    """

    order: int = 4
    start_up: str = "low_orders"

    highest = 4

    def __post_init__(self):
        super().__post_init__()
        _names.one_of("start-up", self.start_up, ("low_orders", "trapezoid", "runge_kutta"))

    def length(self, process: Process, t, s):
        """One."""
        return ops.ones_like(t)

    def rest(self, process: Process, t):
        """One."""
        return ops.ones_like(t)

    def move(self, denoiser, x_t, past, places, t, s, keys):
        """See base class."""
        if self.start_up == "low_orders" or self.order == 1:
            return super().move(denoiser, x_t, past, places, t, s, keys)
        x_0, noise = clean_and_noise(denoiser, x_t, t)
        rule = {"trapezoid": _trapezoid, "runge_kutta": _runge_kutta}[self.start_up]
        # The first step knows no earlier value, the last of the Runge–Kutta ones not yet all.
        oldest = places[1] if self.start_up == "trapezoid" else places[-1]
        mean_noise = ops.cond(
            oldest < 0.5 * FAR,
            lambda: rule(denoiser, x_0, noise, t, s),
            lambda: mean((noise, *past), places, 0.0, places[0] + 1.0, 0.0),
        )
        return move_noise(denoiser.process, x_0, noise, mean_noise, t, s), noise

    def report(self, carry: tuple, steps) -> dict:
        """See base class."""
        steps, most = ops.convert_to_tensor(steps), self.order - 1
        each, count = {"low_orders": (0, 0), "trapezoid": (1, 1), "runge_kutta": (3, most)}[
            self.start_up
        ]
        return {"evaluations": steps + each * ops.minimum(steps, min(count, most))}


def _trapezoid(denoiser: Denoiser, x_0, noise, t, s):
    """Mean of ε̂ at t and at what DDIM makes of it at s."""
    return 0.5 * (noise + denoiser.noise(move_noise(denoiser.process, x_0, noise, noise, t, s), s))


def _runge_kutta(denoiser: Denoiser, x_0, noise, t, s):
    """Simpson's mean of ε̂ at t, twice half-way, and at s, each reached with the one before."""
    process = denoiser.process
    middle = process.snap(0.5 * (t + s))

    def look(mean_noise, to):
        return denoiser.noise(move_noise(process, x_0, noise, mean_noise, t, to), to)

    second = look(noise, middle)
    third = look(second, middle)
    return (noise + 2.0 * second + 2.0 * third + look(third, s)) / 6.0


@register("unipc_2", order=2)
@register("unipc_3", order=3)
@dataclass(frozen=True)
class UniPC(SamplerOfOrder):
    """Unified predictor–corrector (arXiv:2302.04867, alg. 5-6), of order p + 1 at no extra cost.

    The answer at t, which the next step needs anyway, first repeats the step that led to t with one
    value more; the state at t, so corrected, then moves on with the same answer.

    Args:
        order: p, of the predictor: 1, 2 or 3.

    Raises:
        ValueError: If there is no such order.
    """

    order: int = 2

    reversible = True

    highest = 3

    def start(self, x_t, evaluations=None) -> tuple:
        """No step to repeat yet."""
        latest = ops.ones((), _backend.TIME_DTYPE)
        left = _evaluations_left(evaluations, None)
        return x_t, *_nothing_yet(x_t, self.order), left, x_t, latest

    def step(self, denoiser: Denoiser, carry: tuple, t, s, keys) -> tuple:
        """Corrects the step that led here, then predicts the next."""
        x_t, past, places, left, x_r, r = carry
        process, x_0, length = denoiser.process, denoiser(x_t, t), _rise(denoiser.process, t, s)
        values, begun = (x_0, *past), places[0] > 0.5 * FAR
        # As the step was of order min(p, left + 1), it is repeated with one value more.
        seen = _places(places, left + 2, length.dtype)
        again = mean(values, seen, seen[1], 0.0, seen[1], at_middle=True)
        x_t = ops.where(begun, move_clean(process, x_r, again, r, t), x_t)
        seen = _places(places, left, length.dtype)[:-1]
        mean_x_0 = mean(values[:-1], seen, 0.0, length, -length, at_middle=True)
        x_s = move_clean(process, x_t, mean_x_0, t, s)
        places = _seen_from(length, (0.0, *places[:-1]))
        return x_s, values[:-1], places, left - 1, x_t, ops.cast(t, _backend.TIME_DTYPE)
