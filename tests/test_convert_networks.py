"""Networks of diffusers in Keras: outputs, gradients, folders, both ways."""

from __future__ import annotations

import json

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st
from keras import ops

import tfdiffusion as tfd
from tfdiffusion.convert import unet

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import parity  # noqa: E402
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: E402

torch.set_num_threads(1)


def configuration_names():
    """All of them, but for what JAX, which compiles operation by operation here, takes minutes."""
    few = ("one level", "scale-shift", "classes")
    for name in parity.CONFIGURATIONS:
        later = keras.backend.backend() == "jax" and name not in few
        yield pytest.param(name, marks=[pytest.mark.slow] if later else [])


@pytest.mark.parametrize("name", configuration_names())
def test_outputs_and_gradients_agree(name):
    config = parity.CONFIGURATIONS[name]
    network = parity.theirs(config)
    converted = parity.ours(network)
    called = parity.inputs(config)
    assert parity.output_error(network, converted, called) <= 1e-5
    errors = parity.gradient_errors(network, converted, called)
    assert len(errors) > 4 and max(errors.values()) <= 1e-4


@pytest.mark.slow
def test_the_full_ddpm_cifar10():
    network = parity.theirs(parity.FULL)
    converted = parity.ours(network)
    assert converted.count_params() == 35_746_307
    called = parity.inputs(parity.FULL, batch=1)
    assert parity.output_error(network, converted, called) <= 1e-5
    assert max(parity.gradient_errors(network, converted, called).values()) <= 1e-4


@st.composite
def configurations(draw):
    """Any configuration that diffusers can run: what depends on what is respected."""
    groups = draw(st.sampled_from([1, 2, 4]))
    levels = draw(st.integers(1, 3))
    kinds = draw(st.sampled_from(["plain", "skip"]))
    width = st.integers(2, 5).map(lambda n: n * groups)
    letters = st.text("PAR", min_size=levels, max_size=levels)
    config = {
        "sample_size": 2 ** (levels + 1),
        "norm_num_groups": groups,
        "layers_per_block": draw(st.integers(1, 2)),
        "in_channels": draw(st.integers(1, 4)),
        "out_channels": draw(st.integers(1, 4)),
        "attention_head_dim": draw(st.sampled_from([None, 1, 2])),
        "downsample_padding": draw(st.integers(0, 1)),
        "downsample_type": draw(st.sampled_from(["conv", "resnet"])),
        "upsample_type": draw(st.sampled_from(["conv", "resnet"])),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6, 1e-3])),
        "mid_block_scale_factor": draw(st.sampled_from([1, 2**0.5])),
        "mid_block_type": draw(st.sampled_from([None, "UNetMidBlock2D"])),
        "add_attention": draw(st.booleans()),
        "center_input_sample": draw(st.booleans()),
        "flip_sin_to_cos": draw(st.booleans()),
        "act_fn": draw(st.sampled_from(["silu", "swish", "gelu", "relu", "mish"])),
        "time_embedding_dim": draw(st.sampled_from([None, 6])),
        "time_embedding_type": draw(st.sampled_from(["positional", "fourier"])),
        "num_class_embeds": draw(st.sampled_from([None, 4])),
    }
    if kinds == "skip":
        letters = st.text("ST", min_size=levels, max_size=levels)
        width = st.sampled_from([32, 64])
        config |= {"in_channels": 3, "out_channels": 3, "norm_num_groups": None}
    widths = tuple(draw(st.lists(width, min_size=levels, max_size=levels)))
    widths = (max(widths[0], 4), *widths[1:]) if kinds == "skip" else (4 * groups, *widths[1:])
    return {**config, **parity._levels(widths, draw(letters), up=draw(letters))}


@pytest.mark.slow
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(configurations())
def test_any_configuration_agrees(config):
    network = parity.theirs(config)
    converted = parity.ours(network)
    called = parity.inputs(config)
    assert parity.output_error(network, converted, called) <= 1e-5
    again = unet.network(unet.configuration(converted, config["sample_size"]))
    unet.assign(list(unet.slots(again)), unet.collect(list(unet.slots(converted))), "the first")
    assert parity.output_error(network, again, called) <= 1e-5


# Folders.


def saved(folder, name, **kwargs):
    """A pipeline with the network of a configuration, saved by diffusers."""
    network = parity.theirs(parity.CONFIGURATIONS[name])
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder, **kwargs)
    return network


@pytest.mark.parametrize("name", ["classes", "other blocks down than up", "scale-shift"])
def test_there_and_back_again(name, tmp_path):
    network = saved(tmp_path / "theirs", name)
    model = tfd.convert.from_diffusers(tmp_path / "theirs")
    called = parity.inputs(parity.CONFIGURATIONS[name])
    assert parity.output_error(network, model.network, called) <= 1e-5
    tfd.convert.to_diffusers(model, tmp_path / "ours")
    again = DDPMPipeline.from_pretrained(tmp_path / "ours")
    assert isinstance(again.scheduler, DDPMScheduler)
    for (key, mine), theirs in zip(again.unet.state_dict().items(), network.state_dict().values()):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=key)
    # Not the names of blocks: at the last level, which does not resample, two of them are one.
    assert unet.arguments(dict(again.unet.config)) == unet.arguments(dict(network.config))
    assert again.unet.config.sample_size == network.config.sample_size


def test_the_converted_model_survives_saving(tmp_path):
    name = "classes as times"
    converted = parity.ours(parity.theirs(parity.CONFIGURATIONS[name]))
    converted.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    called = parity.inputs(parity.CONFIGURATIONS[name])
    np.testing.assert_array_equal(
        ops.convert_to_numpy(loaded(called)), ops.convert_to_numpy(converted(called))
    )


OWN = {"out_channels": 1, "widths": (8, 16), "blocks_per_level": 1, "groups": 4}
RESNET = {
    "attention_levels": (0,),
    "downsample": "resnet",
    "upsample": "resnet",
    "scale_shift": True,
    "mid_attention": False,
}
HEADS = {"downsample_padding": 1, "num_heads": 2, "freq_shift": 0, "flip_sin_to_cos": True}


@pytest.mark.parametrize("config", [RESNET, HEADS], ids=["resnet", "heads"])
def test_a_network_of_ours_is_used_there(config, tmp_path):
    model = tfd.DiffusionModel(tfd.networks.UNet(**{**OWN, **config}), "linear")
    model.build((None, 8, 8, 1))
    generator = np.random.default_rng(0)
    for weight in model.network.trainable_weights:
        weight.assign(ops.convert_to_numpy(weight) + 0.1 * generator.normal(size=weight.shape))
    pipeline = DDPMPipeline.from_pretrained(tfd.convert.to_diffusers(model, tmp_path / "out"))
    x = generator.normal(size=(2, 8, 8, 1)).astype("float32")
    called = {"x": x, "time": np.array([0.0, 999.0], "float32")}
    assert parity.output_error(pipeline.unet, model.network, called) <= 1e-5


def test_a_model_trained_here_is_used_there(tmp_path):
    """`fit`, `to_diffusers`, and diffusers' pipeline has the averaged network."""
    network = tfd.networks.UNet(**OWN, attention_levels=(1,), head_dim=4, num_classes=2)
    model = tfd.DiffusionModel(network, "linear", ema_decay=0.5)
    model.compile(keras.optimizers.Adam(1e-2), run_eagerly=True)  # four steps are soon done
    generator = np.random.default_rng(0)
    images = generator.uniform(-1, 1, (8, 8, 8, 1)).astype("float32")
    model.fit(images, generator.integers(0, 2, 8), batch_size=4, verbose=0)
    pipeline = DDPMPipeline.from_pretrained(tfd.convert.to_diffusers(model, tmp_path / "out"))
    assert type(pipeline.unet) is UNet2DModel and pipeline.unet.config.sample_size == 8
    label = np.array([1, 2], "int32")  # 2 is "no label"
    called = {"x": images[:2], "time": np.array([0.0, 999.0], "float32"), "label": label}
    averaged = model.averaged().network
    assert parity.output_error(pipeline.unet, averaged, called) <= 1e-5
    assert parity.output_error(pipeline.unet, model.network, called) > 1e-3


# Files as there are.


def legacy(state):
    """Names of attention before diffusers 0.15."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in names.items():
        state = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in state.items()}
    return state


def test_an_old_file(tmp_path):
    """Pickled, with the old names of attention, without `attention_head_dim`."""
    config = {**parity.CONFIGURATIONS["attention everywhere, one head"], "attention_head_dim": 8}
    network = parity.theirs(config)
    network.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    state = legacy(network.state_dict())
    assert any(".proj_attn." in name for name in state)
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    written = json.loads((tmp_path / "config.json").read_text())
    del written["attention_head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    model = tfd.convert.from_diffusers(tmp_path)
    called = parity.inputs(config)
    assert parity.output_error(network, model.network, called) <= 1e-5
    # And diffusers says the same of this folder.
    theirs = UNet2DModel.from_pretrained(tmp_path, use_safetensors=False)
    assert theirs.config.attention_head_dim == 8
    assert parity.output_error(theirs, model.network, called) <= 1e-5


@pytest.mark.parametrize(
    ("kwargs", "tolerance"),
    [({"max_shard_size": "40KB"}, 1e-5), ({"variant": "fp16"}, 1e-5)],
    ids=["shards", "variant"],
)
def test_other_files(kwargs, tolerance, tmp_path):
    name = "attention everywhere, one head"
    network = parity.theirs(parity.CONFIGURATIONS[name])
    network.save_pretrained(tmp_path, **kwargs)
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    converted = tfd.convert.read_network(tmp_path)
    called = parity.inputs(parity.CONFIGURATIONS[name])
    assert parity.output_error(network, converted, called) <= tolerance


def test_half_precision_is_read_in_full(tmp_path):
    name = "attention everywhere, one head"
    network = parity.theirs(parity.CONFIGURATIONS[name])
    network.to(torch.bfloat16).save_pretrained(tmp_path)
    converted = tfd.convert.read_network(tmp_path)
    called = parity.inputs(parity.CONFIGURATIONS[name])
    assert parity.output_error(network.float(), converted, called) <= 1e-5
