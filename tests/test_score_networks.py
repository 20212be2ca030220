"""Score networks: the published architectures' facts, counted and measured."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops
from oracles import numpy

from tfdiffusion.score_matching import NCSN, InstanceNormPlus, NCSNv2, ScoreMLP
from tfdiffusion.score_matching.networks import (
    ChainedResidualPooling,
    RefineBlock,
    ResidualBlock,
    ResidualConvUnits,
    resize_bilinear,
)

SIGMAS = [4.0, 1.0, 0.25]


def built(network, shape=(8, 8, 1)):
    network.build({"x": (None, *shape), "time": (None,)})
    return network


def randomized(layer, scale=0.2):
    """A layer whose weights are none of them zero."""
    rng = np.random.default_rng(0)
    for variable in layer.weights:
        variable.assign(scale * rng.normal(size=variable.shape) + (variable.ndim == 1))
    return layer


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


# Counts, from the tables of the papers' appendices: cascades of residual blocks, then refine blocks
# of residual convolution units (RCU), multi-resolution fusion and chained pooling.


def conv(channels_in, channels_out, kernel=3, bias=True):
    return kernel**2 * channels_in * channels_out + bias * channels_out


def count(w, colours, levels=None):
    """Weights of NCSN with so many levels, or of NCSNv2 where they share their norms."""

    def norm(channels):
        return 3 * channels * (levels or 1)

    def refine_norm(channels):
        return norm(channels) if levels else 0

    def rcu(channels, blocks):
        return 2 * blocks * (conv(channels, channels, bias=False) + refine_norm(channels))

    def residual(a, b, shortcut_kernel=None, inner=None):
        inner = inner or b
        shortcut = conv(a, b, shortcut_kernel) if shortcut_kernel else 0
        return norm(a) + conv(a, inner) + norm(inner) + conv(inner, b) + shortcut

    def refine(inputs, out, last=False):
        adapt = sum(rcu(channels, 2) for channels in inputs)
        fuse = sum(refine_norm(c) + conv(c, out) for c in inputs) if len(inputs) > 1 else 0
        pool = 2 * (refine_norm(out) + conv(out, out, bias=False))
        return adapt + fuse + pool + rcu(out, 3 if last else 1)

    total = conv(colours, w) + norm(w) + conv(w, colours)
    total += 2 * residual(w, w)
    total += residual(w, 2 * w, 1, inner=w) + residual(2 * w, 2 * w)  # halves: a 1×1 shortcut
    total += 2 * (residual(2 * w, 2 * w, 3) + residual(2 * w, 2 * w))  # dilated: 3×3 shortcuts
    total += refine([2 * w], 2 * w) + refine([2 * w, 2 * w], 2 * w)
    return total + refine([2 * w, 2 * w], w) + refine([w, w], w, last=True)


def test_parameters_at_the_published_widths():
    """29.7 million, as the literature says of NCSN and NCSNv2 on CIFAR-10."""
    v2 = built(NCSNv2(np.geomspace(50, 0.01, 232)), (32, 32, 3))
    assert v2.count_params() == count(128, 3)
    assert round(v2.count_params() / 1e6, 1) == 29.7
    v1 = built(NCSN(10), (32, 32, 3))
    assert v1.count_params() == count(128, 3, levels=10)
    mnist = built(NCSN(10, width=64), (28, 28, 1))
    assert mnist.count_params() == count(64, 1, levels=10)
    patched = built(NCSNv2(SIGMAS, width=16, patch_size=2))
    assert patched.count_params() == count(16, 4)


# Norms.


def instance_norm_plus(x, gamma, alpha, beta):
    """In NumPy, from arXiv:1907.05600, app. A.1; the spread over channels is unbiased."""
    mean, variance = x.mean((1, 2)), x.var((1, 2))
    across = (mean - mean.mean(-1, keepdims=True)) / mean.std(-1, ddof=1, keepdims=True)
    inner = (x - mean[:, None, None]) / np.sqrt(variance)[:, None, None]
    return gamma * (inner + alpha * across[:, None, None]) + beta


def test_instance_norm_plus():
    x = 3.0 * images(2, 6, 5, 4) + np.float32([0, 1, -2, 5])
    layer = InstanceNormPlus()
    layer.build(x.shape)
    randomized(layer)
    gamma, alpha, beta = (numpy(v)[0] for v in (layer.gamma, layer.alpha, layer.beta))
    expected = instance_norm_plus(x.astype("float64"), gamma, alpha, beta)
    np.testing.assert_allclose(numpy(layer(x)), expected, atol=1e-4)


def test_what_the_norm_keeps():
    """With γ = 1, β = 0: each channel has variance 1, and its mean is how far it stood out."""
    x = 3.0 * images(2, 16, 16, 4) + np.float32([0, 1, -2, 5])
    layer = InstanceNormPlus()
    layer.build(x.shape)
    for variable, value in ((layer.gamma, 1.0), (layer.alpha, 1.0), (layer.beta, 0.0)):
        variable.assign(np.full(variable.shape, value))
    y = numpy(layer(x))
    np.testing.assert_allclose(y.var((1, 2)), 1.0, atol=1e-3)
    means = y.mean((1, 2))
    np.testing.assert_allclose(means.mean(-1), 0.0, atol=1e-4)
    np.testing.assert_allclose(means.var(-1, ddof=1), 1.0, atol=1e-3)
    assert np.corrcoef(means[0], x[0].mean((0, 1)))[0, 1] > 0.999
    layer.alpha.assign(np.zeros(layer.alpha.shape))  # plain instance normalization: colours gone
    np.testing.assert_allclose(numpy(layer(x)).mean((1, 2)), 0.0, atol=1e-4)
    np.testing.assert_allclose(numpy(layer(10 * x)), numpy(layer(x)), atol=1e-3)


def test_the_conditional_norm_has_its_own_weights_at_each_level():
    x = images(3, 4, 4, 2)
    conditional, plain = InstanceNormPlus(3), InstanceNormPlus()
    conditional.build(x.shape)
    plain.build(x.shape)
    randomized(conditional)
    level = np.array([2, 0, 1], "int32")
    y = numpy(conditional(x, level))
    for row, i in enumerate(level):
        for mine, theirs in zip(plain.weights, conditional.weights):
            mine.assign(numpy(theirs)[i : i + 1])
        np.testing.assert_allclose(y[row], numpy(plain(x[row : row + 1]))[0], atol=1e-5)


# Blocks.


def test_resizing_maps_corners_onto_corners():
    ramp = np.linspace(0, 1, 4)[:, None] + np.linspace(0, 2, 3)[None]
    y = numpy(resize_bilinear(ops.convert_to_tensor(ramp[None, ..., None].astype("float32")), 7, 5))
    expected = np.linspace(0, 1, 7)[:, None] + np.linspace(0, 2, 5)[None]
    np.testing.assert_allclose(y[0, ..., 0], expected, atol=1e-6)
    x = images(2, 3, 3, 2)
    np.testing.assert_array_equal(numpy(resize_bilinear(ops.convert_to_tensor(x), 3, 3)), x)


def reach(layer, size=17):
    """How far, and at which steps, the middle pixel reaches: the offsets of a response."""
    shape = (1, size, size, 2)
    layer.build(shape)
    randomized(layer, 0.5)
    x = np.zeros(shape, "float32")
    y = x.copy()
    y[0, size // 2, size // 2] = 1.0
    changed = np.abs(numpy(layer(y)) - numpy(layer(x))).max((0, 2, 3)) > 1e-6
    return np.flatnonzero(changed) - size // 2


def test_dilations():
    """Convolutions alone (no norms, which look at the whole image) reach as far as they should."""
    plain = ResidualConvUnits(0, 1)
    np.testing.assert_array_equal(reach(plain), np.arange(-2, 3))
    network = built(NCSNv2(SIGMAS, width=8))
    rates = [
        {conv.dilation_rate for block in blocks for conv in (block.conv_1, block.conv_2)}
        for blocks in network.steps.cascades
    ]
    assert rates == [{(1, 1)}, {(1, 1)}, {(2, 2)}, {(4, 4)}]
    assert [blocks[0].shortcut is not None for blocks in network.steps.cascades] == [False] + 3 * [
        True
    ]
    assert all(blocks[1].shortcut is None for blocks in network.steps.cascades)


def test_sizes_of_the_cascades():
    network = built(NCSN(3, width=4), (12, 8, 1))
    x = (None, 12, 8, 4)
    shapes = []
    for blocks in network.steps.cascades:
        for block in blocks:
            x = block.compute_output_shape(x)
        shapes.append(x[1:])
    assert shapes == [(12, 8, 4), (6, 4, 8), (6, 4, 8), (6, 4, 8)]


def test_halving_takes_means():
    """The shortcut of a constant image is that constant's 1×1 convolution, at half the size."""
    block = ResidualBlock(6, None, down=True)
    block.build((None, 4, 4, 3))
    x = np.ones((1, 4, 4, 3), "float32")
    block.conv_2.kernel.assign(np.zeros(block.conv_2.kernel.shape))
    block.conv_2.bias.assign(np.zeros(6))
    y = numpy(block(x))
    assert y.shape == (1, 2, 2, 6)
    kernel, bias = numpy(block.shortcut.kernel)[0, 0], numpy(block.shortcut.bias)
    np.testing.assert_allclose(y, np.broadcast_to(kernel.sum(0) + bias, y.shape), atol=1e-5)


def test_residual_units_are_the_identity_without_their_last_convolution():
    units = ResidualConvUnits(0, 2)
    x = images(2, 4, 4, 3)
    units.build(x.shape)
    for conv_ in units.convs[1::2]:
        conv_.kernel.assign(np.zeros(conv_.kernel.shape))
    np.testing.assert_allclose(numpy(units(x)), x, atol=1e-6)
    assert all(conv_.bias is None for conv_ in units.convs)


@pytest.mark.parametrize("levels", [0, 2])
def test_chained_pooling(levels):
    """Maxima over 5×5 spread a bright pixel two places a stage; means spread it and thin it out."""
    pool = ChainedResidualPooling(levels)
    size, channels = 11, 2
    pool.build((1, size, size, channels))
    identity = np.zeros((3, 3, channels, channels))
    identity[1, 1] = np.eye(channels)
    for conv_ in pool.convs:
        conv_.kernel.assign(identity)
    x = np.zeros((1, size, size, channels), "float32")
    x[0, 5, 5] = 1.0
    level = None if levels == 0 else np.zeros(1, "int32")
    y = numpy(pool(x, level))[0, ..., 0]
    if levels == 0:
        i, j = np.indices((size, size)) - 5
        distance = np.maximum(abs(i), abs(j))
        np.testing.assert_allclose(y, (distance == 0) + 1.0 * (distance <= 2) + (distance <= 4))
    else:
        assert y[5, 5] > y[5, 7] > y[5, 9] and len(pool.norms) == 2


def test_refining_fuses_at_the_size_of_the_larger():
    block = RefineBlock(5, 0)
    shapes = [(None, 8, 8, 4), (None, 4, 4, 6)]
    block.build(shapes)
    y = block([images(2, 8, 8, 4), images(2, 4, 4, 6)])
    assert tuple(y.shape) == (2, 8, 8, 5) == (2, *block.compute_output_shape(shapes)[1:])
    start, end = RefineBlock(6, 0), RefineBlock(6, 0, last=True)
    for layer in (start, end):
        layer.build(shapes[1:])
        assert layer.fuse == []
    assert (start.out.blocks, end.out.blocks) == (1, 3)


# Whole networks.


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("name", ["NCSN", "NCSNv2"])
def test_networks(name, patch_size):
    make = {"NCSN": lambda **k: NCSN(3, **k), "NCSNv2": lambda **k: NCSNv2(SIGMAS, **k)}[name]
    network = built(make(width=4, patch_size=patch_size))
    inputs = {"x": images(3, 8, 8, 1), "time": np.array([0.0, 1.0, 2.0], "float32")}
    y = numpy(network(inputs))
    assert y.shape == (3, 8, 8, 1) and y.dtype == "float32"
    np.testing.assert_array_equal(y, 0.0)  # by initialization
    randomized(network, 0.1)
    y = numpy(network(inputs))
    again = make(width=4, patch_size=patch_size).from_config(network.get_config())
    built(again).set_weights(network.get_weights())
    np.testing.assert_allclose(numpy(again(inputs)), y, atol=1e-5)
    # A row does not see the others, nor rounding errors in the number of its level.
    nearly = {"x": inputs["x"][1:2], "time": np.float32([0.9999999])}
    np.testing.assert_allclose(numpy(network(nearly)), y[1:2], rtol=1e-3, atol=1e-4)
    same = numpy(network({"x": inputs["x"][[0, 0, 0]], "time": inputs["time"]}))
    if name == "NCSNv2":  # one function of x, divided by σ
        np.testing.assert_allclose(
            same * np.reshape(SIGMAS, (3, 1, 1, 1)), same[[0] * 3] * 4.0, rtol=1e-4
        )
    else:
        assert np.abs(same[0] - same[1]).max() > 1e-3


def test_half_precision_networks_answer_in_float32():
    network = built(NCSNv2(SIGMAS, width=4, dtype="mixed_bfloat16"))
    randomized(network, 0.1)
    y = network({"x": images(2, 8, 8, 1), "time": np.zeros(2, "float32")})
    assert keras.backend.standardize_dtype(y.dtype) == "float32"
    assert np.isfinite(numpy(y)).all() and np.abs(numpy(y)).max() > 0


def test_the_mlp_divides_by_sigma():
    network = ScoreMLP(SIGMAS, width=8, depth=1)
    network.build({"x": (None, 2), "time": (None,)})
    randomized(network.body.dense_out)
    x = images(4, 2)
    scaled = x / np.sqrt(1 + 0.25**2)
    level = np.full(4, 2.0, "float32")
    y = numpy(network({"x": x, "time": level}))
    body = numpy(network.body({"x": scaled, "time": level}))
    np.testing.assert_allclose(y, body / 0.25 - x / (1 + 0.25**2), rtol=1e-4, atol=1e-4)
    plain = ScoreMLP(width=8, depth=1)
    assert tuple(plain({"x": x, "time": np.zeros(4, "float32")}).shape) == (4, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NCSN(0), "num_levels"),
        (lambda: NCSN(3, width=-1), "width"),
        (lambda: NCSNv2([1.0, 2.0]), "must fall strictly"),
        (lambda: built(NCSN(3, width=4), (9, 8, 1)), "multiples of 2"),
        (lambda: built(NCSN(3, width=4, patch_size=2), (10, 8, 1)), "multiples of 4"),
        (lambda: built(NCSN(3, width=4), (8,)), "must be images"),
        (lambda: InstanceNormPlus().build((None, 4, 4, 1)), "at least 2 channels"),
        (lambda: NCSN(3, width=4)({"x": images(1, 8, 8, 1)}), "takes a dict"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
