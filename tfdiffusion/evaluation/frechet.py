"""The Fréchet distance between two sets of features, each taken for a Gaussian.

    d² = ‖m_1 − m_2‖² + tr(C_1 + C_2 − 2 (C_1^½ C_2 C_1^½)^½)

is the squared 2-Wasserstein distance of N(m_1, C_1) and N(m_2, C_2) (Dowson & Landau 1982). FID is
this number on the features of one particular Inception network and 50,000 images (Heusel et al.
2017, arXiv:1706.08500). On other features it is another number: name the features, and compare it
only with distances in the same ones.
"""

from __future__ import annotations

import numpy as np

from tfdiffusion import _checks


def frechet_distance(features_a, features_b) -> float:
    """Squared Fréchet distance between two sets of feature vectors.

    The covariance of few vectors is poor: with N vectors of D features the distance of two sets of
    one distribution is of the order D²/N rather than 0, so hold N equal when comparing.

    Args:
        features_a: (N, D), N >= 2.
        features_b: (M, D), M >= 2.

    Returns:
        The distance, >= 0, in squared units of the features.

    Raises:
        ValueError: If a set is not a finite matrix of at least two rows, or the widths differ.
    """
    return frechet_distance_from_moments(*_moments("a", features_a), *_moments("b", features_b))


def frechet_distance_from_moments(mean_a, covariance_a, mean_b, covariance_b) -> float:
    """Squared Fréchet distance of N(mean_a, covariance_a) and N(mean_b, covariance_b).

    Args:
        mean_a: (D,).
        covariance_a: (D, D), symmetric, not negative.
        mean_b: (D,).
        covariance_b: (D, D).

    Returns:
        The distance, >= 0.

    Raises:
        ValueError: If the shapes do not agree, or a number is not finite.
    """
    mean_a, mean_b = _floats("mean_a", mean_a), _floats("mean_b", mean_b)
    covariance_a = _floats("covariance_a", covariance_a)
    covariance_b = _floats("covariance_b", covariance_b)
    square = (mean_a.size, mean_a.size)
    if (
        mean_a.ndim != 1
        or not mean_a.size
        or mean_a.shape != mean_b.shape
        or {covariance_a.shape, covariance_b.shape} != {square}
    ):
        raise ValueError(
            f"Means must have shape (D,) and covariances (D, D). Received {mean_a.shape}, "
            f"{covariance_a.shape} and {mean_b.shape}, {covariance_b.shape}."
        )
    # C_1^½ C_2 C_1^½ is symmetric, so its root's trace is a sum over real eigenvalues.
    root = _symmetric_root(covariance_a)
    eigenvalues = np.linalg.eigvalsh(root @ covariance_b @ root)
    overlap = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    spread = np.trace(covariance_a) + np.trace(covariance_b) - 2.0 * overlap
    return float(max(np.sum((mean_a - mean_b) ** 2) + spread, 0.0))


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def _floats(name: str, values) -> np.ndarray:
    values = _checks.array(name, values, "numbers")
    _checks.moderate(name, values)
    return values.astype(np.float64)


def _moments(name: str, features) -> tuple[np.ndarray, np.ndarray]:
    features = _floats(f"features_{name}", features)
    if features.ndim != 2 or len(features) < 2 or not features.size:
        raise ValueError(
            f"features_{name} must be a finite matrix (N, D) with N >= 2. "
            f"Received shape {features.shape}."
        )
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))
