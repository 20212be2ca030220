"""tfdiffusion: diffusion and score-based generative models for Keras.

Train with `fit()`, sample with any process, prediction and sampler, and export the whole sampler as
one SavedModel.
"""

from __future__ import annotations

import importlib
import os
import sys

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether this process is the command `tfdiffusion` or `python -m tfdiffusion`."""
    name = os.path.splitext(os.path.basename(sys.argv[0] if sys.argv else ""))[0]
    return name == "tfdiffusion" or (name == "-m" and "tfdiffusion" in sys.orig_argv[1:4])


# Importing the library brings every class that a saved model can name. The command line answers
# --help without Keras, and holds TensorFlow's first messages back while it imports the rest.
if not _is_command():
    from tfdiffusion import (
        denoiser,
        guidance,
        likelihood,
        networks,
        predictions,
        processes,
        random,
        samplers,
        score_matching,
        times,
        training,
        variational,
        weights,
    )
    from tfdiffusion.samplers import sample
    from tfdiffusion.training import DiffusionModel

# These bring matplotlib, TensorFlow or data sets with them: imported when first used.
_LAZY = ("cli", "convert", "data", "evaluation", "exact", "export", "models", "plotting")

__all__ = [
    "DiffusionModel",
    "denoiser",
    "guidance",
    "likelihood",
    "networks",
    "predictions",
    "processes",
    "random",
    "sample",
    "samplers",
    "score_matching",
    "times",
    "training",
    "variational",
    "weights",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"tfdiffusion.{name}")
    raise AttributeError(f"module 'tfdiffusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
