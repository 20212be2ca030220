"""From noise to samples: `step(denoiser, carry, t, s, keys) -> carry`, and the one loop."""

from tfdiffusion.samplers.ancestral import DDIM, DDPM
from tfdiffusion.samplers.base import Sampler, get, names, register
from tfdiffusion.samplers.forward import noising_path
from tfdiffusion.samplers.inversion import decode, encode, interpolate, reconstruct, slerp
from tfdiffusion.samplers.loop import integrate, prior, sample
from tfdiffusion.samplers.multistep import DEIS, LMS, PLMS, DPMSolverPP, SDEDPMSolverPP, UniPC
from tfdiffusion.samplers.ode import RK4, RK45, Euler
from tfdiffusion.samplers.sampling import Sampling
from tfdiffusion.samplers.sde import EulerMaruyama, PredictorCorrector, ReverseDiffusion
from tfdiffusion.samplers.singlestep import DPMSolver, Heun

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "LMS",
    "PLMS",
    "RK4",
    "RK45",
    "DPMSolver",
    "DPMSolverPP",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "PredictorCorrector",
    "ReverseDiffusion",
    "SDEDPMSolverPP",
    "Sampler",
    "Sampling",
    "UniPC",
    "decode",
    "encode",
    "get",
    "integrate",
    "interpolate",
    "names",
    "noising_path",
    "prior",
    "reconstruct",
    "register",
    "sample",
    "slerp",
]
