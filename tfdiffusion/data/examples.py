"""A data set that was found, and the pipeline that shuffles, batches and scales it.

Examples are held in one of three ways: an array in memory, files that are decoded when indexed
(both are reached by position, so an epoch is a permutation of positions), or a stream that can only
be read in order (an epoch is a shuffle through a buffer).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tfdiffusion import _checks
from tfdiffusion.data.pixels import to_float

if TYPE_CHECKING:
    import tensorflow as tf

MEMORY_LIMIT = 2**30  # bytes of uint8 images that are kept decoded
SHUFFLE_BUFFER = 16_384  # examples of a stream, fewer if they exceed the limit above


def import_tensorflow() -> Any:
    """Import TensorFlow, or say what needs it."""
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "tf.data pipelines need TensorFlow: pip install tensorflow. Without it, "
            "tfdiffusion.data.read(...).arrays() gives NumPy arrays for fit()."
        ) from error
    return tf


def fits_in_memory(num: int, shape: tuple[int, ...]) -> bool:
    """Say whether ``num`` uint8 images of a shape may be kept decoded."""
    return num * int(np.prod(shape)) <= MEMORY_LIMIT


class Indexed(Protocol):
    """Decodes uint8 images (B, H, W, C) when indexed by positions (B,)."""

    def __getitem__(self, indices: np.ndarray) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A data set that was found; made by :func:`tfdiffusion.data.read`.

    Attributes:
        name: The name or folder it was read from, or "arrays".
        num_examples: Number of usable examples.
        shape: Shape of one example, (H, W, C), or (D,) for points such as the 2-D toys.
        class_names: One name per class; None without labels.
        skipped: Pairs (file, reason) for the images of a folder that were left out.
    """

    name: str
    num_examples: int
    shape: tuple[int, ...]
    class_names: tuple[str, ...] | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    _images: np.ndarray | Indexed | None = dataclasses.field(default=None, repr=False)
    _labels: np.ndarray | None = dataclasses.field(default=None, repr=False)
    _stream: tf.data.Dataset | None = dataclasses.field(default=None, repr=False)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None without labels."""
        return None if self.class_names is None else len(self.class_names)

    def arrays(self, num: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the first ``num`` examples (all by default) as NumPy arrays, in the order stored.

        Returns:
            Images, float32 (num, H, W, C) in [-1, 1], and labels, int32 (num,) or None.
        """
        num = (
            self.num_examples
            if num is None
            else min(_checks.integer("num", num), self.num_examples)
        )
        if self._stream is None:
            images, labels = self._images[np.arange(num)], self._labels
            labels = None if labels is None else labels[:num]
        else:
            images, labels = gather_stream(self._stream.take(num), num, self.shape)
        images = to_float(images) if images.dtype == np.uint8 else images
        return images, None if self.class_names is None else labels

    def split(self, num: int, seed: int = 0) -> tuple[Examples, Examples]:
        """Sets ``num`` examples aside: (the others, these).

        They are drawn with the seed; of a stream they are the first.

        Raises:
            ValueError: If there would be none left on one side.
        """
        total = self.num_examples
        _checks.integer("seed", seed, 0)
        if not _checks.is_integer(num) or not 0 < num < total:
            raise ValueError(
                f"num must be an integer from 1 to {total - 1}: there are {total} examples, and "
                f"some must be left on both sides. Received num={_checks.shown(num)}."
            )
        if self._stream is not None:
            parts = [{"_stream": s} for s in (self._stream.skip(num), self._stream.take(num))]
        else:
            order = np.random.default_rng(seed).permutation(total)
            parts = [
                {
                    "_images": rows_of(self._images, rows),
                    "_labels": None if self._labels is None else self._labels[rows],
                }
                for rows in (np.sort(order[num:]), np.sort(order[:num]))
            ]
        rest, aside = (
            dataclasses.replace(self, num_examples=size, **part)
            for size, part in zip((total - num, num), parts)
        )
        return rest, aside

    def batches(
        self,
        batch_size: int = 64,
        *,
        shuffle: bool = True,
        seed: int = 0,
        flip: bool = False,
        drop_remainder: bool | None = None,
        from_step: int | Callable[[], int] | None = None,
    ) -> tf.data.Dataset:
        """Make a ``tf.data.Dataset`` of batches ``(x, label)``, or ``x`` without labels.

        Iterating it once gives one epoch, and the next time another order. With ``from_step`` it
        has no end, and begins with batch number ``from_step`` of the run: what a run that stopped
        there needs, together with ``fit(..., steps_per_epoch=...)``. (A streamed set has to be read
        up to there.)

            data = tfd.data.read("digits")
            model.fit(data.batches(32, seed=1), epochs=10)
            resumed.fit(data.batches(32, seed=1, from_step=560), steps_per_epoch=56)

        Args:
            batch_size: Examples per batch.
            shuffle: Shuffle the whole set in each epoch; a stream through a buffer of 16,384
                examples. False keeps the stored order.
            seed: Decides every order and every flip.
            flip: Mirror each image left to right with probability 1/2.
            drop_remainder: Leave out the last, smaller batch. By default so when shuffling (each
                epoch leaves out others), unless there is less than one batch.
            from_step: Step of the run, from 0, at which an endless dataset begins; None for epochs.
                A function is asked for it whenever an epoch begins, and the dataset is again one of
                single epochs, each in the order that belongs to it:
                ``from_step=lambda: model.steps_done`` suits Keras' ``BackupAndRestore``, which
                brings the model back only inside ``fit``.

        Returns:
            Batches: x float32 (B, H, W, C) in [-1, 1], label int32 (B,).

        Raises:
            ValueError: If an argument is out of range.
            ImportError: If TensorFlow is not installed.
        """
        batch_size = _checks.integer("batch_size", batch_size)
        if flip and len(self.shape) != 3:
            raise ValueError(
                f"flip needs images; {self.name!r} has examples of shape {self.shape}."
            )
        _checks.seed(seed)
        if from_step is not None and not callable(from_step):
            _checks.integer("from_step", from_step, 0, _checks.SEEDS[1])
        if drop_remainder and self.num_examples < batch_size:
            raise ValueError(
                f"drop_remainder leaves no batch: batch_size={batch_size}, and {self.name!r} has "
                f"{self.num_examples} examples. Pass a smaller batch_size."
            )
        tf = import_tensorflow()
        drop = shuffle and self.num_examples >= batch_size
        drop = drop if drop_remainder is None else drop_remainder
        steps = self.num_examples // batch_size if drop else -(-self.num_examples // batch_size)
        order, fetch = self._indexed_pipeline() if self._stream is None else self._stream_pipeline()

        def one_epoch(epoch):
            order_seed, flip_seed = tf.unstack(tf.random.split([seed, epoch], 2))
            batches = order(order_seed if shuffle else None).batch(batch_size, drop)
            return batches.enumerate().map(
                lambda step, batch: (tf.random.fold_in(flip_seed, step), batch)
            )

        def finish(flip_seed, batch):
            x, label = fetch(batch)
            if flip:
                mirrored = tf.random.stateless_uniform(tf.shape(x)[:1], flip_seed) < 0.5
                x = tf.where(mirrored[:, None, None, None], x[:, :, ::-1], x)
            if x.dtype == tf.uint8:
                x = tf.cast(x, tf.float32) / 127.5 - 1.0
            return x if self.class_names is None else (x, label)

        endless = not (from_step is None or callable(from_step))
        if not endless:
            iteration = itertools.count()
            number = (
                (lambda: next(iteration)) if from_step is None else lambda: from_step() // steps
            )
            epochs = tf.data.Dataset.from_generator(
                lambda: iter([number()]), output_signature=tf.TensorSpec((), tf.int64)
            )
            dataset = epochs.flat_map(one_epoch)
        else:
            epochs = tf.data.Dataset.range(from_step // steps, np.iinfo(np.int64).max)
            dataset = epochs.flat_map(one_epoch).skip(from_step % steps)
        dataset = dataset.map(finish, num_parallel_calls=tf.data.AUTOTUNE)
        length = tf.data.INFINITE_CARDINALITY if endless else steps
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(length))
        options = tf.data.Options()
        policy = tf.data.experimental.AutoShardPolicy.DATA  # there are no files to share out
        options.experimental_distribute.auto_shard_policy = policy
        return dataset.with_options(options).prefetch(tf.data.AUTOTUNE)

    def _indexed_pipeline(self):
        """How to order an epoch of positions, and how to fetch a batch of them."""
        tf = import_tensorflow()
        with tf.device("CPU"):
            labels = None if self._labels is None else tf.constant(self._labels)
            images = self._images
            if isinstance(images, np.ndarray):
                images = tf.constant(images)

        def order(seed):
            positions = tf.range(self.num_examples, dtype=tf.int64)
            if seed is not None:
                positions = tf.random.experimental.stateless_shuffle(positions, seed)
            return tf.data.Dataset.from_tensor_slices(positions)

        def fetch(positions):
            if isinstance(images, tf.Tensor):
                x = tf.gather(images, positions)
            else:
                x = tf.numpy_function(images.__getitem__, [positions], tf.uint8)
                x = tf.ensure_shape(x, (*positions.shape, *self.shape))
            return x, None if labels is None else tf.gather(labels, positions)

        return order, fetch

    def _stream_pipeline(self):
        """How to order an epoch of a stream of (image, label), whose batches need no fetching."""
        tf = import_tensorflow()
        buffer = min(
            self.num_examples, SHUFFLE_BUFFER, MEMORY_LIMIT // int(np.prod(self.shape)) + 1
        )

        def order(seed):
            if seed is None:
                return self._stream
            seed = tf.random.stateless_uniform((), seed, None, None, tf.int64)
            # A global seed of 0 makes TensorFlow compare this one with 0, which no tensor in a
            # graph can answer. One set here counts in this graph alone.
            if not tf.executing_eagerly():
                tf.random.set_seed(1)
            return self._stream.shuffle(buffer, seed, reshuffle_each_iteration=False)

        return order, lambda batch: batch


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some of the images of something that decodes them when indexed."""

    images: Indexed
    rows: np.ndarray

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return self.images[self.rows[indices]]


def rows_of(images: np.ndarray | Indexed, rows: np.ndarray) -> np.ndarray | Rows:
    """Images at some positions."""
    return images[rows] if isinstance(images, np.ndarray) else Rows(images, rows)


def gather_stream(
    stream: tf.data.Dataset, num: int, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Put a stream of ``num`` pairs into arrays: images uint8 (num, *shape), labels int32."""
    images, labels = np.empty((num, *shape), np.uint8), np.empty(num, np.int32)
    done = 0
    for image, label in stream.batch(256).as_numpy_iterator():
        images[done : done + len(image)], labels[done : done + len(image)] = image, label
        done += len(image)
    return images[:done], labels[:done]
