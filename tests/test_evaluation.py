"""The Fréchet distance against closed forms, and a judge on real digits."""

import numpy as np
import pytest

from tfdiffusion import evaluation


def random_covariance(generator, dimension):
    root = generator.standard_normal((dimension, dimension))
    return root @ root.T + 0.1 * np.eye(dimension)


def test_distance_of_diagonal_gaussians_is_that_of_means_and_deviations():
    mean, deviation = np.array([1.0, -2.0, 0.5]), np.array([1.0, 2.0, 0.3])
    other = np.array([0.2, 1.0, 0.7])
    got = evaluation.frechet_distance_from_moments(
        mean, np.diag(deviation**2), np.zeros(3), np.diag(other**2)
    )
    assert got == pytest.approx(np.sum(mean**2) + np.sum((deviation - other) ** 2))


def test_distance_agrees_with_scipys_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    generator = np.random.default_rng(0)
    a, b = random_covariance(generator, 6), random_covariance(generator, 6)
    expected = np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    got = evaluation.frechet_distance_from_moments(np.zeros(6), a, np.zeros(6), b)
    assert got == pytest.approx(expected, rel=1e-8)


def test_distance_of_a_set_to_itself_is_zero_and_a_shift_adds_its_square():
    points = np.random.default_rng(1).standard_normal((200, 5))
    assert evaluation.frechet_distance(points, points) == pytest.approx(0.0, abs=1e-9)
    for size in (0.5, 1.0, 2.0):
        shifted = points + size * np.eye(5)[0]
        assert evaluation.frechet_distance(points, shifted) == pytest.approx(size**2)


def test_distance_does_not_change_when_both_sets_are_rotated():
    generator = np.random.default_rng(2)
    a, b = generator.standard_normal((300, 4)), 2.0 * generator.standard_normal((300, 4)) + 1.0
    rotation, _ = np.linalg.qr(generator.standard_normal((4, 4)))
    plain = evaluation.frechet_distance(a, b)
    assert evaluation.frechet_distance(a @ rotation, b @ rotation) == pytest.approx(plain)


@pytest.mark.parametrize(
    ("features", "words"),
    [(np.zeros((1, 3)), "N >= 2"), (np.zeros(3), "shape"), (np.full((4, 3), np.nan), "finite")],
)
def test_features_that_have_no_moments_are_refused(features, words):
    with pytest.raises(ValueError, match=words):
        evaluation.frechet_distance(features, np.ones((5, 3)))


def test_widths_that_differ_are_refused():
    with pytest.raises(ValueError, match="must have shape"):
        evaluation.frechet_distance(np.ones((5, 3)), np.ones((5, 2)))


def test_nearest_neighbours_are_those_of_a_full_search():
    generator = np.random.default_rng(3)
    samples, references = generator.normal(size=(40, 3, 2)), generator.normal(size=(70, 3, 2))
    differences = samples[:, None].reshape(40, 1, 6) - references.reshape(1, 70, 6)
    expected = np.sort(np.sqrt((differences**2).sum(-1)), axis=1)[:, :3]
    indices, distances = evaluation.nearest_neighbours(samples, references, k=3)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)
    found = np.linalg.norm((samples[:, None] - references[indices]).reshape(40, 3, 6), axis=-1)
    np.testing.assert_allclose(found, distances, rtol=1e-5)
    copies, zero = evaluation.nearest_neighbours(references[:5], references)
    assert copies[:, 0].tolist() == [0, 1, 2, 3, 4] and not zero.any()
    with pytest.raises(ValueError, match="k="):
        evaluation.nearest_neighbours(samples, references, k=71)


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 8.0 - 1.0).astype("float32")[..., None], data.target


@pytest.mark.slow_on_jax
def test_judge_knows_digits_from_noise(digits):
    images, labels = digits
    judge = evaluation.train_judge(images[:1400], labels[:1400], epochs=6, batch_size=64)
    held_out, truth = images[1400:], labels[1400:]
    real = evaluation.judge_samples(judge, held_out, truth, references=images[:397])
    noise = np.random.default_rng(0).uniform(-1, 1, held_out.shape)
    fake = evaluation.judge_samples(judge, noise, truth, references=images[:397])
    assert real.accuracy > 0.9 and real.confidence > 0.85
    assert real.num_samples == len(held_out) and real.num_references == 397
    assert fake.accuracy < 0.3
    assert real.frechet_distance < 0.2 * fake.frechet_distance
    assert sum(real.class_shares) == pytest.approx(1.0)
    assert min(real.class_shares) > 0.05
    with pytest.raises(ValueError, match="one a sample"):
        evaluation.judge_samples(judge, held_out, truth[:3])
