"""From data to noise and back along the probability-flow ODE, and between two data.

The flow is one-to-one: run towards noise it encodes, run back it reconstructs, and what lies
between two codes on a great circle decodes to something between two images (DDIM, arXiv:2010.02502,
sec. 4.3 and 5.4). Any sampler without fresh noise will do; its steps also run backwards.
"""

from __future__ import annotations

from collections.abc import Sequence

from keras import ops

from tfdiffusion import _backend, _checks, random
from tfdiffusion._backend import rows
from tfdiffusion.denoiser import Denoiser
from tfdiffusion.samplers.base import Sampler, get
from tfdiffusion.samplers.loop import integrate, resolve_grid, sample


def encode(
    denoiser: Denoiser,
    x_0,
    *,
    sampler: str | Sampler = "ddim",
    steps: int = 50,
    grid: str | Sequence[float] = "uniform",
):
    """The noise from which a deterministic sampler makes given data.

    Example:

    >>> x_t = tfd.samplers.encode(denoiser, images, steps=100)
    >>> again = tfd.samplers.decode(denoiser, x_t, steps=100)

    Args:
        denoiser: (x_t, t) → x̂_0.
        x_0: data, float (B, ...), taken for the state at the grid's last time.
        sampler: a `Sampler` that draws no noise, or its name.
        steps: N, the number of times.
        grid: as in `sample`; it is visited from its end to its beginning.

    Returns:
        The state at the grid's first time, float32 (B, ...).

    Raises:
        ValueError: If the sampler draws noise or cannot run backwards, or see `sample`.
    """
    sampler = _reversible(sampler)
    times = resolve_grid(denoiser, grid, steps, sampler)
    x = _checks.examples("x_0", x_0)

    def run(times, x):
        # The scale that data have at the grid's last time; the noise there is left out.
        x = rows(denoiser.process.alpha(times[-1]), x) * x
        keys = random.keys([0])
        return integrate(denoiser, sampler, ops.flip(times, axis=0), keys, x, denoise_last=False)

    return _backend.compiled(run, denoiser.variables)(times, x)


def decode(
    denoiser: Denoiser,
    x_t,
    *,
    sampler: str | Sampler = "ddim",
    steps: int = 50,
    grid: str | Sequence[float] = "uniform",
):
    """The data that a deterministic sampler makes of given noise: `sample` without seeds.

    Args:
        denoiser: (x_t, t) → x̂_0.
        x_t: the state at the grid's first time, float (B, ...).
        sampler: see `encode`.
        steps: see `encode`.
        grid: see `encode`.

    Returns:
        float32 (B, ...).

    Raises:
        ValueError: See `encode`.
    """
    x = _checks.examples("x_t", x_t)
    sampler, seeds = _reversible(sampler), range(x.shape[0])
    return sample(denoiser, seeds, x.shape[1:], sampler=sampler, steps=steps, grid=grid, x=x)


def reconstruct(
    denoiser: Denoiser,
    x_0,
    *,
    sampler: str | Sampler = "ddim",
    steps: int = 50,
    grid: str | Sequence[float] = "uniform",
):
    """Data, encoded and decoded; how far from x_0 it is tells the error of the solver.

    Args:
        denoiser: (x_t, t) → x̂_0.
        x_0: data, float (B, ...).
        sampler: see `encode`.
        steps: see `encode`.
        grid: see `encode`.

    Returns:
        float32 (B, ...).

    Raises:
        ValueError: See `encode`.
    """
    request = {"sampler": sampler, "steps": steps, "grid": grid}
    return decode(denoiser, encode(denoiser, x_0, **request), **request)


def slerp(first, second, share):
    """Between two codes along a great circle, which keeps the length that noise has.

    Args:
        first: float (B, ...).
        second: float (B, ...).
        share: of the way from first to second, a number or (B,).

    Returns:
        Tensor (B, ...): (sin((1 − share) θ) first + sin(share θ) second)/sin θ, θ being the angle
        between them (DDIM, arXiv:2010.02502, eq. 67); a straight line where they are parallel.

    Raises:
        ValueError: If these are no finite numbers, or the two differ in shape.
    """
    first, second = _pair(first, second)
    if not ops.is_tensor(share):
        share = _checks.array("share", share, "one number, or one a row")
    _checks.one_a_row(first, share=share)
    axes = tuple(range(1, len(first.shape)))
    dot = ops.sum(first * second, axis=axes)
    lengths = ops.sqrt(ops.sum(first**2, axis=axes)) * ops.sqrt(ops.sum(second**2, axis=axes))
    angle = ops.arccos(ops.clip(ops.divide_no_nan(dot, lengths), -1.0, 1.0))
    share = ops.convert_to_tensor(share, dtype=angle.dtype)
    sine = ops.sin(angle)
    parallel = sine < 1e-4
    sine = ops.where(parallel, 1.0, sine)
    weights = [
        ops.where(parallel, part, ops.sin(part * angle) / sine) for part in (1.0 - share, share)
    ]
    return rows(weights[0], first) * first + rows(weights[1], second) * second


def interpolate(
    denoiser: Denoiser,
    first,
    second,
    shares: Sequence[float],
    *,
    sampler: str | Sampler = "ddim",
    steps: int = 50,
    grid: str | Sequence[float] = "uniform",
):
    """Data on the way between two, by way of their codes.

    Args:
        denoiser: (x_t, t) → x̂_0.
        first: data, float (B, ...).
        second: data, float (B, ...).
        shares: of the way, K numbers, 0 for first and 1 for second.
        sampler: see `encode`.
        steps: see `encode`.
        grid: see `encode`.

    Returns:
        float32 (K, B, ...).

    Raises:
        ValueError: See `encode`.
    """
    request = {"sampler": sampler, "steps": steps, "grid": grid}
    first, second = _pair(first, second)
    shares = _checks.array("shares", shares, "a vector of numbers", rank=1)
    if not len(shares):
        raise ValueError("shares must be at least one number. Received none.")
    count = first.shape[0]
    codes = encode(denoiser, ops.concatenate([first, second]), **request)
    between = [slerp(codes[:count], codes[count:], float(share)) for share in shares]
    images = decode(denoiser, ops.concatenate(between), **request)
    return ops.reshape(images, (len(between), count, *images.shape[1:]))


def _pair(first, second) -> tuple:
    """Two sets of examples of one shape."""
    first, second = _checks.examples("first", first), _checks.examples("second", second)
    _checks.alike(first=first, second=second)
    return first, second


def _reversible(sampler: str | Sampler) -> Sampler:
    sampler = get(sampler)
    if not sampler.reversible:
        raise ValueError(
            f"{sampler} cannot encode: it draws fresh noise, or its steps run one way only. Use "
            "'ddim', 'euler', 'heun', 'rk4', 'dpmpp_2m' or 'dpm_solver_2'."
        )
    return sampler
