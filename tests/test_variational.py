"""Models trained for likelihood: their objectives against closed forms, and what training does."""

from __future__ import annotations

import math

import keras
import numpy as np
import oracles
import pytest
from keras import ops
from oracles import FLOAT, GaussianData, numpy

from tfdiffusion import likelihood, networks, processes, random, samplers, variational
from tfdiffusion.denoiser import Clipped, Conditioned
from tfdiffusion.variational import (
    LearnedVarianceDenoiser,
    LearnedVarianceModel,
    MonotoneSchedule,
    VariationalDiffusionModel,
    WithFourierFeatures,
)

BITS = 1 / math.log(2.0)
STEPS = 30


@keras.saving.register_keras_serializable(package="tests")
class TwoHeads(keras.layers.Layer):
    """y = a x (+ a number for the label) and v = b + c x, with a weight each."""

    def __init__(self, mean=0.5, variance=0.0, num_classes=None, **kwargs):
        super().__init__(**kwargs)
        self.start = {"mean": mean, "variance": variance}
        self.num_classes = num_classes

    def build(self, shapes):
        def weight(name, value):
            constant = keras.initializers.Constant(value)
            return self.add_weight(shape=(), initializer=constant, name=name)

        self.a, self.b = (weight(n, self.start[k]) for n, k in (("a", "mean"), ("b", "variance")))
        self.c = weight("c", 0.1)
        if self.num_classes is not None:
            self.table = self.add_weight(shape=(self.num_classes + 1,), name="table")
        self.built = True

    def call(self, inputs, training=False):
        x = inputs["x"]
        y = self.a * x
        if self.num_classes is not None:
            offset = ops.take(self.table, inputs["label"], axis=0)
            y = y + ops.reshape(offset, (-1,) + (1,) * (len(x.shape) - 1))
        return ops.concatenate([y, self.b + self.c * x], axis=-1)

    def get_config(self):
        return {**super().get_config(), **self.start, "num_classes": self.num_classes}


class Knows(keras.layers.Layer):
    """The exact network on N(0, variance), in terms of ε, from λ or DDPM's timestep."""

    num_classes = None

    def __init__(self, variance, moments=None, share=None):
        super().__init__()
        self.variance, self.moments, self.share = variance, moments, share

    def build(self, shapes):
        self.built = True

    def call(self, inputs, training=False):
        x, time = inputs["x"], inputs["time"][:, None]
        if self.moments is None:
            alpha, sigma = ops.sqrt(ops.sigmoid(time)), ops.sqrt(ops.sigmoid(-time))
        else:
            step = ops.cast(ops.round(time), "int32") + 1
            tables = [np.asarray(m, "float32") for m in self.moments(np.arange(STEPS + 1) / STEPS)]
            alpha, sigma = (ops.take(ops.convert_to_tensor(table), step) for table in tables)
        noise = sigma * x / (alpha**2 * self.variance + sigma**2)
        if self.share is None:
            return noise
        return ops.concatenate([noise, ops.full_like(x, 2 * self.share - 1)], axis=-1)


def keys(count, seed=0):
    return random.fold_in(random.keys(seed), np.arange(count))


def betas():
    return np.linspace(1e-4, 0.02, STEPS) * 1000 / STEPS


# Learned variances.


@pytest.mark.parametrize("v", [-1.0, 0.0, 1.0])
def test_the_variance_lies_between_its_bounds(v):
    """v = −1 is β̃, 1 is β, 0 their geometric mean (pitfall 22); β̃_1 is that of step 2."""
    denoiser = LearnedVarianceDenoiser(TwoHeads(), processes.LinearBeta(STEPS))
    moments, step = oracles.chain(betas()), np.array([1, 2, 17])
    t = (step / STEPS).astype(FLOAT)
    log_variance = denoiser.log_variance(np.full((3, 1), v, FLOAT), t, t - 1 / STEPS)
    expected = []
    for i in step:
        second = max(i, 2)
        _, low = oracles.posterior(moments(second / STEPS), moments((second - 1) / STEPS), 0, 0)
        expected.append((1 + v) / 2 * np.log(betas()[i - 1]) + (1 - v) / 2 * np.log(low))
    oracles.assert_close(log_variance[:, 0], np.array(expected), double=1e-6, single=1e-3)


def trained_once(**arguments):
    keras.utils.set_random_seed(0)
    model = LearnedVarianceModel(
        TwoHeads(), processes.LinearBeta(STEPS), levels=None, ema_decay=None, **arguments
    )
    model.compile(keras.optimizers.SGD(1e-3), run_eagerly=oracles.DOUBLE)
    x_0 = np.random.default_rng(0).normal(0, 0.5, (64, 1)).astype("float32")
    model.fit(x_0, batch_size=64, verbose=0)
    return [float(numpy(w)) for w in (model.network.a, model.network.b, model.network.c)]


def test_the_hybrid_objective_stops_the_gradient_of_the_mean():
    """However large λ, the mean learns from L_simple alone; the variance from L_vlb alone."""
    start = (0.5, 0.0, 0.1)
    simple = trained_once(vlb_weight=0.0)
    hybrid = trained_once(vlb_weight=0.5)
    bound = trained_once(objective="vlb")
    assert simple[0] != start[0] and simple[1] == pytest.approx(start[1])
    assert hybrid[0] == pytest.approx(simple[0], rel=1e-6)
    assert abs(hybrid[1] - start[1]) > 1e-6 and abs(hybrid[2] - start[2]) > 1e-6
    assert bound[0] != pytest.approx(simple[0], rel=1e-4)


@pytest.mark.parametrize("objective", ["hybrid", "vlb"])
def test_the_bound_in_training_is_unbiased(objective):
    """With σ² = β on N(0, 1) the exact chain's bound is the entropy (oracle 12)."""
    model = LearnedVarianceModel(
        Knows(1.0, oracles.chain(betas()), share=1.0),
        processes.LinearBeta(STEPS),
        objective=objective,
        vlb_weight=1.0,
        levels=None,
        ema_decay=None,
    )
    model.build((None, 1))
    count = 30_000
    x_0 = ops.convert_to_tensor(np.random.default_rng(1).normal(size=(count, 1)).astype("float32"))
    t = ((np.arange(count) % STEPS + 1) / STEPS).astype("float32")
    losses = numpy(model.losses_at(x_0, None, t, keys(count))).astype("float64")
    if objective == "hybrid":  # E(ε̂ − ε)² = ᾱ v/V
        losses = losses - np.mean(np.cumprod(1 - betas()))
    entropy = 0.5 * np.log2(2 * np.pi * np.e)
    assert losses.mean() == pytest.approx(entropy, abs=3 * losses.std() / np.sqrt(count))


def test_important_times_are_drawn_more_often_without_bias():
    importance = variational.ImportanceOfTimes(4)
    u = (np.arange(4000) + 0.5) / 4000
    np.testing.assert_allclose(numpy(importance.probabilities()), 0.25)  # nothing is known yet
    losses = np.array([0.1, 1.0, 2.0, 5.0], "float32")
    for _ in range(12):
        importance.update(np.arange(4), losses)
    expected = losses / losses.sum()
    np.testing.assert_allclose(numpy(importance.probabilities()), expected, atol=1e-3)
    t, weight = (numpy(x) for x in importance.draw(ops.convert_to_tensor(u.astype("float32"))))
    index = np.rint(t * 4).astype(int) - 1
    assert np.bincount(index, minlength=4) == pytest.approx(4000 * expected, abs=8)
    weighted = weight * losses[index]
    assert weighted.mean() == pytest.approx(losses.mean(), rel=1e-3)
    assert weighted.std() < 0.02 * losses.std()
    # Ten at once count as ten, and the memory is of about ten.
    importance.update(np.full(10, 3), np.zeros(10, "float32"))
    assert numpy(importance.second_moment)[3] < 1e-3
    np.testing.assert_allclose(numpy(importance.count), [12, 12, 12, 22])


def test_training_finds_the_variance_of_the_reverse_steps():
    """On N(0, ¼), where it is known: V_s σ²/V_t, nearer to β than β̃ is at the last steps."""
    variance = 0.25
    x_0 = (0.5 * np.random.default_rng(0).normal(size=(2048, 1))).astype("float32")
    moments = oracles.chain(betas())

    @keras.saving.register_keras_serializable(package="tests")
    class KnowsTheMean(Knows):
        """ε̂ is exact; v is a number for each step."""

        def build(self, shapes):
            self.table = self.add_weight(shape=(STEPS,), initializer="zeros", name="table")
            self.built = True

        def call(self, inputs, training=False):
            index = ops.cast(ops.round(inputs["time"]), "int32")
            v = ops.take(self.table, index)[:, None]
            return ops.concatenate([super().call(inputs), v], axis=-1)

    model = LearnedVarianceModel(
        KnowsTheMean(variance, moments),
        processes.LinearBeta(STEPS),
        objective="vlb",
        levels=None,
        ema_decay=None,
    )
    model.compile(keras.optimizers.Adam(0.03))
    model.fit(x_0, batch_size=256, epochs=25, verbose=0)
    t = np.arange(1, STEPS + 1) / STEPS
    found = model.raw.log_variance(
        numpy(model.network.table)[:, None].astype("float32"),
        t.astype("float32"),
        (t - 1 / STEPS).astype("float32"),
    )
    alphas, sigmas = moments(np.r_[0, t])
    spread = alphas**2 * variance + sigmas**2
    expected = np.log(spread[:-1] * betas() / spread[1:])
    error = np.abs(numpy(found)[:, 0] - expected)
    assert error[0] < 0.15 and np.median(error) < 0.1  # the first step is where the bits are
    assert float(numpy(ops.min(model.importance.count))) >= 10


def test_a_learned_variance_in_sampler_wrappers_and_errors():
    denoiser = LearnedVarianceDenoiser(
        Knows(1.0, oracles.chain(betas()), share=1.0), processes.LinearBeta(STEPS)
    )
    x_t = np.random.default_rng(0).normal(size=(5, 1)).astype("float32")
    plain = samplers.DDPM("beta").step(denoiser, (x_t,), 0.5, 0.4, keys(5))[0]
    for same in (denoiser, Clipped(denoiser, 9.0), Conditioned(denoiser, None)):
        learned = samplers.DDPM("learned").step(same, (x_t,), 0.5, 0.4, keys(5))[0]
        np.testing.assert_allclose(numpy(learned), numpy(plain), rtol=1e-5)
    with pytest.raises(TypeError, match="no learned variance"):
        fixed = Clipped(VariationalDiffusionModel(TwoHeads()).raw)
        samplers.DDPM("learned").step(fixed, (x_t,), 0.5, 0.4, keys(5))
    with pytest.raises(ValueError, match="chain of at least 2"):
        LearnedVarianceModel(TwoHeads(), "vp")
    with pytest.raises(ValueError, match="Unknown objective 'elbo'"):
        LearnedVarianceModel(TwoHeads(), objective="elbo")
    with pytest.raises(ValueError, match="2 output channels"):
        LearnedVarianceDenoiser(Knows(1.0), "linear").predict(x_t, np.float32(0.5))
    with pytest.raises(ValueError, match="gamma_min < gamma_max"):
        VariationalDiffusionModel(TwoHeads(), gamma_min=1.0, gamma_max=-1.0)
    with pytest.raises(ValueError, match="learns its process"):
        VariationalDiffusionModel(TwoHeads(), weight="snr")


# Variational diffusion models.


def closed_form(variance, gamma_min, gamma_max):
    """The bound of the exact model of N(0, v), in bits: prior, decoder and ½ ∫ mmse dSNR."""
    first, last = math.exp(-gamma_min), math.exp(-gamma_max)
    signal = last / (1 + last)
    prior = 0.5 * (signal * (variance - 1) + math.log1p(last))
    decoder = 0.5 * (math.log(2 * math.pi * math.e) + gamma_min)
    return BITS * (prior + decoder + 0.5 * math.log((1 + variance * first) / (1 + variance * last)))


@pytest.mark.parametrize("prediction", ["noise"])
def test_the_continuous_estimator_is_unbiased(prediction):
    """At 3 standard errors, for a schedule that is not straight."""
    variance, count = 0.3, 40_000
    model = VariationalDiffusionModel(
        Knows(variance), prediction, gamma_min=-6.0, gamma_max=5.0, levels=None, ema_decay=None
    )
    model.build((None, 1))
    model.schedule.heights.assign(np.random.default_rng(0).normal(-2, 2, 32))
    x_0 = np.sqrt(variance) * np.random.default_rng(1).normal(size=(count, 1))
    t = np.random.default_rng(2).uniform(size=count).astype("float32")
    losses = model.losses_at(ops.convert_to_tensor(x_0.astype("float32")), None, t, keys(count))
    losses = numpy(losses).astype("float64")
    error = losses.std() / np.sqrt(count)
    assert losses.mean() == pytest.approx(closed_form(variance, -6.0, 5.0), abs=3 * error)
    assert error < 0.05


def test_the_schedule_rises_from_end_to_end():
    schedule = MonotoneSchedule(-7.0, 4.0)
    schedule.heights.assign(np.random.default_rng(0).normal(size=32))
    t = np.linspace(0, 1, 101)
    shape = numpy(schedule.shape_at(ops.convert_to_tensor(t.astype(FLOAT))))
    assert shape[0] == pytest.approx(0, abs=1e-6) and shape[-1] == pytest.approx(1, abs=1e-6)
    assert (np.diff(shape) > 0).all()

    def values(t):
        return numpy(schedule.shape_at(ops.convert_to_tensor(t.astype(FLOAT)))).astype("float64")

    numeric = (values(t[1:-1] + 1e-3) - values(t[1:-1] - 1e-3)) / 2e-3
    slope = numpy(schedule.slope_at(ops.convert_to_tensor(t[1:-1].astype(FLOAT))))
    np.testing.assert_allclose(slope, numeric, rtol=5e-3)
    process = variational.LearnedSchedule(schedule)
    np.testing.assert_allclose(numpy(process.log_snr(np.array([0.0, 1.0]))), [7.0, -4.0], rtol=1e-5)
    np.testing.assert_allclose(
        numpy(process.alpha(0.3)) ** 2 + numpy(process.sigma(0.3)) ** 2, 1.0, rtol=1e-5
    )


def relative_variance(model, variance):
    """Of ½ γ' ‖ε − ε̂‖² over t, for the exact network and many dimensions: E‖·‖² = SNR mmse."""
    t = np.linspace(0, 1, 4001).astype(FLOAT)
    gamma = -numpy(model.process.log_snr(t)).astype("float64")
    snr = np.exp(-gamma)
    loss = np.gradient(gamma, t) * snr * variance / (1 + variance * snr)
    return loss.var() / loss.mean() ** 2


def test_training_lowers_the_estimators_variance_and_nothing_else():
    """The curve tends to where every t gives the same loss; the bound it cannot change."""
    variance = 0.01
    x_0 = (0.1 * np.random.default_rng(0).normal(size=(512, 64))).astype("float32")
    model = VariationalDiffusionModel(
        Knows(variance), gamma_min=-5.0, gamma_max=1.0, levels=None, ema_decay=None
    )
    model.compile(keras.optimizers.Adam(0.05))
    model.build((None, 64))
    before, ends = relative_variance(model, variance), numpy(model.schedule.ends)
    model.fit(x_0, batch_size=64, epochs=20, verbose=0)
    after = relative_variance(model, variance)
    assert before > 0.4 and after < 0.1 * before
    # The ends descend the bound itself: less noise first, more last.
    moved = numpy(model.schedule.ends)
    assert moved[0] < ends[0] and moved[1] > ends[1]

    frozen = VariationalDiffusionModel(
        TwoHeads(), learn_schedule=False, gamma_min=-8.0, gamma_max=6.0
    )
    frozen.build((None, 2))
    assert len(frozen.trainable_weights) == 3


class Toy:
    """A small VDM, trained for seconds on a mixture in the plane."""

    means = ((-0.6, 0.3), (0.5, -0.4))
    variance = 0.04

    def __init__(self):
        keras.utils.set_random_seed(0)
        rng = np.random.default_rng(0)
        self.data = oracles.MixtureData(self.means, self.variance)
        self.train, self.test = (self.draw(rng, n) for n in (4096, 512))
        network = networks.MLP(width=48, depth=2, out_features=2)
        self.model = VariationalDiffusionModel(
            network, "v", gamma_min=-9.0, gamma_max=6.0, levels=None, ema_decay=0.98
        )
        self.model.compile(keras.optimizers.Adam(4e-3))
        self.history = self.model.fit(self.train, batch_size=256, epochs=25, verbose=0).history

    def draw(self, rng, count):
        centre = np.asarray(self.means)[rng.integers(0, 2, count)]
        return (centre + self.variance**0.5 * rng.normal(size=(count, 2))).astype("float32")


@pytest.fixture(scope="module")
def toy():
    return Toy()


def test_the_likelihood_of_a_trained_model_is_at_least_its_bound(toy):
    """Both near the truth, the flow nearer."""
    truth = -toy.data.log_density(toy.test, 1.0, 0.0) * BITS / 2
    bound = likelihood.continuous_bound(toy.model, toy.test, pixels=None, batch_size=512)
    flow = likelihood.log_likelihood(
        toy.model, toy.test, pixels=None, divergence="exact", batch_size=512
    )
    gap = bound.total - flow.bits
    assert gap.mean() > -3 * gap.std() / np.sqrt(512)
    for result, most in ((bound, 0.3), (flow, 0.15)):
        excess = np.mean((result.total if result is bound else result.bits) - truth)
        assert -0.05 < excess < most
    # The discrete bound comes down to it.
    discrete = [
        likelihood.bound(toy.model, toy.test, pixels=None, steps=n, batch_size=512).mean
        for n in (8, 64)
    ]
    assert discrete[0] > discrete[1] > bound.mean - 0.05


def test_it_saves_loads_samples_and_averages(toy, tmp_path):
    losses = toy.history["loss"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    points = toy.model.sample(8, threshold=None, steps=8, seed=1)
    toy.model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for other in (loaded, toy.model.averaged()):
        assert type(other) is VariationalDiffusionModel
        np.testing.assert_allclose(
            other.sample(8, threshold=None, steps=8, seed=1), points, atol=2e-5
        )
    val = toy.model.evaluate(toy.test, batch_size=512, verbose=0, return_dict=True)
    bound = likelihood.continuous_bound(toy.model, toy.test, pixels=None, batch_size=512)
    assert val["loss"] == pytest.approx(bound.mean, abs=0.25)
    assert np.abs(points).max() < 2


def test_a_hybrid_model_on_images_saves_and_samples(tmp_path):
    """8-bit pixels, a class label, the learned variance in the bound and in the sampler."""
    levels = np.random.default_rng(0).integers(0, 256, (32, 4, 4, 1))
    images, label = (levels / 127.5 - 1).astype("float32"), np.arange(32) % 2
    model = LearnedVarianceModel(
        TwoHeads(num_classes=2), processes.Cosine(STEPS), "v", times="stratified"
    )
    model.compile(keras.optimizers.Adam(1e-3))
    history = model.fit(images, label, batch_size=16, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    learned = samplers.DDPM("learned")
    drawn = model.sample(2, label=1, sampler=learned, steps=3)
    assert drawn.shape == (2, 4, 4, 1) and np.abs(drawn).max() <= 1
    bound = likelihood.bound(loaded, images[:8], label[:8], evaluations=4, batch_size=8)
    assert np.isfinite(bound.total).all() and 2 < bound.mean


def test_fourier_features():
    """sin and cos of 2ⁿ π x beside x, and an output like the data."""

    class Shows(keras.layers.Layer):
        num_classes = 7

        def build(self, shapes):
            self.shapes, self.built = shapes, True

        def call(self, inputs, training=False):
            self.seen = inputs["x"]
            return inputs["x"][..., :2]

        def compute_output_shape(self, shapes):
            return (*shapes["x"][:-1], 2)

    x = np.random.default_rng(0).uniform(-1, 1, (3, 2)).astype("float32")
    layer = WithFourierFeatures(Shows(), frequencies=(0, 3))
    layer.build({"x": (None, 2), "time": (None,)})
    layer({"x": x, "time": np.zeros(3, "float32")})
    expected = [
        x,
        np.sin(np.pi * x),
        np.cos(np.pi * x),
        np.sin(8 * np.pi * x),
        np.cos(8 * np.pi * x),
    ]
    np.testing.assert_allclose(numpy(layer.network.seen), np.concatenate(expected, -1), atol=1e-5)
    assert layer.num_classes == 7 and layer.compute_output_shape({"x": (5, 2)}) == (5, 2)

    wide = WithFourierFeatures(networks.MLP(width=8, depth=1))
    with pytest.raises(ValueError, match="gives 10 channels for data of 2"):
        wide.build({"x": (None, 2), "time": (None,)})

    fitting = WithFourierFeatures(networks.MLP(width=8, depth=1, out_features=2))
    fitting.build({"x": (None, 2), "time": (None,)})
    again = WithFourierFeatures.from_config(fitting.get_config())
    assert again.frequencies == (7, 8) and again.network.out_features == 2


def test_the_exact_chain_has_the_closed_form():
    """The closed form used above is the one of `GaussianData`: entropy up to the first noise."""
    assert closed_form(0.3, -14.0, 6.0) == pytest.approx(
        0.5 * np.log2(2 * np.pi * np.e * 0.3), abs=2e-3
    )
    assert GaussianData(0.0, 0.3).spread(1.0, 0.0) == 0.3
