"""Closed forms to hold the library against: NumPy and SciPy in float64, straight from the papers.

Nothing here imports tfdiffusion. Time runs from 0, data, to 1; a chain of T steps has times i/T.
"""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops
from scipy import special, stats

#: TensorFlow computes times in float64, JAX in float32 unless x64 is on.
DOUBLE = keras.backend.backend() == "tensorflow"
FLOAT = "float64" if DOUBLE else "float32"


def numpy(x) -> np.ndarray:
    """A tensor of either backend as an array."""
    return np.asarray(ops.convert_to_numpy(x))


def assert_close(actual, desired, double=1e-9, single=1e-4, floor=None):
    """Relative closeness, `double` where float64 is at hand and `single` elsewhere.

    `floor` is the size below which errors count absolutely; by default the relative tolerance.
    """
    rtol = double if DOUBLE else single
    atol = rtol * (1.0 if floor is None else floor)
    np.testing.assert_allclose(numpy(actual), desired, rtol=rtol, atol=atol)


# Noise.

_WORD = 0xFFFFFFFF


def threefry(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Threefry-2x32-20 in Python integers (Salmon et al. 2011, sec. 4.2 and table 2)."""
    rotations = [13, 15, 26, 6, 17, 29, 16, 24]
    schedule = [*key, 0x1BD11BDA ^ key[0] ^ key[1]]
    x, y = (counter[0] + key[0]) & _WORD, (counter[1] + key[1]) & _WORD
    for i in range(20):
        x = (x + y) & _WORD
        distance = rotations[i % 8]
        y = (((y << distance) | (y >> (32 - distance))) & _WORD) ^ x
        if i % 4 == 3:
            injection = i // 4 + 1
            x = (x + schedule[injection % 3]) & _WORD
            y = (y + schedule[(injection + 1) % 3] + injection) & _WORD
    return x, y


def box_muller(words: np.ndarray) -> np.ndarray:
    """Normal numbers, cosines then sines, from 32-bit words (n, 2)."""
    u, v = (np.asarray(words, dtype=np.float64).T + 0.5) / 2.0**32
    return np.concatenate([np.sqrt(-2 * np.log(u)) * f(2 * np.pi * v) for f in (np.cos, np.sin)])


# Processes: (alpha, sigma) as functions of time.


def chain(betas):
    """Moments of x_i = √(1−β_i) x_{i−1} + √β_i ε, one step after the other."""
    alphas, variances = [1.0], [0.0]
    for beta in betas:
        alphas.append(alphas[-1] * math.sqrt(1 - beta))
        variances.append(variances[-1] * (1 - beta) + beta)
    return _table(np.array(alphas), np.sqrt(variances))


def ladder(sigmas):
    """Moments of x_i = x_0 + σ_i ε."""
    return _table(np.ones(len(sigmas) + 1), np.array([0.0, *sigmas]))


def _table(alphas, sigmas):
    def moments(t):
        step = np.rint(np.asarray(t, dtype=np.float64) * (len(alphas) - 1)).astype(int)
        return alphas[step], sigmas[step]

    return moments


def zero_terminal(betas):
    """Algorithm 1 of arXiv:2305.08891 on √ᾱ."""
    alphas_bar_sqrt = np.sqrt(np.cumprod(1 - np.asarray(betas)))
    first, last = alphas_bar_sqrt[0], alphas_bar_sqrt[-1]
    shifted = (alphas_bar_sqrt - last) * (first / (first - last))
    return _table(np.r_[1.0, shifted], np.r_[0.0, np.sqrt(1 - shifted**2)])


def linear_betas(steps=1000):
    """Ho et al. 2020."""
    return np.array([1e-4 + (0.02 - 1e-4) * i / (steps - 1) for i in range(steps)])


def scaled_linear_betas(steps=1000):
    """Rombach et al. 2022."""
    low, high = math.sqrt(8.5e-4), math.sqrt(0.012)
    return np.array([(low + (high - low) * i / (steps - 1)) ** 2 for i in range(steps)])


def sigmoid_betas(steps=1000):
    """diffusers' "sigmoid" schedule."""
    return 1e-4 + (0.02 - 1e-4) * special.expit(np.linspace(-6, 6, steps))


def cosine_betas(steps=1000):
    """Nichol & Dhariwal 2021, eq. 17."""

    def f(i):
        return math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - f(i) / f(i - 1), 0.999) for i in range(1, steps + 1)])


def vp_beta(t):
    """β(t) of the VP-SDE, Song et al. 2021."""
    return 0.1 + np.asarray(t, dtype=np.float64) * 19.9


def vp_integral(t):
    """∫_0^t β: the trapezium rule is exact for a straight line."""
    return 0.5 * np.asarray(t, dtype=np.float64) * (vp_beta(0) + vp_beta(t))


def _vp(t):
    return np.exp(-0.5 * vp_integral(t)), np.sqrt(-np.expm1(-vp_integral(t)))


def _sub_vp(t):
    return np.exp(-0.5 * vp_integral(t)), -np.expm1(-vp_integral(t))


def _ve(t):
    t = np.asarray(t, dtype=np.float64)
    return np.ones_like(t), 0.01 ** (1 - t) * 50.0**t


def _flow(t):
    t = np.asarray(t, dtype=np.float64)
    return 1 - t, t


def _edm(t):
    t = np.asarray(t, dtype=np.float64)
    root = 80 ** (1 / 7) + (1 - t) * (0.002 ** (1 / 7) - 80 ** (1 / 7))
    return np.ones_like(t), root**7


def _continuous_cosine(t):
    first, last = np.arctan(np.exp(-7.5)), np.arctan(np.exp(7.5))
    log_snr = -2 * np.log(np.tan(first + np.asarray(t, dtype=np.float64) * (last - first)))
    return np.sqrt(special.expit(log_snr)), np.sqrt(special.expit(-log_snr))


#: The published moments behind each name.
PUBLISHED = {
    "linear": chain(linear_betas()),
    "scaled_linear": chain(scaled_linear_betas()),
    "cosine": chain(cosine_betas()),
    "sigmoid": chain(sigmoid_betas()),
    "vp": _vp,
    "sub_vp": _sub_vp,
    "ve": _ve,
    "flow": _flow,
    "edm": _edm,
    "continuous_cosine": _continuous_cosine,
}


def snr(moments, t):
    """α²/σ²."""
    alpha, sigma = moments(t)
    with np.errstate(divide="ignore"):
        return (alpha / sigma) ** 2


def slope(function, t, h=1e-6):
    """Derivative by central differences."""
    t = np.asarray(t, dtype=np.float64)
    return (function(t + h) - function(t - h)) / (2 * h)


# Gaussians.


def condition(mean, covariance, observed):
    """Mean and variance of the first of two jointly Gaussian numbers, given the second."""
    gain = covariance[0][1] / covariance[1][1]
    mean_first = mean[0] + gain * (observed - mean[1])
    return mean_first, covariance[0][0] - gain * covariance[1][0]


def posterior(moments_t, moments_s, x_0, x_t):
    """Mean and variance of q(x_s | x_t, x_0): x_s and x_t are jointly Gaussian given x_0."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = moments_t, moments_s
    shared = alpha_t / alpha_s * sigma_s**2  # Cov(x_s, x_t): x_t is x_s, scaled, plus fresh noise
    covariance = [[sigma_s**2, shared], [shared, sigma_t**2]]
    return condition([alpha_s * x_0, alpha_t * x_0], covariance, x_t)


def kl(mean_p, variance_p, mean_q, variance_q):
    """KL(p ‖ q) of two Gaussians, in nats."""
    ratio = variance_p / variance_q
    return 0.5 * (ratio + (mean_p - mean_q) ** 2 / variance_q - 1 - np.log(ratio))


class GaussianData:
    """x_0 ~ N(mean, variance), elementwise, seen at a noise level (alpha, sigma)."""

    def __init__(self, mean=0.0, variance=1.0):
        self.mean, self.variance = mean, variance

    def spread(self, alpha, sigma):
        """Variance of x_t, V_t."""
        return alpha**2 * self.variance + sigma**2

    def clean(self, x_t, alpha, sigma):
        """E[x_0 | x_t], by conditioning the joint Gaussian of x_0 and x_t."""
        shared = alpha * self.variance
        covariance = [[self.variance, shared], [shared, self.spread(alpha, sigma)]]
        return condition([self.mean, alpha * self.mean], covariance, x_t)[0]

    def score(self, x_t, alpha, sigma):
        """∇ log q_t."""
        return -(x_t - alpha * self.mean) / self.spread(alpha, sigma)

    def noise(self, x_t, alpha, sigma):
        """E[ε | x_t]."""
        return -sigma * self.score(x_t, alpha, sigma)

    def flow(self, x_t, moments_t, moments_s):
        """Where the probability-flow ODE takes x_t: quantiles are kept."""
        standard = (x_t - moments_t[0] * self.mean) / np.sqrt(self.spread(*moments_t))
        return moments_s[0] * self.mean + standard * np.sqrt(self.spread(*moments_s))

    def ddim_factor(self, moments_t, moments_s):
        """What one deterministic DDIM step multiplies x_t by, for data of mean 0."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = moments_t, moments_s
        return (alpha_t * alpha_s * self.variance + sigma_t * sigma_s) / self.spread(*moments_t)


class MixtureData:
    """x_0 ~ Σ_k w_k N(μ_k, v_k I), seen at noise levels (alpha, sigma), numbers or (N, 1)."""

    def __init__(self, means, variances, weights=None):
        self.means = np.asarray(means, dtype=np.float64)
        count, self.dimension = self.means.shape
        self.variances = np.broadcast_to(np.asarray(variances, dtype=np.float64), (count,))
        weights = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
        self.weights = weights / weights.sum()

    def log_density(self, x_t, alpha, sigma):
        """ln q_t at x_t (N, D), by SciPy's normal distribution."""
        logs = [
            np.log(w) + stats.norm(alpha * m, np.sqrt(alpha**2 * v + sigma**2)).logpdf(x_t).sum(-1)
            for w, m, v in zip(self.weights, self.means, self.variances)
        ]
        return special.logsumexp(logs, axis=0)

    def distribution(self, x_t, alpha, sigma):
        """P(X_t <= x_t) for x_t (N, 1), one dimension."""
        return sum(
            w * stats.norm(alpha * m, np.sqrt(alpha**2 * v + sigma**2)).cdf(x_t)
            for w, m, v in zip(self.weights, self.means, self.variances)
        )

    def score(self, x_t, alpha, sigma, h=1e-5):
        """∇ log q_t by central differences of the density."""
        columns = []
        for axis in np.eye(self.dimension):
            up, down = (self.log_density(x_t + d * h * axis, alpha, sigma) for d in (1, -1))
            columns.append((up - down) / (2 * h))
        return np.stack(columns, axis=-1)

    def posterior_moments(self, x_t, alpha, sigma, limit=12.0, count=20001):
        """Mean and variance of x_0 given x_t (N, 1), one dimension, by quadrature of Bayes."""
        x_0 = np.linspace(-limit, limit, count)
        prior = np.exp(self.log_density(x_0[:, None], 1.0, 0.0))
        joint = prior * stats.norm(alpha * x_0, sigma).pdf(x_t)  # (N, count)
        mass = joint.sum(-1, keepdims=True)
        mean = (joint * x_0).sum(-1, keepdims=True) / mass
        return mean, (joint * (x_0 - mean) ** 2).sum(-1, keepdims=True) / mass
