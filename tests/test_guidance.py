"""Classifier-free guidance: linear in its scale, and the two models that it mixes."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops
from oracles import PUBLISHED, GaussianData, numpy

from tfdiffusion import DiffusionModel, networks, sample
from tfdiffusion.denoiser import Conditioned, NetworkDenoiser
from tfdiffusion.guidance import ClassifierFreeGuidance

CLASSES = 3
# Each class is a Gaussian, and so is what the model believes of no class at all (the last entry).
BELIEFS = [GaussianData(m, v) for m, v in ((-1.0, 0.04), (0.5, 0.2), (1.0, 0.1), (0.2, 0.8))]
PROCESS = "vp"


class Believer(keras.layers.Layer):
    """The exact noise prediction of each class at one time, and a record of what was asked."""

    num_classes = CLASSES

    def __init__(self, t):
        super().__init__()
        self.alpha, self.sigma = PUBLISHED[PROCESS](t)
        self.calls = []

    def call(self, inputs, training=False):
        self.calls.append({name: numpy(value) for name, value in inputs.items()})
        means = np.array([b.mean for b in BELIEFS], "float32")
        spreads = np.array([b.spread(self.alpha, self.sigma) for b in BELIEFS], "float32")
        mean, spread = (ops.take(table, inputs["label"])[:, None] for table in (means, spreads))
        return float(self.sigma) * (inputs["x"] - float(self.alpha) * mean) / spread


@pytest.fixture
def denoiser():
    return NetworkDenoiser(Believer(0.5), PROCESS, "noise")


@pytest.fixture
def x_t():
    return np.random.default_rng(0).normal(size=(6, 2)).astype("float32")


LABELS = np.array([0, 1, 2, 2, 1, 0])


@pytest.mark.parametrize("w", [-1.0, 0.0, 0.5, 4.0])
def test_guidance_is_the_published_combination(denoiser, x_t, w):
    """Oracle 23: (1+w) ε_c − w ε_u with s = 1 + w, and the same for the score and x̂_0."""
    guided = ClassifierFreeGuidance(denoiser, LABELS, 1.0 + w)
    (alpha, sigma), x = PUBLISHED[PROCESS](0.5), x_t.astype(np.float64)
    for method in ("noise", "score", "clean"):
        conditional = np.stack(
            [getattr(BELIEFS[y], method)(row, alpha, sigma) for row, y in zip(x, LABELS)]
        )
        unconditional = getattr(BELIEFS[-1], method)(x, alpha, sigma)
        expected = (1 + w) * conditional - w * unconditional
        actual = guided if method == "clean" else getattr(guided, method)
        np.testing.assert_allclose(numpy(actual(x_t, 0.5)), expected, rtol=1e-4, atol=1e-4)


def test_scale_0_is_unconditional_and_scale_1_conditional(denoiser, x_t):
    without = numpy(denoiser(x_t, 0.5))
    with_labels = numpy(Conditioned(denoiser, LABELS)(x_t, 0.5))
    assert np.abs(without - with_labels).min() > 1e-3
    for scale, expected in ((0.0, without), (1.0, with_labels)):
        actual = numpy(ClassifierFreeGuidance(denoiser, LABELS, scale)(x_t, 0.5))
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_every_row_has_its_own_scale_and_label(denoiser, x_t):
    scales = np.linspace(0.0, 5.0, 6).astype("float32")
    together = numpy(ClassifierFreeGuidance(denoiser, LABELS, scales)(x_t, 0.5))
    for i, (label, scale) in enumerate(zip(LABELS, scales)):
        alone = ClassifierFreeGuidance(denoiser, int(label), float(scale))(x_t[i : i + 1], 0.5)
        np.testing.assert_allclose(numpy(alone)[0], together[i], atol=1e-5)


def test_a_step_costs_one_call_and_the_null_label_is_asked(denoiser, x_t):
    times = np.linspace(0.1, 0.9, 6).astype("float32")
    ClassifierFreeGuidance(denoiser, LABELS, 3.0)(x_t, times)
    (call,) = denoiser.network.calls
    np.testing.assert_array_equal(call["label"], [*LABELS, *[CLASSES] * 6])
    np.testing.assert_allclose(call["x"][:6], call["x"][6:], rtol=1e-6)
    np.testing.assert_allclose(call["time"], np.tile(times * 1000 - 1, 2), rtol=1e-5)


def test_models_without_labels_cannot_be_guided():
    class Plain(Believer):
        num_classes = None

    with pytest.raises(ValueError, match=r"num_classes=None\. Make it with num_classes="):
        ClassifierFreeGuidance(NetworkDenoiser(Plain(0.5), PROCESS), 1, 2.0)


def test_a_guided_denoiser_keeps_process_latest_and_variables():
    network = networks.MLP(width=4, depth=1, num_classes=CLASSES)
    network.build({"x": (None, 2), "time": (None,), "label": (None,)})
    inner = NetworkDenoiser(network, "flow", "noise")
    guided = ClassifierFreeGuidance(inner, 1, 2.0)
    assert guided.process is inner.process and guided.latest == inner.latest < 1.0
    assert len(guided.variables) == len(network.variables) > 0


# Through the model.


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    model = DiffusionModel(networks.MLP(width=8, depth=1, num_classes=CLASSES), prediction="v")
    model.build((None, 2))
    rng = np.random.default_rng(0)
    for variable in model.network.weights:
        variable.assign(numpy(variable) + 0.3 * rng.normal(size=variable.shape))
    return model


REQUEST = {"steps": 4, "threshold": None}


def test_guidance_in_the_model(model):
    free = model.sample(3, **REQUEST)
    plain = model.sample(3, label=1, **REQUEST)
    assert np.abs(free - plain).min() > 1e-4
    np.testing.assert_allclose(model.sample(3, label=1, guidance=0, **REQUEST), free, atol=1e-5)
    np.testing.assert_allclose(model.sample(3, label=[1] * 3, guidance=1, **REQUEST), plain)
    scales = [0.0, 1.0, 3.0]
    mixed = model.sample(3, label=[1, 1, 2], guidance=scales, **REQUEST)
    np.testing.assert_allclose(mixed[0], free[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1], plain[1], atol=1e-5)
    alone = model.sample(1, label=2, guidance=3.0, seed=2, **REQUEST)
    np.testing.assert_allclose(mixed[2], alone[0], atol=1e-5)


def test_the_model_and_the_denoiser_sample_alike(model):
    """`model.sample` is `sample` of a guided denoiser, over batches of whatever size."""
    request = {**REQUEST, "sampler": "plms", "grid": "quadratic"}
    through_model = model.sample(5, label=1, guidance=2.0, seed=7, batch_size=2, **request)
    guided = ClassifierFreeGuidance(model.denoiser(), 1, 2.0)
    direct = sample(guided, range(7, 12), (2,), steps=4, sampler="plms", grid="quadratic")
    np.testing.assert_allclose(through_model, numpy(direct), atol=1e-5)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"guidance": 2.0}, r"guidance=2.0 needs a label to guide towards"),
        ({"label": CLASSES}, r"label must be integers from 0 to 2. Received 3"),
        ({"label": -1}, r"from 0 to 2. Received -1"),
        ({"label": 0.5}, r"from 0 to 2. Received 0.5"),
        ({"label": [0, 1]}, r"label must be one number or 3, one a row. Received shape \(2,\)"),
        ({"label": 1, "guidance": [1.0, 2.0]}, r"guidance must be one number or 3, one a row"),
        ({"num": 0}, r"num must be an integer >= 1. Received num=0"),
        ({"seeds": [1]}, r"seeds must be 3 integers. Received shape \(1,\)"),
        ({"batch_size": 0}, r"batch_size must be an integer >= 1. Received batch_size=0"),
        ({"threshold": "clp"}, r"Unknown threshold 'clp'. Did you mean 'clip'"),
        ({"steps": 1001}, r"steps=1001 exceeds the 1000 noise levels"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_met_are_refused(model, request_, message):
    with pytest.raises(ValueError, match=message):
        model.sample(**{"num": 3, "steps": 4, **request_})


def test_labels_are_not_for_unconditional_models():
    model = DiffusionModel(networks.MLP(width=4, depth=1))
    with pytest.raises(ValueError, match="no shape yet: call fit, or build"):
        model.sample(1)
    model.build((None, 2))
    with pytest.raises(ValueError, match="label=1 was asked of an unconditional model"):
        model.sample(1, label=1)
