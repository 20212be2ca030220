"""Data sets as ``tf.data`` pipelines of images in [-1, 1].

Two steps: :func:`read` finds a data set and gives its :class:`Examples` (how many, which shape,
which classes, what had to be skipped); :meth:`Examples.batches` makes them a ``tf.data.Dataset``.
:func:`load` does both, for ``model.fit(tfd.data.load("digits"))``.

Images are kept as uint8 and become float32, ``x / 127.5 - 1``, batch by batch. Shuffles and flips
come from stateless random numbers: the batch at step n of a run is a function of (seed, n) alone,
so a run that resumes with ``batches(from_step=n)`` sees what an uninterrupted run would have seen.

TensorFlow is imported when a pipeline is made; :meth:`Examples.arrays` does without it.
"""

from __future__ import annotations

from tfdiffusion.data.examples import Examples
from tfdiffusion.data.pixels import to_float, to_uint8
from tfdiffusion.data.sources import has_splits, load, read
from tfdiffusion.data.toys import toy

__all__ = ["Examples", "has_splits", "load", "read", "to_float", "to_uint8", "toy"]
