"""Two-dimensional toy distributions, to look at what a model learned.

Each is centred and scaled by fixed constants so that its variance per axis is one on average: the
distribution does not depend on the number of points drawn. Curves get Gaussian noise of 0.05.
"""

from __future__ import annotations

import numpy as np

from tfdiffusion import _checks, _names

NOISE = 0.05


def toy(
    name: str, num: int, *, seed: int = 0, return_labels: bool = False
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Draw points of a toy distribution.

        x = tfd.data.toy("swiss_roll", 5000)
        x, label = tfd.data.toy("gaussian_mixture", 5000, return_labels=True)

    Args:
        name: "swiss_roll"; "moons" (two half circles), "circles" (a ring in a ring) or
            "gaussian_mixture" (eight modes on a ring), which have labels; "checkerboard" (uniform
            on the eight dark squares of a 4×4 board).
        num: Number of points.
        seed: Decides the points.
        return_labels: Return the labels too: the moon, the circle or the mode.

    Returns:
        Points, float32 (num, 2), of about unit variance; or a tuple with labels, int32 (num,).

    Raises:
        ValueError: If the name is unknown, ``num`` is not positive, or the toy has no labels.
    """
    draw = _names.look_up("toy", name, TOYS)
    _checks.integer("num", num)
    _checks.integer("seed", seed, 0)
    points, labels = draw(np.random.default_rng(seed), num)
    if return_labels and labels is None:
        raise ValueError(f"{name!r} has no labels; moons, circles and gaussian_mixture have.")
    points = points.astype(np.float32)
    return (points, labels.astype(np.int32)) if return_labels else points


def _noisy(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    return points + NOISE * rng.standard_normal(points.shape)


def _polar(radius: np.ndarray | float, angle: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def _swiss_roll(rng, num):
    angle = rng.uniform(1.5 * np.pi, 4.5 * np.pi, num)
    # Integrals over the angle give the mean, (2, 2 / 3π), and the mean variance, 6.789².
    return _noisy(rng, (_polar(angle, angle) - [2, 2 / (3 * np.pi)]) / 6.789), None


def _moons(rng, num):
    label, angle = rng.integers(2, size=num), rng.uniform(0, np.pi, num)
    upper = _polar(1, angle)
    points = np.where(label[:, None] == 0, upper, [1, 0.5] - upper)
    return _noisy(rng, (points - [0.5, 0.25]) / 0.705), label


def _circles(rng, num):
    label, angle = rng.integers(2, size=num), rng.uniform(0, 2 * np.pi, num)
    radius = np.where(label == 0, 1, 0.5)
    return _noisy(rng, _polar(radius / np.sqrt(0.3125), angle)), label


def _gaussian_mixture(rng, num):
    label, spread = rng.integers(8, size=num), 0.1
    modes = _polar(np.sqrt(2 * (1 - spread**2)), label * np.pi / 4)
    return modes + spread * rng.standard_normal((num, 2)), label


def _checkerboard(rng, num):
    column, row = rng.integers(4, size=num), 2 * rng.integers(2, size=num)
    corner = np.stack([column, row + column % 2], axis=-1) - 2
    return (corner + rng.uniform(size=(num, 2))) * np.sqrt(3 / 4), None


TOYS = {
    "swiss_roll": _swiss_roll,
    "moons": _moons,
    "circles": _circles,
    "gaussian_mixture": _gaussian_mixture,
    "checkerboard": _checkerboard,
}
