"""How data become noise: x_t = α(t) x_0 + σ(t) ε, with ε ~ N(0, I) and t from 0 (data) to 1.

A process is two functions of time, and the one constraint on them is that the signal-to-noise ratio
α²/σ² falls strictly. Everything else follows, once, in the base class. Write λ = ln(α²/σ²) and let
s < t. The noise added between s and t has to make up the difference of the marginals:

    q(x_t | x_s)      = N(α_{t|s} x_s, σ²_{t|s}),   α_{t|s} = α_t / α_s,
                        σ²_{t|s} = σ_t² − α²_{t|s} σ_s² = −σ_t² expm1(λ_t − λ_s),

and by Bayes' rule

    q(x_s | x_t, x_0) = N(c_0 x_0 + c_t x_t, β̃),    c_0 = −α_s expm1(λ_t − λ_s),
                        c_t = α_{t|s} σ_s² / σ_t²,   β̃ = σ²_{t|s} σ_s² / σ_t².

Letting s approach t gives the stochastic differential equation dx = f x dt + g dw with the same
marginals: f = d ln α/dt and g² = −σ² dλ/dt (Song et al. 2021, arXiv:2011.13456; Kingma et al. 2021,
arXiv:2107.00630). A chain of T steps is a tabulated process: its time is i/T, i = 0…T, rounded.
"""

from __future__ import annotations

import abc
import math
import warnings
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from tfdiffusion import _backend, _checks, _names

_register = keras.saving.register_keras_serializable(package="tfdiffusion")


class Process(abc.ABC):
    """A Gaussian noising process: subclasses give `alpha` and `sigma`.

    Every method takes t (and s) in [0, 1] as a tensor or array of any shape and returns tensors of
    that shape in its dtype: float64 stays float64 where the backend has it.

    Example:

    >>> process = tfd.processes.get("vp")
    >>> alpha_t, sigma_t = process.alpha(0.5), process.sigma(0.5)
    """

    #: T for a chain of T steps (t is then rounded to i/T), None for continuous time.
    num_timesteps: int | None = None

    @property
    def resolution(self) -> int:
        """How many timesteps t = 1 counts as: T on a chain of T, 1000 in continuous time."""
        return self.num_timesteps or 1000

    @abc.abstractmethod
    def alpha(self, t):
        """Scale of the data at time t: α(0) = 1, never increasing."""

    @abc.abstractmethod
    def sigma(self, t):
        """Standard deviation of the noise at time t."""

    @abc.abstractmethod
    def get_config(self) -> dict:
        """Arguments that make this process again."""

    @classmethod
    def from_config(cls, config: dict) -> Process:
        """Makes the process of a configuration."""
        return cls(**config)

    def log_snr(self, t):
        """λ(t) = ln(α²/σ²): +∞ where there is no noise, −∞ where there is no signal."""
        t = _tensor(t)
        return 2.0 * (ops.log(self.alpha(t)) - ops.log(self.sigma(t)))

    def inverse_log_snr(self, log_snr):
        """The t in [0, 1] with λ(t) = log_snr, by bisection; the nearest end if there is none."""
        target = _tensor(log_snr)

        def halve(_, bounds):
            low, high = bounds
            middle = 0.5 * (low + high)
            too_clean = self.log_snr(middle) > target
            return ops.where(too_clean, middle, low), ops.where(too_clean, high, middle)

        bounds = (ops.zeros_like(target), ops.ones_like(target))
        low, high = ops.fori_loop(0, 50, halve, bounds)
        return 0.5 * (low + high)

    def marginal(self, x_0, t):
        """Moments of q(x_t | x_0).

        Args:
            x_0: data, float (B, ...).
            t: times, () or (B,).

        Returns:
            (α x_0, σ): the mean (B, ...), and the standard deviation, shaped to multiply x_0.

        Raises:
            ValueError: If x_0 is not float, or times that have values leave [0, 1] or are neither
                one nor B.
        """
        if not _checks.is_symbol(x_0):
            _checks.array("x_0", x_0, "floats of shape (B, ...)", kinds="f")
        x_0 = ops.convert_to_tensor(x_0)
        _check_times(t=t)
        t = _tensor(t)
        _checks.one_a_row(x_0, t=t)
        return _backend.rows(self.alpha(t), x_0) * x_0, _backend.rows(self.sigma(t), x_0)

    def transition(self, t, s):
        """Moments of q(x_t | x_s) for s < t.

        Returns:
            (α_{t|s}, σ²_{t|s}).

        Raises:
            ValueError: If times that have values are not 0 <= s < t <= 1.
        """
        t, s = _two_times(t, s)
        alpha_ratio = self.alpha(t) / self.alpha(s)
        return alpha_ratio, -(self.sigma(t) ** 2) * ops.expm1(self.log_snr(t) - self.log_snr(s))

    def posterior(self, t, s):
        """Moments of q(x_s | x_t, x_0) for s < t (DDPM, arXiv:2006.11239, eq. 6-7).

        Returns:
            (c_0, c_t, β̃): the mean is c_0 x_0 + c_t x_t, the variance β̃.

        Raises:
            ValueError: See `transition`.
        """
        t, s = _two_times(t, s)
        alpha_ratio, variance = self.transition(t, s)
        shrink = (self.sigma(s) / self.sigma(t)) ** 2
        c_0 = -self.alpha(s) * ops.expm1(self.log_snr(t) - self.log_snr(s))
        return c_0, alpha_ratio * shrink, variance * shrink

    def drift(self, t):
        """f(t) of dx = f x dt + g dw: d ln α / dt."""
        return _backend.derivative(lambda u: ops.log(self.alpha(u)), _tensor(t))

    def diffusion(self, t):
        """g(t) of dx = f x dt + g dw: √(−σ² dλ/dt); NaN at t = 0 where λ is infinite there."""
        t = _tensor(t)
        return self.sigma(t) * ops.sqrt(-_backend.derivative(self.log_snr, t))

    def slopes(self, t):
        """(dα/dt, dσ/dt), which are finite where α = 0 and f and g are not."""
        t = _tensor(t)
        return _backend.derivative(self.alpha, t), _backend.derivative(self.sigma, t)

    def snap(self, t):
        """The nearest time that the process has, t = 0 excluded on a chain."""
        return t

    def quantile(self, u):
        """Maps uniform u in [0, 1] to uniform times (on a chain: to 1/T … 1, equally often)."""
        return u


def _check_times(**times) -> None:
    """Looks at times that are Python's or NumPy's: from 0 to 1, and the second before the first."""
    values = [
        _checks.array(name, t, "times in [0, 1]")
        for name, t in times.items()
        if not (ops.is_tensor(t) or _checks.is_symbol(t))
    ]
    if any((v < 0.0).any() or (v > 1.0).any() for v in values):
        raise ValueError(f"Times must lie in [0, 1]. Received {_received(times)}.")
    if len(values) == 2:
        try:
            ordered = (values[1] < values[0]).all()
        except ValueError:
            ordered = False
        if not ordered:
            raise ValueError(f"s must be earlier than t, elementwise. Received {_received(times)}.")


def _two_times(t, s) -> tuple:
    """t and s as tensors of one dtype, once they are in order."""
    _check_times(t=t, s=s)
    t, s = _tensor(t), _tensor(s)
    if t.dtype == s.dtype:
        return t, s
    dtype = keras.backend.result_type(t.dtype, s.dtype)  # of a plain number beside an array
    return ops.cast(t, dtype), ops.cast(s, dtype)


def _received(times: dict) -> str:
    return ", ".join(f"{name}={_checks.shown(t)}" for name, t in times.items())


def _tensor(t):
    """A floating tensor: numbers and integers become float32, other arrays keep their precision."""
    if isinstance(t, list | tuple):
        t = _checks.array("Times", t, "numbers")
    _checks.real(t=t)
    if isinstance(t, float | int):
        t = np.float32(t)
    t = ops.convert_to_tensor(t)
    floating = keras.backend.is_float_dtype(keras.backend.standardize_dtype(t.dtype))
    return t if floating else ops.cast(t, "float32")


@_register
class VariancePreserving(Process):
    """α² + σ² = 1 with β(t) rising linearly (VP-SDE, arXiv:2011.13456, eq. 32-33).

    Args:
        beta_min: β(0), positive.
        beta_max: β(1), at least `beta_min`.

    Raises:
        ValueError: If 0 < beta_min <= beta_max does not hold.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        _checks.numbers(beta_min=beta_min, beta_max=beta_max)
        if not 0.0 < beta_min <= beta_max:
            raise ValueError(
                f"{type(self).__name__} needs 0 < beta_min <= beta_max. Received beta_min="
                f"{beta_min}, beta_max={beta_max}; the usual values are 0.1 and 20."
            )
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)

    def _log_alpha(self, t):
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t):
        """exp(−½ ∫β)."""
        return ops.exp(self._log_alpha(_tensor(t)))

    def sigma(self, t):
        """√(1 − α²), without cancellation near t = 0."""
        return ops.sqrt(-ops.expm1(2.0 * self._log_alpha(_tensor(t))))

    def get_config(self) -> dict:
        """See base class."""
        return {"beta_min": self.beta_min, "beta_max": self.beta_max}


@_register
class SubVariancePreserving(VariancePreserving):
    """The VP scale with less noise, σ = 1 − α² (sub-VP SDE, arXiv:2011.13456, eq. 34-35)."""

    def sigma(self, t):
        """1 − exp(−∫β)."""
        return -ops.expm1(2.0 * self._log_alpha(_tensor(t)))


@_register
class VarianceExploding(Process):
    """α = 1, σ = σ_min (σ_max/σ_min)^t (VE-SDE, arXiv:2011.13456, eq. 30-31).

    Args:
        sigma_min: noise at t = 0, in units of the data, positive.
        sigma_max: noise at t = 1; of the order of the largest distance between two data points.

    Raises:
        ValueError: If 0 < sigma_min < sigma_max does not hold.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0):
        _check_sigmas(type(self).__name__, sigma_min, sigma_max)
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    def alpha(self, t):
        """One at all times."""
        return ops.ones_like(_tensor(t))

    def sigma(self, t):
        """Geometric from σ_min to σ_max."""
        t = _tensor(t)
        return self.sigma_min * ops.exp(t * math.log(self.sigma_max / self.sigma_min))

    def get_config(self) -> dict:
        """See base class."""
        return {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}


@_register
class EDM(Process):
    """α = 1, σ^(1/ρ) linear in t, so that uniform times are Karras' (arXiv:2206.00364, eq. 5).

    Args:
        sigma_min: noise at t = 0, in units of the data, positive.
        sigma_max: noise at t = 1.
        rho: how strongly the steps crowd at low noise, positive.

    Raises:
        ValueError: If 0 < sigma_min < sigma_max and rho > 0 do not hold.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
        _check_sigmas(type(self).__name__, sigma_min, sigma_max)
        _checks.numbers(rho=rho)
        if rho <= 0.0:
            raise ValueError(f"EDM needs rho > 0. Received rho={rho}; the usual value is 7.")
        self.sigma_min, self.sigma_max, self.rho = float(sigma_min), float(sigma_max), float(rho)

    def alpha(self, t):
        """One at all times."""
        return ops.ones_like(_tensor(t))

    def sigma(self, t):
        """(σ_min^(1/ρ) + t (σ_max^(1/ρ) − σ_min^(1/ρ)))^ρ."""
        low, high = self.sigma_min ** (1.0 / self.rho), self.sigma_max ** (1.0 / self.rho)
        return (low + _tensor(t) * (high - low)) ** self.rho

    def get_config(self) -> dict:
        """See base class."""
        return {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "rho": self.rho}


def _check_sigmas(name: str, sigma_min: float, sigma_max: float) -> None:
    _checks.numbers(sigma_min=sigma_min, sigma_max=sigma_max)
    if not 0.0 < sigma_min < sigma_max:
        raise ValueError(
            f"{name} needs 0 < sigma_min < sigma_max. "
            f"Received sigma_min={sigma_min}, sigma_max={sigma_max}."
        )


@_register
class RectifiedFlow(Process):
    """The straight line from data to noise: α = 1 − t, σ = t (arXiv:2209.03003, eq. 1)."""

    def alpha(self, t):
        """1 − t."""
        return 1.0 - _tensor(t)

    def sigma(self, t):
        """The time itself."""
        return _tensor(t)

    def get_config(self) -> dict:
        """See base class."""
        return {}


@_register
class ContinuousCosine(Process):
    """α = cos φ, σ = sin φ with φ linear in t, the ends cut at a finite λ (arXiv:2107.00630, app. E
    of 2202.00512 for the angle).

    Args:
        log_snr_min: λ(1).
        log_snr_max: λ(0).

    Raises:
        ValueError: If log_snr_min < log_snr_max does not hold.
    """  # noqa: D205

    def __init__(self, log_snr_min: float = -15.0, log_snr_max: float = 15.0):
        _checks.numbers(log_snr_min=log_snr_min, log_snr_max=log_snr_max)
        if not log_snr_min < log_snr_max:
            raise ValueError(
                "ContinuousCosine needs log_snr_min < log_snr_max. "
                f"Received log_snr_min={log_snr_min}, log_snr_max={log_snr_max}."
            )
        self.log_snr_min, self.log_snr_max = float(log_snr_min), float(log_snr_max)

    def _angle(self, t):
        first = math.atan(math.exp(-0.5 * self.log_snr_max))
        last = math.atan(math.exp(-0.5 * self.log_snr_min))
        return first + _tensor(t) * (last - first)

    def alpha(self, t):
        """Cosine of the angle."""
        return ops.cos(self._angle(t))

    def sigma(self, t):
        """Sine of the angle."""
        return ops.sin(self._angle(t))

    def get_config(self) -> dict:
        """See base class."""
        return {"log_snr_min": self.log_snr_min, "log_snr_max": self.log_snr_max}


@_register
class Tabulated(Process):
    """A chain of T steps: α and σ from a table, time rounded to i/T.

    Index 0 is the data (α = 1, σ = 0), index i the i-th noise level; DDPM's 0-based timestep k is
    i − 1. Drift and diffusion are those of the step that ends at t: f = T ln α_{i|i−1} and
    g² = T σ²_{i|i−1}, which for DDPM is T β_i.

    Args:
        alphas: α_1 … α_T, positive (the last may be 0), never increasing.
        sigmas: σ_1 … σ_T, positive.

    Raises:
        ValueError: If a table is not a non-empty vector of finite numbers, the two differ in
            length, or the signal-to-noise ratio does not fall strictly.
    """

    def __init__(self, alphas: Sequence[float], sigmas: Sequence[float]):
        alphas, sigmas = _table("alphas", alphas), _table("sigmas", sigmas)
        if len(alphas) != len(sigmas):
            raise ValueError(
                f"alphas and sigmas must be of one length. Received {len(alphas)} and "
                f"{len(sigmas)} values."
            )
        if (alphas[:-1] <= 0).any() or alphas[-1] < 0 or (sigmas <= 0).any():
            raise ValueError(
                "alphas and sigmas must be positive (only the last alpha may be 0). Received "
                f"alphas from {alphas.min():g} and sigmas from {sigmas.min():g}."
            )
        with np.errstate(divide="ignore"):
            log_snr = 2.0 * (np.log(alphas) - np.log(sigmas))
        rising = np.flatnonzero(np.diff(log_snr) >= 0)
        if rising.size:
            i = int(rising[0]) + 1
            raise ValueError(
                "The signal-to-noise ratio must fall strictly. It does not from step "
                f"{i} to step {i + 1}: received log-SNR {log_snr[i - 1]:.6g} and {log_snr[i]:.6g}. "
                "Order the table from little noise to much, without repeats."
            )
        self.num_timesteps = len(alphas)
        self._alphas = np.concatenate([[1.0], alphas])
        self._sigmas = np.concatenate([[0.0], sigmas])
        self._log_snr = np.concatenate([[np.inf], log_snr])

    @classmethod
    def from_betas(cls, betas: Sequence[float]) -> Tabulated:
        """The variance-preserving chain x_i = √(1−β_i) x_{i−1} + √β_i ε (DDPM, eq. 2-4).

        Args:
            betas: β_1 … β_T, each in (0, 1); the last may be 1 (zero terminal SNR).

        Raises:
            ValueError: If a β lies outside that range.
        """
        return Tabulated(*_chain(betas, may_end_at_one=True))

    @classmethod
    def from_sigmas(cls, sigmas: Sequence[float]) -> Tabulated:
        """The variance-exploding ladder x_i = x_0 + σ_i ε (NCSN, arXiv:1907.05600).

        Args:
            sigmas: σ_1 < … < σ_T, positive and strictly rising: little noise first, because time
                runs from data to noise (NCSN's papers count the other way).
        """
        sigmas = _table("sigmas", sigmas)
        return Tabulated(np.ones(len(sigmas)), sigmas)

    @property
    def betas(self) -> np.ndarray:
        """β_i = 1 − α²_{i|i−1}, float64 (T,): the table that `from_betas` would take."""
        return 1.0 - (self._alphas[1:] / self._alphas[:-1]) ** 2

    def index(self, t):
        """The step number i = round(t T), int32."""
        return ops.cast(ops.round(_tensor(t) * self.num_timesteps), "int32")

    def _look_up(self, table: np.ndarray, t):
        t = _tensor(t)
        return ops.take(ops.cast(table, t.dtype), self.index(t), axis=0)

    def alpha(self, t):
        """α_i at i = round(t T)."""
        return self._look_up(self._alphas, t)

    def sigma(self, t):
        """σ_i at i = round(t T)."""
        return self._look_up(self._sigmas, t)

    def log_snr(self, t):
        """λ_i at i = round(t T), from a float64 table."""
        return self._look_up(self._log_snr, t)

    def inverse_log_snr(self, log_snr):
        """i/T of the step whose λ_i is nearest, never i = 0."""
        # An infinite ratio is equally far from every step: cut it off.
        target = ops.clip(_tensor(log_snr), -1e4, 1e4)
        table = ops.cast(np.maximum(self._log_snr[1:], -1e4), target.dtype)
        nearest = ops.argmin(ops.abs(ops.expand_dims(target, -1) - table), axis=-1)
        return (ops.cast(nearest, target.dtype) + 1.0) / self.num_timesteps

    def drift(self, t):
        """T ln(α_i / α_{i−1})."""
        with np.errstate(divide="ignore"):
            steps = np.diff(np.log(self._alphas), prepend=np.nan)
        return self.num_timesteps * self._look_up(steps, t)

    def diffusion(self, t):
        """√(T σ²_{i|i−1})."""
        ratio = self._alphas[1:] / self._alphas[:-1]
        added = self._sigmas[1:] ** 2 - (ratio * self._sigmas[:-1]) ** 2
        return self._look_up(np.sqrt(self.num_timesteps * np.r_[np.nan, added]), t)

    def slopes(self, t):
        """T (α_i − α_{i−1}) and T (σ_i − σ_{i−1})."""
        tables = (np.diff(table, prepend=np.nan) for table in (self._alphas, self._sigmas))
        return tuple(self.num_timesteps * self._look_up(table, t) for table in tables)

    def snap(self, t):
        """round(t T)/T, at least 1/T."""
        # Halves go down whatever the rounding of t: float32 and float64 visit the same steps.
        step = ops.round((_tensor(t) - 2.5e-7) * self.num_timesteps)
        step = ops.clip(step, 1, self.num_timesteps)
        return step / self.num_timesteps

    def quantile(self, u):
        """ceil(u T)/T: each of 1/T … 1 from an equal share of (0, 1]."""
        step = ops.clip(ops.ceil(_tensor(u) * self.num_timesteps), 1, self.num_timesteps)
        return step / self.num_timesteps

    def get_config(self) -> dict:
        """See base class."""
        return {"alphas": self._alphas[1:].tolist(), "sigmas": self._sigmas[1:].tolist()}


@_register
class Interpolated(Process):
    """Continuous time through the levels of a chain, for samplers that stop between its steps.

    At t = i/T the noise level ρ = σ/α is the chain's ρ_i; between two of them ρ, or ln ρ, is linear
    in t, and α = 1/√(1 + ρ²). Before the first step, where ln ρ has no lower end, it is ρ.

    Args:
        chain: variance-preserving, with some signal left in its last step.
        along: what is linear: "level", ρ, or "log_level", ln ρ.

    Raises:
        ValueError: If the chain is another, or `along` unknown.
    """

    def __init__(self, chain: Tabulated, along: str = "log_level"):
        if not _is_variance_preserving(chain) or chain._alphas[-1] == 0.0:
            raise ValueError(
                "Interpolated needs a variance-preserving chain that ends with some signal, such "
                f"as 'linear' or 'cosine'. Received {type(chain).__name__}."
            )
        _names.one_of("way to interpolate", along, ("level", "log_level"))
        self.chain, self.along = chain, along
        self._levels = chain._sigmas / chain._alphas  # ρ_0 = 0 to ρ_T

    @property
    def resolution(self) -> int:
        """T of the chain."""
        return self.chain.num_timesteps

    def _level(self, t):
        """ρ(t)."""
        place = ops.clip(_tensor(t) * self.resolution, 0.0, float(self.resolution))
        i = ops.minimum(ops.cast(ops.floor(place), "int32"), self.resolution - 1)
        table, share = ops.cast(self._levels, place.dtype), place - ops.cast(i, place.dtype)
        low, high = ops.take(table, i, axis=0), ops.take(table, i + 1, axis=0)
        line = low + share * (high - low)
        if self.along == "level":
            return line
        inner = i > 0
        ratio = ops.where(inner, high / ops.where(inner, low, 1.0), 1.0)
        return ops.where(inner, low * ratio**share, line)

    def alpha(self, t):
        """1/√(1 + ρ²)."""
        return 1.0 / ops.sqrt(1.0 + self._level(t) ** 2)

    def sigma(self, t):
        """ρ/√(1 + ρ²)."""
        level = self._level(t)
        return level / ops.sqrt(1.0 + level**2)

    def log_snr(self, t):
        """−2 ln ρ."""
        return -2.0 * ops.log(self._level(t))

    def inverse_log_snr(self, log_snr):
        """The t at which ρ = e^(−log_snr/2); the nearest end if there is none."""
        level = ops.exp(-0.5 * _tensor(log_snr))
        table = ops.cast(self._levels, level.dtype)
        level = ops.clip(level, 0.0, table[-1])
        flat = ops.reshape(level, (-1,))  # TensorFlow searches for no scalars
        i = ops.reshape(ops.searchsorted(table, flat, side="right"), ops.shape(level))
        i = ops.clip(i - 1, 0, self.resolution - 1)
        low, high = ops.take(table, i, axis=0), ops.take(table, i + 1, axis=0)
        share = (level - low) / (high - low)
        if self.along == "log_level":
            inner = i > 0
            low, level = ops.where(inner, low, 1.0), ops.where(inner, level, 1.0)
            share = ops.where(inner, ops.log(level / low) / ops.log(high / low), share)
        return (ops.cast(i, share.dtype) + share) / self.resolution

    def get_config(self) -> dict:
        """See base class."""
        return {"chain": keras.saving.serialize_keras_object(self.chain), "along": self.along}

    @classmethod
    def from_config(cls, config: dict) -> Interpolated:
        """Makes the process of a configuration."""
        return cls(keras.saving.deserialize_keras_object(config["chain"]), config["along"])


def _is_variance_preserving(process) -> bool:
    """Whether it is a chain with α² + σ² = 1."""
    return isinstance(process, Tabulated) and np.allclose(
        process._alphas**2 + process._sigmas**2, 1.0
    )


def _table(name: str, values: Sequence[float]) -> np.ndarray:
    expected = "a non-empty vector of finite numbers"
    array = _checks.array(name, values, expected, rank=1).astype("float64")
    if array.size == 0:
        raise ValueError(f"{name} must be {expected}. Received shape {array.shape}.")
    return array


def _chain(betas: Sequence[float], may_end_at_one: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """α and σ of a variance-preserving chain."""
    betas = _table("betas", betas)
    valid = (betas > 0) & (betas < 1)
    valid[-1] |= may_end_at_one and betas[-1] == 1
    if not valid.all():
        i = int(np.argmin(valid))
        raise ValueError(
            f"Every beta must lie in (0, 1){', the last in (0, 1]' * may_end_at_one}. Received "
            f"beta_{i + 1} = {betas[i]:g} ({np.sum(~valid)} of {betas.size} outside). With few "
            "steps use a smaller beta_end or the cosine schedule."
        )
    with np.errstate(divide="ignore"):  # log(0) = -inf is right for a last beta of 1
        log_alphas_bar = np.cumsum(np.log1p(-betas))
    if log_alphas_bar[-1] > math.log(0.01):
        warnings.warn(
            f"The chain ends at alpha_bar = {math.exp(log_alphas_bar[-1]):.3g}: it has not become "
            "noise, and sampling, which starts from pure noise, will be biased. Use larger betas "
            "or more steps.",
            stacklevel=3,
        )
    return np.exp(0.5 * log_alphas_bar), np.sqrt(-np.expm1(log_alphas_bar))


class _BetaRange(Tabulated):
    """A chain whose β go from `beta_start` to `beta_end`; a subclass says along which curve."""

    _default_start: float
    _default_end: float

    def __init__(
        self,
        num_timesteps: int = 1000,
        beta_start: float | None = None,
        beta_end: float | None = None,
    ):
        steps = _checks.integer("num_timesteps", num_timesteps)
        given = {"beta_start": beta_start, "beta_end": beta_end}
        _checks.numbers(**{name: beta for name, beta in given.items() if beta is not None})
        # A chain of T steps must add as much noise as the published one of 1000.
        self.beta_start = float(
            self._default_start * 1000 / steps if beta_start is None else beta_start
        )
        self.beta_end = float(self._default_end * 1000 / steps if beta_end is None else beta_end)
        super().__init__(*_chain(self._curve(steps, self.beta_start, self.beta_end)))

    @staticmethod
    @abc.abstractmethod
    def _curve(steps: int, start: float, end: float) -> np.ndarray:
        """The β of the chain."""

    def get_config(self) -> dict:
        """See base class."""
        return {
            "num_timesteps": self.num_timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
        }


@_register
class LinearBeta(_BetaRange):
    """β rising linearly, 1e-4 to 0.02 at T = 1000 (DDPM, arXiv:2006.11239, sec. 4).

    Args:
        num_timesteps: T. The default ends scale with 1000/T, which needs T > 20.
        beta_start: β_1; None for 1e-4 · 1000/T.
        beta_end: β_T; None for 0.02 · 1000/T.

    Raises:
        ValueError: If a β leaves (0, 1).
    """

    _default_start, _default_end = 1e-4, 0.02

    @staticmethod
    def _curve(steps: int, start: float, end: float) -> np.ndarray:
        return np.linspace(start, end, steps)


@_register
class ScaledLinearBeta(_BetaRange):
    """√β rising linearly, 8.5e-4 to 0.012 at T = 1000 (latent diffusion, arXiv:2112.10752).

    Args:
        num_timesteps: T. The default ends scale with 1000/T.
        beta_start: β_1; None for 8.5e-4 · 1000/T.
        beta_end: β_T; None for 0.012 · 1000/T.

    Raises:
        ValueError: If a β leaves (0, 1).
    """

    _default_start, _default_end = 8.5e-4, 0.012

    @staticmethod
    def _curve(steps: int, start: float, end: float) -> np.ndarray:
        return np.linspace(start**0.5, end**0.5, steps) ** 2


@_register
class SigmoidBeta(_BetaRange):
    """β along a sigmoid on [−6, 6], 1e-4 to 0.02 at T = 1000 (as in GeoDiff, arXiv:2203.02923).

    Args:
        num_timesteps: T. The default ends scale with 1000/T.
        beta_start: lower asymptote; None for 1e-4 · 1000/T.
        beta_end: upper asymptote; None for 0.02 · 1000/T.

    Raises:
        ValueError: If a β leaves (0, 1).
    """

    _default_start, _default_end = 1e-4, 0.02

    @staticmethod
    def _curve(steps: int, start: float, end: float) -> np.ndarray:
        return start + (end - start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, steps)))


@_register
class Cosine(Tabulated):
    """ᾱ along a squared cosine (improved DDPM, arXiv:2102.09672, eq. 17), β clipped.

    Args:
        num_timesteps: T.
        offset: s in cos²((t + s)/(1 + s) · π/2), which keeps β_1 from vanishing.
        max_beta: β are clipped here, in (0, 1), so that the last step is not singular.

    Raises:
        ValueError: If an argument leaves its range.
    """

    def __init__(self, num_timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999):
        steps = _checks.integer("num_timesteps", num_timesteps)
        _checks.numbers(max_beta=max_beta, offset=offset)
        if not 0.0 < max_beta < 1.0 or offset < 0.0:
            raise ValueError(
                "Cosine needs 0 < max_beta < 1 and offset >= 0. "
                f"Received max_beta={max_beta}, offset={offset}."
            )
        self.offset, self.max_beta = float(offset), float(max_beta)
        angle = (np.arange(steps + 1) / steps + offset) / (1.0 + offset) * (np.pi / 2)
        alphas_bar = np.cos(angle) ** 2
        super().__init__(*_chain(np.minimum(1.0 - alphas_bar[1:] / alphas_bar[:-1], max_beta)))

    def get_config(self) -> dict:
        """See base class."""
        return {
            "num_timesteps": self.num_timesteps,
            "offset": self.offset,
            "max_beta": self.max_beta,
        }


def zero_terminal_snr(process: Tabulated) -> Tabulated:
    """Shifts and scales α so that the last step holds no signal (arXiv:2305.08891, alg. 1).

    Args:
        process: a variance-preserving chain.

    Returns:
        A chain with the same α_1 and α_T = 0. Train it with the v, flow, clean or edm prediction:
        noise and score say nothing about x_0 there.

    Raises:
        ValueError: If the process is not a variance-preserving chain.
    """
    if not _is_variance_preserving(process) or process.num_timesteps == 1:
        raise ValueError(
            "zero_terminal_snr needs a variance-preserving chain of at least 2 steps, such as "
            f"'linear' or 'cosine'. Received {type(process).__name__}."
        )
    alphas = process._alphas[1:]
    alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    return Tabulated(alphas, np.sqrt(1.0 - alphas**2))


_PROCESSES = {
    "linear": LinearBeta,
    "scaled_linear": ScaledLinearBeta,
    "cosine": Cosine,
    "sigmoid": SigmoidBeta,
    "vp": VariancePreserving,
    "sub_vp": SubVariancePreserving,
    "ve": VarianceExploding,
    "flow": RectifiedFlow,
    "edm": EDM,
    "continuous_cosine": ContinuousCosine,
}


def names() -> list[str]:
    """Names that `get` knows."""
    return list(_PROCESSES)


def get(process: str | Process) -> Process:
    """Makes a process by name, with its default arguments; a `Process` is returned as it is.

    Raises:
        ValueError: If the name is unknown; the message lists the known ones.
    """
    if isinstance(process, Process):
        return process
    return _names.look_up("process", process, _PROCESSES)()


def name(process: Process) -> str:
    """The short name of a process, or its class name where it has none."""
    for known, cls in _PROCESSES.items():
        if type(process) is cls:
            return known
    return type(process).__name__
