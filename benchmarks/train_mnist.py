"""Trains a model of MNIST for as long as one has time: those that ship, and one for likelihood.

    python benchmarks/train_mnist.py mnist --minutes 90 --out runs/mnist
    python benchmarks/train_mnist.py mnist_ncsn --minutes 120 --out runs/mnist_ncsn
    python benchmarks/train_mnist.py mnist_vdm --minutes 60 --out runs/mnist_vdm

The model is saved every few minutes with its optimizer; run the same command again with --resume to
go on for what is left of the time. The learning rate rises and then falls along a cosine of the
time spent, so the end comes with a small one however fast the machine is. What is left in the end
are the averaged weights, in float32: NAME.keras in the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import keras
import numpy as np

import tfdiffusion as tfd
from tfdiffusion import checkpoints, likelihood, score_matching, variational

WARM_UP_STEPS = 100


class Clock(keras.callbacks.Callback):
    """Learning rate by the time spent, saving as it goes, and the end when time is up."""

    def __init__(self, folder: Path, seconds: float, rate: float, spent: float, every: float):
        super().__init__()
        self.folder, self.seconds, self.rate, self.every = folder, seconds, rate, every
        self.before, self.losses = spent, []

    @property
    def spent(self) -> float:
        return self.before + time.monotonic() - self.started

    def on_train_begin(self, logs=None):
        self.started = self.saved = time.monotonic()

    def on_train_batch_begin(self, batch, logs=None):
        step = int(self.model.optimizer.iterations)
        share = min(self.spent / self.seconds, 1.0)
        warm_up = min((step + 1) / WARM_UP_STEPS, 1.0)
        self.model.optimizer.learning_rate = self.rate * warm_up * math.cos(0.5 * math.pi * share)

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(float(logs["loss"]))
        if time.monotonic() - self.saved > self.every:
            self.save()
            self.model.reset_metrics()  # the loss shown is that since the last save
        if self.spent >= self.seconds:
            self.model.stop_training = True

    def save(self):
        step = int(self.model.optimizer.iterations)
        checkpoints.save(self.model, self.folder / "model.keras")
        record = {"steps": step, "seconds": round(self.spent, 1), "loss": self.losses[-1]}
        (self.folder / "progress.json").write_text(json.dumps(record) + "\n")
        print(f"step {step}, {self.spent:.0f} s, loss {self.losses[-1]:.4f}", flush=True)
        self.saved = time.monotonic()


def unet(precision: str, num_classes: int | None = None) -> tfd.networks.UNet:
    return tfd.networks.UNet(
        out_channels=1,
        widths=(64, 112),
        blocks_per_level=(2, 1),
        groups=8,
        num_classes=num_classes,
        attention_levels=(),
        time_width=256,
        patch_size=2,
        dtype=precision,
    )


def diffusion(examples, precision: str):
    """Cosine process, v prediction, labels to guide with."""
    network = unet(precision, examples.num_classes)
    return tfd.DiffusionModel(network, "cosine", "v", times="stratified")


def score(examples, precision: str):
    """NCSNv2 on the ladder that the paper's techniques give for these images."""
    sigmas = score_matching.from_data(examples.arrays(10_000)[0], sigma_min=0.02)
    network = score_matching.NCSNv2(sigmas, width=32, patch_size=2, dtype=precision)
    return score_matching.ScoreModel(network, sigmas)


def vdm(examples, precision: str):
    """A variational diffusion model, whose finest noise is 0.3 of a pixel's bin.

    With octaves down to the finest, at each noise level one of them is as fine as the noise: how
    far a pixel is from black can be read off there.
    """
    pixels = likelihood.Pixels(256)
    network = variational.WithFourierFeatures(unet(precision), range(1, 9))
    return variational.VariationalDiffusionModel(
        network, gamma_min=2.0 * math.log(0.3 * pixels.width), levels=pixels.levels
    )


MAKE = {"mnist": diffusion, "mnist_ncsn": score, "mnist_vdm": vdm}


def begin(args, examples):
    """A compiled model, with the weights of another if one is given."""
    keras.utils.set_random_seed(1 if args.start else 0)
    model = MAKE[args.name](examples, args.precision)
    model.build((None, *examples.shape))
    if args.start:
        model.network.set_weights(tfd.models.load(args.start).network.get_weights())
    clip = 1.0 if args.name == "mnist_vdm" else None  # the bound of few noise levels is rough
    model.compile(keras.optimizers.Adam(args.learning_rate, clipnorm=clip))
    print(f"{model.network.count_params():,} weights", flush=True)
    return model


def shipped(args, examples, model):
    """The averaged weights alone, in float32: what goes into the package."""
    copy = MAKE[args.name](examples, "float32")
    copy.build((None, *examples.shape))
    copy = copy.averaged()
    for theirs, mine in zip(model.averaged().variables, copy.variables):
        mine.assign(theirs)
    return copy


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=sorted(MAKE))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data-dir", help="where TensorFlow Datasets keeps its sets")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--save-every", type=float, default=240.0, help="seconds")
    parser.add_argument("--precision", default="mixed_bfloat16")
    parser.add_argument("--start", help="begin with this model's weights, e.g. mnist")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    examples = tfd.data.read("mnist", data_dir=args.data_dir, labels=args.name == "mnist")
    spent = 0.0
    if args.resume:
        model = keras.saving.load_model(args.out / "model.keras")
        spent = json.loads((args.out / "progress.json").read_text())["seconds"]
    else:
        model = begin(args, examples)
    first = int(model.step_count)
    batches = examples.batches(args.batch_size, seed=int(bool(args.start)), from_step=first)
    clock = Clock(args.out, 60 * args.minutes, args.learning_rate, spent, args.save_every)
    model.fit(batches, steps_per_epoch=1_000_000, epochs=1, verbose=0, callbacks=[clock])
    clock.save()
    np.save(args.out / f"losses_{first}.npy", np.array(clock.losses))
    checkpoints.save(shipped(args, examples, model), args.out / f"{args.name}.keras")
    seen = int(model.step_count) * args.batch_size
    print(f"{seen:,} images seen, {clock.spent / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
