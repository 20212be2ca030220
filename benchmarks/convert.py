"""Checkpoints of diffusers in Keras: how nearly they agree, and how fast each side is.

    pip install 'tfdiffusion[bench]'
    python benchmarks/convert.py                # the table of differences, some minutes
    python benchmarks/convert.py --speed        # google/ddpm-cifar10-32's network, both sides

Weights are random. A difference is the largest one over the largest value, in float32: of the
outputs, and of the gradients of a loss by the images and by a dozen weights, the worst of them.

The speed is that of one process with one set of threads: both sides take turns, and the table has
medians. Samples are 50 steps of DDIM without its image's post-processing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1])]


def row(*cells) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def differences(only: str | None) -> None:
    import parity

    row("configuration", "parameters", "outputs", "gradients")
    row("---", "---", "---", "---")
    configurations = {"google/ddpm-cifar10-32": parity.FULL, **parity.CONFIGURATIONS}
    for name, config in configurations.items():
        if only and only not in name:
            continue
        network = parity.theirs(config)
        converted = parity.ours(network)
        called = parity.inputs(config)
        outputs = parity.output_error(network, converted, called)
        gradients = max(parity.gradient_errors(network, converted, called).values())
        row(name, f"{converted.count_params():,}", f"{outputs:.1e}", f"{gradients:.1e}")


def taking_turns(functions: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each function, after one call that does not count."""
    taken = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if i:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def speed(batch: int, threads: int, rounds: int, steps: int) -> None:
    for name in ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["TF_NUM_INTEROP_THREADS"] = "1"
    import numpy as np
    import parity
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler

    import tfdiffusion as tfd
    from tfdiffusion import _backend
    from tfdiffusion.convert import schedulers

    torch.set_num_threads(threads)
    network = parity.theirs(parity.FULL)
    scheduler = DDIMScheduler()
    schedule = schedulers.read({**scheduler.config, "_class_name": "DDIMScheduler"})
    converted = parity.ours(network)
    model = tfd.DiffusionModel(converted, ema_decay=None, **schedule.model_arguments())
    model.build((None, 32, 32, 3))
    pipeline = DDIMPipeline(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    called = parity.inputs(parity.FULL)
    called = {name: np.repeat(value[:1], batch, axis=0) for name, value in called.items()}
    tensors = parity.to_torch(called)
    compiled = _backend.compiled(converted, converted.variables)

    @torch.no_grad()
    def their_forward():
        return parity.their_output(network, **tensors).sum().item()

    def our_forward():
        return np.asarray(compiled(called)).sum()

    measured = {
        "forward": taking_turns({"ours": our_forward, "theirs": their_forward}, rounds),
        f"DDIM, {steps} steps": taking_turns(
            {
                "ours": lambda: model.sample(batch, steps=steps, batch_size=batch),
                "theirs": lambda: pipeline(
                    batch, num_inference_steps=steps, output_type="pt", return_dict=False
                ),
            },
            max(1, rounds // 4),
        ),
    }
    row(f"batch {batch}, threads: {threads}", "tfdiffusion", "diffusers", "ratio")
    row("---", "---", "---", "---")
    for what, seconds in measured.items():
        mine, other = seconds["ours"], seconds["theirs"]
        row(what, f"{mine:.2f} s", f"{other:.2f} s", f"{other / mine:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", help="configurations with this in their name")
    parser.add_argument("--speed", action="store_true", help="measure time, not differences")
    parser.add_argument("--batch", type=int, default=4, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="of forward passes")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="of DDIM")
    args = parser.parse_args()
    if args.speed:
        speed(args.batch, args.threads, args.rounds, args.steps)
    else:
        differences(args.only)


if __name__ == "__main__":
    main()
