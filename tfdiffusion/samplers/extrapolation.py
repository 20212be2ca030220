"""What fast solvers share: the linear part of the flow is exact, the rest is a mean over the step.

With λ = ln(α/σ), the probability-flow ODE from t to s is solved exactly by (variation of constants;
DPM-Solver, arXiv:2206.00927, prop. 3.1, and DPM-Solver++, arXiv:2211.01095, prop. 4.1)

    x_s = (σ_s/σ_t) x_t + (α_s − α_t σ_s/σ_t) ⟨x̂_0⟩,    weight e^{λ − λ_s} in the mean,
    x_s = (α_s/α_t) x_t + (σ_s − σ_t α_s/α_t) ⟨ε̂⟩,      weight e^{λ_s − λ} in the mean,

where ⟨·⟩ is the mean over the step in λ. DDIM takes the value at t for the mean. A solver of higher
order takes the mean of the polynomial through values at several times: earlier ones (multistep) or
ones in between (single-step). Solvers differ in what they interpolate (x̂_0 or ε̂), along which
clock, and with which weight; nothing else.
"""

from __future__ import annotations

import numpy as np
from keras import ops

from tfdiffusion._backend import rows
from tfdiffusion.denoiser import Denoiser
from tfdiffusion.processes import Process

#: λ is held in ±20 where there is no signal, or no noise, at all.
_LIMIT = 20.0
#: λ below which (σ/α above 245) nothing is left to see, so that x̂_0 does not change on the way; the
#: mean of ε̂ is over the rest of a step, lest its differences count by how little signal there is.
_LEAST_SIGNAL = -5.5
_STEEPEST = 50.0

#: Place of values that are not there yet: so far away that they weigh nothing.
FAR = -1e15


# On [-1, 1]; as good as exact for every step that occurs.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def log_ratio(process: Process, t):
    """λ = ln(α/σ), half the log-SNR, kept finite."""
    return ops.clip(0.5 * process.log_snr(t), -_LIMIT, _LIMIT)


def mean(values, places, begin, end, rate, *, at_middle: bool = False, curvature: float = 1.0):
    """Mean, over begin … end, of the polynomial through values at places on a clock.

    The weight within the step is e^{rate (1 − τ)}, with τ from 0 to 1: rate 0 gives the
    coefficients of Adams' methods, other rates those of exponential integrators, the φ-functions.

    Args:
        values: tensors (B, ...), one a place.
        places: scalars on the clock, all different; `FAR` ones do not count.
        begin: of the step, scalar on the same clock.
        end: of the step.
        rate: scalar.
        at_middle: take a line's value at the middle of the step for its mean, as second-order
            solvers are published.
        curvature: of three values, the share of the parabola's curvature at `begin` that counts.

    Returns:
        Tensor (B, ...).
    """
    nodes, density = (ops.cast(part, places[0].dtype) for part in (0.5 + 0.5 * _NODES, _WEIGHTS))
    rate = ops.clip(ops.cast(rate, density.dtype), -_STEEPEST, _STEEPEST)
    density = density * ops.exp(rate * (1.0 - nodes))
    density = density / ops.sum(density)
    if at_middle:
        curved = len(places) > 2 and places[2] > 0.5 * FAR
        nodes = ops.where(curved, nodes, 0.5)
    clock = begin + nodes * (end - begin)
    total = 0.0
    for j, (value, place) in enumerate(zip(values, places)):
        others = (*places[:j], *places[j + 1 :])
        basis = density
        for other in others:
            basis = basis * (clock - other) / (place - other)
        if curvature != 1.0 and len(others) == 2:
            bend = density * (clock - begin) ** 2 / ((place - others[0]) * (place - others[1]))
            basis = basis - (1.0 - curvature) * bend
        total = total + rows(ops.sum(basis), value) * value
    return total


def move_clean(process: Process, x_t, x_0, t, s):
    """x_s for a mean x̂_0 over the step."""
    linear = process.sigma(s) / process.sigma(t)
    gain = -process.alpha(s) * ops.expm1(0.5 * (process.log_snr(t) - process.log_snr(s)))
    return rows(linear, x_t) * x_t + rows(gain, x_t) * x_0


def move_noise(process: Process, x_0, noise, mean_noise, t, s):
    """x_s for a mean ε̂ over the step, as a correction to DDIM's, which holds where α = 0 too."""
    rise = log_ratio(process, s) - ops.maximum(log_ratio(process, t), _LEAST_SIGNAL)
    gain = -process.sigma(s) * ops.expm1(rise)
    ddim = rows(process.alpha(s), x_0) * x_0 + rows(process.sigma(s), x_0) * noise
    return ddim + rows(gain, x_0) * (mean_noise - noise)


def clean_and_noise(denoiser: Denoiser, x_t, t):
    """(x̂_0, ε̂) from one evaluation."""
    x_0 = denoiser(x_t, t)
    return x_0, denoiser.noise_from(x_t, x_0, t)


def between(process: Process, t, s, share: float):
    """A time that lies at a share of the way from t to s in λ, and its λ − λ_t.

    A chain may have no level there, nor any other between t and s: then it is s.
    """
    begin = log_ratio(process, t)
    end = log_ratio(process, s)
    middle = process.inverse_log_snr(2.0 * (begin + share * (end - begin)))
    middle = ops.clip(ops.cast(middle, t.dtype), ops.minimum(s, t), ops.maximum(s, t))
    rise = log_ratio(process, middle) - begin
    there = ops.abs(rise) > 1e-3 * ops.abs(end - begin)
    return ops.where(there, middle, s), ops.where(there, rise, end - begin)
