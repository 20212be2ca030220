"""What the loss weighs, noise level by noise level.

A weight multiplies the squared error of the denoised image, ‖x̂_0 − x_0‖². The trainer measures the
error in the network's own terms, ‖Δy‖² = ((aσ − bα)/σ)² ‖Δx_0‖², and converts (see `predictions`).
So a weight means the same whatever is predicted, and `None`, a constant in the prediction's own
loss, is the choice that each prediction's paper made.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import keras
from keras import ops

from tfdiffusion import _checks, _names
from tfdiffusion.processes import Process

_register = keras.saving.register_keras_serializable(package="tfdiffusion")


class Weight(abc.ABC):
    """A weight of ‖x̂_0 − x_0‖² at time t."""

    @abc.abstractmethod
    def __call__(self, process: Process, t):
        """Weight at t, of t's shape, not negative."""

    def get_config(self) -> dict:
        """Arguments that make this weight again."""
        return dict(vars(self))

    @classmethod
    def from_config(cls, config: dict) -> Weight:
        """Makes the weight of a configuration."""
        return cls(**config)


@_register
@dataclass(frozen=True)
class SNR(Weight):
    """SNR: the plain noise-prediction loss, ‖ε̂ − ε‖² (DDPM, arXiv:2006.11239, eq. 14)."""

    def __call__(self, process: Process, t):
        """exp λ."""
        return ops.exp(process.log_snr(t))


@_register
@dataclass(frozen=True)
class MinSNR(Weight):
    """min(SNR, γ): no noise level outweighs the others by far (arXiv:2303.09556).

    Args:
        gamma: γ > 0.

    Raises:
        ValueError: If it is not.
    """

    gamma: float = 5.0

    def __post_init__(self):
        _checks.number("gamma", self.gamma, "(0, inf)")

    def __call__(self, process: Process, t):
        """Cut at γ."""
        return ops.minimum(ops.exp(process.log_snr(t)), self.gamma)


@_register
@dataclass(frozen=True)
class P2(Weight):
    """SNR / (k + SNR)^γ: less weight where little is left to learn (arXiv:2204.00227, eq. 8).

    Args:
        gamma: γ >= 0; 0 is the plain noise-prediction loss.
        k: keeps the weight finite, positive.

    Raises:
        ValueError: If a number is out of range.
    """

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self):
        _checks.number("gamma", self.gamma, "[0, inf)")
        _checks.number("k", self.k, "(0, inf)")

    def __call__(self, process: Process, t):
        """The noise-prediction weight, damped."""
        snr = ops.exp(process.log_snr(t))
        return snr / (self.k + snr) ** self.gamma


@_register
@dataclass(frozen=True)
class Sigmoid(Weight):
    """SNR · sigmoid(bias − λ): monotone, bounded at both ends (arXiv:2303.00848, app. D).

    Args:
        bias: the log-SNR at which the noise-prediction weight has fallen to a half.

    Raises:
        ValueError: If it is no finite number.
    """

    bias: float = 0.0

    def __post_init__(self):
        _checks.number("bias", self.bias)

    def __call__(self, process: Process, t):
        """The noise-prediction weight, faded out at high SNR."""
        log_snr = process.log_snr(t)
        return ops.exp(log_snr) * ops.sigmoid(self.bias - log_snr)


@_register
@dataclass(frozen=True)
class VLB(Weight):
    """The variational bound, in nats a dimension (VDM, arXiv:2107.00630, eq. 13 and 17).

    −½ SNR'(t) in continuous time, ½ T (SNR_{i−1} − SNR_i) on a chain. There the first step, from
    x_1 to data, has no finite KL term; it is weighed as a Gaussian decoder, ½ T SNR_1.
    """

    def __call__(self, process: Process, t):
        """½ T (SNR_{i−1} − SNR_i) on a chain, −½ SNR dλ/dt otherwise."""
        snr = ops.exp(process.log_snr(t))
        if process.num_timesteps is None:
            # g² = −σ² dλ/dt, and α² = SNR σ².
            return 0.5 * snr * (process.diffusion(t) / process.sigma(t)) ** 2
        before = ops.exp(process.log_snr(ops.maximum(t - 1.0 / process.num_timesteps, 0.0)))
        fall = ops.where(ops.isfinite(before), before - snr, snr)
        return 0.5 * process.num_timesteps * fall


_WEIGHTS = {"snr": SNR, "min_snr": MinSNR, "p2": P2, "sigmoid": Sigmoid, "vlb": VLB}


def names() -> list[str]:
    """Names that `get` knows."""
    return ["constant", *_WEIGHTS]


def get(weight: str | Weight | None) -> Weight | None:
    """Makes a weight by name; an object is returned as it is, "constant" gives None.

    Raises:
        ValueError: If the name is unknown; the message lists the known ones.
    """
    if isinstance(weight, Weight):
        return weight
    if weight is None or (isinstance(weight, str) and weight == "constant"):
        return None
    return _names.look_up("weight", weight, {"constant": None, **_WEIGHTS})()
