"""What a sampler is."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from typing import ClassVar

import keras
from keras import ops

from tfdiffusion import _checks, _names
from tfdiffusion.denoiser import Denoiser, latest_time
from tfdiffusion.processes import Process

_SAMPLERS: dict[str, Callable[[], Sampler]] = {}


class Sampler(abc.ABC):
    """One step from time t to an earlier time s.

    A sampler gets the denoiser, not its output, so it may call it as often as it likes, and keeps
    what it needs from earlier steps in its carry, a tuple of tensors whose first entry is x.

    Attributes:
        evaluations: of the denoiser in one step.
        singular: whether a step from where there is no signal is infinite.
        reversible: whether it draws no noise, and its steps also go from data to noise.
    """

    evaluations: int = 1
    singular: bool = False
    reversible: bool = False

    def latest(self, process: Process) -> float:
        """The last time of a process from which it can start.

        Raises:
            ValueError: If it cannot start where a chain ends.
        """
        what = f"steps of {type(self).__name__} are infinite"
        return latest_time(process, self.singular, what, "a sampler such as 'ddim' or 'ddpm'")

    def start(self, x_t, evaluations=None) -> tuple:
        """The first carry.

        Args:
            x_t: the state (B, ...).
            evaluations: N, the number of times in the grid, an integer or integer tensor; None if
                the sample is the state at the last of them, not what is denoised there.
        """
        return (x_t,)

    @abc.abstractmethod
    def step(self, denoiser: Denoiser, carry: tuple, t, s, keys) -> tuple:
        """Moves the state from t to s < t.

        Args:
            denoiser: (x_t, t) → x̂_0.
            carry: as `start` or the last step returned it; carry[0] is x_t (B, ...).
            t: the time now, a scalar tensor.
            s: the next time.
            keys: uint32 (B, 2), fresh for this step; see `tfdiffusion.random`.

        Returns:
            The carry at s, of the same structure and shapes.
        """

    def finish(self, denoiser: Denoiser, carry: tuple, t, keys):
        """The sample, from the carry at the grid's last time: x̂_0, so that no noise is added.

        Args:
            denoiser: as in `step`; asked once.
            carry: as the last step returned it.
            t: the last time, a scalar tensor.
            keys: uint32 (B, 2), fresh, for samplers that stir the state once more.

        Returns:
            Tensor (B, ...).
        """
        return denoiser(carry[0], t)

    def report(self, carry: tuple, steps) -> dict:
        """What a run of some steps took, as tensors: at least its `evaluations`, for each sample.

        The evaluation that denoises the last state is not among them.
        """
        return {"evaluations": ops.convert_to_tensor(self.evaluations * steps)}

    def check(self, report: dict) -> None:  # noqa: B027  (most have nothing to check)
        """Raises a RuntimeError if a run did not do what it should."""

    def get_config(self) -> dict:
        """Arguments that make this sampler again."""
        return dict(vars(self))

    @classmethod
    def from_config(cls, config: dict) -> Sampler:
        """Makes the sampler of a configuration."""
        return cls(**config)


class SamplerOfOrder(Sampler):
    """A solver that comes in orders, 1 to the highest."""

    order: int
    highest: ClassVar[int]

    def __post_init__(self):
        if not _checks.is_integer(self.order) or not 1 <= self.order <= self.highest:
            raise ValueError(
                f"{type(self).__name__} has orders 1 to {self.highest}. "
                f"Received order={self.order!r}."
            )


def register(name: str, **arguments):
    """Class decorator that lists a sampler under a name and makes it serializable.

    Args:
        name: what `get` takes.
        **arguments: of the sampler that the name stands for.
    """

    def add(cls: type[Sampler]) -> type[Sampler]:
        _SAMPLERS[name] = functools.partial(cls, **arguments)
        return keras.saving.register_keras_serializable(package="tfdiffusion")(cls)

    return add


def names() -> list[str]:
    """Names that `get` knows."""
    return list(_SAMPLERS)


def get(sampler: str | Sampler) -> Sampler:
    """Makes a sampler by name, with its default arguments; a `Sampler` is returned as it is.

    Raises:
        ValueError: If the name is unknown; the message lists the known ones.
    """
    if isinstance(sampler, Sampler):
        return sampler
    return _names.look_up("sampler", sampler, _SAMPLERS)()
