"""What other ways of describing images need: Gaussians, file formats, and what papers report.

Bits a dimension mean little alone. These are of the same pixels as `bound` and `log_likelihood`:
densities that scikit-learn fits to training images, and lossless files, which no model knows of.
"""

from __future__ import annotations

import io
import lzma
import math
from typing import NamedTuple

import numpy as np

from tfdiffusion import _checks
from tfdiffusion.likelihood.pixels import Pixels, as_float, check_pixels

_MOST_DIMENSIONS = 4096  # of a full covariance: 134 MB each


class Published(NamedTuple):
    """A result of a paper: which model, bits a dimension, and where it is written."""

    model: str
    bits: float
    source: str


#: On CIFAR-10's test images.
PUBLISHED = (
    Published("DDPM, bound", 3.75, "Ho et al. 2020, arXiv:2006.11239, table 1"),
    Published("improved DDPM, hybrid, bound", 3.17, "Nichol & Dhariwal 2021, arXiv:2102.09672"),
    Published("improved DDPM, vlb, bound", 2.94, "the same, table 2"),
    Published("score SDE, sub-VP deep, ODE", 2.99, "Song et al. 2021, arXiv:2011.13456, table 2"),
    Published("VDM, bound", 2.65, "Kingma et al. 2021, arXiv:2107.00630, table 1"),
)


def gaussian_mixture(
    train,
    images,
    components: int = 1,
    *,
    pixels: Pixels | None = Pixels(),  # noqa: B008 (frozen)
    iterations: int = 10,
    seed: int = 0,
) -> np.ndarray:
    """Bits a dimension of images under a mixture of Gaussians with full covariances.

    It is fitted by expectation maximization to training images, with the uniform noise that fills
    the bins of theirs and of the images measured: a bound from above, as
    `log_likelihood(dequantization="uniform")` is (Theis et al. 2016, arXiv:1511.01844).

    Args:
        train: float (M, ...), to fit to; better many more than dimensions.
        images: float (N, ...), to measure.
        components: Gaussians; 1 is a single one, which needs no iterations.
        pixels: the scale of the values; None for points.
        iterations: at most so many of expectation maximization, which may end before it converged.
        seed: of the noise and the first guess.

    Returns:
        (N,) bits a dimension.

    Raises:
        TypeError: If data are no floats.
        ValueError: If the shapes differ, there are more than 4,096 dimensions or fewer training
            images than components, or data do not lie on the scale.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    _checks.integer("components", components)
    _checks.integer("iterations", iterations)
    rng = np.random.default_rng(_checks.integer("seed", seed, 0))
    check_pixels(pixels)
    width = 0.0 if pixels is None else pixels.width

    def filled(x):
        x = as_float(x, "in N rows") if pixels is None else pixels.check(x)
        x = x.reshape(len(x), -1).astype(np.float64)
        return x + width * (rng.random(x.shape) - 0.5)

    train, images = filled(train), filled(images)
    dimensions = images.shape[1]
    if train.shape[1] != dimensions or dimensions > _MOST_DIMENSIONS or len(train) < components:
        raise ValueError(
            f"A mixture of {components} with full covariances needs at least {components} training "
            f"images of the same shape as those measured, of at most {_MOST_DIMENSIONS:,} "
            f"dimensions. Received {len(train)} of {train.shape[1]} dimensions to train on and "
            f"{len(images)} of {dimensions} to measure."
        )
    # The noise alone keeps one covariance regular; those of a mixture are of fewer images.
    floor = width**2 / 12 * (components > 1)
    fitted = GaussianMixture(
        components,
        reg_covar=floor,
        max_iter=iterations,
        random_state=np.random.RandomState(rng.integers(2**32)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            fitted.fit(train)
        except ValueError as error:  # of a covariance that is not positive definite
            raise ValueError(
                f"The {len(train)} training images are too few, or too much alike, for the "
                f"covariances of {components} Gaussians in {dimensions} dimensions. Pass more of "
                "them, or pixels, whose noise keeps a covariance regular."
            ) from error
    nats = fitted.score_samples(images)
    return -nats / dimensions / math.log(2.0) + (0.0 if pixels is None else pixels.offset)


def png(images, pixels: Pixels = Pixels()) -> np.ndarray:  # noqa: B008 (frozen)
    """Bits a dimension of a PNG file of each image, with its header.

    Args:
        images: float (N, H, W, 1 or 3).
        pixels: the scale of the values, of at most 256.

    Returns:
        (N,) bits a dimension.

    Raises:
        TypeError: If data are no floats.
        ValueError: If they are no such images, or do not lie on the scale.
    """
    values = _bytes(images, pixels)
    return np.array([_png_bits(value) for value in values]) / values[0].size


def png_of_all(images, pixels: Pixels = Pixels()) -> float:  # noqa: B008 (frozen)
    """Bits a dimension of one PNG file with all images below each other. See `png`."""
    values = _bytes(images, pixels)
    return _png_bits(values.reshape(-1, *values.shape[2:])) / values.size


def xz(images, pixels: Pixels = Pixels()) -> float:  # noqa: B008 (frozen)
    """Bits a dimension of one xz stream of all images, at its highest preset. See `png`."""
    values = _bytes(images, pixels)
    return 8 * len(lzma.compress(values.tobytes(), preset=9 | lzma.PRESET_EXTREME)) / values.size


def _bytes(images, pixels: Pixels) -> np.ndarray:
    """The numbers of the values, uint8 (N, H, W, C)."""
    if not isinstance(pixels, Pixels) or pixels.levels > 256:
        raise ValueError(f"Files hold Pixels of at most 256 values. Received pixels={pixels}.")
    images = pixels.check(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"PNG and xz are for images (N, H, W, 1 or 3). Received shape {images.shape}."
        )
    return np.rint((images - pixels.low) / pixels.width).astype(np.uint8)


def _png_bits(picture: np.ndarray) -> int:
    from PIL import Image

    file = io.BytesIO()
    picture = picture[..., 0] if picture.shape[-1] == 1 else picture
    Image.fromarray(picture).save(file, format="PNG", optimize=True)
    return 8 * len(file.getvalue())
