"""Trains the score network on MNIST that ships with the package, for as long as one has time.

    python benchmarks/train_mnist_ncsn.py --minutes 50 --out runs/mnist_ncsn

The model is saved every few minutes with its optimizer; run the same command again with --resume to
go on for what is left of the time. The learning rate rises and then falls along a cosine of the
time spent, so the end comes with a small one however fast the machine is.
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
from tfdiffusion import checkpoints, score_matching

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
        if self.spent >= self.seconds:
            self.model.stop_training = True

    def save(self):
        step = int(self.model.optimizer.iterations)
        checkpoints.save(self.model, self.folder / "model.keras")
        record = {"steps": step, "seconds": round(self.spent, 1), "loss": self.losses[-1]}
        (self.folder / "progress.json").write_text(json.dumps(record) + "\n")
        print(f"step {step}, {self.spent:.0f} s, loss {self.losses[-1]:.2f}", flush=True)
        self.saved = time.monotonic()


def shipped(model: score_matching.ScoreModel) -> score_matching.ScoreModel:
    """The averaged weights alone, in float32: what goes into the package."""
    averaged = model.averaged()
    config = {**averaged.network.get_config(), "dtype": "float32"}
    network = score_matching.NCSNv2.from_config(config)
    copy = score_matching.ScoreModel(network, model.sigmas, ema_decay=None)
    copy.build((None, *model.sample_shape))
    copy.network.set_weights(averaged.network.get_weights())
    return copy


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mnist_ncsn"))
    parser.add_argument("--data-dir", help="where TensorFlow Datasets keeps its sets")
    parser.add_argument("--minutes", type=float, default=50.0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=2)
    parser.add_argument("--save-every", type=float, default=240.0, help="seconds")
    parser.add_argument("--precision", default="mixed_bfloat16")
    parser.add_argument("--start", help="begin with this model's weights, e.g. mnist_ncsn")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    examples = tfd.data.read("mnist", data_dir=args.data_dir, labels=False)
    spent = 0.0
    if args.resume:
        model = keras.saving.load_model(args.out / "model.keras")
        spent = json.loads((args.out / "progress.json").read_text())["seconds"]
    elif args.start:
        keras.utils.set_random_seed(1)
        known = tfd.models.load(args.start)
        config = {**known.network.get_config(), "dtype": args.precision}
        model = score_matching.ScoreModel(score_matching.NCSNv2.from_config(config), known.sigmas)
        model.build((None, *known.sample_shape))
        model.network.set_weights(known.network.get_weights())
        model.compile(keras.optimizers.Adam(args.learning_rate))
    else:
        keras.utils.set_random_seed(0)
        images = examples.arrays(10_000)[0]
        sigmas = score_matching.from_data(images, sigma_min=0.02)
        network = score_matching.NCSNv2(
            sigmas, width=args.width, patch_size=args.patch_size, dtype=args.precision
        )
        model = score_matching.ScoreModel(network, sigmas)
        model.build((None, *examples.shape))
        model.compile(keras.optimizers.Adam(args.learning_rate))
        print(
            f"{len(sigmas)} levels from {sigmas[0]:.2f} to {sigmas[-1]:.2f}, "
            f"{network.count_params():,} weights",
            flush=True,
        )
    first = int(model.step_count)
    batches = examples.batches(args.batch_size, from_step=first)
    clock = Clock(args.out, 60 * args.minutes, args.learning_rate, spent, args.save_every)
    model.fit(batches, steps_per_epoch=1_000_000, epochs=1, verbose=0, callbacks=[clock])
    clock.save()
    np.save(args.out / f"losses_{first}.npy", np.array(clock.losses))
    checkpoints.save(shipped(model), args.out / "mnist_ncsn.keras")
    seen = int(model.step_count) * args.batch_size
    print(f"{seen:,} images seen, {clock.spent / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
