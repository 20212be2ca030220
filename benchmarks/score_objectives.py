"""What each score-matching objective costs against the dimension of the data.

    python benchmarks/score_objectives.py --out assets/score_objectives.png

Times one training step (loss and gradient with respect to the weights) of one network on one batch:
implicit score matching computes D products with the Jacobian, sliced score matching one, finite
differences and denoising none. The numbers are printed as a table.
"""

from __future__ import annotations

import argparse
import time

import keras
import numpy as np

from tfdiffusion import plotting
from tfdiffusion.score_matching import ScoreMLP, ScoreModel

OBJECTIVES = ("implicit", "sliced", "finite_difference_sliced", "denoising")


def seconds(objective: str, dimension: int, batch: int, repeats: int) -> float:
    """The quickest of some training steps."""
    keras.utils.set_random_seed(0)
    model = ScoreModel(
        ScoreMLP([0.1], width=64, depth=2), [0.1], objective=objective, ema_decay=None
    )
    model.compile("sgd")
    x = np.random.default_rng(0).normal(size=(batch, dimension)).astype("float32")
    times = []
    for _ in range(repeats + 1):  # the first one compiles
        start = time.perf_counter()
        model.train_on_batch(x)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="score_objectives.png")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[2, 16, 128, 512])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    found = {}
    for name in OBJECTIVES:
        row = [seconds(name, d, args.batch_size, args.repeats) for d in args.dimensions]
        found[name.replace("_", " ")] = row
        print(f"{name:<26}" + "".join(f"{1000 * s:9.1f}" for s in row), flush=True)
    plotting.costs(args.dimensions, found, args.out, xlabel="dimension of the data")


if __name__ == "__main__":
    main()
