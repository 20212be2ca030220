"""Judges the shipped MNIST model: are its digits digits, and those that were asked for?

    python benchmarks/judge_mnist.py --judge judge.keras --num 2000 --guidance 1 1.5 2

`judge.keras` is a classifier, made by `tfdiffusion.evaluation.train_judge` from MNIST's training
images if there is no such file yet. Each class is drawn equally often, in 50 steps of DDIM.
Probability is the judge's mean for the class it sees, "found" the share in which that is the class
asked for, and distance the Frechet distance in its features to test images, which is not FID.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import keras
import numpy as np

import tfdiffusion as tfd
from tfdiffusion import evaluation


def judge(path: Path, data_dir: str | None) -> keras.Model:
    """The classifier of a file, trained first where there is none."""
    if not path.exists():
        train = tfd.data.read("mnist", data_dir=data_dir).arrays()
        evaluation.train_judge(*train, epochs=3).save(path)
    return keras.saving.load_model(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--model", default="mnist", help="a file, run folder or name")
    parser.add_argument("--data-dir", help="where TensorFlow Datasets keeps its sets")
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--grid", default="uniform")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    classifier = judge(args.judge, args.data_dir)
    model = tfd.models.load(args.model)
    real, digits = tfd.data.read("mnist", split="test", data_dir=args.data_dir).arrays()

    def report(name: str, began: float, images, labels):
        verdict = evaluation.judge_samples(classifier, images, labels, references=real[args.num :])
        print(
            f"| {name} | {verdict.confidence:.4f} | {verdict.accuracy:.2%} | "
            f"{verdict.frechet_distance:.3f} | {time.monotonic() - began:.0f} s |",
            flush=True,
        )

    print("| | probability | found | distance | |\n|---|---|---|---|---|")
    report(f"{args.num} real images", time.monotonic(), real[: args.num], digits[: args.num])
    options = {"steps": args.steps, "sampler": args.sampler, "grid": args.grid, "seed": args.seed}
    labels = np.arange(args.num) % 10
    for guidance in args.guidance:
        began = time.monotonic()
        samples = model.sample(args.num, label=labels, guidance=guidance, **options)
        report(f"guidance {guidance:g}", began, samples, labels)


if __name__ == "__main__":
    main()
