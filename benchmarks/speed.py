"""Training and sampling beside diffusers: same architecture, batch, threads, machine and run.

    pip install 'tfdiffusion[bench]'
    python benchmarks/speed.py                  # all of it, into benchmarks/README.md
    python benchmarks/speed.py training_step    # one row, on the terminal

Every measurement is a fresh process that prints JSON. Both sides take turns, `ROUNDS` times; the
table shows medians with their range, and a ratio above 1 means that we are faster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROUNDS = 3
BATCH, SIDE = 32, 32
MARKS = "<!-- speed: begin -->", "<!-- speed: end -->"

# ------------------------------------------------------------- the architecture, on both sides


def our_network(dtype=None):
    import tfdiffusion as tfd

    return tfd.networks.UNet(
        out_channels=3,
        widths=(64, 128, 128),
        blocks_per_level=2,
        attention_levels=(1,),
        head_dim=8,
        groups=32,
        norm_epsilon=1e-5,
        dtype=dtype,
    )


def our_model(dtype=None):
    import keras

    import tfdiffusion as tfd

    keras.utils.set_random_seed(0)
    model = tfd.DiffusionModel(our_network(dtype), "linear", "noise")
    model.build((None, SIDE, SIDE, 3))
    return model


def their_network():
    import torch
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=32,
    )


def images():
    import numpy as np

    return np.random.default_rng(0).uniform(-1, 1, (BATCH, SIDE, SIDE, 3)).astype("float32")


def seconds_each(step, warm_up=2, repeats=5):
    """Median seconds of a step that waits for its result."""
    for _ in range(warm_up):
        step()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


# ------------------------------------------------------------------------------- measurements


def training_step_ours(dtype=None):
    import keras
    import tensorflow as tf

    model = our_model(dtype)
    model.compile(keras.optimizers.Adam(1e-4))
    model.optimizer.build(model.trainable_variables)
    step = tf.function(model.train_step)
    x = tf.constant(images())
    return seconds_each(lambda: float(step(x)["loss"]))


def training_step_theirs(dtype=None):
    import torch
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    network = their_network()
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)
    average, scheduler = EMAModel(network.parameters()), DDPMScheduler()
    x = torch.from_numpy(images()).permute(0, 3, 1, 2).contiguous()
    cast = torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None)

    def step():
        noise = torch.randn_like(x)
        t = torch.randint(0, 1000, (len(x),))
        with cast:
            answer = network(scheduler.add_noise(x, noise, t), t).sample
        loss = torch.nn.functional.mse_loss(answer.float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        return loss.item()

    return seconds_each(step)


def training_step_bfloat16_ours():
    return training_step_ours("mixed_bfloat16")


def training_step_bfloat16_theirs():
    return training_step_theirs("bfloat16")


def forward_ours():
    import tensorflow as tf

    network = our_network()
    inputs = {"x": tf.constant(images()), "time": tf.zeros(BATCH)}
    network(inputs)
    run = tf.function(network)
    return seconds_each(lambda: run(inputs).numpy())


def forward_theirs():
    import torch

    network = their_network().eval()
    x = torch.from_numpy(images()).permute(0, 3, 1, 2).contiguous()
    with torch.inference_mode():
        return seconds_each(lambda: network(x, torch.zeros(BATCH)).sample)


def group_norm_ours(channels=64):
    import tensorflow as tf

    from tfdiffusion.networks.layers import GroupNormalization

    layer = GroupNormalization(32, epsilon=1e-5, activation="silu")
    return _layer_seconds(layer, tf.random.normal((BATCH, SIDE, SIDE, channels)))


def group_norm_theirs(channels=64):
    import torch

    layer = torch.nn.Sequential(torch.nn.GroupNorm(32, channels), torch.nn.SiLU())
    x = torch.randn(BATCH, channels, SIDE, SIDE)
    with torch.inference_mode():
        return seconds_each(lambda: layer(x), 5, 30)


def group_norm_keras(channels=64):
    import keras
    import tensorflow as tf

    layer = keras.Sequential([keras.layers.GroupNormalization(32), keras.layers.Activation("silu")])
    return _layer_seconds(layer, tf.random.normal((BATCH, SIDE, SIDE, channels)))


def _layer_seconds(layer, x):
    import tensorflow as tf

    layer(x)
    run = tf.function(layer)
    return seconds_each(lambda: run(x).numpy(), 5, 30)


def share_of_peak_ours(**changes):
    """FLOP/s of the forward pass as a share of those of a convolution of its middle level."""
    import keras
    import scaling
    import tensorflow as tf

    def rate(function, x, repeats):
        run = tf.function(function)
        operations = scaling.flops(run.get_concrete_function(x))
        return operations / seconds_each(lambda: run(x), 3, repeats)

    convolution = keras.layers.Conv2D(128, 3, padding="same")
    peak = rate(convolution, tf.random.normal((BATCH, SIDE // 2, SIDE // 2, 128)), 30)
    network, time_ = our_network(), tf.zeros(BATCH)
    network = type(network).from_config({**network.get_config(), **changes})
    x = tf.constant(images())
    network({"x": x, "time": time_})
    return rate(lambda x: network({"x": x, "time": time_}), x, 5) / peak


def share_without_attention_ours():
    return share_of_peak_ours(attention_levels=(), mid_attention=False)


def export(folder, batch_invariant=True):
    """Exports our sampler, with no weight at zero: a graph would skip biases that are."""
    import keras

    import tfdiffusion as tfd

    model = our_model()
    for variable in model.network.trainable_variables:
        variable.assign_add(0.02 * keras.random.normal(variable.shape))
    return tfd.export.saved_model(
        model, folder + "/sm", steps=50, sampler="ddim", batch_invariant=batch_invariant
    )


def sampling_ours(batch, batch_invariant=True):
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        export(folder, batch_invariant)
        sample = tf.saved_model.load(folder + "/sm").signatures["serving_default"]
    sample(seed=[0])
    seeds = tf.range(batch, dtype=tf.int64)
    return seconds_each(lambda: sample(seed=seeds)["images"].numpy(), 0, 1 if batch > 1 else 5)


def sampling_batched(batch):
    return sampling_ours(batch, batch_invariant=False)


def sampling_theirs(batch):
    from diffusers import DDIMPipeline, DDIMScheduler

    pipeline = DDIMPipeline(their_network(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def sample(batch):
        return pipeline(batch_size=batch, num_inference_steps=50, output_type="np").images

    sample(1)
    return seconds_each(lambda: sample(batch), 0, 1 if batch > 1 else 5)


def first_sample_ours():
    begun = time.perf_counter()
    import tensorflow as tf

    sample = tf.saved_model.load(os.environ["BENCH_FOLDER"] + "/sm").signatures["serving_default"]
    sample(seed=tf.constant([0], tf.int64))["images"].numpy()
    return time.perf_counter() - begun


def first_sample_theirs():
    begun = time.perf_counter()
    from diffusers import DDIMPipeline

    pipeline = DDIMPipeline.from_pretrained(os.environ["BENCH_FOLDER"] + "/pipeline")
    pipeline.set_progress_bar_config(disable=True)
    _ = pipeline(batch_size=1, num_inference_steps=50, output_type="np").images
    return time.perf_counter() - begun


def importing_ours():
    begun = time.perf_counter()
    import tfdiffusion  # noqa: F401

    return time.perf_counter() - begun


def importing_theirs():
    begun = time.perf_counter()
    import diffusers

    _ = diffusers.UNet2DModel, diffusers.DDIMPipeline  # lazily imported
    return time.perf_counter() - begun


def parameters_ours():
    return our_model().network.count_params()


def input_pipeline_ours():
    """Seconds for a batch of shuffled, mirrored images from memory."""
    import numpy as np

    import tfdiffusion as tfd

    x = np.random.default_rng(0).integers(0, 256, (20_000, SIDE, SIDE, 3), dtype=np.uint8)
    batches = iter(tfd.data.read(x).batches(BATCH, flip=True))
    return seconds_each(lambda: next(batches), warm_up=20, repeats=200)


ROWS = {
    "training_step": "training step, float32",
    "training_step_bfloat16": "training step, bfloat16",
    "forward": "forward pass, float32",
    "group_norm": "GroupNorm and SiLU, 32×32×64",
    "sampling_1": "50 DDIM steps, 1 image",
    "sampling_16": "50 DDIM steps, 16 images",
    "sampling_64": "50 DDIM steps, 64 images",
    "first_sample": "first sample of a fresh process (50 steps)",
    "importing": "import",
}


def measure(name: str, side: str) -> float:
    """Runs one measurement in this process."""
    kind, _, batch = name.rpartition("_")
    if kind == "sampling":
        return globals()[f"sampling_{side}"](int(batch))
    return globals()[f"{name}_{side}"]()


def prepare(folder: str) -> None:
    """What the first sample is loaded from."""
    from diffusers import DDIMPipeline, DDIMScheduler

    DDIMPipeline(their_network(), DDIMScheduler()).save_pretrained(folder + "/pipeline")
    export(folder)


def elsewhere(name: str, side: str, folder: str) -> float:
    """Runs one measurement in a fresh process."""
    command = [sys.executable, __file__, name, "--side", side]
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "BENCH_FOLDER": folder}
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}, {side}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(names, rounds: int, report) -> None:
    """Measures both sides in turns."""
    with tempfile.TemporaryDirectory() as folder:
        if "first_sample" in names:
            prepare(folder)
        for name in names:
            seconds = {"ours": [], "theirs": []}
            if name in ("sampling_16", "sampling_64"):
                seconds["batched"] = []
            for _ in range(rounds):
                for side, taken in seconds.items():
                    taken.append(elsewhere(name, side, folder))
            report(ROWS[name], seconds["ours"], seconds["theirs"])
            if "batched" in seconds:
                name = f"{ROWS[name]}, `batch_invariant=False`"
                report(name, seconds["batched"], seconds["theirs"])


def cell(values) -> str:
    return f"{statistics.median(values):.3g} s ({min(values):.3g} to {max(values):.3g})"


def machine() -> str:
    from importlib import metadata

    names = ("tensorflow", "keras", "torch", "diffusers")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    model = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        lines = [x for x in cpu.read_text().splitlines() if x.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def write(text: str) -> None:
    """Puts the table between its marks."""
    file = HERE / "README.md"
    old = file.read_text() if file.exists() else "# Benchmarks\n"
    begin, end = MARKS
    before, _, rest = old.partition(begin)
    after = rest.partition(end)[2] if rest else "\n"
    file.write_text(f"{before.rstrip()}\n\n{begin}\n{text}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=", ".join(ROWS))
    parser.add_argument(
        "--side", choices=("ours", "theirs", "batched", "keras"), help="measure in this process"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.names[0], args.side)))
        return
    rows = []

    def report(name, ours, theirs):
        ratio = statistics.median(theirs) / statistics.median(ours)
        rows.append(f"| {name} | {cell(ours)} | {cell(theirs)} | {ratio:.2f} |")
        print(rows[-1], flush=True)

    compare(args.names or list(ROWS), args.rounds, report)
    if not args.names:
        pipeline = elsewhere("input_pipeline", "ours", "")
        share = elsewhere("share_of_peak", "ours", "")
        bare = elsewhere("share_without_attention", "ours", "")
        keras_norm = elsewhere("group_norm", "keras", "")
        header = "| | tfdiffusion | diffusers | ratio |\n|---|---|---|---|"
        parameters = elsewhere("parameters", "ours", "")
        write(
            f"## Speed\n\n`python benchmarks/speed.py`; {machine()}. A U-Net of {parameters:,} "
            f"parameters on {SIDE}×{SIDE}×3, batches of {BATCH} in training. Medians of "
            f"{args.rounds} processes that took turns (range).\n\n{header}\n"
            + "\n".join(rows)
            + "\n\nBy default an export gives an image the same bytes alone and in any batch; "
            "neither diffusers nor `batch_invariant=False` does."
            f"\n\nThe input pipeline alone gives a batch every {pipeline * 1000:.2g} ms. The "
            f"forward pass runs at {share:.0%} of the FLOP/s of a convolution of its middle "
            f"level alone, and at {bare:.0%} without its attention. "
            f"Keras' own GroupNormalization with SiLU takes {keras_norm * 1000:.3g} ms."
        )


if __name__ == "__main__":
    main()
