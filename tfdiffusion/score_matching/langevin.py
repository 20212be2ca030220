"""Langevin dynamics: samples of a density from its score alone.

A step goes uphill and adds noise. Two conventions of the step size are in print, and taking one for
the other halves or doubles every step:

| convention | step                  | stable on N(0, σ²) | source                         |
|------------|-----------------------|--------------------|--------------------------------|
| "ncsn"     | x + (ε/2) s(x) + √ε z | ε < 4σ²            | NCSN, arXiv:1907.05600, eq. 4  |
| "ncsnv2"   | x + α s(x) + √(2α) z  | α < 2σ²            | NCSNv2, arXiv:2006.09011       |

Here h = ε/2 or α. On N(0, σ²) the chain's variance is σ²/(1 − h/(2σ²)) rather than σ²: the smaller
the step, the smaller the bias; the Metropolis correction removes it. Where regions without data
separate the modes, the score does not know how much mass lies in each, and neither does the chain.
Annealing from large noise to small does (arXiv:1907.05600, alg. 1): at level i the step is
h_i ∝ σ_i², and the last step is Tweedie's, x + σ_L² s(x), without which the noise of σ_L stays in
the sample (FID 31.75 against 10.87, arXiv:2006.09011, app. C).

Everything runs in one compiled loop. Noise comes from one key a row, so row i is a function of its
own key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from keras import ops

from tfdiffusion import _backend, _checks, _names, _states, random
from tfdiffusion.score_matching.ladders import check_ladder

# A key has one stream for the first state and one a step.
_START, _FIRST_STEP = 0, 1

#: Convention → what of its step size multiplies the score.
_DRIFT = {"ncsn": 0.5, "ncsnv2": 1.0}


def drift_step(step_size: float, convention: str, smallest_sigma: float | None = None) -> float:
    """h of x + h s(x) + √(2h) z, for a step size in one of the published conventions.

    Args:
        step_size: ε or α, positive.
        convention: "ncsn" or "ncsnv2".
        smallest_sigma: the smallest standard deviation of the target in any direction, where it is
            known.

    Returns:
        h.

    Raises:
        ValueError: If the convention is unknown, or the step is not positive or not below the limit
            of stability, 2σ² for h.
    """
    factor = _names.look_up("convention", convention, _DRIFT)
    _checks.number("step_size", step_size, "(0, inf)")
    if smallest_sigma is not None:
        _checks.number("smallest_sigma", smallest_sigma, "(0, inf)")
    if smallest_sigma is not None and factor * step_size >= 2.0 * smallest_sigma**2:
        limit = 2.0 * smallest_sigma**2 / factor
        raise ValueError(
            f"step_size={step_size:g} is beyond the limit of stability of the {convention!r} "
            f"convention, {limit:g} ({2 / factor:g} sigma^2 with sigma={smallest_sigma:g}): the "
            "chain would diverge. Use a smaller step."
        )
    return factor * float(step_size)


def noise_of(keys, shape: Sequence[int]) -> Callable:
    """The noise of a chain: k → standard normal (B, *shape), k = 0 for the first state."""

    def noise(k):
        return random.normal(random.fold_in(keys, k + _START), tuple(shape))

    return noise


def interpolating_noise(keys_a, keys_b, share, shape: Sequence[int]) -> Callable:
    """Noise between that of two keys: cos(πs/2) z_a + sin(πs/2) z_b (arXiv:2006.09011, app. B).

    It is standard normal for every share s, so each chain is a proper one, and neighbours in s run
    along each other.

    Args:
        keys_a: uint32 (B, 2) or (1, 2), at s = 0.
        keys_b: the same, at s = 1.
        share: s in [0, 1], (B,).
        shape: of one sample.
    """
    angle = ops.cast(share, "float32") * (0.5 * np.pi)
    noise_a, noise_b = noise_of(keys_a, shape), noise_of(keys_b, shape)

    def noise(k):
        z_a, z_b = noise_a(k), noise_b(k)
        cosine, sine = _backend.rows(ops.cos(angle), z_a), _backend.rows(ops.sin(angle), z_a)
        return cosine * z_a + sine * z_b

    return noise


def langevin(
    score: Callable,
    x,
    keys,
    *,
    step_size: float,
    steps: int,
    convention: str,
    temperature: float = 1.0,
    smallest_sigma: float | None = None,
    variables: Sequence = (),
    return_path: bool = False,
):
    """Unadjusted Langevin dynamics.

    >>> x = langevin(lambda x: -x, x, keys, step_size=0.01, steps=1000, convention="ncsnv2")

    Args:
        score: (B, ...) → (B, ...).
        x: float (B, ...), where the chains begin.
        keys: uint32 (B, 2), one a row.
        step_size: ε or α.
        steps: how many, >= 1.
        convention: "ncsn" or "ncsnv2"; there is no default, because they differ by a factor of 2.
        temperature: τ >= 0, which multiplies the variance of the noise: in the limit of small
            steps the chain samples a density ∝ p^{1/τ}, so 1 is p itself, and 0, no noise, is
            gradient ascent of log p.
        smallest_sigma: see `drift_step`.
        variables: Keras variables that the score reads, which JAX must be told.
        return_path: also return every state, from the first to the last.

    Returns:
        The last state, float32 (B, ...); or (last state, path (steps + 1, B, ...)).

    Raises:
        ValueError: If the step size or the temperature is out of range, or the rows of keys and x
            differ.
    """
    h = drift_step(step_size, convention, smallest_sigma)
    _checks.number("temperature", temperature, "[0, inf)")
    scale = (2.0 * h * temperature) ** 0.5
    x = _checked_start(x, keys, steps)

    def run(x, keys):
        noise = noise_of(keys, x.shape[1:])

        def advance(k, state):
            x, path = state
            x = x + h * score(x) + scale * noise(k + _FIRST_STEP)
            return x, _states.record(path, k + 1, x)

        x, path = ops.fori_loop(0, steps, advance, (x, _states.begin(x, steps + 1, return_path)))
        return (x, *path)

    x, *path = _backend.compiled(run, variables)(x, keys)
    return (x, *path) if return_path else x


def metropolis_langevin(
    energy: Callable,
    x,
    keys,
    *,
    step_size: float,
    steps: int,
    convention: str,
    variables: Sequence = (),
):
    """Metropolis-adjusted Langevin dynamics (MALA): exact, whatever the step size.

    Each step of `langevin` is a proposal, accepted with probability
    min(1, p(x') q(x | x') / p(x) q(x' | x)), for which one needs p = e^{−E} and not only its score
    (Roberts & Tweedie 1996).

    Args:
        energy: E = −log p up to a constant, (B, ...) → (B,), row by row.
        x: float (B, ...), where the chains begin.
        keys: uint32 (B, 2), one a row.
        step_size: ε or α.
        steps: how many, >= 1.
        convention: "ncsn" or "ncsnv2".
        variables: Keras variables that the energy reads, which JAX must be told.

    Returns:
        The last state, float32 (B, ...), and the share of accepted steps of each row, (B,).

    Raises:
        ValueError: If the step size is not positive, or the rows of keys and x differ.
    """
    h = drift_step(step_size, convention)
    x = _checked_start(x, keys, steps)

    def _log_proposal(to, origin, gradient):
        offset = to - origin + h * gradient
        return -ops.sum(offset**2, axis=tuple(range(1, len(offset.shape)))) / (4.0 * h)

    def run(x, keys):
        noise = noise_of(keys, x.shape[1:])

        def advance(k, state):
            x, value, gradient, accepted = state
            proposal = x - h * gradient + (2.0 * h) ** 0.5 * noise(k + _FIRST_STEP)
            new_value, new_gradient = _backend.vjp(energy, proposal)
            log_ratio = (
                value
                - new_value
                + _log_proposal(x, proposal, new_gradient)
                - _log_proposal(proposal, x, gradient)
            )
            # A stream of its own, behind those of the steps.
            coin = random.uniform(random.fold_in(keys, k + steps + _FIRST_STEP))
            accept = ops.log(coin) < log_ratio

            def choose(new, old):
                kept = ops.reshape(accept, (-1,) + (1,) * (len(new.shape) - 1))
                return ops.where(kept, new, old)

            state = choose(proposal, x), choose(new_value, value), choose(new_gradient, gradient)
            return (*state, accepted + ops.cast(accept, "float32") / steps)

        value, gradient = _backend.vjp(energy, x)
        start = (x, value, gradient, ops.zeros_like(value))
        x, _, _, accepted = ops.fori_loop(0, steps, advance, start)
        return x, accepted

    return _backend.compiled(run, variables)(x, keys)


def _checked_start(x, keys, steps: int):
    x = _checks.examples("x", x)
    random.check_keys(keys)
    if x.shape[0] != keys.shape[0]:
        raise ValueError(
            f"There must be one key a row. Received {keys.shape[0]} keys for x of shape "
            f"{tuple(x.shape)}."
        )
    _checks.integer("steps", steps)
    return x


def drift_steps(sigmas: Sequence[float], step_size: float, convention: str) -> np.ndarray:
    """h_i of annealed Langevin dynamics: proportional to σ_i², the given step at the last level.

    Args:
        sigmas: the ladder, falling.
        step_size: ε or α at the smallest σ.
        convention: "ncsn" or "ncsnv2".

    Returns:
        float64 (L,).

    Raises:
        ValueError: If the ladder does not fall, or the step is beyond the limit of stability, which
            is the same at every level.
    """
    sigmas = check_ladder(sigmas)
    return drift_step(step_size, convention, float(sigmas[-1])) * (sigmas / sigmas[-1]) ** 2


def annealed(
    score: Callable,
    sigmas: Sequence[float],
    noise: Callable,
    *,
    step_size: float,
    steps_per_level: int,
    convention: str = "ncsnv2",
    denoise: bool = True,
    known=None,
    mask=None,
    return_path: bool = False,
):
    """Annealed Langevin dynamics (arXiv:1907.05600, alg. 1): traceable, one loop in the graph.

    The first state is N(0, σ_1² I). With `known` pixels, these are replaced before every step by
    themselves with as much noise as the level has, and given back untouched at the end
    (arXiv:1907.05600, alg. 2).

    Args:
        score: (x, level) → ∇ log q_σ(x), with the level an int32 scalar, 0 for the largest σ.
        sigmas: the ladder, falling.
        noise: k → standard normal (B, ...); see `noise_of` and `interpolating_noise`.
        step_size: ε or α at the smallest σ.
        steps_per_level: T >= 1.
        convention: "ncsn" or "ncsnv2".
        denoise: end with x + σ_L² s(x).
        known: float (B, ...), the pixels to keep, anything elsewhere; None to keep none.
        mask: (B, ...) or (...), nonzero where `known` holds.
        return_path: also return the first state, that after each level, and the sample.

    Returns:
        The sample, float32 (B, ...); or (sample, path (L + 2, B, ...)).

    Raises:
        ValueError: If the ladder does not fall or a number is out of range.
    """
    _checks.integer("steps_per_level", steps_per_level)
    sigmas = check_ladder(sigmas)
    h = ops.cast(drift_steps(sigmas, step_size, convention), "float32")
    table = ops.cast(sigmas, "float32")
    x = table[0] * noise(0)
    is_known = None if known is None else ops.cast(mask, "bool")
    path = _states.begin(x, len(sigmas) + 1, return_path)
    # Each step has a number for its own noise and one for that of the known pixels.
    total = len(sigmas) * steps_per_level

    def advance(k, state):
        x, path = state
        level = k // steps_per_level
        if known is not None:
            noisy = known + table[level] * noise(total + k + _FIRST_STEP)
            x = ops.where(is_known, noisy, x)
        x = x + h[level] * score(x, level) + ops.sqrt(2.0 * h[level]) * noise(k + _FIRST_STEP)
        return x, _states.record(path, level + 1, x)

    x, path = ops.fori_loop(0, total, advance, (x, path))
    if denoise:
        last = ops.convert_to_tensor(len(sigmas) - 1, dtype="int32")
        x = x + table[-1] ** 2 * score(x, last)
    if known is not None:
        x = ops.where(is_known, known, x)
    if not return_path:
        return x
    return x, ops.concatenate([path[0], x[None]])
