"""Langevin dynamics against closed forms: stationary variances, mixtures, known pixels."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from keras import ops
from oracles import numpy

from tfdiffusion import _backend, random
from tfdiffusion.exact import GaussianMixture
from tfdiffusion.processes import Tabulated
from tfdiffusion.score_matching import ladders, langevin

CHAINS, SIZE = 2000, 10  # of equal coordinates: 20,000 numbers
ERROR = np.sqrt(2 / (CHAINS * SIZE))  # relative standard error of their variance


def keys(num, seed=0):
    return random.keys(np.arange(num) + 10**6 * seed)


def chains(num=CHAINS, size=SIZE, scale=1.0):
    return scale * numpy(random.normal(keys(num, 7), (size,)))


# One level.


@pytest.mark.parametrize(("convention", "divisor"), [("ncsn", 4), ("ncsnv2", 2)])
def test_the_stationary_variance_in_both_conventions(convention, divisor):
    """σ²/(1 − ε/(4σ²)) with ε/2 and √ε, σ²/(1 − α/(2σ²)) with α and √(2α)."""
    variance, step_size = 0.5, 0.3
    x = langevin.langevin(
        lambda x: -x / variance,
        chains(),
        keys(CHAINS),
        step_size=step_size,
        steps=60,
        convention=convention,
    )
    x = numpy(x)
    expected = variance / (1 - step_size / (divisor * variance))
    assert x.var() == pytest.approx(expected, rel=5 * ERROR)
    # Uniform numbers for normal ones would give a mean, lost noise a variance near zero.
    assert abs(x.mean()) < 5 * np.sqrt(expected / x.size)
    assert abs(expected / variance - 1) > 10 * ERROR  # the bias is one that the test can see


def test_one_step_in_each_convention():
    x = np.full((1, 3), 2.0, "float32")
    z = numpy(langevin.noise_of(keys(1), (3,))(1))
    step = {"score": lambda x: -x, "x": x, "keys": keys(1), "step_size": 0.08, "steps": 1}
    ncsn = numpy(langevin.langevin(**step, convention="ncsn"))
    np.testing.assert_allclose(ncsn, x - 0.04 * x + np.sqrt(0.08) * z, rtol=1e-5)
    ncsnv2 = numpy(langevin.langevin(**step, convention="ncsnv2"))
    np.testing.assert_allclose(ncsnv2, x - 0.08 * x + np.sqrt(0.16) * z, rtol=1e-5)


def test_temperature_scales_the_variance():
    """x + h s + √(2hτ) z has τ times the stationary variance; at 0 it climbs to the mode."""
    step = {"score": lambda x: -x, "x": chains(), "keys": keys(CHAINS), "step_size": 0.4}
    step |= {"steps": 60, "convention": "ncsnv2"}
    x = numpy(langevin.langevin(**step, temperature=0.09))
    assert x.var() == pytest.approx(0.09 / (1 - 0.4 / 2), rel=5 * ERROR)
    assert np.abs(numpy(langevin.langevin(**step, temperature=0.0))).max() < 1e-6
    for temperature in (-0.1, np.inf, np.nan):
        with pytest.raises(ValueError, match=r"temperature must lie in \[0, inf\)"):
            langevin.langevin(**step, temperature=temperature)


def test_the_path_has_every_state():
    request = {"step_size": 0.1, "convention": "ncsn"}
    start = chains(4, 3)
    last, path = langevin.langevin(
        lambda x: -x, start, keys(4), steps=5, return_path=True, **request
    )
    path = numpy(path)
    assert path.shape == (6, 4, 3)
    np.testing.assert_array_equal(path[0], start)
    np.testing.assert_array_equal(path[-1], numpy(last))
    third = langevin.langevin(lambda x: -x, start, keys(4), steps=3, **request)
    np.testing.assert_allclose(path[3], numpy(third), rtol=1e-6)


def test_the_published_closed_form_of_one_level():
    """NCSNv2, technique 4: from the last level's variance, T steps."""
    sigma, ratio, steps, share = 0.5, 1.3, 4, 0.2
    x = langevin.langevin(
        lambda x: -x / sigma**2,
        chains(scale=sigma * ratio),
        keys(CHAINS),
        step_size=share * sigma**2,
        steps=steps,
        convention="ncsnv2",
    )
    expected = ladders.variance_ratio(share * sigma**2, steps, sigma, ratio)
    assert numpy(x).var() / sigma**2 == pytest.approx(expected, rel=5 * ERROR)


def test_the_metropolis_correction_removes_the_bias():
    def energy(x):
        return 0.5 * ops.sum(x**2, -1)

    request = {"step_size": 0.8, "steps": 40, "convention": "ncsnv2"}
    biased = langevin.langevin(lambda x: -x, chains(size=2), keys(CHAINS), **request)
    exact, accepted = langevin.metropolis_langevin(energy, chains(size=2), keys(CHAINS), **request)
    error = np.sqrt(2 / (2 * CHAINS))
    assert numpy(biased).var() == pytest.approx(1 / (1 - 0.4), rel=5 * error)
    assert numpy(exact).var() == pytest.approx(1.0, rel=5 * error)
    assert 0.5 < numpy(accepted).mean() < 0.95
    assert numpy(accepted).max() <= 1.0 + 1e-5


def test_metropolis_weighs_overlapping_modes_rightly():
    mixture = GaussianMixture([[-1.0], [1.0]], 0.4, [1, 4], process=Tabulated.from_sigmas([1.0]))

    def energy(x):
        return -mixture.log_density(x, np.float32(0.0))

    x, _ = langevin.metropolis_langevin(
        energy,
        chains(size=1),
        keys(CHAINS),
        step_size=0.5,
        steps=80,
        convention="ncsnv2",
    )
    drawn, _ = mixture.draw(10**5)
    expected = (drawn > 0).mean()
    assert (numpy(x) > 0).mean() == pytest.approx(expected, abs=5 * np.sqrt(0.16 / CHAINS))


def test_a_chain_depends_on_its_own_key_alone():
    request = {"step_size": 0.1, "steps": 5, "convention": "ncsnv2"}
    together = numpy(langevin.langevin(lambda x: -x, chains(4, 3), keys(4), **request))
    alone = numpy(langevin.langevin(lambda x: -x, chains(4, 3)[2:3], keys(4)[2:3], **request))
    np.testing.assert_allclose(together[2:3], alone, rtol=1e-6)


def test_many_calls_in_a_row_say_nothing(caplog):
    """Each compiles a chain of its own, which TensorFlow takes for one that is traced too often."""
    logger = logging.getLogger("tensorflow")
    logger.addHandler(caplog.handler)
    try:
        for scale in range(1, 9):
            langevin.langevin(
                lambda x, scale=scale: -x / scale,
                chains(2, 1),
                keys(2),
                step_size=0.1,
                steps=1,
                convention="ncsn",
            )
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


# Annealed.


SIGMAS = ladders.geometric(8.0, 0.1, 24)
STEP_SIZE = 0.2 * SIGMAS[-1] ** 2


def mixture(sigmas=SIGMAS, means=((-4.0, -4.0), (4.0, 4.0)), variances=0.25, weights=(1, 4)):
    process = Tabulated.from_sigmas(sigmas[::-1])
    return GaussianMixture(means, variances, weights, process=process)


def score_at(exact, num_levels):
    """(x, level) → the exact score at the level's σ."""
    return lambda x, level: exact.score(x, (num_levels - ops.cast(level, "float32")) / num_levels)


def compiled(score, k, sigmas=SIGMAS, size=2, **request):
    """`annealed` in one compiled loop, as the model runs it."""

    def run(k):
        return langevin.annealed(score, sigmas, langevin.noise_of(k, (size,)), **request)

    return _backend.compiled(run, ())(k)


def anneal(exact, num, steps=20, step_size=STEP_SIZE, **request):
    score = score_at(exact, len(SIGMAS))
    return compiled(score, keys(num), step_size=step_size, steps_per_level=steps, **request)


def test_a_mixtures_score_hides_the_weights_and_annealing_finds_them():
    """Modes 11 deviations apart, 1:4. Chains that begin in equal parts at both stay in them."""
    exact, num = mixture(), 2000
    points = exact.means[[0, 1]].astype("float32")
    others = mixture(weights=(4, 1))
    same = [numpy(e.score(points, np.float32(0.0))) for e in (exact, others)]
    np.testing.assert_allclose(same[0], same[1], atol=1e-5)

    rng = np.random.default_rng(0)
    start = rng.uniform(-8, 8, size=(num, 2)).astype("float32")
    plain = langevin.langevin(
        lambda x: exact.score(x, np.float32(0.0)),
        start,
        keys(num),
        step_size=0.05,
        steps=300,
        convention="ncsnv2",
        smallest_sigma=0.5,
    )
    upper = (numpy(plain).sum(-1) > 0).mean()
    assert upper == pytest.approx(0.5, abs=5 * np.sqrt(0.25 / num))  # 0.8 would be right
    annealed = numpy(anneal(exact, num))
    assert (annealed.sum(-1) > 0).mean() == pytest.approx(0.8, abs=0.035)


def test_annealing_gives_each_mode_its_variance():
    exact = mixture()
    x = numpy(anneal(exact, 2000))
    near = x[x.sum(-1) > 0] - exact.means[1]
    # Tweedie's step takes the noise of the last level away, and a little of the data's spread.
    assert near.var() == pytest.approx(0.25, rel=0.15)
    assert abs(near.mean()) < 0.1


def test_the_last_step_takes_the_noise_away():
    """Data at one point: what is left is noise of σ_L, unless the last step denoises."""
    exact = mixture(means=((1.0, -2.0),), variances=0.0, weights=(1,))
    noisy = numpy(anneal(exact, 500, denoise=False)) - exact.means[0]
    # Each level begins with what the one before left, not with exactly its σ²: a fixed point.
    ratio, previous = SIGMAS[0] / SIGMAS[1], 1.0
    for _ in SIGMAS:
        previous = ladders.variance_ratio(0.2, 20, 1.0, ratio * np.sqrt(previous))
    assert noisy.var() / SIGMAS[-1] ** 2 == pytest.approx(previous, rel=5 * np.sqrt(2 / 1000))
    clean = numpy(anneal(exact, 500)) - exact.means[0]
    assert np.abs(clean).max() < 1e-4


def test_known_pixels_come_back_bit_by_bit_and_guide_the_others():
    """ρ = 0.9, known a = 1: the truth is mean 0.9 and variance 0.19; replacing alone misses it."""
    covariance = np.array([[1.0, 0.9], [0.9, 1.0]])
    sigmas = ladders.geometric(5.0, 0.1, 16)
    table = ops.convert_to_tensor(
        np.stack([np.linalg.inv(covariance + s**2 * np.eye(2)) for s in sigmas]).astype("float32")
    )
    num = 1000
    known = np.tile(np.float32([1.0, np.nan]), (num, 1))
    known[:, 0] += np.linspace(-1e-6, 1e-6, num)
    filled = np.where(np.isnan(known), 0, known)
    x = compiled(
        lambda x, level: -x @ table[level],
        keys(num),
        sigmas,
        step_size=0.3 * sigmas[-1] ** 2,
        steps_per_level=60,
        known=filled,
        mask=np.array([1, 0]),
    )
    x = numpy(x)
    np.testing.assert_array_equal(x[:, 0], known[:, 0])
    assert x[:, 1].mean() == pytest.approx(0.9, abs=0.05)
    assert x[:, 1].var() == pytest.approx(0.19, rel=0.25)


def test_the_path():
    exact = mixture()
    x, path = anneal(exact, 50, steps=2, return_path=True)
    assert tuple(path.shape) == (len(SIGMAS) + 2, 50, 2)
    first = SIGMAS[0] * numpy(langevin.noise_of(keys(50), (2,))(0))
    np.testing.assert_allclose(numpy(path)[0], first, rtol=1e-5)
    np.testing.assert_array_equal(numpy(path)[-1], numpy(x))
    np.testing.assert_allclose(numpy(x), numpy(anneal(exact, 50, steps=2)), rtol=1e-4, atol=1e-4)
    last = numpy(path)[-2]
    denoised = last + SIGMAS[-1] ** 2 * numpy(exact.score(last, np.float32(1 / len(SIGMAS))))
    np.testing.assert_allclose(numpy(x), denoised, rtol=1e-4, atol=1e-4)


def test_a_step_size_means_half_as_much_in_ncsns_convention():
    exact = mixture()
    x = anneal(exact, 8, steps=2)
    y = anneal(exact, 8, steps=2, step_size=2 * STEP_SIZE, convention="ncsn")
    np.testing.assert_allclose(numpy(x), numpy(y), rtol=1e-4, atol=1e-4)


def test_interpolated_noise_is_normal_and_ends_where_it_should():
    share = np.linspace(0, 1, 5, dtype="float32")
    many = (20000,)
    noise = langevin.interpolating_noise(keys(1, 1), keys(1, 2), share, many)(3)
    noise = numpy(noise)
    assert noise.shape == (5, 20000)
    np.testing.assert_allclose(noise[0], numpy(langevin.noise_of(keys(1, 1), many)(3))[0])
    ends = numpy(langevin.noise_of(keys(1, 2), many)(3))[0]
    np.testing.assert_allclose(noise[-1], ends, atol=1e-5)
    np.testing.assert_allclose(noise.var(-1), 1.0, atol=5 * np.sqrt(2 / 20000))


# What cannot be.


def run(**request):
    request = {"step_size": 0.1, "steps": 2, "convention": "ncsnv2", **request}
    x, k = request.pop("x", chains(2, 2)), request.pop("keys", keys(2))
    return langevin.langevin(lambda x: -x, x, k, **request)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run(step_size=0.5, smallest_sigma=0.5), "limit of stability .* 0.5 "),
        (
            lambda: run(step_size=1.0, smallest_sigma=0.5, convention="ncsn"),
            r"'ncsn' convention, 1 \(4 sigma\^2 with sigma=0.5\)",
        ),
        (lambda: run(step_size=0.0), "step_size must be positive"),
        (lambda: run(convention="euler"), "convention"),
        (lambda: run(keys=keys(3)), "one key a row"),
        (lambda: run(steps=0), "steps must be an integer >= 1"),
        (lambda: langevin.drift_steps([1.0, 0.1], 0.021, "ncsnv2"), "limit of stability .* 0.02 "),
        (lambda: langevin.drift_steps([0.1, 1.0], 0.001, "ncsnv2"), "must fall strictly"),
        (lambda: anneal(mixture(), 2, steps=1, convention="x"), "convention"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
