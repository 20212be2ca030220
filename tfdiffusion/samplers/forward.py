"""The way from data to noise, step by step: what a sampler undoes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from keras import ops

from tfdiffusion import _backend, _checks, random
from tfdiffusion._backend import rows
from tfdiffusion.processes import Process, get


def noising_path(process: str | Process, x_0, times: Sequence[float], *, seed: int = 0):
    """One draw of the forward chain at rising times, each state made from the one before.

    x_t = α_{t|s} x_s + σ_{t|s} z with fresh z (DDPM, arXiv:2006.11239, eq. 2). Each state alone is
    distributed like a jump from the data, N(α x_0, σ²); together they are one path, in which most
    of a state's noise is that of the state before.

    Example:

    >>> path = tfd.samplers.noising_path("linear", images, np.arange(1, 1001) / 1000)

    Args:
        process: a `Process` or its name.
        x_0: data, float (B, ...).
        times: t_1 < … < t_N in (0, 1], rounded to those of a chain.
        seed: of the noise; example n has its own, whatever the batch.

    Returns:
        float32 (N, B, ...).

    Raises:
        ValueError: If the times do not rise strictly within (0, 1], or the data are not finite
            numbers (B, ...).
    """
    process = get(process)
    x_t = _checks.examples("x_0", x_0)
    _checks.seed(seed)
    times = _checks.array("times", times, "a vector of numbers in (0, 1]", rank=1)
    times = times.astype("float64")
    ends = times.size and 0.0 < times[0] and times[-1] <= 1.0
    visited = ops.convert_to_numpy(process.snap(times)) if ends else times
    if not ends or (np.diff(visited) <= 0.0).any():
        raise ValueError(
            "times must rise strictly within (0, 1], by a step of the chain at least. "
            f"Received {times.tolist()[:3]}{'...' if times.size > 3 else ''}."
        )
    keys = random.fold_in(random.keys(seed), np.arange(x_t.shape[0]))

    def step(x_s, keys, t, s):
        ratio, variance = process.transition(t, s)
        noise = random.normal(keys, x_s.shape[1:])
        return rows(ratio, x_s) * x_s + rows(ops.sqrt(variance), x_s) * noise

    step = _backend.compiled(step, getattr(process, "variables", ()))
    path, times = [], [ops.convert_to_tensor(t, dtype=_backend.TIME_DTYPE) for t in visited]
    for k, t in enumerate(times):
        fresh = random.fold_in(keys, k)
        if k == 0:
            mean, deviation = process.marginal(x_t, t)
            x_t = mean + deviation * random.normal(fresh, x_t.shape[1:])
        else:
            x_t = step(x_t, fresh, t, times[k - 1])
        path.append(ops.convert_to_numpy(x_t))
    return np.stack(path)
