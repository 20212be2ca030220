"""Arguments, looked at before any work: what was expected and what came, in one line.

For what people pass: Python's numbers, NumPy's, arrays and tensors that have values. Inside a graph
there is nothing to look at but dtypes and shapes; `real` and `floating`, `alike` and `one_a_row`
look at these alone. Keras is imported where it is needed: commands look at their arguments first.
"""

from __future__ import annotations

import numbers as abstract
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

#: Larger than any size that backends, which count in int32, can have.
LARGEST = 2**31 - 1
#: Data beyond it have squares, and sums of squares, that float32 cannot hold.
HUGE = 1e15
#: What one word of 64 bits holds.
SEEDS = (-(2**63), 2**63 - 1)


def shown(value: object) -> str:
    """What came, in few words."""
    if not isinstance(value, np.generic) and hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array of shape {tuple(value.shape)}, dtype {dtype(value)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_integer(value: object) -> bool:
    """Whether it is an integer, Python's or NumPy's, and no boolean."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def integer(name: str, value: object, least: int = 1, most: int = LARGEST) -> int:
    """The value as an int.

    Raises:
        ValueError: If it is none (a boolean is none), or out of range.
    """
    if not is_integer(value) or not least <= value <= most:
        wanted = f">= {least}" if most == LARGEST else f"from {least} to {most}"
        beyond = f" and < {LARGEST + 1}" if is_integer(value) and value > LARGEST == most else ""
        raise ValueError(
            f"{name} must be an integer {wanted}{beyond}. Received {name}={shown(value)}."
        )
    return int(value)


def seed(value: object, name: str = "seed") -> int:
    """The seed as an int that fits into 64 bits; see `integer`."""
    return integer(name, value, *SEEDS)


_WORDS = {"(-inf, inf)": "be a finite number", "(0, inf)": "be positive and finite"}


def number(name: str, value: object, interval: str = "(-inf, inf)") -> float:
    """The value as a float, within an interval such as "[0, 1)"; "inf]" takes infinity too.

    Raises:
        ValueError: If it is no real number (a boolean is none), NaN, or outside.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    real = isinstance(value, abstract.Real) and not isinstance(value, bool)
    real = real and not (isinstance(value, int) and abs(value) > 2**1000)  # beyond any float
    above = real and (value > low or (interval[0] == "[" and value == low))
    if not (above and (value < high or (interval[-1] == "]" and value == high))):
        wanted = _WORDS.get(interval, f"lie in {interval}")
        raise ValueError(f"{name} must {wanted}. Received {name}={shown(value)}.")
    return float(value)


def numbers(**values: object) -> None:
    """Raises a ValueError unless every value is a finite number; see `number`."""
    for name, value in values.items():
        number(name, value)


def shape(value: object, name: str = "shape") -> tuple[int, ...]:
    """The shape of one example as a tuple.

    Raises:
        ValueError: If it is no sequence of integers >= 1, or has more elements than can be counted.
    """
    try:
        sides = tuple(value)
    except TypeError:
        sides = None
    if sides is None or not all(is_integer(side) and side >= 1 for side in sides):
        raise ValueError(
            f"{name} must be a tuple of integers >= 1. Received {name}={shown(value)}."
        )
    if np.prod([float(side) for side in sides]) > LARGEST:
        raise ValueError(f"{name} must have fewer than 2**31 elements. Received {name}={sides}.")
    return tuple(int(side) for side in sides)


def real(**values: object) -> None:
    """Raises a ValueError unless all are real numbers, arrays or tensors of them, traced or not."""
    for name, value in values.items():
        plain = isinstance(value, abstract.Real) and not isinstance(value, bool)
        if not plain and kind(value) not in "iuf":
            raise ValueError(
                f"{name} must be a number, or an array or tensor of real numbers. "
                f"Received {name}={shown(value)}."
            )


def floating(**values: object) -> None:
    """Raises a ValueError unless all are arrays or tensors of floats, traced or not."""
    for name, value in values.items():
        if kind(value) != "f":
            raise ValueError(
                f"{name} must be an array or tensor of floats. Received {name}={shown(value)}."
            )


def one_a_row(x, **values: object) -> None:
    """Raises a ValueError unless all are one number, or one for each row of x, traced or not."""
    real(**values)
    for name, value in values.items():
        sides, rows = _sides(value), _sides(x)[:1]
        if len(sides) > 1 or (sides and rows and sides != rows and None not in (*sides, *rows)):
            raise ValueError(
                f"{name} must be one number, or one for each of the {rows[0]} rows. "
                f"Received shape {sides}."
            )


def alike(**values: object) -> None:
    """Raises a ValueError unless all are `real` and of one shape."""
    real(**values)
    shapes = {name: _sides(value) for name, value in values.items()}
    if len(set(shapes.values())) > 1:
        received = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{' and '.join(values)} must be of one shape. Received {received}.")


def array(
    name: str, value: object, expected: str, *, kinds: str = "iuf", rank: int | None = None
) -> np.ndarray:
    """The values of an array, a tensor or nested lists, all of them finite.

    Args:
        name: of the argument.
        value: what came.
        expected: what it must be, for the message: "must be {expected}".
        kinds: of NumPy's dtypes; "f" is also bfloat16.
        rank: number of axes, if only one will do.

    Raises:
        ValueError: If it is something else.
    """
    try:
        values = np.asarray(value)
    except Exception as error:  # ragged lists, symbols of a graph
        raise ValueError(f"{name} must be {expected}. Received {shown(value)}.") from error
    if kind(values) not in kinds or rank not in (None, values.ndim):
        raise ValueError(
            f"{name} must be {expected}. Received shape {values.shape}, dtype {values.dtype}."
        )
    if kind(values) == "f" and not np.isfinite(values.astype("float64")).all():
        count = int(np.sum(~np.isfinite(values.astype("float64"))))
        raise ValueError(
            f"{name} must be {expected}, all finite. Received {count} NaN or infinite values of "
            f"{values.size}."
        )
    return values


def moderate(name: str, values: np.ndarray) -> None:
    """Raises a ValueError if numbers are so large that float32 cannot hold their squares."""
    if values.size and np.abs(values.astype("float64")).max() > HUGE:
        raise ValueError(
            f"{name} must be of moderate size. Received values beyond {HUGE:g}, whose squares "
            "float32 cannot hold. Scale the data."
        )


def examples(name: str, value: object, shape: Sequence[int] | None = None):
    """Data as a float32 tensor (B, ...) with B > 0, every number finite unless it is traced.

    Args:
        name: of the argument.
        value: array or tensor.
        shape: of one example, where it is known.

    Raises:
        ValueError: If it is something else.
    """
    from keras import ops

    known = "..." if shape is None else ", ".join(map(str, shape))
    expected = f"real numbers of shape (B, {known}) with B > 0"
    if not is_symbol(value):
        values = array(name, value, expected)
        # A tensor stays what it is: somebody may want a gradient with respect to it.
        value = value if ops.is_tensor(value) else values
        moderate(name, values)
    sides = _sides(value)
    fits = len(sides) >= 2 and 0 not in sides and (shape is None or sides[1:] == tuple(shape))
    if not fits or kind(value) not in "iuf":
        raise ValueError(
            f"{name} must be {expected}. Received shape {sides}, dtype {dtype(value)}."
        )
    return ops.convert_to_tensor(value, dtype="float32")


def path(name: str, value: object) -> Path:
    """The path of a file or folder.

    Raises:
        TypeError: If it is no string and no path.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, a string. Received {name}={shown(value)}.")
    return Path(value)


def is_symbol(value: object) -> bool:
    """Whether a tensor has no values yet."""
    if isinstance(value, np.ndarray | np.generic | abstract.Number):
        return False
    import keras
    from keras import ops

    from tfdiffusion import _backend

    if not ops.is_tensor(value):
        return isinstance(value, keras.KerasTensor)
    return _backend.is_traced(value)


def dtype(value) -> str:
    """The name of the dtype of an array or tensor."""
    return str(getattr(value.dtype, "name", value.dtype))


def _sides(value) -> tuple:
    """The shape, None where an axis is unknown."""
    return tuple(getattr(value, "shape", ()))


def kind(value: object) -> str:
    """NumPy's letter for the dtype of an array or tensor; "O" for all that is none."""
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        return "O"
    name = dtype(value)
    if name == "bfloat16":
        return "f"
    try:
        return np.dtype(name).kind
    except TypeError:  # a dtype of the backend's own, such as TensorFlow's strings
        return "O"
