"""From a network to x̂_0, the mean of the clean image given the noisy one.

A denoiser is a function (x_t, t) → x̂_0 ≈ E[x_0 | x_t] together with its process; the noise, the
score and the probability-flow velocity are then other ways to write the same thing,

    ε̂ = (x_t − α x̂_0)/σ,    ∇ log q(x_t) = −ε̂/σ,    dx/dt = α' x̂_0 + σ' ε̂,

by Tweedie's formula. Samplers see nothing but denoisers, so guidance, clipping, inpainting are
wrappers that turn a denoiser into a denoiser, and all of them hold for every sampler.
"""

from __future__ import annotations

import abc
import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
from keras import ops

from tfdiffusion import _backend, _checks, _names, predictions
from tfdiffusion._backend import rows
from tfdiffusion.processes import Process


class Denoiser(abc.ABC):
    """x̂_0(x_t, t), and the noise, score and velocity that follow from it.

    Attributes:
        process: the noising process that it undoes.
        latest: the last time at which it is defined; sampling starts there.
        variables: every Keras variable that it reads.
    """

    process: Process
    latest: float = 1.0
    variables: tuple = ()
    #: Whether `reverse` is there.
    learns_variance: bool = False

    @abc.abstractmethod
    def __call__(self, x_t, t):
        """The denoised batch.

        Args:
            x_t: float tensor (B, ...), noisy data.
            t: times in (0, 1], scalar or (B,).

        Returns:
            x̂_0, float tensor (B, ...).
        """

    def noise_from(self, x_t, x_0, t):
        """ε̂ = (x_t − α x̂_0)/σ for a given x̂_0."""
        return (x_t - rows(self.process.alpha(t), x_t) * x_0) / rows(self.process.sigma(t), x_t)

    def noise(self, x_t, t):
        """ε̂(x_t, t), the noise in x_t."""
        return self.noise_from(x_t, self(x_t, t), t)

    def score(self, x_t, t):
        """∇ log q_t(x_t) = −ε̂/σ."""
        return -self.noise(x_t, t) / rows(self.process.sigma(t), x_t)

    def reverse(self, x_t, t, s, label=None, floor=None):
        """x̂_0 and a learned log variance of p(x_s | x_t), from one call of the network.

        Args:
            x_t: float (B, ...).
            t: the time now, scalar or (B,).
            s: the next time; 0 or None for the step to the data.
            label: int (B,) or None.
            floor: ln of the variance that stands for β̃ where s = 0.

        Returns:
            x̂_0 and the log variance, (B, ...).

        Raises:
            TypeError: If the denoiser learned none.
        """
        raise TypeError(
            f"{type(self).__name__} has no learned variance. Train a "
            "tfdiffusion.variational.LearnedVarianceModel, or use 'posterior' or 'beta'."
        )

    def velocity(self, x_t, t):
        """dx/dt of the probability-flow ODE, f x − ½ g² ∇ log q (arXiv:2011.13456, eq. 13).

        Written α' x̂_0 + σ' ε̂, it needs neither f nor g, which are infinite where α = 0.
        """
        x_0 = self(x_t, t)
        alpha_slope, sigma_slope = self.process.slopes(t)
        noise = self.noise_from(x_t, x_0, t)
        return rows(alpha_slope, x_t) * x_0 + rows(sigma_slope, x_t) * noise

    def reverse_drift(self, x_t, t):
        """f x − g² ∇ log q of the reverse SDE, whose noise is g (arXiv:2011.13456, eq. 6)."""
        process = self.process
        gain = process.diffusion(t) ** 2 / process.sigma(t)
        return rows(process.drift(t), x_t) * x_t + rows(gain, x_t) * self.noise(x_t, t)


def _timestep(process: Process, t):
    """DDPM's 0-based step, 0 … T−1; a continuous process counts as one of 1000 steps."""
    return t * process.resolution - 1.0


def _log_snr(process: Process, t):
    """λ, held finite for the network where there is no signal or no noise at all."""
    return ops.clip(process.log_snr(t), -30.0, 30.0)


_TIME_INPUTS: dict[str, Callable] = {
    "timestep": _timestep,
    # For levels between the steps of a chain that the network was never told of.
    "nearest_timestep": lambda process, t: ops.round(_timestep(process, t)),
    # What flow-matching networks are told.
    "thousandths": lambda process, t: 1000.0 * t,
    "log_snr": _log_snr,
    "sigma": lambda process, t: process.sigma(t),
    # The code of arXiv:2011.13456 steps from 1 to 0, but tells networks times from 1 to 1e-5.
    "score_sde_sigma": lambda process, t: process.sigma(t + 1e-5 * (1.0 - t)),
    "log_sigma": lambda process, t: ops.log(process.sigma(t)),
    # EDM's c_noise (arXiv:2206.00364, table 1), for any process: ln(σ/α)/4.
    "edm": lambda process, t: -0.125 * _log_snr(process, t),
    # A noise-conditioned score network's level, 0 for the largest noise (arXiv:1907.05600).
    "level": lambda process, t: process.resolution * (1.0 - t),
}


class NetworkDenoiser(Denoiser):
    """A network, what it predicts, and what it is told about time.

    The network gets c_in x_t with c_in = 1/√(α² σ_d² + σ²), which is 1 on variance-preserving
    processes and data of variance 1, and keeps the input of the others at unit scale
    (EDM, arXiv:2206.00364, eq. 7).

    Args:
        network: called as `network({"x": ..., "time": ..., "label": ...}, training=...)`.
        process: a `Process` or its name.
        prediction: a `Prediction` or its name.
        time_input: "timestep" (t T − 1), "nearest_timestep" (the same, rounded), "thousandths"
            (1000 t), "log_snr", "sigma", "score_sde_sigma" (the same, 1e-5 (1 − t) later),
            "log_sigma", "edm" (ln(σ/α)/4), "level".
        sigma_data: σ_d, the standard deviation of the data.
        scale_input: False feeds x_t as it is, as noise-conditioned score networks want.

    Raises:
        ValueError: If a name is unknown, or the prediction is singular at the end of a chain.
        TypeError: If the network cannot be called.
    """

    #: Shape of one example, where it is known; its last axis is that of the network's weights.
    example: tuple[int | None, ...] | None = None

    def __init__(
        self,
        network,
        process: str | Process,
        prediction: str | predictions.Prediction = "noise",
        *,
        time_input: str = "timestep",
        sigma_data: float = 1.0,
        scale_input: bool = True,
    ):
        from tfdiffusion import processes

        if not callable(network):
            raise TypeError(
                "network must be called on {'x': ..., 'time': ...}: one of tfdiffusion.networks, "
                f"or any Keras layer that does. Received {_checks.shown(network)}."
            )
        self.network = network
        self.process = processes.get(process)
        self.prediction = predictions.get(prediction)
        self.time_input = time_input
        self._time_input = _names.look_up("time input", time_input, _TIME_INPUTS)
        self.sigma_data = _checks.number("sigma_data", sigma_data, "(0, inf)")
        self.scale_input = bool(scale_input)
        self._substitutes: Callable[[], list[tuple]] | None = None
        self._more_variables: tuple = ()
        self.latest = latest_time(
            self.process,
            self.prediction.singular,
            f"{self.prediction.name!r} prediction says nothing about the image",
            "prediction='v', 'flow', 'clean' or 'edm'",
        )

    def reading(
        self, substitutes: Callable[[], list[tuple]], variables: Sequence = ()
    ) -> NetworkDenoiser:
        """The same denoiser with other weights, such as their average.

        Args:
            substitutes: gives (variable, value) pairs for all of the network's variables.
            variables: those that the values come from.
        """
        other = copy.copy(self)
        other._substitutes, other._more_variables = substitutes, tuple(variables)
        return other

    @property
    def variables(self) -> tuple:
        """The network's variables, and those that stand in for them."""
        learned = getattr(self.process, "variables", ())
        return (*getattr(self.network, "variables", ()), *learned, *self._more_variables)

    @property
    def num_classes(self) -> int | None:
        """Number of classes that the network tells apart, None without labels."""
        return getattr(self.network, "num_classes", None)

    def _weights(self):
        """Context in which the network has the weights to denoise with."""
        if self._substitutes is None:
            return contextlib.nullcontext()
        return _backend.substituted(self._substitutes())

    def coefficients(self, t, x):
        """α, σ at t, shaped to multiply x."""
        return rows(self.process.alpha(t), x), rows(self.process.sigma(t), x)

    def predict(self, x_t, t, label=None, training: bool = False):
        """What the network says, in its own terms.

        Args:
            x_t: float tensor (B, ...).
            t: times, scalar or (B,).
            label: int (B,) or None for "no label"; `num_classes` also means that.
            training: whether dropout and the like are on.

        Returns:
            y, float32 (B, ...).

        Raises:
            ValueError: If x_t is not float or of another shape than the network's, the times are
                neither one nor B, or the labels are none of the network's.
        """
        self._check(x_t, t, label)
        alpha_t, sigma_t = self.coefficients(t, x_t)
        x = x_t
        if self.scale_input:
            x = x_t / (alpha_t**2 * self.sigma_data**2 + sigma_t**2) ** 0.5
        batch = ops.shape(x_t)[0]
        time = ops.cast(self._time_input(self.process, t), "float32")
        inputs = {"x": x, "time": ops.broadcast_to(time, (batch,))}
        if self.num_classes is not None:
            label = self.num_classes if label is None else label
            inputs["label"] = ops.broadcast_to(ops.cast(label, "int32"), (batch,))
        return ops.cast(self.network(inputs, training=training), x_t.dtype)

    def _check(self, x_t, t, label) -> None:
        """Looks at what costs nothing to look at, and at labels outside of graphs."""
        _checks.floating(x_t=x_t)
        _checks.one_a_row(x_t, t=t)
        known, shape = self.example, tuple(x_t.shape)
        if known is not None and (len(shape) != len(known) + 1 or shape[-1] != known[-1]):
            raise ValueError(f"x_t must be of shape (B, {_listed(known)}). Received {shape}.")
        if label is not None:
            check_labels(label, self.num_classes)
            _checks.one_a_row(x_t, label=label)

    def __call__(self, x_t, t, label=None):
        """x̂_0 from the network; see `Denoiser` and `predict`."""
        with self._weights():
            y = self.predict(x_t, t, label)
        alpha_t, sigma_t = self.coefficients(t, x_t)
        return self.prediction.clean(y, x_t, alpha_t, sigma_t, self.sigma_data)


def _listed(shape) -> str:
    return ", ".join("?" if side is None else str(side) for side in shape)


def check(denoiser: Denoiser) -> Denoiser:
    """The denoiser itself.

    Raises:
        TypeError: If it is none.
    """
    if isinstance(denoiser, Denoiser):
        return denoiser
    hint = " Pass model.denoiser()." if hasattr(denoiser, "denoiser") else ""
    raise TypeError(
        "denoiser must be a denoiser, (x_t, t) -> x_0, such as model.denoiser() gives. Received "
        f"{_checks.shown(denoiser)}.{hint}"
    )


def check_labels(label, num_classes: int | None) -> None:
    """Raises a ValueError unless labels are those of a network; `num_classes` is "no label".

    Of labels in a graph only the dtype can be looked at.
    """
    if num_classes is None:
        raise ValueError(
            "The network has no labels, its num_classes is None: leave label out. "
            f"Received label={_checks.shown(label)}."
        )
    wanted = f"integers from 0 to {num_classes - 1}, the classes of the network"
    if _checks.is_symbol(label):
        ours = "int" in _checks.dtype(label)
    else:
        values = _checks.array("label", label, wanted, kinds="iu")
        ours = not values.size or (values.min() >= 0 and values.max() <= num_classes)
    if not ours:
        raise ValueError(f"label must be {wanted}. Received {_checks.shown(label)}.")


def latest_time(process: Process, singular: bool, what: str, instead: str) -> float:
    """1, or the time where what is singular at α = 0 has to stop.

    Args:
        process: that may end there.
        singular: whether it is.
        what: it is and what happens there, for the message.
        instead: what to use instead, for the message.

    Raises:
        ValueError: If it is singular, and a chain ends there.
    """
    if not singular or float(process.alpha(1.0)) > 1e-6:
        return 1.0
    if process.num_timesteps is not None:
        raise ValueError(
            f"The {what} where alpha = 0, and this chain ends there (zero terminal SNR). "
            f"Use {instead}."
        )
    return 0.999


class Conditioned(Denoiser):
    """A network denoiser with its labels filled in.

    Args:
        denoiser: a `NetworkDenoiser`.
        label: int (B,) or scalar; None for "no label".

    Raises:
        TypeError: If the denoiser is none.
        ValueError: If the labels are none of the network's.
    """

    def __init__(self, denoiser: NetworkDenoiser, label):
        self.denoiser, self.label = check(denoiser), label
        if label is not None:
            check_labels(label, getattr(denoiser, "num_classes", None))
        self.process, self.latest = denoiser.process, denoiser.latest
        self.variables, self.learns_variance = denoiser.variables, denoiser.learns_variance

    def __call__(self, x_t, t):
        """x̂_0 given the label."""
        return self.denoiser(x_t, t, self.label)

    def reverse(self, x_t, t, s, label=None, floor=None):
        """x̂_0 and log variance given the label."""
        return self.denoiser.reverse(x_t, t, s, self.label, floor)


class Clipped(Denoiser):
    """Clips x̂_0 to the range of the data; ε̂ follows, because it is computed from x̂_0.

    Args:
        denoiser: any denoiser.
        limit: x̂_0 is held in [−limit, limit].

    Raises:
        TypeError: If the denoiser is none.
        ValueError: If the limit is not positive.
    """

    def __init__(self, denoiser: Denoiser, limit: float = 1.0):
        self.denoiser, self.limit = check(denoiser), _checks.number("limit", limit, "(0, inf]")
        self.process, self.latest = denoiser.process, denoiser.latest
        self.variables, self.learns_variance = denoiser.variables, denoiser.learns_variance

    def __call__(self, x_t, t):
        """x̂_0, clipped."""
        return ops.clip(self.denoiser(x_t, t), -self.limit, self.limit)

    def reverse(self, x_t, t, s, label=None, floor=None):
        """x̂_0, clipped, and the log variance as it is."""
        x_0, log_variance = self.denoiser.reverse(x_t, t, s, label, floor)
        return ops.clip(x_0, -self.limit, self.limit), log_variance


class DynamicallyThresholded(Denoiser):
    """Scales x̂_0 back where guidance pushes it out of range (Imagen, arXiv:2205.11487, sec. 2.3).

    Each image is clipped at s, the given quantile of |x̂_0| but at least 1, and divided by s. Only
    for pixels: a latent space has no fixed range.

    Args:
        denoiser: any denoiser of images in [−1, 1].
        quantile: in (0, 1].
        most: of s, at least 1.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, denoiser: Denoiser, quantile: float = 0.995, most: float = float("inf")):
        self.denoiser, self.most = check(denoiser), _checks.number("most", most, "[1, inf]")
        self.quantile = _checks.number("quantile", quantile, "(0, 1]")
        self.process, self.latest = denoiser.process, denoiser.latest
        self.variables = denoiser.variables

    def __call__(self, x_t, t):
        """x̂_0, thresholded and rescaled."""
        x_0 = self.denoiser(x_t, t)
        size = ops.abs(ops.reshape(x_0, (ops.shape(x_0)[0], -1)))
        scale = ops.clip(ops.quantile(size, self.quantile, axis=-1), 1.0, self.most)
        scale = rows(scale, x_0)
        return ops.clip(x_0, -scale, scale) / scale


@keras.saving.register_keras_serializable(package="tfdiffusion")
@dataclass(frozen=True)
class Threshold:
    """How x̂_0 is kept in range: a function from denoiser to denoiser.

    Args:
        limit: x̂_0 is clipped at ±limit; with a quantile, the most that images are divided by.
        quantile: for dynamic thresholding; None clips.

    Raises:
        ValueError: If a number is out of range.
    """

    limit: float = 1.0
    quantile: float | None = None

    def __post_init__(self):
        _checks.number("limit", self.limit, "(0, inf]")
        if self.quantile is not None:
            _checks.number("quantile", self.quantile, "(0, 1]")

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser, thresholded."""
        if self.quantile is None:
            return Clipped(denoiser, self.limit)
        return DynamicallyThresholded(denoiser, self.quantile, self.limit)

    def get_config(self) -> dict:
        """Arguments that make this threshold again."""
        return dict(vars(self))

    @classmethod
    def from_config(cls, config: dict) -> Threshold:
        """Makes the threshold of a configuration."""
        return cls(**config)


THRESHOLDS = {"clip": Clipped, "dynamic": DynamicallyThresholded}


def get_threshold(threshold: str | Threshold | None) -> Callable[[Denoiser], Denoiser]:
    """A function from denoiser to denoiser: "clip", "dynamic", a `Threshold`, None for neither.

    Raises:
        ValueError: If the name is unknown; the message lists the known ones.
    """
    if threshold is None:
        return lambda denoiser: denoiser
    if isinstance(threshold, Threshold):
        return threshold
    return _names.look_up("threshold", threshold, THRESHOLDS)
