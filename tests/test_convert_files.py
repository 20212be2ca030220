"""Files of other projects, read with NumPy alone; folders that are damaged, or none."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

import tfdiffusion as tfd
from tfdiffusion import cli
from tfdiffusion.convert import files, unet

ROOT = Path(__file__).parent.parent
TENSORS = {
    "a.weight": np.arange(6, dtype="float32").reshape(2, 3),
    "b": np.array(2.5, "float32"),
    "empty": np.zeros((0, 4), "float32"),
}


# ------------------------------------------------------------------------------------ safetensors


def test_safetensors_come_back(tmp_path):
    path = tmp_path / "model.safetensors"
    files.write_safetensors(path, TENSORS)
    read = files.read_safetensors(path)
    assert list(read) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].shape == tensor.shape
        np.testing.assert_array_equal(read[name], tensor)
    assert not read["a.weight"].flags.writeable
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_safetensors_of_the_library_itself(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "model.safetensors"
    kinds = ("float64", "float32", "float16", "int64", "int8", "uint8", "bool")
    tensors = {kind: np.arange(4).reshape(2, 2).astype(kind) for kind in kinds}
    library.save_file(tensors, path)
    read = files.read_safetensors(path)
    assert {kind: array.dtype.name for kind, array in read.items()} == {k: k for k in kinds}
    for kind in kinds:
        np.testing.assert_array_equal(read[kind], tensors[kind])
    files.write_safetensors(path, TENSORS)
    for name, tensor in library.load_file(path).items():
        np.testing.assert_array_equal(tensor, TENSORS[name])


def _safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _entry(**changes):
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def test_bfloat16_is_the_upper_half(tmp_path):
    entry = _entry(dtype="BF16", shape=[3], data_offsets=[0, 6])
    numbers = np.array([1.0, -2.5, 3.0e38], "<f4")
    halves = (numbers.view("<u4") >> 16).astype("<u2")
    read = files.read_safetensors(_safetensors(tmp_path / "w", entry, halves.tobytes()))["w"]
    np.testing.assert_allclose(read, numbers, rtol=2.0**-7)
    assert read.dtype == "float32"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "is damaged or incomplete.*no JSON"),
        (b"[1]", "no JSON object"),
        ({"w": 3}, "nothing useful of 'w'"),
        (_entry(shape=[3]), r"'w' of shape \(3,\) does not lie in its 8 bytes"),
        (_entry(data_offsets=[0, 12], shape=[3]), "does not lie in"),
        (_entry(shape=[-2], data_offsets=[0, 8]), "does not lie in"),
        (_entry(data_offsets=[8, 0]), "does not lie in"),
        (_entry(dtype="F8_E4M3"), "type F8_E4M3, which cannot be read"),
    ],
)
def test_damaged_safetensors(tmp_path, header, message):
    with pytest.raises(ValueError, match=message):
        files.read_safetensors(_safetensors(tmp_path / "w", header, bytes(8)))


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    files.write_safetensors(path, TENSORS)
    whole = path.read_bytes()
    for length in (0, 5, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged or incomplete"):
            files.read_safetensors(path)


# ---------------------------------------------------------------------------------- PyTorch files


class Call:
    """Pickles as a call of a function, as a tensor does."""

    def __init__(self, module, name, *arguments):
        self.module, self.name, self.arguments = module, name, arguments


class Storage:
    """Pickles as a reference to an entry of the zip."""

    def __init__(self, *reference):
        self.reference = reference


class Named(str):
    """Pickles as a global of torch."""


class Writer(pickle._Pickler):
    """Writes pickles that name functions which are not here."""

    def persistent_id(self, thing):
        return thing.reference if isinstance(thing, Storage) else None

    def save(self, thing, *args, **kwargs):
        if isinstance(thing, Call):
            self.write(f"c{thing.module}\n{thing.name}\n".encode())
            self.save(thing.arguments)
            self.write(pickle.REDUCE)
        elif isinstance(thing, Named):
            self.write(f"ctorch\n{thing}\n".encode())
        else:
            super().save(thing, *args, **kwargs)


def torch_file(path, content, storages=(), compression=zipfile.ZIP_STORED):
    """What torch.save makes, without it."""
    stream = io.BytesIO()
    Writer(stream, protocol=2).dump(content)
    pickletools.dis(stream.getvalue(), out=io.StringIO())  # it is a pickle
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/byteorder", "little")
        for i, array in enumerate(storages):
            archive.writestr(f"archive/data/{i}", array.tobytes())
    return path


def tensor(key, shape, strides, offset=0, kind="FloatStorage", size=6):
    storage = Storage("storage", Named(kind), str(key), "cpu", size)
    arguments = (storage, offset, shape, strides, False, {})
    return Call("torch._utils", "_rebuild_tensor_v2", *arguments)


def test_a_pytorch_file_is_read(tmp_path):
    numbers = np.arange(6, dtype="float32")
    content = {
        "a": tensor(0, (2, 3), (3, 1)),
        "transposed": tensor(0, (3, 2), (1, 3)),
        "tail": tensor(0, (2,), (1,), offset=4),
        "scalar": tensor(0, (), (), offset=2),
        "nothing": tensor(0, (0, 3), (3, 1)),
        "long": tensor(1, (2,), (1,), kind="LongStorage", size=2),
        "short": tensor(2, (2,), (1,), kind="BFloat16Storage", size=2),
        "more": [1, 2.5, "text", None, True],
    }
    halves = (np.array([1.5, -4.0], "<f4").view("<u4") >> 16).astype("<u2")
    path = torch_file(tmp_path / "x.bin", content, [numbers, np.array([7, -8]), halves])
    read = files.read_pytorch(path)
    np.testing.assert_array_equal(read["a"], numbers.reshape(2, 3))
    np.testing.assert_array_equal(read["transposed"], numbers.reshape(2, 3).T)
    np.testing.assert_array_equal(read["tail"], [4.0, 5.0])
    assert read["scalar"] == 2.0 and read["scalar"].shape == ()
    assert read["nothing"].shape == (0, 3)
    np.testing.assert_array_equal(read["long"], [7, -8])
    np.testing.assert_array_equal(read["short"], [1.5, -4.0])
    assert read["more"] == [1, 2.5, "text", None, True]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("numpy", "load"),
        ("tfdiffusion.convert.files", "_download"),
    ],
)
def test_nothing_in_a_pickle_is_executed(tmp_path, module, name):
    marker = tmp_path / "it ran"
    path = torch_file(tmp_path / "x.bin", {"w": Call(module, name, f"touch '{marker}'")})
    with pytest.raises(ValueError, match=rf"wants {module}.{name}, and only tensors"):
        files.read_pytorch(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tensor(0, (7,), (1,)), r"shape \(7,\) does not lie in its storage"),
        (tensor(0, (2,), (1,), offset=-1), "does not lie in"),
        (tensor(0, (2,), (-1,), offset=3), "does not lie in"),
        (tensor(0, (2, 2), (1,)), "does not lie in"),
        (tensor(9, (2,), (1,)), "archive/data/9"),
        (tensor(0, (2,), (1,), kind="QInt8Storage"), "wants torch.QInt8Storage"),
        (Storage("module", Named("FloatStorage"), "0", "cpu", 6), "refers to 'module'"),
    ],
)
def test_damaged_pytorch_files(tmp_path, content, message):
    path = torch_file(tmp_path / "x.bin", {"w": content}, [np.arange(6, dtype="float32")])
    with pytest.raises(ValueError, match=message):
        files.read_pytorch(path)


def test_other_files_than_pytorchs(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(ValueError, match=r"no PyTorch file of version 1\.6"):
        files.read_pytorch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "nothing")
    with pytest.raises(ValueError, match=r"none that torch\.save wrote"):
        files.read_pytorch(path)
    array = np.arange(6, dtype="float32")
    torch_file(path, {"w": tensor(0, (2,), (1,))}, [array], zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        files.read_pytorch(path)
    whole = torch_file(path, {"w": tensor(0, (2,), (1,))}, [array]).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="incomplete"):
        files.read_pytorch(path)


def test_damage_anywhere_is_one_kind_of_error(tmp_path):
    """Whatever bytes change, a file is read or refused; nothing else happens."""
    generator, path = np.random.default_rng(0), tmp_path / "file"
    torch_file(path, {"w": tensor(0, (2, 3), (3, 1))}, [np.arange(6, dtype="float32")])
    whole = {files.read_pytorch: path.read_bytes()}
    files.write_safetensors(path, TENSORS)
    whole[files.read_safetensors] = path.read_bytes()
    for read, content in whole.items():
        refused = 0
        for _ in range(200):
            damaged = bytearray(content)
            for place in generator.integers(0, len(content), 3):
                damaged[place] = generator.integers(0, 256)
            path.write_bytes(damaged)
            try:
                read(path)
            except ValueError as error:
                refused += 1
                assert str(path) in str(error)
        assert refused > 20


# ---------------------------------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def model():
    """A model of our own, with weights that are not zero."""
    keras.utils.set_random_seed(0)
    network = tfd.networks.UNet(
        out_channels=1, widths=(4, 8), blocks_per_level=1, groups=4, num_classes=3
    )
    model = tfd.DiffusionModel(network, "linear")
    model.build((None, 8, 8, 1))
    for i, weight in enumerate(network.trainable_weights):
        weight.assign(keras.random.normal(weight.shape, stddev=0.3, seed=i))
    return model


@pytest.fixture(scope="module")
def pipeline(model, tmp_path_factory):
    """The folder of a pipeline."""
    return tfd.convert.to_diffusers(model, tmp_path_factory.mktemp("pipeline") / "folder")


@pytest.fixture
def folder(pipeline, tmp_path):
    """A copy of it to damage."""
    import shutil

    return Path(shutil.copytree(pipeline, tmp_path / "folder"))


def weights(folder):
    return folder / "unet" / f"{files.NAME}.safetensors"


def outputs(model, label):
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype("float32")
    return keras.ops.convert_to_numpy(
        model.network({"x": x, "time": np.array([3.0, 900.0]), "label": np.array(label)})
    )


def test_our_own_model_comes_back(model, pipeline):
    again = tfd.convert.from_diffusers(pipeline)
    assert isinstance(again.network, tfd.networks.UNet2D)
    # "No label" has become a class of its own there.
    assert (model.num_classes, again.num_classes) == (3, 4)
    np.testing.assert_allclose(outputs(again, [1, 3]), outputs(model, [1, 3]), atol=2e-5)
    assert type(again.process) is type(model.process)
    assert again.sample_shape == (8, 8, 1)


def test_a_new_null_label_is_zero_and_is_left_out(pipeline, tmp_path):
    again = tfd.convert.from_diffusers(pipeline)
    table = np.asarray(again.network.label_embedding.embeddings)
    assert table.shape[0] == 5 and not table[-1].any()
    second = tfd.convert.to_diffusers(again, tmp_path / "again")
    config = json.loads((second / "unet" / "config.json").read_text())
    assert config["num_class_embeds"] == 4
    assert weights(second).read_bytes() == weights(pipeline).read_bytes()


def test_folders_of_three_kinds(pipeline, tmp_path):
    """A pipeline; a unet with its scheduler; the flat layout of older pipelines; a unet alone."""
    parts = tfd.convert.diffusers._Parts
    whole = parts.of(pipeline)
    assert whole.unet == pipeline / "unet" and whole.scheduler.is_file() and not whole.latent
    alone = parts.of(pipeline / "unet")
    assert alone.unet == pipeline / "unet" and alone.scheduler is None
    assert isinstance(alone.schedule().process, tfd.processes.LinearBeta)
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in pipeline.rglob("*.*"):
        (flat / file.name).write_bytes(file.read_bytes())
    assert parts.of(flat).unet == flat and parts.of(flat).scheduler == flat / whole.scheduler.name


def test_missing_and_extra_tensors(folder):
    tensors = dict(files.read_safetensors(weights(folder)))
    lost = list(tensors)[3:15]
    held = {name: np.array(tensor) for name, tensor in tensors.items() if name not in lost}
    files.write_safetensors(weights(folder), {**held, "more.weight": np.zeros(2, "float32")})
    with pytest.raises(ValueError, match="12 missing") as refusal:
        tfd.convert.from_diffusers(folder)
    message = str(refusal.value)
    assert "1 left over: more.weight" in message and files.NAME in message
    assert sum(name in message for name in lost) == 10 and ", ..." in message


def test_a_tensor_of_another_shape(folder):
    tensors = {k: np.array(v) for k, v in files.read_safetensors(weights(folder)).items()}
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :, :2]
    files.write_safetensors(weights(folder), tensors)
    with pytest.raises(
        ValueError, match=r"conv_in.weight \(4, 1, 2, 3\) instead of \(4, 1, 3, 3\)"
    ):
        tfd.convert.from_diffusers(folder)


def _change(folder, file="unet/config.json", **changes):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ["DownBlock2D", "KDownBlock2D"]}, "Unknown block 'KDownBlock2D'"),
        ({"up_block_types": ["UpBlok2D", "UpBlock2D"]}, "'UpBlok2D'. Did you mean 'UpBlock2D'"),
        ({"_class_name": "UNet2DConditionModel"}, "is a UNet2DConditionModel; only UNet2DModel"),
        ({"act_fn": "tanh"}, "act_fn='tanh' cannot be converted"),
        ({"downsample_padding": 2}, "downsample_padding=2 cannot"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type='UNetMidBlock2DCross"),
        ({"time_embedding_type": "rotary"}, "time_embedding_type='rotary' cannot"),
        ({"class_embed_type": "projection"}, "class_embed_type='projection' cannot"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift='spatial' cannot"),
        ({"block_out_channels": [4]}, "must be equally long. Received: 1, 2 and 2"),
        ({"layers_per_block": [1, 2]}, r"layers_per_block must be an integer.*\[1, 2\]"),
        ({"norm_num_groups": None}, "norm_num_groups=None goes with Skip blocks only"),
        ({"sample_size": None}, "no sample_size. Pass image_size"),
        ({"class_embed_type": "timestep"}, "labels are classes.*read_network"),
    ],
)
def test_what_cannot_be_converted_is_named(folder, changes, message):
    if "timestep" in changes.values():  # the weights of which are others
        network = unet.network({**json.loads((folder / "unet/config.json").read_text()), **changes})
        files.write_safetensors(weights(folder), unet.collect(list(unet.slots(network))))
    _change(folder, **changes)
    with pytest.raises(ValueError, match=message):
        tfd.convert.from_diffusers(folder)


def test_unknown_keys_are_left_out_aloud(folder):
    _change(folder, colour="green")
    with pytest.warns(UserWarning, match=r"UNet2DModel has no \['colour'\]"):
        tfd.convert.from_diffusers(folder)


def test_damaged_folders(folder, tmp_path):
    convert = tfd.convert.from_diffusers
    with pytest.raises(FileNotFoundError, match="There is no folder 'nowhere'"):
        convert("nowhere")
    with pytest.raises(NotADirectoryError, match=r"is a file. Pass the folder"):
        convert(weights(folder))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no folder of diffusers.*It has: notes\.txt"):
        convert(tmp_path / "other")
    _change(folder, "model_index.json", unet=["diffusers", "UNet2DConditionModel"])
    with pytest.raises(ValueError, match="its unet is a UNet2DConditionModel"):
        convert(folder)
    (folder / "model_index.json").unlink()
    weights(folder).write_bytes(weights(folder).read_bytes()[:-4])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        convert(folder)
    weights(folder).unlink()
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\.safetensors.*config"):
        convert(folder)
    (folder / "unet" / "config.json").write_text('{"in_channels": 3')
    with pytest.raises(ValueError, match=r"config\.json' is damaged"):
        convert(folder)


def test_shards(folder, model):
    tensors = {k: np.array(v) for k, v in files.read_safetensors(weights(folder)).items()}
    names, where = list(tensors), {}
    for i, part in enumerate((names[:9], names[9:])):
        file = f"{files.NAME}-{i}.safetensors"
        files.write_safetensors(folder / "unet" / file, {name: tensors[name] for name in part})
        where |= dict.fromkeys(part, file)
    index = folder / "unet" / f"{files.NAME}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    weights(folder).unlink()
    again = tfd.convert.from_diffusers(folder)
    np.testing.assert_allclose(outputs(again, [1, 3]), outputs(model, [1, 3]), atol=2e-5)
    (folder / "unet" / file).unlink()
    with pytest.raises(FileNotFoundError, match=r"names the file .*-1.safetensors"):
        tfd.convert.from_diffusers(folder)
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../secret"}}))
    with pytest.raises(FileNotFoundError, match="secret"):
        tfd.convert.from_diffusers(folder)


def test_names_on_the_hub(monkeypatch, pipeline):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'tfdiffusion\[convert\]'"):
        tfd.convert.from_diffusers("owner/name")
    asked = []

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            asked.append((name, allow_patterns))
            if name != "owner/name":
                raise OSError("401 Client Error.\nRepository Not Found")
            return str(pipeline)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert tfd.convert.from_diffusers("owner/name").sample_shape == (8, 8, 1)
    name, patterns = asked[0]
    assert name == "owner/name" and "unet/*.json" in patterns
    assert not any(pattern in ("*", "**") for pattern in patterns)  # not the autoencoder too
    with pytest.raises(OSError, match=r"no folder 'owner/other', and it cannot be fetched.*401"):
        tfd.convert.from_diffusers("owner/other")


# --------------------------------------------------------------------------------------- and back


def test_a_folder_is_replaced_only_if_asked(model, folder, tmp_path):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        tfd.convert.to_diffusers(model, folder)
    (folder / "stale").touch()
    tfd.convert.to_diffusers(model, folder, overwrite=True)
    assert not (folder / "stale").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").touch()
    with pytest.raises(FileExistsError, match="no pipeline of diffusers"):
        tfd.convert.to_diffusers(model, tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "1.png").exists()


def test_a_failure_leaves_nothing(model, tmp_path, monkeypatch):
    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_safetensors", full)
    with pytest.raises(OSError, match="No space"):
        tfd.convert.to_diffusers(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


OWN = {"out_channels": 1, "widths": (8, 16), "blocks_per_level": 1, "groups": 4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"patch_size": 2}, "cannot have patch_size=2, only 1"),
        ({"output_scale": 2.0}, "cannot have output_scale=2.0"),
        ({"time_embedding": "fourier"}, "cannot have time_embedding='fourier'"),
        ({"downsample": "pool"}, "cannot have downsample='pool'"),
        ({"upsample": "nearest"}, "cannot have upsample='nearest'"),
        ({"blocks_per_level": (1, 2)}, r"cannot have blocks_per_level=\(1, 2\)"),
        ({"num_heads": 2, "attention_levels": (0,)}, r"num_heads=2 on.*\[8, 16\].*Use head_dim"),
    ],
)
def test_what_diffusers_cannot_be_is_named(config, message, tmp_path):
    model = tfd.DiffusionModel(tfd.networks.UNet(**{**OWN, **config}), "linear")
    model.build((None, 8, 8, 1))
    with pytest.raises(ValueError, match=message):
        tfd.convert.to_diffusers(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("level", "arguments", "message"),
    [
        ({"output_scale": 3.0}, {}, r"cannot have encoder\[0\]\.output_scale=3.0"),
        ({"attention": "last", "attention_groups": 4}, {}, "no block with attention='last'"),
        ({"resample": "projected"}, {}, r"cannot have encoder\[0\]\.resample='projected'"),
        ({}, {"time_scale": 0.5}, "cannot have time_scale=0.5; it would be 1.0"),
    ],
)
def test_what_diffusers_has_no_level_for(level, arguments, message):
    first = {"width": 8, "blocks": 1, "groups": 4, "resample": "conv", **level}
    last = {"width": 8, "blocks": 1, "groups": 4}
    network = tfd.networks.UNet2D(
        out_channels=1,
        encoder=[first, last],
        middle=None,
        decoder=[{**last, "blocks": 2, "resample": "conv"}, {**last, "blocks": 2}],
        out_groups=4,
        **arguments,
    )
    network.build({"x": (None, 8, 8, 1), "time": (None,)})
    with pytest.raises(ValueError, match=message):
        unet.configuration(network, 8)


def test_other_models_are_not_written(tmp_path):
    model = tfd.DiffusionModel(tfd.networks.MLP(width=8), "linear")
    with pytest.raises(ValueError, match="no shape yet"):
        tfd.convert.to_diffusers(model, tmp_path / "out")
    model.build((None, 2))
    with pytest.raises(ValueError, match=r"Only a model of images.*\(2,\)"):
        tfd.convert.to_diffusers(model, tmp_path / "out")
    network = tfd.networks.UNet(**OWN)
    with pytest.raises(TypeError, match=r"Only a DiffusionModel.*Received a UNet"):
        tfd.convert.to_diffusers(network, tmp_path / "out")


# ------------------------------------------------------------------------------- the command line


def test_the_command(pipeline, tmp_path, capsys):
    out = tmp_path / "new" / "model.keras"
    assert cli.main(["convert", str(pipeline), str(out)]) == 0
    assert "8x8x1" in capsys.readouterr().out
    assert [file.name for file in out.parent.iterdir()] == ["model.keras"]
    loaded = tfd.models.load(out)
    again = tfd.convert.from_diffusers(pipeline)
    np.testing.assert_array_equal(outputs(loaded, [1, 3]), outputs(again, [1, 3]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out.keras"], "no folder 'nowhere'"),
        (["nowhere", "out.h5"], "must end in .keras"),
        (["x.pth", "out.keras"], "--config goes with a .pth file"),
        (["x.pth", "out.keras", "--config", "vp/cifar10_ddpmpp"], "no file 'x.pth'"),
        (["x", "there.keras"], "is there already. Pass --overwrite"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("there.keras").touch()
    assert cli.main(["convert", *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(os.listdir()) == ["there.keras"]


def test_a_converted_model_needs_no_extra(pipeline, tmp_path):
    """It is made, saved and read back where none of these packages can be imported."""
    path = tmp_path / "model.keras"
    tfd.convert.from_diffusers(pipeline).save(path)
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "safetensors", "huggingface_hub", "diffusers"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import keras, tfdiffusion as tfd
model = keras.saving.load_model({str(path)!r})
assert "tfdiffusion.convert" not in sys.modules
again = tfd.convert.from_diffusers({str(pipeline)!r})
print(again.network.count_params(), model.network.count_params())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    made, read = result.stdout.split()[-2:]
    assert made == read
