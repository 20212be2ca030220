"""The 2-D laboratory: exact fields, errors of learned ones, the mixture of unequal modes."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from oracles import MixtureData, numpy

from tfdiffusion import data, plotting
from tfdiffusion.exact import GaussianMixture
from tfdiffusion.score_matching import ScoreMLP, ScoreModel, geometric, laboratory

SIGMAS = geometric(1.5, 0.3, 3)


@pytest.mark.parametrize("name", ["swiss_roll", "moons", "circles", "gaussian_mixture"])
def test_the_exact_score_of_points_at_every_level(name):
    points = data.toy(name, 40)
    oracle = MixtureData(points, 0.0)
    exact = laboratory.exact_score(points, SIGMAS)
    x = np.random.default_rng(0).normal(size=(5, 2)).astype("float32")
    for level, sigma in enumerate(SIGMAS):
        expected = oracle.score(x.astype("float64"), 1.0, sigma)
        np.testing.assert_allclose(numpy(exact(x, level)), expected, rtol=1e-3, atol=1e-3)


def test_the_exact_score_of_a_mixture():
    mixture = GaussianMixture([[-1, 0], [1, 1]], [0.1, 0.3], [1, 2])
    oracle = MixtureData([[-1, 0], [1, 1]], [0.1, 0.3], [1, 2])
    x = np.random.default_rng(0).normal(size=(5, 2)).astype("float32")
    exact = laboratory.exact_score(mixture, SIGMAS)
    expected = oracle.score(x.astype("float64"), 1.0, SIGMAS[1])
    np.testing.assert_allclose(numpy(exact(x, 1)), expected, rtol=1e-3, atol=1e-3)


def test_the_error_of_a_field():
    x = data.toy("moons", 50)
    exact = laboratory.exact_score(x, SIGMAS)

    class Part:
        def __init__(self, share):
            self.share = share

        def score(self, x, level):
            return self.share * exact(x, level)

    for share in (0.0, 0.5, 1.0):
        error = laboratory.field_error(Part(share), exact, 1, x)
        assert error == pytest.approx(1 - share, abs=1e-4)


def test_plain_langevin_gets_the_modes_wrong_and_annealed_right():
    found = laboratory.unequal_modes(1000)
    assert found.truth == pytest.approx(0.8)
    assert abs(found.plain - 0.5) < 5 * np.sqrt(0.25 / 1000)
    assert abs(found.annealed - 0.8) < 3 * found.error + 0.01
    assert found.plain_samples.shape == found.annealed_samples.shape == (1000, 2)
    with pytest.raises(ValueError, match="two positive numbers"):
        laboratory.unequal_modes(10, weights=(1, 2, 3))


def test_the_picture_of_fields(tmp_path):
    file = tmp_path / "fields.png"

    def exact(x):
        return -x

    figure = plotting.compare_fields_2d(lambda x: -0.9 * x, exact, file, resolution=6)
    assert file.exists()
    assert "10% of the field" in figure.axes[2].get_title()
    for wrong in (lambda x: x[:, :1], lambda x: np.nan * x):
        with pytest.raises(ValueError, match=r"fn must give (finite )?vectors"):
            plotting.compare_fields_2d(wrong, exact)
    with pytest.raises(ValueError, match="resolution=1"):
        plotting.compare_fields_2d(exact, exact, resolution=1)


def test_the_picture_of_costs(tmp_path):
    file = tmp_path / "costs.png"
    plotting.costs([1, 2, 4], {"a": [1, 2, 4], "b": [1, np.nan, 1]}, file)
    assert file.exists()
    with pytest.raises(ValueError, match="2 times for 3 sizes"):
        plotting.costs([1, 2, 4], {"a": [1, 2]})
    with pytest.raises(ValueError, match="nothing to draw"):
        plotting.costs([1], {})


@pytest.mark.slow
def test_a_field_learned_from_the_swiss_roll():
    keras.utils.set_random_seed(0)
    points = data.toy("swiss_roll", 4000)
    sigmas = geometric(2.0, 0.1, 8)
    model = ScoreModel(ScoreMLP(sigmas, width=128, depth=3), sigmas, ema_decay=0.995)
    model.compile(keras.optimizers.Adam(2e-3))
    model.fit(points, epochs=60, batch_size=128, verbose=0)
    exact = laboratory.exact_score(points, sigmas)
    for level, sigma in enumerate(sigmas):
        noise = np.random.default_rng(1).normal(size=points.shape)
        x = points + sigma * noise
        assert laboratory.field_error(model, exact, level, x[:1000]) < 0.25
