"""The forward chain, drawn step by step, against its closed-form moments."""

from __future__ import annotations

import numpy as np
import pytest

from tfdiffusion import processes, samplers
from tfdiffusion.samplers import noising_path

TIMES = (0.1, 0.3, 0.31, 0.8)


@pytest.mark.parametrize("name", ["linear", "sub_vp", "ve"])
def test_each_state_is_a_jump_and_neighbours_share_their_noise(name):
    process, num = processes.get(name), 40_000
    x_0 = np.full((num, 1), 2.0, "float32")
    path = noising_path(process, x_0, TIMES)[..., 0]
    t = np.asarray(TIMES)
    alpha, sigma = (np.asarray(f(t), "float64") for f in (process.alpha, process.sigma))
    noise = (path - 2.0 * alpha[:, None]) / sigma[:, None]
    tolerance = 5.0 / np.sqrt(num)
    np.testing.assert_allclose(noise.mean(axis=1), 0.0, atol=tolerance)
    np.testing.assert_allclose(noise.std(axis=1), 1.0, atol=tolerance)
    # Cov(x_t, x_s | x_0) = α_{t|s} σ_s², so the correlation is √(SNR_t / SNR_s).
    level = np.asarray(process.log_snr(t), "float64")
    expected = np.exp(-0.5 * np.abs(level[:, None] - level[None]))
    np.testing.assert_allclose(np.corrcoef(noise), expected, atol=tolerance)


def test_a_path_is_that_of_its_seed_in_any_batch():
    x_0 = np.zeros((3, 4), "float32")
    alone = noising_path("cosine", x_0[:1], TIMES, seed=7)
    np.testing.assert_allclose(noising_path("cosine", x_0, TIMES, seed=7)[:, :1], alone, atol=1e-6)
    assert np.abs(noising_path("cosine", x_0, TIMES, seed=8)[:, :1] - alone).min() > 1e-6
    assert alone.dtype == np.float32 and alone.shape == (4, 1, 4)


@pytest.mark.parametrize("times", [(), (0.0, 0.5), (0.5, 0.2), (0.5, 1.5), (0.5, 0.5001)])
def test_times_that_are_no_way_to_noise(times):
    with pytest.raises(ValueError, match="times must rise strictly within"):
        samplers.noising_path("linear", np.zeros((1, 2), "float32"), times)
