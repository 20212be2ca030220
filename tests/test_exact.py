"""The exact denoiser against SciPy, quadrature, and finite differences."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
from oracles import DOUBLE, FLOAT, PUBLISHED, GaussianData, MixtureData, assert_close, numpy
from scipy import stats

from tfdiffusion import processes
from tfdiffusion.exact import GaussianMixture

MIXTURE = {
    "means": [[1.0, 0.0], [-1.0, 0.5], [0.3, -1.2]],
    "variances": [0.05, 0.3, 0.1],
    "weights": [1.0, 2.0, 3.0],
}
LINE = {"means": [[-1.0], [0.6]], "variances": [0.1, 0.3], "weights": [0.25, 0.75]}
CONTINUOUS = ["vp", "sub_vp", "ve", "flow", "edm", "continuous_cosine"]

every = pytest.mark.parametrize("name", ["linear", *CONTINUOUS])
continuous = pytest.mark.parametrize("name", CONTINUOUS)
TIMES = np.array([0.125, 0.25, 0.5, 0.75, 0.875])  # exact in float32, and steps of a chain


def noisy(name, data=MIXTURE, count=20, seed=0):
    """Points (N, D) of the marginals at TIMES, in turn, with their moments (N, 1)."""
    points, _ = GaussianMixture(**data).draw(count, seed)
    t = np.resize(TIMES, count)
    alpha, sigma = (m[:, None] for m in PUBLISHED[name](t))
    noise = np.random.default_rng(seed + 1).standard_normal(points.shape)
    return (alpha * points + sigma * noise).astype(FLOAT), t, alpha, sigma


# Density and score.


@every
def test_log_density_is_that_of_scipy(name):
    x_t, t, alpha, sigma = noisy(name)
    expected = MixtureData(**MIXTURE).log_density(x_t, alpha, sigma)
    exact = GaussianMixture(**MIXTURE, process=name)
    assert_close(exact.log_density(x_t, t), expected, double=1e-7)
    one = exact.log_density(x_t, t[3])
    assert float(one[3]) == pytest.approx(expected[3], rel=1e-4)


@every
def test_score_is_the_gradient_of_the_density(name):
    x_t, t, alpha, sigma = noisy(name)
    expected = MixtureData(**MIXTURE).score(x_t, alpha, sigma)
    exact = GaussianMixture(**MIXTURE, process=name)
    assert_close(exact.score(x_t, t), expected, double=1e-6, single=1e-3)
    np.testing.assert_allclose(numpy(exact.score(x_t, t[3]))[3], expected[3], rtol=1e-3)


def test_score_at_the_data_is_the_data_s():
    x, _, _, _ = noisy("vp")
    expected = MixtureData(**MIXTURE).score(x, 1.0, 0.0)
    exact = GaussianMixture(**MIXTURE, process="vp")
    assert_close(exact.score(x, 0.0), expected, double=1e-5, single=1e-3)
    assert_close(exact(x, 0.0), x, double=1e-6)


def test_score_of_far_apart_modes_forgets_their_weights():
    # Oracle 28: why Langevin dynamics gets the modes' weights wrong.
    x = np.r_[np.linspace(-11.0, -9.0, 10), np.linspace(9.0, 11.0, 10)][:, None].astype(FLOAT)
    mixtures = [GaussianMixture([[-10.0], [10.0]], 1.0, w, "ve") for w in ([1, 4], [4, 1])]
    apart, overlapping = (
        [numpy(mixture.score(x, np.full((20,), t))) for mixture in mixtures] for t in (0.01, 0.9)
    )
    np.testing.assert_allclose(*apart, rtol=1e-5, atol=1e-6)
    assert np.abs(overlapping[0] - overlapping[1]).min() > 1e-3


# The denoiser.


@every
def test_tweedie(name):
    # E[x_0 | x_t] = (x_t + σ² ∇ log q)/α (oracle 24), with the gradient of SciPy's density.
    x_t, t, alpha, sigma = noisy(name)
    score = MixtureData(**MIXTURE).score(x_t, alpha, sigma)
    denoised = GaussianMixture(**MIXTURE, process=name)(x_t, t)
    scale = np.maximum(1.0, sigma**2 / alpha)  # which the error of the differences grows by
    np.testing.assert_allclose(
        numpy(denoised) / scale,
        (x_t + sigma**2 * score) / alpha / scale,
        atol=1e-6 if DOUBLE else 1e-4,
    )


@every
def test_denoiser_is_the_posterior_mean_by_quadrature(name):
    x_t, t, alpha, sigma = noisy(name, LINE)
    expected, _ = MixtureData(**LINE).posterior_moments(x_t, alpha, sigma)
    denoised = GaussianMixture(**LINE, process=name)(x_t, t)
    assert_close(denoised, expected, double=1e-6, single=1e-4)


@continuous
def test_slope_of_the_denoiser_is_the_posterior_variance(name):
    # Second-order Tweedie (oracle 24): Var[x_0 | x_t] = σ²/α dE[x_0 | x_t]/dx_t.
    x_t, t, alpha, sigma = noisy(name, LINE)
    _, expected = MixtureData(**LINE).posterior_moments(x_t, alpha, sigma)
    h = (1e-5 if DOUBLE else 1e-2) * np.maximum(sigma, 0.1)
    exact = GaussianMixture(**LINE, process=name)
    up, down = (numpy(exact((x_t + d * h), t)).astype("float64") for d in (1, -1))
    variance = (up - down) / (2 * h) * sigma**2 / alpha
    assert_close(variance, expected, double=1e-5, single=2e-2)


@every
def test_one_gaussian(name):
    # Oracle 1, for any process.
    x_t, t, alpha, sigma = noisy(name, {"means": [[0.4]], "variances": 0.25})
    data = GaussianData(0.4, 0.25)
    exact = GaussianMixture([[0.4]], 0.25, process=name)
    assert_close(exact(x_t, t), data.clean(x_t, alpha, sigma), single=2e-4)
    assert_close(exact.noise(x_t, t), data.noise(x_t, alpha, sigma), double=1e-7, single=2e-3)
    assert_close(exact.score(x_t, t), data.score(x_t, alpha, sigma), single=2e-4)


def test_score_and_noise_of_any_denoiser_agree_with_the_exact_score():
    # What the base class derives from x̂_0, and the closed form.
    x_t, t, _, sigma = noisy("vp")
    exact = GaussianMixture(**MIXTURE, process="vp")
    score = numpy(exact.score(x_t, t))
    assert_close(super(GaussianMixture, exact).score(x_t, t), score, double=1e-7, single=1e-3)
    assert_close(exact.noise(x_t, t), -sigma * score, double=1e-7, single=1e-3)


def test_rescaling_leaves_the_denoised_point():
    # Oracle 17: x/α on an exploding process at the level σ/α holds what x holds here.
    edm = processes.get("edm")
    for name in ("vp", "sub_vp", "flow", "linear"):
        x_t, t, alpha, _ = noisy(name)
        same = edm.inverse_log_snr(processes.get(name).log_snr(t))
        here = GaussianMixture(**MIXTURE, process=name)(x_t, t)
        there = GaussianMixture(**MIXTURE, process=edm)((x_t / alpha), same)
        assert_close(there, numpy(here), double=1e-6, single=5e-3)


def test_points_without_variance():
    # The denoiser of a training set: a softmax over its points (Karras et al. 2022, app. B.3).
    points = np.array(MIXTURE["means"])
    x_t, t = np.random.default_rng(1).normal(size=(20, 2)), np.full((20,), 0.3)
    alpha, sigma = PUBLISHED["vp"](0.3)
    distance = ((x_t[:, None] - alpha * points) ** 2).sum(-1)
    share = np.exp(-distance / (2 * sigma**2))
    expected = share @ points / share.sum(-1, keepdims=True)
    assert_close(GaussianMixture(points, 0.0, process="vp")(x_t, t), expected, single=1e-4)


def test_far_away_points_stay_finite():
    exact = GaussianMixture(**MIXTURE, process="vp")
    x_t, t = np.full((20, 2), [300.0, -300.0], FLOAT), np.linspace(1e-5, 1.0, 20)
    for f in (exact, exact.score, exact.log_density, exact.noise):
        assert np.isfinite(numpy(f(x_t, t))).all()


# What training on noise can and cannot reach (oracles 2 and 3).


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_no_correction_of_the_exact_noise_lowers_the_loss(name):
    # ε̂ = E[ε | x_t] leaves an error orthogonal to every function of x_t.
    count, t = 200000, 0.3
    exact = GaussianMixture(**LINE, process=name)
    x_0, _ = exact.draw(count)
    noise = np.random.default_rng(1).standard_normal(x_0.shape)
    alpha, sigma = PUBLISHED[name](t)
    x_t = alpha * x_0 + sigma * noise
    error = noise - numpy(exact.noise(x_t.astype(FLOAT), t))
    unit = x_t / x_t.std()
    for function in (np.ones_like, lambda x: x, np.sin, np.cos, np.abs):
        product = error * function(unit)
        assert abs(product.mean()) < 4 * product.std() / np.sqrt(count)


def test_floors_of_the_losses():
    # On N(0, v) the noise loss ends at ᾱ v/V, denoising score matching at v/(2σ²(v + σ²)).
    v, count = 0.5, 200000
    generator = np.random.default_rng(0)
    x_0, noise = (
        np.sqrt(v) * generator.standard_normal((count, 1)),
        generator.standard_normal((count, 1)),
    )
    tolerance = 4 * np.sqrt(2 / count)
    alpha, sigma = PUBLISHED["vp"](0.3)
    x_t = alpha * x_0 + sigma * noise
    exact = GaussianMixture([[0.0]], v, process="vp")
    loss = np.mean((numpy(exact.noise(x_t.astype(FLOAT), 0.3)) - noise) ** 2)
    assert loss == pytest.approx(alpha**2 * v / (alpha**2 * v + sigma**2), rel=tolerance)
    sigma = PUBLISHED["ve"](0.5)[1]
    x_t = x_0 + sigma * noise
    exact = GaussianMixture([[0.0]], v, process="ve")
    loss = 0.5 * np.mean((numpy(exact.score(x_t.astype(FLOAT), 0.5)) + noise / sigma) ** 2)
    assert loss == pytest.approx(v / (2 * sigma**2 * (v + sigma**2)), rel=tolerance)


# The probability flow.


@continuous
def test_velocity_follows_the_flow_of_a_gaussian(name):
    # x_s = α_s μ + (x_t − α_t μ) √(V_s/V_t) (oracle 15), differentiated at s = t.
    x_t, t, alpha, sigma = noisy(name, {"means": [[0.4]], "variances": 0.25})
    data = GaussianData(0.4, 0.25)

    def where(s):
        return data.flow(x_t, (alpha, sigma), tuple(m[:, None] for m in PUBLISHED[name](s)))

    expected = (where(t + 1e-6) - where(t - 1e-6)) / 2e-6
    velocity = GaussianMixture([[0.4]], 0.25, process=name).velocity(x_t, t)
    assert_close(velocity, expected, double=1e-6, single=2e-3)


@continuous
def test_velocity_keeps_the_quantiles_of_a_mixture(name):
    # In one dimension the flow keeps F_t(x_t): dx/dt = −(∂F/∂t)/q.
    x_t, t, *moments = noisy(name, LINE)
    data, h = MixtureData(**LINE), 1e-5
    after, before = ([m[:, None] for m in PUBLISHED[name](t + d)] for d in (h, -h))
    change = (data.distribution(x_t, *after) - data.distribution(x_t, *before)) / (2 * h)
    expected = -change / np.exp(data.log_density(x_t, *moments))[:, None]
    velocity = GaussianMixture(**LINE, process=name).velocity(x_t, t)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        numpy(velocity) / scale, expected / scale, atol=1e-5 if DOUBLE else 1e-3
    )


def test_velocity_of_rectified_flow_up_to_its_ends():
    # Oracle 26 counts time from noise (0) to data (1): μ + (t s² − (1 − t))/V (x − t μ).
    mean, spread = 0.7, 0.4
    t = np.resize([0.02, 0.3, 0.7, 0.99, 1.0], 20)
    x = np.linspace(-1.5, 1.5, 20)
    u = 1 - t
    slope = (u * spread**2 - (1 - u)) / ((1 - u) ** 2 + (u * spread) ** 2)
    expected = -(mean + slope * (x - u * mean))
    exact = GaussianMixture([[mean]], spread**2, process="flow")
    velocity = exact.velocity(x[:, None].astype(FLOAT), t)
    assert_close(velocity, expected[:, None], double=1e-9, single=1e-4)


@continuous
def test_velocity_is_drift_and_score(name):
    # Song et al. 2021, eq. 13: f x − ½ g² ∇ log q, with f and g from the published moments.
    x_t, t, _, sigma = noisy(name)
    exact = GaussianMixture(**MIXTURE, process=name)

    def slope(k, function):
        return oracles.slope(lambda u: function(PUBLISHED[name](u)[k]), t)[:, None]

    f = slope(0, np.log)
    g_squared = slope(1, np.square) - 2 * f * sigma**2
    expected = f * x_t - 0.5 * g_squared * numpy(exact.score(x_t, t))
    assert_close(exact.velocity(x_t, t), expected, double=1e-5, single=2e-3)


def test_velocity_on_a_chain_points_to_the_step_before():
    # One Euler step of the flow from i to i − 1 is one DDIM step.
    x_t, t, *_ = noisy("linear")
    before = [m[:, None] for m in PUBLISHED["linear"](t - 1e-3)]
    exact = GaussianMixture(**MIXTURE, process="linear")
    ddim = before[0] * numpy(exact(x_t, t)) + before[1] * numpy(exact.noise(x_t, t))
    assert_close(x_t - 1e-3 * numpy(exact.velocity(x_t, t)), ddim, double=1e-7, single=1e-5)


@every
def test_a_deterministic_step_scales_a_gaussian(name):
    # Oracle 14: x_s = α_s x̂_0 + σ_s ε̂.
    x_t, t, *moments_t = noisy(name, {"means": [[0.0]], "variances": 0.25})
    s = t - 0.1
    moments_s = [m[:, None] for m in PUBLISHED[name](s)]
    exact = GaussianMixture([[0.0]], 0.25, process=name)
    x_s = moments_s[0] * numpy(exact(x_t, t)) + moments_s[1] * numpy(exact.noise(x_t, t))
    expected = GaussianData(0.0, 0.25).ddim_factor(moments_t, moments_s) * x_t
    assert_close(x_s, expected, double=1e-7, single=1e-3)


@every
def test_exact_end_of_the_flow(name):
    # Where noise is left at t = 0, so is some spread (ve, edm, continuous_cosine).
    for variance in (0.25, 1e-6):
        data = GaussianData(np.array([0.5, -0.2]), variance)
        ends = [PUBLISHED[name](t) for t in (1.0, 0.0)]
        x_1 = ends[0][1] * np.random.default_rng(0).standard_normal((20, 2))
        exact = GaussianMixture([[0.5, -0.2]], variance, process=name)
        x_0 = exact.sample_exact(x_1)
        assert_close(x_0, data.flow(x_1, *ends), double=1e-7, single=1e-4)


# Data and errors.


def test_draws_follow_the_mixture():
    points, component = GaussianMixture(**MIXTURE).draw(60000, seed=3)
    assert points.dtype == np.float32 and component.dtype == np.int32
    share = np.array(MIXTURE["weights"]) / 6
    assert stats.chisquare(np.bincount(component), share * 60000).pvalue > 1e-3
    for k in range(3):
        standard = (points[component == k] - MIXTURE["means"][k]) / np.sqrt(MIXTURE["variances"][k])
        assert stats.kstest(standard.ravel(), "norm").pvalue > 1e-3
    again, _ = GaussianMixture(**MIXTURE).draw(60000, seed=3)
    other, _ = GaussianMixture(**MIXTURE).draw(60000, seed=4)
    np.testing.assert_array_equal(points, again)
    assert (points != other).any()


@pytest.mark.parametrize(
    "arguments, match",
    [
        (([1.0, 2.0],), r"means must be numbers \(K, D\)"),
        (([[0.0], [1.0]], [1.0, -1.0]), "variances >= 0"),
        (([[0.0], [1.0]], 1.0, [1.0]), "2 means need as many positive weights"),
        (([[0.0], [1.0]], 1.0, [1.0, 0.0]), "positive weights"),
        (([[0.0]], 1.0, None, "vq"), "Unknown process 'vq'"),
    ],
)
def test_errors(arguments, match):
    with pytest.raises(ValueError, match=match):
        GaussianMixture(*arguments)


def test_the_flow_of_a_mixture_has_no_closed_form():
    with pytest.raises(ValueError, match="this one has 3 components"):
        GaussianMixture(**MIXTURE).sample_exact(np.zeros((1, 2)))
