"""Pixels: the scale that 8-bit images live on, and Gaussians on such a scale.

An image is a grid of whole numbers that the pipelines map to [−1, 1]. A model of densities becomes
a model of images in one of two ways: its last Gaussian is integrated over the bin of each value
(DDPM, arXiv:2006.11239, eq. 13), or uniform noise fills the bins and the density of the sum bounds
the probability of the image from below (Theis et al. 2016, arXiv:1511.01844, sec. 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from keras import ops

from tfdiffusion import _checks, random

_FAR = 1e4  # standard deviations; stands for infinity, and its square is a finite float32
_FRACTION_FROM, _FRACTION_TERMS = 2.0, 24


@dataclass(frozen=True)
class Pixels:
    """Equally spaced values from `low` to `high`, both included.

    Example:

    >>> images = tfd.data.read("mnist", split="test").arrays(100)[0]
    >>> tfd.likelihood.bound(model, images, pixels=tfd.likelihood.Pixels())

    Args:
        levels: how many values; 256 for 8-bit images.
        low: the darkest, −1 for the pipelines of `tfdiffusion.data`, 0 for data in [0, 1].
        high: the brightest.

    Raises:
        ValueError: If there are fewer than two levels, or low < high does not hold.
    """

    levels: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self):
        _checks.integer("levels", self.levels, -_checks.LARGEST)  # its range is looked at below
        _checks.numbers(low=self.low, high=self.high)
        if self.levels < 2 or not self.low < self.high:
            raise ValueError(
                "Pixels need at least 2 levels and low < high. Received "
                f"levels={self.levels}, low={self.low}, high={self.high}."
            )

    @property
    def width(self) -> float:
        """Width of a bin, the distance between two values."""
        return (self.high - self.low) / (self.levels - 1)

    @property
    def offset(self) -> float:
        """Bits a dimension to add to −log2 of a density for that of a bin: −log2(width).

        For 256 values that include both ends it is log2(255/2) = 6.994 in [−1, 1] and
        log2(255) = 7.994 in [0, 1]. Papers that divide by 256 instead write 7 and 8.
        """
        return -math.log2(self.width)

    def check(self, x) -> np.ndarray:
        """The data as float32, moved exactly onto the values.

        Raises:
            TypeError: If the dtype is not a floating one.
            ValueError: If a value lies outside the range, or between two of the values.
        """
        x = as_float(x, f"in [{self.low:g}, {self.high:g}], such as uint8 / 127.5 - 1")
        place = (x - self.low) / self.width
        if place.min() < -0.5 or place.max() > self.levels - 0.5:
            raise ValueError(
                f"Likelihood of data outside the range that the model was trained on: expected "
                f"[{self.low:g}, {self.high:g}], received [{x.min():g}, {x.max():g}]. Scale the "
                "data, or pass pixels=Pixels(low=..., high=...) if the model was trained on these."
            )
        off = np.abs(place - np.rint(place)).max()
        if off > 0.05:
            raise ValueError(
                f"Received data {off:.2f} of a bin away from the nearest of {self.levels} values: "
                "a discrete likelihood means nothing for resized or augmented images. Pass "
                "pixels=None for the density, or the right number of levels."
            )
        return (self.low + self.width * np.rint(place)).astype(np.float32)

    def dequantize(self, x, keys):
        """Uniform noise within the bin of each value: x + width · U(−½, ½).

        Args:
            x: float (B, ...).
            keys: uint32 (B, 2).
        """
        return x + self.width * (random.uniform(keys, tuple(x.shape[1:])) - 0.5)

    def log_probability(self, x, mean, log_variance):
        """ln P(x) under N(mean, exp log_variance) integrated over bins, the outer two left open.

        Summed over all levels the probabilities are 1, because neighbours share an edge
        (DDPM, eq. 13). Accurate in the tails, where a difference of two cumulative
        probabilities rounds to zero.

        Args:
            x: float tensor, values of the scale.
            mean: float tensor that broadcasts against x.
            log_variance: as mean.

        Returns:
            ln P, elementwise, in nats.
        """
        scale = ops.exp(-0.5 * log_variance)
        offset = (x - mean) * scale
        half = 0.5 * self.width * scale + ops.zeros_like(offset)
        mirrored = offset < 0.0  # by symmetry, only the upper tail is needed
        bottom, top = x < self.low + 0.5 * self.width, x > self.high - 0.5 * self.width
        near, far = ops.where(mirrored, top, bottom), ops.where(mirrored, bottom, top)
        lower = ops.where(near, -_FAR, ops.clip(ops.abs(offset) - half, -_FAR, _FAR))
        upper = ops.where(far, 2 * _FAR, ops.clip(ops.abs(offset) + half, -_FAR, 2 * _FAR))
        return _log_normal_between(lower, upper)


def as_float(x, expected: str) -> np.ndarray:
    """An array or tensor of floats, (N, ...), or an error that says what came.

    Raises:
        TypeError: If the dtype is not a floating one.
        ValueError: If there is no batch axis, no row, or a value is NaN or infinite.
    """
    try:
        x = np.asarray(x if isinstance(x, np.ndarray) else ops.convert_to_numpy(x))
    except Exception as error:  # what comes from the backend for text and ragged lists
        raise TypeError(
            f"Likelihood needs floats {expected}. Received {_checks.shown(x)}."
        ) from error
    if _checks.kind(x) != "f":
        raise TypeError(f"Likelihood needs floats {expected}. Received dtype {x.dtype}.")
    if x.ndim < 2 or not x.size:
        raise ValueError(f"Data must have the shape (N, ...) with N > 0. Received {x.shape}.")
    if not np.isfinite(x).all():
        raise ValueError(
            f"Data must be finite. Received {int((~np.isfinite(x)).sum())} NaN or infinite values."
        )
    _checks.moderate("Data", x)
    return x


def _log_normal_between(lower, upper):
    """ln(Φ(upper) − Φ(lower)) for lower < upper whose middle is not negative."""
    root = math.sqrt(0.5)
    around = 0.5 * (ops.erf(root * upper) - ops.erf(root * ops.minimum(lower, 0.0)))
    lower_tail = _log_upper_tail(ops.maximum(lower, 0.0))
    fall = _log_upper_tail(ops.maximum(upper, 0.0)) - lower_tail
    beside = lower_tail + ops.log(-ops.expm1(ops.minimum(fall, -1e-6)))
    return ops.where(lower < 0.0, ops.log(ops.maximum(around, 1e-30)), beside)


def _log_upper_tail(x):
    """ln P(Z > x) for x >= 0: by erf near zero, by Laplace's continued fraction beyond.

    P(Z > x) = φ(x) / (x + 1/(x + 2/(x + 3/(x + …)))).
    """
    near = ops.log(0.5 * (1.0 - ops.erf(math.sqrt(0.5) * ops.minimum(x, _FRACTION_FROM))))
    far = ops.maximum(x, _FRACTION_FROM)
    fraction = far
    for term in range(_FRACTION_TERMS, 0, -1):
        fraction = far + term / fraction
    tail = -0.5 * ops.square(far) - 0.5 * math.log(2.0 * math.pi) - ops.log(fraction)
    return ops.where(x < _FRACTION_FROM, near, tail)


def check_pixels(pixels: Pixels | None) -> None:
    """Raises a TypeError unless they are a scale, or None for points."""
    if pixels is not None and not isinstance(pixels, Pixels):
        raise TypeError(
            "pixels must be a likelihood.Pixels, or None for points. "
            f"Received {_checks.shown(pixels)}."
        )
