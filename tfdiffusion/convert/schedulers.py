"""diffusers' schedulers as processes, predictions and ways to sample, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tfdiffusion import processes
from tfdiffusion.processes import Process


@dataclass(frozen=True)
class Schedule:
    """What a scheduler's configuration says of a model.

    Attributes:
        process: how data become noise.
        prediction: what the network regresses.
        time_input: what it is told about time.
    """

    process: Process
    prediction: str = "noise"
    time_input: str = "timestep"

    def model_arguments(self) -> dict:
        """Arguments of `DiffusionModel` beside the network."""
        return {
            "process": self.process,
            "prediction": self.prediction,
            "time_input": self.time_input,
        }


_PREDICTIONS = {"epsilon": "noise", "sample": "clean", "v_prediction": "v"}


def read(config: Mapping) -> Schedule:
    """The schedule of a `scheduler_config.json`.

    Args:
        config: its contents.

    Raises:
        ValueError: If it says what cannot be mapped; the message names key and value.
    """
    name = config.get("_class_name")
    if name not in ("DDPMScheduler", "DDIMScheduler"):
        raise ValueError(f"_class_name={name!r} is no scheduler that can be read.")
    if config.get("beta_schedule", "linear") != "linear":
        raise ValueError(f"{name}: beta_schedule={config['beta_schedule']!r} is unknown.")
    process = processes.LinearBeta(
        config.get("num_train_timesteps", 1000),
        config.get("beta_start", 1e-4),
        config.get("beta_end", 0.02),
    )
    return Schedule(process, _PREDICTIONS[config.get("prediction_type", "epsilon")])
