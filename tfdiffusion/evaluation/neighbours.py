"""Whether samples are copies of training images."""

from __future__ import annotations

import numpy as np

from tfdiffusion import _checks


def nearest_neighbours(samples, references, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest references of each sample in pixel space.

    Args:
        samples: (N, ...).
        references: (M, ...), of the same shape behind the first axis, e.g. the training images.
        k: how many, 1 <= k <= M.

    Returns:
        Indices (N, k), nearest first, and Euclidean distances (N, k).

    Raises:
        ValueError: If the shapes differ or k is out of range.
    """
    samples, references = _rows("samples", samples), _rows("references", references)
    _checks.integer("k", k, -_checks.LARGEST)  # its range is looked at below
    if samples.shape[1:] != references.shape[1:] or not 1 <= k <= len(references):
        raise ValueError(
            f"Samples and references must have one shape, and 1 <= k <= {len(references)}. "
            f"Received {samples.shape[1:]} and {references.shape[1:]}, k={k}."
        )
    flat = references.reshape(len(references), -1)
    lengths = np.sum(flat**2, axis=1)
    indices, distances = [], []
    for chunk in np.array_split(samples.reshape(len(samples), -1), max(1, len(samples) // 256)):
        # ‖a − b‖² = ‖a‖² − 2ab + ‖b‖²; exact differences only for the few that are kept.
        closeness = lengths[None] - 2.0 * chunk @ flat.T
        nearest = np.argpartition(closeness, k - 1, axis=1)[:, :k]
        distance = np.linalg.norm(chunk[:, None] - flat[nearest], axis=-1)
        order = np.argsort(distance, axis=1)
        indices.append(np.take_along_axis(nearest, order, axis=1))
        distances.append(np.take_along_axis(distance, order, axis=1))
    return np.concatenate(indices), np.concatenate(distances)


def _rows(name: str, values) -> np.ndarray:
    """Finite float32 (N, ...), N > 0."""
    values = _checks.array(name, values, "numbers of shape (N, ...)")
    if values.ndim < 2 or not values.size:
        raise ValueError(f"{name} must have shape (N, ...), none 0. Received {values.shape}.")
    _checks.moderate(name, values)
    return values.astype(np.float32)
