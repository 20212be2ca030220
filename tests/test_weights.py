"""Loss weights against the forms their papers print, and the variational bound against KL."""

from __future__ import annotations

import json

import keras
import numpy as np
import oracles
import pytest
from keras import ops
from oracles import FLOAT, PUBLISHED, assert_close, numpy
from scipy import special, stats

from tfdiffusion import DiffusionModel, processes, random, weights

STEPS = np.array([1, 2, 3, 10, 200, 400, 700, 990, 999, 1000])
CONTINUOUS = ["vp", "sub_vp", "ve", "flow", "edm", "continuous_cosine"]


class Shrink(keras.layers.Layer):
    """Predicts a share of its input: wrong at every noise level."""

    num_classes = None

    def call(self, inputs, training=False):
        return 0.3 * inputs["x"]


def loss_ratio(weight, prediction, process, t):
    """What the trainer multiplies the prediction's own squared error by."""
    x_0 = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(len(t), 4)).astype("float32"))
    t, keys = ops.convert_to_tensor(t.astype("float32")), random.keys(range(len(t)))
    weighted, plain = (
        DiffusionModel(Shrink(), process, prediction, weight=w).losses_at(x_0, None, t, keys)
        for w in (weight, "constant")
    )
    return numpy(weighted) / numpy(plain)


PAPERS = {
    # DDPM, eq. 14: L_simple is the noise prediction's own loss.
    ("snr", "noise"): lambda snr: 1.0 + 0 * snr,
    ("snr", "clean"): lambda snr: snr,
    # Hang et al. 2023, sec. 3.4, γ = 5.
    ("min_snr", "clean"): lambda snr: np.minimum(snr, 5),
    ("min_snr", "noise"): lambda snr: np.minimum(snr, 5) / snr,
    ("min_snr", "v"): lambda snr: np.minimum(snr, 5) / (snr + 1),
    # Choi et al. 2022, eq. 8: a factor of L_simple.
    ("p2", "noise"): lambda snr: 1 / (1 + snr),
    # A factor of the noise prediction's loss that falls from 1 to 0 with the log-SNR.
    ("sigmoid", "noise"): lambda snr: special.expit(-np.log(snr)),
}


@pytest.mark.parametrize("weight, prediction", PAPERS)
@pytest.mark.parametrize("process", ["linear", "cosine"])
def test_published_weights_in_the_prediction_s_own_loss(weight, prediction, process):
    snr = oracles.snr(PUBLISHED[process], STEPS / 1000)
    ratio = loss_ratio(weight, prediction, process, STEPS / 1000)
    np.testing.assert_allclose(ratio, PAPERS[weight, prediction](snr), rtol=1e-3)


@pytest.mark.parametrize("weight", ["min_snr", "vlb"])
@pytest.mark.parametrize("process", ["linear", "flow"])
def test_a_weight_means_the_same_whatever_is_predicted(weight, process):
    # In terms of ‖Δx_0‖², which "clean" regresses; the loss of y is ((aσ − bα)/σ)² times that.
    t = np.linspace(0.05, 0.95, 10)
    alpha, sigma = PUBLISHED[process](t)
    reference = loss_ratio(weight, "clean", process, t)
    for prediction, own in {
        "noise": (alpha / sigma) ** 2,
        "v": ((alpha**2 + sigma**2) / sigma) ** 2,
        "flow": ((alpha + sigma) / sigma) ** 2,
        "score": (alpha / sigma**2) ** 2,
    }.items():
        ratio = loss_ratio(weight, prediction, process, t)
        np.testing.assert_allclose(ratio * own, reference, rtol=1e-3, err_msg=prediction)


@pytest.mark.parametrize("weight", ["snr", "min_snr", "p2", "sigmoid", "vlb"])
@pytest.mark.parametrize("prediction", ["v", "edm"])
def test_weights_are_finite_without_signal(weight, prediction):
    process = processes.zero_terminal_snr(processes.get("linear"))
    ratio = loss_ratio(weight, prediction, process, STEPS / 1000)
    assert np.isfinite(ratio).all() and (ratio >= 0).all()


def test_p2_and_sigmoid_parameters():
    process, t = processes.get("vp"), np.linspace(0.05, 0.95, 10).astype(FLOAT)
    snr = oracles.snr(PUBLISHED["vp"], t)
    assert_close(weights.P2(gamma=0.0)(process, t), snr)
    assert_close(weights.P2(gamma=0.5, k=2.0)(process, t), snr / np.sqrt(2.0 + snr))
    # At the bias the noise weight is a half; above, the weight of x_0 stays below e^bias.
    value = numpy(weights.Sigmoid(bias=1.0)(process, t))
    assert (np.diff(value) < 0).all() and (value < np.e).all()
    at_bias = process.inverse_log_snr(np.array([1.0], FLOAT))
    assert_close(weights.Sigmoid(bias=1.0)(process, at_bias), [np.e / 2])


# The variational bound.

CHAINS = {
    "linear": processes.get("linear"),
    "cosine": processes.get("cosine"),
    "from_sigmas": processes.Tabulated.from_sigmas(np.geomspace(0.01, 50.0, 1000)),
    "zero_terminal": processes.zero_terminal_snr(processes.get("scaled_linear")),
}
MOMENTS = PUBLISHED | {
    "from_sigmas": oracles.ladder(np.geomspace(0.01, 50.0, 1000)),
    "zero_terminal": oracles.zero_terminal(oracles.scaled_linear_betas()),
}


@pytest.mark.parametrize("name", CHAINS)
def test_bound_of_a_chain_is_the_divergence_of_the_posteriors(name):
    # w_i/T ‖x̂_0 − x_0‖² = KL(q(x_{i−1} | x_i, x_0) ‖ q(x_{i−1} | x_i, x̂_0)), DDPM, eq. 8.
    moments, x_0, denoised, x_t = MOMENTS[name], 0.8, 0.5, 0.3
    weight = numpy(weights.VLB()(CHAINS[name], (STEPS / 1000).astype(FLOAT)))
    for i, w in zip(STEPS, weight):
        now, before = moments(i / 1000), moments((i - 1) / 1000)
        if i == 1:  # the decoder: p(x_0 | x_1) = N(x̂_0, σ_1²/α_1²)
            decoder = stats.norm(scale=now[1] / now[0])
            expected = decoder.logpdf(0) - decoder.logpdf(x_0 - denoised)
        else:
            mean, variance = oracles.posterior(now, before, x_0, x_t)
            other, _ = oracles.posterior(now, before, denoised, x_t)
            expected = oracles.kl(mean, variance, other, variance)
        assert_close(
            w / 1000 * (x_0 - denoised) ** 2, expected, double=1e-6, single=2e-3, floor=1e-9
        )


@pytest.mark.parametrize("name", CONTINUOUS)
def test_bound_in_continuous_time(name):
    # −½ dSNR/dt (VDM, eq. 17), the published ratio differentiated numerically.
    t = np.linspace(0.03, 0.97, 10)
    expected = -0.5 * oracles.slope(lambda u: oracles.snr(PUBLISHED[name], u), t)
    weight = numpy(weights.VLB()(processes.get(name), t.astype(FLOAT)))
    np.testing.assert_allclose(weight, expected, rtol=1e-4)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_bound_depends_on_the_ends_alone(name):
    # ½ ∫ mmse dSNR = ½ ln((1 + v S_0)/(1 + v S_1)) on N(0, v), whatever the way (oracle 21).
    v, t = 0.25, np.geomspace(0.01, 1.0, 4001)[:-1]
    snr = oracles.snr(PUBLISHED[name], t)
    weight = numpy(weights.VLB()(processes.get(name), t.astype(FLOAT))).astype("float64")
    integral = np.trapezoid(weight * v / (1 + v * snr), t)
    expected = 0.5 * np.log((1 + v * snr[0]) / (1 + v * snr[-1]))
    assert integral == pytest.approx(expected, rel=1e-3)


def test_bound_of_a_chain_falls_to_the_integral():
    # More steps between the same ends tighten the bound (VDM, sec. 4.1).
    v, bounds = 0.25, []
    for steps in (20, 640):
        log_snr = np.linspace(9.0, -7.0, steps)
        snr = np.exp(log_snr)
        chain = processes.Tabulated(
            np.sqrt(special.expit(log_snr)), np.sqrt(special.expit(-log_snr))
        )
        t = (np.arange(2, steps + 1) / steps).astype(FLOAT)
        weight = numpy(weights.VLB()(chain, t)).astype("float64")
        bounds.append(np.sum(weight / steps * v / (1 + v * snr[1:])))
    limit = 0.5 * np.log((1 + v * np.exp(9.0)) / (1 + v * np.exp(-7.0)))
    assert bounds[0] > bounds[1] > limit
    assert bounds[1] == pytest.approx(limit, rel=0.02)


# Names.


@pytest.mark.parametrize(
    "weight",
    [
        weights.SNR(),
        weights.MinSNR(3.0),
        weights.P2(0.5, 2.0),
        weights.Sigmoid(-1.0),
        weights.VLB(),
    ],
    ids=lambda w: type(w).__name__,
)
def test_configuration_round_trip(weight):
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(weight)))
    assert keras.saving.deserialize_keras_object(config) == weight
    assert weights.get(weight) is weight


def test_names():
    assert weights.get(None) is None and weights.get("constant") is None
    for name in weights.names():
        weights.get(name)
    with pytest.raises(ValueError, match=r"Unknown weight 'min_sn'\. Did you mean 'min_snr'"):
        weights.get("min_sn")
