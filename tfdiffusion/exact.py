"""Data whose score is known at every noise level: Gaussian mixtures.

If x_0 is drawn from Σ_k w_k N(μ_k, v_k I), then x_t is drawn from
Σ_k w_k N(α μ_k, (α² v_k + σ²) I), so density, score and E[x_0 | x_t] are closed forms. A sampler
run on the exact denoiser shows its own error and nothing else; a trained network can be held
against it point by point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from keras import ops

from tfdiffusion import _checks, processes
from tfdiffusion.denoiser import Denoiser


class GaussianMixture(Denoiser):
    """The exact denoiser of an isotropic Gaussian mixture (one component: a Gaussian).

    Example:

    >>> ring = tfd.exact.GaussianMixture([[1, 0], [-1, 0]], variances=0.01, process="vp")
    >>> points = tfd.sample(ring, seeds=range(1000), shape=(2,), steps=50)

    Args:
        means: μ_k, (K, D).
        variances: v_k, (K,) or one number, not negative.
        weights: w_k, (K,), positive, scaled to sum to one; None for equal ones.
        process: a `Process` or its name.

    Raises:
        ValueError: If the shapes do not agree or a number is out of its range.
    """

    def __init__(
        self,
        means: Sequence[Sequence[float]],
        variances: float | Sequence[float] = 1.0,
        weights: Sequence[float] | None = None,
        process: str | processes.Process = "vp",
    ):
        self.process = processes.get(process)
        self.means = _checks.array("means", means, "numbers (K, D)", rank=2).astype("float64")
        count = len(self.means)
        if not self.means.size:
            raise ValueError(f"means must have shape (K, D), none 0. Received {self.means.shape}.")
        variances = _checks.array("variances", variances, "numbers >= 0").astype("float64")
        weights = np.ones(count) if weights is None else weights
        weights = _checks.array("weights", weights, "positive numbers (K,)").astype("float64")
        fits = weights.shape == (count,) and variances.shape in ((), (count,))
        if not fits or (weights <= 0).any() or (variances < 0).any():
            raise ValueError(
                f"{count} means need as many positive weights and variances >= 0. "
                f"Received weights={weights.tolist()}, variances={variances.tolist()}."
            )
        self.variances = np.broadcast_to(variances, (count,))
        self.weights = weights / weights.sum()

    def draw(self, num: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Draws from the data distribution.

        Returns:
            float32 points (num, D) and the int32 component of each (num,).

        Raises:
            ValueError: If num is no integer >= 1, or the seed none >= 0.
        """
        _checks.integer("num", num)
        _checks.integer("seed", seed, 0)
        generator = np.random.default_rng(seed)
        component = generator.choice(len(self.weights), size=num, p=self.weights)
        noise = generator.standard_normal((num, self.means.shape[1]))
        points = self.means[component] + np.sqrt(self.variances[component])[:, None] * noise
        return points.astype(np.float32), component.astype(np.int32)

    def _points(self, x_t, t):
        """x_t as a tensor: float (B, D), with one time or one a row."""
        if not ops.is_tensor(x_t) and not _checks.is_symbol(x_t):
            x_t = _checks.array("x_t", x_t, f"floats (B, {self.means.shape[1]})", kinds="f")
        x_t = ops.convert_to_tensor(x_t)
        _checks.floating(x_t=x_t)
        if len(x_t.shape) != 2 or x_t.shape[1] not in (None, self.means.shape[1]):
            raise ValueError(
                f"x_t must be of shape (B, {self.means.shape[1]}). Received {tuple(x_t.shape)}."
            )
        _checks.one_a_row(x_t, t=t)
        return x_t

    def _components(self, x_t, t):
        """Per component: α μ_k (K, D), variance of x_t, log of its joint density with k: (B, K)."""
        alpha = ops.expand_dims(ops.cast(self.process.alpha(t), x_t.dtype), -1)  # (1,) or (B, 1)
        sigma = ops.expand_dims(ops.cast(self.process.sigma(t), x_t.dtype), -1)
        variance = alpha**2 * ops.cast(self.variances, x_t.dtype) + sigma**2  # (K,) or (B, K)
        means = ops.expand_dims(alpha, -1) * ops.cast(self.means, x_t.dtype)  # ([B,] K, D)
        offset = x_t[:, None, :] - means  # (B, K, D)
        dimension = self.means.shape[1]
        log_joint = (
            ops.cast(np.log(self.weights), x_t.dtype)
            - 0.5 * ops.sum(offset**2, axis=-1) / variance
            - 0.5 * dimension * ops.log(2.0 * math.pi * variance)
        )
        return alpha, variance, offset, log_joint

    def log_density(self, x_t, t):
        """ln q_t(x_t), (B,), in nats."""
        x_t = self._points(x_t, t)
        return ops.logsumexp(self._components(x_t, t)[-1], axis=-1)

    def __call__(self, x_t, t):
        """E[x_0 | x_t]: the components' posterior means, weighed by their posterior."""
        x_t = self._points(x_t, t)
        alpha, variance, offset, log_joint = self._components(x_t, t)
        responsibility = _normalized(log_joint)  # (B, K)
        gain = alpha * ops.cast(self.variances, x_t.dtype) / variance  # (K,) or (B, K)
        posterior = ops.cast(self.means, x_t.dtype) + ops.expand_dims(gain, -1) * offset
        return ops.sum(responsibility[..., None] * posterior, axis=1)

    def score(self, x_t, t):
        """∇ log q_t(x_t), without the division by α or σ: finite at t = 0 too."""
        x_t = self._points(x_t, t)
        _, variance, offset, log_joint = self._components(x_t, t)
        responsibility = _normalized(log_joint)
        return -ops.sum((responsibility / variance)[..., None] * offset, axis=1)

    def sample_exact(self, x_1):
        """Endpoint at t = 0 of the probability-flow ODE from x_1, for a single Gaussian.

        (x_t − α μ)/√V with V = α² v + σ² does not change along the flow; at t = 0, V is v, or a
        little more where the process keeps some noise.

        Raises:
            ValueError: If the mixture has more than one component.
        """
        if len(self.means) > 1:
            raise ValueError(
                f"The flow of a mixture has no closed form; this one has {len(self.means)} "
                "components."
            )
        x_1 = self._points(x_1, 1.0)
        mean, variance = ops.cast(self.means[0], x_1.dtype), float(self.variances[0])
        times = ops.convert_to_tensor([0.0, 1.0], dtype=x_1.dtype)
        alpha, sigma = self.process.alpha(times), self.process.sigma(times)
        spread = ops.sqrt(alpha**2 * variance + sigma**2)
        return alpha[0] * mean + spread[0] / spread[1] * (x_1 - alpha[1] * mean)


def _normalized(log_joint):
    """Softmax over components; Keras' own warns where there is only one."""
    return ops.exp(log_joint - ops.logsumexp(log_joint, axis=-1, keepdims=True))
