"""Models trained for likelihood: learned reverse variances, and learned noise schedules.

`LearnedVarianceModel` is improved DDPM (Nichol & Dhariwal 2021, arXiv:2102.09672): the network also
says how wide each reverse step is. `VariationalDiffusionModel` is VDM (Kingma et al. 2021,
arXiv:2107.00630): it descends the bound of infinitely many steps, and learns the noise schedule.
Both are `DiffusionModel`s with another objective: `fit`, `sample`, saving and the average of the
weights are as they were, and `tfdiffusion.likelihood` says what they are worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from tfdiffusion import _checks, _names, random
from tfdiffusion._backend import rows
from tfdiffusion.denoiser import NetworkDenoiser
from tfdiffusion.fitting import NOISE
from tfdiffusion.likelihood import Pixels
from tfdiffusion.likelihood.bound import log_variances, negative_log, prior_at, step_kl
from tfdiffusion.processes import Process
from tfdiffusion.training import DiffusionModel

_register = keras.saving.register_keras_serializable(package="tfdiffusion")

_DECODER = 3  # stream of a training key, as `NOISE` is
_BITS = 1.0 / math.log(2.0)
_MOST_FREQUENT = 23  # a float32 of size 1 has so many bits behind the point


def _mean(values):
    """Mean over all axes but the first."""
    return ops.mean(values, axis=tuple(range(1, len(values.shape))))


# Learned variances (improved DDPM).


class LearnedVarianceDenoiser(NetworkDenoiser):
    """A network with twice the channels: its prediction, and v for the variance of the step.

    The variance lies between the two that it must lie between, as far as (v + 1)/2 says, in the
    logarithm (improved DDPM, eq. 15):

        ln variance = (1 + v)/2 · ln β + (1 − v)/2 · ln β̃.

    Args:
        network: as in `NetworkDenoiser`, with 2C output channels.
        process: a chain of at least two steps, or its name.
        *args: as in `NetworkDenoiser`.
        **kwargs: as in `NetworkDenoiser`, which checks them.

    Raises:
        ValueError: If the process is no chain.
    """

    learns_variance = True

    def __init__(self, network, process, *args, **kwargs):
        super().__init__(network, process, *args, **kwargs)
        if (self.process.num_timesteps or 0) < 2:
            raise ValueError(
                "A learned variance needs a chain of at least 2 steps, such as 'cosine' or "
                f"'linear'. Received {type(self.process).__name__}."
            )
        # ln β̃ of the second step stands for the first's, which is ln 0.
        t = np.array([2.0, 1.0]) / self.process.num_timesteps
        second = log_variances(self.process, t[0], t[1], 0.0)[1]
        self.floor = float(ops.convert_to_numpy(second))

    def both(self, x_t, t, label=None, training: bool = False):
        """(y, v), each (B, ...), from one call of the network."""
        outputs = super().predict(x_t, t, label, training)
        if outputs.shape[-1] != 2 * x_t.shape[-1]:
            raise ValueError(
                f"A learned variance needs a network with {2 * x_t.shape[-1]} output channels, "
                f"twice those of the data. Received {outputs.shape[-1]}: make it with "
                f"out_channels={2 * x_t.shape[-1]} (UNet) or out_features (MLP)."
            )
        return ops.split(outputs, 2, axis=-1)

    def predict(self, x_t, t, label=None, training: bool = False):
        """The prediction alone."""
        return self.both(x_t, t, label, training)[0]

    def clean(self, y, x_t, t):
        """x̂_0 from the prediction."""
        return self.prediction.clean(y, x_t, *self.coefficients(t, x_t), self.sigma_data)

    def log_variance(self, v, t, s, floor=None):
        """The interpolation above, shaped as v; β̃ of the first step is that of the second."""
        floor = self.floor if floor is None else floor
        log_beta, log_posterior = log_variances(self.process, t, s, floor)
        share = 0.5 * (1.0 + v)
        return share * rows(log_beta, v) + (1.0 - share) * rows(log_posterior, v)

    def reverse(self, x_t, t, s, label=None, floor=None):
        """See base class."""
        with self._weights():
            y, v = self.both(x_t, t, label)
        return self.clean(y, x_t, t), self.log_variance(v, t, s, floor)


@_register
class LearnedVarianceModel(DiffusionModel):
    """Improved DDPM: also learns the variance of its reverse steps (arXiv:2102.09672).

    Example:

    >>> network = tfd.networks.UNet(out_channels=2, widths=(32, 64), groups=8)  # 1 channel, twice
    >>> model = tfd.variational.LearnedVarianceModel(network)
    >>> model.compile("adam")
    >>> model.fit(tfd.data.load("digits", labels=False), epochs=40)
    >>> tfd.likelihood.bound(model, images).mean

    Args:
        network: as in `DiffusionModel`, with twice the channels of the data.
        process: a chain, or its name.
        prediction: as in `DiffusionModel`.
        objective: "hybrid", L_simple + λ L_vlb, where L_vlb moves only the variances because the
            mean in it has a stop-gradient (eq. 16); or "vlb", the bound alone, whose terms are
            drawn by their size (eq. 18).
        vlb_weight: λ of the hybrid objective, for L_vlb in bits a dimension.
        levels: of pixels in [−1, 1], whose bins the decoder integrates over; None for points.
        **kwargs: as in `DiffusionModel`, which checks them.

    Raises:
        ValueError: If the objective is unknown, or the process is no chain.
    """

    def __init__(
        self,
        network,
        process: str | Process = "cosine",
        prediction: str = "noise",
        *,
        objective: str = "hybrid",
        vlb_weight: float = 0.001,
        levels: int | None = 256,
        **kwargs,
    ):
        _names.one_of("objective", objective, ("hybrid", "vlb"))
        _checks.number("vlb_weight", vlb_weight, "[0, inf)")
        super().__init__(network, process, prediction, **kwargs)
        self.raw = LearnedVarianceDenoiser(
            network,
            self.process,
            self.prediction,
            time_input=self.raw.time_input,
            scale_input=self.raw.scale_input,
            sigma_data=self.raw.sigma_data,
        )
        self.objective, self.vlb_weight, self.levels = objective, float(vlb_weight), levels
        self._pixels = None if levels is None else Pixels(levels)

    def build(self, input_shape):
        """See base class; also the history that important times are drawn by."""
        super().build(input_shape)
        self.importance = ImportanceOfTimes(self.process.num_timesteps, name="importance")

    def losses_at(self, x_0, label, t, keys, training: bool = False):
        """The objective of each example; see `DiffusionModel.losses_at`."""
        noise = random.normal(random.fold_in(keys, NOISE), x_0.shape[1:])
        alpha_t, sigma_t = self.raw.coefficients(t, x_0)
        x_t = alpha_t * x_0 + sigma_t * noise
        y, v = self.raw.both(x_t, t, label, training=training)
        if self.objective == "vlb":
            return self.bound_at(x_0, x_t, y, v, t)
        target = self.prediction.target(x_0, noise, alpha_t, sigma_t, self.raw.sigma_data)
        simple = _mean(ops.square(y - target))
        if self.weight is not None:
            simple = self._loss_weight(t) * simple
        fixed = ops.stop_gradient(y)
        return simple + self.vlb_weight * self.bound_at(x_0, x_t, fixed, v, t)

    def bound_at(self, x_0, x_t, y, v, t):
        """T times the bound's term of the step from t, (B,): its mean over uniform t is the bound.

        In bits a dimension, without the prior term. x̂_0 is not clipped: a clipped one has no
        gradient where it is most wrong.
        """
        steps = self.process.num_timesteps
        s = t - 1.0 / steps
        x_0_hat, log_p = self.raw.clean(y, x_t, t), self.raw.log_variance(v, t, s)
        kl = step_kl(self.process, ops.square(x_0 - x_0_hat), log_p, t, s, self.raw.floor)
        decoder = negative_log(x_0, x_0_hat, log_p, self._pixels)
        first = self.process.index(t) <= 1
        return steps * _BITS * ops.where(first, _mean(decoder), _mean(kl))

    def draw_times(self, keys):
        """Times as `times` says, or by importance with the "vlb" objective."""
        if self.objective == "vlb":
            return self.importance.draw(random.uniform(keys))
        return super().draw_times(keys)

    def note_losses(self, t, losses) -> None:
        """Remembers how large the bound's terms are."""
        self.importance.update(self.process.index(t) - 1, losses)

    def get_config(self) -> dict:
        """See base class."""
        return {
            **super().get_config(),
            "objective": self.objective,
            "vlb_weight": self.vlb_weight,
            "levels": self.levels,
        }


class ImportanceOfTimes(keras.layers.Layer):
    """Draws steps of a chain in proportion to √E[L²] (improved DDPM, eq. 18).

    The published method keeps the last ten losses of each step; here it is their moving average
    over about ten. Until each step has been seen ten times, all are drawn equally often; later a
    thousandth still is, so that no step is forgotten.

    Args:
        num_timesteps: T.
    """

    memory, share_of_all = 10, 0.001

    def __init__(self, num_timesteps: int, **kwargs):
        super().__init__(trainable=False, dtype="float32", **kwargs)
        self.num_timesteps = num_timesteps
        shape = {"shape": (num_timesteps,), "initializer": "zeros"}
        self.second_moment = self.add_weight(name="second_moment", **shape)
        self.count = self.add_weight(name="count", **shape)
        self.built = True

    def probabilities(self):
        """Of drawing each of the T steps, (T,)."""
        size = ops.sqrt(self.second_moment.value)
        size = size / ops.maximum(ops.sum(size), 1e-30)
        equal = 1.0 / self.num_timesteps
        warm = ops.min(self.count.value) >= self.memory
        drawn = (1.0 - self.share_of_all) * size + self.share_of_all * equal
        return ops.where(warm, drawn, equal)

    def draw(self, u):
        """Times i/T by the quantile function, and 1/(T p_i) that keeps the mean; each (B,)."""
        p = self.probabilities()
        cumulative = ops.cumsum(p)
        index = ops.searchsorted(cumulative, u * cumulative[-1], side="right")
        index = ops.clip(ops.cast(index, "int32"), 0, self.num_timesteps - 1)
        t = (ops.cast(index, "float32") + 1.0) / self.num_timesteps
        return t, 1.0 / (self.num_timesteps * ops.take(p, index, axis=0))

    def update(self, index, losses) -> None:
        """Moves the averages of the steps (B,) towards the squares of their losses (B,)."""
        member = ops.one_hot(index, self.num_timesteps, dtype="float32")  # (B, T)
        squares = ops.square(ops.cast(ops.stop_gradient(losses), "float32"))
        number = ops.sum(member, axis=0)
        mean = ops.sum(member * squares[:, None], axis=0) / ops.maximum(number, 1.0)
        # The first few are averaged plainly: a memory of zeros would take long to fade.
        total = self.count.value + number
        share = number / ops.maximum(ops.minimum(total, float(self.memory)), 1.0)
        share = ops.minimum(share, 1.0)
        self.second_moment.assign_add(share * (mean - self.second_moment.value))
        self.count.assign(total)


# Variational diffusion models.


class MonotoneSchedule(keras.layers.Layer):
    """γ(t) = −λ(t), rising from γ_0 to γ_1 along a curve that is learned (VDM, app. H).

    γ(t) = γ_0 + (γ_1 − γ_0) shape(t), and shape, from 0 to 1, is a straight line plus sigmoids with
    positive weights and slopes, scaled.

    Args:
        gamma_min: γ_0 at first.
        gamma_max: γ_1 at first.
        units: number of sigmoids.
    """

    def __init__(self, gamma_min: float, gamma_max: float, units: int = 32, **kwargs):
        super().__init__(dtype="float32", **kwargs)
        centres = (np.arange(units) + 0.5) / units

        def weight(name, values):
            initializer = keras.initializers.Constant(np.asarray(values, "float32"))
            return self.add_weight(shape=np.shape(values), initializer=initializer, name=name)

        self.ends = weight("ends", [gamma_min, gamma_max])
        # softplus of these is positive.
        self.line = weight("line", 0.5413)
        self.heights = weight("heights", np.full(units, math.log(math.expm1(1.0 / units))))
        self.slopes = weight("slopes", np.full(units, float(units)))
        self.centres = weight("centres", centres)
        self.built = True

    @property
    def interior(self) -> list:
        """What the shape is made of: all weights but the ends."""
        return [self.line, self.heights, self.slopes, self.centres]

    def _parts(self, t):
        line, heights, slopes, centres = (ops.cast(w, t.dtype) for w in self.interior)
        heights, slopes = ops.softplus(heights), ops.softplus(slopes)
        line = ops.softplus(line)

        def raw(t):
            bumps = ops.sigmoid(slopes * (ops.expand_dims(t, -1) - centres))
            return line * t + ops.sum(heights * bumps, axis=-1)

        low, high = raw(ops.zeros((), t.dtype)), raw(ops.ones((), t.dtype))
        return raw, low, high, (line, heights, slopes, centres)

    def shape_at(self, t):
        """The curve from 0 to 1, at t of any shape."""
        raw, low, high, _ = self._parts(t)
        return (raw(t) - low) / (high - low)

    def slope_at(self, t):
        """Its derivative, positive."""
        _, low, high, (line, heights, slopes, centres) = self._parts(t)
        bumps = ops.sigmoid(slopes * (ops.expand_dims(t, -1) - centres))
        return (line + ops.sum(heights * slopes * bumps * (1.0 - bumps), axis=-1)) / (high - low)


class LearnedSchedule(Process):
    """Variance preserving with a learned log-SNR: α² = sigmoid(−γ), σ² = sigmoid(γ) (VDM, 3.2).

    Gradients reach the ends of γ only: between them the bound does not depend on the schedule
    (VDM, sec. 5.1), and what little one draw of t would say about it is noise.

    Args:
        schedule: a `MonotoneSchedule`.
    """

    def __init__(self, schedule: MonotoneSchedule):
        self.schedule = schedule

    @property
    def variables(self) -> tuple:
        """The weights of the schedule."""
        return tuple(self.schedule.variables)

    def gamma(self, t):
        """γ(t) = −λ(t), of t's shape."""
        t = ops.convert_to_tensor(t)
        t = t if "float" in str(t.dtype) else ops.cast(t, "float32")
        ends = ops.cast(self.schedule.ends, t.dtype)
        return ends[0] + (ends[1] - ends[0]) * ops.stop_gradient(self.schedule.shape_at(t))

    def log_snr(self, t):
        """−γ(t)."""
        return -self.gamma(t)

    def alpha(self, t):
        """√sigmoid(−γ)."""
        return ops.sqrt(ops.sigmoid(-self.gamma(t)))

    def sigma(self, t):
        """√sigmoid(γ)."""
        return ops.sqrt(ops.sigmoid(self.gamma(t)))

    def get_config(self) -> dict:
        """See base class; the weights are saved with the model that learned them."""
        return {"schedule": self.schedule}


@_register
class VariationalDiffusionModel(DiffusionModel):
    """VDM: descends the bound of infinitely many steps, in bits a dimension (arXiv:2107.00630).

    loss = prior term + decoder + ½ γ'(t) ‖ε − ε̂‖² (eq. 11 and 17). The bound depends on the ends of
    the schedule alone, which descend it; the curve between them descends the variance of the loss
    over t (sec. 5.1 and app. I.2), at no second call of the network.

    Example:

    >>> network = tfd.networks.UNet(out_channels=1, widths=(32, 64), groups=8)
    >>> network = tfd.variational.WithFourierFeatures(network)
    >>> model = tfd.variational.VariationalDiffusionModel(network)
    >>> model.compile("adam")
    >>> model.fit(tfd.data.load("mnist", labels=False), epochs=40)
    >>> tfd.likelihood.continuous_bound(model, images).mean

    Args:
        network: as in `DiffusionModel`; it is told λ.
        prediction: as in `DiffusionModel`; the loss is that of ε̂ whatever the network says.
        gamma_min: −λ(0) at first: 13.3 is a noise of 0.0013, a third of the bin of 8-bit pixels.
        gamma_max: −λ(1) at first.
        learn_schedule: False keeps γ(t) the straight line that it is at first.
        levels: of pixels in [−1, 1], whose bins the decoder integrates over; None for points.
        times: as in `DiffusionModel`.
        **kwargs: as in `DiffusionModel`, which checks them.

    Raises:
        ValueError: If gamma_min < gamma_max does not hold, or a process or weight is given.
    """

    def __init__(
        self,
        network,
        prediction: str = "noise",
        *,
        gamma_min: float = -13.3,
        gamma_max: float = 5.0,
        learn_schedule: bool = True,
        levels: int | None = 256,
        times: str = "stratified",
        **kwargs,
    ):
        _checks.numbers(gamma_min=gamma_min, gamma_max=gamma_max)
        if not gamma_min < gamma_max:
            raise ValueError(
                "VariationalDiffusionModel needs gamma_min < gamma_max. "
                f"Received gamma_min={gamma_min}, gamma_max={gamma_max}."
            )
        if "process" in kwargs or "weight" in kwargs:
            raise ValueError(
                "VariationalDiffusionModel learns its process, and its loss is the bound, which "
                "has no weights. Leave process and weight out, or use DiffusionModel."
            )
        schedule = MonotoneSchedule(gamma_min, gamma_max, name="schedule")
        process = LearnedSchedule(schedule)
        super().__init__(
            network, process, prediction, times=times, **{"time_input": "log_snr", **kwargs}
        )
        self.schedule = schedule
        self.schedule.trainable = bool(learn_schedule)
        self.levels = levels
        self._pixels = None if levels is None else Pixels(levels)
        self._schedule_config = {
            "gamma_min": float(gamma_min),
            "gamma_max": float(gamma_max),
            "learn_schedule": bool(learn_schedule),
        }

    def losses_at(self, x_0, label, t, keys, training: bool = False):
        """The bound of each example at one time, in bits a dimension, (B,).

        Unbiased: its mean over uniform t is the bound of infinitely many steps.
        """
        noise = random.normal(random.fold_in(keys, NOISE), x_0.shape[1:])
        alpha_t, sigma_t = self.raw.coefficients(t, x_0)
        x_t = alpha_t * x_0 + sigma_t * noise
        y = self.raw.predict(x_t, t, label, training=training)
        clean = self.prediction.clean(y, x_t, alpha_t, sigma_t, self.raw.sigma_data)
        error = _mean(ops.square(x_0 - clean)) * ops.exp(self.process.log_snr(t))  # ‖ε − ε̂‖²
        ends = ops.convert_to_tensor(self.schedule.ends)
        length, slope = ends[1] - ends[0], ops.stop_gradient(self.schedule.slope_at(t))
        steps = 0.5 * length * slope * error
        losses = steps + _mean(prior_at(x_0, -ends[1])) + self._decoder(x_0, ends[0], keys)
        variance = self._relative_second_moment(t, ops.stop_gradient(steps), slope)
        # Its gradient, not its value: the loss stays the bound.
        return _BITS * losses + (variance - ops.stop_gradient(variance))

    def _decoder(self, x_0, gamma, keys):
        """−ln p(x_0 | x_{t=0}), which needs no network: VDM decodes z_0 alone."""
        noise = random.normal(random.fold_in(keys, _DECODER), x_0.shape[1:])
        return _mean(negative_log(x_0, x_0 + ops.exp(0.5 * gamma) * noise, gamma, self._pixels))

    def _relative_second_moment(self, t, steps, slope):
        """E steps² over (E steps)², (B,), for the gradient of the schedule's curve.

        The second moment is ¼ ∫ M(γ) γ' dγ with M = E‖ε − ε̂‖⁴: only γ', at a fixed γ, depends on
        the curve. The time at which the curve reaches that γ moves with it; one Newton step from
        t, where it is now, says how.
        """
        reached = ops.stop_gradient(self.schedule.shape_at(t))
        moved = t + (reached - self.schedule.shape_at(t)) / slope
        ratio = self.schedule.slope_at(moved) / slope
        return ops.square(steps) / ops.square(ops.mean(steps)) * ratio

    def averaged(self) -> DiffusionModel:
        """See base class."""
        model = super().averaged()
        for theirs, mine in zip(self.schedule.variables, model.schedule.variables):
            mine.assign(theirs)
        return model

    def get_config(self) -> dict:
        """See base class."""
        config = {**super().get_config(), **self._schedule_config, "levels": self.levels}
        for name in ("process", "weight"):
            del config[name]
        return config


@_register
class WithFourierFeatures(keras.layers.Layer):
    """Gives a network sin and cos of its input, too: fine detail for the last bits (VDM).

    The channels x are joined by sin(2ⁿ π x) and cos(2ⁿ π x). The defaults are the paper's, periods
    of two bins and of one. Octaves up to these, `range(1, 9)`, let a network read off at every
    noise level how far a pixel is from black or white; it then learns images that are mostly one
    of both, such as MNIST, in a fraction of the steps.

    Args:
        network: any network of `tfdiffusion.networks`.
        frequencies: n of each pair.
        **kwargs: as in `keras.layers.Layer`.

    Raises:
        TypeError: If the network is none.
        ValueError: If the frequencies are no integers. When it is built, if the network does not
            give back the channels of the data.
    """

    def __init__(self, network, frequencies: Sequence[int] = (7, 8), **kwargs):
        # What the layer does is for float32; the network has a policy of its own.
        super().__init__(**{"dtype": "float32", "autocast": False, **kwargs})
        if not isinstance(network, keras.Layer):
            raise TypeError(
                f"network must be a Keras layer or model. Received {_checks.shown(network)}."
            )
        wanted = "integers n, of sin and cos of 2^n pi x"
        frequencies = _checks.array("frequencies", frequencies, wanted, kinds="iu", rank=1)
        if frequencies.size and np.abs(frequencies).max() > _MOST_FREQUENT:
            raise ValueError(
                f"frequencies must lie in [-{_MOST_FREQUENT}, {_MOST_FREQUENT}], beyond which "
                f"float32 knows no phase. Received {frequencies.tolist()}."
            )
        self.network, self.frequencies = network, tuple(frequencies.tolist())

    @property
    def num_classes(self) -> int | None:
        """Of the network."""
        return getattr(self.network, "num_classes", None)

    def build(self, input_shape):
        """Builds the network for the wider input."""
        shape = tuple(input_shape["x"])
        wider = (*shape[:-1], shape[-1] * (1 + 2 * len(self.frequencies)))
        shapes = {**input_shape, "x": wider}
        channels = self.network.compute_output_shape(shapes)[-1]
        if channels != shape[-1]:
            raise ValueError(
                f"The network gives {channels} channels for data of {shape[-1]}. Make it with "
                f"out_channels={shape[-1]} (UNet) or out_features={shape[-1]} (MLP)."
            )
        if not self.network.built:
            self.network.build(shapes)
        self.built = True

    def call(self, inputs, training=False):
        """The network's output for x and its features."""
        x = ops.cast(inputs["x"], "float32")
        angles = [2.0**n * math.pi * x for n in self.frequencies]
        features = [f(angle) for angle in angles for f in (ops.sin, ops.cos)]
        wider = ops.concatenate([x, *features], axis=-1)
        return self.network({**inputs, "x": wider}, training=training)

    def compute_output_shape(self, input_shape):
        """That of the data."""
        return tuple(input_shape["x"])

    def get_config(self) -> dict:
        """See base class."""
        network = keras.saving.serialize_keras_object(self.network)
        return {**super().get_config(), "network": network, "frequencies": self.frequencies}

    @classmethod
    def from_config(cls, config: dict) -> WithFourierFeatures:
        """See base class."""
        config = dict(config)
        config["network"] = keras.saving.deserialize_keras_object(config["network"])
        return cls(**config)
