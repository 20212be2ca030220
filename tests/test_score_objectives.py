"""Score-matching objectives against closed forms: linear scores, Gaussians, mixtures."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
from keras import ops
from oracles import MixtureData, numpy

from tfdiffusion import _backend, random
from tfdiffusion.score_matching import ScoreMLP, objectives

DRAWS = 20000


def keys(num, seed=0):
    return random.keys(np.arange(num) + 10**6 * seed)


def linear(matrix, offset=0.0):
    """s(x) = A x + b, whose Jacobian is A."""
    matrix = np.asarray(matrix, "float32")
    return lambda x: x @ ops.convert_to_tensor(matrix.T) + offset


def symmetric(size, seed=0):
    a = np.random.default_rng(seed).normal(size=(size, size))
    return (a + a.T) / 2


def mean_and_error(values):
    """Mean of draws and its standard error."""
    values = numpy(values).astype("float64")
    return values.mean(), values.std() / np.sqrt(len(values))


# The trace.


def test_implicit_has_the_exact_trace():
    a = np.random.default_rng(0).normal(size=(3, 3))  # not symmetric
    x = np.random.default_rng(1).normal(size=(5, 3)).astype("float32")
    s = x @ a.T + 0.5
    expected = 0.5 * (s**2).sum(-1) + np.trace(a)
    np.testing.assert_allclose(numpy(objectives.implicit(linear(a, 0.5), x)), expected, rtol=1e-5)


def test_the_jacobian_trace_of_a_curved_field():
    x = np.random.default_rng(1).normal(size=(6, 3)).astype("float32")
    value, trace = _backend.jacobian_trace(lambda x: ops.sin(x) * ops.sum(x, -1, keepdims=True), x)
    np.testing.assert_allclose(numpy(value), np.sin(x) * x.sum(-1, keepdims=True), atol=1e-5)
    expected = (np.cos(x) * x.sum(-1, keepdims=True) + np.sin(x)).sum(-1)
    np.testing.assert_allclose(numpy(trace), expected, atol=1e-5)


def test_examples_of_any_shape():
    x = np.random.default_rng(0).normal(size=(4, 2, 3, 1)).astype("float32")
    flat, score = x.reshape(4, 6), linear(symmetric(6))

    def shaped(x):
        return ops.reshape(score(ops.reshape(x, (-1, 6))), ops.shape(x))

    k = keys(4)
    for objective in (
        objectives.implicit,
        lambda s, x: objectives.sliced(s, x, k),
        lambda s, x: objectives.finite_difference_sliced(s, x, k),
        lambda s, x: objectives.denoising(s, x, k, 0.3),
        lambda s, x: objectives.explicit(s, x, x),
    ):
        images, points = objective(shaped, x), objective(score, flat)
        assert tuple(images.shape) == (4,)
        np.testing.assert_allclose(numpy(images), numpy(points), rtol=2e-4)


@pytest.mark.parametrize("projection", ["gaussian", "rademacher", "sphere"])
def test_projections_have_unit_covariance(projection):
    """On the unit sphere it would be I/D: the trace would count a D-th of what the norm does."""
    v = numpy(objectives.project(keys(DRAWS), (5,), projection)).astype("float64")
    np.testing.assert_allclose(v.T @ v / DRAWS, np.eye(5), atol=5 * np.sqrt(2 / DRAWS))
    if projection != "gaussian":
        np.testing.assert_allclose((v**2).sum(-1), 5.0, rtol=1e-4)


def variance_of_the_trace(projection, a):
    """Var vᵀAv for symmetric A."""
    size, squares = len(a), (a**2).sum()
    if projection == "gaussian":
        return 2 * squares
    if projection == "rademacher":
        return 2 * (squares - (np.diag(a) ** 2).sum())
    # E (uᵀAu)² on the unit sphere is (2 tr A² + (tr A)²)/(D (D + 2)); v = √D u.
    return 2 * size / (size + 2) * (squares - np.trace(a) ** 2 / size)


@pytest.mark.parametrize("projection", ["gaussian", "rademacher", "sphere"])
def test_sliced_equals_implicit_with_the_predicted_variance(projection):
    a = symmetric(4)
    x = np.full((1, 4), 2.0, "float32")  # where the norm is as large as the trace
    expected = float(numpy(objectives.implicit(linear(a), x))[0])
    many = np.repeat(x, DRAWS, axis=0)
    for variance_reduced in (True, False):
        losses = objectives.sliced(
            linear(a),
            many,
            keys(DRAWS),
            projection=projection,
            variance_reduced=variance_reduced,
        )
        mean, error = mean_and_error(losses)
        assert abs(mean - expected) < 5 * error
        if variance_reduced:  # the norm is exact, so only the trace varies
            expected_variance = variance_of_the_trace(projection, a)
            assert numpy(losses).var() == pytest.approx(expected_variance, rel=0.1)
        else:
            assert numpy(losses).var() > 1.5 * variance_of_the_trace(projection, a)


def test_more_projections_less_variance():
    x = np.zeros((4000, 3), "float32")
    a = symmetric(3)
    one = numpy(objectives.sliced(linear(a), x, keys(4000))).var()
    four = numpy(objectives.sliced(linear(a), x, keys(4000), num_projections=4)).var()
    assert four == pytest.approx(one / 4, rel=0.2)


def test_finite_differences_approach_the_derivative_quadratically():
    x = np.random.default_rng(0).normal(size=(64, 2)).astype("float32")

    def score(x):
        return ops.sin(2.0 * x) + ops.sum(x, -1, keepdims=True) ** 2

    k = keys(64)
    exact = objectives.sliced(score, x, k, variance_reduced=False)
    errors = [
        np.abs(numpy(objectives.finite_difference_sliced(score, x, k, step=step) - exact)).mean()
        for step in (0.2, 0.1)
    ]
    assert 3.5 < errors[0] / errors[1] < 4.5


# Optima.


def gaussian(num, size=2, seed=0):
    """Correlated points, and their own mean and covariance."""
    rng = np.random.default_rng(seed)
    factor = np.array([[1.0, 0.0], [0.6, 0.5]]) if size == 2 else np.eye(size)
    x = (rng.normal(size=(num, size)) @ factor.T + 0.7).astype("float32")
    return x, x.mean(0), np.cov(x.T, bias=True).reshape(size, size)


def test_implicit_at_its_optimum_is_negative():
    """E[½‖s‖² + tr ∇s] = −D/(2v) on N(0, v)."""
    v, x = 0.5, np.random.default_rng(0).normal(size=(DRAWS, 3)).astype("float32")
    mean, error = mean_and_error(objectives.implicit(lambda x: -x / v, np.sqrt(v) * x))
    assert abs(mean + 3 / (2 * v)) < 5 * error


def fitted_linear(objective, steps=400, rate=0.15):
    """θ = (W, b) of s(x) = W x + b after gradient descent on a mean loss."""

    def mean_loss(theta):
        w, b = ops.reshape(theta[0, :4], (2, 2)), theta[0, 4:]
        return ops.mean(objective(lambda x: x @ ops.transpose(w) + b))[None]

    def run(theta):
        for _ in range(20):
            theta = theta - rate * _backend.vjp(mean_loss, theta)[1]
        return theta

    run = _backend.compiled(run, ())
    theta = ops.zeros((1, 6))
    for _ in range(steps // 20):
        theta = run(theta)
    theta = numpy(theta)[0]
    return theta[:4].reshape(2, 2), theta[4:]


NUM = 2000


@pytest.mark.parametrize("name", ["explicit", "implicit", "sliced", "finite", "denoising"])
def test_the_learned_linear_score_is_that_of_the_gaussian(name):
    """W = −Σ⁻¹, b = Σ⁻¹μ with the points' own moments: exactly, or up to the projections' error."""
    x, mean, covariance = gaussian(NUM)
    inverse = np.linalg.inv(covariance)
    k, sigma, tolerance = keys(NUM), 0.5, 2e-3
    if name == "explicit":
        true = (-(x - mean) @ inverse.T).astype("float32")
        w, b = fitted_linear(lambda s: objectives.explicit(s, x, true))
    elif name == "implicit":
        w, b = fitted_linear(lambda s: objectives.implicit(s, x))
    elif name == "sliced":
        # Σ_n vvᵀ/N stands where I should: −M Σ⁻¹ is the optimum for these very projections.
        v = numpy(objectives.project(random.fold_in(k, 1), (2,))).astype("float64")
        inverse = v.T @ v / NUM @ inverse
        w, b = fitted_linear(lambda s: objectives.sliced(s, x, k))
        assert np.abs(v.T @ v / NUM - np.eye(2)).max() < 4 / np.sqrt(NUM)
    elif name == "finite":
        tolerance = 5 * np.abs(inverse).max() / np.sqrt(NUM)
        w, b = fitted_linear(lambda s: objectives.finite_difference_sliced(s, x, k, step=0.1))
    else:
        # The score of the smoothed data; the noise's own moments are off by O(1/√N).
        inverse = np.linalg.inv(covariance + sigma**2 * np.eye(2))
        tolerance = 5 / sigma * np.abs(inverse).max() / np.sqrt(NUM)
        w, b = fitted_linear(lambda s: objectives.denoising(s, x, k, sigma))
    np.testing.assert_allclose(w, -inverse, atol=tolerance)
    np.testing.assert_allclose(b, inverse @ mean, atol=2 * tolerance)


MIXTURE = MixtureData([[-1.0, 0.0], [1.0, 0.5]], [0.05, 0.1], [1, 3])


def mixture_score(variances):
    """The score of the mixture with these component variances, in keras.ops."""
    means = ops.convert_to_tensor(MIXTURE.means.astype("float32"))
    variances = ops.convert_to_tensor(np.asarray(variances, "float32"))
    log_weights = ops.convert_to_tensor(np.log(MIXTURE.weights).astype("float32"))

    def score(x):
        offset = x[:, None] - means  # (B, K, D)
        logs = log_weights - 0.5 * ops.sum(offset**2, -1) / variances - ops.log(variances)
        share = ops.softmax(logs, axis=-1)
        return -ops.sum((share / variances)[..., None] * offset, axis=1)

    return score


def draw_mixture(num, seed=0):
    rng = np.random.default_rng(seed)
    component = rng.choice(2, size=num, p=MIXTURE.weights)
    spread = np.sqrt(MIXTURE.variances[component])[:, None]
    return (MIXTURE.means[component] + spread * rng.normal(size=(num, 2))).astype("float32")


def test_denoising_learns_the_score_of_the_smoothed_density():
    """For any s, DSM(s) − DSM(∇log q_σ) = ½E‖s − ∇log q_σ‖²: the minimum is not ∇log p."""
    sigma, x, k = 0.4, draw_mixture(DRAWS), keys(DRAWS)
    smoothed = mixture_score(MIXTURE.variances + sigma**2)
    noisy = numpy(x + sigma * objectives.noise_for(x, k))
    oracle = MIXTURE.score(noisy[:50].astype("float64"), 1.0, sigma)
    np.testing.assert_allclose(numpy(smoothed(noisy[:50])), oracle, atol=1e-3)
    best = objectives.denoising(smoothed, x, k, sigma)
    data_score = mixture_score(MIXTURE.variances)
    for other in (data_score, lambda x: 0.8 * smoothed(x) + 0.2):
        difference = objectives.denoising(other, x, k, sigma) - best
        distance = 0.5 * np.sum((numpy(other(noisy)) - numpy(smoothed(noisy))) ** 2, -1)
        mean, error = mean_and_error(difference - distance)
        assert abs(mean) < 5 * error
        assert mean_and_error(difference)[0] > 20 * error


def test_denoising_differs_from_explicit_by_vincents_constant():
    """DSM − ESM = v/(2σ²(v + σ²)) a dimension on N(0, v), whatever the score."""
    v, sigma, size = 0.8, 0.5, 3
    x = np.sqrt(v) * np.random.default_rng(0).normal(size=(DRAWS, size)).astype("float32")
    k = keys(DRAWS)
    noisy = x + sigma * objectives.noise_for(x, k)
    true = -noisy / (v + sigma**2)
    constant = size * v / (2 * sigma**2 * (v + sigma**2))
    for score in (lambda x: -x / (v + sigma**2), lambda x: 0.3 * x + 1.0):
        gap = objectives.denoising(score, x, k, sigma) - objectives.explicit(score, noisy, true)
        mean, error = mean_and_error(gap)
        assert abs(mean - constant) < 5 * error


def test_levels_weigh_by_their_variance():
    x, k = draw_mixture(64), keys(64)
    sigma = np.linspace(0.1, 3.0, 64).astype("float32")
    plain = numpy(objectives.denoising(lambda x: -x, x, k, sigma))
    levels = numpy(objectives.multi_level_denoising(lambda x: -x, x, k, sigma))
    np.testing.assert_allclose(levels, sigma**2 * plain, rtol=1e-3)
    # Without a network the loss is D/2 on average at every level: ½‖z‖².
    nothing = objectives.multi_level_denoising(
        lambda x: 0.0 * x, draw_mixture(DRAWS), keys(DRAWS), 2.0
    )
    mean, error = mean_and_error(nothing)
    assert abs(mean - 1.0) < 5 * error


def test_the_noise_is_standard_normal():
    z = numpy(objectives.noise_for(np.zeros((DRAWS, 2), "float32"), keys(DRAWS)))
    assert abs(z.mean()) < 5 / np.sqrt(2 * DRAWS)
    assert z.var() == pytest.approx(1.0, abs=5 * np.sqrt(1 / DRAWS))


# Energies.


def jacobian(score, x):
    columns = [
        numpy(_backend.vjp(score, x, np.repeat(unit[None], len(x), 0))[1])
        for unit in np.eye(x.shape[-1], dtype="float32")
    ]
    return np.stack(columns, axis=1)


def test_the_score_of_an_energy():
    x = draw_mixture(8)
    score = objectives.from_energy(lambda x: 0.5 * ops.sum(x**2, -1) / 0.3)
    np.testing.assert_allclose(numpy(score(x)), -x / 0.3, rtol=1e-5)
    # It is differentiable once more, as the objectives need: E[½‖s‖² + tr ∇s].
    expected = 0.5 * ((x / 0.3) ** 2).sum(-1) - 2 / 0.3
    np.testing.assert_allclose(numpy(objectives.implicit(score, x)), expected, rtol=1e-4)


@pytest.mark.parametrize("energy", [True, False])
def test_a_learned_energy_has_no_curl_and_a_learned_score_has(energy):
    x = draw_mixture(8)
    network = ScoreMLP([1.0, 0.5], width=16, depth=1, energy=energy)
    network.build({"x": (None, 2), "time": (None,)})
    rng = np.random.default_rng(0)
    for variable in network.trainable_variables:
        variable.assign(0.5 * rng.normal(size=variable.shape))
    level = np.ones(8, "float32")
    slopes = jacobian(lambda x: network({"x": x, "time": level}), x)
    curl = np.abs(slopes[:, 0, 1] - slopes[:, 1, 0]).max()
    assert np.abs(slopes).max() > 0.1
    assert (curl < 1e-4) == energy
    if energy:
        step = np.array([[1e-2, 0]], "float32")
        up, down = (network.energy({"x": x + d * step, "time": level}) for d in (1, -1))
        score = numpy(network({"x": x, "time": level}))[:, 0]
        np.testing.assert_allclose(score, -numpy(up - down) / 2e-2, atol=2e-2)


# What cannot be.


def with_activation(activation):
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(4, activation=activation)])
    network.add(keras.layers.Dense(2))
    return network


def test_vacuous_networks_are_warned_about():
    for activation in ("relu", "leaky_relu", keras.layers.ReLU()):
        with pytest.warns(UserWarning, match="second derivative is zero"):
            objectives.warn_if_vacuous(with_activation(activation))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objectives.warn_if_vacuous(with_activation("elu"))
        objectives.warn_if_vacuous(with_activation("silu"))


def test_what_vacuous_means():
    """Behind a ReLU the trace does not depend on the bias at all; behind softplus it does."""
    x = draw_mixture(16)
    w = np.random.default_rng(0).normal(size=(2, 2, 4)).astype("float32")

    def gradient(activation):
        def trace(bias):
            def score(x):
                return activation(x @ w[0] + bias) @ ops.transpose(ops.convert_to_tensor(w[1]))

            return ops.mean(_backend.jacobian_trace(score, x)[1])[None]

        return np.abs(numpy(_backend.vjp(trace, 0.1 * np.ones((1, 4), "float32"))[1])).max()

    assert gradient(ops.relu) == 0.0
    assert gradient(ops.softplus) > 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, x, k: objectives.implicit(s, x[:, 0]), "shape"),
        (lambda s, x, k: objectives.implicit(s, np.zeros((4, 2), "int32")), "float"),
        (lambda s, x, k: objectives.explicit(s, x, x[:, 0]), "true_score must have the shape"),
        (lambda s, x, k: objectives.implicit(lambda x: x[:, :1], x), "shape of its argument"),
        (lambda s, x, k: objectives.sliced(lambda x: x[:, 0], x, k), "shape of its argument"),
        (lambda s, x, k: objectives.denoising(lambda x: x[:, 0], x, k, 0.1), "shape of its"),
        (lambda s, x, k: objectives.denoising(s, x, k, -0.1), "sigma must be positive"),
        (lambda s, x, k: objectives.sliced(s, x, k, projection="cube"), "projection"),
        (lambda s, x, k: objectives.sliced(s, x, k, num_projections=0), "num_projections"),
        (lambda s, x, k: objectives.finite_difference_sliced(s, x, k, step=0), "step must be"),
        (
            lambda s, x, k: ScoreMLP([1.0, 0.5]).energy({"x": x, "time": x[:, 0]}),
            "so it has no energy",
        ),
    ],
)
def test_errors(call, message):
    x = np.zeros((4, 2), "float32")
    with pytest.raises(ValueError, match=message):
        call(lambda x: -x, x, keys(4))
