"""What every model that learns from noisy data does: `fit()`, averaged weights, validation.

A `NoiseConditionalModel` draws noise levels of a process, has an objective of its own at them, and
keeps an exponential moving average of its weights, which validation and sampling read. Subclasses
give the objective and a way to sample: `DiffusionModel` and `score_matching.ScoreModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras import ops

from tfdiffusion import _backend, random, times
from tfdiffusion.denoiser import NetworkDenoiser

_register = keras.saving.register_keras_serializable(package="tfdiffusion")

# Streams of a training key, and the seed of the noise that validation always sees.
_TIMES, NOISE, _LABEL_DROPOUT = 0, 1, 2
_VALIDATION_SEED = 0x76616C


@_register
class ExponentialMovingAverage(keras.layers.Layer):
    """Averaged copies of a network's weights, moved once per optimizer update.

    θ_ema ← m θ_ema + (1 − m) θ with m = min(decay, (1 + n)/(10 + n)) after n updates: a fixed high
    decay would keep the random initial weights in the average for thousands of steps.

    Args:
        decay: m in [0, 1); 0.999 averages over about a thousand updates.

    Raises:
        ValueError: If the decay is out of range.
    """

    def __init__(self, decay: float = 0.999, **kwargs):
        super().__init__(trainable=False, dtype="float32", **kwargs)
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"The EMA's decay must lie in [0, 1). Received {decay}.")
        self.decay = float(decay)

    def follow(self, variables) -> None:
        """Makes one averaged copy for each variable, equal to it."""
        # Set past Keras, which would otherwise count the network's weights as this layer's.
        object.__setattr__(self, "_followed", tuple(variables))
        self.updates = self.add_weight(shape=(), dtype="int32", initializer="zeros", name="updates")
        self.averages = [
            self.add_weight(shape=v.shape, initializer="zeros", name=f"average_{i}")
            for i, v in enumerate(self._followed)
        ]
        self.reset()
        self.built = True

    def start(self) -> None:
        """Before the first update the averages are the variables as they are now, not as built."""
        updates = ops.convert_to_tensor(self.updates)
        if not _backend.is_traced(updates) and int(updates) == 0:
            self.reset()

    def reset(self) -> None:
        """Starts again from the variables as they are."""
        self.updates.assign(0)
        for average, variable in zip(self.averages, self._followed):
            # A copy: JAX donates buffers, and must not find one twice.
            average.assign(ops.copy(ops.cast(variable.value, average.dtype)))

    def update(self, moved=True) -> None:
        """Moves the averages one update on, if the variables have `moved` (a boolean)."""
        n = ops.cast(self.updates.value, "float32")
        decay = ops.minimum(self.decay, (1.0 + n) / (10.0 + n))
        share = ops.where(moved, 1.0 - decay, 0.0)
        for average, variable in zip(self.averages, self._followed):
            value = ops.cast(variable.value, average.dtype)
            average.assign_add(share * (value - average.value))
        self.updates.assign_add(ops.cast(moved, "int32"))

    def pairs(self) -> list[tuple]:
        """(variable, averaged value) for `_backend.substituted`."""
        return [(v, ops.cast(a.value, v.dtype)) for v, a in zip(self._followed, self.averages)]

    def get_config(self) -> dict:
        """See base class."""
        return {**super().get_config(), "decay": self.decay}


@_register
class LossByNoiseLevel(keras.metrics.Metric):
    """Mean loss over all times, and within each of four equal quarters of (0, 1].

    Also counts the batches since its last reset, from which validation derives its noise.
    """

    def __init__(self, name: str = "loss_by_noise_level", **kwargs):
        super().__init__(name=name, **kwargs)
        zeros = {"initializer": "zeros", "dtype": "float32"}
        self.total = self.add_weight(shape=(4,), name="total", **zeros)
        self.count = self.add_weight(shape=(4,), name="count", **zeros)
        self.batches = self.add_weight(shape=(), name="batches", initializer="zeros", dtype="int32")

    def update_state(self, losses, t):
        """Adds losses (B,) at times t (B,)."""
        quarter = ops.clip(ops.cast(ops.ceil(ops.cast(t, "float32") * 4.0), "int32") - 1, 0, 3)
        member = ops.one_hot(quarter, 4, dtype="float32")
        self.total.assign_add(ops.sum(member * ops.cast(losses, "float32")[:, None], axis=0))
        self.count.assign_add(ops.sum(member, axis=0))
        self.batches.assign_add(1)

    def result(self):
        """{"loss": ..., "loss_q1": ... "loss_q4": ...}: q1 has the least noise, q4 the most."""
        quarters = ops.divide_no_nan(self.total.value, self.count.value)
        mean = ops.divide_no_nan(ops.sum(self.total.value), ops.sum(self.count.value))
        return {"loss": mean, **{f"loss_q{i + 1}": quarters[i] for i in range(4)}}


class NoiseConditionalModel(_backend.TrainStep, keras.Model):
    """A network that `fit()` trains at random noise levels, with averaged weights beside the raw.

    Args:
        raw: the network with its process and prediction.
        times: on which to train: a name or a `TimeDistribution`.
        label_dropout: share of labels withheld in training.
        ema_decay: of the averaged weights; None keeps no average.
        seed: of times and noise in training.

    Raises:
        ValueError: If a name is unknown or a number out of its range.
    """

    def __init__(
        self,
        raw: NetworkDenoiser,
        times: str | times.TimeDistribution = "uniform",
        *,
        label_dropout: float = 0.0,
        ema_decay: float | None = 0.999,
        seed: int = 0,
        **kwargs,
    ):
        # Data, times and averages stay in float32; the network has a dtype policy of its own.
        super().__init__(autocast=False, **{"dtype": "float32", **kwargs})
        if not 0.0 <= label_dropout < 1.0:
            raise ValueError(f"label_dropout must lie in [0, 1). Received {label_dropout}.")
        self.network, self.raw = raw.network, raw
        self.process, self.prediction = raw.process, raw.prediction
        self.times = _get_times(times)
        self.label_dropout, self.seed = float(label_dropout), int(seed)
        self.ema = None if ema_decay is None else ExponentialMovingAverage(ema_decay, name="ema")
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.validation_loss = LossByNoiseLevel()
        self.sample_shape: tuple[int, ...] | None = None
        self._compiled_samplers: dict = {}

    def losses_at(self, x_0, label, t, keys, training: bool = False):
        """The objective of each example.

        Args:
            x_0: float (B, ...), clean data.
            label: int (B,) or None.
            t: times (B,).
            keys: uint32 (B, 2), for the noise.
            training: whether dropout and the like are on.

        Returns:
            float32 (B,).
        """
        raise NotImplementedError

    # Keras: building.

    def build(self, input_shape):
        """Builds network and averages for data of this shape, batch axis included."""
        self.sample_shape = tuple(input_shape[1:])
        shapes = {"x": (None, *self.sample_shape), "time": (None,)}
        if self.num_classes is not None:
            shapes["label"] = (None,)
        if not self.network.built:
            self.network.build(shapes)
        self.step_count = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False, name="step_count"
        )
        if self.ema is not None:
            # All floating weights: statistics and layers thawed later are averaged too.
            weights = self.network.weights
            self.ema.follow(v for v in weights if keras.backend.is_float_dtype(v.dtype))
        self.built = True

    @property
    def metrics(self):
        """The training loss and the validation loss by noise level."""
        return [self.loss_tracker, self.validation_loss]

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None for an unconditional model."""
        return self.raw.num_classes

    # Training.

    def compile(self, optimizer="adam", loss=None, *, auto_scale_loss: bool = True, **kwargs):
        """Keras' `compile`, but for loss and metrics: the model brings its own.

        Args:
            optimizer: a Keras optimizer or its name.
            loss: None.
            auto_scale_loss: scale the loss where the network computes in float16.
            **kwargs: the other arguments of `keras.Model.compile`, which checks them.

        Raises:
            ValueError: If a loss, its weights or metrics are given.
        """
        names = ("loss_weights", "metrics", "weighted_metrics")
        given = {"loss": loss, **{name: kwargs.get(name) for name in names}}
        given = {name: value for name, value in given.items() if value is not None}
        if given:
            raise ValueError(
                f"compile takes no loss and no metrics: the model brings its own. Received {given}."
                " Choose the objective where the model is made."
            )
        optimizer = keras.optimizers.get(optimizer)
        policy = getattr(self.network, "dtype_policy", None)
        scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if auto_scale_loss and not scaled and policy and policy.name == "mixed_float16":
            # Keras would ask the policy of the whole model.
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        super().compile(optimizer, auto_scale_loss=auto_scale_loss, **kwargs)

    def compile_from_config(self, config: dict) -> None:
        """See base class, which leaves this to models with a `compile` of their own."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    def mean_loss(self, data, training: bool = True):
        """The objective of a training batch, a scalar."""
        x_0, label, sample_weight = self._unpack(data)
        batch = ops.shape(x_0)[0]
        keys = random.fold_in(random.keys(self.seed), ops.convert_to_tensor(self.step_count))
        keys = random.fold_in(keys, _backend.replica_id())
        self.step_count.assign_add(1)
        keys = random.fold_in(keys, ops.arange(batch))
        t = self.times.sample(random.fold_in(keys, _TIMES), self.process, self.raw.latest)
        if label is not None:
            dropped = random.uniform(random.fold_in(keys, _LABEL_DROPOUT)) < self.label_dropout
            label = ops.where(dropped, self.num_classes, label)
        losses = self.losses_at(x_0, label, t, keys, training=training)
        if sample_weight is not None:
            losses = losses * sample_weight
        # Keras' own `losses` are those of regularizers and `add_loss`.
        return ops.mean(losses) + sum(self.losses)

    def after_update(self, moved) -> None:
        """Called once per training step, behind the optimizer."""
        if self.ema is not None:
            self.ema.update(moved)

    def evaluate_batch(self, data) -> dict:
        """The loss at noise and times that are the same in every epoch, with averaged weights.

        Times are spread evenly over the batch. The logs hold `loss` and its mean in each quarter of
        (0, 1], `loss_q1` (least noise) to `loss_q4`.
        """
        x_0, label, sample_weight = self._unpack(data)
        batch = ops.shape(x_0)[0]
        batch_number = ops.convert_to_tensor(self.validation_loss.batches)
        keys = random.fold_in(random.keys(_VALIDATION_SEED), batch_number)
        keys = random.fold_in(keys, ops.arange(batch))
        t = times.Stratified().sample(random.fold_in(keys, _TIMES), self.process, self.raw.latest)
        with _backend.substituted(self._averaged()):
            losses = self.losses_at(x_0, label, t, keys)
        if sample_weight is not None:
            losses = losses * sample_weight
        self.validation_loss.update_state(losses, t)
        return self.validation_loss.result()

    def fit(self, x=None, y=None, **kwargs):
        """Keras' `fit`; the objective needs no loss and no targets but labels.

        Args:
            x: images, or a data set of images or (images, labels).
            y: labels, where x is an array.
            **kwargs: the other arguments of `keras.Model.fit`, which checks them.

        Returns:
            Keras' `History`.
        """
        _check_weights_are_seen(y, kwargs)
        shape = _batch_shape(x)
        # Built before it is traced, the training step is traced once instead of twice.
        if not self.built and shape is not None:
            self.build(shape)
        self._start_average()
        if self.built and self.compiled and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        return super().fit(x, y, **kwargs)

    def evaluate(self, x=None, y=None, **kwargs):
        """Keras' `evaluate`: the loss with averaged weights at fixed noise; see `evaluate_batch`.

        Args:
            x: as in `fit`.
            y: as in `fit`.
            **kwargs: the other arguments of `keras.Model.evaluate`, which checks them.

        Returns:
            What Keras' `evaluate` returns.
        """
        _check_weights_are_seen(y, kwargs)
        self._start_average()
        return super().evaluate(x, y, **kwargs)

    def _start_average(self) -> None:
        """Weights loaded since `build` enter the average."""
        if self.built and self.ema is not None:
            self.ema.start()

    def _unpack(self, data):
        x_0, label, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if not keras.backend.is_float_dtype(x_0.dtype):
            raise ValueError(
                f"Images must be float in [-1, 1]. Received dtype {x_0.dtype}. "
                "Bytes become that by x / 127.5 - 1, or by the pipelines of tfdiffusion.data."
            )
        if self.built and tuple(x_0.shape[1:]) != self.sample_shape:
            raise ValueError(
                f"The model was built for data of shape {self.sample_shape}. "
                f"Received {tuple(x_0.shape[1:])}."
            )
        if self.num_classes is None:
            label = None
        elif label is None:
            raise ValueError(
                f"The network has num_classes={self.num_classes}, but the data came without "
                "labels. Pass (images, labels), or make the network with num_classes=None."
            )
        else:
            label = _one_a_row("labels (integers, not one-hot)", label, "int32")
        if sample_weight is not None:
            sample_weight = _one_a_row("sample weights", sample_weight, "float32")
        return ops.cast(x_0, "float32"), label, sample_weight

    # Sampling.

    def denoiser(self, ema: bool = True) -> NetworkDenoiser:
        """The trained denoiser, (x_t, t, label) → x̂_0.

        Args:
            ema: False for the raw weights instead of their average.
        """
        if not ema or self.ema is None:
            return self.raw
        self._start_average()
        return self.raw.reading(self._averaged, self.ema.variables)

    def _averaged(self) -> list[tuple]:
        """Every variable of the network with the value to sample from."""
        averages = [] if self.ema is None else self.ema.pairs()
        return [*((v, v.value) for v in self.network.variables), *averages]

    def averaged(self) -> NoiseConditionalModel:
        """A model whose own weights are the averaged ones, with no average beside them.

        Half the size in memory and on disk: what one ships. It can be trained further.
        """
        self._start_average()
        model = type(self).from_config({**self.get_config(), "ema_decay": None})
        model.build((None, *self.sample_shape))
        values = {id(variable): value for variable, value in self._averaged()}  # averages last
        for theirs, mine in zip(self.network.variables, model.network.variables):
            mine.assign(values[id(theirs)])
        return model


def check_seeds(num: int, seed: int, seeds) -> np.ndarray:
    """The seeds of `num` samples: int (num,), by default counted on from `seed`.

    Raises:
        ValueError: If `num` is not an integer >= 1, or the seeds are not so many integers.
    """
    if not isinstance(num, int | np.integer) or num < 1:
        raise ValueError(f"num must be an integer >= 1. Received num={num!r}.")
    seeds = np.arange(num, dtype=np.int64) + int(seed) if seeds is None else np.asarray(seeds)
    if seeds.shape != (num,) or seeds.dtype.kind not in "iu":
        raise ValueError(f"seeds must be {num} integers. Received shape {seeds.shape}.")
    return seeds


def in_batches(run: Callable, rows: Sequence, num: int, batch_size: int, return_path: bool = False):
    """Runs a compiled sampler on at most `batch_size` rows at a time.

    Args:
        run: takes tensors of equal length, gives samples (B, ...), or (samples, path (S, B, ...)).
        rows: arrays or tensors (num, ...).
        num: how many rows.
        batch_size: >= 1.
        return_path: whether `run` gives a path.

    Returns:
        NumPy float32 (num, ...), or (samples, path (S, num, ...)).

    Raises:
        ValueError: If the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1. Received batch_size={batch_size}.")
    rows = [ops.convert_to_numpy(row) for row in rows]
    chunks = []
    for first in range(0, num, batch_size):
        chosen = np.arange(first, min(first + batch_size, num))
        # Pad the last chunk: one shape, one compilation.
        padded = np.resize(chosen, batch_size) if num > batch_size else chosen
        result = run(*(ops.convert_to_tensor(row[padded]) for row in rows))
        outputs = [ops.convert_to_numpy(r) for r in (result if return_path else (result,))]
        keep = len(chosen)
        chunks.append([outputs[0][:keep], *(path[:, :keep] for path in outputs[1:])])
    samples = np.concatenate([chunk[0] for chunk in chunks])
    if not return_path:
        return samples
    return samples, np.concatenate([chunk[1] for chunk in chunks], axis=1)


def _check_weights_are_seen(y, arguments: dict) -> None:
    if y is None and arguments.get("sample_weight") is not None:
        raise ValueError(
            "Keras drops sample_weight where there is no y. Pass y as well: the labels, or "
            "anything of one row an image, which a model without classes ignores."
        )


def _one_a_row(what: str, values, dtype: str):
    """Checks that values are (B,), or (B, 1), and returns them as (B,)."""
    if len(values.shape) > 2 or (len(values.shape) == 2 and values.shape[1] != 1):
        raise ValueError(f"The {what} must be (B,), one a row. Received shape {values.shape}.")
    return ops.reshape(ops.cast(values, dtype), (-1,))


def _batch_shape(x) -> tuple | None:
    """Shape of the first array in a batch of x, None if only Keras can tell."""
    spec = getattr(x, "element_spec", x)  # tf.data says what its elements are
    spec = spec[0] if isinstance(spec, tuple | list) and spec else spec
    shape = getattr(spec, "shape", None)
    return None if shape is None or len(shape) < 2 else tuple(shape)


def _get_times(distribution):
    # The argument `times` hides the module in `__init__`.
    return times.get(distribution)
