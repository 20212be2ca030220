"""From a network to x̂_0: a network that knows the answer has to give it, in every prediction."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops
from oracles import PUBLISHED, GaussianData, numpy

from tfdiffusion import denoiser as denoisers
from tfdiffusion import predictions, processes
from tfdiffusion._backend import rows
from tfdiffusion.denoiser import (
    Clipped,
    Conditioned,
    DynamicallyThresholded,
    NetworkDenoiser,
    Threshold,
)
from tfdiffusion.exact import GaussianMixture

VARIANCE = 0.25


class Knowing(keras.layers.Layer):
    """The best possible network on N(0, 1/4): it undoes the input scale and predicts y exactly."""

    def __init__(self, process, prediction, t, sigma_data, num_classes=None):
        super().__init__()
        self.process, self.prediction, self.t = processes.get(process), prediction, t
        self.sigma_data, self.num_classes = sigma_data, num_classes

    def call(self, inputs, training=False):
        self.seen = inputs
        alpha, sigma = (
            rows(m, inputs["x"]) for m in (self.process.alpha(self.t), self.process.sigma(self.t))
        )
        x_t = inputs["x"] * (alpha**2 * self.sigma_data**2 + sigma**2) ** 0.5
        x_0 = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * x_t
        noise = (x_t - alpha * x_0) / sigma
        row = predictions.get(self.prediction)
        return row.target(x_0, noise, alpha, sigma, self.sigma_data)


class Recorder(keras.layers.Layer):
    """Gives nothing and remembers what it was asked."""

    def __init__(self, num_classes=None):
        super().__init__()
        self.num_classes = num_classes

    def call(self, inputs, training=False):
        self.seen = inputs
        return 0.0 * inputs["x"]


class Constant(denoisers.Denoiser):
    """The same x̂_0 for everything."""

    process = processes.get("vp")

    def __init__(self, x_0):
        self.x_0 = ops.convert_to_tensor(np.asarray(x_0, "float32"))

    def __call__(self, x_t, t):
        return self.x_0


def batch(shape=(3, 2, 2, 1), seed=0):
    return ops.convert_to_tensor(np.random.default_rng(seed).normal(size=shape).astype("float32"))


@pytest.mark.parametrize("prediction", predictions.names())
@pytest.mark.parametrize("process", processes.names())
def test_every_prediction_gives_the_denoised_image(process, prediction):
    t = np.float32([0.125, 0.5, 0.875])
    alpha, sigma = (m[:, None, None, None] for m in PUBLISHED[process](t))
    x_t = numpy(batch()) * sigma + 0.1
    network = Knowing(process, prediction, t, sigma_data=0.5)
    denoiser = NetworkDenoiser(network, process, prediction, sigma_data=0.5)
    data = GaussianData(0.0, VARIANCE)
    x_0 = data.clean(x_t, alpha, sigma)
    np.testing.assert_allclose(
        numpy(denoiser(ops.convert_to_tensor(x_t.astype("float32")), t)),
        x_0,
        atol=2e-5 * max(1.0, float((sigma / alpha).max())),
    )


@pytest.mark.parametrize("process", ["cosine", "flow", "edm"])
def test_the_network_s_input_has_unit_spread(process):
    # c_in of EDM, on any process: data of spread σ_d come in at variance 1.
    x_0, noise = 0.5 * numpy(batch((20000, 1))), numpy(batch((20000, 1), seed=1))
    for t in (0.05, 0.5, 0.95):
        alpha, sigma = PUBLISHED[process](t)
        x_t = ops.convert_to_tensor((alpha * x_0 + sigma * noise).astype("float32"))
        network = Recorder()
        NetworkDenoiser(network, process, "v", sigma_data=0.5)(x_t, t)
        assert numpy(network.seen["x"]).var() == pytest.approx(1.0, rel=0.03)
        NetworkDenoiser(network, process, "v", sigma_data=0.5, scale_input=False)(x_t, t)
        np.testing.assert_array_equal(numpy(network.seen["x"]), numpy(x_t))


def sigma_of(process, t):
    return PUBLISHED[process](t)[1]


def test_what_the_network_is_told_about_time():
    def told(kind, process, t):
        network = Recorder()
        NetworkDenoiser(network, process, "v", time_input=kind)(batch(), t)
        return numpy(network.seen["time"])

    # DDPM's steps count from 0; continuous time counts as a thousand steps.
    steps = np.float32([0.001, 0.5, 1.0])
    for process in ("linear", "vp"):
        np.testing.assert_allclose(told("timestep", process, steps), [0, 499, 999], atol=1e-3)
    alpha, sigma = PUBLISHED["edm"](steps)
    np.testing.assert_allclose(told("edm", "edm", steps), np.log(sigma) / 4, atol=1e-5)
    np.testing.assert_allclose(told("log_sigma", "edm", steps), np.log(sigma), atol=1e-5)
    alpha, sigma = PUBLISHED["vp"](steps)
    np.testing.assert_allclose(told("log_snr", "vp", steps), 2 * np.log(alpha / sigma), rtol=1e-4)
    ladder = processes.Tabulated.from_sigmas(np.geomspace(0.01, 1.0, 10))
    np.testing.assert_allclose(
        told("level", ladder, np.float32([0.1, 0.5, 1.0])), [9, 5, 0], atol=1e-5
    )
    np.testing.assert_allclose(
        told("nearest_timestep", "vp", np.float32([0.0012, 0.4996, 1.0])), [0, 499, 999]
    )
    np.testing.assert_allclose(told("thousandths", "flow", steps), [1, 500, 1000], rtol=1e-6)
    np.testing.assert_allclose(told("sigma", "edm", steps), sigma_of("edm", steps), rtol=1e-5)
    # score_sde's code: times from 1 to 1e-5 stand for those from 1 to 0.
    later = steps + 1e-5 * (1.0 - steps)
    expected = sigma_of("ve", later.astype("float64"))
    np.testing.assert_allclose(told("score_sde_sigma", "ve", steps), expected, rtol=1e-6)
    # A scalar time is every row's.
    np.testing.assert_allclose(told("timestep", "linear", 0.5), [499.0] * 3)


@pytest.mark.parametrize("kind", ["timestep", "log_snr", "log_sigma", "edm", "level"])
def test_time_is_finite_where_no_signal_is_left(kind):
    zero_terminal = processes.zero_terminal_snr(processes.get("linear"))
    for process in ("flow", zero_terminal):
        network = Recorder()
        NetworkDenoiser(network, process, "v", time_input=kind)(batch(), 1.0)
        assert np.isfinite(numpy(network.seen["time"])).all()


@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_singular_predictions_need_signal(prediction):
    zero_terminal = processes.zero_terminal_snr(processes.get("linear"))
    with pytest.raises(ValueError, match=f"The '{prediction}' prediction says nothing"):
        NetworkDenoiser(Recorder(), zero_terminal, prediction)
    # In continuous time there is a time just before.
    denoiser = NetworkDenoiser(Recorder(), "flow", prediction)
    assert 0.99 < denoiser.latest < 1.0
    assert np.isfinite(numpy(denoiser(batch(), denoiser.latest))).all()


@pytest.mark.parametrize("prediction", ["v", "flow", "clean", "edm"])
def test_other_predictions_start_from_pure_noise(prediction):
    zero_terminal = processes.zero_terminal_snr(processes.get("linear"))
    for process in ("flow", zero_terminal):
        denoiser = NetworkDenoiser(Recorder(), process, prediction)
        assert denoiser.latest == 1.0
        assert np.isfinite(numpy(denoiser(batch(), 1.0))).all()


def test_labels():
    network = Recorder(num_classes=5)
    denoiser = NetworkDenoiser(network, "vp", "v")
    denoiser(batch(), 0.5)
    np.testing.assert_array_equal(numpy(network.seen["label"]), [5, 5, 5])  # "no label"
    for label in (2, np.array([2, 2, 2])):
        Conditioned(denoiser, label)(batch(), 0.5)
        np.testing.assert_array_equal(numpy(network.seen["label"]), [2, 2, 2])
    NetworkDenoiser(Recorder(), "vp", "v")(batch(), 0.5)


def test_noise_and_score_of_a_network():
    t = np.float32([0.125, 0.5, 0.875])
    alpha, sigma = (m[:, None, None, None] for m in PUBLISHED["vp"](t))
    denoiser = NetworkDenoiser(Knowing("vp", "v", t, 1.0), "vp", "v")
    x_t, data = batch(), GaussianData(0.0, VARIANCE)
    for method in ("noise", "score"):
        expected = getattr(data, method)(numpy(x_t), alpha, sigma)
        np.testing.assert_allclose(numpy(getattr(denoiser, method)(x_t, t)), expected, atol=1e-4)


def test_clipping_moves_the_noise_along():
    # Pitfall 21: x_t = α x̂_0 + σ ε̂ must hold for what is clipped.
    x_t = batch((2, 2))
    clipped = Clipped(Constant([[3.0, 0.2], [-5.0, 1.0]]))
    x_0 = numpy(clipped(x_t, 0.5))
    np.testing.assert_allclose(x_0, [[1.0, 0.2], [-1.0, 1.0]])
    alpha, sigma = PUBLISHED["vp"](0.5)
    whole = alpha * x_0 + sigma * numpy(clipped.noise(x_t, 0.5))
    np.testing.assert_allclose(whole, numpy(x_t), atol=1e-5)


def test_dynamic_thresholding():
    # Imagen, sec. 2.3, row by row: inside the range nothing happens, outside s scales it back.
    inside = np.linspace(-0.9, 0.9, 101)
    outside = np.linspace(-4.0, 4.0, 101)
    x_0 = np.stack([inside, outside]).reshape(2, 101, 1)
    out = numpy(DynamicallyThresholded(Constant(x_0), quantile=0.9)(batch((2, 101, 1)), 0.5))
    np.testing.assert_allclose(out[0, :, 0], inside, atol=1e-6)
    s = np.quantile(np.abs(outside), 0.9)
    np.testing.assert_allclose(out[1, :, 0], np.clip(outside, -s, s) / s, atol=1e-5)
    with pytest.raises(ValueError, match=r"quantile must lie in \(0, 1\]\. Received quantile=1.5"):
        DynamicallyThresholded(Constant(x_0), quantile=1.5)


def test_dynamic_thresholding_may_have_a_most():
    x_0 = np.linspace(-4.0, 4.0, 101).reshape(1, 101, 1)
    out = numpy(DynamicallyThresholded(Constant(x_0), 0.9, most=1.5)(batch((1, 101, 1)), 0.5))
    np.testing.assert_allclose(out, np.clip(x_0, -1.5, 1.5) / 1.5, atol=1e-6)
    with pytest.raises(ValueError, match=r"most must lie in \[1, inf\]\. Received most=0.5"):
        DynamicallyThresholded(Constant(x_0), most=0.5)


def test_thresholds_as_objects():
    x_0 = np.linspace(-4.0, 4.0, 101).reshape(1, 101, 1)
    inner, x_t = Constant(x_0), batch((1, 101, 1))
    for threshold, expected in (
        (Threshold(), np.clip(x_0, -1, 1)),
        (Threshold(0.5), np.clip(x_0, -0.5, 0.5)),
        (Threshold(1.5, 0.9), np.clip(x_0, -1.5, 1.5) / 1.5),
    ):
        np.testing.assert_allclose(numpy(threshold(inner)(x_t, 0.5)), expected, atol=1e-6)
        config = keras.saving.serialize_keras_object(threshold)
        assert keras.saving.deserialize_keras_object(config) == threshold
    for limit, quantile in ((0.0, None), (1.0, 1.5)):
        with pytest.raises(ValueError, match=r"must lie in \(0, (inf|1)\]"):
            Threshold(limit, quantile)


def test_a_wrapped_denoiser_keeps_process_and_latest():
    inner = NetworkDenoiser(Recorder(num_classes=3), "flow", "noise")
    for wrapped in (Conditioned(inner, 1), Clipped(inner), DynamicallyThresholded(inner)):
        assert wrapped.process is inner.process and wrapped.latest == inner.latest


def test_reading_other_weights():
    network = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    network.build((None, 1))

    class Wrapped(keras.layers.Layer):
        num_classes = None

        def call(self, inputs, training=False):
            return network(inputs["x"])

    denoiser = NetworkDenoiser(Wrapped(), "flow", "clean", scale_input=False)
    other = denoiser.reading(lambda: [(network.kernel, 3.0 * ops.ones((1, 1)))])
    x_t = batch((4, 1))
    np.testing.assert_allclose(numpy(other(x_t, 0.5)), 3 * numpy(denoiser(x_t, 0.5)), rtol=1e-6)
    assert float(ops.sum(network.kernel)) == 1.0  # nothing was assigned


def test_unknown_time_input():
    with pytest.raises(ValueError, match=r"Unknown time input 'timestp'\. Did you mean 'timestep'"):
        NetworkDenoiser(Recorder(), "vp", "v", time_input="timestp")


def test_exact_and_network_denoisers_agree():
    t = np.float32([0.25, 0.5, 0.75])
    x_t = batch((3, 2))
    network = NetworkDenoiser(Knowing("flow", "flow", t, 1.0), "flow", "flow")
    exact = GaussianMixture([[0.0, 0.0]], VARIANCE, process="flow")
    for method in ("__call__", "noise", "score", "velocity"):
        mine, theirs = (numpy(getattr(d, method)(x_t, t)) for d in (network, exact))
        np.testing.assert_allclose(mine, theirs, atol=1e-4, err_msg=method)
