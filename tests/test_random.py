"""Counter-based noise: its bits against the published generator, its numbers against their laws."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops
from oracles import DOUBLE, box_muller, numpy, threefry
from scipy import stats

from tfdiffusion import _backend, random

# Random123's known-answer file, threefry2x32 with 20 rounds: counter, key, output.
KNOWN_ANSWERS = [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


def word(value):
    return ops.convert_to_tensor(np.array([value], dtype=np.uint32))


def normals(seeds, shape):
    return numpy(random.normal(random.keys(seeds), shape)).astype(np.float64)


def correlations(x):
    """Off-diagonal correlations of the rows of x (R, N)."""
    matrix = np.corrcoef(x)
    return matrix[np.triu_indices(len(x), 1)]


# The generator.


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_threefry_known_answers(counter, key, expected):
    out = random.threefry(word(key[0]), word(key[1]), word(counter[0]), word(counter[1]))
    assert tuple(int(numpy(o)[0]) for o in out) == expected
    assert threefry(key, counter) == expected  # the reference below is right too


def test_threefry_is_that_of_jax():
    jax_random = pytest.importorskip("jax.extend.random")
    words = np.random.default_rng(0).integers(0, 2**32, (6, 64), dtype=np.uint32)
    ours = random.threefry(*(ops.convert_to_tensor(w) for w in words[:4]))
    for i in range(64):
        theirs = jax_random.threefry_2x32(words[:2, i], words[2:4, i])
        assert [int(numpy(o)[i]) for o in ours] == np.asarray(theirs).tolist()


def test_bits_are_the_encrypted_counter():
    seeds = [0, 7, -3, 2**40 + 5]
    words_0, words_1 = (numpy(w) for w in random.bits(random.keys(seeds), 5))
    for row, seed in enumerate(seeds):
        key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        for i in range(5):
            assert (words_0[row, i], words_1[row, i]) == threefry(key, (i, 0))


def test_normal_is_the_same_number_on_every_backend():
    # Both backends are held to one float64 reference, so they agree with each other.
    seeds, size = [0, 1, 12345678901], 9
    expected = []
    for seed in seeds:
        key = (seed & 0xFFFFFFFF, seed >> 32)
        words = np.array([threefry(key, (i, 0)) for i in range((size + 1) // 2)])
        expected.append(box_muller(words)[:size])
    np.testing.assert_allclose(normals(seeds, (size,)), expected, atol=2e-6)


# Seeds and keys.


def test_seed_kinds_agree():
    seeds = [5, -1, 2**31 + 3, -(2**31) - 9, 2**40 + 1, -(2**62), 2**63 - 1]
    expected = numpy(random.keys(seeds))
    low, high = expected[:, 0].astype(int), expected[:, 1].astype(int)
    assert [(int(a) | int(b) << 32) for a, b in zip(low, high)] == [s % 2**64 for s in seeds]
    np.testing.assert_array_equal(numpy(random.keys(np.array(seeds))), expected)
    np.testing.assert_array_equal(numpy(random.keys(tuple(seeds))), expected)
    for row, seed in enumerate(seeds):
        np.testing.assert_array_equal(numpy(random.keys(seed)), expected[row : row + 1])
    if DOUBLE:  # JAX has no int64 tensors unless x64 is on
        tensor = ops.convert_to_tensor(np.array(seeds, dtype=np.int64))
        np.testing.assert_array_equal(numpy(random.keys(tensor)), expected)


def test_int32_tensor_seeds_agree_with_python_integers():
    seeds = np.array([0, 5, -1, -(2**31), 2**31 - 1], dtype=np.int32)
    expected = numpy(random.keys(seeds.tolist()))
    tensor = ops.convert_to_tensor(seeds)
    np.testing.assert_array_equal(numpy(random.keys(tensor)), expected)
    np.testing.assert_array_equal(numpy(random.keys(tensor[2])), expected[2:3])
    compiled = _backend.compiled(random.keys, ())
    np.testing.assert_array_equal(numpy(compiled(tensor)), expected)


def test_a_range_is_a_vector_of_seeds():
    np.testing.assert_array_equal(numpy(random.keys(range(3))), [[0, 0], [1, 0], [2, 0]])


@pytest.mark.parametrize("seeds", [1.5, [0.5], "7", True, [[1]], 2**70, [], None])
def test_what_is_no_seed_is_refused(seeds):
    with pytest.raises(TypeError, match="Seeds must be one integer or a vector"):
        random.keys(seeds)


@pytest.mark.parametrize("dtype", ["float32", "uint32", "bool"])
def test_tensors_that_are_no_seeds_are_refused(dtype):
    # An unsigned word would lose its place in the 64-bit seed: 2³¹ and above would get a sign.
    with pytest.raises(TypeError, match="Seeds must be one integer or a vector"):
        random.keys(ops.ones((2,), dtype=dtype))


def test_keys_and_folded_keys_are_all_different():
    keys = random.keys(range(-50, 50))
    folded = [numpy(random.fold_in(keys, i)) for i in range(30)]
    twice = numpy(random.fold_in(random.fold_in(keys, 0), 1))
    everything = np.concatenate([numpy(keys), *folded, twice])
    assert len(np.unique(everything, axis=0)) == len(everything)


def test_fold_in_takes_a_number_for_each_row():
    key, data = random.keys(3), np.arange(4, dtype=np.int32)
    rows = numpy(random.fold_in(key, data))
    for i in range(4):
        np.testing.assert_array_equal(rows[i], numpy(random.fold_in(key, i))[0])


def test_fold_in_does_not_repeat_the_numbers_drawn():
    keys = random.keys(11)
    drawn = np.stack([numpy(w)[0] for w in random.bits(keys, 20)], axis=-1)
    folded = np.concatenate([numpy(random.fold_in(keys, i)) for i in range(20)])
    assert not set(map(tuple, drawn)) & set(map(tuple, folded))


# Laws of the numbers. Fixed seeds: a law that holds, holds every time.


@pytest.fixture(scope="module")
def many():
    return normals(range(500), (801,)).ravel()


def test_normal_moments(many):
    x, n = many, many.size
    # Standard errors of the first four moments of N(0, 1): 1, √2, √15, √96 over √n.
    for power, (moment, spread) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs(np.mean(x**power) - moment) < 4 * np.sqrt(spread / n), power


def test_normal_distribution_and_tails(many):
    x = many
    assert stats.kstest(x, "norm").pvalue > 1e-3
    for level in (3.0, 4.0):
        for side in (x > level, x < -level):
            expected = x.size * stats.norm.sf(level)
            assert abs(side.sum() - expected) < 4 * np.sqrt(expected), level


def test_uniform_distribution():
    x = numpy(random.uniform(random.keys(range(500)), (801,))).ravel()
    assert x.min() > 0.0 and x.max() < 1.0
    assert stats.kstest(x, "uniform").pvalue > 1e-3
    counts, _ = np.histogram(x, bins=1000, range=(0, 1))
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("value", [0, 1, 0x7FFFFFFF, 0xFFFFFF7F, 0xFFFFFFFF])
def test_every_word_gives_a_finite_number(monkeypatch, value):
    words = ops.full((1, 2), value, dtype="uint32")
    monkeypatch.setattr(random, "bits", lambda keys, count: (words, words))
    uniform = numpy(random.uniform(random.keys(0), (2,)))
    assert (uniform > 0).all() and (uniform < 1).all()
    normal = numpy(random.normal(random.keys(0), (4,)))
    assert np.isfinite(normal).all() and np.abs(normal).max() < 6.8  # √(2 · 33 ln 2) = 6.76


STREAMS = {
    "consecutive seeds": lambda: random.keys(range(48)),
    "seeds one bit apart": lambda: random.keys([0, *(2**i for i in range(47))]),
    "consecutive folds": lambda: random.fold_in(random.keys(0), np.arange(48, dtype=np.int32)),
    "folds in folds": lambda: random.fold_in(
        random.fold_in(random.keys(range(48)), 1), np.arange(48, dtype=np.int32)
    ),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_streams_are_independent(stream):
    x = numpy(random.normal(STREAMS[stream](), (4096,))).astype(np.float64)
    for y in (x, np.abs(x), np.cos(3 * x)):  # dependence that plain correlation misses
        r = correlations(y) * np.sqrt(4096)
        assert np.abs(r).max() < 5.0
        assert abs(np.mean(r**2) - 1.0) < 4 * np.sqrt(2 / r.size)


@pytest.fixture(scope="module")
def ordered():
    return normals(range(4000), (33,))


def test_elements_of_a_row_are_independent(ordered):
    # 33 numbers from 17 blocks: element j and j + 17 come from one Box-Muller pair.
    x = ordered.T
    for y in (x, np.abs(x), np.cos(3 * x)):
        assert np.abs(correlations(y)).max() * np.sqrt(4000) < 5.0


def test_key_and_number_are_independent(ordered):
    # Seeds in order must not order the numbers.
    x = ordered[:, 0]
    assert abs(stats.spearmanr(np.arange(4000), x).statistic) < 4 / np.sqrt(4000)
    lag = np.corrcoef(x[:-1], x[1:])[0, 1]
    assert abs(lag) < 4 / np.sqrt(4000)


# Rows.


@pytest.mark.parametrize("shape", [(), (3, 3, 3)])
def test_a_row_does_not_depend_on_its_batch(shape):
    # To the bit: these sizes fill no vector register evenly.
    seeds = [9, -4, 2**35, 1]
    for draw in (random.normal, random.uniform):
        batch = numpy(draw(random.keys(seeds), shape))
        assert batch.shape == (4, *shape) and batch.dtype == np.float32
        for row, seed in enumerate(seeds):
            np.testing.assert_array_equal(numpy(draw(random.keys(seed), shape))[0], batch[row])


def test_compiled_numbers_are_the_same():
    seeds = np.arange(5, dtype=np.int32)
    compiled = _backend.compiled(lambda s: random.normal(random.keys(s), (6,)), ())
    eager = normals(seeds, (6,))
    np.testing.assert_allclose(numpy(compiled(ops.convert_to_tensor(seeds))), eager, atol=1e-6)


def test_numbers_inside_a_loop_are_the_same():
    keys = random.keys([1, 2])

    def run(keys):
        def body(i, total):
            return total + random.normal(random.fold_in(keys, i), (3,))

        return ops.fori_loop(0, 4, body, ops.zeros((2, 3)))

    outside = sum(numpy(random.normal(random.fold_in(keys, i), (3,))) for i in range(4))
    np.testing.assert_allclose(numpy(_backend.compiled(run, ())(keys)), outside, atol=1e-5)


def test_a_variable_is_a_seed():
    variable = keras.Variable(5, dtype="int32")
    np.testing.assert_array_equal(numpy(random.keys(variable)), [[5, 0]])
