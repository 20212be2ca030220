"""What a training step costs in memory and time: precision, rematerialisation, accumulation.

    python benchmarks/memory.py     # into benchmarks/README.md

Each row is a fresh process: its peak resident memory beyond what it held before the first step, and
the median time of a step over 64 images of 32x32 (of the same U-Net as in speed.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import speed

IMAGES = 64
ROWS = {
    "float32": {},
    "bfloat16": {"dtype": "mixed_bfloat16"},
    "remat": {"remat": True},
    "4 parts": {"parts": 4},
    "bfloat16, remat, 4 parts": {"dtype": "mixed_bfloat16", "remat": True, "parts": 4},
}
speed.MARKS = "<!-- memory: begin -->", "<!-- memory: end -->"


def peak() -> float:
    """Peak resident memory of this process, MiB; getrusage's would include the parent's."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").open())
    return int(status["VmHWM"].split()[0]) / 1024


def measure(dtype=None, remat=False, parts=1) -> dict:
    import keras
    import numpy as np
    import tensorflow as tf

    import tfdiffusion as tfd

    network = speed.our_network(dtype)
    network = type(network).from_config({**network.get_config(), "remat": remat})
    model = tfd.DiffusionModel(network, "linear", "noise")
    model.build((None, speed.SIDE, speed.SIDE, 3))
    accumulate = parts if parts > 1 else None
    model.compile(keras.optimizers.Adam(1e-4, gradient_accumulation_steps=accumulate))
    model.optimizer.build(model.trainable_variables)
    step = tf.function(model.train_step)
    shape = (IMAGES // parts, speed.SIDE, speed.SIDE, 3)
    x = tf.constant(np.random.default_rng(0).uniform(-1, 1, shape).astype("float32"))
    before, times = peak(), []
    for _ in range(4):
        begun = time.perf_counter()
        for _ in range(parts):
            float(step(x)["loss"])
        times.append(time.perf_counter() - begun)
    return {"MiB": peak() - before, "seconds": statistics.median(times[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", nargs="?", choices=ROWS, help="measure in this process")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(**ROWS[args.row])))
        return
    lines = ["| | peak memory | of float32 | a step | of float32 |", "|---|---|---|---|---|"]
    first = None
    for row in ROWS:
        command = [sys.executable, __file__, row]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        result = json.loads(done.stdout.splitlines()[-1])
        first = first or result
        memory, taken = result["MiB"], result["seconds"]
        lines.append(
            f"| {row} | {memory:.0f} MiB | {memory / first['MiB']:.2f} | {taken:.2f} s | "
            f"{taken / first['seconds']:.2f} |"
        )
        print(lines[-1], flush=True)
    speed.write(
        f"## Memory\n\n`python benchmarks/memory.py`; {speed.machine()}. A training step on "
        f"{IMAGES} images of {speed.SIDE}×{speed.SIDE}×3.\n\n" + "\n".join(lines)
    )


if __name__ == "__main__":
    main()
