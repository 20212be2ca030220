"""`DiffusionModel`: a network, a process and a prediction that `fit()` knows how to train."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from tfdiffusion import (
    _backend,
    _checks,
    predictions,
    processes,
    random,
    samplers,
    times,
    weights,
)
from tfdiffusion.denoiser import (
    Conditioned,
    Denoiser,
    NetworkDenoiser,
    Threshold,
    get_threshold,
)
from tfdiffusion.fitting import (
    NOISE,
    ExponentialMovingAverage,
    LossByNoiseLevel,
    NoiseConditionalModel,
    check_seeds,
    in_batches,
)
from tfdiffusion.guidance import ClassifierFreeGuidance
from tfdiffusion.samplers.loop import ending, integrate, prior, resolve_grid
from tfdiffusion.times import Grid

__all__ = ["DiffusionModel", "ExponentialMovingAverage", "LossByNoiseLevel"]

_register = keras.saving.register_keras_serializable(package="tfdiffusion")


@_register
class DiffusionModel(NoiseConditionalModel):
    """Learns to denoise, with `fit()`; then samples, saves and exports.

    For each image of a batch the training step draws a time t and noise ε, forms
    x_t = α x_0 + σ ε, and regresses what the prediction says (by default ε: the noise-prediction
    objective, DDPM, arXiv:2006.11239, alg. 1). An exponential moving average of the weights is kept
    beside the raw ones; validation, sampling and export read the average.

    Example:

    >>> model = tfd.DiffusionModel(tfd.networks.UNet(out_channels=1, num_classes=10))
    >>> model.compile(optimizer=keras.optimizers.Adam(2e-4))
    >>> model.fit(tfd.data.load("digits", batch_size=64), epochs=100)
    >>> images = model.sample(64, label=3, seed=0)  # (64, 8, 8, 1) in [-1, 1]

    `fit` takes images x_0 of shape (N, H, W, C), or points (N, D), float in [−1, 1]; with labels
    int (N,) behind them where the network has `num_classes`. `compile` takes any Keras optimizer
    and no loss: the model brings its own.

    Args:
        network: a Keras layer or model called on {"x", "time"[, "label"]}; see
            `tfdiffusion.networks`.
        process: a `Process` or its name.
        prediction: a `Prediction` or its name: "noise", "clean", "v", "flow", "score", "edm".
        weight: of the loss: "constant" in the prediction's own loss, "snr", "min_snr", "p2",
            "sigmoid", "vlb", or a `Weight`.
        times: on which to train: "uniform", "stratified", "logit_normal", "log_normal_sigma", ...,
            or a `TimeDistribution`.
        label_dropout: share of labels withheld in training, which is what guidance needs.
        ema_decay: of the averaged weights; None keeps no average.
        time_input: what the network is told about time; see `NetworkDenoiser`.
        scale_input: see `NetworkDenoiser`.
        sigma_data: standard deviation of the data.
        bounded: whether the data lie in [−1, 1], which training then checks and sampling makes use
            of; by default so for images, and not so for points. Pass False for latents.
        sampling: how `sample` and the export draw unless they are told otherwise; None for the
            library's own choice.
        seed: of times and noise in training.

    Raises:
        ValueError: If a name is unknown or a number out of its range. `fit` raises it for data of
            another kind than described above, and `NotFiniteError` when the loss is no number any
            more; the weights are then those before that batch.
    """

    def __init__(
        self,
        network,
        process: str | processes.Process = "cosine",
        prediction: str | predictions.Prediction = "noise",
        *,
        weight: str | weights.Weight | None = "constant",
        times: str | times.TimeDistribution = "uniform",
        label_dropout: float = 0.1,
        ema_decay: float | None = 0.999,
        time_input: str = "timestep",
        scale_input: bool = True,
        sigma_data: float = 1.0,
        bounded: bool | None = None,
        sampling: samplers.Sampling | None = None,
        seed: int = 0,
        **kwargs,
    ):
        if sampling is not None and not isinstance(sampling, samplers.Sampling):
            raise TypeError(
                "sampling must be a samplers.Sampling(sampler, grid, steps), or None. "
                f"Received {_checks.shown(sampling)}."
            )
        told = {"time_input": time_input, "scale_input": scale_input, "sigma_data": sigma_data}
        raw = NetworkDenoiser(network, process, prediction, **told)
        super().__init__(
            raw,
            times,
            label_dropout=label_dropout,
            ema_decay=ema_decay,
            bounded=bounded,
            seed=seed,
            **kwargs,
        )
        self.weight = weights.get(weight)
        self.sampling = samplers.Sampling() if sampling is None else sampling

    # Keras: calling and saving.

    def call(self, x_t, t=0.5, label=None):
        """x̂_0 for noisy images at time t, with the averaged weights; see `denoiser`."""
        if not ops.is_tensor(t) and not _checks.is_symbol(t):
            t = _checks.array("t", t, "times in [0, 1], one or one a row").astype("float32")
        return self.denoiser()(x_t, t, label)

    def get_config(self) -> dict:
        """See base class."""
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "network": serialize(self.network),
            "process": serialize(self.process),
            "prediction": self.prediction.name,
            "weight": "constant" if self.weight is None else serialize(self.weight),
            "times": serialize(self.times),
            "label_dropout": self.label_dropout,
            "ema_decay": None if self.ema is None else self.ema.decay,
            "time_input": self.raw.time_input,
            "scale_input": self.raw.scale_input,
            "sigma_data": self.raw.sigma_data,
            "bounded": self._bounded,
            "sampling": serialize(self.sampling),
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict) -> DiffusionModel:
        """See base class."""
        config = dict(config)
        for key in ("network", "process", "weight", "times", "sampling"):
            if isinstance(config.get(key), dict):
                config[key] = keras.saving.deserialize_keras_object(config[key])
        return cls(**config)

    # Training.

    def losses_at(self, x_0, label, t, keys, training: bool = False):
        """The objective of each example: w(t) ‖y_θ(x_t, t) − y‖², averaged over its elements.

        Args:
            x_0: float (B, ...), clean data.
            label: int (B,) or None.
            t: times (B,).
            keys: uint32 (B, 2), for the noise.
            training: whether dropout and the like are on.

        Returns:
            float32 (B,).
        """
        noise = random.normal(random.fold_in(keys, NOISE), x_0.shape[1:])
        alpha_t, sigma_t = self.raw.coefficients(t, x_0)
        x_t = alpha_t * x_0 + sigma_t * noise
        y = self.raw.predict(x_t, t, label, training=training)
        target = self.prediction.target(x_0, noise, alpha_t, sigma_t, self.raw.sigma_data)
        error = ops.mean(ops.square(y - target), axis=tuple(range(1, len(x_0.shape))))
        return error if self.weight is None else self._loss_weight(t) * error

    def _loss_weight(self, t):
        """The weight of ‖Δx_0‖², converted to the prediction's own error."""
        alpha_t, sigma_t = self.process.alpha(t), self.process.sigma(t)
        determinant = self.prediction.determinant(alpha_t, sigma_t, self.raw.sigma_data)
        return self.weight(self.process, t) * (sigma_t / determinant) ** 2

    # Sampling.

    def guided(
        self,
        label=None,
        guidance=None,
        *,
        threshold: str | Threshold | None = "auto",
        ema: bool = True,
    ) -> Denoiser:
        """A denoiser with label, guidance and thresholding in it, ready for any sampler.

        Args:
            label: int (B,) or scalar; None for the unconditional model.
            guidance: scale, a number or float (B,); None for the plain conditional model.
            threshold: "clip" holds x̂_0 in [−1, 1], "dynamic" is Imagen's, a `Threshold` has
                another range, None does neither; "auto" is that of `self.sampling`, and if that is
                "auto" too, "clip" for data that lie in [−1, 1] and None for others.
            ema: False for the raw weights.

        Raises:
            ValueError: If a label or guidance is asked of an unconditional model.
        """
        return self.guide(self.denoiser(ema), label, guidance, threshold=threshold)

    def guide(self, denoiser: Denoiser, label=None, guidance=None, *, threshold="auto") -> Denoiser:
        """What `guided` does, of a denoiser that is not quite the model's own."""
        if guidance is not None:
            denoiser = ClassifierFreeGuidance(denoiser, label, guidance)
        elif label is not None:
            denoiser = Conditioned(denoiser, label)
        return self._threshold(threshold)(denoiser)

    def _threshold(self, threshold):
        """The function from denoiser to denoiser that "auto" or another threshold stands for."""
        for own in (self.sampling.threshold, "clip" if self.bounded else None):
            if isinstance(threshold, str) and threshold == "auto":
                threshold = own
        return get_threshold(threshold)

    def sample(
        self,
        num: int = 16,
        *,
        label=None,
        guidance: float | Sequence[float] = 1.0,
        steps: int | None = None,
        sampler: str | samplers.Sampler | None = None,
        grid: str | Grid | Sequence[float] | None = None,
        threshold: str | Threshold | None = "auto",
        seed: int = 0,
        seeds=None,
        ema: bool = True,
        batch_size: int = 256,
        return_path: bool = False,
    ):
        """Draws images; image i is the one of seed `seed` + i, in whatever batch it is made.

        Args:
            num: how many.
            label: class of all images, or one a row (num,); None for the unconditional model.
            guidance: scale of all images, or one a row (num,); 1 is the plain conditional model,
                0 ignores the label.
            steps: N, times to visit, at most T on a chain of T steps; a sampler of k evaluations a
                step takes k (N − 1) + 1 of the network. None is what `self.sampling` says, here
                and in the next two.
            sampler: "ddim", "ddpm", ..., or a `Sampler`.
            grid: times to visit; see `tfdiffusion.times.grid`.
            threshold: see `guided`.
            seed: of the first image.
            seeds: one a row (num,), instead of seed, seed + 1, …
            ema: False for the raw weights.
            batch_size: at most so many at a time; it does not change any image.
            return_path: also return the states on the way, float32 (steps + 1, num, ...).

        Returns:
            NumPy float32 (num, ...), images in [−1, 1] unless threshold=None; or (images, path).

        Raises:
            ValueError: If the model has not seen data, a name is unknown or a number out of range.
            RuntimeError: If a sampler with a tolerance could not meet it.
        """
        if self.sample_shape is None:
            raise ValueError("The model has no shape yet: call fit, or build((None, H, W, C)).")
        seeds, labels, scales = self._check_request(num, label, guidance, seed, seeds)
        self._start_average()
        own = self.sampling
        sampler = samplers.get(own.sampler if sampler is None else sampler)
        grid, steps = (own.grid if grid is None else grid), (own.steps if steps is None else steps)
        visited = resolve_grid(self.raw, grid, steps, sampler)
        self._threshold(threshold)
        guided = bool((scales != 1.0).any())
        run = self._compiled_sampler(
            sampler, labels is not None, guided, threshold, ema, return_path, ending(grid)
        )
        rows = [random.keys(seeds)]
        if labels is not None:
            rows.append(labels.astype("int32"))
        if guided:
            rows.append(scales.astype("float32"))

        def draw(*rows):
            *result, report = run(visited, *rows)
            sampler.check(report)
            return result if return_path else result[0]

        return in_batches(draw, rows, num, batch_size, return_path)

    def _compiled_sampler(self, sampler, conditional, guided, threshold, ema, return_path, end):
        """One compiled loop for each kind of request, kept for the next."""
        key = (
            type(sampler).__name__,
            repr(sampler),
            conditional,
            guided,
            threshold,
            ema,
            return_path,
            end["denoise_last"],
        )
        if key not in self._compiled_samplers:
            shape = self.sample_shape

            def run(visited, keys, label=None, scale=None):
                denoiser = self.guided(label, scale, threshold=threshold, ema=ema)
                x = prior(denoiser, keys, shape, visited[0])
                wanted = {"return_path": return_path, "return_report": True}
                return integrate(denoiser, sampler, visited, keys, x, **end, **wanted)

            variables = self.variables
            self._compiled_samplers[key] = _backend.compiled(run, variables)
        return self._compiled_samplers[key]

    def _check_request(self, num, label, guidance, seed, seeds):
        seeds = check_seeds(num, seed, seeds)
        scales = _for_each_row("guidance", guidance, num)
        if label is None:
            if (scales != 1.0).any():
                raise ValueError(
                    f"guidance={_checks.shown(guidance)} needs a label to guide towards. "
                    "Pass label=..."
                )
            return seeds, None, scales
        if self.num_classes is None:
            raise ValueError(
                f"label={_checks.shown(label)} was asked of an unconditional model. Train one with "
                "a network made with num_classes=..., or leave label out."
            )
        labels = _for_each_row("label", label, num)
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"label must be integers from 0 to {self.num_classes - 1}. "
                f"Received {_checks.shown(label)}."
            )
        return seeds, labels, scales


def _for_each_row(name: str, value, num: int) -> np.ndarray:
    """A value for all rows, or one for each, as (num,)."""
    values = _checks.array(name, value, f"one number or {num}, one a row")
    if values.shape not in ((), (num,)):
        raise ValueError(
            f"{name} must be one number or {num}, one a row. Received shape {values.shape}."
        )
    return np.broadcast_to(values, (num,))
