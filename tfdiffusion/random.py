"""Counter-based noise: a number is a function of (seed, counter), never of what was drawn before.

Every row of a batch has its own key, so image i of a batch depends on its own seed alone: it is the
same image in any batch, in any process, inside a compiled loop and inside a SavedModel. Training
derives its keys from (seed, step, row), so that a resumed run needs no saved generator state.

The generator is Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011), written in `keras.ops` on uint32, hence the same bits on every backend; normal
deviates come from them by the Box-Muller transform and agree to float32 rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from keras import ops

from tfdiffusion import _checks
from tfdiffusion._backend import traced_once

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
# Words of the counter block that keep the two uses of a key apart.
_BITS, _FOLD = 0, 1
# Elements that fill any vector register. TensorFlow's log and cos round the rest of an array, which
# does not fill one, differently, and then a row would depend on the batch around it.
_VECTOR = 16


def _rotate_left(x, distance: int):
    left = ops.bitwise_left_shift(x, np.uint32(distance))
    return ops.bitwise_or(left, ops.bitwise_right_shift(x, np.uint32(32 - distance)))


@traced_once
def threefry(key_0, key_1, counter_0, counter_1):
    """Encrypts a 64-bit counter with a 64-bit key: Threefry-2x32-20.

    Args:
        key_0: uint32 tensor, first word of the key.
        key_1: uint32 tensor, second word.
        counter_0: uint32 tensor, first word of the counter. All four broadcast together.
        counter_1: uint32 tensor, second word.

    Returns:
        Two uint32 tensors of the broadcast shape.
    """
    schedule = (key_0, key_1, ops.bitwise_xor(ops.bitwise_xor(key_0, key_1), np.uint32(_PARITY)))
    x_0, x_1 = counter_0 + key_0, counter_1 + key_1
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x_0 = x_0 + x_1
            x_1 = ops.bitwise_xor(_rotate_left(x_1, distance), x_0)
        x_0 = x_0 + schedule[(group + 1) % 3]
        x_1 = x_1 + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x_0, x_1


def keys(seeds):
    """Makes one key per seed.

    Args:
        seeds: integer, or integers of shape (B,): Python, NumPy (up to 64 bits, negative ones
            included) or an int32 or int64 tensor.

    Returns:
        uint32 tensor of shape (B, 2).

    Raises:
        TypeError: If the seeds are not integers.
    """
    if isinstance(seeds, np.ndarray | np.generic) or not hasattr(seeds, "dtype"):
        try:
            array = np.atleast_1d(np.asarray(seeds))
        except ValueError as error:  # ragged
            raise _not_seeds(seeds) from error
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise _not_seeds(seeds)
        words = array.astype(np.int64).view(np.uint64)
        low, high = words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)
        return ops.convert_to_tensor(np.stack([low, high], -1).astype("uint32"))
    dtype = _checks.dtype(seeds)
    if dtype not in ("int32", "int64") or len(seeds.shape) > 1:
        raise _not_seeds(seeds)
    seeds = ops.reshape(seeds, (-1,))
    # An arithmetic shift by 31 spreads the sign of an int32 over the high word.
    high = ops.right_shift(seeds, 32 if dtype == "int64" else 31)
    return ops.stack([ops.cast(seeds, "uint32"), ops.cast(high, "uint32")], axis=-1)


def _not_seeds(seeds) -> TypeError:
    return TypeError(
        f"Seeds must be one integer or a vector of them (tensors: int32 or int64). Received "
        f"{_checks.shown(seeds)}; pass for example seed=0 or seed=[3, 7]."
    )


def check_keys(keys) -> None:
    """Raises a TypeError unless keys are a uint32 tensor or array (B, 2), as `keys` makes them."""
    a_key = hasattr(keys, "dtype") and _checks.dtype(keys) == "uint32"
    if not a_key or len(keys.shape) != 2 or keys.shape[1] != 2:
        raise TypeError(
            "Keys must be uint32 of shape (B, 2), as random.keys(seeds) makes them. Received "
            f"{_checks.shown(keys)}."
        )


def fold_in(keys, data):
    """Derives new keys from keys and an integer (a step, a row, a purpose).

    Args:
        keys: uint32 tensor (B, 2) or (1, 2).
        data: integer scalar, or integers of shape (B,), from 0 to 2³² − 1.

    Returns:
        uint32 tensor (B, 2).

    Raises:
        TypeError: If the keys are none.
    """
    check_keys(keys)
    data = ops.cast(data, "uint32")
    x_0, x_1 = threefry(keys[:, 0], keys[:, 1], data, ops.full_like(data, _FOLD))
    return ops.stack([x_0, x_1], axis=-1)


def bits(keys, count: int):
    """Draws 2 · `count` random words for each key.

    Args:
        keys: uint32 tensor (B, 2).
        count: number of counter blocks.

    Returns:
        Two uint32 tensors of shape (B, count).
    """
    counter = ops.cast(ops.arange(count, dtype="int32"), "uint32")[None, :]
    return threefry(keys[:, :1], keys[:, 1:], counter, ops.full_like(counter, _BITS))


def _unit(words):
    """uint32 to float32 in (0, 1]: never 0, so that its logarithm is finite."""
    return (ops.cast(words, "float32") + 0.5) * 2.0**-32


def uniform(keys, shape: Sequence[int] = ()):
    """Uniform noise on (0, 1), one independent block a key.

    Args:
        keys: uint32 tensor (B, 2).
        shape: static shape of one row.

    Returns:
        float32 tensor (B, *shape).

    Raises:
        TypeError: If the keys are none.
        ValueError: If the shape is no tuple of sizes.
    """
    check_keys(keys)
    size = math.prod(shape := _checks.shape(shape))
    words, _ = bits(keys, size)
    return ops.reshape(ops.minimum(_unit(words), 1.0 - 2.0**-24), (-1, *shape))


def normal(keys, shape: Sequence[int] = ()):
    """Standard normal noise, one independent block a key.

    Args:
        keys: uint32 tensor (B, 2).
        shape: static shape of one row.

    Returns:
        float32 tensor (B, *shape), each element N(0, 1) (Box and Muller, 1958).

    Raises:
        TypeError: If the keys are none.
        ValueError: If the shape is no tuple of sizes.
    """
    check_keys(keys)
    size = math.prod(shape := _checks.shape(shape))
    count = (size + 1) // 2
    words_0, words_1 = bits(keys, -(-count // _VECTOR) * _VECTOR)
    radius = ops.sqrt(-2.0 * ops.log(_unit(words_0)))
    angle = (2.0 * math.pi) * _unit(words_1)
    cosines, sines = radius * ops.cos(angle), radius * ops.sin(angle)
    pair = ops.concatenate([cosines[:, :count], sines[:, :count]], axis=-1)
    return ops.reshape(pair[:, :size], (-1, *shape))
