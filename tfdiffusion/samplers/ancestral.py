"""DDPM's ancestral sampler and DDIM, for any process and any pair of times."""

from __future__ import annotations

from dataclasses import dataclass

from keras import ops

from tfdiffusion import _checks, _names, random
from tfdiffusion._backend import rows
from tfdiffusion.denoiser import Denoiser
from tfdiffusion.samplers.base import Sampler, register


@register("ddpm")
@dataclass(frozen=True)
class DDPM(Sampler):
    """Draws x_s from q(x_s | x_t, x̂_0) (DDPM, arXiv:2006.11239, alg. 2).

    Args:
        variance: "posterior" for β̃, exact if the data were one point; "beta" for σ²_{t|s}, exact
            if they were N(0, I) (sec. 3.2). With few steps "beta" leaves noise in the image.
            "learned" asks the denoiser (improved DDPM, arXiv:2102.09672, eq. 15).

    Raises:
        ValueError: If the variance is none of these.
    """

    variance: str = "posterior"

    def __post_init__(self):
        _names.one_of("variance", self.variance, ("posterior", "beta", "learned"))

    def step(self, denoiser: Denoiser, carry: tuple, t, s, keys) -> tuple:
        """x_s = c_0 x̂_0 + c_t x_t + √variance z."""
        (x_t,) = carry
        c_0, c_t, variance = denoiser.process.posterior(t, s)
        if self.variance == "learned":
            x_0, log_variance = denoiser.reverse(x_t, t, s)
            deviation = ops.exp(0.5 * log_variance)
        else:
            if self.variance == "beta":
                _, variance = denoiser.process.transition(t, s)
            x_0, deviation = denoiser(x_t, t), rows(ops.sqrt(variance), x_t)
        mean = rows(c_0, x_t) * x_0 + rows(c_t, x_t) * x_t
        return (mean + deviation * random.normal(keys, x_t.shape[1:]),)


@register("ddim")
@dataclass(frozen=True)
class DDIM(Sampler):
    """Keeps the marginals with as much fresh noise as η asks for (arXiv:2010.02502, eq. 12).

    Args:
        eta: η in [0, 1]: 0 is deterministic given x_1, 1 is DDPM with β̃.
        clip: x̂_0 is held in [−clip, clip] after ε̂ was read off it, as some published code does, so
            that the two are no longer parts of one x_t. A clipped denoiser keeps them so.

    Raises:
        ValueError: If a number is out of range.
    """

    eta: float = 0.0
    clip: float | None = None

    def __post_init__(self):
        _checks.number("eta", self.eta, "[0, 1]")
        if self.clip is not None:
            _checks.number("clip", self.clip, "(0, inf]")

    @property
    def reversible(self) -> bool:
        """With η = 0."""
        return self.eta == 0.0

    def step(self, denoiser: Denoiser, carry: tuple, t, s, keys) -> tuple:
        """x_s = α_s x̂_0 + √(σ_s² − η² β̃) ε̂ + η √β̃ z."""
        (x_t,) = carry
        process = denoiser.process
        x_0 = denoiser(x_t, t)
        noise = denoiser.noise_from(x_t, x_0, t)
        x_0 = self._clipped(x_0)
        alpha_s, sigma_s = process.alpha(s), process.sigma(s)
        if self.eta == 0.0:
            return (rows(alpha_s, x_t) * x_0 + rows(sigma_s, x_t) * noise,)
        _, _, variance = process.posterior(t, s)
        # σ_s² − η² β̃ with β̃ = σ_s² (1 − e^{λ_t − λ_s}): as a sum, which rounding cannot make
        # negative where x_t remembers almost nothing of x_s.
        remembered = ops.exp(process.log_snr(t) - process.log_snr(s))
        direction = sigma_s * ops.sqrt(1.0 - self.eta**2 + self.eta**2 * remembered)
        mean = rows(alpha_s, x_t) * x_0 + rows(direction, x_t) * noise
        fresh = rows(self.eta * ops.sqrt(variance), x_t) * random.normal(keys, x_t.shape[1:])
        return (mean + fresh,)

    def finish(self, denoiser: Denoiser, carry: tuple, t, keys):
        """x̂_0, clipped."""
        return self._clipped(denoiser(carry[0], t))

    def _clipped(self, x_0):
        return x_0 if self.clip is None else ops.clip(x_0, -self.clip, self.clip)
