"""What a model says about data, in bits: the variational bound and the exact log-likelihood.

`bound` and `continuous_bound` are upper bounds of −log2 p, term by term; `log_likelihood` follows
the probability-flow ODE. All take any model or denoiser, any process, images or points. `baselines`
has what a Gaussian, file formats and papers need.
"""

from tfdiffusion.likelihood import baselines
from tfdiffusion.likelihood.bound import (
    Bound,
    bound,
    continuous_bound,
    estimate,
    progressive_decoding,
    rate_distortion,
)
from tfdiffusion.likelihood.flow import LogLikelihood, ToleranceError, log_likelihood
from tfdiffusion.likelihood.pixels import Pixels

__all__ = [
    "Bound",
    "LogLikelihood",
    "Pixels",
    "ToleranceError",
    "baselines",
    "bound",
    "continuous_bound",
    "estimate",
    "log_likelihood",
    "progressive_decoding",
    "rate_distortion",
]
