"""Pipelines of diffusers and the models made of them: the same images from the same noise.

The noise is ours: what a seed gives is fed to the pipeline, so that whatever draws by seeds, a
SavedModel too, can be held against it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from oracles import numpy

import tfdiffusion as tfd
from tfdiffusion import cli, export, random

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers deprecates itself

on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="SavedModels are written by TensorFlow alone"
)
ROOT = Path(__file__).parents[1]
SIZE, STEPS, SEEDS = 8, 10, [3, 11]
# Of a folder: the pipeline's class, the scheduler, the network.
PIPELINES = {
    "ddpm": ("DDPMPipeline", "DDPMScheduler", {"variance_type": "fixed_large"}, {}),
    "ddim": ("DDIMPipeline", "DDIMScheduler", {"clip_sample_range": 0.8}, {}),
    "pndm": ("PNDMPipeline", "PNDMScheduler", {}, {}),
    "dpm_solver": (
        "DDPMPipeline",
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True, "thresholding": True},
        {"resnet_time_scale_shift": "scale_shift"},
    ),
    "flow": ("DDPMPipeline", "FlowMatchEulerDiscreteScheduler", {"shift": 2.0}, {}),
    "score_sde": (
        "ScoreSdeVePipeline",
        "ScoreSdeVeScheduler",
        {"sigma_max": 1.0, "snr": 0.05},
        {
            "block_out_channels": (32, 32),  # its attention has 32 groups
            "time_embedding_type": "fourier",
            "freq_shift": 0,
            "flip_sin_to_cos": False,
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        },
    ),
}


def pipeline_of(kind):
    """A pipeline with random weights, large enough to matter."""
    pipeline, scheduler, settings, network = PIPELINES[kind]
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        **{
            "sample_size": SIZE,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 8,
            **network,
        }
    )
    with torch.no_grad():
        for weight in unet.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    kind, schedule = getattr(diffusers, pipeline), getattr(diffusers, scheduler)(**settings)
    return kind(unet=unet, scheduler=schedule)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind → a folder that diffusers has written."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "pipeline"
            pipeline_of(kind).save_pretrained(made[kind])
        return made[kind]

    return folder


def drawn_by(pipeline, seeds, monkeypatch, steps=STEPS):
    """The pipeline's images, (B, H, W, C) in [0, 1], from the noise of our seeds."""
    shape, keys = (SIZE, SIZE, 3), random.keys(seeds)

    def noise(*streams):
        here = keys
        for stream in streams:
            here = random.fold_in(here, stream)
        return torch.tensor(numpy(random.normal(here, shape)).transpose(0, 3, 1, 2))

    def all_noise():
        sigma = getattr(pipeline.scheduler.config, "sigma_max", None)
        if sigma is None:
            yield noise(0)
        else:  # ours is of images in [−1, 1], and starts with the data's variance, 1, in it
            yield (noise(0) * (1.0 + (2 * sigma) ** 2) ** 0.5 / 2 + 0.5) / sigma
        corrections = getattr(pipeline.scheduler.config, "correct_steps", None)
        for k in range(steps + 1):
            if corrections is None:
                yield noise(k + 1)
            else:  # Langevin steps, then the predictor
                yield from (noise(k + 1, 1 + c) for c in range(corrections))
                yield noise(k + 1, 0)

    drawn = all_noise()
    settings = {"batch_size": len(seeds), "num_inference_steps": steps, "output_type": "np"}
    pipeline.set_progress_bar_config(disable=True)
    with monkeypatch.context() as patch:
        for part in (pipeline, pipeline.scheduler):
            module = sys.modules[type(part).__module__]
            patch.setattr(module, "randn_tensor", lambda *_, **__: next(drawn), raising=False)
        return pipeline(**settings).images


def as_theirs(images):
    """Our images as pipelines give them: in [0, 1]."""
    return np.clip(images / 2 + 0.5, 0.0, 1.0)


@pytest.mark.parametrize("kind", PIPELINES)
def test_samples_agree(kind, folders, monkeypatch):
    model = tfd.convert.from_diffusers(folders(kind))
    pipeline = getattr(diffusers, PIPELINES[kind][0]).from_pretrained(folders(kind))
    seeds = SEEDS[:1] if kind == "score_sde" else SEEDS  # whose steps depend on the batch
    expected = drawn_by(pipeline, seeds, monkeypatch)
    ours = as_theirs(model.sample(len(seeds), seeds=seeds, steps=STEPS))
    assert expected.shape == (len(seeds), SIZE, SIZE, 3)
    assert 0.05 < expected.std()  # not all black or white
    np.testing.assert_allclose(ours, expected, atol=1e-4)


# What a process does that has none of what the conversion needs.
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "safetensors", "huggingface_hub"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import keras, numpy
import tfdiffusion
model = keras.saving.load_model(sys.argv[1])
numpy.save(sys.argv[2], model.sample(2, seeds=[3, 11], steps=10))
print(model.sampling)
"""


@pytest.mark.parametrize("kind", ["pndm", "dpm_solver"])
def test_a_converted_model_is_read_back_without_the_packages(kind, folders, tmp_path, monkeypatch):
    model = tfd.convert.from_diffusers(folders(kind))
    model.save(tmp_path / "model.keras")
    command = [sys.executable, "-c", WITHOUT, "model.keras", "images.npy"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(model.sampling) in done.stdout
    pipeline = getattr(diffusers, PIPELINES[kind][0]).from_pretrained(folders(kind))
    expected = drawn_by(pipeline, SEEDS, monkeypatch)
    np.testing.assert_allclose(as_theirs(np.load(tmp_path / "images.npy")), expected, atol=1e-4)


@on_tensorflow
@pytest.mark.parametrize("kind", ["ddpm", "pndm"])
def test_the_saved_model_samples_as_the_pipeline(kind, folders, tmp_path, monkeypatch):
    import tensorflow as tf

    model = tfd.convert.from_diffusers(folders(kind))
    directory = export.saved_model(model, tmp_path / "served" / "1", steps=STEPS)
    signatures = tf.saved_model.load(directory).signatures
    pipeline = getattr(diffusers, PIPELINES[kind][0]).from_pretrained(folders(kind))
    expected = drawn_by(pipeline, SEEDS, monkeypatch)
    seed = tf.constant(SEEDS, tf.int64)
    images = signatures["sample_float"](seed=seed)["images"].numpy()
    np.testing.assert_allclose(as_theirs(images), expected, atol=1e-4)
    pixels = signatures["serving_default"](seed=seed)["images"].numpy()
    assert np.abs(pixels - 255.0 * expected).max() < 0.55


def test_a_model_trained_further_here_samples_there(folders, tmp_path, monkeypatch):
    model = tfd.convert.from_diffusers(folders("ddim"), ema_decay=0.5)
    before = model.sample(2, seeds=SEEDS, steps=STEPS)
    images = np.random.default_rng(0).uniform(-1, 1, (8, SIZE, SIZE, 3)).astype("float32")
    model.compile(keras.optimizers.Adam(1e-2))
    model.fit(images, batch_size=4, epochs=2, verbose=0)
    after = model.sample(2, seeds=SEEDS, steps=STEPS)
    assert np.abs(after - before).max() > 0.05
    folder = tfd.convert.to_diffusers(model, tmp_path / "back")
    pipeline = diffusers.DDIMPipeline.from_pretrained(folder)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    expected = drawn_by(pipeline, SEEDS, monkeypatch)
    np.testing.assert_allclose(as_theirs(after), expected, atol=1e-4)


@pytest.mark.parametrize("centered", [False, True])
def test_images_between_0_and_1_come_back(centered, folders, tmp_path):
    """The same score, of images in [0, 1] there and in [−1, 1] here."""
    there = tmp_path / "there"
    shutil.copytree(folders("score_sde"), there)
    config = json.loads((there / "unet" / "config.json").read_text())
    config["center_input_sample"] = centered
    (there / "unet" / "config.json").write_text(json.dumps(config))
    model = tfd.convert.from_diffusers(there)
    pipelines = [
        diffusers.ScoreSdeVePipeline.from_pretrained(folder)
        for folder in (there, tfd.convert.to_diffusers(model, tmp_path / "back"))
    ]
    assert pipelines[0].scheduler.config.sigma_max == pipelines[1].scheduler.config.sigma_max
    x, sigma = np.random.default_rng(0).uniform(size=(2, 3, SIZE, SIZE)).astype("float32"), 0.7
    scores = [
        pipe.unet(torch.tensor(x), torch.full((2,), sigma)).sample.detach().numpy()
        for pipe in pipelines
    ]
    here = numpy(
        model.network(
            {"x": 2 * x.transpose(0, 2, 3, 1) - 1, "time": np.full(2, 2 * sigma, "float32")}
        )
    )
    for score in (scores[1], 2 * here.transpose(0, 3, 1, 2)):
        np.testing.assert_allclose(score, scores[0], rtol=1e-4, atol=1e-5)


def test_a_model_made_here_samples_there(tmp_path, monkeypatch):
    """Nothing of it ever came from diffusers."""
    keras.utils.set_random_seed(0)
    network = tfd.networks.UNet(out_channels=3, widths=(8, 16), groups=4, blocks_per_level=1)
    model = tfd.DiffusionModel(network, "linear", "v")
    model.compile(keras.optimizers.Adam(1e-2))
    images = np.random.default_rng(0).uniform(-1, 1, (8, SIZE, SIZE, 3)).astype("float32")
    model.fit(images, batch_size=4, epochs=2, verbose=0)
    folder = tfd.convert.to_diffusers(model, tmp_path / "pipeline")
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    expected = drawn_by(pipeline, SEEDS, monkeypatch)
    ours = model.sample(2, seeds=SEEDS, grid="uniform", steps=STEPS)
    np.testing.assert_allclose(as_theirs(ours), expected, atol=1e-4)


# Serves what it is given, where neither Keras nor this library can be imported.
SERVE = """
import sys
sys.modules["keras"] = sys.modules["tf_keras"] = sys.modules["tfdiffusion"] = None
import numpy, tensorflow as tf
sample = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
numpy.save(sys.argv[2], sample(seed=tf.constant([3, 11], tf.int64))["images"].numpy())
"""


@on_tensorflow
def test_two_commands_from_a_folder_to_a_served_model(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", str(folders("ddim")), "model.keras"]) == 0
    assert cli.main(["export", "model.keras", "served/1", "--steps", str(STEPS)]) == 0
    printed = capsys.readouterr().out
    assert "model.keras" in printed and "served/1" in printed
    command = [sys.executable, "-c", SERVE, "served/1", "images.npy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    pipeline = diffusers.DDIMPipeline.from_pretrained(folders("ddim"))
    expected = drawn_by(pipeline, SEEDS, monkeypatch)
    assert np.abs(np.load("images.npy") - 255.0 * expected).max() < 0.55


def test_the_command_line_samples_as_the_scheduler_says(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tfd.convert.from_diffusers(folders("pndm"))
    model.save("model.keras")
    arguments = ["--num", "2", "--seed", "3", "--steps", "7", "--out", "images.npz"]
    assert cli.main(["sample", "model.keras", *arguments]) == 0
    with np.load("images.npz") as drawn:
        pixels = drawn["images"]
    expected = model.sample(2, seed=3, steps=7)
    assert np.abs(pixels - (np.clip(expected, -1, 1) + 1) * 127.5).max() < 0.55
    assert cli.main(["info", "model.keras"]) == 0
    assert "PLMS" in capsys.readouterr().out
