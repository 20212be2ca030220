"""Every process against the moments of its paper and the laws that any of them keeps."""

from __future__ import annotations

import json

import keras
import numpy as np
import oracles
import pytest
from keras import ops
from oracles import DOUBLE, FLOAT, PUBLISHED, assert_close, numpy

from tfdiffusion import _backend, processes
from tfdiffusion.processes import Tabulated

# Mostly 1000 steps or 1000 times: JAX compiles every operation once for each shape.
BETAS = np.linspace(1e-3, 0.02, 1000)
SIGMAS = np.geomspace(0.01, 50.0, 1000)

MAKE = {name: lambda name=name: processes.get(name) for name in processes.names()} | {
    "from_betas": lambda: Tabulated.from_betas(BETAS),
    "from_sigmas": lambda: Tabulated.from_sigmas(SIGMAS),
    "zero_terminal": lambda: processes.zero_terminal_snr(processes.get("scaled_linear")),
    "interpolated": lambda: processes.Interpolated(processes.get("linear")),
}
MOMENTS = PUBLISHED | {
    "from_betas": oracles.chain(BETAS),
    "from_sigmas": oracles.ladder(SIGMAS),
    "zero_terminal": oracles.zero_terminal(oracles.scaled_linear_betas()),
    "interpolated": PUBLISHED["linear"],  # at the steps of its chain
}
CONTINUOUS = ["vp", "sub_vp", "ve", "flow", "edm", "continuous_cosine"]
CHAINS = [name for name in MAKE if name not in (*CONTINUOUS, "interpolated")]

every = pytest.mark.parametrize("name", MAKE)
chains = pytest.mark.parametrize("name", CHAINS)
continuous = pytest.mark.parametrize("name", CONTINUOUS)


def all_times(process):
    """Times from 0 to 1: every step of a chain."""
    return np.linspace(0.0, 1.0, (process.num_timesteps or 1000) + 1).astype(FLOAT)


def pairs(process):
    """(t, s) with s < t: neighbours, far apart, and s at the data."""
    t = all_times(process)
    now = np.r_[t[2:-1:7], t[[-2, -2, len(t) // 2]]]
    then = np.r_[t[1:-2:7], t[[1, len(t) // 3, 0]]]
    return now, then


# Moments.


@every
def test_moments_are_the_published_ones(name):
    process = MAKE[name]()
    t = all_times(process)
    alpha, sigma = MOMENTS[name](t)
    # Near t = 1 a float32 angle leaves the cosine an absolute error only.
    assert_close(process.alpha(t), alpha, single=2e-6)
    assert_close(process.sigma(t), sigma, single=2e-6)


@every
def test_alpha_starts_at_one_and_falls(name):
    process = MAKE[name]()
    t = all_times(process)
    alpha, sigma = numpy(process.alpha(t)), numpy(process.sigma(t))
    assert alpha[0] == pytest.approx(1.0, abs=1e-6)
    assert (np.diff(alpha) <= 0).all() and (alpha[:-1] > 0).all() and alpha[-1] >= 0
    assert (sigma[1:] > 0).all() and sigma[0] < 0.011
    assert np.isfinite(sigma).all()


@every
def test_signal_to_noise_ratio_falls_strictly(name):
    process = MAKE[name]()
    t = all_times(process)
    log_snr = numpy(process.log_snr(t))
    assert (log_snr[1:] < log_snr[:-1]).all()
    with np.errstate(divide="ignore"):
        expected = np.log(oracles.snr(MOMENTS[name], t.astype("float64")))
    # Where no signal or no noise is left, it is infinite, and never NaN.
    np.testing.assert_array_equal(np.isinf(log_snr), np.isinf(expected))
    finite = np.isfinite(expected)
    assert_close(log_snr[finite], expected[finite], double=1e-7, single=1e-3)


def test_small_times_keep_their_relative_precision():
    # Written as √(1 − α²), float32 would know σ(1e-5) to 3% only.
    t = np.float32([1e-5, 1e-4])
    for name in ("vp", "sub_vp", "flow"):
        _, sigma = MOMENTS[name](t)
        np.testing.assert_allclose(numpy(processes.get(name).sigma(t)), sigma, rtol=1e-5)


@pytest.mark.parametrize(
    "name, expected",
    # Lin et al. 2023 (arXiv:2305.08891), table 1: √ᾱ_T; Song et al. 2021: exp(−10.05).
    [
        ("linear", 0.006353),
        ("scaled_linear", 0.068265),
        ("cosine", 4.928e-5),
        ("vp", np.exp(-10.05 / 2)),
    ],
)
def test_signal_left_at_the_end(name, expected):
    assert float(processes.get(name).alpha(1.0)) == pytest.approx(expected, rel=2e-4)


def test_prior_term_of_the_linear_chain():
    # 7.3e-6 bits a dimension with E x_0² = 1/4 (oracle 10).
    process = processes.get("linear")
    alpha, sigma = float(process.alpha(1.0)), float(numpy(process.sigma(np.ones((), FLOAT))))
    bits = oracles.kl(alpha * 0.5, sigma**2, 0.0, 1.0) / np.log(2)
    assert bits == pytest.approx(7.3e-6, abs=5e-8 if DOUBLE else 2e-7)


# Shapes and numbers.


@pytest.mark.parametrize("name", ["linear", *CONTINUOUS])
def test_any_shape_and_kind_of_time(name):
    process = MAKE[name]()
    methods = ("alpha", "sigma", "log_snr", "inverse_log_snr", "snap", "quantile")
    for method in (*methods, "drift", "diffusion"):
        f = getattr(process, method)
        value, one = f(np.full((2, 2), 0.5, dtype="float32")), f(0.5)
        assert value.shape == (2, 2) and np.shape(one) == (), method
        np.testing.assert_allclose(numpy(value), float(one), rtol=1e-5)
        assert keras.backend.standardize_dtype(value.dtype) == "float32", method


@every
def test_whole_numbers_are_times(name):
    process = MAKE[name]()
    for f in (process.alpha, process.sigma, process.snap):
        np.testing.assert_array_equal(numpy(f(np.array([0, 1]))), numpy(f(np.float32([0, 1]))))
        assert float(f(1)) == float(f(1.0))


@pytest.mark.skipif(not DOUBLE, reason="JAX has float64 only where x64 is on")
@every
def test_double_precision_is_kept(name):
    process = MAKE[name]()
    t = ops.convert_to_tensor(np.array([0.25, 0.5]))
    for method in ("alpha", "sigma", "log_snr", "drift", "diffusion", "snap", "inverse_log_snr"):
        assert getattr(process, method)(t).dtype == "float64", method


@pytest.mark.parametrize("name", ["cosine", "vp", "flow"])
def test_methods_compile(name):
    process = MAKE[name]()

    def everything(t, s):
        values = [*process.transition(t, s), *process.posterior(t, s), *process.slopes(t)]
        return [*values, process.drift(t), process.diffusion(t), process.inverse_log_snr(-t)]

    t, s = (ops.convert_to_tensor(np.array(v, dtype=FLOAT)) for v in ([0.75, 0.5], [0.5, 0.125]))
    for eager, compiled in zip(everything(t, s), _backend.compiled(everything, ())(t, s)):
        np.testing.assert_allclose(numpy(compiled), numpy(eager), rtol=1e-4)


# The inverse.


@every
def test_inverse_of_the_log_snr(name):
    process = MAKE[name]()
    t = all_times(process)[1:]
    back = process.inverse_log_snr(process.log_snr(t))
    np.testing.assert_allclose(numpy(back), t, atol=1e-9 if DOUBLE else 2e-6)


@every
def test_inverse_log_snr_stops_at_the_ends(name):
    process = MAKE[name]()
    first, last = numpy(process.inverse_log_snr(np.array([60.0, -60.0], dtype=FLOAT)))
    assert first == (1.0 / process.num_timesteps if process.num_timesteps else 0) or first < 1e-9
    # Only a process without signal at the end has such a low ratio before it.
    assert last == pytest.approx(1.0, abs=2.0 / (process.num_timesteps or 1e6))


# Transitions and posteriors (oracles 8 and 11).


@every
def test_transition_composes_with_the_marginal(name):
    process = MAKE[name]()
    t, s = pairs(process)
    alpha_ratio, variance = (numpy(v).astype("float64") for v in process.transition(t, s))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = MOMENTS[name](t), MOMENTS[name](s)
    assert (variance > 0).all()
    assert_close(alpha_ratio * alpha_s, alpha_t, single=2e-6)
    assert_close(variance, sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2, single=1e-4, floor=0.02)
    # The noise of the first jump, carried on, and that of the second make up the marginal's.
    assert_close(np.sqrt(alpha_ratio**2 * sigma_s**2 + variance), sigma_t, single=2e-5)


@every
def test_two_transitions_are_one(name):
    process = MAKE[name]()
    t = all_times(process)
    u, s, t = t[len(t) // 5], t[len(t) // 2], t[-2]
    whole = [float(v) for v in process.transition(t, u)]
    first, second = ([float(v) for v in process.transition(*p)] for p in ((s, u), (t, s)))
    assert first[0] * second[0] == pytest.approx(whole[0], rel=1e-5)
    assert second[0] ** 2 * first[1] + second[1] == pytest.approx(whole[1], rel=1e-5)


@every
def test_posterior_is_bayes_rule(name):
    process = MAKE[name]()
    t, s = pairs(process)
    moments_t, moments_s = MOMENTS[name](t), MOMENTS[name](s)
    c_0, c_t, variance = (numpy(v).astype("float64") for v in process.posterior(t, s))
    # The mean is linear in x_0 and x_t: two probes give both coefficients.
    mean_0, expected = oracles.posterior(moments_t, moments_s, 1.0, 0.0)
    mean_t, _ = oracles.posterior(moments_t, moments_s, 0.0, 1.0)
    assert_close(c_0, mean_0, single=1e-4)
    assert_close(c_t, mean_t, single=1e-4)
    assert_close(variance, expected, single=1e-4, floor=0.02)


@every
def test_posterior_averages_to_the_marginal(name):
    process = MAKE[name]()
    t, s = pairs(process)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = MOMENTS[name](t), MOMENTS[name](s)
    c_0, c_t, variance = (numpy(v).astype("float64") for v in process.posterior(t, s))
    assert_close(c_0 + c_t * alpha_t, alpha_s, single=1e-5)
    assert_close(variance + (c_t * sigma_t) ** 2, sigma_s**2, single=1e-5)


@every
def test_posterior_at_the_data_is_the_data(name):
    process = MAKE[name]()
    if float(process.sigma(0.0)) > 0.0:
        pytest.skip("this process keeps some noise at t = 0")
    first = 1.0 / (process.num_timesteps or 1000)
    for t in (first, 0.5, 1.0):
        assert [float(v) for v in process.posterior(t, 0.0)] == pytest.approx([1, 0, 0], abs=1e-6)


def test_posterior_of_ddpm():
    # Ho et al. 2020, eq. 7, in their own symbols.
    process = processes.get("linear")
    beta = oracles.linear_betas()
    alpha_bar = np.cumprod(1 - beta)
    i = np.array([2, 10, 500, 1000])  # 1-based, as in the paper
    beta_i, now, before = beta[i - 1], alpha_bar[i - 1], alpha_bar[i - 2]
    c_0, c_t, variance = process.posterior((i / 1000).astype(FLOAT), ((i - 1) / 1000).astype(FLOAT))
    tolerance = {"double": 1e-8, "single": 2e-4, "floor": 1e-4}
    assert_close(c_0, np.sqrt(before) * beta_i / (1 - now), **tolerance)
    assert_close(c_t, np.sqrt(1 - beta_i) * (1 - before) / (1 - now), **tolerance)
    assert_close(variance, (1 - before) / (1 - now) * beta_i, **tolerance)


@pytest.mark.parametrize(
    "step, before, expected", [(420, 400, 0.14771), (980, 960, 0.3246), (487, 486, 0.00979)]
)
def test_posterior_variance_of_skipped_steps(step, before, expected):
    # What diffusers' own tests ask of its DDIM scheduler, linear betas, 0-based steps.
    _, _, variance = processes.get("linear").posterior((step + 1) / 1000, (before + 1) / 1000)
    assert float(variance) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("name, length", [("linear", 300), ("cosine", 300), ("from_sigmas", 300)])
def test_a_chain_of_transitions_ends_at_the_marginal(name, length):
    # Drawn step by step: noise scaled by β for √β, or α for √α, ends elsewhere.
    process, draws = MAKE[name](), 20000
    generator = np.random.default_rng(0)
    steps = np.arange(length + 1, dtype=FLOAT) / np.array(process.num_timesteps, dtype=FLOAT)
    moments = process.transition(steps[1:], steps[:-1])
    x = np.full(draws, 1.5)
    for alpha_ratio, variance in zip(*(numpy(m) for m in moments)):
        x = alpha_ratio * x + np.sqrt(variance) * generator.standard_normal(draws)
    alpha, sigma = MOMENTS[name](length / process.num_timesteps)
    assert x.mean() == pytest.approx(1.5 * alpha, abs=4 * sigma / np.sqrt(draws))
    assert x.var() == pytest.approx(sigma**2, rel=4 * np.sqrt(2 / draws))


# The stochastic differential equation.


@continuous
def test_the_equation_has_the_marginals_of_the_process(name):
    # dα/dt = f α and dσ²/dt = 2 f σ² + g², the published moments differentiated numerically.
    t = np.linspace(0.02, 0.98, 9)
    alpha, sigma = MOMENTS[name](t)
    d_alpha = oracles.slope(lambda u: MOMENTS[name](u)[0], t)
    d_variance = oracles.slope(lambda u: MOMENTS[name](u)[1] ** 2, t)
    process = MAKE[name]()
    f, g = (numpy(v).astype("float64") for v in (process.drift(t), process.diffusion(t)))
    assert_close(f * alpha, d_alpha, double=1e-6, single=1e-4)
    assert_close(2 * f * sigma**2 + g**2, d_variance, double=1e-6, single=1e-3)


@continuous
def test_slopes(name):
    t = np.linspace(0.02, 0.98, 9)
    for k, slope in enumerate(MAKE[name]().slopes(t)):
        expected = oracles.slope(lambda u, k=k: MOMENTS[name](u)[k], t)
        assert_close(slope, expected, double=1e-6, single=1e-4)


def test_published_equations():
    t = np.linspace(0.02, 0.98, 9)
    beta = oracles.vp_beta(t)
    flow, edm = processes.get("flow"), processes.get("edm")
    expected = {
        "vp": (-beta / 2, beta),
        "sub_vp": (-beta / 2, beta * -np.expm1(-2 * oracles.vp_integral(t))),
        "ve": (0 * t, MOMENTS["ve"](t)[1] ** 2 * 2 * np.log(50 / 0.01)),
        "flow": (-1 / (1 - t), 2 * t / (1 - t)),
        "edm": (0 * t, oracles.slope(lambda u: MOMENTS["edm"](u)[1] ** 2, t)),
    }
    for name, (f, g_squared) in expected.items():
        process = processes.get(name)
        assert_close(process.drift(t), f, double=1e-8)
        assert_close(numpy(process.diffusion(t)) ** 2, g_squared, double=1e-6, single=1e-3)
    assert [float(v) for v in flow.slopes(1.0)] == [-1.0, 1.0]  # where f and g are infinite
    assert float(edm.slopes(1.0)[0]) == 0.0


@chains
def test_slopes_drift_and_diffusion_of_a_chain_are_its_last_step(name):
    process = MAKE[name]()
    steps = process.num_timesteps
    i = np.arange(1, steps + 1)
    t = (i / steps).astype(FLOAT)
    alphas, sigmas = MOMENTS[name](np.arange(steps + 1) / steps)
    for slope, table in zip(process.slopes(t), (alphas, sigmas)):
        assert_close(slope, steps * np.diff(table), single=1e-3)
    ratio = alphas[1:] / alphas[:-1]
    added = sigmas[1:] ** 2 - (ratio * sigmas[:-1]) ** 2
    assert_close(np.exp(numpy(process.drift(t)) / steps), ratio, single=1e-5)
    assert_close(numpy(process.diffusion(t)) ** 2, steps * added, double=1e-8, single=1e-3)


def test_a_fine_chain_approaches_the_equation():
    # β_i = β(i/T)/T is the VP-SDE in small steps (Song et al. 2021, app. B).
    steps = 4000
    chain = Tabulated.from_betas(oracles.vp_beta(np.arange(1, steps + 1) / steps) / steps)
    vp = processes.get("vp")
    t = (np.arange(400, steps + 1, 450) / steps).astype(FLOAT)
    for method in ("alpha", "sigma", "drift", "diffusion"):
        a, b = (numpy(getattr(p, method)(t)) for p in (chain, vp))
        np.testing.assert_allclose(a, b, atol=0.02, rtol=0.01, err_msg=method)


# Chains.


@chains
def test_betas_rebuild_the_chain(name):
    process = MAKE[name]()
    if name == "from_sigmas":
        np.testing.assert_array_equal(process.betas, np.zeros(len(SIGMAS)))
        return
    betas = process.betas
    assert betas.shape == (process.num_timesteps,) and betas.dtype == np.float64
    alphas, _ = MOMENTS[name](np.arange(1, process.num_timesteps + 1) / process.num_timesteps)
    np.testing.assert_allclose(np.cumprod(1 - betas), alphas**2, rtol=1e-9, atol=1e-15)
    t = all_times(process)
    assert_close(Tabulated.from_betas(betas).sigma(t), numpy(process.sigma(t)), single=1e-6)


def test_beta_tables():
    # DDPM, latent diffusion, and improved DDPM with its last beta clipped.
    for name, betas in [
        ("linear", oracles.linear_betas()),
        ("scaled_linear", oracles.scaled_linear_betas()),
        ("sigmoid", oracles.sigmoid_betas()),
        ("cosine", oracles.cosine_betas()),
    ]:
        np.testing.assert_allclose(processes.get(name).betas, betas, rtol=1e-9)
    assert processes.get("cosine").betas[-1] == pytest.approx(0.999, abs=1e-12)


@pytest.mark.parametrize("cls", [processes.LinearBeta, processes.ScaledLinearBeta])
def test_shorter_chains_add_as_much_noise(cls):
    # The ends scale with 1000/T, hence ∑β and the log of ᾱ_T stay.
    reference = np.log(float(cls(1000).alpha(1.0)))
    for steps in (100, 250, 4000):
        assert np.log(float(cls(steps).alpha(1.0))) == pytest.approx(reference, rel=0.12)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_strided_betas_restore_the_kept_steps(name):
    # Oracle 29: a chain of every 40th step is a chain of its own.
    kept = np.arange(40, 1001, 40)
    alpha, _ = MOMENTS[name](kept / 1000)
    alpha_bar = alpha**2
    strided = Tabulated.from_betas(1 - alpha_bar / np.r_[1.0, alpha_bar[:-1]])
    process = MAKE[name]()
    t = np.arange(1, 26) / 25
    for method in ("alpha", "sigma"):
        whole = numpy(getattr(process, method)((kept / 1000).astype(FLOAT)))
        np.testing.assert_allclose(numpy(getattr(strided, method)(t)), whole, rtol=1e-6)


@chains
def test_times_round_to_steps(name):
    process = MAKE[name]()
    steps = process.num_timesteps
    i = np.arange(steps + 1)
    for shift in (-0.4, 0.0, 0.4):
        t = np.clip((i + shift) / steps, 0, 1).astype(FLOAT)
        np.testing.assert_array_equal(numpy(process.index(t)), i)
        np.testing.assert_array_equal(numpy(process.alpha(t)), numpy(process.alpha(i / steps)))
        snapped = numpy(process.snap(t))
        np.testing.assert_allclose(snapped * steps, np.maximum(i, 1), rtol=1e-5)
        assert (snapped > 0).all() and (snapped <= 1).all()


def test_halves_round_the_same_in_both_precisions():
    # (1 − k/80) 1000 ends in .5 for odd k; rounding error must not choose the step.
    process = processes.get("linear")
    k = np.arange(80)
    steps = [
        np.rint(1000 * numpy(process.snap(1 - k.astype(dtype) / np.array(80, dtype)))).astype(int)
        for dtype in ("float32", FLOAT)
    ]
    exact = (80 - k) * 1000 / 80
    np.testing.assert_array_equal(steps[0], steps[1])
    np.testing.assert_array_equal(steps[0], np.ceil(exact - 0.5))


def test_continuous_times_stay():
    t = np.float32([1e-5, 0.3, 1.0])
    np.testing.assert_array_equal(numpy(processes.get("vp").snap(t)), t)


def test_zero_terminal_snr():
    original = processes.get("scaled_linear")
    process = processes.zero_terminal_snr(original)
    t = all_times(process)
    alpha, sigma = numpy(process.alpha(t)), numpy(process.sigma(t))
    assert alpha[-1] == 0.0 and sigma[-1] == 1.0
    assert alpha[1] == numpy(original.alpha(t))[1]
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=1e-6)
    # The noise of the first step comes out to full precision, though 1 − α² is small there.
    _, published = MOMENTS["zero_terminal"](t)
    np.testing.assert_allclose(sigma[1:5], published[1:5], rtol=1e-6)
    # Whatever is read at the end is finite: the whole of x_T is fresh noise.
    assert [float(v) for v in process.transition(1.0, 0.5)] == [0.0, 1.0]
    c_0, c_t, variance = (float(v) for v in process.posterior(1.0, 0.5))
    alpha_s, sigma_s = MOMENTS["zero_terminal"](0.5)
    assert (c_0, c_t, variance) == pytest.approx((alpha_s, 0.0, sigma_s**2), rel=1e-5)
    assert np.isfinite([float(v) for v in process.slopes(1.0)]).all()
    assert process.betas[-1] == 1.0


@pytest.mark.parametrize("process", ["vp", "ve", "flow"])
def test_zero_terminal_snr_wants_a_chain(process):
    with pytest.raises(ValueError, match="needs a variance-preserving chain"):
        processes.zero_terminal_snr(processes.get(process))


def test_zero_terminal_snr_wants_preserved_variance():
    with pytest.raises(ValueError, match="needs a variance-preserving chain"):
        processes.zero_terminal_snr(Tabulated.from_sigmas(SIGMAS))


# Between the steps of a chain.


@pytest.mark.parametrize("along", ["level", "log_level"])
def test_between_steps_the_level_or_its_logarithm_is_linear(along):
    process = processes.Interpolated(processes.get("linear"), along)
    assert process.num_timesteps is None and process.resolution == 1000
    alpha, sigma = PUBLISHED["linear"](np.arange(1001) / 1000)
    level, place = sigma / alpha, np.array([0.4, 1.0, 1.5, 7.25, 500.9, 998.6, 1000.0])
    expected = np.interp(place, np.arange(1001), level)
    if along == "log_level":  # from the first step on
        inner = np.exp(np.interp(place[1:], np.arange(1, 1001), np.log(level[1:])))
        expected = np.r_[expected[0], inner]
    t = (place / 1000).astype(FLOAT)
    assert_close(process.sigma(t) / process.alpha(t), expected, single=5e-4)
    assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, np.ones(7), single=1e-6)
    # The inverse finds the way back, also from float32's rounding of a level.
    assert_close(process.inverse_log_snr(process.log_snr(t)), t, double=1e-9, single=1e-5)
    assert_close(process.inverse_log_snr(process.log_snr(t[2])), t[2], double=1e-9, single=1e-5)
    # Infinite at the data, and no further than the ends.
    assert np.isposinf(numpy(process.log_snr(np.asarray(0.0, FLOAT))))
    beyond = np.asarray([100.0, -100.0], FLOAT)
    np.testing.assert_allclose(numpy(process.inverse_log_snr(beyond)), [0.0, 1.0], atol=1e-6)


def test_a_chain_to_interpolate_keeps_its_variance_and_some_signal():
    for chain in (
        Tabulated.from_sigmas(SIGMAS),
        processes.zero_terminal_snr(processes.get("linear")),
        processes.get("vp"),
    ):
        with pytest.raises(ValueError, match="Interpolated needs a variance-preserving chain"):
            processes.Interpolated(chain)
    with pytest.raises(ValueError, match=r"Unknown way to interpolate 'levle'.*'level'"):
        processes.Interpolated(processes.get("linear"), "levle")
    again = processes.Interpolated(processes.LinearBeta(50), "level")
    config = keras.saving.serialize_keras_object(again)
    assert keras.saving.deserialize_keras_object(config).get_config() == again.get_config()


# Configurations.


@every
def test_configuration_round_trip(name):
    process = MAKE[name]()
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(process)))
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(process) and again.get_config() == process.get_config()
    t = all_times(process)
    for method in ("alpha", "sigma"):
        values = (numpy(getattr(p, method)(t)) for p in (process, again))
        np.testing.assert_array_equal(*values)


@pytest.mark.parametrize(
    "process",
    [
        processes.LinearBeta(50, 0.01, 0.3),
        processes.Cosine(77, offset=0.02, max_beta=0.9),
        processes.VariancePreserving(0.2, 11.0),
        processes.SubVariancePreserving(0.2, 11.0),
        processes.VarianceExploding(0.1, 9.0),
        processes.EDM(0.01, 20.0, rho=3.0),
        processes.ContinuousCosine(-9.0, 8.0),
    ],
    ids=lambda p: type(p).__name__,
)
def test_arguments_survive_the_round_trip(process):
    again = type(process).from_config(process.get_config())
    for t in (0.0, 0.4, 1.0):
        assert float(again.alpha(t)) == float(process.alpha(t))
        assert float(again.sigma(t)) == float(process.sigma(t))
    default = type(process)()
    assert float(default.sigma(0.4)) != float(process.sigma(0.4))


def test_names():
    for name in processes.names():
        process = processes.get(name)
        assert processes.name(process) == name
        assert processes.get(process) is process
    assert processes.name(Tabulated.from_sigmas(SIGMAS)) == "Tabulated"


# Errors.


@pytest.mark.parametrize("name, nearest", [("lineer", "linear"), ("VP", None), ("edn", "edm")])
def test_unknown_names(name, nearest):
    with pytest.raises(ValueError, match=f"Unknown process '{name}'.*Known: .*sub_vp") as error:
        processes.get(name)
    if nearest:
        assert f"Did you mean '{nearest}'?" in str(error.value)


@pytest.mark.parametrize(
    "betas",
    [[0.0, 0.1], [0.1, 1.5], [1.0, 0.1], [-0.1], [], [[0.1]], [0.1, np.nan]],
    ids=str,
)
def test_bad_betas(betas):
    with pytest.raises(ValueError, match="beta"):
        Tabulated.from_betas(betas)


@pytest.mark.parametrize("steps", [20, 10, 5])
def test_rescaled_linear_betas_need_more_than_twenty_steps(steps):
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\)\. Received beta_"):
        processes.LinearBeta(steps)
    assert processes.LinearBeta(21).betas[-1] < 1.0


def test_a_chain_may_end_without_signal_where_that_is_asked_for():
    assert float(Tabulated.from_betas([0.5, 1.0]).alpha(1.0)) == 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tabulated.from_sigmas([1.0, 0.5]),
        lambda: Tabulated.from_sigmas([1.0, 1.0]),
        lambda: Tabulated([0.9, 0.95], [0.1, 0.1]),
    ],
)
def test_rising_signal_to_noise_ratio(make):
    with pytest.raises(ValueError, match=r"must fall strictly.*step 1 to step 2"):
        make()


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: Tabulated([0.9], [0.1, 0.2]), "one length"),
        (lambda: Tabulated([0.9, -0.1], [0.1, 0.2]), "positive"),
        (lambda: Tabulated.from_sigmas([0.0, 1.0]), "positive"),
        (lambda: Tabulated.from_sigmas([0.1, np.inf]), "finite"),
        (lambda: processes.LinearBeta(0), "num_timesteps must be an integer >= 1"),
        (lambda: processes.Cosine(10.5), "num_timesteps must be an integer >= 1"),
        (lambda: processes.Cosine(max_beta=1.0), "0 < max_beta < 1"),
        (lambda: processes.Cosine(offset=-0.1), "offset >= 0"),
        (lambda: processes.VariancePreserving(0.0, 1.0), "0 < beta_min <= beta_max"),
        (lambda: processes.SubVariancePreserving(2.0, 1.0), "SubVariancePreserving needs"),
        (lambda: processes.VarianceExploding(1.0, 1.0), "0 < sigma_min < sigma_max"),
        (lambda: processes.EDM(rho=0.0), "rho > 0"),
        (lambda: processes.ContinuousCosine(1.0, 1.0), "log_snr_min < log_snr_max"),
    ],
)
def test_arguments_out_of_range(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    "make",
    [
        # Pitfall 3, with the ᾱ_T that each leaves: .605, .364, .132.
        lambda: Tabulated.from_betas(1e-5 + (1e-2 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, 100)))),
        lambda: processes.LinearBeta(100, 1e-4, 0.02),
        lambda: processes.LinearBeta(200, 1e-4, 0.02),
    ],
    ids=["0.605", "0.364", "0.132"],
)
def test_a_chain_that_stays_short_of_noise_warns(make, request):
    left = request.node.callspec.id
    with pytest.warns(UserWarning, match=f"ends at alpha_bar = {left}") as caught:
        process = make()
    assert float(process.alpha(1.0)) ** 2 == pytest.approx(float(left), abs=5e-4)
    assert caught[0].filename == __file__  # the line that made the chain


@pytest.mark.filterwarnings("error")
def test_the_usual_chains_do_not_warn():
    for name in processes.names():
        processes.get(name)
    processes.Cosine(10)
    processes.LinearBeta(50)
    Tabulated.from_betas([0.5, 1.0])
