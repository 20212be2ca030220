"""Training times against their distributions, sampling grids against the published spacings."""

from __future__ import annotations

import json
from fractions import Fraction

import keras
import numpy as np
import oracles
import pytest
from keras import ops
from oracles import DOUBLE, FLOAT, PUBLISHED, numpy
from scipy import stats

from tfdiffusion import _backend, processes, random, times


def draws(distribution, process, latest=1.0, count=4000):
    process = processes.get(process)
    keys = random.keys(range(count))
    t = numpy(times.get(distribution).sample(keys, process, latest))
    assert t.shape == (count,) and t.dtype == np.float32
    assert (t > 0).all() and (t <= latest).all()
    return t.astype(np.float64)


def log_ratio(name, t):
    """ln(σ/α) at t, from the process's paper."""
    with np.errstate(divide="ignore"):
        return -0.5 * np.log(oracles.snr(PUBLISHED[name], t))


# Distributions.


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_uniform(process):
    assert stats.kstest(draws("uniform", process), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("name", ["uniform", "discrete_uniform"])
def test_every_step_of_a_chain_is_drawn_equally_often(name):
    process = processes.Tabulated.from_sigmas(np.geomspace(0.1, 10, 20))
    distribution = times.DiscreteUniform(20) if name == "discrete_uniform" else times.Uniform()
    steps = np.rint(draws(distribution, process) * 20).astype(int)
    counts = np.bincount(steps, minlength=21)
    assert counts[0] == 0 and len(counts) == 21
    assert stats.chisquare(counts[1:]).pvalue > 1e-3


def test_discrete_uniform_reaches_every_step_and_its_ends():
    u = (np.arange(2000) + 0.5) / 2000
    for process in ("linear", "vp"):  # a continuous process can be trained on 1000 times too
        t = numpy(times.DiscreteUniform().quantile(u.astype("float32"), processes.get(process)))
        np.testing.assert_allclose(t, np.repeat(np.arange(1, 1001), 2) / 1000, rtol=1e-6)


@pytest.mark.parametrize("process", ["vp", "flow", "linear", "cosine"])
@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.8, 0.5)])
def test_logit_normal(process, mean, std):
    t = draws(times.LogitNormal(mean, std), process)
    if process in ("linear", "cosine"):  # undo the rounding to steps, within a step
        np.testing.assert_allclose(t * 1000, np.rint(t * 1000), atol=1e-3)
        t = np.clip(t + (np.random.default_rng(0).random(len(t)) - 0.5) / 1000, 1e-6, 1 - 1e-6)
    logit = np.log(t) - np.log1p(-t)
    assert stats.kstest(logit, stats.norm(mean, std).cdf).pvalue > 1e-3


@pytest.mark.parametrize("process", ["edm", "vp", "flow", "ve", "continuous_cosine"])
def test_log_normal_sigma(process):
    # EDM draws ln σ ~ N(−1.2, 1.2²); on any process the level is σ/α.
    t = draws("log_normal_sigma", process)
    assert stats.kstest(log_ratio(process, t), stats.norm(-1.2, 1.2).cdf).pvalue > 1e-3


def test_log_normal_sigma_takes_the_nearest_step_of_a_chain():
    t = draws(times.LogNormalSigma(0.0, 1.0), "linear")
    assert stats.kstest(log_ratio("linear", t), stats.norm(0.0, 1.0).cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", ["logit_normal", "log_normal_sigma"])
def test_quantiles_stay_in_range_for_the_extreme_uniforms(monkeypatch, name):
    # 2u − 1 rounds to −1 for the smallest u, whose normal quantile is then infinite.
    extremes = ops.convert_to_tensor(np.float32([2.0**-33, 1 - 2.0**-24]))
    monkeypatch.setattr(random, "uniform", lambda keys: extremes)
    for process in ("vp", "edm", "linear", "flow"):
        low, high = numpy(times.get(name).sample(random.keys([0, 1]), processes.get(process)))
        assert 0 < low < high <= 1


def test_stratified_puts_one_time_in_every_stratum():
    process = processes.get("vp")
    for seed in range(10):
        t = numpy(times.Stratified().sample(random.keys(range(seed, seed + 64)), process))
        # The offset decides where in its stratum each lies, the same for all.
        np.testing.assert_array_equal(np.sort(np.floor(t * 64)), np.arange(64))
        inside = (t * 64) % 1
        assert np.ptp(inside) < 1e-3


def test_each_stratified_time_is_uniform():
    sample = _backend.compiled(
        lambda keys: times.Stratified().sample(keys, processes.get("vp")), ()
    )
    t = np.stack([numpy(sample(random.keys(range(8 * i, 8 * i + 8)))) for i in range(200)])
    for row in (0, 3, 7):
        assert stats.kstest(t[:, row], "uniform").pvalue > 1e-3


def test_stratified_averages_vary_less():
    keys = [random.keys(range(16 * i, 16 * i + 16)) for i in range(60)]
    means = {
        name: np.var([numpy(times.get(name).sample(k, processes.get("vp"))).mean() for k in keys])
        for name in ("uniform", "stratified")
    }
    # The mean of 16 strata with one offset has 1/16 the variance of that of 16 draws.
    assert means["stratified"] < means["uniform"] / 8


def test_stratified_times_cover_a_chain():
    process = processes.Tabulated.from_sigmas(np.geomspace(0.1, 10, 16))
    for seed in range(5):
        t = numpy(times.Stratified().sample(random.keys(range(seed, seed + 16)), process))
        np.testing.assert_array_equal(np.sort(np.rint(t * 16)), np.arange(1, 17))


@pytest.mark.parametrize("name", ["uniform", "stratified", "logit_normal", "log_normal_sigma"])
def test_times_are_cut_at_the_latest(name):
    t = draws(name, "flow", latest=0.25)
    assert t.max() == 0.25 and t.min() >= 0.999e-5


def test_a_row_s_time_does_not_depend_on_its_batch():
    keys = random.keys(range(5))
    for name in ("uniform", "logit_normal", "log_normal_sigma"):
        whole = numpy(times.get(name).sample(keys, processes.get("vp")))
        one = numpy(times.get(name).sample(keys[3:4], processes.get("vp")))
        np.testing.assert_allclose(one[0], whole[3], rtol=1e-6)


@pytest.mark.parametrize(
    "distribution",
    [
        times.Uniform(),
        times.Stratified(),
        times.DiscreteUniform(17),
        times.LogitNormal(0.3, 0.7),
        times.LogNormalSigma(-0.4, 1.0),
    ],
    ids=lambda d: type(d).__name__,
)
def test_configuration_round_trip(distribution):
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(distribution)))
    assert keras.saving.deserialize_keras_object(config) == distribution
    assert times.get(distribution) is distribution


def test_errors():
    with pytest.raises(ValueError, match=r"Unknown time distribution 'unifrom'\. Did you mean"):
        times.get("unifrom")
    with pytest.raises(ValueError, match=r"must be an integer >= 1\. Received num_timesteps=0"):
        times.DiscreteUniform(0)
    for distribution in (times.LogitNormal, times.LogNormalSigma):
        with pytest.raises(ValueError, match=f"{distribution.__name__} needs std > 0"):
            distribution(std=0.0)


# Grids.

every_grid = pytest.mark.parametrize("grid", times.grid_names())


def grid_of(name, steps, process, latest=1.0, dtype=FLOAT):
    return numpy(times.grid(name, steps, processes.get(process), latest, dtype))


@every_grid
@pytest.mark.parametrize("process", processes.names())
def test_grids_fall_from_the_latest_time(grid, process):
    for steps in (1, 10):
        t = grid_of(grid, steps, process)
        assert t.shape == (steps,)
        assert (np.diff(t) < 0).all() and t[-1] > 0
        if grid != "leading":
            assert t[0] == 1.0


@every_grid
def test_grids_of_a_chain_visit_no_step_twice(grid):
    short = processes.Tabulated.from_sigmas(np.geomspace(0.01, 50, 20))
    zero_terminal = processes.zero_terminal_snr(processes.get("cosine"))
    for process, counts in [
        (processes.get("linear"), (1000,)),
        (processes.get("cosine"), (100,)),
        (zero_terminal, (100,)),
        (short, (13, 20)),
    ]:
        total = process.num_timesteps
        for count in counts:
            t = grid_of(grid, count, process)
            step = np.rint(t * total).astype(int)
            np.testing.assert_allclose(t * total, step, rtol=1e-5)
            assert (np.diff(step) < 0).all() and step[-1] >= 1, (grid, count)
            if grid != "leading":
                assert step[0] == total
            if count == total:
                np.testing.assert_array_equal(step, np.arange(total, 0, -1))


def spacing(name, steps, total=1000):
    """The 1-based steps that diffusers' `timestep_spacing` visits, before they are rounded."""
    if name == "trailing":
        return [Fraction(total) - k * Fraction(total, steps) for k in range(steps)]
    if name == "leading":
        return [Fraction(1 + k * (total // steps)) for k in reversed(range(steps))]
    return [1 + k * Fraction(total - 1, steps - 1) for k in reversed(range(steps))]


@pytest.mark.parametrize("name", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [3, 10, 80, 999])
def test_spacings_are_those_of_diffusers(name, steps):
    visited = np.rint(1000 * grid_of(name, steps, "linear")).astype(int)
    for step, exact in zip(visited, spacing(name, steps), strict=True):
        # Rounded to the nearest; where two are equally near, to the one with less noise.
        assert step == -((-exact + Fraction(1, 2)) // 1)


def test_spacings_beside_diffusers():
    schedulers = pytest.importorskip("diffusers")
    for name in ("trailing", "leading", "linspace"):
        scheduler = schedulers.DDIMScheduler(timestep_spacing=name)
        for steps in (10, 20, 50, 100):
            scheduler.set_timesteps(steps)
            theirs = np.array(scheduler.timesteps) + 1
            ours = np.rint(1000 * grid_of(name, steps, "linear")).astype(int)
            np.testing.assert_array_equal(ours, theirs)


def test_uniform_is_trailing_and_quadratic_is_quadratic():
    for process in ("flow", "linear"):
        t = grid_of("uniform", 8, process)
        np.testing.assert_allclose(t, np.arange(8, 0, -1) / 8)
        np.testing.assert_array_equal(grid_of("trailing", 8, process), t)
    np.testing.assert_allclose(grid_of("quadratic", 8, "flow"), (np.arange(8, 0, -1) / 8) ** 2)


@pytest.mark.parametrize("process", ["edm", "ve", "vp", "sub_vp", "flow", "continuous_cosine"])
def test_karras_levels(process):
    # EDM, eq. 5, between the noise levels σ/α at the two ends of the grid.
    steps = 10
    t = grid_of("karras", steps, process)
    level = np.exp(log_ratio(process, t[1:]))
    high = min(np.exp(log_ratio(process, 1.0)), np.exp(8.0))
    low = max(np.exp(log_ratio(process, 1e-3)), np.exp(-8.0))
    i = np.arange(1, steps)
    expected = (high ** (1 / 7) + i / (steps - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    np.testing.assert_allclose(level, expected, rtol=1e-6 if DOUBLE else 2e-3)
    assert t[0] == 1.0


def test_karras_is_even_in_time_on_the_process_made_for_it():
    # EDM's own time is σ^(1/7), so that Karras' grid is an even one.
    t = grid_of("karras", 10, "edm")
    np.testing.assert_allclose(np.diff(t), -0.999 / 9, rtol=1e-6 if DOUBLE else 1e-4)


def test_karras_rounds_to_the_nearest_level_of_a_chain():
    steps = np.rint(1000 * grid_of("karras", 10, "linear")).astype(int)
    levels = log_ratio("linear", np.arange(1, 1001) / 1000)
    roots = np.linspace(np.exp(levels[-1] / 7), np.exp(levels[0] / 7), 10)
    nearest = [1 + np.argmin(np.abs(levels - 7 * np.log(root))) for root in roots]
    np.testing.assert_array_equal(steps, nearest)


@every_grid
@pytest.mark.parametrize("process", ["flow", "edm"])
def test_grids_stop_at_the_latest_time(grid, process):
    for steps in (10, 1000):
        t = grid_of(grid, steps, process, latest=0.75)
        assert t[0] <= 0.75 and (np.diff(t) < 0).all() and t[-1] > 0
        if grid != "leading":
            assert t[0] == pytest.approx(0.75, abs=1e-12 if DOUBLE else 1e-7)


@every_grid
def test_continuous_processes_have_no_largest_count(grid):
    t = grid_of(grid, 1500, "vp")
    assert (np.diff(t) < 0).all() and t[0] <= 1 and t[-1] > 0


@pytest.mark.skipif(not DOUBLE, reason="JAX compiles for one number of steps")
@every_grid
@pytest.mark.parametrize("process", ["vp", "linear"])
def test_number_of_steps_may_be_a_tensor(grid, process):
    make = _backend.compiled(lambda n: times.grid(grid, n, processes.get(process)), ())
    for steps in (1, 10, 37):
        dynamic = numpy(make(ops.convert_to_tensor(steps)))
        static = grid_of(grid, steps, process, dtype="float32")
        np.testing.assert_allclose(dynamic, static, rtol=1e-5)


@pytest.mark.skipif(not DOUBLE, reason="JAX compiles for one number of steps")
def test_more_steps_than_a_chain_has_stay_on_the_chain():
    # A tensor cannot be checked; then steps are visited again rather than left.
    process = processes.Tabulated.from_sigmas(np.geomspace(0.01, 50, 20))
    for grid in times.grid_names():
        t = numpy(times.grid(grid, ops.convert_to_tensor(30), process))
        assert t.shape == (30,) and (np.diff(t) <= 0).all()
        assert t.min() > 0 and t.max() <= 1


def test_both_precisions_visit_the_same_steps():
    for grid in ("uniform", "leading", "linspace", "quadratic"):
        for steps in (13, 80):
            single = grid_of(grid, steps, "linear", dtype="float32")
            np.testing.assert_allclose(single, grid_of(grid, steps, "linear"), rtol=1e-6)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, None, "10"])
def test_steps_must_be_a_positive_integer(steps):
    with pytest.raises(ValueError, match="steps must be an integer >= 1"):
        times.check_steps(steps, processes.get("vp"))


def test_grid_errors():
    with pytest.raises(ValueError, match=r"Unknown grid 'karas'\. Did you mean 'karras'"):
        times.grid("karas", 10, processes.get("vp"))
    with pytest.raises(ValueError, match="steps=1001 exceeds the 1000 noise levels"):
        times.grid("uniform", 1001, processes.get("linear"))
    with pytest.raises(ValueError, match="steps must be an integer >= 1"):
        times.grid("uniform", 0, processes.get("linear"))


# Grids as objects.

OBJECTS = [
    times.Timesteps(),
    times.Timesteps("leading", offset=1, until_first=True),
    times.Timesteps("linspace", exclusive=True, count=900),
    times.Timesteps("linspace", rounded=False, levels="karras"),
    times.Timesteps("trailing", levels="log", until_first=True),
    times.Shifted(),
    times.Shifted(last=0.0, shift=3.0),
]


@pytest.mark.parametrize("grid", OBJECTS, ids=str)
@pytest.mark.parametrize("process", processes.names())
def test_grids_as_objects_fall_on_every_process(grid, process):
    process = processes.get(process)
    t = numpy(times.grid(grid, 10, process, dtype=FLOAT))
    assert t.shape == (10 if grid.denoise_last else 11,)
    assert (np.diff(t[:10]) < 0).all() and (np.diff(t) <= 0).all()
    assert 0 < t[-1] and t[0] <= 1
    if process.num_timesteps:
        np.testing.assert_allclose(t * 1000, np.rint(t * 1000), atol=1e-3)
    if not grid.denoise_last:
        assert t[-1] == pytest.approx(1e-3, rel=1e-6)
    assert numpy(times.grid(grid, 10, process, 0.6, FLOAT)).max() <= 0.6


@pytest.mark.parametrize("grid", OBJECTS, ids=str)
def test_grids_as_objects_survive_serialization(grid):
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(grid)))
    again = keras.saving.deserialize_keras_object(config)
    assert again == grid and again.denoise_last == grid.denoise_last


@pytest.mark.skipif(not DOUBLE, reason="JAX compiles for one number of steps")
@pytest.mark.parametrize("grid", OBJECTS, ids=str)
def test_grids_as_objects_take_a_tensor_for_the_number_of_steps(grid):
    for process in (processes.get("linear"), processes.get("vp")):
        make = _backend.compiled(lambda n, p=process: times.grid(grid, n, p, 1.0, FLOAT), ())
        for steps in (1, 10, 37):
            dynamic = numpy(make(ops.convert_to_tensor(steps)))
            np.testing.assert_allclose(dynamic, grid_of(grid, steps, process), rtol=1e-6)


def test_leading_timesteps_with_an_offset():
    steps = 1000 * grid_of(times.Timesteps("leading", 1, until_first=True), 4, "linear") - 1
    np.testing.assert_allclose(steps, [751, 501, 251, 1, 0], atol=1e-3)
    # DPM-Solver's, as many as if the data were one of them.
    steps = 1000 * grid_of(times.Timesteps("leading", 1, exclusive=True), 4, "linear") - 1
    np.testing.assert_allclose(steps, [801, 601, 401, 201], atol=1e-3)


def test_named_and_made_spacings_are_the_same():
    for name in ("leading", "linspace", "trailing"):
        for steps in (1, 10, 20):  # without halves, which they round in different ways
            made = grid_of(times.Timesteps(name), steps, "linear")
            np.testing.assert_allclose(made, grid_of(name, steps, "linear"), rtol=1e-6)


def test_a_shift_moves_times_towards_noise():
    """Esser et al. 2024, eq. 23: with s = √(m/n), what n pixels show at t, m show at t_m."""
    even = grid_of(times.Shifted(last=0.1), 10, "flow")
    np.testing.assert_allclose(even, np.linspace(1.0, 0.1, 10), rtol=1e-6)
    shifted = grid_of(times.Shifted(last=0.1, shift=3.0), 10, "flow")
    # σ/α is multiplied by s.
    with np.errstate(divide="ignore"):
        ratio = (shifted / (1 - shifted))[1:] / (even / (1 - even))[1:]
    np.testing.assert_allclose(ratio, 3.0, rtol=1e-5)


def test_grid_objects_check_their_arguments():
    with pytest.raises(ValueError, match=r"Unknown spacing 'leadin'\. Did you mean 'leading'"):
        times.Timesteps("leadin")
    with pytest.raises(ValueError, match=r"Unknown kind of levels 'karas'"):
        times.Timesteps(levels="karas")
    with pytest.raises(ValueError, match=r"offset >= 0.*Received spacing='leading', offset=-1"):
        times.Timesteps(offset=-1)
    with pytest.raises(ValueError, match="spacing='trailing', offset=0, count=500"):
        times.Timesteps("trailing", count=500)
    with pytest.raises(ValueError, match=r"0 <= last < 1 and shift > 0\. Received last=1"):
        times.Shifted(last=1.0)
    with pytest.raises(ValueError, match="steps=1001 exceeds the 1000 noise levels"):
        times.grid(times.Timesteps(), 1001, processes.get("linear"))
