"""Exact log-likelihood by the probability-flow ODE, for any denoiser and any process.

The flow carries the data to noise without randomness, so ln p follows from the divergence of the
velocity (score SDE, arXiv:2011.13456, eq. 39). Scaled to unit variance, z = x_t/√(α_t² + σ_t²), and
with the log-SNR λ as time, the flow of every process is the same and nothing in it is singular:

    dz/dλ      = ½ α (x̂_0 − α z),                     α² = sigmoid(λ),
    d ln p/dλ  = ½ α (α D − tr ∂x̂_0/∂z).

It ends in z ~ N(0, I). The trace costs D products with the Jacobian, or one and a random probe v:
E vᵀ J v = tr J (Hutchinson 1990). A chain of T steps is taken between its steps too.

What is measured is the density of y = x_0 + (σ/α) ε at the least noise that the model knows, which
is all that a diffusion model has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from keras import ops

from tfdiffusion import _backend, _checks, _names, _states, random
from tfdiffusion.denoiser import Denoiser
from tfdiffusion.likelihood import levels
from tfdiffusion.likelihood.bound import (
    _batches,
    _clean,
    negative_log,
    prior_at,
    standard_error,
)
from tfdiffusion.likelihood.pixels import Pixels, as_float, check_pixels

DIVERGENCES = ("rademacher", "gaussian", "exact")
DEQUANTIZATIONS = ("uniform", "decoder")
_DEQUANTIZATION, _PROBE = 0, 1

# The pair of orders 5 and 4 of Dormand and Prince (1980); the last stage is the next step's first.
_NODES = np.array([0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0])
_STAGES = np.array(
    [
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [1 / 5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [3 / 40, 9 / 40, 0.0, 0.0, 0.0, 0.0, 0.0],
        [44 / 45, -56 / 15, 32 / 9, 0.0, 0.0, 0.0, 0.0],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0.0, 0.0, 0.0],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0.0, 0.0],
        [35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0],
    ]
)
_ERRORS = np.array([71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40])


class ToleranceError(RuntimeError):
    """The adaptive solver could not reach the end at the tolerance that was asked for."""


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """Log-likelihoods of N examples, one row a draw of dequantisation noise and probe.

    Attributes:
        log_density: ln p in nats, (draws, N); of pixels with dequantization="decoder", a lower
            bound of the logarithm of their probability.
        latents: where the flow takes the data, (draws, N, ...): N(0, I) under the model.
        evaluations: of the denoiser, by the solver, on average over batches.
        dimension: D, numbers in an example.
        offset: bits a dimension from density to probability; see `Pixels.offset`.
    """

    log_density: np.ndarray
    latents: np.ndarray
    evaluations: float
    dimension: int
    offset: float = 0.0

    @property
    def bits(self) -> np.ndarray:
        """Bits a dimension of each example, (N,), averaged over draws; an upper bound for pixels.

        For 8-bit images it is the negative log-likelihood of the images themselves, because
        E ln p(x + u) is at most the logarithm of the bin's probability (Jensen).
        """
        nats = -self.log_density.mean(axis=0) / self.dimension
        return nats / math.log(2.0) + self.offset

    @property
    def mean(self) -> float:
        """Bits a dimension, averaged over examples and draws."""
        return float(self.bits.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, over the examples."""
        return standard_error(self.bits)

    @property
    def draw_error(self) -> float:
        """Standard error of the mean from the draws alone, for these examples; NaN of one draw."""
        draws = -self.log_density.mean(axis=1) / (self.dimension * math.log(2.0))
        return standard_error(draws)


def log_likelihood(
    model,
    x_0,
    label=None,
    *,
    divergence: str = "rademacher",
    draws: int = 1,
    tolerance: float = 1e-4,
    pixels: Pixels | None = Pixels(),  # noqa: B008 (frozen)
    dequantization: str = "uniform",
    seed: int = 0,
    batch_size: int = 64,
    max_steps: int = 500,
    prior_tolerance: float = 0.01,
) -> LogLikelihood:
    """ln p of each example by the probability-flow ODE (score SDE, arXiv:2011.13456, sec. 4.3).

    Example:

    >>> result = tfd.likelihood.log_likelihood(model, images, draws=4)
    >>> f"{result.mean:.3f} ± {result.standard_error:.3f} bits a dimension"

    Args:
        model: a `DiffusionModel` or any denoiser, of diffusion or score models.
        x_0: float (N, ...).
        label: int (N,) or None; only for denoisers that take one.
        divergence: "rademacher" or "gaussian" probes, unbiased, or "exact", with D products with
            the Jacobian instead of one.
        draws: how often to repeat with fresh probes and dequantisation noise.
        tolerance: of the solver's error a step, relative and absolute, in z and in ln p a
            dimension.
        pixels: the scale of the data. None for points, which are taken as they are.
        dequantization: of pixels: "uniform" noise fills their bins, as papers report it; "decoder"
            takes the Gaussian noise of the model's first latent instead and decodes it as
            `continuous_bound` does, whose terms but for the steps it shares. A model whose least
            noise is not far below a bin has many bits less that way.
        seed: of the noise; example n of draw m has its own.
        batch_size: examples at a time; they share the solver's steps, and each meets the tolerance.
        max_steps: of the solver, accepted or not.
        prior_tolerance: the largest KL from x_1 to the prior, in bits a dimension. Beyond it the
            flow does not end in a Gaussian, and its likelihood would be that of another model.

    Returns:
        A `LogLikelihood`.

    Raises:
        TypeError: If the data are not floats.
        ValueError: If the data are out of range, the process does not end in the prior, or an
            argument is out of range.
        ToleranceError: If the solver does not get there.
    """
    _names.one_of("divergence", divergence, DIVERGENCES)
    _names.one_of("dequantization", dequantization, DEQUANTIZATIONS)
    _checks.numbers(tolerance=tolerance)
    _checks.number("prior_tolerance", prior_tolerance, "[0, inf]")
    check_pixels(pixels)
    if not tolerance >= 1e-7:
        raise ValueError(
            f"tolerance must be at least 1e-7, where float32 rounds. Received {tolerance}."
        )
    draws = _checks.integer("draws", draws)
    max_steps = _checks.integer("max_steps", max_steps)
    denoiser = levels.continuous(levels.of(model))
    x_0 = as_float(x_0, "of points").astype("float32") if pixels is None else pixels.check(x_0)
    start, end = levels.log_snr_ends(denoiser)
    _check_prior(x_0, end, prior_tolerance)
    shape = x_0.shape[1:]
    dimension = int(np.prod(shape))

    def dequantized(x_0, keys):
        """A point y near x_0, and ln P(x_0 | y) − ln q(y | x_0), where it is not left to bins."""
        if pixels is None:
            return x_0, 0.0
        if dequantization == "uniform":
            return pixels.dequantize(x_0, keys), 0.0
        noise = random.normal(keys, shape)
        y = x_0 + math.exp(-0.5 * start) * noise
        return y, _total(negative_log(y, x_0, -start, None) - negative_log(x_0, y, -start, pixels))

    def run(x_0, keys, *label):
        y, gained = dequantized(x_0, random.fold_in(keys, _DEQUANTIZATION))
        probe = _probes(divergence, random.fold_in(keys, _PROBE), shape)

        def field(log_snr, state):
            return velocity_and_divergence(denoiser, state[0], log_snr, probe, *label)

        # The data are y = x/α, and z = √sigmoid(λ) y.
        log_scale = -0.5 * math.log1p(math.exp(-start))
        state = (math.exp(log_scale) * y, ops.zeros_like(x_0[(slice(None),) + (0,) * len(shape)]))
        (z, spread), reached, evaluations = integrate(
            field, state, start, end, tolerance, max_steps, scales=(1.0, float(dimension))
        )
        axes = tuple(range(1, len(x_0.shape)))
        log_prior = -0.5 * ops.sum(ops.square(z) + math.log(2.0 * math.pi), axis=axes)
        return log_prior + spread + dimension * log_scale + gained, z, reached, evaluations

    run = _backend.compiled(run, denoiser.variables)
    densities, latents, evaluations = [], [], []
    for draw in range(draws):
        parts = []
        for _, x, keys, label_ in _batches(denoiser, x_0, label, seed, batch_size):
            *part, reached, count = run(x, random.fold_in(keys, 3 + draw), *label_)
            _check_reached(float(reached), start, end, tolerance, max_steps)
            parts.append([np.asarray(ops.convert_to_numpy(p)) for p in part])
            evaluations.append(int(count))
        density, z = (np.concatenate(part)[: len(x_0)] for part in zip(*parts))
        densities.append(density.astype("float64"))
        latents.append(z)
    return LogLikelihood(
        log_density=np.stack(densities),
        latents=np.stack(latents),
        evaluations=float(np.mean(evaluations)),
        dimension=dimension,
        offset=pixels.offset if pixels is not None and dequantization == "uniform" else 0.0,
    )


def velocity_and_divergence(denoiser: Denoiser, z, log_snr, probe, label=None):
    """(dz/dλ, its divergence) of the probability flow; see the head of this file.

    Args:
        denoiser: (x_t, t) → x̂_0.
        z: x_t scaled to unit variance, (B, ...).
        log_snr: λ, a scalar.
        probe: (B, P, ...); the sum of vᵀ J v over P probes stands for the trace.
        label: int (B,) or None.

    Returns:
        dz/dλ, (B, ...), and its divergence, (B,).
    """
    process, count = denoiser.process, probe.shape[1]
    t = process.inverse_log_snr(log_snr)
    # α and σ as the network was told them, so that the coordinates fit it exactly.
    scale = ops.cast(ops.sqrt(process.alpha(t) ** 2 + process.sigma(t) ** 2), z.dtype)
    alpha = ops.cast(ops.sqrt(ops.sigmoid(log_snr)), z.dtype)
    label = None if label is None else ops.repeat(label, count, axis=0)
    flat = (-1, *z.shape[1:])

    def clean(z):
        return _clean(denoiser, scale * z, t, label)

    x_0, product = _backend.vjp(clean, ops.repeat(z, count, axis=0), ops.reshape(probe, flat))
    x_0 = ops.reshape(x_0, (-1, count, *z.shape[1:]))[:, 0]
    # The probe sees the whole Jacobian: of x̂_0 alone a Gaussian one would be far noisier.
    product = ops.reshape(product, (-1, count, *z.shape[1:])) - alpha * probe
    return 0.5 * alpha * (x_0 - alpha * z), 0.5 * alpha * _total(product * probe)


def integrate(field, state: tuple, start: float, end: float, tolerance, max_steps, scales):
    """Adaptive Runge-Kutta of orders 5 and 4 (Dormand and Prince 1980), in one compiled loop.

    A step is accepted if, in each row, the root mean square of its estimated error over
    tolerance · (scale + |value|) is at most 1; all rows take the same steps.

    Args:
        field: (time, state) -> derivatives.
        state: tensors (B, ...).
        start: first time.
        end: last time, on either side of it.
        tolerance: see above.
        max_steps: accepted and rejected ones together.
        scales: absolute size of each tensor of the state.

    Returns:
        (state, the time that was reached, evaluations of the field).
    """
    time = ops.convert_to_tensor(start, dtype=_backend.TIME_DTYPE)
    direction = 1.0 if end > start else -1.0
    length = abs(end - start)

    nodes = ops.cast(_NODES, time.dtype)

    def combine(slopes, coefficients, h):
        return tuple(
            ops.cast(h, k.dtype) * ops.tensordot(ops.cast(coefficients, k.dtype), k, axes=1)
            for k in slopes
        )

    def advance(time, size, first, steps, *state):
        # `first` is the derivative where the last step ended.
        left = ops.abs(end - time)
        h = direction * ops.minimum(size, left)

        def stage(i, done):
            # A loop, so that a network is traced once and not six times.
            slopes, _ = done
            moves = combine(slopes, ops.take(ops.convert_to_tensor(_STAGES), i, axis=0), h)
            proposal = tuple(x + move for x, move in zip(state, moves))
            slope = field(time + nodes[i] * h, proposal)
            put = zip(slopes, slope)
            return tuple(_states.put(k, i, value) for k, value in put), proposal

        slopes = tuple(ops.stack([k] + 6 * [ops.zeros_like(k)]) for k in first)
        slopes, proposal = ops.fori_loop(1, 7, stage, (slopes, state))
        error = _error_norm(combine(slopes, _ERRORS, h), state, proposal, tolerance, scales)
        accepted = error <= 1.0  # not if it is NaN
        factor = 0.9 * ops.maximum(error, 1e-10) ** -0.2
        factor = ops.where(ops.isfinite(factor), ops.clip(factor, 0.2, 5.0), 0.2)
        done = ops.logical_and(accepted, size >= left)
        time = ops.where(done, ops.full_like(time, end), ops.where(accepted, time + h, time))
        state = tuple(ops.where(accepted, new, old) for new, old in zip(proposal, state))
        first = tuple(ops.where(accepted, k[6], old) for k, old in zip(slopes, first))
        size = ops.minimum(size, left) * ops.cast(factor, size.dtype)
        return (time, size, first, steps + 1, *state)

    def unfinished(time, size, first, steps, *state):
        # A step that rounding swallows will never arrive.
        moves = size > 1e-6 * length
        return ops.logical_and(ops.abs(end - time) > 0.0, ops.logical_and(steps < max_steps, moves))

    size = ops.full_like(time, 0.02 * length)
    loop = (time, size, tuple(field(time, state)), ops.zeros((), "int32"), *state)
    time, _, _, steps, *state = ops.while_loop(unfinished, advance, loop)
    return tuple(state), time, 1 + 6 * steps


def _error_norm(errors, before, after, tolerance, scales):
    """Largest over rows and tensors of the scaled root mean square error."""
    norms = []
    for error, old, new, scale in zip(errors, before, after, scales):
        size = tolerance * (scale + ops.maximum(ops.abs(old), ops.abs(new)))
        squares = ops.square(error / size)
        axes = tuple(range(1, len(error.shape)))
        norms.append(ops.max(ops.sqrt(ops.mean(squares, axis=axes) if axes else squares)))
    return ops.maximum(*norms)


def _probes(divergence: str, keys, shape: tuple[int, ...]):
    """(B, P, *shape): one random probe a row, or all D unit vectors."""
    if divergence == "exact":
        dimension = math.prod(shape)
        basis = ops.reshape(ops.eye(dimension), (1, dimension, *shape))
        return ops.repeat(basis, ops.shape(keys)[0], axis=0)
    if divergence == "gaussian":
        return ops.expand_dims(random.normal(keys, shape), 1)
    return ops.expand_dims(2.0 * ops.round(random.uniform(keys, shape)) - 1.0, 1)


def _total(values):
    """Sum over all axes but the first."""
    return ops.sum(values, axis=tuple(range(1, len(values.shape))))


def _check_prior(x_0: np.ndarray, log_snr: float, tolerance: float) -> None:
    """Refuses a process that has not become the prior where it ends."""
    nats = float(ops.convert_to_numpy(ops.mean(prior_at(ops.convert_to_tensor(x_0), log_snr))))
    bits = nats / math.log(2.0)
    if bits > tolerance:
        raise ValueError(
            f"The process does not end in its prior: at t = 1 the KL of these data to it is "
            f"{bits:.3g} bits a dimension (allowed {tolerance:g}; log-SNR {log_snr:.3g}). Use a "
            "process with more noise (a larger beta_end or sigma_max, more steps), bound(), which "
            "counts the mismatch, or a larger prior_tolerance."
        )


def _check_reached(reached: float, start: float, end: float, tolerance, max_steps) -> None:
    if reached != end:
        share = (reached - start) / (end - start)
        raise ToleranceError(
            f"The solver got {share:.0%} of the way in at most {max_steps} steps at tolerance "
            f"{tolerance:g}. Use a larger tolerance or a larger max_steps."
        )
