"""Images of MNIST encoded to noise and decoded again by the shipped model: error against steps.

    python benchmarks/reconstruction.py [--data-dir DIR] [--num 16]

Beside it, the error per dimension in [0, 1] that DDIM's paper gives for CIFAR-10 (arXiv:2010.02502,
table 2): another model and other images, so only the way it falls can be compared.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

import tfdiffusion as tfd

PUBLISHED = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009}


def main(args: argparse.Namespace) -> None:
    data = tfd.data.load(
        "mnist",
        split=f"test[:{args.num}]",
        batch_size=args.num,
        shuffle=False,
        data_dir=args.data_dir,
    )
    images, labels = (np.asarray(part) for part in next(iter(data)))
    denoiser = tfd.models.load("mnist").guided(labels, threshold=None)
    print("| steps | ddim | dpmpp_2m | DDIM on CIFAR-10, published |\n|---|---|---|---|")
    for steps, published in PUBLISHED.items():
        errors = []
        for sampler in ("ddim", "dpmpp_2m"):
            again = tfd.samplers.reconstruct(denoiser, images, sampler=sampler, steps=steps)
            errors.append(np.mean((0.5 * (np.asarray(again) - images)) ** 2))
        print(f"| {steps} | {errors[0]:.4f} | {errors[1]:.4f} | {published} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir")
    parser.add_argument("--num", type=int, default=16)
    main(parser.parse_args())
