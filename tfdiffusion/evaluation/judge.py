"""A classifier that judges samples: are they clear, of the class asked for, and like the data?

Train it on real labelled images that the generator may have seen too; it must only be another
network. Its last hidden layer gives the features in which `frechet_distance` is taken, "the judge's
Fréchet distance". That is not FID, and two judges give two numbers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import keras
import numpy as np

from tfdiffusion import _checks
from tfdiffusion.evaluation.frechet import frechet_distance

_FEATURES = "features"


def build_judge(shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """A small convolutional classifier with a feature layer of 128.

    Args:
        shape: (H, W, C) of images in [−1, 1].
        num_classes: how many.

    Returns:
        A compiled Keras model, images → class probabilities.

    Raises:
        ValueError: If the shape is not that of an image, or the number no integer >= 1.
    """
    shape, num_classes = _checks.shape(shape), _checks.integer("num_classes", num_classes)
    if len(shape) != 3:
        raise ValueError(f"Expected the shape of an image, (H, W, C). Received {shape}.")
    layers = keras.layers
    model = keras.Sequential([keras.Input(shape)], name="judge")
    for width, last in ((32, False), (64, False), (128, True)):
        model.add(layers.Conv2D(width, 3, padding="same", use_bias=False))
        model.add(layers.BatchNormalization(momentum=0.9))
        model.add(layers.ReLU())
        if not last:
            model.add(layers.MaxPooling2D(padding="same"))
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(128, activation="relu", name=_FEATURES))
    model.add(layers.Dropout(0.3))
    model.add(layers.Dense(num_classes, activation="softmax", dtype="float32"))
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def train_judge(
    images,
    labels,
    *,
    epochs: int = 4,
    batch_size: int = 128,
    validation_data: tuple | None = None,
    seed: int = 0,
    verbose: int | str = 0,
) -> keras.Model:
    """Trains a judge.

    Args:
        images: float (N, H, W, C) in [−1, 1].
        labels: int (N,).
        epochs: passes over the images; the learning rate falls to zero over them.
        batch_size: images a step.
        validation_data: (images, labels) held out, to watch.
        seed: of the weights and the order.
        verbose: as in Keras' `fit`.

    Returns:
        The trained classifier; save it like any Keras model.

    Raises:
        ValueError: If images or labels are not as described, or a number is out of range.
    """
    images = _images(images)
    labels = _labels("labels", labels, len(images))
    _checks.integer("epochs", epochs)
    _checks.integer("batch_size", batch_size)
    keras.utils.set_random_seed(_checks.integer("seed", seed, 0, 2**32 - 1))
    judge = build_judge(images.shape[1:], int(labels.max()) + 1)
    steps = epochs * -(-len(images) // batch_size)
    judge.optimizer.learning_rate = keras.optimizers.schedules.CosineDecay(2e-3, steps)
    judge.fit(
        images,
        labels,
        batch_size=batch_size,
        epochs=epochs,
        validation_data=validation_data,
        verbose=verbose,
    )
    return judge


def features(judge: keras.Model, images, batch_size: int = 256) -> np.ndarray:
    """What the judge sees in images: float32 (N, 128).

    Raises:
        TypeError: If the judge is none.
        ValueError: If the images are not those that it takes, or the batch size is none.
    """
    return _look(judge, images, batch_size)[0]


def _images(images) -> np.ndarray:
    """Finite float32 (N, H, W, C), N > 0."""
    images = _checks.array("images", images, "floats (N, H, W, C) in [-1, 1]", kinds="f", rank=4)
    if not images.size:
        raise ValueError(f"images must be at least one. Received shape {images.shape}.")
    _checks.moderate("images", images)
    return images.astype(np.float32, copy=False)


def _labels(name: str, labels, num: int) -> np.ndarray:
    """Integers >= 0 (N,)."""
    labels = _checks.array(name, labels, f"{num} integers >= 0", kinds="iu")
    if labels.shape != (num,) or labels.min() < 0:
        raise ValueError(
            f"{name} must be one a sample: shape ({num},), from 0 on. Received {labels.shape}."
        )
    return labels


def _look(judge: keras.Model, images, batch_size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 128) and class probabilities (N, num_classes), in one pass."""
    if not isinstance(judge, keras.Model) or _FEATURES not in [
        layer.name for layer in judge.layers
    ]:
        raise TypeError(
            f"judge must be a Keras model with a layer {_FEATURES!r}, as train_judge gives it. "
            f"Received {_checks.shown(judge)}."
        )
    images, takes = _images(images), tuple(judge.inputs[0].shape[1:])
    if any(wants not in (None, has) for wants, has in zip(takes, images.shape[1:])):
        raise ValueError(f"The judge takes images of {takes}. Received {images.shape[1:]}.")
    _checks.integer("batch_size", batch_size)
    both = keras.Model(judge.inputs, [judge.get_layer(_FEATURES).output, judge.outputs[0]])
    return tuple(both.predict(images, batch_size=batch_size, verbose=0))


@dataclass(frozen=True)
class Verdict:
    """What a judge says of samples.

    Attributes:
        num_samples: how many there were.
        confidence: mean probability of the class that the judge finds likeliest.
        accuracy: share in which it finds the class asked for; None if none was.
        class_shares: share of each class among the samples.
        frechet_distance: in the judge's features, to `num_references` references; None without.
        num_references: how many references.
    """

    num_samples: int
    confidence: float
    accuracy: float | None
    class_shares: tuple[float, ...]
    frechet_distance: float | None
    num_references: int

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def judge_samples(judge: keras.Model, samples, labels=None, references=None) -> Verdict:
    """Judges samples.

    Args:
        judge: of `train_judge`, or any classifier with a layer named "features".
        samples: float (N, H, W, C) in [−1, 1].
        labels: int (N,), the classes that were asked for.
        references: real images, held out from the generator's training, for the Fréchet distance.

    Returns:
        A `Verdict`.

    Raises:
        TypeError: If the judge is none.
        ValueError: If the labels are not one a sample, or images not those that the judge takes.
    """
    samples = _images(samples)
    labels = None if labels is None else _labels("labels", labels, len(samples))
    seen, probabilities = _look(judge, samples)
    found = probabilities.argmax(axis=-1)
    distance, count = None, 0
    if references is not None:
        distance = frechet_distance(seen, features(judge, references))
        count = len(references)
    return Verdict(
        num_samples=len(samples),
        confidence=float(probabilities.max(axis=-1).mean()),
        accuracy=None if labels is None else float(np.mean(found == labels)),
        class_shares=tuple(
            (np.bincount(found, minlength=probabilities.shape[-1]) / len(samples)).tolist()
        ),
        frechet_distance=distance,
        num_references=count,
    )
