"""From noise to samples: `step(denoiser, carry, t, s, keys) -> carry`, and the one loop."""

from tfdiffusion.samplers.ancestral import DDIM, DDPM
from tfdiffusion.samplers.base import Sampler, get, names, register
from tfdiffusion.samplers.loop import integrate, prior, sample

__all__ = [
    "DDIM",
    "DDPM",
    "Sampler",
    "get",
    "integrate",
    "names",
    "prior",
    "register",
    "sample",
]
