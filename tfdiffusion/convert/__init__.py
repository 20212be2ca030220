"""Weights of other projects as Keras models that give the same numbers, and back.

>>> model = tfd.convert.from_diffusers("google/ddpm-cifar10-32")  # or a folder
>>> images = model.sample(16, seed=0)
>>> tfd.convert.to_diffusers(model, "folder")  # which diffusers loads

PyTorch is needed for none of it. A converted model is like any other: `fit()` trains it further,
`model.save("model.keras")` keeps it, and reading that file back needs nothing of this module.
"""

from __future__ import annotations

from tfdiffusion.convert.diffusers import from_diffusers, read_network, to_diffusers
from tfdiffusion.convert.score_sde import from_score_sde

__all__ = ["from_diffusers", "from_score_sde", "read_network", "to_diffusers"]
