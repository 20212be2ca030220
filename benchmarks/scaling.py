"""How time and memory grow with the image, the width, the batch and the number of steps.

    python benchmarks/scaling.py     # into benchmarks/README.md and assets/scaling.png

Each point is a fresh process. The arithmetic is what TensorFlow's profiler counts in the graph, so
the last column, time for each operation relative to the first row of its block, says whether
anything grows faster than the arithmetic does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import memory
import speed

BASE = {"side": 32, "width": 64, "batch": 8, "steps": 0}
SWEEPS = {
    "side": (16, 32, 64, 128),
    "width": (32, 64, 128),
    "batch": (2, 8, 32),
    "steps": (5, 10, 20, 40),
}
NAMES = {
    "side": "a training step, by the image's side",
    "width": "a training step, by the first level's width",
    "batch": "a training step, by the batch",
    "steps": "sampling, by its number of steps",
}


def measure(side: int, width: int, batch: int, steps: int) -> dict:
    """One training step if `steps` is 0, else a run of the sampler, in this process."""
    import keras
    import numpy as np
    import tensorflow as tf

    import tfdiffusion as tfd

    network = tfd.networks.UNet(out_channels=3, widths=(width, 2 * width), groups=16)
    model = tfd.DiffusionModel(network, "linear", "noise")
    model.build((None, side, side, 3))
    model.compile(keras.optimizers.Adam(1e-4))
    model.optimizer.build(model.trainable_variables)
    x = tf.constant(np.random.default_rng(0).uniform(-1, 1, (batch, side, side, 3)), tf.float32)
    if steps:
        # The loop's body stands in the graph once.
        denoiser = model.denoiser()
        one = tf.function(lambda x: denoiser(x, 0.5)).get_concrete_function(x)
        operations = steps * flops(one)

        def run():
            return model.sample(batch, steps=steps, sampler="ddim", grid="uniform")
    else:
        step = tf.function(model.train_step)
        operations = flops(step.get_concrete_function(x))

        def run():
            return float(step(x)["loss"])

    before = memory.peak()
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return {"seconds": min(times[1:]), "MiB": memory.peak() - before, "operations": operations}


def flops(concrete) -> int:
    """Floating-point operations of a graph."""
    from tensorflow.python.profiler import model_analyzer, option_builder

    options = option_builder.ProfileOptionBuilder.float_operation()
    options["output"] = "none"
    return model_analyzer.profile(concrete.graph, options=options).total_float_ops


def elsewhere(point: dict) -> dict:
    """Measures in a fresh process."""
    command = [sys.executable, __file__, "--point", json.dumps(point)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def draw(results: dict, path: Path) -> None:
    """Log–log, a column a sweep: time and memory, and a line as steep as the arithmetic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(results), figsize=(3.2 * len(results), 5.6), sharey="row")
    for (top, bottom), (name, rows) in zip(axes.T, results.items()):
        places = list(rows)
        taken = [row["seconds"] for row in rows.values()]
        work = [row["operations"] for row in rows.values()]
        top.loglog(places, taken, "o-", color="#1b4f8a", label="measured")
        scaled = [taken[0] * w / work[0] for w in work]
        top.loglog(places, scaled, "--", color="#b3470f", label="arithmetic")
        bottom.loglog(places, [row["MiB"] for row in rows.values()], "o-", color="#1b4f8a")
        bottom.set_xlabel(name)
        for axis in (top, bottom):
            axis.set_xticks(places, [str(place) for place in places])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        top.set_title(NAMES[name].split(",")[0], fontsize=9)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("memory beyond the model, MiB")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--point", type=json.loads, help="measure in this process")
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(**args.point)))
        return
    text, results = "", {}
    for name, places in SWEEPS.items():
        results[name] = {place: elsewhere({**BASE, name: place}) for place in places}
        text += f"\n| {NAMES[name]} | time | memory | operations | time each |\n"
        text += "|---" * 5 + "|\n"
        first = None
        for place, row in results[name].items():
            each = row["seconds"] / row["operations"]
            first = first or each
            text += (
                f"| {place} | {row['seconds']:.3g} s | {row['MiB']:.0f} MiB | "
                f"{row['operations'] / 1e9:.3g} G | {each / first:.2f} |\n"
            )
        print(text.rpartition("\n\n")[2], flush=True)
    speed.MARKS = "<!-- scaling: begin -->", "<!-- scaling: end -->"
    speed.write(
        f"## Cost as work grows\n\n`python benchmarks/scaling.py`; {speed.machine()}. A U-Net of "
        "two levels on {side}×{side}×3, width {width}, batches of {batch}, but for what is "
        "varied.\n".format(**BASE)
        + text
        + "\n![Time and memory](../assets/scaling.png)"
    )
    draw(results, speed.HERE.parent / "assets" / "scaling.png")


if __name__ == "__main__":
    main()
