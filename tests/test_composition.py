"""The whole product: every process × prediction × sampler on data with a closed form.

The network is fake and knows the data: asked for a prediction, it answers with that prediction's
own mean, y = a E[x_0 | x_t] + b E[ε | x_t]. Two columns are two data sets: a Gaussian, for which
every sampler is a linear map, so that mean and variance of what it draws are known exactly for any
number of steps; and a mixture, whose weights and means it has to get right.
"""

from __future__ import annotations

import numpy as np
import oracles
import pytest
from keras import ops
from oracles import DOUBLE, PUBLISHED, GaussianData, numpy

from tfdiffusion import _backend, predictions, processes, sample, samplers
from tfdiffusion._backend import rows
from tfdiffusion.denoiser import Denoiser, NetworkDenoiser
from tfdiffusion.samplers import DDIM, DDPM

GAUSSIAN = GaussianData(0.4, 0.16)
WEIGHTS, MEANS, VARIANCE = np.array([0.25, 0.75]), np.array([-0.8, 0.6]), 0.01
SAMPLERS = [DDIM(), DDIM(0.5), DDIM(1.0), DDPM(), DDPM("beta")]
STEPS, COUNT = 40, 2000
SIGMA_DATA = 0.5

# (a, b) of y = a x_0 + b ε, from the table in the module docstring of `predictions` and the papers
# it names.
ROWS = {
    "clean": lambda alpha, sigma: (1.0, 0.0),
    "noise": lambda alpha, sigma: (0.0, 1.0),
    "v": lambda alpha, sigma: (-sigma, alpha),
    "flow": lambda alpha, sigma: (-1.0, 1.0),
    "score": lambda alpha, sigma: (0.0, -1.0 / sigma),
    "edm": lambda alpha, sigma: (
        sigma / SIGMA_DATA / np.hypot(alpha * SIGMA_DATA, sigma),
        -alpha * SIGMA_DATA / np.hypot(alpha * SIGMA_DATA, sigma),
    ),
}
SINGULAR = ("noise", "score")  # undefined where α = 0


def grid(name, latest=1.0):
    """The times that a run of STEPS steps visits: t_k = latest · (1 − k/N)."""
    visited = latest * (1.0 - np.arange(STEPS) / STEPS)
    return np.rint(visited * 1000) / 1000 if processes.get(name).num_timesteps else visited


class ExactNetwork:
    """y for x_t of shape (B, ..., 2), at the times of a grid."""

    num_classes = None

    def __init__(self, name, prediction, visited):
        alpha, sigma = PUBLISHED[name](visited)
        a, b = np.broadcast_arrays(*ROWS[prediction](alpha, sigma), alpha)[:2]
        scale = np.hypot(alpha * SIGMA_DATA, sigma)  # what the denoiser divides x_t by
        self.table = np.stack([alpha, sigma, a, b, scale], axis=-1)
        self.timesteps = visited * 1000 - 1

    def __call__(self, inputs, training=False):
        away = ops.abs(inputs["time"][:, None] - self.timesteps.astype("float32"))
        table = ops.convert_to_tensor(self.table.astype("float32"))
        row = ops.take(table, ops.argmin(away, axis=-1), axis=0)  # (B, 5)
        x_t = inputs["x"] * rows(row[:, 4], inputs["x"])
        alpha, sigma, a, b = (rows(row[:, i], x_t[..., 0]) for i in range(4))
        columns = []
        for i, data in enumerate((self.gaussian, self.mixture)):
            clean, noise = data(x_t[..., i], alpha, sigma)
            columns.append(a * clean + b * noise)
        return ops.stack(columns, axis=-1)

    @staticmethod
    def gaussian(x_t, alpha, sigma):
        spread = alpha**2 * GAUSSIAN.variance + sigma**2
        offset = x_t - alpha * GAUSSIAN.mean
        return GAUSSIAN.mean + alpha * GAUSSIAN.variance / spread * offset, sigma * offset / spread

    @staticmethod
    def mixture(x_t, alpha, sigma):
        """Two components of one variance: their log-odds are linear in x_t."""
        spread = alpha**2 * VARIANCE + sigma**2
        offsets = [x_t - alpha * m for m in MEANS]
        log_odds = np.log(WEIGHTS[1] / WEIGHTS[0])
        log_odds = log_odds + 0.5 * (offsets[0] ** 2 - offsets[1] ** 2) / spread
        second = ops.sigmoid(log_odds)
        shares = (1.0 - second, second)
        offset = shares[0] * offsets[0] + shares[1] * offsets[1]
        mean = shares[0] * MEANS[0] + shares[1] * MEANS[1]
        return mean + alpha * VARIANCE / spread * offset, sigma * offset / spread


class OneOfEach(Denoiser):
    """Splits the batch into equal parts, one for each denoiser, so that one graph runs them all."""

    def __init__(self, parts):
        self.parts = parts
        self.process = parts[0].process
        self.latest = min(part.latest for part in parts)

    def __call__(self, x_t, t):
        blocks = ops.split(x_t, len(self.parts), axis=0)
        return ops.concatenate([part(block, t) for part, block in zip(self.parts, blocks)])


class SideBySide(samplers.Sampler):
    """Runs all samplers on x (B, S, 2), one a column: each asks for the denoised batch once."""

    def step(self, denoiser, carry, t, s, keys):
        x_0 = denoiser(carry[0], t)
        states = [
            sampler.step(Answered(denoiser.process, x_0[:, i]), (carry[0][:, i],), t, s, keys)[0]
            for i, sampler in enumerate(SAMPLERS)
        ]
        return (ops.stack(states, axis=1),)


class Answered(Denoiser):
    """A denoiser that was asked already."""

    def __init__(self, process, x_0):
        self.process, self.x_0 = process, x_0

    def __call__(self, x_t, t):
        return self.x_0


def moments_of_samples(sampler, name, visited):
    """Mean and variance of the Gaussian column, by the recursion of a linear map."""
    alpha, sigma = PUBLISHED[name](visited)
    mean, variance = 0.0, alpha[0] ** 2 + sigma[0] ** 2
    for k in range(len(visited)):
        here = (alpha[k], sigma[k])
        if k + 1 < len(visited):
            there = (alpha[k + 1], sigma[k + 1])
            slope, offset, added = linear_step(sampler, here, there)
        else:
            slope, offset, added = (*line(lambda x, at=here: GAUSSIAN.clean(x, *at)), 0.0)
        mean, variance = slope * mean + offset, slope**2 * variance + added
    return mean, variance


def linear_step(sampler, here, there):
    """(slope, offset, added variance) of a step, from Bayes' rule for jointly Gaussian numbers."""
    fresh = oracles.posterior(here, there, 0.0, 0.0)[1]
    if isinstance(sampler, DDIM):
        fresh = sampler.eta**2 * fresh
        kept = np.sqrt(max(there[1] ** 2 - fresh, 0.0))
        mean = line(lambda x: there[0] * GAUSSIAN.clean(x, *here) + kept * GAUSSIAN.noise(x, *here))
        return *mean, fresh
    if sampler.variance == "beta":
        fresh = here[1] ** 2 - (here[0] / there[0] * there[1]) ** 2
    mean = line(lambda x: oracles.posterior(here, there, GAUSSIAN.clean(x, *here), x)[0])
    return *mean, fresh


def line(function):
    """(slope, offset) of an affine function."""
    return function(1.0) - function(0.0), function(0.0)


CASES = [(name, None) for name in processes.names() if name != "flow"]
# A flow ends in pure noise, so the predictions that know nothing there start a little earlier.
CASES += [("flow", SINGULAR), ("flow", tuple(p for p in ROWS if p not in SINGULAR))]


@pytest.mark.parametrize(("name", "some"), CASES)
def test_every_prediction_and_sampler(name, some):
    asked = some or tuple(ROWS)
    latest = 0.999 if some == SINGULAR else 1.0
    visited = grid(name, latest)
    denoiser = OneOfEach(
        [
            NetworkDenoiser(ExactNetwork(name, p, visited), name, p, sigma_data=SIGMA_DATA)
            for p in asked
        ]
    )
    assert denoiser.latest == latest
    shape = (len(SAMPLERS), 2)
    seeds = np.tile(np.arange(COUNT), len(asked))
    x = sample(denoiser, seeds, shape, sampler=SideBySide(), steps=STEPS)
    x = numpy(x).astype(np.float64).reshape(len(asked), COUNT, *shape)
    assert np.isfinite(x).all()

    # The same seed gives the same sample, whatever the network was asked for. Rounding of ε̂ grows
    # by 1/α, up to 2e4 at the end of the cosine chain: hence not to the last digits.
    for other in x[1:]:
        assert np.sqrt(np.mean((other - x[0]) ** 2)) < (0.002 if DOUBLE else 0.01)

    for i, sampler in enumerate(SAMPLERS):
        mean, variance = moments_of_samples(sampler, name, visited)
        gaussian, mixture = x[0, :, i, 0], x[0, :, i, 1]
        # Five standard errors of a mean and of a variance of COUNT numbers.
        assert gaussian.mean() == pytest.approx(mean, abs=5 * np.sqrt(variance / COUNT)), sampler
        assert gaussian.var() == pytest.approx(variance, rel=5 * np.sqrt(2 / COUNT)), sampler
        # The mixture: Monte-Carlo error and some for the length of the steps.
        right = mixture > MEANS.mean()
        error = 5 * np.sqrt(WEIGHTS.prod() / COUNT) + (0.05 if sampler == DDPM("beta") else 0.02)
        assert right.mean() == pytest.approx(WEIGHTS[1], abs=error), sampler
        for side, centre in zip((~right, right), MEANS):
            assert mixture[side].mean() == pytest.approx(centre, abs=0.05), sampler


@pytest.mark.parametrize("name", processes.names())
def test_every_prediction_gives_the_same_clean_image(name):
    """To the rounding of y: Δx_0 = σ Δy/(aσ − bα), and of the difference that x̂_0 is."""
    visited = grid(name)[1:]
    alpha, sigma = PUBLISHED[name](visited)
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(len(visited), 2)) * np.hypot(alpha, sigma)[:, None]).astype("float32")

    parts = [
        NetworkDenoiser(ExactNetwork(name, p, visited), name, p, sigma_data=SIGMA_DATA)
        for p in ROWS
    ]
    together = _backend.compiled(lambda x, t: [part(x, t) for part in parts], ())
    answers = together(x, visited.astype(oracles.FLOAT))
    x_t = x[:, 0].astype(np.float64)
    clean, noise = GAUSSIAN.clean(x_t, alpha, sigma), GAUSSIAN.noise(x_t, alpha, sigma)
    for prediction, answer in zip(ROWS, answers):
        a, b = ROWS[prediction](alpha, sigma)
        terms = np.abs(sigma * (a * clean + b * noise)) + np.abs(b * x_t)
        condition = 1.0 + terms / np.abs(a * sigma - b * alpha)
        unit = 2.0**-23 if DOUBLE else 2.0**-18  # float32 coefficients lose more
        assert (np.abs(numpy(answer)[:, 0] - clean) <= 16 * unit * condition).all(), prediction


class KnowingNetwork(ExactNetwork):
    """The same at any time, for solvers that also ask between the times of the grid."""

    def __init__(self, process, prediction):
        self.process, self.prediction = process, predictions.get(prediction)

    def __call__(self, inputs, training=False):
        t = (inputs["time"] + 1.0) / 1000.0
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        x_t = inputs["x"] * rows((alpha**2 * SIGMA_DATA**2 + sigma**2) ** 0.5, inputs["x"])
        a, b = self.prediction.row(alpha, sigma, SIGMA_DATA)
        columns = []
        for i, data in enumerate((self.gaussian, self.mixture)):
            clean, noise = data(x_t[..., i], alpha, sigma)
            columns.append(a * clean + b * noise)
        return ops.stack(columns, axis=-1)


# Root mean square error, on the Gaussian, against its flow: x̂_0 at the last of 40 even times is
# off by up to 3 % of the spread, 0.4, and methods of first order by the length of their steps.
FLOWS = {
    "ddim": 0.06,
    "euler": 0.25,
    "dpm_solver_1": 0.06,
    **dict.fromkeys(("heun", "rk4", "dpm_solver_2", "dpm_solver_3", "rk45"), 0.03),
    **dict.fromkeys(("dpmpp_2m", "dpmpp_3m", "unipc_2", "unipc_3", "deis", "lms", "plms"), 0.03),
}
# Error of the standard deviation that fresh noise and 40 steps may leave.
DRAWS = {
    "ddpm": 0.08,
    "sde_dpmpp_2m": 0.05,
    "euler_maruyama": 0.08,
    "reverse_diffusion": 0.12,
    "predictor_corrector": 0.12,
}
KINDS = ("linear", "ve")  # a chain that keeps variance, and one that does not; the rest are slow


NAMES = [*PUBLISHED, "linear, levels between"]


@pytest.mark.parametrize(
    "name", [n if n in KINDS else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_every_solver(name):
    """Each with one prediction, in turn: that all of these agree is shown above and below."""
    name, _, between = name.partition(", ")
    process = processes.get(name)
    if between:
        process = processes.Interpolated(process)
    for i, solver in enumerate(samplers.names()):
        prediction = list(ROWS)[(i + len(name)) % len(ROWS)]
        network = KnowingNetwork(process, prediction)
        denoiser = NetworkDenoiser(network, process, prediction, sigma_data=SIGMA_DATA)
        x, path = sample(
            denoiser, range(COUNT), (2,), sampler=solver, steps=STEPS, return_path=True
        )
        x, start = numpy(x).astype(np.float64), numpy(path[0]).astype(np.float64)
        assert np.isfinite(x).all(), (solver, prediction)
        if solver in FLOWS:
            moments = PUBLISHED[name](min(denoiser.latest, 1.0))
            truth = GAUSSIAN.flow(start[:, 0], moments, (1.0, 0.0))
            assert np.sqrt(np.mean((x[:, 0] - truth) ** 2)) < FLOWS[solver], (solver, prediction)
        else:
            assert x[:, 0].mean() == pytest.approx(GAUSSIAN.mean, abs=0.06), (solver, prediction)
            spread = np.sqrt(GAUSSIAN.variance)
            assert x[:, 0].std() == pytest.approx(spread, abs=DRAWS[solver]), (solver, prediction)
        right = np.mean(x[:, 1] > MEANS.mean())
        # Euler's steps are coarse where σ falls by a factor of 5000 in 40 of them.
        share = 0.15 if solver == "euler" else 0.09
        assert right == pytest.approx(WEIGHTS[1], abs=share), (solver, prediction)


def test_the_product_is_complete():
    """No process, prediction or sampler may be added without joining the test above."""
    assert set(processes.names()) == set(PUBLISHED)
    assert set(predictions.names()) == set(ROWS)
    assert set(FLOWS) | set(DRAWS) == set(samplers.names())
