"""`ScoreModel`: a score network and a noise ladder that `fit()` knows how to train.

What it shares with `DiffusionModel` is in `fitting`; where the two halves of the library meet is
`denoiser()`. A score network on the ladder σ_1 > … > σ_L is a denoiser on the variance-exploding
chain x_t = x_0 + σ_t ε, by Tweedie's formula x̂_0 = x_t + σ_t² s(x_t), and so every sampler of the
library runs on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras import ops

from tfdiffusion import _backend, _checks, _names, fitting, random
from tfdiffusion.denoiser import NetworkDenoiser
from tfdiffusion.processes import Tabulated
from tfdiffusion.score_matching import langevin, objectives
from tfdiffusion.score_matching.ladders import best_step_size, check_ladder

_register = keras.saving.register_keras_serializable(package="tfdiffusion")

_PROJECTIONS = 1  # stream of a training key


def _on_noisy(objective: Callable) -> Callable:
    """σ² times an objective of x alone, on data with the noise of each row's level."""

    def losses(score, x, keys, sigma):
        noisy = x + _backend.rows(sigma, x) * objectives.noise_for(x, keys)
        return sigma**2 * objective(score, noisy, random.fold_in(keys, _PROJECTIONS))

    return losses


#: Name → (losses of (score, x, keys, sigma), whether they train through second derivatives).
_OBJECTIVES = {
    "denoising": (objectives.multi_level_denoising, False),
    "sliced": (_on_noisy(objectives.sliced), True),
    "finite_difference_sliced": (_on_noisy(objectives.finite_difference_sliced), True),
    "implicit": (_on_noisy(lambda score, x, keys: objectives.implicit(score, x)), True),
}


def objective_names() -> list[str]:
    """Objectives that `ScoreModel` knows."""
    return list(_OBJECTIVES)


@_register
class ScoreModel(fitting.NoiseConditionalModel):
    """Learns ∇ log q_σ on a ladder of noise levels with `fit()`; then samples by Langevin dynamics.

    Example:

    >>> from tfdiffusion import score_matching
    >>> sigmas = score_matching.from_data(images, sigma_min=0.02)  # images in [-1, 1]
    >>> model = score_matching.ScoreModel(score_matching.NCSNv2(sigmas, width=32), sigmas)
    >>> model.compile(optimizer=keras.optimizers.Adam(1e-3))
    >>> model.fit(tfd.data.load("mnist", batch_size=128), epochs=10)
    >>> digits = model.sample(64, seed=0)

    `fit` takes images (N, H, W, C) or points (N, D), float; labels behind them are not looked at.
    For each example of a batch the training step draws a level and noise, and minimizes the
    objective at σ of that level, with the weight λ(σ) = σ² (arXiv:1907.05600, eq. 6). An
    exponential moving average of the weights is kept beside the raw ones; validation, sampling and
    export read the average (arXiv:2006.09011, technique 5).

    Args:
        network: called on {"x", "time"}, with the number of the level as the time: `NCSN`,
            `NCSNv2`, `ScoreMLP`, or any Keras layer that does.
        sigmas: the ladder σ_1 > … > σ_L, in units of the data.
        objective: "denoising", "sliced", "finite_difference_sliced" or "implicit"; see
            `objectives`.
        ema_decay: of the averaged weights; None keeps no average.
        bounded: whether the data lie in [−1, 1], which training then checks; by default so for
            images, and not so for points.
        seed: of levels, noise and projections in training.

    Raises:
        ValueError: If the ladder does not fall, differs from the network's, or a name is unknown.
    """

    def __init__(
        self,
        network,
        sigmas: Sequence[float],
        *,
        objective: str = "denoising",
        ema_decay: float | None = 0.999,
        bounded: bool | None = None,
        seed: int = 0,
        **kwargs,
    ):
        self_sigmas = check_ladder(sigmas)
        _check_network(network, self_sigmas)
        losses, second_order = _names.look_up("objective", objective, _OBJECTIVES)
        if second_order:
            objectives.warn_if_vacuous(network)
        raw = NetworkDenoiser(
            network,
            Tabulated.from_sigmas(self_sigmas[::-1]),
            "score",
            time_input="level",
            scale_input=False,
        )
        super().__init__(raw, "uniform", ema_decay=ema_decay, bounded=bounded, seed=seed, **kwargs)
        self.sigmas, self.objective, self._objective_at = self_sigmas, objective, losses

    # Keras: calling and saving.

    def call(self, x, level=0):
        """∇ log q_σ(x) at a level, with the averaged weights; see `score`."""
        return self.score(x, level)

    def get_config(self) -> dict:
        """See base class."""
        return {
            **super().get_config(),
            "network": keras.saving.serialize_keras_object(self.network),
            "sigmas": self.sigmas.tolist(),
            "objective": self.objective,
            "ema_decay": None if self.ema is None else self.ema.decay,
            "bounded": self._bounded,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict) -> ScoreModel:
        """See base class."""
        network = config["network"]
        if isinstance(network, dict):
            network = keras.saving.deserialize_keras_object(network)
        return cls(**{**config, "network": network})

    # Training.

    def losses_at(self, x_0, label, t, keys, training: bool = False):
        """The objective of each example at the level of its time; see the base class."""
        del label
        sigma = ops.cast(self.process.sigma(t), "float32")
        # Not the stream that the levels came from: noise and level must not know of each other.
        keys = random.fold_in(keys, fitting.NOISE)
        return self._objective_at(
            lambda x: self.raw.predict(x, t, training=training), x_0, keys, sigma
        )

    # The score.

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.sigmas)

    def time_of(self, level):
        """The time that samplers of the library know a level by: 1 at level 0, 1/L at the last."""
        return (self.num_levels - ops.cast(level, "float32")) / self.num_levels

    def score(self, x, level, ema: bool = True):
        """∇ log q_σ(x) at a noise level.

        Args:
            x: float (B, ...).
            level: 0 (most noise) to L − 1, an integer or int (B,).
            ema: False for the raw weights.

        Returns:
            float32 (B, ...).

        Raises:
            ValueError: If a plain level is out of range, or x is not finite or of another shape.
        """
        x = self._checked(x, level)
        pairs = self._averaged() if ema else [(v, v.value) for v in self.network.variables]
        with _backend.substituted(pairs):
            return self.raw.predict(x, self.time_of(level))

    def energy(self, x, level, ema: bool = True):
        """E(x) = −log q_σ(x) up to a constant, of networks that learn one.

        Args:
            x: float (B, ...).
            level: as in `score`.
            ema: False for the raw weights.

        Returns:
            float32 (B,).

        Raises:
            ValueError: If a plain level is out of range, or the network learns a plain score.
        """
        if not hasattr(self.network, "energy"):
            raise ValueError(
                f"{type(self.network).__name__} learns a score and no energy. Use a network that "
                "does, such as ScoreMLP(sigmas, energy=True)."
            )
        x = self._checked(x, level)
        time = ops.broadcast_to(ops.cast(level, "float32"), ops.shape(x)[:1])
        pairs = self._averaged() if ema else [(v, v.value) for v in self.network.variables]
        with _backend.substituted(pairs):
            return self.network.energy({"x": x, "time": time})

    def _checked(self, x, level):
        """x as float32 tensor (B, ...), when it and the levels are in order."""
        x = _checks.examples("x", x, self.sample_shape)
        wanted = f"integers from 0 (most noise) to {self.num_levels - 1}"
        if not _checks.is_symbol(level):
            levels = _checks.array("level", level, wanted, kinds="iu")
            if levels.size and (levels.min() < 0 or levels.max() >= self.num_levels):
                raise ValueError(f"level must be {wanted}. Received {_checks.shown(level)}.")
        _checks.one_a_row(x, level=level)
        return x

    # Sampling.

    def sample(
        self,
        num: int = 16,
        *,
        steps_per_level: int = 5,
        step_size: float | None = None,
        convention: str = "ncsnv2",
        denoise: bool = True,
        seed: int = 0,
        seeds=None,
        ema: bool = True,
        batch_size: int = 256,
        return_path: bool = False,
    ):
        """Draws samples by annealed Langevin dynamics; sample i is the one of seed `seed` + i.

        Args:
            num: how many.
            steps_per_level: T. A sample costs L T + 1 evaluations of the network.
            step_size: at the smallest σ, in the convention; None for technique 4's, which suits T.
            convention: "ncsnv2" (α) or "ncsn" (ε, of which twice as much is the same step).
            denoise: end with Tweedie's step, without which noise of σ_L remains.
            seed: of the first sample.
            seeds: one a row (num,), instead of seed, seed + 1, …
            ema: False for the raw weights.
            batch_size: at most so many at a time; it does not change any sample.
            return_path: also return the first state, that after each level, and the sample,
                float32 (L + 2, num, ...).

        Returns:
            NumPy float32 (num, ...); or (samples, path).

        Raises:
            ValueError: If the model has not seen data or a number is out of range.
        """
        request = self.langevin_request(steps_per_level, step_size, convention)
        request |= {"denoise": denoise, "return_path": return_path}
        seeds = fitting.check_seeds(num, seed, seeds)

        def run(keys):
            noise = langevin.noise_of(keys, self.sample_shape)
            return langevin.annealed(self._traced_score(ema), self.sigmas, noise, **request)

        run = self._compiled_loop(("sample", ema, *request.items()), run)
        return fitting.in_batches(run, (random.keys(seeds),), num, batch_size, return_path)

    def inpaint(
        self,
        known,
        mask,
        *,
        steps_per_level: int = 5,
        step_size: float | None = None,
        convention: str = "ncsnv2",
        seed: int = 0,
        seeds=None,
        ema: bool = True,
        batch_size: int = 256,
    ):
        """Fills in what is not known, by annealed Langevin dynamics (arXiv:1907.05600, alg. 2).

        Args:
            known: float (N, ...), the known pixels, and anything elsewhere.
            mask: (N, ...) or (...), true where `known` holds.
            steps_per_level: as in `sample`.
            step_size: as in `sample`.
            convention: as in `sample`.
            seed: of the first row.
            seeds: one a row (N,), instead.
            ema: False for the raw weights.
            batch_size: at most so many at a time.

        Returns:
            NumPy float32 (N, ...): the known pixels bit by bit, and samples elsewhere.

        Raises:
            ValueError: If a shape is wrong, the model has not seen data or a number is out of
                range.
        """
        request = self.langevin_request(steps_per_level, step_size, convention)
        mask = _checks.array("mask", mask, "true or false, or numbers", kinds="biuf")
        try:
            known = np.asarray(known, "float32")  # NaN or whatever may lie outside the mask
        except (TypeError, ValueError) as error:
            raise ValueError(f"known must be numbers. Received {_checks.shown(known)}.") from error
        if known.shape[1:] != self.sample_shape:
            raise ValueError(
                f"known must have shape (N, {', '.join(map(str, self.sample_shape))}). "
                f"Received {known.shape}."
            )
        try:
            mask = np.broadcast_to(mask, known.shape).astype("float32")
        except ValueError:
            raise ValueError(
                f"mask must have the shape of known, {known.shape}, or of one row of it. "
                f"Received {mask.shape}."
            ) from None
        # NaN or whatever lies outside the mask must not get into the sum.
        known = np.where(mask > 0, known, 0.0).astype("float32")
        _checks.examples("known", known)
        seeds = fitting.check_seeds(len(known), seed, seeds)

        def run(keys, known, mask):
            noise = langevin.noise_of(keys, self.sample_shape)
            return langevin.annealed(
                self._traced_score(ema), self.sigmas, noise, known=known, mask=mask, **request
            )

        run = self._compiled_loop(("inpaint", ema, *request.items()), run)
        rows = (random.keys(seeds), known, mask)
        return fitting.in_batches(run, rows, len(known), batch_size)

    def interpolate(
        self,
        seed_a: int,
        seed_b: int,
        num: int = 8,
        *,
        steps_per_level: int = 5,
        step_size: float | None = None,
        convention: str = "ncsnv2",
        ema: bool = True,
        batch_size: int = 256,
    ):
        """The way from one seed's sample to another's, through samples (arXiv:2006.09011, app. B).

        Args:
            seed_a: of the first.
            seed_b: of the last.
            num: how many, with both ends, >= 2.
            steps_per_level: as in `sample`.
            step_size: as in `sample`.
            convention: as in `sample`.
            ema: False for the raw weights.
            batch_size: at most so many at a time.

        Returns:
            NumPy float32 (num, ...).

        Raises:
            ValueError: If the model has not seen data or a number is out of range.
        """
        request = self.langevin_request(steps_per_level, step_size, convention)
        _checks.integer("num", num, 2)  # an interpolation has two ends
        _checks.seed(seed_a, "seed_a")
        _checks.seed(seed_b, "seed_b")
        keys_a, keys_b = (random.keys(np.full(num, seed)) for seed in (seed_a, seed_b))
        share = np.linspace(0.0, 1.0, num, dtype="float32")

        def run(keys_a, keys_b, share):
            noise = langevin.interpolating_noise(keys_a, keys_b, share, self.sample_shape)
            return langevin.annealed(self._traced_score(ema), self.sigmas, noise, **request)

        run = self._compiled_loop(("interpolate", ema, *request.items()), run)
        return fitting.in_batches(run, (keys_a, keys_b, share), num, batch_size)

    def langevin_request(
        self,
        steps_per_level: int = 5,
        step_size: float | None = None,
        convention: str = "ncsnv2",
    ) -> dict:
        """What `langevin.annealed` takes for the arguments of `sample`, checked.

        Raises:
            ValueError: If the model has not seen data or a number is out of range.
        """
        if self.sample_shape is None:
            raise ValueError("The model has no shape yet: call fit, or build((None, H, W, C)).")
        _checks.integer("steps_per_level", steps_per_level)
        if step_size is None:
            best = best_step_size(self.sigmas, steps_per_level)
            step_size = best / langevin.drift_step(1.0, convention)
        langevin.drift_steps(self.sigmas, step_size, convention)
        self._start_average()
        return {
            "steps_per_level": int(steps_per_level),
            "step_size": float(step_size),
            "convention": convention,
        }

    def _traced_score(self, ema: bool) -> Callable:
        return lambda x, level: self.score(x, level, ema)

    def _compiled_loop(self, key: tuple, run: Callable) -> Callable:
        """One compiled loop for each kind of request, kept for the next."""
        if key not in self._compiled_samplers:
            self._compiled_samplers[key] = _backend.compiled(run, self.variables)
        return self._compiled_samplers[key]


def _check_network(network, sigmas: np.ndarray) -> None:
    own = getattr(network, "sigmas", None)
    if own is not None and (len(own) != len(sigmas) or not np.allclose(own, sigmas)):
        raise ValueError(
            f"The network was made for a ladder of {len(own)} levels from {own[0]:g} to "
            f"{own[-1]:g}, the model for {len(sigmas)} from {sigmas[0]:g} to {sigmas[-1]:g}. "
            "Give both the same."
        )
    levels = getattr(network, "num_levels", None)
    if levels is not None and levels != len(sigmas):
        raise ValueError(
            f"The network tells {levels} noise levels apart, and the ladder has {len(sigmas)}. "
            f"Make it with num_levels={len(sigmas)}."
        )
