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
from keras import ops

from tfdiffusion import _checks, _grid_search, _names, processes, random
from tfdiffusion.processes import Process

#: The earliest time of continuous processes in training (score SDE, arXiv:2011.13456, app. C).
EARLIEST = 1e-5

# |ln SNR| where what is left of the signal, or of the noise, is α² = 2⁻²⁴.
_LAST_BIT = 24.0 * math.log(2.0)

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

        Raises:
            TypeError: If the keys are none.
            ValueError: If the process or the latest time is none.
        """
        process, latest = processes.get(process), _checks.number("latest", latest, "(0, 1]")
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

    Raises:
        ValueError: If it is no such integer.
    """

    num_timesteps: int = 1000

    def __post_init__(self):
        _checks.integer("num_timesteps", self.num_timesteps)

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
    _checks.numbers(mean=distribution.mean, std=distribution.std)
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
    first = 1.0 / process.resolution
    share = u * _count(u) / ops.maximum(_count(u) - 1.0, 1.0)
    return latest + share * (first - latest)


def _quadratic(process, u, latest):
    # Strides that grow with t (DDIM, arXiv:2010.02502, app. D.2).
    return latest * (1.0 - u) ** 2


def _from_level(process, u, latest, level):
    # Times at which ln(σ/α) is level(share, high, low), with a share of the way from 0 to 1 between
    # the ends of the process, which are cut to ±8 where they are not finite. The first time is the
    # latest all the same.
    ends = ops.convert_to_tensor([latest, 1.0 / process.resolution], dtype=u.dtype)
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


def _rank(u):
    return ops.cast(ops.arange(ops.shape(u)[0]), u.dtype)


def _share(u):
    # Of the way from the first time to the last.
    return _rank(u) / ops.maximum(_count(u) - 1.0, 1.0)


class Grid(abc.ABC):
    """A grid with settings of its own, where a name does not say enough.

    Example:

    >>> images = model.sample(16, grid=tfd.times.Timesteps("leading", offset=1), steps=50)
    """

    #: False if a run ends at the last time, in the state that its steps lead to.
    denoise_last: bool = True

    @abc.abstractmethod
    def __call__(self, process: Process, u, latest):
        """The times at u = k/N, k = 0 … N − 1, of shape (N,), falling from at most `latest`."""

    def get_config(self) -> dict:
        """Arguments that make this grid again."""
        return dict(vars(self))

    @classmethod
    def from_config(cls, config: dict) -> Grid:
        """Makes the grid of a configuration."""
        return cls(**config)


@_register
@dataclass(frozen=True)
class Timesteps(Grid):
    """Strides over the timesteps 0 … T − 1 of a chain, as published samplers lay them.

    | spacing  | timesteps, k = 0 … N − 1           | with `exclusive`                  |
    |----------|------------------------------------|-----------------------------------|
    | leading  | (N − 1 − k) ⌊T/N⌋ + offset         | (N − k) ⌊T/(N + 1)⌋ + offset      |
    | linspace | (N − 1 − k) (T − 1)/(N − 1)        | (N − k) (T − 1)/N                 |
    | trailing | T (1 − k/N) − 1                    | the same                          |

    DDPM and DDIM took leading ones, latent diffusion with offset 1, DPM-Solver exclusive ones;
    arXiv:2305.08891, table 2, compares them and recommends trailing. A timestep i is the time
    (i + 1)/T; halves are rounded to even ones, as NumPy does.

    Args:
        spacing: "leading", "linspace" or "trailing".
        offset: of leading timesteps.
        exclusive: lay N + 1 timesteps and leave out the last.
        rounded: False keeps the fractions of linspace, for processes that have levels there.
        levels: "karras" or "log" for equal strides in (σ/α)^(1/7) or ln(σ/α) between the levels of
            the first and the last timestep (EDM, arXiv:2206.00364, eq. 5; DPM-Solver,
            arXiv:2206.00927, sec. 3.4); None for the timesteps themselves.
        until_first: end in the state at timestep 0, one more time, instead of the data.
        count: lay leading or linspace timesteps over the first so many of a chain, the later ones
            being all but noise.

    Raises:
        ValueError: If a name is unknown or a number out of range.
    """

    spacing: str = "leading"
    offset: int = 0
    exclusive: bool = False
    rounded: bool = True
    levels: str | None = None
    until_first: bool = False
    count: int | None = None

    def __post_init__(self):
        for name, value, known in (
            ("spacing", self.spacing, ("leading", "linspace", "trailing")),
            ("kind of levels", self.levels, (None, "karras", "log")),
        ):
            if value is not None or None not in known:
                _names.one_of(name, value, [k for k in known if k])
        _checks.integer("offset", self.offset, -_checks.LARGEST)  # its range is looked at below
        if self.count is not None:
            _checks.integer("count", self.count, -_checks.LARGEST)
        misplaced = self.spacing == "trailing" and self.count is not None
        if self.offset < 0 or (self.count is not None and self.count < 1) or misplaced:
            raise ValueError(
                "Timesteps needs offset >= 0, and count >= 1 or, with trailing ones, no count. "
                f"Received spacing={self.spacing!r}, offset={self.offset}, count={self.count}."
            )

    @property
    def denoise_last(self) -> bool:
        """Unless it ends at timestep 0."""
        return not self.until_first

    def _timesteps(self, process: Process, u):
        last = float(min(self.count or process.resolution, process.resolution))
        n, k = _count(u), _rank(u)
        # In the order in which NumPy's arange and linspace compute: it decides over halves.
        if self.spacing == "trailing":
            stride = last - (last - last / n)
            return ops.round(last - k * stride) - 1.0
        laid = n + float(self.exclusive)
        if self.spacing == "leading":
            return (laid - 1.0 - k) * ops.floor(last / laid) + self.offset
        steps = (laid - 1.0 - k) * ((last - 1.0) / ops.maximum(laid - 1.0, 1.0))
        steps = ops.where(laid > 1.0, steps, last - 1.0)  # alone, it is the noisiest
        return ops.round(steps) if self.rounded else steps

    def __call__(self, process: Process, u, latest):
        """See base class."""
        steps = ops.clip(self._timesteps(process, u), 0.0, process.resolution - 1.0)
        t = ops.minimum((steps + 1.0) / process.resolution, latest)
        if self.levels is None:
            return t
        # Beyond the last bit float32 does not tell 1 − α² from 1, nor one time from the next.
        ends = -0.5 * ops.clip(process.log_snr(ops.stack([t[0], t[-1]])), -_LAST_BIT, _LAST_BIT)
        share, high, low = _share(u), ends[0], ends[1]
        even = high + share * (low - high)
        log_level = even if self.levels == "log" else _power(share, high, low, 7.0)
        return ops.where(share > 0.0, process.inverse_log_snr(-2.0 * log_level), t[0])


@_register
@dataclass(frozen=True)
class Shifted(Grid):
    """N even times u from 1 to `last`, ends included, at s u/(1 + (s − 1) u).

    With s > 1 more of them lie at high noise, as large images need (Esser et al. 2024,
    arXiv:2403.03206, eq. 23).

    Args:
        last: u at the end, in [0, 1); no time is earlier than 1e-5.
        shift: s, positive; 1 leaves the times even.

    Raises:
        ValueError: If a number is out of range.
    """

    last: float = 1e-3
    shift: float = 1.0

    def __post_init__(self):
        _checks.numbers(last=self.last, shift=self.shift)
        if not 0.0 <= self.last < 1.0 or self.shift <= 0.0:
            raise ValueError(
                "Shifted needs 0 <= last < 1 and shift > 0. "
                f"Received last={self.last}, shift={self.shift}."
            )

    def __call__(self, process: Process, u, latest):
        """See base class."""
        even = 1.0 + _share(u) * (self.last - 1.0)
        shifted = self.shift * even / (1.0 + (self.shift - 1.0) * even)
        return ops.clip(shifted, EARLIEST, latest)


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


def get_grid(name: str | Grid):
    """The function behind the name of a grid; a `Grid` is returned as it is.

    Raises:
        ValueError: If the name is unknown; the message lists the known ones.
    """
    return name if isinstance(name, Grid) else _names.look_up("grid", name, _GRIDS)


def grid(
    name: str | Grid, num_steps, process: Process, latest: float = 1.0, dtype: str = "float32"
):
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
        name: one of the above, or a `Grid`.
        num_steps: N, an integer or an integer scalar tensor.
        process: on a chain, times are rounded to its own, and no step is visited twice.
        latest: the first time.
        dtype: of the result.

    Returns:
        Tensor (N,), falling; (N + 1,) where a grid goes on to timestep 0.

    Raises:
        ValueError: If the name is unknown, N < 1, or N exceeds the T of a chain.
    """
    make = get_grid(name)
    process, latest = processes.get(process), _checks.number("latest", latest, "(0, 1]")
    _names.one_of("dtype of times", dtype, ("float32", "float64"))
    if not ops.is_tensor(num_steps):
        check_steps(num_steps, process)
    rank = ops.cast(ops.arange(num_steps), dtype)
    count = ops.cast(num_steps, dtype)
    t = process.snap(make(process, rank / count, latest))
    if process.num_timesteps is not None:
        t = _distinct(t, rank, count, process)
    if isinstance(make, Grid) and not make.denoise_last:
        t = ops.concatenate([t, ops.minimum(t[-1:], 1.0 / process.resolution)])
    return t


def _distinct(t, rank, count, process: Process):
    """Falling times of a chain, none of them twice."""
    # Where two round to one, the later goes on by a step, and so do those that it runs into.
    before = ops.expand_dims(rank, 1) >= rank
    t = ops.min(ops.where(before, t + rank / process.num_timesteps, 2.0 * count), axis=1)
    t = t - rank / process.num_timesteps
    # Strides shorter than a step round to none at either end: count from that end instead.
    last, first = (count - rank) / process.num_timesteps, 1.0 - rank / process.num_timesteps
    return process.snap(ops.maximum(ops.minimum(t, first), last))


def check_steps(num_steps: int, process: Process) -> None:
    """Raises a ValueError unless 1 <= num_steps, and <= T on a chain of T steps."""
    _checks.integer("steps", num_steps)
    if process.num_timesteps is not None and num_steps > process.num_timesteps:
        raise ValueError(
            f"steps={num_steps} exceeds the {process.num_timesteps} noise levels that this model's "
            f"chain has. Use steps <= {process.num_timesteps}."
        )
