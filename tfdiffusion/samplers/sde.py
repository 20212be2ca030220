"""The reverse stochastic differential equation, and Langevin steps at one noise level.

Run backwards, dx = f x dt + g dw becomes dx = (f x − g² ∇ log q) dt + g dw̄ (Anderson 1982; Song et
al. 2021, arXiv:2011.13456, eq. 6). DDPM's step is another discretisation of it; see `ancestral`.
"""

from __future__ import annotations

from dataclasses import dataclass

from keras import ops

from tfdiffusion import _checks, random
from tfdiffusion._backend import rows
from tfdiffusion.denoiser import Denoiser
from tfdiffusion.processes import Process
from tfdiffusion.samplers.base import Sampler, get, register


@register("euler_maruyama")
@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """x_s = x_t − (f x_t − g² ∇ log q)(t − s) + g √(t − s) z (arXiv:2011.13456, app. E).

    f and g are infinite where a process has no signal left; there it starts a little earlier.
    """

    singular = True

    def step(self, denoiser: Denoiser, carry: tuple, t, s, keys) -> tuple:
        """See the class."""
        (x_t,) = carry
        z = random.normal(keys, x_t.shape[1:])
        spread = denoiser.process.diffusion(t) * ops.sqrt(t - s)
        drift = denoiser.reverse_drift(x_t, t)
        return (x_t - rows(t - s, x_t) * drift + rows(spread, x_t) * z,)


@register("reverse_diffusion")
@dataclass(frozen=True)
class ReverseDiffusion(Sampler):
    """Undoes x_t = a x_s + √v z as it was made (arXiv:2011.13456, eq. 46): with a = α_{t|s} and
    v = σ²_{t|s}, x_s = (2 − a) x_t + v ∇ log q + √v z.
    """  # noqa: D205

    def step(self, denoiser: Denoiser, carry: tuple, t, s, keys) -> tuple:
        """See the class."""
        (x_t,) = carry
        a, v = denoiser.process.transition(t, s)
        fresh = rows(ops.sqrt(v), x_t) * random.normal(keys, x_t.shape[1:])
        return (rows(2.0 - a, x_t) * x_t + rows(v, x_t) * denoiser.score(x_t, t) + fresh,)


def langevin(denoiser: Denoiser, x_t, t, keys, snr: float, measured: bool = False):
    """One Langevin step at a noise level: x + h ∇ log q + √(2h) z with h = 2 (snr σ)².

    That is the step of arXiv:2011.13456, alg. 4-5, h = 2 α (snr ‖z‖/‖∇ log q‖)², with the norms
    at what they are on average, √D and √D/σ, and with α, 1 − β_i of a chain of 1000 steps, taken
    for 1, so that any process will do. `measured` takes the norms of each image as they are; the
    paper's average over the batch would make an image depend on the others.
    """
    z, score = random.normal(keys, x_t.shape[1:]), denoiser.score(x_t, t)
    ratio = _norm(z) / _norm(score) if measured else denoiser.process.sigma(t)
    size = 2.0 * (snr * ratio) ** 2
    return x_t + rows(size, x_t) * score + rows(ops.sqrt(2.0 * size), x_t) * z


def _norm(x):
    """Of each row, (B,)."""
    return ops.sqrt(ops.sum(ops.square(ops.reshape(x, (ops.shape(x)[0], -1))), axis=-1))


# Streams of a step's key: the predictor takes 0.
_PREDICTOR = 0


@register("predictor_corrector")
@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """Langevin steps at t, then one step of another sampler to s (arXiv:2011.13456, alg. 1).

    Args:
        predictor: name of a sampler that keeps nothing between steps.
        snr: signal-to-noise ratio of a Langevin step, positive; 0.16 is usual.
        corrections: Langevin steps at each time.
        measured: whether a step's size comes from the norms that noise and score have, or from
            those that they have on average; see `langevin`.
        correct_last: whether there are Langevin steps at the last time too, before it is denoised.

    Raises:
        ValueError: If the predictor is unknown, or a number out of range.
    """

    predictor: str = "reverse_diffusion"
    snr: float = 0.16
    corrections: int = 1
    measured: bool = False
    correct_last: bool = False

    def __post_init__(self):
        _checks.number("snr", self.snr, "(0, inf)")
        _checks.integer("corrections", self.corrections)
        get(self.predictor)

    @property
    def evaluations(self) -> int:
        """Those of the predictor, and one a correction."""
        return get(self.predictor).evaluations + self.corrections

    def latest(self, process: Process) -> float:
        """The predictor's."""
        return get(self.predictor).latest(process)

    def step(self, denoiser: Denoiser, carry: tuple, t, s, keys) -> tuple:
        """Corrects, then predicts."""
        x_t = self._corrected(denoiser, carry[0], t, keys)
        predictor = get(self.predictor)
        fresh = random.fold_in(keys, _PREDICTOR)
        return predictor.step(denoiser, predictor.start(x_t), t, s, fresh)[:1]

    def finish(self, denoiser: Denoiser, carry: tuple, t, keys):
        """x̂_0, after the last corrections."""
        x_t = self._corrected(denoiser, carry[0], t, keys) if self.correct_last else carry[0]
        return denoiser(x_t, t)

    def report(self, carry: tuple, steps) -> dict:
        """See base class."""
        last = self.corrections * int(self.correct_last)
        return {"evaluations": ops.convert_to_tensor(self.evaluations * steps + last)}

    def _corrected(self, denoiser: Denoiser, x_t, t, keys):
        """After the Langevin steps at t."""
        for k in range(self.corrections):
            fresh = random.fold_in(keys, k + 1)
            x_t = langevin(denoiser, x_t, t, fresh, self.snr, self.measured)
        return x_t
