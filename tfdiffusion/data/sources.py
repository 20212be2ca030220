"""Where data come from: the names, folders and arrays that ``read`` and ``load`` take."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tfdiffusion import _checks
from tfdiffusion.data.examples import Examples
from tfdiffusion.data.folders import read_folder
from tfdiffusion.data.pixels import check_finite, convert_channels, square
from tfdiffusion.data.tfds import is_known, read_tfds
from tfdiffusion.data.toys import TOYS

if TYPE_CHECKING:
    import tensorflow as tf

EMBEDDED = ("digits", *TOYS)
TOY_POINTS = 10_000
MOST_CLASSES = 1_000_000  # each has a name


def load(
    source: Any,
    *,
    split: str = "train",
    image_size: int | None = None,
    labels: bool | None = None,
    data_dir: str | os.PathLike | None = None,
    strict: bool = False,
    batch_size: int = 64,
    shuffle: bool = True,
    seed: int = 0,
    flip: bool = False,
) -> tf.data.Dataset:
    """Read a data set and batch it: :func:`read` and :meth:`Examples.batches` in one call.

        model.fit(tfd.data.load("digits", batch_size=32), epochs=10)

    Args:
        source: A name, a folder or arrays; see :func:`read`.
        split: Split of a TensorFlow Datasets set, such as "train", "test" or "train[:1000]".
        image_size: Centre crop to a square and resize to this side; None keeps the size.
        labels: None gives labels if there are any, True requires them, False leaves them out.
        data_dir: Where TensorFlow Datasets keeps its sets.
        strict: Stop at unusable images of a folder instead of skipping them.
        batch_size: Examples per batch; a last, smaller batch is dropped when shuffling.
        shuffle: Shuffle in each epoch.
        seed: Decides every order and every flip.
        flip: Mirror each image left to right with probability 1/2.

    Returns:
        A dataset of one epoch, in a new order each time it is iterated, of ``(x, label)``, or ``x``
        without labels: x float32 (B, H, W, C) in [-1, 1], label int32 (B,).

    Raises:
        ValueError, RuntimeError, ImportError: As :func:`read` and :meth:`Examples.batches` do.
    """
    examples = read(
        source, split=split, image_size=image_size, labels=labels, data_dir=data_dir, strict=strict
    )
    return examples.batches(batch_size, shuffle=shuffle, seed=seed, flip=flip)


def read(
    source: Any,
    *,
    split: str = "train",
    image_size: int | None = None,
    channels: int | None = None,
    labels: bool | None = None,
    data_dir: str | os.PathLike | None = None,
    strict: bool = False,
    cache: bool = True,
) -> Examples:
    """Find a data set, and check it.

    Args:
        source: One of

            - "digits": 1,797 handwritten digits of 8×8 pixels (part of scikit-learn, no download);
            - a toy of :func:`toy`, such as "swiss_roll": 10,000 points;
            - a set of TensorFlow Datasets with images, such as "mnist", "fashion_mnist" or
              "cifar10". It is downloaded if it is not in ``data_dir``;
            - a folder of PNG, JPEG, WebP, BMP and GIF (first frame) files, at any depth; ``./name``
              if there is a set of that name. Sub-folders are classes, in alphabetical order. EXIF
              orientation is honoured, and transparent pixels become white. Images that cannot be
              decoded, or differ in size from nearly all others while ``image_size`` is None, are
              named in a warning and skipped;
            - an array (N, H, W) or (N, H, W, C), uint8 in 0..255 or float in [-1, 1], an array of
              points (N, D), or a tuple of such an array and integer labels (N,).
        split: Split of a TensorFlow Datasets set, such as "train", "test" or "train[:1000]". Other
            sources have only "train".
        image_size: Centre crop to a square and resize (Lanczos, antialiased) to this side; None
            keeps the size.
        channels: 1 for grey, 3 for colour; None keeps what there is. A folder is grey if all its
            images are.
        labels: None gives labels if there are any, True requires them, False leaves them out.
        data_dir: Where TensorFlow Datasets keeps its sets; None is its own default.
        strict: Raise for unusable images of a folder instead of skipping them.
        cache: Keep decoded images in memory if that takes at most 1 GiB. They are decoded whenever
            needed otherwise.

    Returns:
        The examples: their number, shape, class names and skipped files.

    Raises:
        ValueError: If the source is unknown, empty or unusable, or an argument is out of range.
        RuntimeError: If a TensorFlow Datasets set cannot be downloaded or prepared.
        ImportError: If a package that the source needs is not installed.
    """
    image_size = None if image_size is None else _checks.integer("image_size", image_size)
    if channels is not None and not (_checks.is_integer(channels) and channels in (1, 3)):
        raise ValueError(
            "channels must be 1 (grey), 3 (colour) or None (as stored), got "
            f"{_checks.shown(channels)}."
        )
    if not isinstance(split, str):
        raise ValueError(f"split must be a name such as 'train', got {_checks.shown(split)}.")
    if data_dir is not None:
        _checks.path("data_dir", data_dir)
    kind = _kind(source)
    if kind != "tfds" and split != "train":
        raise ValueError(f"There is no split {split!r}: this source ({kind}) has only 'train'.")
    with_labels = labels is not False
    if kind == "tfds":
        data = read_tfds(
            source, split, image_size, channels, with_labels, data_dir, cache, EMBEDDED
        )
    elif kind == "folder":
        root = Path(source).expanduser()
        data = read_folder(root, image_size, channels, with_labels, strict, cache)
    elif kind == "digits":
        data = _read_arrays("digits", *_digits(), image_size, channels)
    elif kind == "toy":
        points = TOYS[source](np.random.default_rng(0), TOY_POINTS)
        data = _read_arrays(source, *points, image_size, channels)
    else:
        images, label = source if isinstance(source, tuple) and len(source) == 2 else (source, None)
        data = _read_arrays("arrays", images, label, image_size, channels)
    if labels and data.class_names is None:
        raise ValueError(
            f"{data.name!r} has no labels to be conditional on. Do without, or use a source that "
            "has them: a folder needs one sub-folder per class."
        )
    return data if with_labels else dataclasses.replace(data, class_names=None, _labels=None)


def has_splits(source: Any) -> bool:
    """Tell whether a source is a set of TensorFlow Datasets, which has splits such as "test"."""
    return _kind(source) == "tfds"


def _kind(source: Any) -> str:
    """Tell what a source is: arrays, folder, digits, toy or tfds."""
    if isinstance(source, os.PathLike):
        return "folder"
    if not isinstance(source, str):
        return "arrays"
    if source in EMBEDDED:
        return "digits" if source == "digits" else "toy"
    path = Path(source).expanduser()
    if source.startswith((".", "~")) or path.is_absolute():
        return "folder"
    if path.is_dir() and (len(path.parts) > 1 or not is_known(source)):
        return "folder"
    return "tfds"


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's handwritten digits, whose values are 0..16, as uint8 with labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The digits are part of scikit-learn: pip install scikit-learn."
        ) from error
    images, label = load_digits().images, load_digits().target
    return np.rint(images * (255 / 16)).astype(np.uint8), label


def _read_arrays(
    name: str, images: Any, label: Any, image_size: int | None, channels: int | None
) -> Examples:
    images = _check_images(_array("images", images))
    if images.ndim == 2 and (image_size or channels):
        raise ValueError(f"image_size and channels are for images; {name!r} has points (N, D).")
    if images.ndim == 4:
        images = convert_channels(images, channels)
    if image_size is not None and images.shape[1:3] != (image_size, image_size):
        images = np.stack([square(image, image_size) for image in images])
        if images.dtype != np.uint8:
            images = np.clip(images, -1, 1)  # Lanczos overshoots at edges
    class_names = None
    if label is not None:
        label = _check_labels(_array("labels", label), len(images))
        class_names = tuple(str(i) for i in range(label.max() + 1))
    return Examples(name, len(images), images.shape[1:], class_names, (), images, label)


def _array(name: str, values: Any) -> np.ndarray:
    """Return an array, of whatever dtype and shape."""
    try:
        return np.asarray(values)
    except ValueError as error:  # ragged
        raise ValueError(
            f"Expected {name} as one array, all of one shape; got {_checks.shown(values)}."
        ) from error


def _check_images(images: np.ndarray) -> np.ndarray:
    """Return images as uint8 or float32 (N, H, W, C), or points as float32 (N, D)."""
    if images.ndim not in (2, 3, 4) or 0 in images.shape:
        raise ValueError(
            "Expected images (N, H, W) or (N, H, W, C), or points (N, D), and at least one; got an "
            f"array of shape {images.shape}."
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype == np.uint8 and images.ndim == 4:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            "Expected uint8 images in 0..255, or floats (images in [-1, 1], or points); got "
            f"{images.dtype}. If they are images in 0..255, pass images.astype('uint8')."
        )
    check_finite(images, "examples")
    if images.ndim == 2:
        _checks.moderate("points", images)
        return images.astype(np.float32)
    images = images.astype(np.float32)
    low, high = float(images.min()), float(images.max())
    if low < -1.001 or high > 1.001:  # room for the rounding of whoever scaled them
        raise ValueError(
            f"Float images must lie in [-1, 1], found [{low:g}, {high:g}]. If they are in 0..255, "
            "pass uint8, or divide by 127.5 and subtract 1."
        )
    if low >= 0:
        warnings.warn(
            f"Float images should span [-1, 1], found [{low:g}, {high:g}]. If they are in [0, 1], "
            "pass 2 * images - 1.",
            stacklevel=4,
        )
    return np.clip(images, -1, 1)


def _check_labels(label: np.ndarray, num: int) -> np.ndarray:
    """Return labels as int32 (N,)."""
    label = label[:, 0] if label.shape == (num, 1) else label
    if label.shape != (num,):
        raise ValueError(f"Expected one label per example, shape ({num},), got {label.shape}.")
    if not np.issubdtype(label.dtype, np.integer):
        raise ValueError(f"Labels must be integers, got {label.dtype}.")
    if label.max() >= MOST_CLASSES:
        raise ValueError(
            f"Labels must be numbers of classes, fewer than {MOST_CLASSES:,}, got {label.max()} at "
            f"index {label.argmax()}."
        )
    if label.min() < 0:
        raise ValueError(f"Labels must be at least 0, got {label.min()} at index {label.argmin()}.")
    return label.astype(np.int32)
