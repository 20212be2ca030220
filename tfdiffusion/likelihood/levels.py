"""Noise levels: the ends of a process, and the way between the steps of a chain.

What a denoiser knows depends on x_t through α and σ only, so bound and likelihood are written in
one coordinate, the log-SNR λ = ln(α²/σ²), and hold for every process. Of a chain of T steps the
network has seen T levels; its time input, and with it the network, is smooth between them.
"""

from __future__ import annotations

import copy

import numpy as np
from keras import ops

from tfdiffusion.denoiser import Denoiser
from tfdiffusion.processes import Process
from tfdiffusion.times import EARLIEST

#: λ is cut here: σ/α of e^±8, where nothing is left to learn about data of unit scale.
_LIMIT = 16.0


def of(model) -> Denoiser:
    """The denoiser of a model, or the denoiser itself.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(model, Denoiser):
        return model
    if callable(getattr(model, "denoiser", None)):
        return model.denoiser()
    raise TypeError(
        "Likelihood needs a tfdiffusion model or a denoiser, (x_t, t) -> x_0. "
        f"Received {type(model).__name__}."
    )


class Interpolated(Process):
    """A chain in continuous time: λ and ln √(α² + σ²) straight between its steps.

    Below the first step it stays there: a network that never saw less noise has no opinion on it.

    Args:
        chain: a process with `num_timesteps`.
    """

    def __init__(self, chain: Process):
        self.chain = chain
        # The network's time input counts in the chain's steps.
        self.num_timesteps = chain.num_timesteps
        t = np.arange(1, chain.num_timesteps + 1) / chain.num_timesteps
        alpha, sigma, log_snr = (
            np.asarray(ops.convert_to_numpy(f(t)), "float64")
            for f in (chain.alpha, chain.sigma, chain.log_snr)
        )
        self._log_snr = np.maximum(log_snr, -2.0 * _LIMIT)
        self._log_scale = 0.5 * np.log(alpha**2 + sigma**2)

    def _between(self, table: np.ndarray, t):
        place = ops.clip(t * self.num_timesteps - 1.0, 0.0, self.num_timesteps - 1.0)
        below = ops.minimum(ops.floor(place), float(max(self.num_timesteps - 2, 0)))
        step, table = ops.cast(below, "int32"), ops.cast(table, place.dtype)
        low = ops.take(table, step, axis=0)
        high = ops.take(table, ops.minimum(step + 1, self.num_timesteps - 1), axis=0)
        return low + (place - below) * (high - low)

    def log_snr(self, t):
        """λ, straight between two steps."""
        return self._between(self._log_snr, _float(t))

    def inverse_log_snr(self, log_snr):
        """t, straight between two steps."""
        target = _float(log_snr)
        rising = ops.cast(-self._log_snr, target.dtype)
        step = ops.clip(
            ops.searchsorted(rising, ops.reshape(-target, (-1,))) - 1,
            0,
            max(self.num_timesteps - 2, 0),
        )
        step = ops.reshape(ops.cast(step, "int32"), ops.shape(target))
        low = ops.take(rising, step, axis=0)
        high = ops.take(rising, ops.minimum(step + 1, self.num_timesteps - 1), axis=0)
        share = ops.clip((-target - low) / ops.maximum(high - low, 1e-12), 0.0, 1.0)
        return (ops.cast(step, target.dtype) + 1.0 + share) / self.num_timesteps

    def _scale(self, t):
        return ops.exp(self._between(self._log_scale, _float(t)))

    def alpha(self, t):
        """√(α² + σ²) · √sigmoid(λ)."""
        return self._scale(t) * ops.sqrt(ops.sigmoid(self.log_snr(t)))

    def sigma(self, t):
        """√(α² + σ²) · √sigmoid(−λ)."""
        return self._scale(t) * ops.sqrt(ops.sigmoid(-self.log_snr(t)))

    def get_config(self) -> dict:
        """See base class."""
        return {"chain": self.chain}


def continuous(denoiser: Denoiser) -> Denoiser:
    """The denoiser at any noise level: that of a chain also between its steps."""
    if denoiser.process.num_timesteps is None:
        return denoiser
    return _with_process(denoiser, Interpolated(denoiser.process))


def _with_process(denoiser: Denoiser, process: Process) -> Denoiser:
    other = copy.copy(denoiser)
    other.process = process
    inner = getattr(other, "denoiser", None)  # guidance, clipping and labels wrap another
    if isinstance(inner, Denoiser):
        other.denoiser = _with_process(inner, process)
    return other


def first_time(process: Process) -> float:
    """The earliest time with noise: 1/T on a chain, 0 if there is noise at 0, else 1e-5."""
    if process.num_timesteps is not None:
        return 1.0 / process.num_timesteps
    return 0.0 if float(ops.convert_to_numpy(process.sigma(0.0))) > 0.0 else EARLIEST


def log_snr_ends(denoiser: Denoiser) -> tuple[float, float]:
    """(λ at the least noise, λ at the most), cut to ±16 where the process goes further."""
    ends = (
        np.float64(first_time(denoiser.process)),
        np.float64(denoiser.latest),
    )
    values = [float(ops.convert_to_numpy(denoiser.process.log_snr(t))) for t in ends]
    high, low = np.clip(values, -_LIMIT, _LIMIT)
    return float(high), float(low)


def _float(t):
    t = ops.convert_to_tensor(t)
    return t if "float" in str(t.dtype) else ops.cast(t, "float32")
