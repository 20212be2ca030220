"""Bits per dimension of held-out images: our models, plain densities, file formats, the papers.

    python benchmarks/likelihood.py --data digits --levels 17 --train 3000
    python benchmarks/likelihood.py --data mnist --model mnist --num 200

prints a Markdown table: the variational bound and the probability-flow likelihood of each model
with their standard errors over images; a Gaussian with full covariance and a mixture of ten, fitted
with scikit-learn to the training images with the same dequantisation noise; PNG and xz; and what
papers report, each with its source. Columns: the model's own bound (or the size of a file); the
bound of endless steps and the flow's likelihood, which share images, encoder and decoder, so that
they can be compared; and the flow's with uniform dequantisation. `--train N` first trains a VDM and
a hybrid improved-DDPM model (or those of `--kind`) for N steps each. All rows count the same
pixels.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import keras
import numpy as np

import tfdiffusion as tfd
from tfdiffusion import data, likelihood, models, plotting, runs, variational


def read(args) -> tuple[tuple, tuple]:
    """((training images, labels), (held-out images, labels)), float32 in [-1, 1]."""
    options = {"data_dir": args.data_dir} if args.data_dir else {}
    if data.has_splits(args.data):
        train = data.read(args.data, split="train", **options)
        test = data.read(args.data, split="test", **options)
    else:
        train, test = runs.hold_out(data.read(args.data), args.seed)
    return train.arrays(), test.arrays(args.num)


def outside(name: str, file: str = "", density: str = "", note: str = "") -> tuple:
    """The row of what is no diffusion model: a size, or a density of pixels with uniform noise."""
    return name, file, "", "", density, note


def with_error(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1) / math.sqrt(len(values)):.3f}"


def beside(args, train: np.ndarray, test: np.ndarray, pixels) -> list[tuple]:
    """The rows of what is no diffusion model, of the same images."""
    baselines, options = likelihood.baselines, {"iterations": args.em, "seed": args.seed}
    some = train[np.random.default_rng(args.seed).permutation(len(train))[: args.fit]]
    rows = []
    for count, name in ((1, "Gaussian, full covariance"), (10, "mixture of 10 such")):
        bits = baselines.gaussian_mixture(some, test, count, pixels=pixels, **options)
        note = f"scikit-learn, {len(some):,} images, uniform dequantisation"
        rows.append(outside(name, density=with_error(bits), note=note))
    each, tall = baselines.png(test, pixels), baselines.png_of_all(test, pixels)
    stream, count = baselines.xz(test, pixels), len(test)
    return [
        *rows,
        outside("PNG, a file an image", with_error(each), note="Pillow, optimize, with headers"),
        outside("PNG, all in one picture", f"{tall:.3f}", note=f"{count} images below each other"),
        outside("xz -9e, all in one stream", f"{stream:.3f}", note=f"{count} images"),
    ]


def measured(args, name: str, model, test, pixels, curves: dict) -> tuple:
    """The row of a model, and its bits over t."""
    images, labels = test
    labels = labels if model.num_classes is not None else None
    started = time.monotonic()
    bound = likelihood.estimate(
        model, images, labels, evaluations=args.evaluations, pixels=pixels, seed=args.seed
    )
    curves[name] = bound.by_time(20)
    first = (images[: args.ode], None if labels is None else labels[: args.ode])
    endless = likelihood.continuous_bound(
        model, *first, evaluations=2 * args.evaluations, pixels=pixels, seed=args.seed
    )
    flows = [
        likelihood.log_likelihood(
            model,
            *first,
            dequantization=dequantization,
            pixels=pixels,
            draws=args.draws,
            tolerance=args.tolerance,
            seed=args.seed,
        )
        for dequantization in ("decoder", "uniform")
    ]
    flow = flows[0]
    draws = f"{args.draws} draw{'s' * (args.draws > 1)}"
    note = (
        f"bound: {len(images)} images, {args.evaluations} noise levels each; the others: "
        f"{flow.log_density.shape[1]} images, {draws}, {flow.evaluations:.0f} evaluations"
    )
    if args.draws > 1:
        note += f" (± {flow.draw_error:.3f} from draws)"
    if labels is not None:
        note += "; given labels"
    numbers = [f"{r.mean:.3f} ± {r.standard_error:.3f}" for r in (bound, endless, *flows)]
    print(f"{name}: {', '.join(numbers)}; {time.monotonic() - started:.0f} s", flush=True)
    return name, *numbers, note


def trained(args, train: np.ndarray) -> dict:
    """A VDM and a hybrid improved-DDPM model, trained without labels."""
    shape = train.shape[1:]
    finest = math.ceil(math.log2(args.levels - 1))  # period of a bin
    vdm = variational.VariationalDiffusionModel(
        variational.WithFourierFeatures(models.unet(shape), (finest - 1, finest)),
        gamma_min=2.0 * math.log(0.3 * likelihood.Pixels(args.levels).width),
        levels=args.levels,
    )
    wide = models.unet((*shape[:-1], 2 * shape[-1]))
    hybrid = variational.LearnedVarianceModel(
        wide, "cosine", "v", times="stratified", levels=args.levels
    )
    keras.utils.set_random_seed(args.seed)
    made = {"vdm": ("VDM", vdm), "hybrid": ("improved DDPM, hybrid", hybrid)}
    made = dict(made[kind] for kind in args.kind)
    for name, model in made.items():
        rate = keras.optimizers.schedules.CosineDecay(1e-3, args.train, alpha=0.02)
        model.compile(keras.optimizers.Adam(rate, clipnorm=1.0))
        batches = data.read((train, np.zeros(len(train), int)), labels=False).batches(
            args.batch_size, seed=args.seed, from_step=0
        )
        history = model.fit(batches, steps_per_epoch=args.train, epochs=1, verbose=0).history
        print(f"{name}: trained for {args.train} steps, loss {history['loss'][-1]:.4f}", flush=True)
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            model.save(Path(args.out) / f"{name.split(',')[0].replace(' ', '_')}.keras")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--model", nargs="*", default=[], help="files, run folders or names")
    parser.add_argument("--train", type=int, metavar="STEPS", help="train models for likelihood")
    parser.add_argument("--kind", nargs="*", default=["vdm", "hybrid"], help="of them")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num", type=int, default=200, help="held-out images")
    parser.add_argument("--ode", type=int, default=200, help="of them for the ODE")
    parser.add_argument("--levels", type=int, default=256)
    parser.add_argument("--evaluations", type=int, default=50)
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--fit", type=int, default=20_000, help="images for the plain densities")
    parser.add_argument("--em", type=int, default=20, help="iterations of the mixture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder for trained models and the plot")
    args = parser.parse_args()

    train, test = read(args)
    pixels = likelihood.Pixels(args.levels)
    print(f"{len(train[0]):,} images to train on, {len(test[0])} held out", flush=True)
    rows, curves = [], {}
    ours = {Path(name).stem: tfd.models.load(name) for name in args.model}
    ours |= trained(args, train[0]) if args.train else {}
    for name, model in ours.items():
        rows.append(measured(args, name, model, test, pixels, curves))
    rows += beside(args, train[0], test[0], pixels)
    rows.append(outside("uniform", f"{math.log2(args.levels):.3f}", note=f"{args.levels} values"))
    print(f"\n| {args.data} | bound | endless steps | ODE, the same noise | ODE, uniform noise | |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print("\n| CIFAR-10, published | bits per dimension | source |\n|---|---|---|")
    for model, bits, source in likelihood.baselines.PUBLISHED:
        print(f"| {model} | {bits:.2f} | {source} |")
    if args.out:
        plotting.bits_by_time(curves, Path(args.out) / "bits_by_time.png")


if __name__ == "__main__":
    main()
