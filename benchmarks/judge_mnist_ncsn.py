"""Judges the shipped score model's digits beside the shipped diffusion model's.

    python benchmarks/judge_mnist_ncsn.py --judge judge.keras --num 256

`judge.keras` is what `tfdiffusion.evaluation.train_judge` made from MNIST's training images. The
diffusion model draws each class equally often, as it is told to; the score model knows no classes.
"""

from __future__ import annotations

import argparse
import time

import keras
import numpy as np

import tfdiffusion as tfd
from tfdiffusion import evaluation
from tfdiffusion.denoiser import Clipped


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--judge", required=True)
    parser.add_argument("--model", default="mnist_ncsn", help="a score model")
    parser.add_argument("--data-dir", help="where TensorFlow Datasets keeps its sets")
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--steps-per-level", type=int, nargs="+", default=[5])
    parser.add_argument("--skip-diffusion", action="store_true")
    args = parser.parse_args()
    judge = keras.saving.load_model(args.judge)
    train, _ = tfd.data.read("mnist", data_dir=args.data_dir).arrays(5000)
    real, references = train[: args.num], train[args.num :]

    def report(name, samples, began):
        verdict = evaluation.judge_samples(judge, samples, references=references)
        shares = np.array(verdict.class_shares)
        entropy = -(shares * np.log(np.maximum(shares, 1e-9))).sum() / np.log(10)
        print(
            f"{name:<40} confidence {verdict.confidence:.3f}  distance "
            f"{verdict.frechet_distance:.1f}  classes' entropy {entropy:.2f}  "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )

    report("real digits", real, time.monotonic())
    if not args.skip_diffusion:
        began = time.monotonic()
        labels = np.arange(args.num) % 10
        report(
            "mnist, ddim, 50 steps", tfd.models.load("mnist").sample(args.num, label=labels), began
        )
    model = tfd.models.load(args.model)
    for steps in args.steps_per_level:
        began = time.monotonic()
        samples, path = model.sample(
            args.num, steps_per_level=steps, batch_size=64, return_path=True
        )
        report(f"annealed Langevin, {steps} a level", samples, began)
        report("the same without the denoising step", path[-2], began)
    ladder = {"seeds": range(args.num), "shape": model.sample_shape, "steps": len(model.sigmas)}
    for sampler in ("ddpm", "ddim"):
        for words, denoiser in (("", model.denoiser()), (", clipped", Clipped(model.denoiser()))):
            began = time.monotonic()
            samples = np.asarray(tfd.sample(denoiser, sampler=sampler, **ladder))
            report(f"{sampler} on its {len(model.sigmas)} levels{words}", samples, began)


if __name__ == "__main__":
    main()
