"""Finding models, and networks that fit an image."""

from __future__ import annotations

import json
import zipfile

import keras
import numpy as np
import pytest

import tfdiffusion as tfd
from tfdiffusion import models, networks
from tfdiffusion.score_matching import NCSN, NCSNv2, ScoreModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model in a file, which is also a run folder's."""
    network = networks.UNet(
        out_channels=1, widths=(8,), blocks_per_level=1, groups=4, mid_attention=False
    )
    model = tfd.DiffusionModel(network, "vp", "v")
    model.build((None, 4, 4, 1))
    for weight in network.trainable_weights:
        weight.assign(keras.random.normal(weight.shape, stddev=0.2, seed=1))
    model.ema.reset()
    file = tmp_path_factory.mktemp("run") / "model.keras"
    model.save(file)
    return model, file


def test_files_and_run_folders_load(saved):
    model, file = saved
    expected = model.sample(2, steps=2)
    for source in (file, str(file), file.parent):
        loaded = models.load(source)
        assert models.path(source) == file
        np.testing.assert_allclose(loaded.sample(2, steps=2), expected, atol=1e-5)


def test_shipped_models_are_found_by_name(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_PRETRAINED", saved[1].parent)
    assert models.names() == ["model"]
    assert models.path("model") == saved[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert models.path("model") == saved[1]  # a name wins
    with pytest.raises(FileNotFoundError, match=r"has no model\.keras"):
        models.path("./model")
    with pytest.raises(FileNotFoundError, match="Did you mean 'model'"):
        models.path("modl")


@pytest.mark.parametrize("name", models.names())
def test_shipped_models_load_and_sample(name):
    model = models.load(name)
    request = {"steps": 2, "label": None if model.num_classes is None else [0, 1]}
    if isinstance(model, ScoreModel):
        request = {"steps_per_level": 1}
    images = model.sample(2, **request)
    assert images.shape == (2, *model.sample_shape) and np.isfinite(images).all()
    assert models.path(name).stat().st_size < 20e6


def test_what_is_no_model_is_refused(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model 'nowhere'"):
        models.path("nowhere")
    other = tmp_path / "picture.png"
    other.write_bytes(b"")
    with pytest.raises(ValueError, match=r"not a \.keras file"):
        models.path(other)
    (tmp_path / "saved_model.pb").write_bytes(b"")
    with pytest.raises(ValueError, match="exported SavedModel"):
        models.path(tmp_path)


def test_damaged_files_are_refused(saved, tmp_path):
    content, damaged = saved[1].read_bytes(), tmp_path / "x.keras"
    for size in (0, 10, len(content) // 2, len(content) - 10):
        damaged.write_bytes(content[:size])
        with pytest.raises(ValueError, match="cannot be read as a Keras model"):
            models.load(damaged)


def test_flipped_bytes_are_noticed(saved, tmp_path):
    content, damaged = saved[1].read_bytes(), tmp_path / "x.keras"
    place = len(content) // 2  # in the weights
    damaged.write_bytes(
        content[:place] + bytes(b ^ 255 for b in content[place:][:8]) + content[place + 8 :]
    )
    with pytest.raises(ValueError, match="cannot be read as a Keras model"):
        models.load(damaged)


def set_in(*path):
    """A change of a JSON text: the value at the end of the path."""
    *path, last, value = path

    def change(text):
        root = part = json.loads(text)
        for key in path:
            part = part[key]
        part[last] = value
        return json.dumps(root)

    return change


def system_call(folder):
    reference = {"module": "os", "class_name": "system", "registered_name": None}
    return lambda text: json.dumps({**reference, "config": {"command": f"touch {folder}/ran"}})


LAMBDA = {
    "module": "keras.layers",
    "class_name": "Lambda",
    "registered_name": None,
    "config": {"name": "x", "function": {"class_name": "__lambda__", "config": {"code": "4wEA"}}},
}


@pytest.mark.parametrize(
    ("member", "change", "message"),
    [
        ("config.json", set_in("registered_name", "tfdiffusion>Later"), "locate class"),
        ("config.json", set_in("config", "later", 1), "arguments passed to DiffusionModel"),
        ("config.json", set_in("config", "network", "config", "later", 1), "passed to UNet"),
        ("config.json", set_in("config", "process", "later"), "Unknown process 'later'"),
        ("config.json", set_in("config", "network", "config", "widths", [16]), "not be loaded"),
        ("config.json", set_in("config", "network", LAMBDA), "Lambda"),
        ("config.json", system_call, "locate class 'system'"),
        ("config.json", lambda text: "{", "cannot be read"),
        ("config.json", lambda text: "{}", "cannot be read"),
        ("config.json", None, "config.json"),
        ("model.weights.h5", None, "model.weights.h5"),
    ],
)
def test_tampered_and_newer_files(saved, tmp_path, member, change, message):
    """Nothing in a file is run, and whatever is wrong with it is said in one line."""
    file = tmp_path / "x.keras"
    with zipfile.ZipFile(saved[1]) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "metadata.json":
                content = set_in("keras_version", "99.1")(content)
            if name == member:
                if change is None:
                    continue
                content = (change(tmp_path) if change is system_call else change)(content)
            new.writestr(name, content)
    with pytest.raises(ValueError, match=message) as caught:
        models.load(file)
    assert "written by Keras 99.1; this is Keras" in str(caught.value)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_models_of_another_kind_are_refused(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.save(tmp_path / "x.keras")
    with pytest.raises(ValueError, match=r"a Sequential, not a tfdiffusion\.DiffusionModel"):
        models.load(tmp_path / "x.keras")


class Recorded:
    """Stands for a U-Net and checks what that would check."""

    def __init__(self, *, widths, patch_size, groups, attention_levels, out_channels, **_):
        assert all(width % groups == 0 for width in widths)
        assert all(level < len(widths) for level in attention_levels)
        self.widths, self.patch_size, self.out_channels = widths, patch_size, out_channels
        self.factor = patch_size * 2 ** (len(widths) - 1)


@pytest.mark.parametrize("size", ["small", "base"])
def test_a_unet_fits_every_side_or_a_side_is_named_that_does(size, monkeypatch):
    monkeypatch.setattr(networks, "UNet", Recorded)
    fitting = set()
    for side in range(1, 520):
        try:
            network = models.unet((side, side, 3), size=size)
        except ValueError as error:
            nearest = int(str(error).rstrip(".").split()[-1])
            assert abs(nearest - side) <= max(8, 0.1 * side)
            network, side = models.unet((nearest, nearest, 3), size=size), nearest
        else:
            fitting.add(side)
        assert side % network.factor == 0
        assert side / network.factor <= 16  # the coarsest grid, where all positions attend
        assert side / network.patch_size <= 32
        assert network.out_channels == 3
    assert fitting >= {*range(1, 17), 28, 32, 48, 64, 96, 128, 224, 256, 512}


def test_common_sides(monkeypatch):
    monkeypatch.setattr(networks, "UNet", Recorded)
    patches = {side: models.unet((side, side, 1)).patch_size for side in (8, 16, 28, 32, 64, 256)}
    assert patches == {8: 1, 16: 1, 28: 2, 32: 2, 64: 4, 256: 16}
    assert models.unet((32, 48, 1)).patch_size == 4  # the longer side decides


def test_a_unet_is_built_for_its_shape():
    network = models.unet((12, 8, 3), num_classes=4, dtype="mixed_bfloat16")
    network.build({"x": (None, 12, 8, 3), "time": (None,), "label": (None,)})
    assert network.num_classes == 4 and network.dtype_policy.name == "mixed_bfloat16"
    assert network.compute_output_shape({"x": (5, 12, 8, 3)}) == (5, 12, 8, 3)


def test_unet_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="Did you mean 'small'"):
        models.unet((8, 8, 1), size="smal")
    with pytest.raises(ValueError, match="shape of an image"):
        models.unet((8, 8))


def test_a_refinenet_fits_its_shape():
    sigmas = [2.0, 1.0, 0.5]
    for method, cls in (("ncsn", NCSN), ("ncsnv2", NCSNv2)):
        network = models.refinenet((28, 28, 1), sigmas, method)
        assert isinstance(network, cls) and (network.width, network.patch_size) == (32, 2)
    network = models.refinenet((32, 32, 3), sigmas, size="base", dtype="mixed_bfloat16")
    assert (network.width, network.patch_size) == (128, 1)
    assert network.dtype_policy.name == "mixed_bfloat16"
    with pytest.raises(ValueError, match="method"):
        models.refinenet((28, 28, 1), sigmas, "ncsnv3")
    with pytest.raises(ValueError, match="shape of an image"):
        models.refinenet((28, 28), sigmas)
