"""What every model that learns from noisy data does: `fit()`, averaged weights, validation.

A `NoiseConditionalModel` draws noise levels of a process, has an objective of its own at them, and
keeps an exponential moving average of its weights, which validation and sampling read. Subclasses
give the objective and a way to sample: `DiffusionModel` and `score_matching.ScoreModel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras import ops

from tfdiffusion import _backend, _checks, random, times
from tfdiffusion.denoiser import NetworkDenoiser

_register = keras.saving.register_keras_serializable(package="tfdiffusion")

# Streams of a training key, and the seed of the noise that validation always sees.
_TIMES, NOISE, _LABEL_DROPOUT = 0, 1, 2
_VALIDATION_SEED = 0x76616C

# What a batch can be refused for: the number is what the graph writes down.
_NOT_FINITE, _OUT_OF_RANGE, _BAD_LABEL, _DIVERGED = 1, 2, 3, 4
_FAULTS = {
    _NOT_FINITE: "its data hold NaN or infinite values. Find and fix these images",
    _OUT_OF_RANGE: "its images leave [-1, 1]. Bytes become that by x / 127.5 - 1; for data without "
    "such a range make the model with bounded=False",
    _BAD_LABEL: "it has labels outside 0 to {last}, the classes of the network",
    _DIVERGED: "the loss or its gradient became NaN or infinite. Use a smaller learning rate, or "
    "clip gradients: keras.optimizers.Adam(..., clipnorm=1.0)",
}
_SLACK = 1e-3  # beyond [-1, 1], for images that were resized or compressed in 16 bits


class NotFiniteError(ArithmeticError):
    """The loss became NaN or infinite."""


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
        self.decay = _checks.number("ema_decay", decay, "[0, 1)")

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
        updates = ops.add(self.updates.value, 0)  # one number, also where each replica has its own
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


class _CheckedMetric(keras.metrics.Metric):
    """A metric that reads NaN once a batch was refused, and says why."""

    def __init__(self, name: str, **kwargs):
        super().__init__(name=name, **kwargs)
        # Counts, which replicas can add up.
        self.faults = self._zeros("faults", (max(_FAULTS) + 1,))

    def _zeros(self, name: str, shape: tuple = (), dtype: str = "float32"):
        return self.add_weight(shape=shape, initializer="zeros", dtype=dtype, name=name)

    def note(self, fault) -> None:
        """Counts a fault, a key of `_FAULTS` or 0."""
        self.faults.assign_add(ops.one_hot(fault, max(_FAULTS) + 1, dtype="float32"))

    def checked(self, value):
        """The value, or NaN."""
        return ops.where(ops.sum(self.faults.value[1:]) > 0, math.nan, value)

    @property
    def fault(self) -> int:
        """The first key of `_FAULTS` that occurred, or 0."""
        counts = ops.convert_to_numpy(ops.add(self.faults.value, 0.0))
        return next((fault for fault in _FAULTS if counts[fault]), 0)


@_register
class TrainingLoss(_CheckedMetric):
    """Mean loss of the batches since the last reset."""

    def __init__(self, name: str = "loss", **kwargs):
        super().__init__(name=name, **kwargs)
        self.total, self.count = self._zeros("total"), self._zeros("count")

    def update_state(self, loss, fault=0):
        """Adds the loss () of a batch, and why it was refused, 0 if it was not."""
        self.note(fault)
        self.total.assign_add(ops.cast(loss, "float32"))
        self.count.assign_add(1.0)

    def result(self):
        """The mean."""
        return self.checked(ops.divide_no_nan(self.total.value, self.count.value))


@_register
class LossByNoiseLevel(_CheckedMetric):
    """Mean loss over all times, and within each of four equal quarters of (0, 1].

    Also counts the batches since its last reset, from which validation derives its noise.
    """

    def __init__(self, name: str = "loss_by_noise_level", **kwargs):
        super().__init__(name=name, **kwargs)
        self.total, self.count = self._zeros("total", (4,)), self._zeros("count", (4,))
        self.batches = self._zeros("batches", dtype="int32")

    def update_state(self, losses, t, fault=0):
        """Adds losses (B,) at times t (B,), and why the batch was refused, 0 if it was not."""
        quarter = ops.clip(ops.cast(ops.ceil(ops.cast(t, "float32") * 4.0), "int32") - 1, 0, 3)
        member = ops.one_hot(quarter, 4, dtype="float32")
        self.note(fault)
        self.total.assign_add(ops.sum(member * ops.cast(losses, "float32")[:, None], axis=0))
        self.count.assign_add(ops.sum(member, axis=0))
        self.batches.assign_add(1)

    def result(self):
        """{"loss": ..., "loss_q1": ... "loss_q4": ...}: q1 has the least noise, q4 the most."""
        quarters = ops.divide_no_nan(self.total.value, self.count.value)
        mean = ops.divide_no_nan(ops.sum(self.total.value), ops.sum(self.count.value))
        mean = self.checked(mean)
        return {"loss": mean, **{f"loss_q{i + 1}": quarters[i] for i in range(4)}}


class _StopAtFault(keras.callbacks.Callback):
    """Raises at the batch that was refused; put first, so that nobody saves in between."""

    def on_train_begin(self, logs=None):
        """Starts the averages of a model that Keras has only built now."""
        self.model._start_average()

    def on_train_batch_end(self, batch, logs=None):
        """Looks at the loss of the step."""
        if math.isnan(float(logs["loss"])):
            self._stop(self.model.loss_tracker, f"Training stopped at step {batch + 1} of an epoch")

    def on_test_batch_end(self, batch, logs=None):
        """Looks at the loss of a validation batch."""
        if math.isnan(float(logs["loss"])):
            self._stop(self.model.validation_loss, f"Validation stopped at batch {batch + 1}")

    def _stop(self, metric, what: str):
        fault = metric.fault or _DIVERGED
        why = _FAULTS[fault].format(last=(self.model.num_classes or 1) - 1)
        done = f" The weights are those of step {self.model.steps_done - 1}, before that batch."
        kind = NotFiniteError if fault == _DIVERGED else ValueError
        raise kind(f"{what}: {why}.{done * (metric is self.model.loss_tracker)}")


class NoiseConditionalModel(_backend.TrainStep, keras.Model):
    """A network that `fit()` trains at random noise levels, with averaged weights beside the raw.

    Args:
        raw: the network with its process and prediction.
        times: on which to train: a name or a `TimeDistribution`.
        label_dropout: share of labels withheld in training.
        ema_decay: of the averaged weights; None keeps no average.
        bounded: whether the data lie in [−1, 1]; None for images that do and points that need not.
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
        bounded: bool | None = None,
        seed: int = 0,
        **kwargs,
    ):
        # Data, times and averages stay in float32; the network has a dtype policy of its own.
        super().__init__(autocast=False, **{"dtype": "float32", **kwargs})
        if not isinstance(raw.network, keras.Layer):
            raise TypeError(
                "network must be a Keras layer or model, such as those of tfdiffusion.networks. "
                f"Received {_checks.shown(raw.network)}."
            )
        if bounded is not None and not isinstance(bounded, bool):
            raise ValueError(f"bounded must be True, False or None. Received bounded={bounded!r}.")
        self.network, self.raw = raw.network, raw
        self.process, self.prediction = raw.process, raw.prediction
        self.times = _get_times(times)
        self.label_dropout = _checks.number("label_dropout", label_dropout, "[0, 1)")
        self.seed = _checks.seed(seed)
        self._bounded = bounded
        self.ema = None if ema_decay is None else ExponentialMovingAverage(ema_decay, name="ema")
        self.loss_tracker = TrainingLoss()
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
        self.sample_shape = self.raw.example = tuple(input_shape[1:])
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

    @property
    def bounded(self) -> bool:
        """Whether the data lie in [−1, 1]."""
        return len(self.sample_shape) == 3 if self._bounded is None else self._bounded

    @property
    def steps_done(self) -> int:
        """Training steps taken so far, also by the runs that this one resumes."""
        _backend.synchronize(self)
        return int(ops.add(self.step_count.value, 0)) if self.built else 0

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
        """The objective of a training batch, a scalar; counts the step."""
        x_0, label, sample_weight = self._unpack(data)
        batch = ops.shape(x_0)[0]
        # Noise and times belong to the number of the example in the run, so that they are the same
        # however the examples are cut into (micro-)batches.
        number = ops.cast(ops.add(self.step_count.value, 0), "uint32") * ops.cast(batch, "uint32")
        number = number + ops.cast(ops.arange(batch), "uint32")
        self.step_count.assign_add(1)
        keys = random.fold_in(random.keys(self.seed), _backend.replica_id())
        keys = random.fold_in(keys, number)
        t, importance = self.draw_times(random.fold_in(keys, _TIMES))
        if label is not None:
            dropped = random.uniform(random.fold_in(keys, _LABEL_DROPOUT)) < self.label_dropout
            label = ops.where(dropped, self.num_classes, label)
        losses = self.losses_at(x_0, label, t, keys, training=training)
        if importance is not None:
            self.note_losses(t, losses)
            losses = importance * losses
        if sample_weight is not None:
            losses = losses * sample_weight
        # Keras' own `losses` are those of regularizers and `add_loss`.
        return ops.mean(losses) + sum(self.losses)

    def draw_times(self, keys):
        """Training times (B,), and what each loss has to be multiplied by, (B,) or None for 1."""
        return self.times.sample(keys, self.process, self.raw.latest), None

    def note_losses(self, t, losses) -> None:
        """Called with the losses of times that `draw_times` gave a weight."""

    def fault_of(self, data):
        """Why a batch must be refused: an int32 scalar, a key of `_FAULTS`, or 0."""
        x_0, label, _ = self._unpack(data)
        fault = ops.cast(0, "int32")
        if label is not None:
            bad = ops.logical_or(ops.min(label) < 0, ops.max(label) >= self.num_classes)
            fault = ops.where(bad, _BAD_LABEL, fault)
        if self.bounded:
            fault = ops.where(ops.any(ops.abs(x_0) > 1.0 + _SLACK), _OUT_OF_RANGE, fault)
        return ops.where(ops.all(ops.isfinite(x_0)), fault, _NOT_FINITE)

    def fault_of_update(self, fault, loss, gradients):
        """The fault of a batch, also where it is only seen in the loss or its gradients."""
        finite = ops.isfinite(loss)
        if not isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            # That one expects gradients to overflow, and skips the step itself.
            for gradient in gradients:
                if gradient is not None:
                    finite = ops.logical_and(finite, ops.isfinite(ops.sum(gradient)))
        return ops.where(ops.logical_or(fault > 0, finite), fault, _DIVERGED)

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
        self.validation_loss.update_state(losses, t, self.fault_of(data))
        return self.validation_loss.result()

    def fit(self, x=None, y=None, **kwargs):
        """Keras' `fit`; the objective needs no loss and no targets but labels.

        Args:
            x: images, or a data set of images or (images, labels).
            y: labels, where x is an array.
            **kwargs: the other arguments of `keras.Model.fit`, which checks them.

        Returns:
            Keras' `History`.

        Raises:
            ValueError: If data are not as described for the model: before training where they are
                arrays, else at the batch where it shows.
            NotFiniteError: If the loss is NaN or infinite. In both cases the weights are those from
                before that batch.
        """
        _check_weights_are_seen(y, kwargs)
        self._check_arrays(x, y)
        shape = _batch_shape(x)
        # Built before it is traced, the training step is traced once instead of twice.
        with _backend.scope(self):
            if not self.built and shape is not None:
                self.build(shape)
            self._start_average()
            if self.built and self.compiled and not self.optimizer.built:
                self.optimizer.build(self.trainable_variables)
        if hasattr(x, "element_spec"):  # a data set, of which Keras says that it cannot shuffle it
            kwargs = {"shuffle": False, **kwargs}
        return super().fit(x, y, **_with_callback(kwargs, _StopAtFault()))

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
        self._check_arrays(x, y)
        with _backend.scope(self):
            if not self.built and _batch_shape(x) is not None:
                self.build(_batch_shape(x))
            self._start_average()
        if not isinstance(kwargs.get("callbacks"), keras.callbacks.CallbackList):  # not in `fit`
            kwargs = _with_callback(kwargs, _StopAtFault())
        return super().evaluate(x, y, **kwargs)

    def _check_arrays(self, x, y) -> None:
        """Looks through NumPy data before training; the graph looks at every batch anyway."""
        nothing = bool | int | float | complex | str | bytes | list | dict | np.generic | None
        if isinstance(x, nothing):
            raise ValueError(
                "Expected an array (N, ...), a data set of batches, or a generator of them. "
                f"Received {_checks.shown(x)}."
            )
        if not isinstance(x, np.ndarray):
            return
        if x.size == 0:
            raise ValueError(f"There are no data to train on. Received x of shape {x.shape}.")
        if x.dtype.kind != "f":
            raise ValueError(_wrong_dtype(x.dtype))
        if x.ndim < 2:
            raise ValueError(
                f"Expected images (N, H, W, C), or points (N, D). Received shape {x.shape}."
            )
        if self.built and not _fits(x.shape[1:], self.sample_shape):
            raise ValueError(_wrong_shape(self.sample_shape, x.shape[1:]))
        _check_targets(y, len(x), integers=self.num_classes is not None)
        finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
        if not finite.all():
            bad = np.flatnonzero(~finite)
            raise ValueError(
                f"{len(bad)} of {len(x)} examples hold NaN or infinite values, the first of them "
                f"x[{bad[0]}]. Find and fix them. Received {_checks.shown(x)}."
            )
        low, high = float(x.min()), float(x.max())
        images = self._bounded if self._bounded is not None else x.ndim == 4
        if images and max(-low, high) > 1.0 + _SLACK:
            raise ValueError(
                f"Images must lie in [-1, 1]. Received values from {low:g} to {high:g}. Bytes "
                "become that by x / 127.5 - 1; for data without such a range make the model with "
                "bounded=False."
            )
        if isinstance(y, np.ndarray) and self.num_classes is not None:
            if len(y) and (y.min() < 0 or y.max() >= self.num_classes):
                raise ValueError(
                    f"Labels must be integers from 0 to {self.num_classes - 1}, the classes of the "
                    f"network. Received {y.min()} to {y.max()}."
                )

    def _start_average(self) -> None:
        """Weights loaded since `build` enter the average."""
        if self.built and self.ema is not None:
            self.ema.start()

    def _unpack(self, data):
        x_0, label, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if not keras.backend.is_float_dtype(x_0.dtype):
            raise ValueError(_wrong_dtype(x_0.dtype))
        if self.built and tuple(x_0.shape[1:]) != self.sample_shape:
            raise ValueError(_wrong_shape(self.sample_shape, x_0.shape[1:]))
        if self.num_classes is None:
            label = None
        elif label is None:
            raise ValueError(
                f"The network has num_classes={self.num_classes}, but the data came without "
                "labels. Pass (images, labels), or make the network with num_classes=None."
            )
        else:
            dtype = keras.backend.standardize_dtype(label.dtype)
            label = _one_a_row("labels (integers, not one-hot)", label, "int32")
            if keras.backend.is_float_dtype(dtype):
                raise ValueError(f"Labels must be integers. Received dtype {dtype}.")
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
        """Every variable of the denoiser with the value to sample from."""
        averages = [] if self.ema is None else self.ema.pairs()
        return [*((v, v.value) for v in self.raw.variables), *averages]

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
    _checks.integer("num", num)
    if seeds is None:
        return np.arange(num, dtype=np.int64) + _checks.seed(seed)
    seeds = _checks.array("seeds", seeds, f"{num} integers", kinds="iu", rank=1)
    if len(seeds) != num:
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
    _checks.integer("batch_size", batch_size)
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


def _wrong_dtype(dtype) -> str:
    return (
        f"Images must be float in [-1, 1]. Received dtype {dtype}. "
        "Bytes become that by x / 127.5 - 1, or by the pipelines of tfdiffusion.data."
    )


def _wrong_shape(built: tuple, received) -> str:
    return f"The model was built for data of shape {built}. Received {tuple(received)}."


def _fits(shape: tuple, built: tuple) -> bool:
    """Whether data have the shape that a model was built for, of which sides may be unknown."""
    return len(shape) == len(built) and all(b in (None, s) for s, b in zip(shape, built))


def _check_targets(y, num: int, integers: bool) -> None:
    """Looks at what came beside an array of `num` examples: numbers of so many rows, or labels."""
    if y is None:
        return
    kind = _checks.kind(y)
    if kind not in "biuf" or tuple(y.shape[:1]) != (num,):
        raise ValueError(
            f"y must be an array of {num} labels, one an example. Received {_checks.shown(y)}."
        )
    if integers and kind not in "iu":
        raise ValueError(f"Labels must be integers. Received dtype {_checks.dtype(y)}.")
    if integers:
        _one_a_row("labels (integers, not one-hot)", y, "int32")


def _with_callback(arguments: dict, callback: keras.callbacks.Callback) -> dict:
    """Arguments of `fit` with one callback more, before those that they name."""
    given = arguments.get("callbacks")
    if isinstance(given, keras.callbacks.CallbackList):
        given.append(callback)
        return arguments
    given = [] if given is None else given if isinstance(given, list | tuple) else [given]
    return {**arguments, "callbacks": [callback, *given]}


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
