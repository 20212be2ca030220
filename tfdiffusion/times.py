"""Which times to train on (a distribution) and which to visit when sampling (a grid).

A distribution maps a uniform number to a time by its quantile function, so one batch of uniform
numbers, plain or stratified, serves them all. A grid holds the N times at which a sampler evaluates
the denoiser, falling from 1; whatever the sampler, the denoised image at the last of them is the
sample, so the way from there to t = 0 adds no noise and needs no entry of its own.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from tfdiffusion import _grid_search, _names, random
from tfdiffusion.processes import Process

#: The earliest time of continuous processes in training (score SDE, arXiv:2011.13456, app. C).
EARLIEST = 1e-5

_register = keras.saving.register_keras_serializable(package="tfdiffusion")


class TimeDistribution(abc.ABC):
    """A distribution of training times.

    Example:

    >>> t = tfd.times.get("stratified").sample(tfd.random.keys(range(64)), process)  # (64,)
    """

    @abc.abstractmethod
    def quantile(self, u, process: Process):
        """Maps u in (0, 1), of shape (B,), to times in (0, 1]."""

    def uniform(self, keys):
        """One number in (0, 1) a row: float32 (B,)."""
        return random.uniform(keys)

    def sample(self, keys, process: Process, latest: float = 1.0):
        """Draws one time a row.

        Args:
            keys: uint32 (B, 2).
            process: whose times they are.
            latest: times are cut off here.

        Returns:
            float32 (B,) in [1e-5, latest]; on a chain, multiples of 1/T from 1/T.
        """
        t = self.quantile(self.uniform(keys), process)
        return process.snap(ops.clip(ops.cast(t, "float32"), EARLIEST, latest))

    def get_config(self) -> dict:
        """Arguments that make this distribution again."""
        return dict(vars(self))

    @classmethod
    def from_config(cls, config: dict) -> TimeDistribution:
        """Makes the distribution of a configuration."""
        return cls(**config)


@_register
@dataclass(frozen=True)
class Uniform(TimeDistribution):
    """t ~ U(0, 1]; on a chain each of 1/T … 1 equally often (DDPM, arXiv:2006.11239, alg. 1)."""

    def quantile(self, u, process: Process):
        """The process's own uniform time."""
        return process.quantile(u)


@_register
@dataclass(frozen=True)
class DiscreteUniform(TimeDistribution):
    """t uniform on 1/T … 1, also for a continuous process.

    Args:
        num_timesteps: T >= 1.
    """

    num_timesteps: int = 1000

    def __post_init__(self):
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps must be >= 1. Received {self.num_timesteps}.")

    def quantile(self, u, process: Process):
        """ceil(u T)/T."""
        return ops.ceil(u * self.num_timesteps) / self.num_timesteps


@_register
@dataclass(frozen=True)
class Stratified(TimeDistribution):
    """Uniform times spread evenly over the batch: u_i = u_0 + i/B mod 1 (VDM, arXiv:2107.00630,
    app. I.1). Each time is uniform as before; the loss of a batch varies much less.
    """  # noqa: D205

    def uniform(self, keys):
        """Evenly spaced numbers with one random offset."""
        rows = ops.cast(ops.arange(ops.shape(keys)[0]), "float32")
        spaced = random.uniform(keys[:1]) + rows / ops.cast(ops.shape(keys)[0], "float32")
        return spaced - ops.floor(spaced)

    def quantile(self, u, process: Process):
        """The process's own uniform time."""
        return process.quantile(u)


@_register
@dataclass(frozen=True)
class LogitNormal(TimeDistribution):
    """logit t ~ N(mean, std²): most often mid-way (Esser et al. 2024, arXiv:2403.03206, eq. 19).

    Args:
        mean: of logit t; positive leans towards noise.
        std: of logit t, positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        _check_std(self)

    def quantile(self, u, process: Process):
        """Logistic function of a normal quantile."""
        return ops.sigmoid(self.mean + self.std * _normal_quantile(u))


@_register
@dataclass(frozen=True)
class LogNormalSigma(TimeDistribution):
    """ln(σ/α) ~ N(mean, std²) (EDM, arXiv:2206.00364, table 1).

    Args:
        mean: of ln(σ/α).
        std: of ln(σ/α), positive.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        _check_std(self)

    def quantile(self, u, process: Process):
        """The time at which the noise has the drawn level."""
        return process.inverse_log_snr(-2.0 * (self.mean + self.std * _normal_quantile(u)))


def _check_std(distribution) -> None:
    if distribution.std <= 0.0:
        name = type(distribution).__name__
        raise ValueError(f"{name} needs std > 0. Received std={distribution.std}.")


def _normal_quantile(u):
    return math.sqrt(2.0) * ops.erfinv(2.0 * u - 1.0)


_DISTRIBUTIONS = {
    "uniform": Uniform,
    "discrete_uniform": DiscreteUniform,
    "stratified": Stratified,
    "logit_normal": LogitNormal,
    "log_normal_sigma": LogNormalSigma,
}


def get(distribution: str | TimeDistribution) -> TimeDistribution:
    """Makes a distribution by name, with its default arguments; an object is returned as it is.

    Raises:
        ValueError: If the name is unknown; the message lists the known ones.
    """
    if isinstance(distribution, TimeDistribution):
        return distribution
    return _names.look_up("time distribution", distribution, _DISTRIBUTIONS)()


def _trailing(process, u, latest):
    # From the end backwards in equal strides: always starts at the latest time.
    return latest * (1.0 - u)


def _leading(process, u, latest):
    # From the first step forwards in equal strides: what the first DDPM and DDIM code did. It stops
    # a stride short of the noisiest step, so it is here for comparison, not for use.
    steps = process.num_timesteps or ops.maximum(_count(u), 1000.0)
    stride = ops.floor(steps / _count(u))
    share = (1.0 + stride * (_count(u) - 1.0 - u * _count(u))) / steps
    return latest * ops.minimum(share, 1.0)


def _linspace(process, u, latest):
    # Both ends included.
    first = 1.0 / (process.num_timesteps or 1000)
    share = u * _count(u) / ops.maximum(_count(u) - 1.0, 1.0)
    return latest + share * (first - latest)


def _quadratic(process, u, latest):
    # Strides that grow with t (DDIM, arXiv:2010.02502, app. D.2).
    return latest * (1.0 - u) ** 2


def _from_level(process, u, latest, level):
    # Times at which ln(σ/α) is level(share, high, low), with a share of the way from 0 to 1 between
    # the ends of the process, which are cut to ±8 where they are not finite. The first time is the
    # latest all the same.
    ends = ops.convert_to_tensor([latest, 1.0 / (process.num_timesteps or 1000)], dtype=u.dtype)
    log_snr = ops.clip(process.log_snr(ends), -16.0, 16.0)
    share = u * _count(u) / ops.maximum(_count(u) - 1.0, 1.0)
    log_level = level(share, -0.5 * log_snr[0], -0.5 * log_snr[1])
    return ops.where(share > 0.0, process.inverse_log_snr(-2.0 * log_level), latest)


def _power(share, high, low, rho):
    # (σ/α)^(1/ρ) in equal strides, on a logarithmic scale.
    high, low = ops.exp(high / rho), ops.exp(low / rho)
    return rho * ops.log(high + share * (low - high))


def _karras(process, u, latest):
    # EDM, arXiv:2206.00364, eq. 5.
    return _from_level(process, u, latest, lambda *ends: _power(*ends, 7.0))


def _log_snr(process, u, latest):
    # ln(σ/α) in equal strides (DPM-Solver, arXiv:2206.00927, sec. 3.4).
    return _from_level(process, u, latest, lambda share, high, low: high + share * (low - high))


def _optimized(process, u, latest):
    # What is best for this many times, as far as the process reaches; see `_grid_search`.
    most, count = _grid_search.MOST, u.shape[0]
    if count is None:  # known only when it runs
        table = [_grid_search.shape(k) for k in range(1, most + 1)]
        row = ops.minimum(ops.shape(u)[0], most) - 1
        best = ops.take(ops.convert_to_tensor(table, dtype=u.dtype), row, axis=0)
    else:
        best = ops.convert_to_tensor(_grid_search.shape(min(count, most)), dtype=u.dtype)

    def level(share, high, low):
        high, low = ops.minimum(ops.log(best[0]), high), ops.maximum(ops.log(best[1]), low)
        return _power(share, high, low, best[2])

    return _from_level(process, u, latest, level)


def _count(u):
    return ops.cast(ops.shape(u)[0], u.dtype)


_GRIDS = {
    "uniform": _trailing,
    "trailing": _trailing,
    "leading": _leading,
    "linspace": _linspace,
    "quadratic": _quadratic,
    "log_snr": _log_snr,
    "karras": _karras,
    "optimized": _optimized,
}


def grid_names() -> list[str]:
    """Names that `grid` knows."""
    return list(_GRIDS)


def grid(name: str, num_steps, process: Process, latest: float = 1.0, dtype: str = "float32"):
    """The times at which a sampler evaluates the denoiser, from noise towards data.

    | name      | times                                                        |
    |-----------|--------------------------------------------------------------|
    | uniform   | 1 − k/N; "trailing" is another name for it                   |
    | leading   | equal strides from the first step; stops short of t = 1      |
    | linspace  | both ends included                                           |
    | quadratic | (1 − k/N)²                                                   |
    | log_snr   | ln(σ/α) in equal strides                                     |
    | karras    | (σ/α)^(1/7) in equal strides (EDM)                           |
    | optimized | least error of DPM-Solver++ 2M on Gaussians of many scales   |

    Args:
        name: one of the above.
        num_steps: N, an integer or an integer scalar tensor.
        process: on a chain, times are rounded to its own, and no step is visited twice.
        latest: the first time.
        dtype: of the result.

    Returns:
        Tensor (N,), falling.

    Raises:
        ValueError: If the name is unknown, N < 1, or N exceeds the T of a chain.
    """
    make = _names.look_up("grid", name, _GRIDS)
    if isinstance(num_steps, int | np.integer):
        check_steps(num_steps, process)
    rank = ops.cast(ops.arange(num_steps), dtype)
    count = ops.cast(num_steps, dtype)
    t = process.snap(make(process, rank / count, latest))
    if process.num_timesteps is None:
        return t
    # Where two round to one, the later goes on by a step, and so do those that it runs into.
    before = ops.expand_dims(rank, 1) >= rank
    t = ops.min(ops.where(before, t + rank / process.num_timesteps, 2.0 * count), axis=1)
    t = t - rank / process.num_timesteps
    # Strides shorter than a step round to none at either end: count from that end instead.
    last, first = (count - rank) / process.num_timesteps, 1.0 - rank / process.num_timesteps
    return process.snap(ops.maximum(ops.minimum(t, first), last))


def check_steps(num_steps: int, process: Process) -> None:
    """Raises a ValueError unless 1 <= num_steps, and <= T on a chain of T steps."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer) or num_steps < 1:
        raise ValueError(f"steps must be an integer >= 1. Received steps={num_steps!r}.")
    if process.num_timesteps is not None and num_steps > process.num_timesteps:
        raise ValueError(
            f"steps={num_steps} exceeds the {process.num_timesteps} noise levels that this model's "
            f"chain has. Use steps <= {process.num_timesteps}."
        )
