"""Bound and likelihood against closed forms: what theory says in nats has to come out."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
from keras import ops
from oracles import DOUBLE, FLOAT, PUBLISHED, GaussianData, MixtureData, numpy
from scipy import stats

from tfdiffusion import DiffusionModel, exact, likelihood, networks, processes
from tfdiffusion.callbacks import BitsPerDimension
from tfdiffusion.denoiser import Clipped, Denoiser, NetworkDenoiser
from tfdiffusion.likelihood import Pixels, levels
from tfdiffusion.likelihood.bound import decoder_term, log_variances, prior_term, step_term

LN2 = math.log(2.0)


def gaussian(variance, process):
    return exact.GaussianMixture([[0.0]], variance, process=process)


def corners(variance, times):
    """Gauss-Hermite nodes of (x_0, ε) at each time: they average any quadratic form exactly."""
    x_0 = np.tile(np.sqrt(variance) * np.array([1, 1, -1, -1]), len(times))[:, None]
    noise = np.tile([1.0, -1.0, 1.0, -1.0], len(times))[:, None]
    return x_0.astype(FLOAT), noise.astype(FLOAT), np.repeat(times, 4)


def exact_terms(denoiser, variance, times, kind):
    """E of the KL terms, least noise first, and of the decoder's: float64 where there is."""
    floor = float(numpy(log_variances(denoiser.process, times[1], times[0], 0.0)[1]))
    x_0, noise, t = corners(variance, times[1:])
    s = np.repeat(times[:-1], 4)
    nats, _ = step_term(denoiser, x_0, noise, t.astype(FLOAT), s.astype(FLOAT), kind)
    x_0, noise, t = corners(variance, times[:1])
    last, _ = decoder_term(denoiser, x_0, noise, t.astype(FLOAT), kind, floor)
    return numpy(nats).reshape(-1, 4).mean(1), numpy(last).mean()


# The terms.


@pytest.mark.parametrize("mean", [-1.4, -1.0, -0.37, 0.002, 0.999])
def test_the_decoder_sums_to_one(mean):
    """Over the 256 values, from deviations far below a bin to far above the range."""
    pixels = Pixels()
    values = np.linspace(-1, 1, 256, dtype="float32")[:, None]
    deviations = np.array([1e-4, 1e-3, 0.0064, 0.05, 0.5, 20.0])
    logs = pixels.log_probability(
        values, np.float32(mean), np.float32(2 * np.log(deviations))[None, :]
    )
    np.testing.assert_allclose(np.exp(numpy(logs)).sum(0), 1.0, atol=3e-6)


def test_the_decoder_is_the_mass_of_the_bin_also_in_the_tails():
    pixels = Pixels(levels=17)
    values = np.linspace(-1, 1, 17)
    mean, deviation = 0.31, 0.06
    edges = np.r_[-np.inf, (values[1:] + values[:-1]) / 2, np.inf]
    upper = stats.norm(mean, deviation).logsf(edges)
    lower = stats.norm(mean, deviation).logcdf(edges)
    with np.errstate(divide="ignore"):  # in the tail that is not taken
        expected = np.where(
            values > mean,
            upper[:-1] + np.log1p(-np.exp(upper[1:] - upper[:-1])),
            lower[1:] + np.log1p(-np.exp(lower[:-1] - lower[1:])),
        )
    assert expected.min() < -200
    logs = pixels.log_probability(
        values.astype("float32"), np.float32(mean), np.float32(2 * np.log(deviation))
    )
    np.testing.assert_allclose(numpy(logs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", processes.names())
def test_the_prior_term(name):
    """KL(N(α x_0, σ²) ‖ N(0, α² + σ²))."""
    alpha, sigma = PUBLISHED[name](1.0)
    x_0 = np.array([[-0.7, 0.4], [1.0, 0.0]])
    expected = oracles.kl(alpha * x_0, sigma**2, 0.0, alpha**2 + sigma**2)
    terms = prior_term(exact.GaussianMixture([[0.0, 0.0]], process=name), x_0.astype(FLOAT))
    np.testing.assert_allclose(numpy(terms), expected, rtol=2e-3, atol=1e-7)


def test_the_prior_term_of_the_linear_chain():
    """Oracle 10: 7.3e-6 bits a dimension for data with mean square 1/4."""
    terms = prior_term(gaussian(0.25, "linear"), np.full((4, 1), 0.5, FLOAT))
    assert numpy(terms).mean() / LN2 == pytest.approx(7.3e-6, rel=0.01)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("name", ["linear", "vp", "sub_vp", "ve", "flow"])
def test_a_step_is_the_kl_of_two_gaussians(name, variance):
    t, s = 0.6, 0.4
    x_0, noise = np.array([[0.3], [-0.9]]), np.array([[1.2], [-0.4]])
    here, there = PUBLISHED[name](t), PUBLISHED[name](s)
    x_t = here[0] * x_0 + here[1] * noise
    guess = GaussianData(0.0, 0.5).clean(x_t, *here)
    mean_q, variance_q = oracles.posterior(here, there, x_0, x_t)
    mean_p, variance_p = oracles.posterior(here, there, guess, x_t)
    if variance == "beta":
        variance_p = here[1] ** 2 - (here[0] / there[0] * there[1]) ** 2
    at = (np.full(2, t, FLOAT), np.full(2, s, FLOAT))
    nats, error = step_term(
        gaussian(0.5, name), x_0.astype(FLOAT), noise.astype(FLOAT), *at, variance
    )
    expected = oracles.kl(mean_q, variance_q, mean_p, variance_p)
    np.testing.assert_allclose(numpy(nats), expected, rtol=1e-7 if DOUBLE else 2e-4)
    np.testing.assert_allclose(numpy(error), (guess - x_0) ** 2, rtol=1e-6 if DOUBLE else 1e-4)


@pytest.mark.parametrize("steps", [25, 100, 1000])
def test_the_bound_of_the_exact_reverse_chain_is_the_entropy(steps):
    """Oracle 12: no gap with the true reverse variance; σ² = β is exact for v = 1."""
    times = np.arange(1, steps + 1) / steps
    process = processes.LinearBeta(steps)
    alphas, sigmas = oracles.chain(betas(steps))(np.r_[0.0, times])
    for variance, kind, cost in (
        (0.25, "exact", 0.0),
        (1.0, "beta", 0.0),
        (0.25, "beta", {25: 0.0448, 100: 0.0110, 1000: 0.00109}[steps]),
    ):
        denoiser = gaussian(variance, process)
        spread = alphas**2 * variance + sigmas**2

        def reverse(x_t, t, s, spread=spread):
            """V_s σ²_{t|s} / V_t: conditioning x_s on x_t, for this Gaussian."""
            step = np.rint(numpy(t) * steps).astype(int)
            before = np.zeros_like(step) if s is None else np.rint(numpy(s) * steps).astype(int)
            added = sigmas[step] ** 2 - (alphas[step] / alphas[before] * sigmas[before]) ** 2
            return ops.convert_to_tensor((spread[before] * added / spread[step]).astype(FLOAT))

        nats, last = exact_terms(denoiser, variance, times, reverse if kind == "exact" else kind)
        entropy = 0.5 * np.log(2 * np.pi * np.e * variance)
        prior = oracles.kl(0.0, spread[-1], 0.0, 1.0)
        x_0, _, _ = corners(variance, times[-1:])
        total = numpy(prior_term(denoiser, x_0)).mean() + nats.sum() + last
        # KL(q(x_T | x_0) ‖ p) on average is KL(q(x_T) ‖ p) and the information that x_T has
        # of x_0, which the exact chain gets back.
        gap = total - entropy - prior
        if cost:
            assert gap == pytest.approx(cost, rel=0.006)
        else:
            assert abs(gap) < (1e-8 if DOUBLE else 2e-3)


def betas(steps):
    return np.linspace(1e-4, 0.02, steps) * 1000 / steps


class LinearLogSNR(processes.Process):
    """Variance preserving with λ falling in a straight line."""

    def __init__(self, first, last):
        self.first, self.last = first, last

    def log_snr(self, t):
        return self.first + ops.convert_to_tensor(t) * (self.last - self.first)

    def alpha(self, t):
        return ops.sqrt(ops.sigmoid(self.log_snr(t)))

    def sigma(self, t):
        return ops.sqrt(ops.sigmoid(-self.log_snr(t)))

    def get_config(self):
        return {"first": self.first, "last": self.last}


FIRST, LAST, VARIANCE = math.log(6800.0), -5.0, 0.25
CONTINUOUS = 0.5 * math.log((1 + VARIANCE * 6800) / (1 + VARIANCE * math.exp(-5)))


def test_the_discrete_bound_falls_to_the_continuous_one():
    """Oracle 21: 7.28, 3.95, 3.741 with 10, 100, 1000 steps, against 3.7186."""
    assert pytest.approx(3.7186, abs=1e-4) == CONTINUOUS
    denoiser = gaussian(VARIANCE, LinearLogSNR(FIRST, LAST))
    for steps, expected in ((10, 7.28), (100, 3.95), (1000, 3.741)):
        times = np.arange(steps + 1) / steps
        x_0, noise, t = corners(VARIANCE, times[1:])
        s = np.repeat(times[:-1], 4)
        nats, _ = step_term(denoiser, x_0, noise, t.astype(FLOAT), s.astype(FLOAT))
        assert numpy(nats).sum() / 4 == pytest.approx(expected, abs=6e-3 if steps < 1000 else 6e-4)


@pytest.mark.parametrize("schedule", ["straight", "cosine", "edm"])
def test_the_continuous_bound_is_the_same_for_every_schedule(schedule):
    """I-MMSE: ½ ∫ mmse dSNR depends on the ends alone."""
    process = {
        "straight": LinearLogSNR(FIRST, LAST),
        "cosine": processes.ContinuousCosine(LAST, FIRST),
        "edm": processes.EDM(math.exp(-FIRST / 2), math.exp(-LAST / 2)),
    }[schedule]
    denoiser = gaussian(VARIANCE, process)
    x_0 = denoiser.draw(3000)[0]
    result = likelihood.continuous_bound(denoiser, x_0, pixels=None, evaluations=8, batch_size=3000)
    nats = result.steps.sum(1) * LN2
    assert nats.mean() == pytest.approx(CONTINUOUS, abs=4 * nats.std() / np.sqrt(3000))
    # The decoder without a network costs the entropy of the noise at the first level.
    assert result.decoder.mean() * LN2 == pytest.approx(
        0.5 * np.log(2 * np.pi * np.e / 6800), abs=4 * np.sqrt(0.5 / 3000)
    )
    assert not result.complete and result.log_snr.min() >= LAST - 1e-5


def test_the_first_step_has_a_variance():
    """Pitfall 13: β̃_1 = 0; the decoder takes β̃_2."""
    denoiser = gaussian(0.3, processes.LinearBeta(50))
    x_0 = denoiser.draw(4)[0]
    result = likelihood.bound(denoiser, x_0, pixels=None, variance="posterior")
    assert np.isfinite(result.total).all()
    moments = oracles.chain(betas(50))
    _, second = oracles.posterior(moments(2 / 50), moments(1 / 50), 0.0, 0.0)
    floor = numpy(log_variances(denoiser.process, 2 / 50, 1 / 50, 0.0)[1])
    assert np.exp(floor) == pytest.approx(second, rel=1e-5)
    for s in (0.0, None):  # as a time of the chain, and as the decoder
        _, log_posterior = log_variances(denoiser.process, np.float32(1 / 50), s, floor)
        assert numpy(log_posterior) == pytest.approx(floor, rel=1e-6)


# The bound of images and points.


def test_a_subset_of_the_steps_is_unbiased():
    denoiser = gaussian(0.25, processes.LinearBeta(50))
    x_0 = np.full((1500, 1), 0.4, "float32")
    options = {"pixels": None, "batch_size": 1500, "variance": "beta"}
    whole = likelihood.bound(denoiser, x_0, **options)
    part = likelihood.bound(denoiser, x_0, evaluations=7, **options, seed=1)
    assert whole.complete and not part.complete
    assert whole.steps.shape == (1500, 49) and part.steps.shape == (1500, 7)
    error = math.hypot(whole.standard_error, part.standard_error)
    assert abs(whole.mean - part.mean) < 3 * error < 0.5


def test_a_strided_chain_is_a_chain():
    """Pitfall 12: the moments are those of the kept steps, so no bits are lost by an off-by-one."""
    denoiser, count = gaussian(0.25, "linear"), 4000
    alphas, sigmas = PUBLISHED["linear"](np.arange(1001) / 1000)
    spread = alphas**2 * 0.25 + sigmas**2

    def reverse(x_t, t, s):
        tables = [ops.convert_to_tensor(v.astype(FLOAT)) for v in (alphas, sigmas, spread)]
        index = [ops.cast(ops.round(i * 1000.0), "int32") for i in (t, 0.0 * t if s is None else s)]
        (a_t, a_s), (b_t, b_s), (v_t, v_s) = ([ops.take(v, i) for i in index] for v in tables)
        return v_s * (b_t**2 - (a_t / a_s * b_s) ** 2) / v_t

    x_0 = denoiser.draw(count)[0]
    result = likelihood.bound(
        denoiser, x_0, pixels=None, steps=7, variance=reverse, batch_size=count
    )
    np.testing.assert_allclose(result.times[0], np.rint(np.arange(2, 8) / 7 * 1000) / 1000)
    excess = result.nats + stats.norm(0, 0.5).logpdf(x_0[:, 0])
    assert abs(excess.mean()) < 3 * excess.std() / np.sqrt(count) < 0.1


def test_zero_terminal_snr():
    """Pitfall 15: λ = −∞ at the last step, where the prior term is exactly 0."""
    chain = processes.zero_terminal_snr(processes.LinearBeta(30))
    denoiser = gaussian(0.25, chain)
    x_0 = denoiser.draw(64)[0]
    result = likelihood.bound(denoiser, x_0, pixels=None, variance="beta")
    assert np.isfinite(result.total).all() and result.prior.max() == 0
    flow = likelihood.log_likelihood(denoiser, x_0, pixels=None, divergence="exact")
    noise = float(numpy(chain.sigma(1 / 30) / chain.alpha(1 / 30)))
    expected = stats.norm(0, math.sqrt(0.25 + noise**2)).logpdf(x_0[:, 0])
    np.testing.assert_allclose(flow.log_density[0], expected, atol=0.01)


def test_an_image_has_its_bound_in_any_batch():
    denoiser = exact.GaussianMixture([[0.3, -0.2]], 0.2, process=processes.LinearBeta(30))
    x_0 = np.linspace(-1, 1, 256, dtype="float32")[np.arange(10).reshape(5, 2) * 20]
    alone = likelihood.bound(denoiser, x_0[:3], seed=4, evaluations=4)
    together = likelihood.bound(denoiser, x_0, seed=4, evaluations=4, batch_size=3)
    np.testing.assert_allclose(together.total[:3], alone.total, rtol=1e-4)
    assert together.total.shape == (5,) and together.dimension == 2
    np.testing.assert_allclose(together.nats, together.total * 2 * LN2)


def test_the_bound_bounds_the_discrete_likelihood():
    """And is close to it: 8-bit values of a Gaussian, whose bins have known mass."""
    pixels = Pixels()
    denoiser = gaussian(0.04, processes.LinearBeta(200))
    values = np.linspace(-1, 1, 256)
    drawn = np.clip(denoiser.draw(2000)[0][:, 0], -0.99, 0.99)
    x_0 = values[np.rint((drawn + 1) * 127.5).astype(int)]
    mass = np.diff(stats.norm(0, 0.2).cdf(np.stack([x_0 - 1 / 255, x_0 + 1 / 255], -1)))[:, 0]
    result = likelihood.bound(
        denoiser, x_0[:, None].astype("float32"), variance="beta", pixels=pixels, batch_size=2000
    )
    excess = result.total + np.log2(mass)
    assert 0 < excess.mean() < 0.05 + 3 * excess.std() / np.sqrt(2000)


def test_progressive_coding():
    denoiser = exact.GaussianMixture(
        [[-0.5, 0.5], [0.5, -0.5]], 0.01, process=processes.LinearBeta(40)
    )
    x_0 = denoiser.draw(256)[0]
    result = likelihood.bound(denoiser, x_0, pixels=None, batch_size=256)
    rate, distortion = likelihood.rate_distortion(result)
    assert rate.shape == distortion.shape == (40,)
    assert (np.diff(rate) > 0).all() and rate[0] == pytest.approx(result.prior.mean())
    assert rate[-1] == pytest.approx((result.total - result.decoder).mean())
    # Of no bits one knows the mean of the data, of all bits all but the least noise.
    assert distortion[0] == pytest.approx(np.sqrt(0.26), rel=0.05)
    assert distortion[-1] < 0.05  # √β_1
    strip = likelihood.progressive_decoding(denoiser, x_0, [1.0, 0.5, 0.1, 1 / 40])
    assert strip.shape == (4, 256, 2)
    errors = np.sqrt(np.mean((strip - x_0) ** 2, axis=(1, 2)))
    assert (np.diff(errors) < 0).all() and errors[-1] == pytest.approx(distortion[-1], rel=0.2)
    with pytest.raises(ValueError, match="every step"):
        likelihood.rate_distortion(
            likelihood.bound(denoiser, x_0, pixels=None, evaluations=2, batch_size=256)
        )


# Likelihood by the flow.


class CorrelatedGaussian(Denoiser):
    """The exact denoiser of N(m, Σ), by conditioning."""

    def __init__(self, mean, covariance, process):
        self.mean, self.covariance = np.asarray(mean), np.asarray(covariance)
        self.process = processes.get(process)
        self.variances, self.axes = np.linalg.eigh(self.covariance)

    def __call__(self, x_t, t):
        alpha, sigma = (ops.cast(f(t), x_t.dtype) for f in (self.process.alpha, self.process.sigma))
        axes = self.axes.astype("float32")
        gain = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
        along = ops.matmul(x_t - alpha * self.mean.astype("float32"), axes)
        return self.mean.astype("float32") + ops.matmul(gain * along, axes.T)


MEAN = [0.3, -0.2, 0.1]
COVARIANCE = [[0.3, 0.2, 0.0], [0.2, 0.25, -0.05], [0.0, -0.05, 0.1]]


def test_the_flow_recovers_a_gaussian():
    """To 1e-3 nats, with probes that see a Jacobian that is neither diagonal nor constant."""
    distribution = stats.multivariate_normal(MEAN, COVARIANCE)
    x_0 = distribution.rvs(64, random_state=0).astype("float32")
    denoiser = CorrelatedGaussian(MEAN, COVARIANCE, "flow")
    result = likelihood.log_likelihood(
        denoiser, x_0, pixels=None, divergence="exact", tolerance=1e-5
    )
    np.testing.assert_allclose(result.log_density[0], distribution.logpdf(x_0), atol=1e-3)
    # Where the flow takes the data is standard normal noise.
    expected = np.linalg.solve(np.linalg.cholesky(COVARIANCE), (x_0 - MEAN).T)
    np.testing.assert_allclose(
        (result.latents[0] ** 2).sum(-1), (expected**2).sum(0), rtol=0.01, atol=0.01
    )


@pytest.mark.parametrize(
    "divergence", [pytest.param("rademacher", marks=pytest.mark.slow), "gaussian"]
)
def test_probes_are_unbiased(divergence):
    distribution = stats.multivariate_normal(MEAN, COVARIANCE)
    x_0 = np.repeat(distribution.rvs(1, random_state=3)[None].astype("float32"), 600, axis=0)
    denoiser = CorrelatedGaussian(MEAN, COVARIANCE, "flow")
    result = likelihood.log_likelihood(
        denoiser, x_0, pixels=None, divergence=divergence, batch_size=600
    )
    error = result.log_density[0] - distribution.logpdf(x_0[0])
    assert 0.01 < error.std() < 5  # it is random
    assert abs(error.mean()) < 3.5 * error.std() / np.sqrt(600) + 1e-3


def ends(name):
    """The same first and last noise level, in three coordinates."""
    high, low = 10.0, -12.0
    if name == "vp":
        return LinearLogSNR(high, low)
    cls = {"ve": processes.VarianceExploding, "edm": processes.EDM}[name]
    return cls(math.exp(-high / 2), math.exp(-low / 2))


MIXTURE = ([[-0.6, 0.4], [0.5, -0.3], [0.4, 0.6]], [0.02, 0.05, 0.01], [1.0, 2.0, 1.0])


def test_the_same_model_has_one_likelihood_in_all_coordinates():
    """A mixture: its own density comes out, and VP, VE and EDM agree."""
    x_0 = exact.GaussianMixture(*MIXTURE).draw(64)[0]
    blurred = np.asarray(MIXTURE[1]) + math.exp(-10)
    expected = MixtureData(MIXTURE[0], blurred, MIXTURE[2]).log_density(x_0, 1.0, 0.0)
    found = []
    for name in ("vp", "ve", "edm"):
        denoiser = exact.GaussianMixture(*MIXTURE, process=ends(name))
        result = likelihood.log_likelihood(
            denoiser, x_0, pixels=None, divergence="exact", tolerance=1e-5
        )
        found.append(result.log_density[0])
        np.testing.assert_allclose(result.log_density[0], expected, atol=0.02)
        assert (result.log_density[0] - expected).mean() == pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(found[1], found[0], atol=2e-3)
    np.testing.assert_allclose(found[2], found[0], atol=2e-3)


@pytest.mark.slow
def test_the_flow_is_the_one_of_the_velocity():
    """In the process's own time and scale, by another solver: SciPy's, on `Denoiser.velocity`."""
    from scipy.integrate import solve_ivp

    denoiser = exact.GaussianMixture(*MIXTURE, process="vp")
    x_0 = np.array([[0.1, 0.2], [-0.5, 0.3]], "float32")
    result = likelihood.log_likelihood(
        denoiser, x_0, pixels=None, divergence="exact", tolerance=1e-5
    )
    first = levels.first_time(denoiser.process)
    alpha_0 = float(numpy(denoiser.process.alpha(first)))

    def field(t, state):
        x = state.reshape(2, 3)[:, :2].astype(FLOAT)
        h = 1e-4 if DOUBLE else 3e-3
        right, up = h * np.eye(2)
        moved = np.concatenate([x, x + right, x - right, x + up, x - up]).astype(FLOAT)
        v = numpy(denoiser.velocity(moved, np.array(t, FLOAT))).reshape(5, 2, 2).astype("float64")
        spread = (v[1, :, 0] - v[2, :, 0] + v[3, :, 1] - v[4, :, 1]) / (2 * h)
        return np.concatenate([v[0], spread[:, None]], axis=1).ravel()

    start = np.concatenate([alpha_0 * x_0, np.zeros((2, 1))], axis=1).ravel()
    solved = solve_ivp(field, (first, 1.0), start, rtol=1e-5, atol=1e-6, method="LSODA")
    x_1, spread = solved.y[:, -1].reshape(2, 3)[:, :2], solved.y[:, -1].reshape(2, 3)[:, 2]
    expected = stats.norm.logpdf(x_1).sum(-1) + spread + 2 * np.log(alpha_0)
    np.testing.assert_allclose(result.log_density[0], expected, atol=3e-3 if DOUBLE else 0.05)


@pytest.mark.parametrize("chain", ["cosine", pytest.param("ladder", marks=pytest.mark.slow)])
def test_a_chain_is_taken_between_its_steps(chain):
    """Diffusion and score models of T levels; the data are blurred by the least of them."""
    if chain == "cosine":
        process = processes.Cosine(200)
    else:
        process = processes.Tabulated.from_sigmas(np.geomspace(0.02, 60.0, 100))
    denoiser = exact.GaussianMixture(*MIXTURE, process=process)
    first = 1.0 / process.num_timesteps
    noise = float(numpy(process.sigma(first) / process.alpha(first)))
    x_0 = denoiser.draw(64)[0]
    expected = MixtureData(MIXTURE[0], np.asarray(MIXTURE[1]) + noise**2, MIXTURE[2])
    result = likelihood.log_likelihood(denoiser, x_0, pixels=None, divergence="exact")
    np.testing.assert_allclose(
        result.log_density[0], expected.log_density(x_0, 1.0, 0.0), atol=0.03
    )


@pytest.mark.parametrize("name", ["linear", "sigmoid"])
def test_a_chain_in_continuous_time_keeps_its_steps(name):
    chain = processes.get(name)
    between = levels.Interpolated(chain)
    t = np.arange(1, 1001, 37) / 1000
    for method in ("alpha", "sigma", "log_snr"):
        oracles.assert_close(
            getattr(between, method)(t.astype(FLOAT)),
            numpy(getattr(chain, method)(t.astype(FLOAT))).astype("float64"),
            double=1e-6,
            single=1e-3,
        )
    t = np.array([0.0123, 0.30005, 0.9999]).astype(FLOAT)
    oracles.assert_close(between.inverse_log_snr(between.log_snr(t)), t, double=1e-9, single=1e-4)
    middle = numpy(between.alpha(t)) ** 2 + numpy(between.sigma(t)) ** 2
    np.testing.assert_allclose(middle, 1.0, rtol=1e-5)


def test_wrapped_denoisers_follow():
    denoiser = Clipped(exact.GaussianMixture([[0.0]], 0.1, process="cosine"))
    other = levels.continuous(denoiser)
    assert other.process is other.denoiser.process is not denoiser.process
    assert denoiser.denoiser.process is denoiser.process


def test_bits_of_pixels_do_not_depend_on_their_scale():
    """Data in [−1, 1] and in [0, 1], with the offset of each: close to the mass of the bins."""
    values = np.linspace(-1, 1, 256)
    x = values[
        np.rint(
            (np.clip(np.random.default_rng(0).normal(0.1, 0.2, (64, 1)), -1, 1) + 1) * 127.5
        ).astype(int)
    ]
    wide = exact.GaussianMixture([[0.1]], 0.04, process="flow")
    unit = exact.GaussianMixture([[0.55]], 0.01, process="flow")
    options = {"divergence": "exact", "draws": 3}
    a = likelihood.log_likelihood(wide, x.astype("float32"), **options)
    b = likelihood.log_likelihood(
        unit, ((x + 1) / 2).astype("float32"), pixels=Pixels(low=0.0), **options
    )
    np.testing.assert_allclose(a.bits, b.bits, atol=5e-3)
    assert a.log_density.shape == (3, 64) and b.offset - a.offset == pytest.approx(1.0)
    mass = np.diff(stats.norm(0.1, 0.2).cdf(np.concatenate([x - 1 / 255, x + 1 / 255], 1)))[:, 0]
    np.testing.assert_allclose(a.bits, -np.log2(mass), atol=0.05)
    assert a.draw_error < a.standard_error
    # The noise of the first latent instead: close to the mass too, above it on average, and below
    # the bound with which it shares that latent. VE starts at a noise of 2.5 bins.
    coarse = exact.GaussianMixture([[0.1]], 0.04, process=processes.VarianceExploding(0.02, 50.0))
    many = np.repeat(x, 4, axis=0).astype("float32")
    flow = likelihood.log_likelihood(
        coarse, many, divergence="exact", dequantization="decoder", batch_size=256
    )
    excess = flow.bits + np.repeat(np.log2(mass), 4)
    assert flow.offset == 0 and abs(excess.mean()) < 0.02 + 3 * excess.std() / 16
    bound = likelihood.continuous_bound(coarse, many, batch_size=256)
    gap = bound.total - flow.bits
    assert gap.mean() > -3 * gap.std() / 16
    assert flow.latents.std() == pytest.approx(1.0, abs=0.2)


def test_a_uniform_density_has_eight_bits():
    """Over the 256 bins, which reach half a bin beyond both ends."""
    for low in (-1.0, 0.0):
        pixels = Pixels(low=low)
        bits = -math.log2(1 / (256 * pixels.width)) + pixels.offset
        assert bits == pytest.approx(8.0)
    assert Pixels().offset == pytest.approx(7 - math.log2(256 / 255))
    noisy = Pixels().dequantize(np.zeros((1, 4000), "float32"), np.zeros((1, 2), "uint32"))
    assert abs(numpy(noisy)).max() <= 1 / 255 and numpy(noisy).std() == pytest.approx(
        2 / 255 / math.sqrt(12), rel=0.05
    )


def test_a_network_with_labels():
    """The label reaches the network, in bound and flow, and its weights may be averages."""
    network = networks.MLP(width=8, depth=1, num_classes=2)
    model = DiffusionModel(network, processes.LinearBeta(25), "v")
    model.build((None, 2))
    for i, weight in enumerate(network.trainable_weights):
        weight.assign(0.2 * np.random.default_rng(i).standard_normal(weight.shape))
    # Two rows with one image and one key each: only the label tells them apart.
    x_0, label = np.zeros((2, 2), "float32"), np.array([0, 1])
    terms = [
        numpy(
            step_term(
                model.denoiser(), x_0, x_0, *(np.full(2, t, FLOAT) for t in (0.8, 0.4)), label=y
            )[0]
        )
        for y in (label, label[::-1].copy())
    ]
    np.testing.assert_allclose(terms[0], terms[1][::-1], rtol=1e-4)
    assert abs(terms[0][0] - terms[0][1]).max() > 1e-5
    bound = likelihood.bound(model, x_0, label, pixels=None)
    assert np.isfinite(bound.total).all()
    flow = likelihood.log_likelihood(
        model, x_0, label, pixels=None, prior_tolerance=1.0, divergence="exact"
    )
    assert abs(np.diff(flow.log_density)).max() > 1e-4
    assert isinstance(levels.of(model), NetworkDenoiser)


# Errors.


def test_data_must_be_floats_in_range():
    denoiser = gaussian(0.3, "flow")
    for function in (
        likelihood.bound,
        likelihood.continuous_bound,
        likelihood.log_likelihood,
    ):
        with pytest.raises(TypeError, match="uint8"):
            function(denoiser, np.zeros((2, 1), "uint8"))
        with pytest.raises(ValueError, match=r"expected \[-1, 1\], received \[0, 255\]"):
            function(denoiser, np.array([[0.0], [255.0]], "float32"))
        with pytest.raises(ValueError, match="of a bin away"):
            function(denoiser, np.array([[0.0]], "float32"))
        with pytest.raises(ValueError, match="1 NaN"):
            function(denoiser, np.array([[np.nan], [0.0]], "float32"), pixels=None)
        with pytest.raises(ValueError, match=r"\(N, ...\)"):
            function(denoiser, np.zeros(3, "float32"), pixels=None)
        with pytest.raises(ValueError, match="one an image"):
            function(denoiser, np.zeros((2, 1), "float32"), np.zeros(3, int), pixels=None)
    with pytest.raises(ValueError, match="2 levels"):
        Pixels(levels=1)


def test_the_process_must_end_in_the_prior():
    """The mismatch is said in bits, and the bound counts it instead."""
    short = processes.VarianceExploding(0.01, 0.5)
    x_0 = np.array([[0.5], [-0.5]], "float32")
    alpha, sigma = 1.0, 0.5
    bits = oracles.kl(alpha * x_0, sigma**2, 0.0, alpha**2 + sigma**2).mean() / LN2
    with pytest.raises(ValueError, match=f"{bits:.3g} bits a dimension"):
        likelihood.log_likelihood(gaussian(0.3, short), x_0, pixels=None)
    result = likelihood.bound(gaussian(0.3, short), x_0, pixels=None, steps=4)
    assert result.prior.mean() == pytest.approx(bits, rel=1e-3)


def test_a_tolerance_that_cannot_be_met():
    denoiser, x_0 = gaussian(0.3, "flow"), np.zeros((2, 1), "float32")
    with pytest.raises(ValueError, match="at least 1e-7"):
        likelihood.log_likelihood(denoiser, x_0, pixels=None, tolerance=1e-9)
    with pytest.raises(likelihood.ToleranceError, match=r"% of the way in at most 3 steps"):
        likelihood.log_likelihood(denoiser, x_0, pixels=None, max_steps=3)


def test_arguments():
    denoiser, x_0 = gaussian(0.3, processes.LinearBeta(30)), np.zeros((2, 1), "float32")
    with pytest.raises(ValueError, match=r"Unknown variance 'betta'. Did you mean 'beta'"):
        likelihood.bound(denoiser, x_0, variance="betta")
    with pytest.raises(TypeError, match="no learned variance"):
        likelihood.bound(denoiser, x_0, variance="learned")
    with pytest.raises(ValueError, match="steps=31 exceeds the 30"):
        likelihood.bound(denoiser, x_0, pixels=None, steps=31)
    with pytest.raises(ValueError, match="evaluations must be"):
        likelihood.bound(denoiser, x_0, pixels=None, evaluations=0)
    with pytest.raises(ValueError, match="Unknown divergence"):
        likelihood.log_likelihood(denoiser, x_0, divergence="hutchinson")
    with pytest.raises(ValueError, match="Unknown dequantization"):
        likelihood.log_likelihood(denoiser, x_0, dequantization="gaussian")
    with pytest.raises(ValueError, match="draws must be"):
        likelihood.log_likelihood(denoiser, x_0, pixels=None, draws=0)
    with pytest.raises(TypeError, match="Received int"):
        likelihood.bound(3, x_0)
    with pytest.raises(ValueError, match="times must fall"):
        likelihood.progressive_decoding(denoiser, x_0, [0.1, 0.5])


def test_the_callback_writes_bits_into_the_history():
    """The bound of the averaged weights, at the same noise every time."""
    levels_ = np.random.default_rng(0).integers(0, 256, (16, 2))
    x_0 = (levels_ / 127.5 - 1).astype("float32")
    model = DiffusionModel(networks.MLP(width=8, depth=1), processes.LinearBeta(25), "v")
    model.compile("adam")
    measure = BitsPerDimension(x_0, every=2, evaluations=3)
    history = model.fit(x_0, batch_size=16, epochs=2, verbose=0, callbacks=[measure]).history
    expected = likelihood.bound(model, x_0, evaluations=3)
    assert history["val_bits_per_dim"] == [pytest.approx(expected.mean, rel=1e-4)]


def test_where_the_bits_are():
    denoiser = gaussian(0.25, processes.LinearBeta(25))
    result = likelihood.bound(denoiser, denoiser.draw(64)[0], pixels=None)
    edges, bits = result.by_time(5)
    assert edges.shape == (6,) and bits.sum() == pytest.approx(result.steps.sum(1).mean())
    assert bits[0] == pytest.approx(result.steps[:, :4].sum(1).mean())  # t = 2/25 … 5/25
    pixels = np.full((2, 1), -1.0, "float32")
    chain = likelihood.estimate(denoiser, pixels, evaluations=3)
    flow = likelihood.estimate(gaussian(0.25, "flow"), pixels, evaluations=3)
    assert np.isfinite(chain.squared_error).all() and np.isnan(flow.squared_error[:, -1]).all()


# What stands beside it.


def test_a_gaussian_of_points_is_the_one_of_their_moments():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(3, 3))
    train, images = (rng.normal(size=(n, 3)) @ mixing.T + 0.3 for n in (500, 20))
    train, images = train.astype("float32"), images.astype("float32")
    bits = likelihood.baselines.gaussian_mixture(train, images, pixels=None)
    density = stats.multivariate_normal(train.mean(0), np.cov(train.T, bias=True))
    np.testing.assert_allclose(bits, -density.logpdf(images) / 3 / LN2, rtol=1e-5)


def test_uniform_pixels_cost_a_gaussian_a_quarter_of_a_bit():
    """Filled bins of 256 values have the variance 256² / 12 bins: 8 + ½ log2(2 pi e / 12) bits."""
    rng = np.random.default_rng(0)
    train, images = (
        (rng.integers(0, 256, (n, 2, 2, 1)) / 127.5 - 1).astype("float32") for n in (20_000, 5000)
    )
    bits = likelihood.baselines.gaussian_mixture(train, images)
    error = bits.std() / math.sqrt(len(bits))
    assert abs(bits.mean() - 8 - 0.5 * math.log2(2 * math.pi * math.e / 12)) < 4 * error + 0.001


def test_a_mixture_finds_the_modes_that_a_gaussian_cannot():
    """Two far points of deviation 0.1: one bit for which, and the entropy of one."""
    rng = np.random.default_rng(0)
    train, images = (
        (rng.choice([-5.0, 5.0], (n, 1)) + 0.1 * rng.normal(size=(n, 1))).astype("float32")
        for n in (4000, 4000)
    )
    one, two = (
        likelihood.baselines.gaussian_mixture(train, images, n, pixels=None) for n in (1, 2)
    )
    entropy = 1 + 0.5 * math.log2(2 * math.pi * math.e * 0.1**2)
    assert abs(two.mean() - entropy) < 4 * two.std() / math.sqrt(len(two)) + 0.01
    assert one.mean() > two.mean() + 3


def test_files_of_noise_need_all_their_bits_and_of_nothing_few():
    rng = np.random.default_rng(0)
    noise = (rng.integers(0, 256, (8, 32, 32, 3)) / 127.5 - 1).astype("float32")
    files = likelihood.baselines
    assert (files.png(noise) >= 8).all() and 8 <= files.png_of_all(noise) < 8.2
    assert 8 <= files.xz(noise) < 8.1
    flat = np.zeros_like(noise[..., :1])
    assert (files.png(flat, Pixels(17)) < 1.0).all() and files.xz(flat, Pixels(17)) < 0.2
    assert files.png(noise).shape == (8,)


def test_what_cannot_stand_beside_it_says_why():
    files, x = likelihood.baselines, np.zeros((2, 4, 4, 1), "float32")
    with pytest.raises(ValueError, match=r"at most 256 values.*511"):
        files.png(x, Pixels(511))
    with pytest.raises(ValueError, match=r"1 or 3\).*\(2, 4, 4, 2\)"):
        files.xz(np.zeros((2, 4, 4, 2), "float32"), Pixels(3))
    with pytest.raises(ValueError, match=r"Received 2 of 16 dimensions.*1 of 9"):
        files.gaussian_mixture(x, np.zeros((1, 9), "float32"), pixels=None)
    with pytest.raises(ValueError, match="too few, or too much alike"):
        files.gaussian_mixture(x, x, 2, pixels=None)
    with pytest.raises(ValueError, match="components"):
        files.gaussian_mixture(x, x, 0)
