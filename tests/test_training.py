"""`fit()`: objective and gradient against theory, the average, validation, and Keras' tools."""

from __future__ import annotations

import csv
import itertools

import keras
import numpy as np
import oracles
import pytest
from keras import ops
from oracles import PUBLISHED, GaussianData, numpy

from tfdiffusion import (
    DiffusionModel,
    _backend,
    exact,
    networks,
    predictions,
    random,
    samplers,
    times,
    weights,
)
from tfdiffusion.denoiser import Threshold
from tfdiffusion.training import ExponentialMovingAverage, LossByNoiseLevel

CLASSES = 3


@keras.saving.register_keras_serializable(package="tests")
class Affine(keras.layers.Layer):
    """The smallest network: y = x W + time · v, plus a row for each label. Quick to compile."""

    def __init__(self, num_classes=None, **kwargs):
        super().__init__(**kwargs)
        self.num_classes = num_classes

    def build(self, shapes):
        size = shapes["x"][-1]
        self.kernel = self.add_weight(shape=(size, size), name="kernel")
        self.slope = self.add_weight(shape=(size,), name="slope", initializer="ones")
        if self.num_classes is not None:
            rows = self.num_classes + 1
            self.table = self.add_weight(shape=(rows, size), name="table", initializer="normal")
        self.built = True

    def call(self, inputs, training=False):
        y = inputs["x"] @ self.kernel + inputs["time"][:, None] * self.slope / 1000.0
        if self.num_classes is not None:
            y = y + ops.take(self.table, inputs["label"], axis=0)
        return y

    def get_config(self):
        return {**super().get_config(), "num_classes": self.num_classes}


class Spy(keras.layers.Layer):
    """Writes down what it is given, where that has values; says zero."""

    def __init__(self, num_classes=None):
        super().__init__()
        self.num_classes, self.seen = num_classes, []

    def build(self, shapes):
        self.built = True

    def call(self, inputs, training=False):
        self.seen.append({name: numpy(value) for name, value in inputs.items()})
        return ops.zeros_like(inputs["x"])


def points(count=64, seed=0):
    return np.random.default_rng(seed).normal(0.3, 0.5, size=(count, 2)).astype("float32")


def labels(count=64):
    return np.random.default_rng(1).integers(0, CLASSES, size=count)


def made(network=None, optimizer=None, **arguments):
    """A compiled, built model; the same initial weights every time."""
    keras.utils.set_random_seed(1)
    model = DiffusionModel(network or Affine(), **arguments)
    model.compile(optimizer or keras.optimizers.SGD(0.05))
    model.build((None, 2))
    return model


def fit(model, x=None, y=None, **arguments):
    x = points() if x is None else x
    return model.fit(x, y, **{"batch_size": 16, "verbose": 0, "shuffle": False, **arguments})


def raw_weights(model):
    return [numpy(v) for v in model.network.weights]


def averages(model):
    return [numpy(v) for v in model.ema.averages]


def assert_same(first, second, **tolerance):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second):
        np.testing.assert_allclose(a, b, **{"rtol": 1e-5, "atol": 1e-6, **tolerance})


class Record(keras.callbacks.Callback):
    """The raw weights after every batch."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append(raw_weights(self.model))


# The objective.

VARIANCE = 0.3
LEVELS, ROWS = np.array([0.05, 0.3, 0.6, 0.9]), 20_000


class Exact(keras.layers.Layer):
    """The best network on N(0, VARIANCE), `bias` off."""

    num_classes = None

    def __init__(self, prediction, bias=0.0):
        super().__init__()
        self.prediction, self.bias = predictions.get(prediction), bias
        self.denoiser = exact.GaussianMixture([[0.0, 0.0]], VARIANCE, process="linear")

    def build(self, shapes):
        self.built = True

    def call(self, inputs, training=False):
        t, x_t = (inputs["time"] + 1.0) / 1000.0, inputs["x"]  # c_in is 1: σ_d = 1 and α² + σ² = 1
        x_0 = self.denoiser(x_t, t)
        alpha, sigma = (
            ops.cast(f(t), "float32")[:, None]
            for f in (self.denoiser.process.alpha, self.denoiser.process.sigma)
        )
        noise = self.denoiser.noise_from(x_t, x_0, t)
        return self.prediction.target(x_0, noise, alpha, sigma) + self.bias


def losses_by_level(model):
    """Mean loss at each of LEVELS, and the standard error of each mean."""
    rng = np.random.default_rng(3)
    x_0 = np.sqrt(VARIANCE) * rng.normal(size=(len(LEVELS) * ROWS, 2))
    t = np.repeat(LEVELS, ROWS).astype("float32")
    run = _backend.compiled(lambda x, t, keys: model.losses_at(x, None, t, keys), ())
    losses = numpy(run(x_0.astype("float32"), t, random.keys(range(len(t)))))
    assert losses.shape == (len(t),)
    losses = losses.astype(np.float64).reshape(len(LEVELS), ROWS)
    return losses.mean(1), losses.std(1) / np.sqrt(ROWS)


@pytest.mark.parametrize("prediction", predictions.names())
def test_the_loss_of_the_exact_network_is_the_floor_of_theory(prediction):
    """Oracle 3: E‖ε − ε*‖² = ᾱ v/V per dimension; ((aσ − bα)/σ)² times Var[x_0|x_t] for all."""
    alpha, sigma = PUBLISHED["linear"](LEVELS)
    spread = GaussianData(0.0, VARIANCE).spread(alpha, sigma)
    a, b = {
        "clean": (1, 0),
        "noise": (0, 1),
        "v": (-sigma, alpha),
        "flow": (-1, 1),
        "score": (0, -1 / sigma),
        "edm": (sigma, -alpha),  # σ_d = 1 and α² + σ² = 1
    }[prediction]
    floor = ((a * sigma - b * alpha) / sigma) ** 2 * VARIANCE * sigma**2 / spread
    if prediction == "noise":
        np.testing.assert_allclose(floor, alpha**2 * VARIANCE / spread)
    model = DiffusionModel(Exact(prediction), "linear", prediction, ema_decay=None)
    mean, error = losses_by_level(model)
    assert (np.abs(mean - floor) < 5 * error).all()
    assert (mean > 0.5 * floor).all()

    # A minimum: an error δ of the network costs δ² (the noise is the same, so precisely that).
    off = DiffusionModel(Exact(prediction, bias=0.5), "linear", prediction, ema_decay=None)
    cost = losses_by_level(off)[0] - mean
    assert (np.abs(cost - 0.25) < 5 * 2 * 0.5 * np.sqrt(floor / (2 * ROWS))).all()


@pytest.mark.parametrize("prediction", ["noise", "v", "clean"])
@pytest.mark.parametrize("weight", weights.names())
def test_a_weight_means_the_same_for_every_prediction(weight, prediction):
    """It multiplies ‖Δx_0‖², whatever the network says."""
    if weight == "constant":
        return
    model = DiffusionModel(Exact(prediction), "linear", prediction, weight=weight, ema_decay=None)
    alpha, sigma = PUBLISHED["linear"](LEVELS)
    residual = VARIANCE * sigma**2 / GaussianData(0.0, VARIANCE).spread(alpha, sigma)
    expected = numpy(model.weight(model.process, LEVELS.astype(oracles.FLOAT))) * residual
    mean, error = losses_by_level(model)
    assert (np.abs(mean - expected) < 5 * error).all()


def test_each_row_has_its_own_loss():
    """Pitfall 8: no row's loss depends on another row."""
    model, keys = made(), numpy(random.keys(range(8)))
    x_0, t = points(8), np.linspace(0.1, 1.0, 8, dtype="float32")
    together = numpy(model.losses_at(x_0, None, t, ops.convert_to_tensor(keys)))
    assert together.shape == (8,) and len(np.unique(together)) == 8
    for i in (0, 5):
        row = slice(i, i + 1)
        alone = model.losses_at(x_0[row], None, t[row], ops.convert_to_tensor(keys[row]))
        np.testing.assert_allclose(numpy(alone), together[row], rtol=1e-5)


def test_the_loss_is_squared():
    """Twice the error is four times the loss, and it is a mean over the elements."""
    costs = []
    for bias, size in ((10.0, 2), (20.0, 2), (10.0, 50)):

        class Off(Spy):
            def call(self, inputs, training=False, bias=bias):
                return ops.zeros_like(inputs["x"]) + bias

        model = DiffusionModel(Off(), ema_decay=None)
        keys, t = random.keys(range(2000)), np.full(2000, 0.5, "float32")
        x_0 = ops.zeros((2000, size))
        costs.append(float(ops.mean(model.losses_at(x_0, None, t, keys))) - 1.0)
    assert costs[1] == pytest.approx(4 * costs[0], rel=0.02)
    assert costs[2] == pytest.approx(costs[0], rel=0.02)


def test_a_step_descends_the_gradient():
    """One step of SGD is −lr times the slope of the loss, by central differences."""
    model = made(optimizer=keras.optimizers.SGD(0.1))
    x_0 = points(32)
    run = _backend.compiled(model.mean_loss, model.variables)

    def loss():
        model.step_count.assign(0)  # so that times and noise are those of the first step
        return float(run(x_0))

    before, expected = raw_weights(model), []
    for variable, value in zip(model.network.weights, before):
        slope = np.zeros(value.shape)
        for index in np.ndindex(value.shape):
            sides = []
            for h in (0.25, -0.25):  # the loss is quadratic in the weights: any h is exact
                moved = value.copy()
                moved[index] += h
                variable.assign(moved)
                sides.append(loss())
            slope[index] = (sides[0] - sides[1]) / 0.5
        variable.assign(value)
        expected.append(value - 0.1 * slope)
    reference = loss()
    model.step_count.assign(0)
    history = fit(model, x_0, batch_size=32).history
    assert history["loss"][0] == pytest.approx(reference, rel=1e-5)
    assert_same(raw_weights(model), expected, rtol=1e-4, atol=1e-5)
    assert max(np.abs(a - b).max() for a, b in zip(before, expected)) > 1e-2
    assert int(model.step_count.value) == 1


def test_regularizers_and_added_losses_count():
    class Charged(Affine):
        def call(self, inputs, training=False):
            self.add_loss(0.5 + 0.0 * ops.sum(self.kernel))
            return super().call(inputs, training=training)

        def build(self, shapes):
            super().build(shapes)
            self.kernel.regularizer = keras.regularizers.L2(2.0)

    plain, charged = (made(n, keras.optimizers.SGD(0.0)) for n in (Affine(), Charged()))
    extra = 0.5 + 2.0 * np.sum(raw_weights(charged)[0] ** 2)
    histories = [fit(model, epochs=2).history["loss"] for model in (plain, charged)]
    np.testing.assert_allclose(np.subtract(*histories[::-1]), extra, rtol=1e-4)


# Noise and times.


def test_noise_and_times_are_fresh_for_each_row_and_step():
    spy = Spy()
    model = DiffusionModel(spy, "linear", ema_decay=None)
    model.build((None, 2))
    x_0 = np.zeros((2000, 2), "float32")
    for _ in range(2):
        model.mean_loss(x_0)
    first, second = spy.seen
    sigmas = [PUBLISHED["linear"]((s["time"] + 1) / 1000)[1][:, None] for s in spy.seen]
    noise = np.concatenate([first["x"] / sigmas[0], second["x"] / sigmas[1]], axis=1).T
    error = 5 / np.sqrt(2000)
    assert np.abs(np.cov(noise) - np.eye(4)).max() < 1.5 * error
    assert np.abs(noise.mean(1)).max() < error
    shifted = [np.corrcoef(row[1:], row[:-1])[0, 1] for row in noise]  # neighbouring rows
    assert np.abs(shifted).max() < error
    times = np.stack([first["time"], second["time"]])
    assert abs(np.corrcoef(times)[0, 1]) < error
    assert abs(np.corrcoef(np.abs(noise[0]), first["time"])[0, 1]) < error
    assert times.mean() == pytest.approx(499.5, abs=5 * 289 / np.sqrt(4000))


def test_a_seed_decides_times_and_noise():
    def losses(seed):
        model = made(seed=seed)
        return [float(model.mean_loss(points())) for _ in range(2)]

    first, again, other = losses(3), losses(3), losses(4)
    assert first == again
    assert first[0] != first[1]
    assert set(first).isdisjoint(other)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_share_of_labels_that_is_withheld(share):
    spy, count = Spy(CLASSES), 4000
    model = DiffusionModel(spy, label_dropout=share, ema_decay=None)
    model.build((None, 2))
    given = labels(count)
    model.mean_loss((points(count), given))
    model.mean_loss((points(count), given))
    for seen in spy.seen:
        dropped = seen["label"] == CLASSES
        np.testing.assert_array_equal(seen["label"][~dropped], given[~dropped])
        error = 5 * np.sqrt(share * (1 - share) / count)
        assert dropped.mean() == pytest.approx(share, abs=error + 1e-12)
    if share:
        assert (spy.seen[0]["label"] != spy.seen[1]["label"]).any()
    model.evaluate_batch((points(count), given))  # and none in validation
    np.testing.assert_array_equal(spy.seen[-1]["label"], given)


def test_sample_weights():
    model, x_0 = made(), points(8)
    weight = np.array([0.0, 1.0, 2.0, 0.5, 0.0, 3.0, 1.0, 1.0], "float32")

    def loss(*data):
        model.step_count.assign(0)
        return float(model.mean_loss(data))

    # Linear in the weights: rows count by themselves.
    rows = [loss(x_0, None, np.eye(8, dtype="float32")[i]) for i in range(8)]
    assert loss(x_0, None, weight) == pytest.approx(np.dot(rows, weight), rel=1e-5)
    assert loss(x_0, None, weight[:, None]) == pytest.approx(np.dot(rows, weight), rel=1e-5)
    assert loss(x_0) == pytest.approx(np.sum(rows), rel=1e-5)
    with pytest.raises(ValueError, match=r"sample weights must be \(B,\).*\(8, 2\)"):
        loss(x_0, None, np.ones((8, 2), "float32"))


# The average of the weights.


def test_the_average_of_constant_weights():
    """Oracle 27: θ(1 − mⁿ) + mⁿ θ_0, past the warm-up."""
    variable = keras.Variable(np.array([1.0, -2.0], "float32"))
    ema = ExponentialMovingAverage(0.9)
    ema.follow([variable])
    ema.updates.assign(1000)
    variable.assign([3.0, 5.0])
    for _ in range(7):
        ema.update()
    expected = np.array([3.0, 5.0]) * (1 - 0.9**7) + 0.9**7 * np.array([1.0, -2.0])
    np.testing.assert_allclose(numpy(ema.averages[0]), expected, rtol=1e-5)
    ema.update(moved=False)
    np.testing.assert_allclose(numpy(ema.averages[0]), expected, rtol=1e-5)
    assert int(ema.updates.value) == 1007


@pytest.mark.parametrize("accumulate", [None, 2])
def test_the_average_moves_once_per_real_update(accumulate):
    """Oracle 27 with pitfall 16: the recursion with its warm-up, in NumPy."""
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=accumulate)
    model, record, decay = made(optimizer=optimizer, ema_decay=0.5), Record(), 0.5
    average = [w.astype(np.float64) for w in raw_weights(model)]
    fit(model, points(144), callbacks=[record])  # 9 batches: the last is half an update
    moved = record.weights[1::2] if accumulate else record.weights
    assert len(record.weights) == 9 and int(model.ema.updates.value) == len(moved)
    for n, weights_now in enumerate(moved):
        m = min(decay, (1 + n) / (10 + n))
        average = [m * a + (1 - m) * w for a, w in zip(average, weights_now)]
    assert_same(averages(model), average, rtol=1e-4)
    assert np.abs(averages(model)[0] - raw_weights(model)[0]).max() > 1e-4  # raw ones are kept


@pytest.mark.parametrize("optimizer", [keras.optimizers.SGD, keras.optimizers.Adam])
def test_micro_batches_add_up_to_a_batch(optimizer):
    """Accumulated over 4 batches of 8, the gradient is that of one batch of 32: same noise too."""

    def trained(batch_size, accumulate):
        model = made(optimizer=optimizer(0.01, gradient_accumulation_steps=accumulate))
        model.fit(points(96), batch_size=batch_size, shuffle=False, verbose=0)
        return raw_weights(model), averages(model)

    whole, parts = trained(32, None), trained(8, 4)
    for mine, theirs in zip(parts, whole):
        assert_same(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_second_fit_goes_on_where_the_first_ended():
    optimizers = [keras.optimizers.Adam(0.05) for _ in range(2)]
    once, twice = (made(optimizer=o, ema_decay=0.9) for o in optimizers)
    fit(once, epochs=2)
    fit(twice)
    middle = raw_weights(twice)
    fit(twice)
    assert_same(raw_weights(once), raw_weights(twice))
    assert_same(averages(once), averages(twice))
    assert int(once.ema.updates.value) == int(twice.ema.updates.value) == 8
    assert np.abs(middle[0] - raw_weights(twice)[0]).max() > 1e-3


def test_weights_loaded_after_build_enter_the_average():
    """Before the first update there is nothing to average but them."""
    rng = np.random.default_rng(0)

    def loaded():
        model = made(optimizer=keras.optimizers.SGD(0.0))
        model.network.set_weights([rng.normal(size=w.shape) for w in raw_weights(model)])
        return model

    model = loaded()
    fit(model)
    assert_same(averages(model), raw_weights(model))

    request = {"num": 4, "steps": 3, "threshold": None}
    model = loaded()
    np.testing.assert_allclose(model.sample(**request), model.sample(**request, ema=False))
    model = loaded()
    evaluated = model.evaluate(points(), verbose=0)
    assert_same(averages(model), raw_weights(model))
    model = loaded()
    x_t = points(4)
    np.testing.assert_allclose(
        numpy(model.denoiser()(x_t, 0.5)), numpy(model.denoiser(ema=False)(x_t, 0.5))
    )
    model = loaded()
    assert_same(raw_weights(model.averaged()), raw_weights(model))
    assert np.isfinite(evaluated).all()


@pytest.fixture(scope="module")
def averaging():
    """A model whose averages are quite other than its weights."""
    model, rng = made(), np.random.default_rng(0)
    for average in model.ema.averages:
        average.assign(numpy(average) + rng.normal(size=average.shape))
    model.ema.updates.assign(5)
    return model


def test_samples_come_from_the_average(averaging):
    """Pitfall 6."""
    request = {"num": 4, "steps": 3, "threshold": None}
    drawn = averaging.sample(**request)
    raw = averaging.sample(**request, ema=False)
    assert np.abs(drawn - raw).min() > 1e-4
    np.testing.assert_allclose(averaging.averaged().sample(**request), drawn, rtol=1e-5)
    kept = raw_weights(averaging)
    averaging.network.set_weights(averages(averaging))
    np.testing.assert_allclose(averaging.sample(**request, ema=False), drawn, rtol=1e-5)
    averaging.network.set_weights(kept)
    np.testing.assert_allclose(averaging.sample(**request, ema=False), raw, rtol=1e-5)


def test_training_between_two_samples_is_seen(averaging):
    """A compiled sampler reads the weights of the day."""
    request = {"num": 2, "steps": 3, "threshold": None}
    before = averaging.sample(**request)
    kept = averages(averaging)
    for average in averaging.ema.averages:
        average.assign(numpy(average) + 0.1)
    assert np.abs(averaging.sample(**request) - before).min() > 1e-5
    for average, value in zip(averaging.ema.averages, kept):
        average.assign(value)
    np.testing.assert_allclose(averaging.sample(**request), before)


def test_a_model_may_keep_no_average():
    model = made(ema_decay=None)
    fit(model)
    assert model.ema is None
    request = {"num": 2, "steps": 3, "threshold": None}
    np.testing.assert_array_equal(model.sample(**request), model.sample(**request, ema=False))
    assert np.isfinite(model.evaluate(points(), verbose=0)).all()


# Validation.


def test_validation_is_the_same_every_time(averaging):
    """It depends on the averaged weights and on nothing else that training moves."""
    arguments = {"batch_size": 16, "verbose": 0, "return_dict": True}
    first = averaging.evaluate(points(), **arguments)
    assert set(first) == {"loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4"}
    assert averaging.evaluate(points(), **arguments) == first
    kept = raw_weights(averaging)
    averaging.network.set_weights([w + 1.0 for w in kept])
    averaging.step_count.assign(77)
    assert averaging.evaluate(points(), **arguments) == first
    averaging.network.set_weights(kept)
    # Batches of a multiple of four: as many times in each quarter.
    assert np.mean([first[f"loss_q{i}"] for i in (1, 2, 3, 4)]) == pytest.approx(first["loss"])
    assert len(averaging.evaluate(points(), verbose=0)) == 5


def test_validation_times_cover_all_levels_with_fresh_noise_in_each_batch():
    spy = Spy()
    model = DiffusionModel(spy, "linear", ema_decay=None)
    model.build((None, 2))
    x_0 = np.zeros((64, 2), "float32")
    for _ in range(2):
        model.evaluate_batch(x_0)
    model.validation_loss.reset_state()
    model.evaluate_batch(x_0)
    first, second, again = spy.seen
    np.testing.assert_array_equal(first["x"], again["x"])
    np.testing.assert_array_equal(first["time"], again["time"])
    assert np.abs(first["x"] - second["x"]).min() > 0
    quarters = np.histogram(first["time"] + 1, [0.5, 250.5, 500.5, 750.5, 1000.5])[0]
    np.testing.assert_array_equal(quarters, [16] * 4)


def test_the_loss_is_told_by_noise_level():
    metric = LossByNoiseLevel()
    t = np.array([0.001, 0.25, 0.251, 0.5, 0.7, 0.75, 1.0], "float32")
    metric.update_state(np.arange(1.0, 8.0), t)
    result = {name: float(value) for name, value in metric.result().items()}
    assert result == {"loss": 4.0, "loss_q1": 1.5, "loss_q2": 3.5, "loss_q3": 5.5, "loss_q4": 7.0}


def test_weights_count_in_validation_too():
    model = made()
    plain = model.evaluate(points(16), verbose=0)
    double = {"sample_weight": np.full(16, 2.0), "verbose": 0}
    doubled = model.evaluate(points(16), labels(16), **double)
    np.testing.assert_allclose(doubled, np.multiply(plain, 2.0), rtol=1e-5)
    for method in (model.fit, model.evaluate):  # Keras ignores them in silence
        with pytest.raises(ValueError, match="Keras drops sample_weight where there is no y"):
            method(points(16), **double)


# Learning.


def test_an_mlp_learns_what_theory_says():
    """The learned x̂_0 explains nearly all that the exact one does, and so do its samples."""
    means = np.array([[0.6, 0.3], [-0.6, -0.2]])
    data = exact.GaussianMixture(means, 0.01, [0.3, 0.7], process="cosine")
    x_0 = data.draw(4096, seed=0)[0]
    schedule = keras.optimizers.schedules.CosineDecay(5e-3, 480)
    model = made(
        networks.MLP(width=64, depth=2),
        keras.optimizers.Adam(schedule),
        prediction="v",
        ema_decay=0.99,
    )
    fit(model, x_0, batch_size=256, epochs=30, shuffle=True)
    held_out = data.draw(4000, seed=9)[0]
    noise = np.random.default_rng(0).standard_normal(held_out.shape)
    for t in (0.2, 0.5, 0.8):
        alpha, sigma = PUBLISHED["cosine"](t)
        x_t = (alpha * held_out + sigma * noise).astype("float32")
        learned, best = numpy(model.denoiser()(x_t, t)), numpy(data(x_t, t))
        explained = np.mean((best - held_out.mean(0)) ** 2)
        assert np.mean((learned - best) ** 2) < 0.1 * explained
    drawn = model.sample(2000, steps=50, threshold=None, batch_size=2000)
    right = drawn[:, 0] > 0
    assert right.mean() == pytest.approx(0.3, abs=5 * np.sqrt(0.21 / 2000) + 0.02)
    for side, mean in ((right, means[0]), (~right, means[1])):
        np.testing.assert_allclose(drawn[side].mean(0), mean, atol=0.05)
        np.testing.assert_allclose(drawn[side].std(0), 0.1, atol=0.03)


def test_a_model_draws_as_its_sampling_says():
    own = samplers.Sampling(samplers.DDIM(0.5), "leading", 4, Threshold(0.3))
    model = made(sampling=own)
    told = {"sampler": samplers.DDIM(0.5), "grid": "leading", "steps": 4}
    drawn = model.sample(6)
    np.testing.assert_array_equal(drawn, model.sample(6, **told, threshold=Threshold(0.3)))
    assert np.abs(drawn).max() <= 0.3
    # Each setting may be another, and None is a threshold too.
    assert np.abs(drawn - model.sample(6, steps=5)).max() > 1e-3
    assert np.abs(model.sample(6, threshold=None)).max() > 0.3
    # By default it is the library's.
    assert made().sampling == samplers.Sampling("dpmpp_2m", "karras", 10)
    with pytest.raises(ValueError, match=r"steps must be an integer >= 1\. Received steps=0"):
        samplers.Sampling(steps=0)


def test_a_run_may_end_in_a_state():
    """On a grid that goes on to timestep 0 nothing is denoised at the end."""
    grid = times.Timesteps("leading", offset=1, until_first=True)
    model = made(sampling=samplers.Sampling("ddim", grid, 4, None))
    images, path = model.sample(3, return_path=True)
    assert path.shape == (5, 3, 2)
    np.testing.assert_array_equal(images, path[-1])
    t = numpy(times.grid(grid, 4, model.process))
    np.testing.assert_allclose(t * 1000 - 1, [751, 501, 251, 1, 0], atol=1e-3)
    x_t = path[0]
    for now, then in itertools.pairwise(t):
        (alpha, sigma), (alpha_s, sigma_s) = PUBLISHED["cosine"](now), PUBLISHED["cosine"](then)
        x_0 = numpy(model.denoiser()(x_t.astype("float32"), now))
        x_t = alpha_s * x_0 + sigma_s * (x_t - alpha * x_0) / sigma
    np.testing.assert_allclose(images, x_t, atol=1e-3)


# Keras' tools.


class Stop(keras.callbacks.Callback):
    """A crash."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise RuntimeError("power cut")


def test_an_interrupted_run_resumes_as_if_nothing_had_happened(tmp_path):
    def run(callbacks, network_offset=0.0):
        model = made(optimizer=keras.optimizers.Adam(0.05), ema_decay=0.9)
        model.network.set_weights([w + network_offset for w in raw_weights(model)])
        fit(model, epochs=4, callbacks=callbacks)
        return model

    whole = run([])
    with pytest.raises(RuntimeError, match="power cut"):
        run([keras.callbacks.BackupAndRestore(tmp_path / "backup"), Stop()])
    # A fresh process knows neither the weights nor how far the run had come.
    resumed = run([keras.callbacks.BackupAndRestore(tmp_path / "backup")], network_offset=9.0)
    assert_same(raw_weights(resumed), raw_weights(whole))
    assert_same(averages(resumed), averages(whole))
    assert int(resumed.step_count.value) == int(whole.step_count.value) == 16


def test_callbacks_see_losses_and_validation(tmp_path):
    model = made()
    rates = []
    callbacks = [
        keras.callbacks.ModelCheckpoint(
            tmp_path / "best.keras", monitor="val_loss", save_best_only=True
        ),
        keras.callbacks.EarlyStopping(monitor="val_loss", patience=1, min_delta=1e9),
        keras.callbacks.LearningRateScheduler(lambda epoch: rates.append(epoch) or 0.05 / 2**epoch),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.TerminateOnNaN(),
    ]
    history = fit(model, epochs=5, validation_data=(points(seed=5),), callbacks=callbacks)
    assert history.epoch == rates == [0, 1]  # no epoch is better than the first by 1e9
    expected = {"loss", "learning_rate", "val_loss", *(f"val_loss_q{i}" for i in (1, 2, 3, 4))}
    assert set(history.history) == expected
    np.testing.assert_allclose(history.history["learning_rate"], [0.05, 0.025])
    with open(tmp_path / "log.csv") as file:
        assert set(next(csv.reader(file))) == expected | {"epoch"}
    best = keras.saving.load_model(tmp_path / "best.keras")
    again = best.evaluate(points(seed=5), batch_size=16, verbose=0)[0]
    assert again == pytest.approx(min(history.history["val_loss"]), rel=1e-4)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    fit(made(), callbacks=[keras.callbacks.TensorBoard(tmp_path)])
    assert any(tmp_path.rglob("events.*"))


def test_data_of_any_kind_train_alike():
    """Arrays, a tf.data pipeline and a PyDataset hold the same batches."""
    tf = pytest.importorskip("tensorflow")
    x, y = points(), labels()

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            rows = slice(16 * index, 16 * index + 16)
            return x[rows], y[rows]

    pipeline = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    trained = []
    for data in ((x, y), (pipeline,), (Batches(),)):
        keras.utils.set_random_seed(1)
        model = DiffusionModel(Affine(CLASSES))  # built by `fit`, from what comes
        model.compile(keras.optimizers.SGD(0.05))
        batch_size = 16 if data[0] is x else None
        model.fit(*data, batch_size=batch_size, shuffle=False, verbose=0)
        assert model.sample_shape == (2,) and int(model.ema.updates.value) == 4
        trained.append([*raw_weights(model), *averages(model)])
    assert_same(trained[0], trained[1])
    assert_same(trained[0], trained[2])


def precise(policy):
    """A run of a network with a dtype policy: the model, and its losses."""
    model = made(networks.MLP(width=8, depth=1, dtype=policy), keras.optimizers.Adam(1e-2))
    return model, fit(model, points(256), epochs=3).history["loss"]


@pytest.fixture(scope="module")
def float32_losses():
    return precise("float32")[1]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_trains_like_float32(policy, float32_losses):
    """With the loss scaled for float16, and told unscaled."""
    model, losses = precise(policy)
    np.testing.assert_allclose(losses, float32_losses, rtol=0.1)
    assert losses != float32_losses  # it did compute in the lower precision
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    assert int(model.ema.updates.value) == 48
    assert all(v.dtype == "float32" for v in model.network.trainable_variables)
    assert np.isfinite(model.sample(2, steps=3)).all()


def test_remat_changes_nothing_but_memory():
    def trained(remat):
        keras.utils.set_random_seed(1)
        network = networks.UNet(
            out_channels=1, widths=(4, 4), blocks_per_level=1, groups=2, remat=remat
        )
        model = DiffusionModel(network, prediction="v")
        model.compile(keras.optimizers.SGD(0.05))
        x = np.random.default_rng(0).uniform(-1, 1, (8, 4, 4, 1)).astype("float32")
        model.fit(x, batch_size=4, epochs=2, verbose=0, shuffle=False)
        return raw_weights(model)

    assert_same(trained(True), trained(False), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"dropout would drop other values.*dropout=0.5"):
        networks.UNet(out_channels=1, dropout=0.5, remat=True)


def test_times_keep_their_digits_whatever_the_policy():
    """A global policy would round t = 0.999 to 1 on the way into the model."""
    spy = Spy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = DiffusionModel(spy, "linear", "v", ema_decay=None)
        model.build((None, 2))
        model(points(2), np.array([0.999, 1.0], "float32"))
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_allclose(spy.seen[-1]["time"], [998.0, 999.0], atol=0.01)


def test_a_learning_rate_schedule_is_followed():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.1, 0.0])
    model, record = made(optimizer=keras.optimizers.SGD(schedule)), Record()
    before = raw_weights(model)
    fit(model, callbacks=[record])
    moves = [np.abs(b[0] - a[0]).max() for a, b in zip([before, *record.weights], record.weights)]
    assert moves[0] > 1e-3 and moves[1] > 1e-3
    assert moves[2] == moves[3] == 0.0


@pytest.mark.parametrize("arguments", [{"run_eagerly": True}, {"steps_per_execution": 2}], ids=str)
def test_ways_to_run_a_step_agree(arguments):
    models = [made(), made()]
    models[1].compile(keras.optimizers.SGD(0.05), **arguments)
    for model in models:
        fit(model)
    assert_same(raw_weights(models[0]), raw_weights(models[1]))
    assert_same(averages(models[0]), averages(models[1]))


# What cannot work.


def test_labels_are_asked_for():
    model = made(Affine(CLASSES))
    with pytest.raises(ValueError, match=r"num_classes=3, but the data came without labels. Pass"):
        fit(model)


@pytest.mark.parametrize(
    ("classes", "data", "message"),
    [
        (3, (points(8), np.eye(3, dtype="float32")[labels(8)]), r"not one-hot.*\(8, 3\)"),
        (None, ((255 * points(8)).astype("uint8"),), r"must be float in \[-1, 1\].*uint8.*127.5"),
        (None, (points(8)[:, :1],), r"built for data of shape \(2,\). Received \(1,\)"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(classes, data, message):
    model = made(Affine(classes))
    with pytest.raises(ValueError, match=message):
        model.mean_loss(data)
    with pytest.raises(ValueError, match=message):
        model.evaluate_batch(data)


def test_labels_are_ignored_without_classes():
    model = made()
    unlabelled = float(model.mean_loss(points(8)))
    model.step_count.assign(0)
    assert float(model.mean_loss((points(8), labels(8)))) == unlabelled


def test_the_model_brings_its_own_loss():
    model = DiffusionModel(Affine())
    for wrong in ({"loss": "mse"}, {"metrics": ["mae"]}, {"weighted_metrics": ["mae"]}):
        with pytest.raises(ValueError, match=r"no loss and no metrics: the model brings its own"):
            model.compile("adam", **wrong)
    with pytest.raises(TypeError, match="jit"):
        model.compile("adam", jit=True)
    with pytest.raises(ValueError, match=r"call `compile\(\)` before"):
        model.fit(points())
    with pytest.raises(TypeError, match="epoch_count"):
        made().fit(points(), epoch_count=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_dropout": 1.0}, r"label_dropout must lie in \[0, 1\). Received .*=1.0"),
        ({"sigma_data": 0.0}, r"sigma_data must be positive and finite. Received .*=0.0"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\). Received .*=1.0"),
        ({"process": "cosin"}, r"Unknown process 'cosin'. Did you mean 'cosine'"),
        ({"prediction": "eps"}, r"Unknown prediction 'eps'"),
        ({"weight": "min-snr"}, r"Unknown weight 'min-snr'. Did you mean 'min_snr'"),
        ({"times": "unifrom"}, r"Unknown time distribution 'unifrom'. Did you mean 'uniform'"),
    ],
    ids=str,
)
def test_bad_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiffusionModel(Affine(), **arguments)


def test_a_pipeline_is_not_warned_of(recwarn):
    """Keras would shuffle by default, and says of each data set that it can't."""
    tf = pytest.importorskip("tensorflow")
    model = DiffusionModel(Affine(CLASSES))
    model.compile("sgd")
    model.fit(tf.data.Dataset.from_tensor_slices((points(), labels())).batch(16), verbose=0)
    assert not [warning for warning in recwarn if "shuffle" in str(warning.message)]
