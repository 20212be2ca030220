"""Sets of TensorFlow Datasets: any with an image, prepared already or to be downloaded."""

from __future__ import annotations

import difflib
import os
from typing import Any

import numpy as np

from tfdiffusion.data.examples import (
    Examples,
    fits_in_memory,
    gather_stream,
    import_tensorflow,
)
from tfdiffusion.data.pixels import decode, square

# Named in messages; every other image set of the catalogue works too.
POPULAR = ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn_cropped", "celeb_a", "stl10")


def is_known(name: str) -> bool:
    """Say whether a name is in the catalogue of TensorFlow Datasets (False if not installed)."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        return False
    return _base(name) in tfds.list_builders()


def read_tfds(
    name: str,
    split: str,
    image_size: int | None,
    channels: int | None,
    labels: bool,
    data_dir: str | os.PathLike | None,
    cache: bool,
    embedded: tuple[str, ...],
) -> Examples:
    """Read a set; see :func:`tfdiffusion.data.read`. ``embedded`` are the other known names."""
    builder = _builder(name, data_dir, embedded)
    image_key, label_key = _features(builder)
    feature = builder.info.features[image_key]
    height, width, depth = feature.shape
    if image_size is None and None in (height, width):
        raise ValueError(
            f"The images of {name!r} differ in size. Pass image_size to crop and resize."
        )
    if channels is None:
        channels = 1 if depth == 1 else 3
    shape = (image_size or height, image_size or width, channels)
    _prepare(builder)
    try:
        num = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as error:
        known = ", ".join(map(repr, builder.info.splits))
        raise ValueError(
            f"{name!r} has no split {split!r}. Splits: {known}, or a part such as 'train[:1000]'."
        ) from error
    if num == 0:
        raise ValueError(f"Split {split!r} of {name!r} has no examples.")

    stream = _stream(builder, split, image_key, label_key if labels else None, shape, image_size)
    class_names = None
    if labels and label_key is not None:
        class_names = tuple(builder.info.features[label_key].names)
    if not (cache and fits_in_memory(num, shape)):
        return Examples(name, num, shape, class_names, _stream=stream)
    images, label = gather_stream(stream, num, shape)
    if class_names is not None and label.min() < 0:
        raise ValueError(f"Split {split!r} of {name!r} is not labelled. Pass labels=False.")
    return Examples(name, num, shape, class_names, (), images, label if class_names else None)


def _base(name: str) -> str:
    return name.split("/")[0].split(":")[0]


def _builder(name: str, data_dir: str | os.PathLike | None, embedded: tuple[str, ...]) -> Any:
    import_tensorflow()
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"{name!r} is neither a folder nor one of {', '.join(embedded)}; sets such as 'mnist' "
            f"need pip install tensorflow-datasets importlib_resources ({error})."
        ) from error
    known = tfds.list_builders()
    try:
        return tfds.builder(name, data_dir=None if data_dir is None else os.fspath(data_dir))
    except ValueError as error:
        if _base(name) in known:
            raise  # a wrong configuration or version; the message lists the right ones
        near = difflib.get_close_matches(name, [*embedded, *known], n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"Unknown data set {name!r}: neither a folder nor a known name.{hint} Known: "
            f"{', '.join(embedded)}; of TensorFlow Datasets {', '.join(POPULAR)} and the other "
            f"image sets among its {len(known)}."
        ) from error


def _features(builder: Any) -> tuple[str, str | None]:
    """Return the keys of the image and of the class label, if there is one."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    images = [k for k, f in features.items() if type(f) is tfds.features.Image]
    labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    if not images:
        raise ValueError(f"{builder.name!r} is not an image set; it has {', '.join(features)}.")
    label = "label" if "label" in labels else labels[0] if len(labels) == 1 else None
    return ("image" if "image" in images else images[0]), label


def _prepare(builder: Any) -> None:
    """Download and prepare a set, unless it is on disk."""
    if builder.is_prepared():
        return
    try:
        builder.download_and_prepare()
    except (
        Exception
    ) as error:  # network, disk space, permissions, manual downloads, missing packages
        folder = os.path.dirname(os.path.dirname(builder.data_dir))
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise RuntimeError(
            f"TensorFlow Datasets could not prepare {builder.name!r} in {folder!r} ({reason}). Run "
            f"`tfds build {builder.name} --data_dir DIR` with a network, then pass data_dir=DIR."
        ) from error


def _stream(
    builder: Any,
    split: str,
    image_key: str,
    label_key: str | None,
    shape: tuple[int, int, int],
    image_size: int | None,
) -> Any:
    """Stream (image uint8 of a shape, label int32) as stored; label 0 if there is none."""
    import tensorflow_datasets as tfds
    from PIL import Image

    tf = import_tensorflow()
    feature = builder.info.features[image_key]
    as_is = feature.shape == shape and np.dtype(feature.np_dtype) == np.uint8

    def convert(image: np.ndarray) -> np.ndarray:
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        return square(decode(image, shape[-1]), image_size)

    def element(example):
        image = example[image_key]
        if not as_is:
            image = tf.ensure_shape(tf.numpy_function(convert, [image], tf.uint8), shape)
        label = tf.cast(example[label_key], tf.int32) if label_key else tf.constant(0)
        return image, label

    wanted = {key: True for key in (image_key, label_key) if key}
    partial = len(wanted) < len(builder.info.features)
    dataset = builder.as_dataset(
        split=split,
        decoders=tfds.decode.PartialDecoding(wanted) if partial else None,
        read_config=tfds.ReadConfig(try_autocache=False),
        shuffle_files=False,
    )
    return dataset.map(element, num_parallel_calls=tf.data.AUTOTUNE)
