"""The one loop from noise to samples, and the prior it starts from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from keras import ops

from tfdiffusion import _backend, _checks, _states, random
from tfdiffusion._backend import rows
from tfdiffusion.denoiser import Denoiser, check
from tfdiffusion.samplers.base import Sampler, get
from tfdiffusion.times import Grid, check_steps
from tfdiffusion.times import grid as make_grid

# A key has one stream for the prior and one a step, so a path never meets the same number twice.
_PRIOR, _FIRST_STEP = 0, 1


def prior(denoiser: Denoiser, keys, shape: Sequence[int], t=1.0):
    """Noise as it is at time t: N(0, α² + σ²), for data of unit variance and mean zero.

    That is N(0, I) for variance-preserving processes and N(0, σ_max²) up to 1/σ_max² for exploding
    ones; starting from plain N(0, I) there would be an error of scale.

    Args:
        denoiser: whose process it is.
        keys: uint32 (B, 2), one a sample.
        shape: of one sample.
        t: the time at which sampling starts.

    Returns:
        float32 (B, *shape).

    Raises:
        TypeError: If denoiser or keys are none.
        ValueError: If the shape is none.
    """
    random.check_keys(keys)
    alpha_t, sigma_t = check(denoiser).process.alpha(t), denoiser.process.sigma(t)
    noise = random.normal(random.fold_in(keys, _PRIOR), shape)
    return rows(ops.sqrt(alpha_t**2 + sigma_t**2), noise) * noise


def integrate(
    denoiser: Denoiser,
    sampler: Sampler,
    times,
    keys,
    x,
    *,
    denoise_last: bool = True,
    settle: bool | None = None,
    return_path: bool = False,
    return_report: bool = False,
):
    """Runs a sampler over a grid: traceable, one loop in the graph, no Python a step.

    Between the N times lie N − 1 steps; then x̂_0 at the last time is the sample (or what else the
    sampler's `finish` makes of it), so no noise is added at the end, whatever the process.

    Args:
        denoiser: (x_t, t) → x̂_0.
        sampler: the step.
        times: (N,), falling; N may be dynamic.
        keys: uint32 (B, 2).
        x: the state at times[0], (B, ...).
        denoise_last: False returns the state at times[N − 1] instead.
        settle: whether solvers may end with lower orders, as they do where x̂_0 is the end; by
            default they keep their order to a last state.
        return_path: also return the states, (N + denoise_last, B, ...): at each time, and last the
            sample.
        return_report: also return what it took, see `Sampler.report`; hand it to `Sampler.check`.

    Returns:
        The sample (B, ...); or a tuple of it, the path and the report, as far as asked for.

    Raises:
        TypeError: If denoiser or keys are none.
        ValueError: If the sampler is unknown, the times or the state are not float, or there is
            not one key a row.
    """
    denoiser, sampler = check(denoiser), get(sampler)
    random.check_keys(keys)
    _checks.floating(times=times, x=x)
    times, x = ops.convert_to_tensor(times), ops.convert_to_tensor(x)
    if len(times.shape) != 1 or 0 in times.shape or len(x.shape) < 2 or 0 in x.shape:
        raise ValueError(
            "times must be of shape (N,) and x of shape (B, ...), none 0. Received "
            f"{tuple(times.shape)} and {tuple(x.shape)}."
        )
    if keys.shape[0] != 1:  # which serves all rows, where there is no noise
        _checks.one_a_row(x, keys=keys[:, 0])
    steps = ops.shape(times)[0] - 1
    path = _states.begin(x, steps + 2, return_path)

    def advance(k, state):
        carry, path = state
        step_keys = random.fold_in(keys, k + _FIRST_STEP)
        carry = sampler.step(denoiser, carry, times[k], times[k + 1], step_keys)
        return carry, _states.record(path, k + 1, carry[0])

    settle = denoise_last if settle is None else settle
    carry = sampler.start(x, steps + int(denoise_last) if settle else None)
    carry, path = ops.fori_loop(0, steps, advance, (carry, path))
    result = carry[0]
    if denoise_last:
        last_keys = random.fold_in(keys, steps + _FIRST_STEP)
        result = sampler.finish(denoiser, carry, times[steps], last_keys)
    outputs = [result]
    if return_path:
        last = [result[None]] if denoise_last else []
        outputs.append(ops.concatenate([path[0][:-1], *last]))
    if return_report:
        report = sampler.report(carry, steps)
        outputs.append({**report, "evaluations": report["evaluations"] + int(denoise_last)})
    return tuple(outputs) if len(outputs) > 1 else result


def sample(
    denoiser: Denoiser,
    seeds: int | Sequence[int],
    shape: Sequence[int],
    *,
    sampler: str | Sampler = "ddim",
    steps: int = 50,
    grid: str | Grid | Sequence[float] = "uniform",
    x=None,
    denoise_last: bool = True,
    return_path: bool = False,
    return_report: bool = False,
):
    """Draws one sample a seed from any denoiser.

    Example:

    >>> images = tfd.sample(model.denoiser(), seeds=range(16), shape=(28, 28, 1), steps=25)

    Args:
        denoiser: (x_t, t) → x̂_0, labels and guidance already in it.
        seeds: one integer a sample; a seed gives its sample in any batch.
        shape: of one sample, without the batch.
        sampler: a `Sampler` or its name.
        steps: N, the number of times, at most T on a chain; a sampler of k evaluations a step takes
            k (N − 1) + 1.
        grid: a name that `tfdiffusion.times.grid` knows, a `Grid`, or falling times in (0, 1].
        x: the state to start from, (B, *shape), instead of noise from the seeds.
        denoise_last: see `integrate`.
        return_path: see `integrate`.
        return_report: also return a dict with at least the number of `evaluations`, an integer, or
            one a sample (B,) where a sampler chooses its own steps.

    Returns:
        float32 tensor (B, *shape); or a tuple of it, the path and the report, as far as asked for.

    Raises:
        ValueError: If a name is unknown, the times do not fall within (0, denoiser.latest], or x
            does not have a row for each seed.
        TypeError: If the denoiser is none, or the seeds are not integers.
        RuntimeError: If a sampler with a tolerance could not meet it.
    """
    sampler, shape = get(sampler), _checks.shape(shape)
    times = resolve_grid(denoiser, grid, steps, sampler)
    keys = random.keys(seeds)
    if x is not None:
        x = _checks.examples("x", x)
        if tuple(x.shape[1:]) != shape or x.shape[0] not in (None, keys.shape[0]):
            raise ValueError(
                f"x must have one row of shape {shape} for each of the {keys.shape[0]} "
                f"seeds. Received shape {tuple(x.shape)}."
            )

    end = ending(grid) if denoise_last else {"denoise_last": False}

    def run(times, keys, *x):
        state = x[0] if x else prior(denoiser, keys, shape, times[0])
        wanted = {"return_path": return_path, "return_report": True}
        return integrate(denoiser, sampler, times, keys, state, **end, **wanted)

    start = () if x is None else (x,)
    *outputs, report = _backend.compiled(run, denoiser.variables)(times, keys, *start)
    sampler.check(report)
    if return_report:
        outputs.append({name: ops.convert_to_numpy(value) for name, value in report.items()})
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def ending(grid: str | Grid | Sequence[float]) -> dict:
    """How a run on a grid ends, as arguments of `integrate`."""
    return {"denoise_last": getattr(grid, "denoise_last", True), "settle": True}


def resolve_grid(
    denoiser: Denoiser,
    grid: str | Grid | Sequence[float],
    steps: int,
    sampler: Sampler | None = None,
):
    """The times to visit, checked: a grid of `steps` times, or the given ones.

    They begin at the last time at which denoiser and sampler are finite.

    Returns:
        Tensor (N,), or (N + 1,) of a `Grid` that does not denoise the last; float64 where the
        backend has it.

    Raises:
        ValueError: See `sample`.
    """
    dtype, process = _backend.TIME_DTYPE, check(denoiser).process
    latest = denoiser.latest if sampler is None else start_time(denoiser, sampler)
    if isinstance(grid, str | Grid):
        check_steps(steps, process)
        return make_grid(grid, steps, process, latest, dtype)
    times = _checks.array("grid", grid, "a name, a Grid, or a vector of times", rank=1).tolist()
    falling = all(t > s for t, s in itertools.pairwise(times))
    if not (times and falling and times[-1] > 0.0 and times[0] <= latest):
        why = "" if latest == 1.0 else " Before, something here is singular: there is no signal."
        raise ValueError(
            f"A grid must fall strictly within (0, {latest:g}]. "
            f"Received {times[:3]}{'...' if len(times) > 3 else ''} ({len(times)} times).{why}"
        )
    return process.snap(ops.convert_to_tensor(times, dtype=dtype))


def start_time(denoiser: Denoiser, sampler: Sampler) -> float:
    """The time at which sampling starts, the last at which both are finite.

    Raises:
        ValueError: If the sampler cannot start where a chain ends.
    """
    return min(denoiser.latest, sampler.latest(denoiser.process))
