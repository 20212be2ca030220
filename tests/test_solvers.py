"""Solvers: their order of convergence, their published coefficients, what each one promises."""

from __future__ import annotations

import keras
import numpy as np
import oracles
import pytest
from keras import ops
from oracles import DOUBLE, FLOAT, PUBLISHED, GaussianData, numpy
from scipy import integrate as quadrature

from tfdiffusion import _backend, exact, processes, random, sample, samplers
from tfdiffusion.denoiser import Denoiser
from tfdiffusion.samplers import (
    DDIM,
    DDPM,
    DEIS,
    LMS,
    PLMS,
    RK4,
    RK45,
    DPMSolver,
    DPMSolverPP,
    Euler,
    EulerMaruyama,
    Heun,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    SDEDPMSolverPP,
    UniPC,
    integrate,
)
from tfdiffusion.samplers.extrapolation import FAR, mean
from tfdiffusion.samplers.sde import langevin

# Data: a Gaussian and a mixture of two, in the plane.
MEANS, VARIANCES, WEIGHTS = [[-0.7, 0.2], [0.5, -0.4]], [0.2, 0.1], [0.4, 0.6]
BEGIN, END = 0.6, 0.1


class Halves(Denoiser):
    """The first half of a batch is Gaussian, the second a mixture: one graph for both."""

    def __init__(self, process="vp"):
        self.process = processes.get(process)
        self.parts = [
            exact.GaussianMixture([[0.4, -0.2]], 0.3, process=self.process),
            exact.GaussianMixture(MEANS, VARIANCES, WEIGHTS, process=self.process),
        ]

    def __call__(self, x_t, t):
        halves = ops.split(x_t, 2, axis=0)
        return ops.concatenate([part(half, t) for part, half in zip(self.parts, halves)])


def true_states(x, grid):
    """The flow at the times of a grid: closed form, and SciPy on the mixture's true score."""
    gaussian, mixture = GaussianData(np.array([0.4, -0.2]), 0.3), oracles.MixtureData
    mixture = mixture(MEANS, VARIANCES, WEIGHTS)
    levels = [PUBLISHED["vp"](t) for t in grid]
    first = [gaussian.flow(x[:4], levels[0], level) for level in levels]

    def slope(t, state):
        x_t, (alpha, sigma), beta = state.reshape(4, 2), PUBLISHED["vp"](t), oracles.vp_beta(t)
        return (-0.5 * beta * (x_t + mixture_score(x_t, alpha, sigma))).ravel()

    def mixture_score(x_t, alpha, sigma):
        spread = alpha**2 * mixture.variances + sigma**2
        offset = x_t[:, None, :] - alpha * mixture.means
        logs = np.log(mixture.weights) - 0.5 * (offset**2).sum(-1) / spread - np.log(spread)
        share = np.exp(logs - logs.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        return -((share / spread)[..., None] * offset).sum(1)

    solution = quadrature.solve_ivp(
        slope, (grid[0], grid[-1]), x[4:].ravel(), "DOP853", grid, rtol=1e-11, atol=1e-11
    )
    second = solution.y.T.reshape(len(grid), 4, 2)
    return np.concatenate([first, second], axis=1)


class Begun(Sampler):
    """A multistep solver whose first steps are exact: its order is that of the steps after them."""

    def __init__(self, inner, states, count=4):
        self.inner, self.states, self.count = inner, states, count

    def start(self, x_t, evaluations=None):
        return *self.inner.start(x_t, evaluations), ops.zeros((), "int32")

    def step(self, denoiser, carry, t, s, keys):
        *inner, k = carry
        inner = list(self.inner.step(denoiser, tuple(inner), t, s, keys))
        known = k < self.count
        inner[0] = ops.where(known, self.states[k + 1], inner[0])
        if isinstance(self.inner, UniPC):  # keeps the corrected state as well
            inner[4] = ops.where(known, self.states[k], inner[4])
        return *inner, k + 1


def even_in(clock, count):
    """Times from BEGIN to END, evenly spaced in λ = ln(α/σ), in σ/α or in t."""
    dense = np.linspace(BEGIN, END, 20001)
    alpha, sigma = PUBLISHED["vp"](dense)
    along = {"lambda": np.log(alpha / sigma), "level": -sigma / alpha, "t": -dense}[clock]
    grid = np.interp(np.linspace(along[0], along[-1], count + 1), along, dense)
    grid[0], grid[-1] = BEGIN, END
    return grid


ORDERS = [
    (DDIM(), 1, "lambda"),
    (Euler(), 1, "t"),
    (Heun(), 2, "lambda"),
    (RK4(), 4, "lambda"),
    (DPMSolver(1), 1, "lambda"),
    (DPMSolver(2), 2, "lambda"),
    (DPMSolver(3), 3, "lambda"),
    (DPMSolverPP(1), 1, "lambda"),
    (DPMSolverPP(2), 2, "lambda"),
    (DPMSolverPP(3), 2, "lambda"),  # as published
    (DPMSolverPP(3, curvature=1.0), 3, "lambda"),
    (DPMSolverPP(2, midpoint=False), 2, "lambda"),
    (UniPC(2), 3, "lambda"),
    (UniPC(3), 4, "lambda"),
    (DEIS(2), 2, "lambda"),
    (DEIS(3), 3, "lambda"),
    (LMS(), 4, "lambda"),
    (PLMS(), 4, "level"),
    (PLMS(2), 2, "level"),
]


@pytest.mark.skipif(not DOUBLE, reason="float32 rounding hides the order")
@pytest.mark.parametrize(("sampler", "order", "clock"), ORDERS, ids=lambda p: str(p))
def test_order_of_convergence(sampler, order, clock):
    """Oracle 18: the slope of log error against log steps, on a Gaussian and on a mixture."""
    denoiser, x = Halves(), np.random.default_rng(0).normal(size=(8, 2))
    # Where the leading term is all there is, and rounding is not yet.
    first = {DPMSolverPP(3): 240, RK4(): 20, PLMS(): 480}.get(sampler, 120)
    counts = (first, 2 * first, 4 * first)

    @lambda function: _backend.compiled(function, ())
    def run(times, states, x):
        multistep = hasattr(sampler, "settles") or isinstance(sampler, UniPC)
        solver = Begun(sampler, states) if multistep else sampler
        return integrate(denoiser, solver, times, random.keys([0]), x, denoise_last=False)

    errors = []
    for count in counts:
        grid = even_in(clock, count)
        states = true_states(x, grid)
        error = numpy(run(grid, states, x)) - states[-1]
        errors.append([np.abs(error[:4]).max(), np.abs(error[4:]).max()])
    for column in np.log(errors).T:
        slope = -np.polyfit(np.log(counts), column, 1)[0]
        assert slope == pytest.approx(order, abs=0.2)


@pytest.mark.skipif(not DOUBLE, reason="float32 rounding hides the order")
@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (PLMS(4, "runge_kutta"), 4),
        (PLMS(3, "runge_kutta"), 3),
        (PLMS(2, "trapezoid"), 2),
        (PLMS(2), 2),
        (PLMS(4), 2),
    ],
    ids=str,
)
def test_a_start_up_s_order_is_that_of_the_run(sampler, order):
    """Where steps that are even in time are even in σ, from where nothing is known yet."""
    process = processes.EDM(sigma_min=0.05, sigma_max=1.0, rho=1.0)
    denoiser = exact.GaussianMixture(MEANS, VARIANCES, WEIGHTS, process=process)
    run = _backend.compiled(
        lambda times, x: integrate(denoiser, sampler, times, keys, x, denoise_last=False), ()
    )
    x, keys = np.random.default_rng(0).normal(size=(8, 2)), random.keys([0])
    truth, counts, errors = None, (480, 15, 30, 60), []
    for count in counts:
        end = numpy(run(np.linspace(1.0, 0.2, count + 1), x))
        truth = end if truth is None else truth
        errors.append(np.abs(end - truth).max())
    slope = -np.polyfit(np.log(counts[1:]), np.log(errors[1:]), 1)[0]
    assert slope > order - 0.3


@pytest.mark.parametrize(
    ("sampler", "steps", "expected"),
    [
        (PLMS(), 6, 6),
        (PLMS(4, "trapezoid"), 6, 7),
        (PLMS(4, "runge_kutta"), 6, 15),
        (PLMS(4, "runge_kutta"), 3, 9),
        (PLMS(1, "runge_kutta"), 3, 3),
        (PredictorCorrector(corrections=2, correct_last=True), 3, 9),
    ],
    ids=str,
)
def test_reports_count_what_begins_and_ends_a_run(sampler, steps, expected):
    """Evaluations in `steps` times, the last of them denoised."""
    denoiser = exact.GaussianMixture(MEANS, VARIANCES, WEIGHTS, process="ve")
    visited = samplers.loop.resolve_grid(denoiser, "uniform", steps, sampler)
    keys, asked = random.keys([0]), []

    class Counting(Denoiser):
        process = denoiser.process

        def __call__(self, x_t, t):
            asked.append(t)
            return denoiser(x_t, t)

    x = np.ones((1, 2), "float32")
    _, report = integrate(Counting(), sampler, visited, keys, x, return_report=True)
    assert int(report["evaluations"]) == expected
    if DOUBLE:  # where nothing is traced, each is a call
        assert len(asked) == expected


def test_ddim_may_clip_what_it_has_read_the_noise_off():
    class Constant(Denoiser):
        process = processes.get("vp")

        def __call__(self, x_t, t):
            return ops.convert_to_tensor(np.array([[3.0, 0.2]], FLOAT))

    sampler, denoiser, x_t = DDIM(clip=0.5), Constant(), np.array([[1.0, -0.4]], FLOAT)
    t, s = np.asarray(0.8, FLOAT), np.asarray(0.5, FLOAT)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = PUBLISHED["vp"](0.8), PUBLISHED["vp"](0.5)
    noise = (x_t - alpha_t * np.array([[3.0, 0.2]])) / sigma_t
    expected = alpha_s * np.array([[0.5, 0.2]]) + sigma_s * noise
    (x_s,) = sampler.step(denoiser, (x_t,), t, s, random.keys([0]))
    np.testing.assert_allclose(numpy(x_s), expected, rtol=1e-5)
    last = numpy(sampler.finish(denoiser, (x_t,), s, random.keys([0])))
    np.testing.assert_allclose(last, [[0.5, 0.2]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"clip must lie in \(0, inf\]\. Received clip=0"):
        DDIM(clip=0.0)


def test_a_measured_langevin_step_has_the_size_of_the_paper():
    """h = 2 (snr ‖z‖/‖∇ log q‖)² (arXiv:2011.13456, alg. 4), by the row."""
    denoiser = exact.GaussianMixture([[0.4, -0.2]], 0.3, process="ve")
    keys, t = random.fold_in(random.keys([3, 4]), 1), np.asarray(0.4, FLOAT)
    x = np.array([[1.0, 2.0], [-3.0, 0.5]], "float32")
    z, sigma = numpy(random.normal(keys, (2,))), PUBLISHED["ve"](0.4)[1]
    score = -(x - [0.4, -0.2]) / (0.3 + sigma**2)
    norms = [np.linalg.norm(part, axis=1, keepdims=True) for part in (z, score)]
    h = 2 * (0.1 * norms[0] / norms[1]) ** 2
    moved = numpy(langevin(denoiser, x, t, keys, 0.1, measured=True))
    np.testing.assert_allclose(moved, x + h * score + np.sqrt(2 * h) * z, rtol=1e-4)


# What is random has a weak order: that of the moments.


def variance_after(sampler, count, monkeypatch, streams=(None,)):
    """Variance at END of what starts at BEGIN with the right one, exactly, from impulses.

    On Gaussian data a run is linear in the noise of its steps; row r gets a 1 where step r draws.
    """
    process, data = processes.get("vp"), GaussianData(0.0, 0.3)
    grid = even_in("lambda", count)
    keys = random.keys(range(len(streams) * count + 2))
    fires = []
    for r in range(len(keys)):
        step = random.fold_in(keys[r : r + 1], r // len(streams) + 1)
        stream = streams[r % len(streams)]
        fires.append(step if stream is None else random.fold_in(step, stream))
    fires = ops.concatenate(fires)

    def impulse(keys, shape=()):
        fired = ops.all(ops.equal(keys, fires), axis=-1)
        return ops.cast(fired, FLOAT)[:, None] * ops.ones((1, *shape), FLOAT)

    monkeypatch.setattr(random, "normal", impulse)
    x = np.zeros((len(keys), 1), FLOAT)
    x[-1] = 1.0
    denoiser = exact.GaussianMixture([[0.0]], 0.3, process=process)
    run = _backend.compiled(
        lambda times, x: integrate(denoiser, sampler, times, keys, x, denoise_last=False), ()
    )
    x = numpy(run(grid.astype(FLOAT), x))[:, 0]
    started = data.spread(*PUBLISHED["vp"](BEGIN))
    # The last two rows draw nothing: their step numbers are beyond the run.
    return np.sum(x[:-2] ** 2) + x[-1] ** 2 * started, data.spread(*PUBLISHED["vp"](END))


@pytest.mark.skipif(not DOUBLE, reason="float32 rounding hides the order")
@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (DDPM(), 1),
        (DDIM(1.0), 1),
        (EulerMaruyama(), 1),
        (ReverseDiffusion(), 1),
        (SDEDPMSolverPP(), 2),
    ],
    ids=str,
)
def test_weak_order_of_convergence(sampler, order, monkeypatch):
    counts = (60, 120)
    errors = []
    for count in counts:
        with monkeypatch.context() as patch:
            variance, truth = variance_after(sampler, count, patch)
        errors.append(abs(variance - truth))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.2)


def test_a_corrector_moves_the_variance_to_where_it_belongs(monkeypatch):
    """A predictor's first-order error shrinks with Langevin steps behind it."""
    alone, truth = variance_after(ReverseDiffusion(), 20, monkeypatch)
    monkeypatch.undo()
    corrected = PredictorCorrector(snr=0.16, corrections=2)
    together, _ = variance_after(corrected, 20, monkeypatch, streams=(0, 1, 2))
    assert abs(together - truth) < 0.6 * abs(alone - truth)


@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve", "flow"])
def test_langevin_keeps_its_stationary_variance(name):
    """Oracle 6 with ε = 2h: variance V/(1 − h/(2V)), for any process (pitfall 20)."""
    process, t, snr = processes.get(name), np.asarray(0.4, FLOAT), 0.3
    alpha, sigma = PUBLISHED[name](t)
    spread, h = alpha**2 * 0.3 + sigma**2, 2 * (snr * sigma) ** 2
    variance = spread / (1 - h / (2 * spread))
    keys = random.keys(range(4000))
    x = (np.sqrt(variance) * numpy(random.normal(keys, (3,)))).astype("float32")
    denoiser = exact.GaussianMixture([[0.0] * 3], 0.3, process=process)
    run = _backend.compiled(lambda x, keys: langevin(denoiser, x, t, keys, snr), ())
    x = numpy(run(x, random.fold_in(keys, 1)))
    assert np.var(x) == pytest.approx(variance, rel=5 * np.sqrt(2 / x.size))


# The SDE view.


@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve", "edm", "continuous_cosine", "flow"])
def test_reverse_sde_and_flow_of_a_gaussian(name):
    """Drifts f x − g² ∇ log q and f x − ½ g² ∇ log q, with f and g from the published moments."""
    process, data = processes.get(name), GaussianData(0.4, 0.3)
    denoiser = exact.GaussianMixture([[0.4]], 0.3, process=process)
    t = np.array([0.15, 0.5, 0.85])
    alpha, sigma = PUBLISHED[name](t)
    f = oracles.slope(lambda u: np.log(PUBLISHED[name](u)[0]), t)
    square = oracles.slope(lambda u: PUBLISHED[name](u)[1] ** 2, t) - 2 * f * sigma**2
    x = np.array([0.7, -0.2, 1.1]) * np.maximum(sigma, 1.0)
    score = data.score(x, alpha, sigma)
    request = x[:, None].astype(FLOAT), t.astype(FLOAT)
    drift, velocity = denoiser.reverse_drift(*request), denoiser.velocity(*request)
    scale = np.abs(f * x) + np.abs(square * score)
    tolerance = 1e-4 if DOUBLE else 5e-3
    assert (np.abs(numpy(drift)[:, 0] - (f * x - square * score)) < tolerance * scale).all()
    assert (np.abs(numpy(velocity)[:, 0] - (f * x - square * score / 2)) < tolerance * scale).all()
    mean_t, deviation = process.marginal(np.full((3, 1), 0.7, FLOAT), t.astype(FLOAT))
    np.testing.assert_allclose(numpy(mean_t)[:, 0], 0.7 * alpha, rtol=1e-4)
    np.testing.assert_allclose(numpy(deviation)[:, 0], sigma, rtol=1e-4)


# Coefficients.


def weights_of(places, begin, end, rate, **arguments):
    """The coefficient of each value."""
    values = [np.eye(len(places))[i][:, None] for i in range(len(places))]
    places = [np.asarray(place, FLOAT) for place in places]
    return numpy(mean([v.astype(FLOAT) for v in values], places, begin, end, rate, **arguments))[
        :, 0
    ]


def test_even_steps_give_the_coefficients_of_adams():
    np.testing.assert_allclose(
        weights_of([0, -1, -2, -3], 0.0, 1.0, 0.0), np.array([55, -59, 37, -9]) / 24, rtol=1e-4
    )
    np.testing.assert_allclose(
        weights_of([1, 0, -1], 0.0, 1.0, 0.0), np.array([5, 8, -1]) / 12, rtol=1e-4
    )


@pytest.mark.parametrize("h", [0.05, 1.0, 6.0])
def test_weights_of_exponential_integrators(h):
    """∫ of the polynomial against e^{±(h − τ)}, by SciPy."""
    for rate in (-h, h):
        places = [0.0, -0.7 * h, -1.9 * h]

        def weight(x, rate=rate):
            return np.exp(rate * (1 - x / h))

        for j, actual in enumerate(weights_of(places, 0.0, h, rate)):
            others = [p for i, p in enumerate(places) if i != j]

            def basis(x, here=places[j], others=others):
                return np.prod([(x - o) / (here - o) for o in others])

            expected = quadrature.quad(lambda x: weight(x) * basis(x), 0, h)[0]
            expected /= quadrature.quad(weight, 0, h)[0]
            assert actual == pytest.approx(expected, rel=1e-7 if DOUBLE else 1e-3)


def test_values_that_are_not_there_weigh_nothing():
    for arguments in ({}, {"at_middle": True}, {"curvature": 0.5}):
        full = weights_of([0.0, -0.5, FAR], 0.0, 1.0, -1.0, **arguments)
        line = weights_of([0.0, -0.5], 0.0, 1.0, -1.0, **arguments)
        np.testing.assert_allclose(full, [*line, 0.0], atol=1e-6)
    np.testing.assert_allclose(weights_of([0.0, FAR], 0.0, 1.0, 1.0), [1.0, 0.0], atol=1e-6)
    # DPM-Solver++ 2M: (1 + 1/(2r)) and −1/(2r), with r the ratio of the last step to this.
    np.testing.assert_allclose(
        weights_of([0.0, -0.5], 0.0, 1.0, -1.0, at_middle=True), [2.0, -1.0], rtol=1e-6
    )


# All of them.

ALL = [samplers.get(name) for name in samplers.names()]
FRESH = ("ddpm", "sde_dpmpp_2m", "euler_maruyama", "reverse_diffusion", "predictor_corrector")
every_name = pytest.mark.parametrize("name", samplers.names())


class PointAndMixture(Denoiser):
    """Knows two rows of a single point, and more of a mixture; counts how often it is asked."""

    def __init__(self, process):
        self.process, self.asked = processes.get(process), 0
        self.point = exact.GaussianMixture([[0.7, -0.3]], 0.0, process=self.process)
        self.mixture = exact.GaussianMixture(MEANS, VARIANCES, WEIGHTS, process=self.process)

    def __call__(self, x_t, t):
        self.asked += 1
        first, rest = (t, t) if len(t.shape) == 0 else (t[:2], t[2:])
        return ops.concatenate([self.point(x_t[:2], first), self.mixture(x_t[2:], rest)])


@every_name
def test_what_every_sampler_promises(name):
    """From where there is no signal, with fewer steps than the order of some."""
    sampler, denoiser = samplers.get(name), PointAndMixture("flow")
    times = samplers.loop.resolve_grid(denoiser, "uniform", 3, sampler)

    @lambda function: _backend.compiled(function, ())
    def run(times, keys):
        x = samplers.prior(denoiser, keys, (2,), times[0])
        return integrate(denoiser, sampler, times, keys, x, return_report=True)

    x, report = run(times, random.keys([5, 1, 9, 5, 1, 3]))
    x, evaluations = numpy(x), numpy(report["evaluations"])
    # Data that are a point are found.
    np.testing.assert_allclose(x[:2], [[0.7, -0.3]] * 2, atol=2e-3)
    # A seed gives its sample in any batch and place; others give others.
    others = numpy(run(times, random.keys([2, 2, 1, 8, 9, 5]))[0])
    np.testing.assert_allclose(others[[4, 5, 2]], x[[2, 3, 4]], atol=2e-5)
    assert len(np.unique(x[2:].round(4), axis=0)) == 4
    # The report tells the evaluations that were made.
    if name == "rk45":
        assert evaluations.shape == (6,) and (evaluations > 7).all()
    else:
        assert evaluations == 2 * sampler.evaluations + 1
    if DOUBLE and name not in ("rk4", "rk45"):  # whose stages are a loop in the graph
        assert denoiser.asked == sampler.evaluations + 1


@every_name
def test_samplers_survive_serialization(name):
    sampler = samplers.get(name)
    config = keras.saving.serialize_keras_object(sampler)
    assert keras.saving.deserialize_keras_object(config) == sampler


def test_orders_and_arguments_are_checked():
    for make, most in ((DPMSolverPP, 3), (UniPC, 3), (DEIS, 4), (LMS, 4), (PLMS, 4)):
        for order in (0, most + 1):
            with pytest.raises(
                ValueError, match=rf"has orders 1 to {most}. Received order={order}"
            ):
                make(order=order)
    with pytest.raises(ValueError, match=r"DPMSolver has orders 1 to 3. Received order=4"):
        DPMSolver(4)
    with pytest.raises(ValueError, match=r"churn must lie in \[0, inf\)\. .*churn=-1"):
        Heun(churn=-1)
    with pytest.raises(ValueError, match=r"Unknown start-up 'heun'"):
        PLMS(start_up="heun")
    with pytest.raises(ValueError, match=r"snr must be positive and finite\. .*snr=0"):
        PredictorCorrector(snr=0.0)
    with pytest.raises(ValueError, match=r"Unknown sampler 'reverse'"):
        PredictorCorrector(predictor="reverse")
    with pytest.raises(ValueError, match=r"rtol must be positive and finite\. .*rtol=0"):
        RK45(rtol=0.0)


def test_a_sampler_that_needs_signal_starts_where_there_is_some():
    denoiser = exact.GaussianMixture([[0.4]], 0.3, process="flow")
    _, path = sample(
        denoiser, [0], (1,), sampler="euler_maruyama", steps=3, grid="uniform", return_path=True
    )
    assert np.isfinite(numpy(path)).all()
    with pytest.raises(ValueError, match=r"within \(0, 0.999\].*singular"):
        sample(denoiser, [0], (1,), sampler="euler_maruyama", grid=[1.0, 0.5])
    chain = processes.zero_terminal_snr(processes.get("linear"))
    with pytest.raises(ValueError, match=r"EulerMaruyama are infinite where.*zero terminal SNR"):
        sample(exact.GaussianMixture([[0.4]], process=chain), [0], (1,), sampler="euler_maruyama")


# Runge–Kutta with steps of its own.


def test_rk45_meets_its_tolerance():
    denoiser = exact.GaussianMixture([[0.4, -0.2]], 0.3, process="vp")
    x = np.random.default_rng(0).normal(size=(6, 2)).astype("float32")
    flow = GaussianData(np.array([0.4, -0.2]), 0.3)
    truth = flow.flow(x, PUBLISHED["vp"](1.0), PUBLISHED["vp"](1e-3))
    evaluations = []
    for tolerance in (1e-2, 1e-3, 1e-4):
        y, report = sample(
            denoiser,
            range(6),
            (2,),
            sampler=RK45(tolerance, tolerance),
            grid=[1.0, 1e-3],
            x=x,
            denoise_last=False,
            return_report=True,
        )
        assert np.abs(numpy(y) - truth).max() < 10 * tolerance
        assert report["finished"].all()
        evaluations.append(report["evaluations"].max())
    assert evaluations == sorted(evaluations) and evaluations[0] < evaluations[-1] < 300


def test_rk45_says_how_far_it_got():
    denoiser = exact.GaussianMixture(MEANS, 1e-4, process="vp")
    with pytest.raises(RuntimeError, match=r"no further than t = 0\.\d+ in 20 .*2 of 2 samples"):
        sampler = RK45(rtol=1e-6, atol=1e-6, max_evaluations=20)
        sample(denoiser, [0, 1], (2,), sampler=sampler, grid=[1.0, 1e-3])


# Churn.


def test_churn_is_fresh_noise_that_keeps_the_distribution():
    """On Gaussian data: the variance of what comes out; and it does something."""
    denoiser = exact.GaussianMixture([[0.0]], 0.3, process="edm")
    x = numpy(sample(denoiser, range(4000), (1,), sampler=Heun(churn=0.3), steps=60))
    assert np.var(x) == pytest.approx(0.3, rel=5 * np.sqrt(2 / 4000) + 0.02)
    plain, churned = (
        numpy(sample(denoiser, [0], (1,), sampler=Heun(churn=churn), steps=5))
        for churn in (0.0, 0.3)
    )
    assert abs(plain - churned).max() > 1e-3
    # Outside its range of levels nothing is stirred.
    still = Heun(churn=0.3, churn_from=1e3)
    np.testing.assert_allclose(numpy(sample(denoiser, [0], (1,), sampler=still, steps=5)), plain)


# There and back.


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "unipc_2", "heun", "dpm_solver_2"])
def test_codes_and_reconstructions(sampler):
    """Data go to the code that the flow gives them, and come back."""
    denoiser = exact.GaussianMixture([[0.4, -0.2]], 0.3, process="vp")
    x_0 = np.random.default_rng(0).normal(size=(4, 2)).astype("float32") * 0.5 + 0.1
    grid = np.linspace(1.0, 0.01, 60)
    code = samplers.encode(denoiser, x_0, sampler=sampler, grid=grid)
    data = GaussianData(np.array([0.4, -0.2]), 0.3)
    start = PUBLISHED["vp"](0.01)
    truth = data.flow(start[0] * x_0, start, PUBLISHED["vp"](1.0))
    coarse = sampler == "ddim"
    np.testing.assert_allclose(numpy(code), truth, atol=0.12 if coarse else 0.02)
    again = samplers.decode(denoiser, code, sampler=sampler, grid=grid)
    assert np.abs(numpy(again) - x_0).max() < (0.1 if coarse else 0.02)


def test_reconstruction_error_falls_with_the_steps():
    denoiser = exact.GaussianMixture(MEANS, 0.02, process="linear")
    x_0, _ = denoiser.draw(32, seed=1)
    errors = [
        np.mean((numpy(samplers.reconstruct(denoiser, x_0, steps=steps)) - x_0) ** 2)
        for steps in (10, 20, 50)
    ]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_what_draws_noise_cannot_encode():
    denoiser = exact.GaussianMixture([[0.0]], process="vp")
    for name in (*FRESH, "rk45"):
        with pytest.raises(ValueError, match="cannot encode: it draws fresh noise"):
            samplers.encode(denoiser, np.zeros((1, 1)), sampler=name)


def test_slerp():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 2, 4)).astype("float32")
    np.testing.assert_allclose(numpy(samplers.slerp(a, b, 0.0)), a, atol=1e-6)
    np.testing.assert_allclose(numpy(samplers.slerp(a, b, 1.0)), b, atol=1e-6)
    np.testing.assert_allclose(numpy(samplers.slerp(a, a, 0.3)), a, atol=1e-5)
    # Unit vectors at a right angle: (cos, sin) of the share.
    x, y = np.eye(2, dtype="float32")[:, None]
    angle = 0.3 * np.pi / 2
    between = numpy(samplers.slerp(x, y, 0.3))
    np.testing.assert_allclose(between, [[np.cos(angle), np.sin(angle)]], atol=1e-6)
    # Long codes keep their length.
    a, b = rng.normal(size=(2, 1, 10000)).astype("float32")
    middle = numpy(samplers.slerp(a, b, np.array([0.5], "float32")))
    assert np.sum(middle**2) == pytest.approx(np.sum(a**2), rel=0.05)


def test_interpolation_ends_where_it_should():
    denoiser = exact.GaussianMixture([[0.4, -0.2]], 0.3, process="vp")
    first, second = np.float32([[0.1, 0.2]]), np.float32([[0.9, -0.6]])
    between = numpy(
        samplers.interpolate(denoiser, first, second, (0.0, 0.5, 1.0), sampler="heun", steps=40)
    )
    assert between.shape == (3, 1, 2)
    np.testing.assert_allclose(between[0], first, atol=0.03)
    np.testing.assert_allclose(between[2], second, atol=0.03)


# Beside another library.


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m", "unipc_2", "unipc_3", "lms"])
def test_runs_agree_with_diffusers(name):
    """The same exact denoiser, noise and trailing grid give the same samples."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    common = {"beta_schedule": "linear", "timestep_spacing": "trailing"}
    kind = {
        "dpmpp": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
        "lms": diffusers.LMSDiscreteScheduler,
    }[name.split("_")[0]]
    if name != "lms":
        common["solver_order"] = int(name.split("_")[1][0])
    theirs = kind(**common)
    theirs.set_timesteps(10)
    denoiser = exact.GaussianMixture(MEANS, VARIANCES, WEIGHTS, process="linear")
    start = np.random.default_rng(0).normal(size=(4, 2)).astype("float32")
    ours = numpy(sample(denoiser, range(4), (2,), sampler=name, steps=10, x=start))
    noise = _backend.compiled(denoiser.noise, ())
    x = torch.tensor(start)
    if name == "lms":  # its state is x/α
        x = x / float(PUBLISHED["linear"](1.0)[0])
    for timestep in theirs.timesteps:
        x_t = theirs.scale_model_input(x, timestep)
        epsilon = numpy(
            noise(x_t.numpy().astype("float32"), np.asarray((int(timestep) + 1) / 1000))
        )
        x = theirs.step(torch.tensor(epsilon), timestep, x).prev_sample
    np.testing.assert_allclose(ours, x.numpy(), atol=1e-4)
