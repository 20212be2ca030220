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


def _gauss_legendre(count: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return 0.5 * (1.0 + nodes), 0.5 * weights


#: Quadratures on [0, 1]: as good as exact, and the published shortcut of second-order solvers.
EXACT, MIDDLE = _gauss_legendre(16), _gauss_legendre(1)


def log_ratio(process: Process, t):
    """λ = ln(α/σ), half the log-SNR, kept finite."""
    return ops.clip(0.5 * process.log_snr(t), -_LIMIT, _LIMIT)


def mean(values, places, begin, end, rate, quadrature=EXACT):
    """Mean, over begin … end, of the polynomial through values at places on a clock.

    The weight within the step is e^{rate (1 − τ)}, with τ from 0 to 1: rate 0 gives the
    coefficients of Adams' methods, other rates those of exponential integrators, the φ-functions.

    Args:
        values: tensors (B, ...), one a place.
        places: scalars on the clock, all different; `FAR` ones do not count.
        begin: of the step, scalar on the same clock.
        end: of the step.
        rate: scalar.
        quadrature: nodes and weights on [0, 1].

    Returns:
        Tensor (B, ...).
    """
    nodes, density = (ops.cast(part, places[0].dtype) for part in quadrature)
    density = density * ops.exp(ops.clip(rate, -_STEEPEST, _STEEPEST) * (1.0 - nodes))
    density = density / ops.sum(density)
    clock = begin + nodes * (end - begin)
    total = 0.0
    for j, (value, place) in enumerate(zip(values, places)):
        basis = density
        for other in (*places[:j], *places[j + 1 :]):
            basis = basis * (clock - other) / (place - other)
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


def finished(x_0, last_x_0, rise):
    """What x̂_0 tends to where there is no noise, given it now and when λ was less by `rise`.

    Along the flow dx̂_0 = −(σ/α) dε̂: towards the end x̂_0 is a line in (σ/α)².
    """
    return x_0 + rows(1.0 / ops.expm1(2.0 * rise), x_0) * (x_0 - last_x_0)


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
    middle = ops.clip(ops.cast(middle, t.dtype), s, t)
    rise = log_ratio(process, middle) - begin
    there = rise > 1e-3 * (end - begin)
    return ops.where(there, middle, s), ops.where(there, rise, end - begin)
