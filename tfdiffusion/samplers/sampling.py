"""How a model draws unless one says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, fields

import keras

from tfdiffusion import _checks, _defaults
from tfdiffusion.denoiser import Threshold, get_threshold
from tfdiffusion.samplers.base import Sampler, get
from tfdiffusion.times import Grid, get_grid


@keras.saving.register_keras_serializable(package="tfdiffusion")
@dataclass(frozen=True)
class Sampling:
    """A sampler, a grid, a number of steps and a threshold, as a model brings them along.

    Example:

    >>> sampling = tfd.samplers.Sampling("ddim", "uniform", steps=50)
    >>> model = tfd.DiffusionModel(network, sampling=sampling)

    Args:
        sampler: a `Sampler` or its name.
        grid: a name that `tfdiffusion.times.grid` knows, or a `Grid`.
        steps: N, times to visit.
        threshold: "clip", "dynamic", a `Threshold`, None for neither; "auto" clips what is known to
            lie in [−1, 1].

    Raises:
        ValueError: If a name is unknown, or the number of steps no positive integer.
    """

    sampler: str | Sampler = _defaults.SAMPLER
    grid: str | Grid = _defaults.GRID
    steps: int = _defaults.STEPS
    threshold: str | Threshold | None = "auto"

    def __post_init__(self):
        get(self.sampler)
        get_grid(self.grid)
        _checks.integer("steps", self.steps)
        if not (isinstance(self.threshold, str) and self.threshold == "auto"):
            get_threshold(self.threshold)

    def get_config(self) -> dict:
        """Arguments that make it again."""
        return {
            field.name: keras.saving.serialize_keras_object(getattr(self, field.name))
            for field in fields(self)
        }

    @classmethod
    def from_config(cls, config: dict) -> Sampling:
        """Makes it from a configuration."""
        return cls(**{k: keras.saving.deserialize_keras_object(v) for k, v in config.items()})
