"""A U-Net of diffusers, trained on as many images of MNIST as ours was, under the same judge.

    python benchmarks/mnist_diffusers.py --judge judge.keras --images 323840 --out runs/peer

trains `diffusers.UNet2DModel`, told the class, as diffusers' own training script does: DDPM's
linear noise levels, the noise as what is predicted, AdamW with a warm-up and a cosine, `EMAModel`.
It has no more weights than ours and our batch and learning rate. Then it draws each class equally
often with `DDIMScheduler` in 50 steps, at guidance 1 (it knows no other). Run again with --resume
to go on.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import diffusers
import keras
import numpy as np
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel

import tfdiffusion as tfd
from tfdiffusion import evaluation


def unet(widths: list[int]) -> diffusers.UNet2DModel:
    deep = len(widths)
    return diffusers.UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=["DownBlock2D"] * deep,
        up_block_types=["UpBlock2D"] * deep,
        norm_num_groups=8,
        num_class_embeds=10,
    )


class Training:
    """What a step needs and a file keeps."""

    def __init__(self, args, steps: int):
        torch.manual_seed(0)
        self.net = unet(args.widths)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=args.learning_rate)
        self.rate = get_cosine_schedule_with_warmup(self.optimizer, 100, steps)
        # As ours is averaged: for a few thousand steps, over the last tenth or so.
        self.average = EMAModel(
            self.net.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75
        )
        self.noise = diffusers.DDPMScheduler(num_train_timesteps=1000)
        self.done = 0

    def parts(self) -> dict:
        return {k: getattr(self, k) for k in ("net", "optimizer", "rate", "average")}

    def save(self, path: Path):
        state = {name: part.state_dict() for name, part in self.parts().items()}
        aside = path.with_suffix(".part")
        torch.save({**state, "done": self.done, "random": torch.get_rng_state()}, aside)
        os.replace(aside, path)

    def load(self, path: Path):
        state = torch.load(path, weights_only=False)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.done = state["done"]
        torch.set_rng_state(state["random"])

    def step(self, x, label) -> float:
        noise = torch.randn_like(x)
        t = torch.randint(0, 1000, (len(x),))
        with torch.autocast("cpu", torch.bfloat16, enabled=True):
            said = self.net(self.noise.add_noise(x, noise, t), t, class_labels=label).sample
        loss = torch.nn.functional.mse_loss(said.float(), noise)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.average.step(self.net.parameters())
        self.done += 1
        return float(loss.detach())


@torch.no_grad()
def sample(net, num: int, steps: int, batch_size: int) -> np.ndarray:
    """(num, 28, 28, 1) in [-1, 1], a class each in turn."""
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000)
    random, made = torch.Generator().manual_seed(0), []
    for start in range(0, num, batch_size):
        label = torch.arange(start, min(start + batch_size, num)) % 10
        x = torch.randn((len(label), 1, 28, 28), generator=random)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t, class_labels=label).sample, t, x).prev_sample
        made.append(x.clamp(-1.0, 1.0).permute(0, 2, 3, 1).numpy())
    return np.concatenate(made)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--judge", required=True, help="of tfdiffusion.evaluation.train_judge")
    parser.add_argument("--data-dir", help="where TensorFlow Datasets keeps its sets")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist_diffusers"))
    parser.add_argument("--images", type=int, default=323_840)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--num", type=int, default=2000, help="samples")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    examples = tfd.data.read("mnist", data_dir=args.data_dir)
    steps = args.images // args.batch_size
    training, file = Training(args, steps), args.out / "training.pt"
    if args.resume:
        training.load(file)
    print(f"{training.net.num_parameters():,} weights, {steps} steps", flush=True)
    began = saved = time.monotonic()
    first = training.done
    batches = iter(examples.batches(args.batch_size, from_step=first))
    while training.done < steps:
        x, label = (torch.from_numpy(np.array(part)) for part in next(batches))
        loss = training.step(x.permute(0, 3, 1, 2).contiguous(), label.long())
        if training.done % 50 == 0:
            each = (time.monotonic() - began) / (training.done - first)
            print(f"step {training.done}, {each:.2f} s a step, loss {loss:.4f}", flush=True)
        if time.monotonic() - saved > 240 or training.done == steps:
            training.save(file)
            saved = time.monotonic()
    training.average.copy_to(training.net.parameters())
    training.net.save_pretrained(args.out / "unet")
    samples = sample(training.net.eval(), args.num, args.steps, 100)
    np.save(args.out / "samples.npy", samples)
    judge = keras.saving.load_model(args.judge)
    references, _ = tfd.data.read("mnist", split="test", data_dir=args.data_dir).arrays()
    verdict = evaluation.judge_samples(
        judge, samples, np.arange(args.num) % 10, references=references[2000:]
    )
    print(json.dumps({"samples": args.num, "steps": args.steps, **vars(verdict)}, indent=1))


if __name__ == "__main__":
    main()
