"""Solvers on the shipped MNIST model: the judge's Fréchet distance and class accuracy.

    python benchmarks/mnist_solvers.py [--judge judge.keras] [--data-dir DIR] [--num 500]

The judge is a classifier (`tfdiffusion.evaluation.train_judge`), trained here on MNIST's training
images if no file is given. Its Fréchet distance, to the 10,000 test images, is not FID. All runs
start from the same noise, so that they differ by their solvers alone. Every pair of sampler and
grid runs with 10 evaluations; the best of them, and DDIM, also with the others. Writes
mnist_solvers.md.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import tfdiffusion as tfd
from tfdiffusion import evaluation

HERE = Path(__file__).parent
BUDGETS = (5, 15, 20)
PAIRS = (
    ("ddim", "uniform"),
    ("dpmpp_2m", "uniform"),
    ("dpmpp_2m", "karras"),
    ("dpmpp_2m", "quadratic"),
    ("dpmpp_2m", "optimized"),
    ("unipc_2", "uniform"),
    ("unipc_2", "optimized"),
    ("deis", "uniform"),
    ("plms", "uniform"),
    ("plms", "quadratic"),
)


def mnist(split: str, data_dir: str | None):
    """Images (N, 28, 28, 1) in [−1, 1] and labels."""
    data = tfd.data.load("mnist", split=split, batch_size=1000, shuffle=False, data_dir=data_dir)
    batches = [(np.asarray(x), np.asarray(y)) for x, y in data]
    return tuple(np.concatenate(part) for part in zip(*batches))


def main(args: argparse.Namespace) -> None:
    references, _ = mnist("test", args.data_dir)
    if args.judge:
        judge = keras.saving.load_model(args.judge)
    else:
        judge = evaluation.train_judge(*mnist("train", args.data_dir))
    model = tfd.models.load("mnist")
    labels = np.arange(args.num) % 10
    lines = []

    def measure(sampler: str, grid: str, steps: int) -> float:
        images = model.sample(
            args.num, label=labels, sampler=sampler, grid=grid, steps=steps, batch_size=100
        )
        verdict = evaluation.judge_samples(judge, images, labels, references)
        distance, accuracy = verdict.frechet_distance, 100.0 * verdict.accuracy
        lines.append(f"| {sampler} | {grid} | {steps} | {distance:.2f} | {accuracy:.1f} |")
        print(lines[-1], flush=True)
        return distance

    measure("ddim", "uniform", 50)
    best = min(PAIRS, key=lambda pair: measure(*pair, 10))
    for pair in dict.fromkeys((best, PAIRS[0])):
        for steps in BUDGETS:
            measure(*pair, steps)
    head = "| sampler | grid | evaluations | distance | accuracy, % |\n|---|---|---|---|---|\n"
    (HERE / "mnist_solvers.md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--judge")
    parser.add_argument("--data-dir")
    parser.add_argument("--num", type=int, default=500)
    main(parser.parse_args())
