"""The one room that looks at arguments: what it lets through, as what, and what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from keras import ops
from oracles import numpy

from tfdiffusion import _backend, _checks


def test_integers():
    for value in (3, np.int64(3), np.uint8(3)):
        assert _checks.integer("num", value) == 3
        assert type(_checks.integer("num", value)) is int
    for value in (0, True, 3.0, "3", None, np.bool_(True), np.array(3)):
        with pytest.raises(ValueError, match=r"num must be an integer >= 1\. Received num="):
            _checks.integer("num", value)
    with pytest.raises(ValueError, match=r"and < 2147483648\. Received num=1099511627776\."):
        _checks.integer("num", 2**40)
    with pytest.raises(ValueError, match=r"k must be an integer from 0 to 5\. Received k=6\."):
        _checks.integer("k", 6, 0, 5)
    assert _checks.seed(-(2**63)) == -(2**63)
    with pytest.raises(ValueError, match="seed must be an integer from -9223372036854775808"):
        _checks.seed(2**63)


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", (0, 0.5, np.float32(0.5)), (-1e-9, 1, 1.0)),
        ("(0, 1]", (1e-300, 1), (0, 0.0, -1.0, 1.1)),
        ("(0, inf)", (1e-30, 1e30), (0, -1, np.inf, 10**400)),
        ("[1, inf]", (1, np.inf), (0.99, -np.inf)),
        ("(-inf, inf)", (0, -1e30, np.int8(3)), (np.inf, -np.inf, -(10**400))),
    ],
)
def test_numbers_lie_in_an_interval(interval, inside, outside):
    for value in inside:
        assert _checks.number("x", value, interval) == float(value)
    for value in (*outside, np.nan, True, "1", None, 1j, [1.0], np.zeros(2)):
        with pytest.raises(ValueError, match=r"x must .*\. Received x="):
            _checks.number("x", value, interval)


def test_shapes():
    assert _checks.shape([2, np.int64(3)]) == (2, 3)
    assert _checks.shape(()) == ()
    for value in (3, None, "23", (0,), (2.0,), (True,)):
        with pytest.raises(ValueError, match=r"shape must be a tuple of integers >= 1\. Received"):
            _checks.shape(value)
    with pytest.raises(ValueError, match="fewer than 2"):
        _checks.shape((2**20, 2**20))


def test_arrays_have_values_and_their_dtype():
    values = _checks.array("x", [[1, 2]], "numbers")
    assert values.dtype == np.int64 and values.shape == (1, 2)
    assert _checks.array("x", ops.ones((2,), "bfloat16"), "floats", kinds="f").shape == (2,)
    for value in ([[1], [1, 2]], "abc", None, np.array([1j]), [True], np.zeros((2, 2))):
        with pytest.raises(ValueError, match=r"x must be a vector\. Received"):
            _checks.array("x", value, "a vector", rank=1)
    with pytest.raises(ValueError, match=r"all finite\. Received 2 NaN or infinite values of 3"):
        _checks.array("x", [1.0, np.nan, np.inf], "numbers")


def test_examples_keep_their_gradient():
    """A tensor is looked at, not copied: what follows can still be differentiated."""
    value, gradient = _backend.vjp(
        lambda x: ops.sum(_checks.examples("x", x) ** 2, axis=-1), ops.ones((3, 2))
    )
    np.testing.assert_array_equal(numpy(value), 2.0)
    np.testing.assert_array_equal(numpy(gradient), 2.0)


def test_examples():
    assert numpy(_checks.examples("x", np.ones((3, 2), "int32"), (2,))).dtype == np.float32
    for value in (np.ones(3), np.ones((0, 2)), np.ones((3, 4)), np.full((3, 2), np.nan), "abc"):
        with pytest.raises(ValueError, match=r"x must be real numbers of shape \(B, 2\)"):
            _checks.examples("x", value, (2,))
    with pytest.raises(ValueError, match=r"x must be of moderate size\. Received values beyond"):
        _checks.examples("x", np.full((3, 2), 1e30))


def test_what_graphs_can_tell():
    """Traced or not, dtypes and shapes are looked at, and no values."""

    def looked_at(x):
        _checks.floating(x=x)
        _checks.alike(x=x, y=x + 1.0)
        _checks.one_a_row(x, t=0.5, label=ops.cast(x[:, 0], "int32"))
        with pytest.raises(ValueError, match=r"x and y must be of one shape\. Received x \("):
            _checks.alike(x=x, y=x[:, :1])
        with pytest.raises(
            ValueError, match=r"t must be one number, or one for each of the 3 rows"
        ):
            _checks.one_a_row(x, t=x[:2, 0])
        with pytest.raises(ValueError, match="n must be an array or tensor of floats"):
            _checks.floating(n=ops.cast(x, "int32"))
        with pytest.raises(ValueError, match="b must be a number, or an array or tensor of real"):
            _checks.real(b=x > 0.0)
        return x

    x = ops.full((3, 2), np.nan)
    looked_at(x)
    _backend.compiled(looked_at, ())(x)


def test_paths_and_what_came():
    assert _checks.path("file", "a/b") == Path("a/b") == _checks.path("file", Path("a/b"))
    for value in (None, 3, b"a", ["a"]):
        with pytest.raises(TypeError, match=r"file must be a path, a string\. Received file="):
            _checks.path("file", value)
    assert _checks.shown(np.zeros((2, 3))) == "an array of shape (2, 3), dtype float64"
    assert _checks.shown(np.float32(2)) == repr(np.float32(2))
    assert len(_checks.shown(list(range(1000)))) == 80
