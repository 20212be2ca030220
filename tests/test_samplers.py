"""Samplers against what theory says of a Gaussian, of a single point, and of any data."""

from __future__ import annotations

import itertools
import re

import keras
import numpy as np
import oracles
import pytest
from keras import ops
from oracles import DOUBLE, PUBLISHED, GaussianData, numpy

from tfdiffusion import _backend, exact, processes, random, samplers, times
from tfdiffusion.denoiser import Clipped, Denoiser
from tfdiffusion.samplers import DDIM, DDPM, Sampler, sample

SAMPLERS = {
    "ddim": DDIM(),
    "ddim-0.5": DDIM(eta=0.5),
    "ddim-1": DDIM(eta=1.0),
    "ddpm": DDPM(),
    "ddpm-beta": DDPM(variance="beta"),
}
every_process = pytest.mark.parametrize("name", processes.names())
kinds_of_process = pytest.mark.parametrize("name", ["linear", "sub_vp", "ve", "flow"])
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
TOLERANCE = 3e-6 if DOUBLE else 3e-4  # float32 coefficients are differences of close numbers


def pairs_of_times(process, count=64):
    """(t, s) with s < t, from neighbours to the whole range, t = 1 included."""
    rng = np.random.default_rng(0)
    t = np.r_[1.0, 1.0, 1.0, rng.uniform(0.02, 1.0, count - 3)]
    s = np.r_[0.999, 0.5, 0.001, t[3:] * rng.uniform(0.0, 1.0, count - 3)]
    s[3 : count // 2] = t[3 : count // 2] - 0.01  # short steps
    if process.num_timesteps is not None:
        t, s = np.rint(t * 1000), np.rint(s * 1000)
        t, s = t / 1000, np.clip(s, 1, t - 1) / 1000
    else:
        s = np.maximum(s, 1e-4)
    return t.astype(oracles.FLOAT), s.astype(oracles.FLOAT)


def moments(name, t):
    """Published α and σ at times as the backend has them."""
    return PUBLISHED[name](np.asarray(t, dtype=np.float64))


def affine_step(sampler, denoiser, t, s, at=(0.0, 1.0)):
    """One step of every pair (t, s): x ↦ slope · x + offset + spread · z, read off the step.

    The denoiser must be affine in x. The key of a row is what the noise comes from, so two states
    with one key differ by the slope, and two keys with one state by the spread.
    """
    count = len(t)
    keys = [random.keys(range(count)), random.keys(range(count, 2 * count))]
    z = [numpy(random.normal(k, (1,)))[:, 0].astype(np.float64) for k in keys]

    @_all_in_one_graph
    def step(t, s, x, k):
        return sampler.step(denoiser, (x,), t, s, k)[0]

    def run(x, k):
        return numpy(step(t, s, np.full((count, 1), x, "float32"), k))[:, 0].astype(np.float64)

    low, high, other = run(at[0], keys[0]), run(at[1], keys[0]), run(at[0], keys[1])
    slope = (high - low) / (at[1] - at[0])
    spread = (other - low) / (z[1] - z[0])
    return slope, low - slope * at[0] - spread * z[0], spread


def affine_steps(sampler, denoiser, grids):
    """`affine_step` for all steps of each grid, in one graph."""
    t, s = (np.concatenate([grid[part] for grid in grids]) for part in (np.s_[:-1], np.s_[1:]))
    ends = np.cumsum([len(grid) - 1 for grid in grids])[:-1]
    return zip(*(np.split(column, ends) for column in affine_step(sampler, denoiser, t, s)))


def _all_in_one_graph(function):
    return _backend.compiled(function, ())


def expected_step(sampler, data, moments_t, moments_s):
    """(slope, offset, variance) of a step on Gaussian data, by conditioning Gaussians."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = moments_t, moments_s

    def mean(x):
        clean, noise = data.clean(x, *moments_t), data.noise(x, *moments_t)
        if isinstance(sampler, DDIM):
            return alpha_s * clean + np.sqrt(sigma_s**2 - sampler.eta**2 * bayes) * noise
        return oracles.posterior(moments_t, moments_s, clean, x)[0]

    _, bayes = oracles.posterior(moments_t, moments_s, 0.0, 0.0)
    bayes = np.minimum(bayes, sigma_s**2)
    if isinstance(sampler, DDIM):
        variance = sampler.eta**2 * bayes
    elif sampler.variance == "beta":
        variance = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
    else:
        variance = bayes
    return mean(1.0) - mean(0.0), mean(0.0), variance


# One step.


@every_process
def test_a_ddim_step_multiplies_by_the_closed_form(name):
    """Oracle 14: (α_t α_s v + σ_t σ_s)/V_t on data of mean 0."""
    process = processes.get(name)
    t, s = pairs_of_times(process)
    slope, offset, spread = affine_step(
        DDIM(), exact.GaussianMixture([[0.0]], 0.3, process=process), t, s
    )
    expected = GaussianData(0.0, 0.3).ddim_factor(moments(name, t), moments(name, s))
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(offset, 0.0, atol=1e-5)
    np.testing.assert_allclose(spread, 0.0, atol=1e-5)


@kinds_of_process
@every_sampler
def test_a_step_has_the_mean_and_the_variance_of_theory(name, sampler):
    process = processes.get(name)
    sampler, data = SAMPLERS[sampler], GaussianData(0.4, 0.3)
    t, s = pairs_of_times(process)
    actual = affine_step(sampler, exact.GaussianMixture([[0.4]], 0.3, process=process), t, s)
    slope, offset, variance = expected_step(sampler, data, moments(name, t), moments(name, s))
    scale = np.maximum(1.0, moments(name, s)[1])  # of a state at s
    np.testing.assert_allclose(actual[0], slope, rtol=1e-3, atol=30 * TOLERANCE)
    assert (np.abs(actual[1] - offset) / scale < 30 * TOLERANCE).all()
    assert (np.abs(actual[2] - np.sqrt(variance)) / scale < 30 * TOLERANCE).all()


@kinds_of_process
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_marginals_for_every_eta(name, eta):
    """Oracle 16: if x_t = α_t x_0 + σ_t ε for the true x_0, then x_s = α_s x_0 + σ_s ε."""
    process = processes.get(name)
    t, s = pairs_of_times(process)
    point = exact.GaussianMixture([[0.7]], 0.0, process=process)
    slope, offset, spread = affine_step(DDIM(eta), point, t, s)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = moments(name, t), moments(name, s)
    scale = np.maximum(1.0, sigma_s)
    mean = slope * alpha_t * 0.7 + offset
    assert (np.abs(mean - alpha_s * 0.7) / scale < 30 * TOLERANCE).all()
    deviation = np.sqrt((slope * sigma_t) ** 2 + spread**2)
    assert (np.abs(deviation - sigma_s) / scale < 30 * TOLERANCE).all()


@every_process
def test_ddim_with_eta_1_is_ddpm(name):
    """The same state and the same noise give the same next state."""
    process = processes.get(name)
    t, s = pairs_of_times(process)
    denoiser = exact.GaussianMixture([[0.4], [-0.6]], [0.1, 0.02], process=process)
    x = np.random.default_rng(0).normal(size=(len(t), 1)) * moments(name, t)[1][:, None]
    keys = random.keys(range(len(t)))

    @_all_in_one_graph
    def both(t, s, x, keys):
        return [a.step(denoiser, (x,), t, s, keys)[0] for a in (DDIM(eta=1.0), DDPM())]

    ddim, ddpm = map(numpy, both(t, s, x.astype("float32"), keys))
    scale = np.maximum(1.0, moments(name, s)[1])[:, None]
    assert (np.abs(ddim - ddpm) / scale < 30 * TOLERANCE).all()


@every_process
def test_the_longest_steps_stay_finite(name):
    """Where x_t remembers nothing of x_s, σ_s² − β̃ is a difference of equals."""
    process = processes.get(name)
    denoiser = exact.GaussianMixture([[0.0]], 0.3, process=process)
    s = np.unique(numpy(process.snap(np.linspace(0.01, 0.99, 2000).astype(oracles.FLOAT))))
    t, x, keys = np.ones_like(s), np.ones((len(s), 1), "float32"), random.keys(range(len(s)))

    @_all_in_one_graph
    def steps(t, s, x, keys):
        return [a.step(denoiser, (x,), t, s, keys)[0] for a in (DDIM(eta=1.0), DDPM("beta"))]

    for states in steps(t, s, x, keys):
        assert np.isfinite(numpy(states)).all()


# Many steps on a Gaussian.


class Circle(processes.Process):
    """The uniform-angle schedule: what a user writes for a new one."""

    def alpha(self, t):
        return ops.sin(0.5 * np.pi * (1.0 - ops.convert_to_tensor(t)))

    def sigma(self, t):
        return ops.cos(0.5 * np.pi * (1.0 - ops.convert_to_tensor(t)))

    def get_config(self):
        return {}


@pytest.mark.parametrize(
    ("eta", "published"), [(0.0, (0.781, 0.952, 0.990)), (1.0, (0.679, 0.914, 0.981))]
)
def test_output_variance_on_the_uniform_angle_grid(eta, published):
    """Oracle 15. Data N(0, 1), so that V_t = 1 and each step of η = 0 is a factor cos(π/2S)."""
    process = Circle()
    denoiser = exact.GaussianMixture([[0.0]], 1.0, process=process)
    grids = [times.grid("uniform", n, process, dtype=oracles.FLOAT) for n in (10, 50, 250)]
    grids = [numpy(grid) for grid in grids]
    # A step to 0 is x̂_0 at the last time, for data of variance 1 as for any.
    lasts = [numpy(denoiser(np.ones((1, 1), "float32"), grid[-1]))[0, 0] for grid in grids]
    for grid, last, expected, (slope, _, spread) in zip(
        grids, lasts, published, affine_steps(DDIM(eta), denoiser, grids)
    ):
        variance = 1.0
        for a, b in zip(slope, spread):
            variance = a**2 * variance + b**2
        assert abs(last**2 * variance - expected) < 1e-3
        if eta == 0.0:
            closed = np.cos(0.5 * np.pi / len(grid)) ** (2 * len(grid))
            assert last**2 * variance == pytest.approx(closed, rel=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_has_that_variance(eta):
    """The same through the loop: exact for η = 0, to Monte-Carlo error for η = 1."""
    denoiser = exact.GaussianMixture([[0.0]], 1.0, process=Circle())
    x, path = sample(denoiser, range(20000), (1,), sampler=DDIM(eta), steps=10, return_path=True)
    x, start = numpy(x).astype(np.float64), numpy(path[0]).astype(np.float64)
    if eta == 0.0:
        np.testing.assert_allclose(x, np.cos(0.05 * np.pi) ** 10 * start, atol=1e-5)
    else:
        assert np.mean(x**2) == pytest.approx(0.679, rel=5 * np.sqrt(2 / 20000))


@every_process
def test_ddim_converges_to_the_flow_at_first_order(name):
    """Oracle 15: x_s = x_t √(V_s/V_t), with an error that halves when the steps do."""
    process = processes.get(name)
    denoiser, data = exact.GaussianMixture([[0.0]], 0.3, process=process), GaussianData(0.0, 0.3)
    grids = [np.linspace(0.8, 0.1, steps + 1) for steps in (25, 50, 100)]
    if process.num_timesteps is not None:
        grids = [np.rint(grid * 1000) / 1000 for grid in grids]
    flow = data.flow(1.0, moments(name, 0.8), moments(name, 0.1))
    steps = affine_steps(DDIM(), denoiser, [_as_float(grid) for grid in grids])
    errors = [abs(np.prod(slope) / flow - 1.0) for slope, _, _ in steps]
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    np.testing.assert_allclose(ratios, 2.0, atol=0.15)


def _as_float(x):
    return x.astype(oracles.FLOAT)


def test_the_flow_of_a_gaussian_in_the_loop():
    """The end of a long run is `sample_exact` of its start."""
    denoiser = exact.GaussianMixture([[0.3, -0.1]], 0.2, process="vp")
    x = np.random.default_rng(0).normal(size=(8, 2)).astype("float32")
    coarse, fine = (
        numpy(sample(denoiser, range(8), (2,), steps=steps, x=x)) for steps in (100, 400)
    )
    limit = numpy(denoiser.sample_exact(x))
    assert np.abs(fine - limit).max() < 0.35 * np.abs(coarse - limit).max() < 0.02


# The ends.


class Together(Sampler):
    """Runs several samplers side by side on x (B, K, ...), with the same keys."""

    def __init__(self, parts):
        self.parts = list(parts)

    def step(self, denoiser, carry, t, s, keys):
        x_0 = denoiser(carry[0], t)
        columns = []
        for i, part in enumerate(self.parts):
            column = Known(denoiser.process, x_0[:, i])
            columns.append(part.step(column, (carry[0][:, i],), t, s, keys)[0])
        return (ops.stack(columns, axis=1),)


class Known(Denoiser):
    """A denoised batch that has been computed already."""

    def __init__(self, process, x_0):
        self.process, self.x_0 = process, x_0

    def __call__(self, x_t, t):
        return self.x_0


class Constant(Denoiser):
    """x̂_0 is the same everywhere: data that are a single point."""

    def __init__(self, process, value):
        self.process, self.value = processes.get(process), value

    def __call__(self, x_t, t):
        return ops.full_like(x_t, self.value)


@pytest.mark.parametrize(("name", "steps"), [("linear", 1), ("sub_vp", 7), ("ve", 1), ("flow", 7)])
def test_no_noise_is_added_at_the_end(name, steps):
    """Pitfall 5: every sampler ends on x̂_0."""
    together = Together(SAMPLERS.values())
    x = sample(Constant(name, 0.7), range(3), (5, 2), sampler=together, steps=steps)
    np.testing.assert_allclose(numpy(x), 0.7, rtol=1e-6)


@every_process
def test_the_prior_has_the_spread_of_the_noisiest_state(name):
    """N(0, α² + σ²): data of unit variance as they are at t = 1."""
    denoiser = Constant(name, 0.0)
    x = numpy(samplers.prior(denoiser, random.keys(range(4000)), (5,)))
    alpha, sigma = PUBLISHED[name](1.0)
    assert np.mean(x**2) == pytest.approx(alpha**2 + sigma**2, rel=5 * np.sqrt(2 / x.size))
    assert abs(np.mean(x)) < 5 * np.sqrt((alpha**2 + sigma**2) / x.size)


class Clock(Sampler):
    """Its states are the times at which it was called, and it counts its steps in the carry."""

    def start(self, x_t, evaluations=None):
        return x_t, ops.zeros((), "int32")

    def step(self, denoiser, carry, t, s, keys):
        x, count = carry
        return ops.full_like(x, ops.cast(t, x.dtype)) + 0 * ops.cast(count, x.dtype), count + 1


class TellsTime(Denoiser):
    """Its x̂_0 is the time."""

    def __init__(self, process, latest=1.0):
        self.process, self.latest = processes.get(process), latest

    def __call__(self, x_t, t):
        return ops.full_like(x_t, ops.cast(t, x_t.dtype))


@pytest.mark.parametrize(
    ("process", "steps"), [("linear", 1), ("linear", 50), ("cosine", 1000), ("vp", 50)]
)
def test_sampling_starts_at_1_and_visits_the_grid(process, steps):
    """Pitfall 12: x̂_0 is asked for at 1, 1 − 1/N, …, 1/N."""
    _, path = sample(TellsTime(process), [0], (1,), sampler=Clock(), steps=steps, return_path=True)
    visited = numpy(path)[1:, 0, 0]
    np.testing.assert_allclose(visited, 1.0 - np.arange(steps) / steps, atol=1e-6)


def test_a_chain_of_one_step_a_level_visits_every_level():
    _, path = sample(TellsTime("linear"), [0], (1,), sampler=Clock(), steps=1000, return_path=True)
    np.testing.assert_array_equal(np.rint(numpy(path)[1:, 0, 0] * 1000), np.arange(1000, 0, -1))


def test_sampling_starts_where_the_denoiser_begins():
    denoiser = TellsTime("flow", latest=0.75)
    _, path = sample(denoiser, [0], (1,), sampler=Clock(), steps=3, return_path=True)
    np.testing.assert_allclose(numpy(path)[1:, 0, 0], [0.75, 0.5, 0.25], atol=1e-6)


def test_a_grid_of_ones_own():
    grid = [0.9, 0.5, 0.125]
    for given in (grid, np.array(grid)):
        _, path = sample(TellsTime("vp"), [0], (1,), sampler=Clock(), grid=given, return_path=True)
        np.testing.assert_allclose(numpy(path)[1:, 0, 0], grid, atol=1e-6)


@pytest.mark.parametrize(
    "grid", [[], [0.5, 0.5], [0.2, 0.4], [1.0, 0.0], [1.1, 0.5], [float("nan")], [0.5, -0.1]]
)
def test_grids_that_do_not_fall_are_refused(grid):
    with pytest.raises(
        ValueError, match=r"must (fall strictly within \(0, 1\]|be .*finite)\. Received"
    ):
        sample(TellsTime("vp"), [0], (1,), grid=grid)


def test_a_grid_beyond_the_denoiser_is_refused():
    with pytest.raises(ValueError, match=r"within \(0, 0.75\]"):
        sample(TellsTime("flow", latest=0.75), [0], (1,), grid=[1.0, 0.5])


def test_one_step_is_the_denoised_prior():
    denoiser = exact.GaussianMixture([[0.4], [-0.6]], [0.1, 0.02], process="ve")
    seeds = [3, 8, 9]
    start = samplers.prior(denoiser, random.keys(seeds), (1,))
    for sampler in ("ddim", "ddpm"):
        x = sample(denoiser, seeds, (1,), sampler=sampler, steps=1)
        np.testing.assert_allclose(numpy(x), numpy(denoiser(start, 1.0)), rtol=1e-5)


def test_the_path_begins_with_noise_and_ends_with_the_sample():
    denoiser = exact.GaussianMixture([[0.4, 0.1]], 0.2, process="vp")
    seeds, steps = range(4), 6
    x, path = sample(denoiser, seeds, (2,), sampler="ddpm", steps=steps, return_path=True)
    alone = sample(denoiser, seeds, (2,), sampler="ddpm", steps=steps)
    path = numpy(path)
    assert path.shape == (steps + 1, 4, 2)
    np.testing.assert_array_equal(path[-1], numpy(x))
    np.testing.assert_allclose(numpy(alone), numpy(x), atol=1e-6)
    start = samplers.prior(denoiser, random.keys(seeds), (2,))
    np.testing.assert_allclose(path[0], numpy(start), atol=1e-6)
    # The last state is the one that x̂_0 was computed from.
    np.testing.assert_allclose(path[-1], numpy(denoiser(path[-2], 1.0 / steps)), atol=1e-5)
    # Noise falls on the way.
    assert np.abs(np.diff(path, axis=0)).min() > 0


def test_sampling_can_stop_short_of_the_last_denoising():
    """Then the sample is a state at the grid's last time: of variance V there, not of the data."""
    process, count = processes.get("vp"), 4000
    denoiser, data = exact.GaussianMixture([[0.0]], 0.04, process=process), GaussianData(0, 0.04)
    grid = np.linspace(1.0, 0.25, 101)
    x, path = sample(denoiser, range(count), (1,), grid=grid, denoise_last=False, return_path=True)
    assert path.shape == (101, count, 1)
    np.testing.assert_array_equal(numpy(path)[-1], numpy(x))
    slope, _, _ = affine_step(DDIM(), denoiser, _as_float(grid[:-1]), _as_float(grid[1:]))
    np.testing.assert_allclose(numpy(x), np.prod(slope) * numpy(path)[0], atol=1e-4)
    spread = data.spread(*PUBLISHED["vp"](0.25))
    assert np.var(numpy(x)) == pytest.approx(spread, rel=5 * np.sqrt(2 / count) + 0.03)


def test_sampling_from_a_given_state():
    denoiser = exact.GaussianMixture([[0.4, 0.1]], 0.2, process="vp")
    start = numpy(samplers.prior(denoiser, random.keys([4, 5]), (2,)))
    for x in (start, start.tolist()):
        again = sample(denoiser, [4, 5], (2,), sampler="ddpm", steps=5, x=x)
        plain = sample(denoiser, [4, 5], (2,), sampler="ddpm", steps=5)
        np.testing.assert_allclose(numpy(again), numpy(plain), atol=1e-5)
    other = sample(denoiser, [4, 5], (2,), sampler="ddpm", steps=5, x=start + 1.0)
    assert np.abs(numpy(other) - numpy(plain)).min() > 1e-4


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 3)])
def test_a_state_without_a_row_for_each_seed_is_refused(shape):
    with pytest.raises(
        ValueError, match=r"one row of shape \(2,\) for each of the 2 seeds|x must be"
    ):
        sample(Constant("vp", 0.0), [0, 1], (2,), x=np.zeros(shape, "float32"))


def test_clipping_enters_the_noise_too():
    """Pitfall 21: with x̂_0 clipped to 1, ε̂ = (x_t − α_t)/σ_t."""
    t, s = np.array([0.9, 0.5]), np.array([0.5, 0.1])
    (alpha_t, sigma_t), (alpha_s, sigma_s) = PUBLISHED["vp"](t), PUBLISHED["vp"](s)
    clipped = Clipped(Constant("vp", 3.0))
    slope, offset, _ = affine_step(DDIM(), clipped, *map(_as_float, (t, s)))
    np.testing.assert_allclose(slope, sigma_s / sigma_t, rtol=1e-4)
    np.testing.assert_allclose(offset, alpha_s - sigma_s / sigma_t * alpha_t, rtol=1e-4)


# Seeds.


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_seed_gives_its_sample_in_any_batch(sampler):
    denoiser = exact.GaussianMixture([[0.4, 0.1], [-0.5, 0.3]], 0.02, process="cosine")
    arguments = {"shape": (2,), "sampler": sampler, "steps": 8}
    together = numpy(sample(denoiser, [5, 1, 9], **arguments))
    reversed_ = numpy(sample(denoiser, np.array([9, 1, 5]), **arguments))
    alone = numpy(sample(denoiser, 1, **arguments))
    np.testing.assert_allclose(reversed_[::-1], together, atol=1e-6)
    np.testing.assert_allclose(alone, together[1:2], atol=1e-6)
    assert len(np.unique(together.round(4), axis=0)) == 3


def test_the_noise_of_a_path_is_fresh_at_every_step():
    """The carry of a random walk shows its steps: uncorrelated, and with the prior too."""

    class Walk(Sampler):
        def step(self, denoiser, carry, t, s, keys):
            return (carry[0] + random.normal(keys, carry[0].shape[1:]),)

    _, path = sample(
        Constant("vp", 0.0), range(4000), (1,), sampler=Walk(), steps=6, return_path=True
    )
    path = numpy(path)[:-1, :, 0]
    noise = np.concatenate([path[:1], np.diff(path, axis=0)])
    correlation = np.corrcoef(noise) - np.eye(len(noise))
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)


# Names and arguments.


def test_steps_are_checked():
    denoiser = Constant("linear", 0.0)
    with pytest.raises(ValueError, match=r"steps=1001 exceeds the 1000 noise levels.*<= 1000"):
        sample(denoiser, [0], (1,), steps=1001)
    for steps in (0, -1, 2.5, True, "50", None):
        with pytest.raises(ValueError, match=rf"steps must be an integer >= 1.*{steps}"):
            sample(denoiser, [0], (1,), steps=steps)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown sampler 'dimm'.*Known: ddim, ddpm, deis"):
        sample(Constant("vp", 0.0), [0], (1,), sampler="dimm")
    with pytest.raises(ValueError, match=r"Unknown grid 'unifrom'. Did you mean 'uniform'"):
        sample(Constant("vp", 0.0), [0], (1,), grid="unifrom")


def test_misspelt_arguments_are_refused():
    with pytest.raises(TypeError, match="step_count"):
        sample(Constant("vp", 0.0), [0], (1,), step_count=5)


@pytest.mark.parametrize("seeds", [0.5, [0.5], "a", None, [[1, 2]]])
def test_seeds_are_integers(seeds):
    with pytest.raises(TypeError, match=r"Seeds must be one integer or a vector of them"):
        sample(Constant("vp", 0.0), seeds, (1,))


def test_sampler_arguments_are_checked():
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"eta must lie in \[0, 1\].*{eta}"):
            DDIM(eta=eta)
    with pytest.raises(ValueError, match=re.escape("Unknown variance 'postrior'. Did you mean")):
        DDPM(variance="postrior")


@every_sampler
def test_samplers_survive_serialization(sampler):
    config = keras.saving.serialize_keras_object(SAMPLERS[sampler])
    assert keras.saving.deserialize_keras_object(config) == SAMPLERS[sampler]


def test_every_name_makes_its_sampler():
    assert {"ddim", "ddpm"} <= set(samplers.names())
    assert samplers.get("ddim") == DDIM(0.0)
    assert samplers.get("ddpm") == DDPM("posterior")
    assert samplers.get(DDIM(0.3)) == DDIM(0.3)


# Beside another library.


@pytest.mark.parametrize("sampler", ["ddim", "ddim-1", "ddpm", "ddpm-beta"])
@pytest.mark.parametrize("steps", [8, 50])
def test_steps_agree_with_diffusers(sampler, steps, monkeypatch):
    """The same deterministic network on the linear chain, trailing spacing, step by step."""
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    from diffusers.schedulers import scheduling_ddpm

    common = {"beta_schedule": "linear", "clip_sample": False, "timestep_spacing": "trailing"}
    ours, process, keys = SAMPLERS[sampler], processes.get("linear"), random.keys(range(4))
    z = torch.tensor(numpy(random.normal(keys, (3,))))
    if isinstance(ours, DDIM):
        theirs = diffusers.DDIMScheduler(**common)
        extra = {"eta": ours.eta, "variance_noise": z if ours.eta else None}
    else:
        kind = {"posterior": "fixed_small", "beta": "fixed_large"}[ours.variance]
        theirs, extra = diffusers.DDPMScheduler(**common, variance_type=kind), {}
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: z)
    theirs.set_timesteps(steps)
    timesteps = theirs.timesteps.numpy()
    visited = numpy(times.grid("trailing", steps, process, dtype=oracles.FLOAT))
    np.testing.assert_array_equal(np.rint(visited * 1000).astype(int) - 1, timesteps)

    class Dummy(Denoiser):
        """Says that ε̂ = tanh x + t."""

        def __init__(self):
            self.process = process

        def __call__(self, x_t, t):
            noise = ops.tanh(x_t) + ops.cast(t, "float32")
            alpha, sigma = (ops.cast(f(t), "float32") for f in (process.alpha, process.sigma))
            return (x_t - sigma * noise) / alpha

    step = _all_in_one_graph(lambda x, t, s: ours.step(Dummy(), (x,), t, s, keys)[0])
    x = torch.tensor(np.random.default_rng(0).normal(size=(4, 3)).astype("float32"))
    for k, timestep in enumerate(timesteps):
        noise = torch.tanh(x) + float(visited[k])
        result = theirs.step(noise, int(timestep), x, **extra)
        if k + 1 < steps:
            after = result.prev_sample
            actual = step(x.numpy(), visited[k], visited[k + 1])
        else:  # they would add noise here under the large variance
            after = result.pred_original_sample
            actual = Dummy()(ops.convert_to_tensor(x.numpy()), visited[k])
        # Their table is a product of 1000 float32 numbers.
        size = float(after.abs().max())
        np.testing.assert_allclose(numpy(actual), after.numpy(), atol=5e-4 * size, rtol=0)
        x = after
