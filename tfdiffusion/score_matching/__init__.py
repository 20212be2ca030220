"""Score matching: learning ∇ log p from samples, and sampling with it by Langevin dynamics.

The module stands on its own. Objectives and Langevin dynamics take any function as the score;
`ScoreModel` trains a network on a ladder of noise levels:

>>> from tfdiffusion import score_matching
>>> sigmas = score_matching.geometric(3.0, 0.05, num_levels=12)
>>> model = score_matching.ScoreModel(score_matching.ScoreMLP(sigmas), sigmas)
>>> model.compile("adam")
>>> model.fit(points, epochs=50, batch_size=128)
>>> samples = model.sample(1000)

It meets the diffusion half in `model.denoiser()`, on which all of the library's samplers run.
"""

from tfdiffusion.score_matching import laboratory, ladders, langevin, networks, objectives
from tfdiffusion.score_matching.ladders import (
    best_step_size,
    for_dimension,
    from_data,
    geometric,
    variance_ratio,
)
from tfdiffusion.score_matching.model import ScoreModel
from tfdiffusion.score_matching.networks import NCSN, InstanceNormPlus, NCSNv2, ScoreMLP

__all__ = [
    "NCSN",
    "InstanceNormPlus",
    "NCSNv2",
    "ScoreMLP",
    "ScoreModel",
    "best_step_size",
    "for_dimension",
    "from_data",
    "geometric",
    "laboratory",
    "ladders",
    "langevin",
    "networks",
    "objectives",
    "variance_ratio",
]
