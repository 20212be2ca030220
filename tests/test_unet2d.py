"""The U-Net that is made level by level, its blocks, and the filter that it resamples with."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops
from oracles import numpy

from tfdiffusion import _backend, networks

LEVEL = {"width": 8, "blocks": 1, "groups": 4, "attention_groups": 4}
PLAIN = {
    "out_channels": 2,
    "encoder": [{**LEVEL, "resample": "conv"}, {**LEVEL, "attention": "each"}],
    "middle": {**LEVEL, "blocks": 2, "attention": "each", "head_dim": 2},
    "decoder": [
        {**LEVEL, "blocks": 2, "attention": "last", "resample": "conv"},
        {**LEVEL, "blocks": 2},
    ],
    "out_groups": 4,
}
SKIP = {"width": 8, "blocks": 1, "groups": "quarter", "pyramid": "skip", "output_scale": 2.0}
PYRAMIDS = {
    "out_channels": 3,
    "encoder": [
        {**SKIP, "resample": "smooth"},
        {**SKIP, "resample": "projected", "pyramid": "residual"},
        {**SKIP, "pyramid": None},
    ],
    "middle": None,
    "decoder": [
        {**SKIP, "blocks": 2, "resample": "smooth"},
        {**SKIP, "blocks": 2, "resample": "residual"},
        {**SKIP, "blocks": 2},
    ],
    "out_groups": "quarter",
    "time_embedding": "fourier",
    "divide_by_sigma": True,
    "dropout": 0.5,
}


def ready(config, channels=3, **kwargs):
    """A built network with weights that are not zero."""
    keras.utils.set_random_seed(0)
    network = networks.UNet2D(**config, **kwargs)
    network.build({"x": (None, None, None, channels), "time": (None,)})
    generator = np.random.default_rng(0)
    for weight in network.trainable_weights:
        weight.assign(numpy(weight) + 0.1 * generator.normal(size=weight.shape))
    return network


def inputs():
    x = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype("float32")
    return {"x": x, "time": np.array([1.5, 40.0], "float32")}


@pytest.mark.parametrize("config", [PLAIN, PYRAMIDS], ids=["plain", "pyramids"])
def test_it_is_saved_and_compiled(config, tmp_path):
    network, called = ready(config), inputs()
    output = numpy(network(called))
    assert output.shape == (2, 8, 8, config["out_channels"]) and output.dtype == "float32"
    assert network.compute_output_shape({"x": (2, 8, 8, 3)}) == output.shape
    compiled = _backend.compiled(network, network.variables)
    np.testing.assert_allclose(numpy(compiled(called)), output, rtol=1e-4, atol=1e-4)
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    np.testing.assert_array_equal(numpy(loaded(called)), output)
    assert loaded.get_config() == network.get_config()


def test_each_row_is_computed_alone():
    network, called = ready(PYRAMIDS), inputs()
    alone = [network({name: value[i : i + 1] for name, value in called.items()}) for i in (0, 1)]
    both = np.concatenate([numpy(output) for output in alone])
    np.testing.assert_allclose(numpy(network(called)), both, rtol=1e-4, atol=1e-4)


def test_precision_and_dropout():
    network, called = ready(PYRAMIDS), inputs()
    expected = numpy(network(called))
    half = networks.UNet2D(**PYRAMIDS, dtype="mixed_bfloat16")
    half.build({"x": (None, None, None, 3), "time": (None,)})
    half.set_weights(network.get_weights())
    output = numpy(half(called))
    assert output.dtype == "float32"
    difference = np.sqrt(np.mean((output - expected) ** 2)) / np.std(expected)
    assert 0.0 < difference < 0.05
    assert np.abs(numpy(network(called, training=True)) - expected).max() > 1e-4


def test_a_score_is_divided_by_sigma():
    network, called = ready(PYRAMIDS), inputs()
    whole = networks.UNet2D(**{**PYRAMIDS, "divide_by_sigma": False})
    whole.build({"x": (None, None, None, 3), "time": (None,)})
    whole.set_weights(network.get_weights())
    divided = numpy(whole(called)) / called["time"][:, None, None, None]
    np.testing.assert_allclose(numpy(network(called)), divided, rtol=1e-6)


def test_time_is_scaled_and_shifted_before_it_is_embedded():
    called = inputs()
    plain, moved = ready(PLAIN), ready({**PLAIN, "time_scale": 0.5, "time_shift": 3.0})
    told = {**called, "time": 0.5 * called["time"] + 3.0}
    np.testing.assert_array_equal(numpy(moved(called)), numpy(plain(told)))


# The filter (1, 3, 3, 1)/8, against a convolution written out.


def convolved(x, taps):
    return np.array([np.dot(taps, x[i : i + 4]) for i in range(len(x) - 3)])


def along_both_axes(image, function):
    image = np.apply_along_axis(function, 0, image)
    return np.apply_along_axis(function, 1, image)


TAPS = np.array([1.0, 3.0, 3.0, 1.0]) / 8.0


def test_smooth_downsampling():
    x = np.random.default_rng(0).normal(size=(2, 6, 4, 3)).astype("float32")

    def down(row):
        return convolved(np.pad(row, 1), TAPS)[::2]

    expected = np.stack([along_both_axes(image, down) for image in x])
    layer = networks.Downsample("fir")
    np.testing.assert_allclose(numpy(layer(x)), expected, atol=1e-6)
    assert layer.compute_output_shape(x.shape) == expected.shape


def test_smooth_upsampling():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 3)).astype("float32")

    def up(row):
        spread = np.zeros(2 * len(row))
        spread[::2] = row
        return convolved(np.pad(spread, (2, 1)), 2.0 * TAPS)

    expected = np.stack([along_both_axes(image, up) for image in x])
    layer = networks.Upsample("fir")
    np.testing.assert_allclose(numpy(layer(x)), expected, atol=1e-6)
    assert layer.compute_output_shape(x.shape) == expected.shape


def test_smooth_strided_convolution():
    """With a kernel that is one in the middle, it is the filter at every other pixel."""
    x = np.random.default_rng(0).normal(size=(1, 6, 6, 2)).astype("float32")
    layer = networks.Downsample("fir_conv", width=5)
    layer.build(x.shape)
    kernel = np.zeros((3, 3, 2, 5), "float32")
    kernel[1, 1, 0, 0] = kernel[1, 1, 1, 4] = 1.0
    layer.conv.kernel.assign(kernel)

    def down(row):
        return convolved(np.pad(row, 1), TAPS)[::2]

    output = numpy(layer(x))
    assert output.shape == layer.compute_output_shape(x.shape) == (1, 3, 3, 5)
    expected = along_both_axes(x[0], down)
    np.testing.assert_allclose(output[0, :, :, [0, 4]].transpose(1, 2, 0), expected, atol=1e-6)


# What is refused.


def changed(side, number, **changes):
    levels = [dict(level) for level in PLAIN[side]]
    levels[number] |= changes
    return {**PLAIN, side: levels}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**PLAIN, "encoder": []}, "at least one"),
        (changed("encoder", 0, resample=None), "Every level of `encoder` but the last"),
        (changed("decoder", 1, resample="conv"), "Every level of `decoder` but the last"),
        (changed("decoder", 0, blocks=3), "for each of the 4 skips.*Received: 5 blocks"),
        ({**PLAIN, "decoder": [PLAIN["decoder"][1]]}, "as many levels. Received: 2 and 1"),
        (changed("decoder", 0, pyramid="skip"), "must go on to its last level"),
        (changed("decoder", 1, pyramid="residual"), "of kind 'skip'"),
        (changed("encoder", 0, attention="all"), "`attention` must be one of"),
        (changed("encoder", 0, resample="pool"), "`resample` must be one of"),
        (changed("encoder", 0, groups="third"), "`groups` must be one of 'quarter'"),
        (changed("encoder", 1, head_dim=16), "`head_dim` must be at most the width.*16.*8"),
        (changed("encoder", 0, width=0), "`width` must be a positive integer"),
        ({**PLAIN, "label": "class"}, "`num_classes` goes with label='class'"),
        ({**PLAIN, "num_classes": 3}, "`num_classes` goes with label='class'"),
        ({**PLAIN, "label": "text"}, "`label` must be one of"),
        ({**PLAIN, "activation": "tanh"}, "`activation` must be one of"),
        ({**PLAIN, "time_embedding": "learned"}, "`num_times` must be a positive integer"),
        ({**PLAIN, "freq_shift": 4}, "another number than `freq_shift`"),
    ],
)
def test_bad_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        networks.UNet2D(**config)


def test_pyramids_begin_with_the_image():
    levels = [{**SKIP, "resample": "smooth", "pyramid": kind} for kind in (None, "skip")]
    last, decoder = {**SKIP, "pyramid": None}, PYRAMIDS["decoder"]
    with pytest.raises(ValueError, match="must begin at the first level"):
        networks.UNet2D(**{**PYRAMIDS, "encoder": [*levels, last], "decoder": decoder})


def test_wrong_inputs_are_refused():
    network = ready(PLAIN)
    with pytest.raises(ValueError, match=r"takes a dict with \['time', 'x'\]"):
        network({**inputs(), "label": np.array([1, 2])})
    with pytest.raises(ValueError, match=r"multiples of 2. Received: 7x8"):
        networks.UNet2D(**PLAIN).build({"x": (None, 7, 8, 3), "time": (None,)})
    with pytest.raises(ValueError, match=r"images \(B, H, W, C\)"):
        networks.UNet2D(**PLAIN).build({"x": (None, 8), "time": (None,)})


def test_odd_features_end_in_zero():
    features = networks.blocks.TimeFeatures("sinusoidal", 7, freq_shift=1)
    encoded = numpy(features(ops.convert_to_tensor([3.0, 11.0])))
    assert encoded.shape == (2, 7) and not encoded[:, -1].any() and encoded[:, :-1].all()
