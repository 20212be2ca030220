"""States kept while a compiled loop runs: one tensor whose first axis counts them."""

from __future__ import annotations

from keras import ops


def put(stack, i, value):
    """The stack (N, ...) with `value` (...) as its i-th."""
    return ops.slice_update(stack, (i,) + (0,) * len(value.shape), value[None])


def begin(x, length, wanted: bool) -> tuple:
    """A path (length, B, ...) that begins with x, in a tuple; an empty tuple if none is wanted."""
    if not wanted:
        return ()
    return record((ops.zeros_like(ops.broadcast_to(x[None], (length, *ops.shape(x)))),), 0, x)


def record(path: tuple, i, x) -> tuple:
    """The path with x as its state i, if there is a path."""
    return tuple(put(stack, i, x) for stack in path)
