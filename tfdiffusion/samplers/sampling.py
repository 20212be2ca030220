"""How a model draws unless one says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, fields

import keras

from tfdiffusion import _defaults
from tfdiffusion.denoiser import Threshold
from tfdiffusion.samplers.base import Sampler
from tfdiffusion.times import Grid


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
        ValueError: If a number of steps is no positive integer.
    """

    sampler: str | Sampler = _defaults.SAMPLER
    grid: str | Grid = _defaults.GRID
    steps: int = _defaults.STEPS
    threshold: str | Threshold | None = "auto"

    def __post_init__(self):
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be an integer >= 1. Received steps={self.steps!r}.")

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
