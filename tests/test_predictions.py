"""What networks regress: every prediction inverts, and equals the form its paper prints."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tfdiffusion import predictions

NAMES = predictions.names()
every = pytest.mark.parametrize("name", NAMES)


def draw(seed=0, count=500):
    """x_0, ε, α, σ over many noise levels, variance-preserving or not."""
    generator = np.random.default_rng(seed)
    x_0, noise = generator.standard_normal((2, count))
    return x_0, noise, generator.uniform(0.05, 1.0, count), np.exp(generator.uniform(-4, 4, count))


def coefficients(alpha, sigma, sigma_data):
    """EDM's own preconditioning (arXiv:2206.00364, table 1) at the level σ/α."""
    level = sigma / alpha
    total = level**2 + sigma_data**2
    return sigma_data**2 / total, level * sigma_data / np.sqrt(total)


#: Each paper's regression target, given x_0, ε, α, σ and σ_d.
PUBLISHED = {
    "clean": lambda x_0, noise, alpha, sigma, d: x_0,
    "noise": lambda x_0, noise, alpha, sigma, d: noise,
    # Salimans & Ho: v = α ε − σ x.
    "v": lambda x_0, noise, alpha, sigma, d: alpha * noise - sigma * x_0,
    # Rectified flow, from data to noise: the end of the line minus its start.
    "flow": lambda x_0, noise, alpha, sigma, d: noise - x_0,
    # The score of N(α x_0, σ²) at x_t.
    "score": lambda x_0, noise, alpha, sigma, d: (
        -((alpha * x_0 + sigma * noise) - alpha * x_0) / sigma**2
    ),
}


def published_edm(x_0, noise, alpha, sigma, sigma_data):
    c_skip, c_out = coefficients(alpha, sigma, sigma_data)
    return (x_0 - c_skip * (x_0 + sigma / alpha * noise)) / c_out


PUBLISHED["edm"] = published_edm


@every
@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_target_is_the_published_one(name, sigma_data):
    x_0, noise, alpha, sigma = draw()
    target = predictions.get(name).target(x_0, noise, alpha, sigma, sigma_data)
    expected = PUBLISHED[name](x_0, noise, alpha, sigma, sigma_data)
    np.testing.assert_allclose(target, expected, rtol=1e-9, atol=1e-9)


@every
@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_clean_inverts_target(name, sigma_data):
    x_0, noise, alpha, sigma = draw()
    prediction = predictions.get(name)
    y = prediction.target(x_0, noise, alpha, sigma, sigma_data)
    x_t = alpha * x_0 + sigma * noise
    np.testing.assert_allclose(
        prediction.clean(y, x_t, alpha, sigma, sigma_data), x_0, rtol=1e-9, atol=1e-9
    )


@every
def test_error_of_the_network_is_an_error_of_the_image(name):
    # ‖Δy‖² = ((aσ − bα)/σ)² ‖Δx_0‖².
    x_0, noise, alpha, sigma = draw()
    prediction = predictions.get(name)
    y, x_t = prediction.target(x_0, noise, alpha, sigma, 0.5), alpha * x_0 + sigma * noise
    error = 0.1 * np.random.default_rng(1).standard_normal(len(y))
    change = prediction.clean(y + error, x_t, alpha, sigma, 0.5) - x_0
    factor = prediction.determinant(alpha, sigma, 0.5) / sigma
    np.testing.assert_allclose(error**2, (factor * change) ** 2, rtol=1e-6)


def test_published_loss_weights():
    # Against ‖Δx_0‖²: SNR for noise, SNR + 1 for v on a VP process (Salimans & Ho, sec. 4),
    # (σ² + σ_d²)/(σ σ_d)² for EDM's unit-variance target (EDM, table 1).
    angle = np.linspace(0.1, 1.4, 9)
    alpha, sigma = np.cos(angle), np.sin(angle)
    snr = (alpha / sigma) ** 2

    def weight(name, alpha, sigma, sigma_data=1.0):
        return (predictions.get(name).determinant(alpha, sigma, sigma_data) / sigma) ** 2

    np.testing.assert_allclose(weight("clean", alpha, sigma), 1.0)
    np.testing.assert_allclose(weight("noise", alpha, sigma), snr)
    np.testing.assert_allclose(weight("v", alpha, sigma), snr + 1)
    level = np.exp(np.linspace(-4, 4, 9))
    expected = (level**2 + 0.25) / (level * 0.5) ** 2
    np.testing.assert_allclose(weight("edm", 1.0, level, 0.5), expected)


def test_edm_target_has_unit_variance_on_data_of_that_spread():
    generator = np.random.default_rng(0)
    x_0, noise = 0.5 * generator.standard_normal(200000), generator.standard_normal(200000)
    for alpha, sigma in [(1.0, 0.01), (1.0, 80.0), (0.3, 0.7)]:
        y = predictions.get("edm").target(x_0, noise, alpha, sigma, 0.5)
        assert y.var() == pytest.approx(1.0, rel=0.02)


@every
def test_singular_predictions_are_those_that_lose_the_data(name):
    # At α = 0, y must still tell x_0 apart; close to it, an error of y is magnified beyond bound.
    prediction = predictions.get(name)
    at_the_end = prediction.determinant(0.0, 1.0, 0.5)
    assert (at_the_end == 0.0) == prediction.singular == (name in ("noise", "score"))
    if not prediction.singular:
        y = prediction.target(0.7, -0.3, 0.0, 1.0, 0.5)
        assert prediction.clean(y, -0.3, 0.0, 1.0, 0.5) == pytest.approx(0.7)


def test_names():
    assert NAMES == ["clean", "noise", "v", "flow", "score", "edm"]
    for name in NAMES:
        prediction = predictions.get(name)
        assert prediction.name == name and predictions.get(prediction) is prediction
    with pytest.raises(ValueError, match=r"Unknown prediction 'nois'\. Did you mean 'noise'"):
        predictions.get("nois")
    with pytest.raises(ValueError, match="Unknown prediction None"):
        predictions.get(None)


def test_a_prediction_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        predictions.get("v").name = "w"


def test_a_row_of_one_s_own():
    # The library's only demand on a new prediction is its row.
    own = predictions.Prediction("sum", lambda alpha, sigma, sigma_data: (2.0, 3.0))
    assert own.clean(2.0 * 0.4 + 3.0 * 0.2, 0.6 * 0.4 + 0.8 * 0.2, 0.6, 0.8) == pytest.approx(0.4)
