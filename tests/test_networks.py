"""The networks against formulas, other layers and the laws that every network keeps."""

from __future__ import annotations

import functools
import weakref

import keras
import numpy as np
import pytest
from keras import ops

from tfdiffusion import _backend, networks
from tfdiffusion.networks import MLP, GroupNormalization, TimeEmbedding, UNet
from tfdiffusion.networks.unet import from_patches, to_patches

CLASSES = 5
UNET = {"out_channels": 3, "widths": (8, 8), "blocks_per_level": 1, "groups": 4}


def unet(**config):
    return UNet(**{**UNET, **config})


def mlp(**config):
    return MLP(**{"width": 8, "depth": 2, **config})


def unet_attention(**config):
    return unet(attention_levels=(1,), num_heads=2, **config)


def unet_resnet(**config):
    other = {"downsample": "resnet", "upsample": "resnet", "scale_shift": True, "dropout": 0.5}
    other |= {"time_embedding": "fourier", "output_scale": 2.0, "mid_attention": False}
    return unet_attention(**other, **config)


MAKE = {"unet-attention": unet_attention, "unet-resnet": unet_resnet, "mlp": mlp}


def inputs(network, batch=3):
    """A batch for `network`; the last label is the null label."""
    rng = np.random.default_rng(0)
    shape = (batch, 4, 4, 3) if isinstance(network, UNet) else (batch, 2)
    # The random frequencies are high, so that large times are only known to a part of a period.
    last = 4.0 if network.time_embedding.kind == "fourier" else 999.0
    data = {
        "x": rng.normal(size=shape).astype("float32"),
        "time": np.linspace(0.5, last, batch).astype("float32"),
    }
    if network.num_classes is not None:
        data["label"] = np.arange(CLASSES + 1 - batch, CLASSES + 1).astype("int32")
    return data


def shapes(data):
    return {name: (None, *value.shape[1:]) for name, value in data.items()}


def randomize(network, seed=0):
    """Move all weights off their initial values, of which some are zero."""
    rng = np.random.default_rng(seed)
    for weight in network.trainable_variables:
        weight.assign(weight + 0.1 * rng.normal(size=weight.shape).astype("float32"))
    return network


def ready(network, seed=0):
    network.build(shapes(inputs(network)))
    return randomize(network, seed)


def numpy_of(x):
    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")))


def compiled(function):
    """`function` of a dict of arrays, compiled; on TensorFlow for any batch size."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    traced = []

    def call(data):
        if not traced:
            specs = {n: tf.TensorSpec((None, *v.shape[1:]), v.dtype) for n, v in data.items()}
            traced.append(tf.function(function, input_signature=[specs]))
        return traced[0]({name: tf.convert_to_tensor(value) for name, value in data.items()})

    return call


RUNNERS = weakref.WeakKeyDictionary()


def run(network, data):
    """`network(data)`, compiled once per network, as an array."""
    if network not in RUNNERS:
        reference = weakref.proxy(network)
        if keras.backend.backend() == "jax":
            import jax

            RUNNERS[network] = jax.jit(lambda *arguments: reference.stateless_call(*arguments)[0])
        else:
            RUNNERS[network] = compiled(lambda data: reference(data, training=False))
    state = ()
    if keras.backend.backend() == "jax":  # where a compiled function must be told the weights
        state = (
            [v.value for v in network.trainable_variables],
            [v.value for v in network.non_trainable_variables],
        )
    return np.asarray(ops.convert_to_numpy(RUNNERS[network](*state, data)))


@pytest.fixture(params=MAKE)
def make(request):
    return MAKE[request.param]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Most of the time goes into compiling small networks."""
    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@functools.cache
def shared(name):
    """A conditional network with random weights, and the output that it had before those."""
    network = MAKE[name](num_classes=CLASSES)
    data = inputs(network)
    network.build(shapes(data))
    fresh = run(network, data)
    return randomize(network), fresh


@pytest.fixture(params=MAKE)
def network(request):
    """Tests leave it as it is."""
    return shared(request.param)[0]


# For the tests that have to compile the network once more.
fewer_networks = pytest.mark.parametrize("network", ["unet-resnet", "mlp"], indirect=True)


# Layers against oracles.


@pytest.mark.parametrize("freq_shift", [0, 1])
@pytest.mark.parametrize("flip", [False, True])
def test_sinusoidal_embedding_is_the_published_formula(freq_shift, flip):
    times, half = [0.0, 1.0, 7.25, 999.0], 16
    expected = np.zeros((len(times), 2 * half))
    for row, time in enumerate(times):
        for i in range(half):
            angle = time * 10000.0 ** (-i / (half - freq_shift))
            sin, cos = (i + half, i) if flip else (i, i + half)
            expected[row, sin], expected[row, cos] = np.sin(angle), np.cos(angle)
    layer = TimeEmbedding(8, features=2 * half, freq_shift=freq_shift, flip_sin_to_cos=flip)
    actual = layer.encode(ops.convert_to_tensor(np.array(times, "float32")))
    np.testing.assert_allclose(numpy_of(actual), expected, atol=1e-4)


def test_fourier_embedding_is_the_published_formula():
    layer = TimeEmbedding(8, features=6, kind="fourier", fourier_scale=2.0)
    layer.build((None,))
    log_sigma = np.array([-4.6, 0.0, 3.9], "float32")
    angles = 2 * np.pi * log_sigma[:, None] * numpy_of(layer.frequencies)[None, :]
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(numpy_of(layer.encode(log_sigma)), expected, atol=1e-4)
    assert [w.name for w in layer.non_trainable_weights] == ["frequencies"]


def value_and_gradients(function, arguments):
    """`function(*arguments)` and its gradients, on either backend."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        arguments = [tf.convert_to_tensor(a) for a in arguments]
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            value = function(*arguments)
        return value, tape.gradient(value, arguments)
    import jax

    argnums = tuple(range(len(arguments)))
    return jax.jit(jax.value_and_grad(function, argnums=argnums))(*arguments)


def stateless(layer, x, gamma, beta):
    scope = keras.StatelessScope(state_mapping=[(layer.gamma, gamma), (layer.beta, beta)])
    with scope:
        return layer(x)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_group_normalization_agrees_with_keras(offset):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(2, 6, 5, 12)) + offset).astype("float32")
    gamma, beta, mix = (rng.normal(size=s).astype("float32") for s in [12, 12, x.shape])
    results = []
    for layer in (
        GroupNormalization(3, epsilon=1e-6),
        keras.layers.GroupNormalization(3, epsilon=1e-6),
    ):
        layer.build(x.shape)

        def loss(x, gamma, beta, layer=layer):
            return ops.sum(mix * ops.sin(stateless(layer, x, gamma, beta)))

        output = numpy_of(stateless(layer, x, gamma, beta))
        results.append([output, *map(numpy_of, value_and_gradients(loss, [x, gamma, beta])[1])])
    for ours, theirs in zip(*results):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 + 1e-5 * offset, rtol=1e-5)


def test_group_normalization_does_not_cancel():
    """E[x^2] - E[x]^2 in float32 is off by more than the variance here."""
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 8)) + 3000.0
    x = x.astype("float32")
    groups = x.astype("float64").reshape(2, 64, 2, 4)
    moments = {"axis": (1, 3), "keepdims": True}
    expected = (groups - groups.mean(**moments)) / np.sqrt(groups.var(**moments) + 1e-6)
    layer = GroupNormalization(2)
    np.testing.assert_allclose(numpy_of(layer(x)), expected.reshape(x.shape), atol=1e-3)


def test_group_normalization_has_the_right_second_derivative():
    """Along a line, against finite differences in float64 of the definition."""
    rng = np.random.default_rng(0)
    x, direction, mix = rng.normal(size=(3, 1, 2, 2, 4))

    def definition(s):
        y = (x + s * direction).reshape(4, 2, 2)
        y = (y - y.mean((0, 2), keepdims=True)) / np.sqrt(y.var((0, 2), keepdims=True) + 1e-6)
        return (mix * y.reshape(x.shape)).sum()

    h = 1e-3
    expected = (definition(h) - 2 * definition(0) + definition(-h)) / h**2
    layer = GroupNormalization(2)
    layer.build(x.shape)
    x, direction, mix = (a.astype("float32") for a in (x, direction, mix))

    def along(s):
        return ops.sum(mix * layer(x + s * direction))

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        s = tf.constant(0.0)
        with tf.GradientTape() as outer:
            outer.watch(s)
            with tf.GradientTape() as inner:
                inner.watch(s)
                value = along(s)
            slope = inner.gradient(value, s)
        actual = outer.gradient(slope, s)
    else:
        import jax

        actual = jax.jacfwd(jax.grad(along))(0.0)
    np.testing.assert_allclose(float(actual), expected, rtol=1e-3)


def test_networks_for_points_have_the_right_second_derivative():
    """Against differences of the first: score matching trains on it."""
    network = ready(mlp())
    time = np.array([10.0, 500.0, 900.0], "float32")
    x, v = np.random.default_rng(3).normal(size=(2, 3, 2)).astype("float32")

    def gradient(x):
        call = lambda x: ops.sum(network({"x": x, "time": time}) ** 2, axis=-1)  # noqa: E731
        return _backend.vjp(call, x, ops.ones((3,)))[1]

    product = numpy_of(_backend.vjp(gradient, x, v)[1])
    step = 1e-2
    ahead, behind = (numpy_of(gradient(x + sign * step * v)) for sign in (1, -1))
    np.testing.assert_allclose(product, (ahead - behind) / (2 * step), rtol=0.02, atol=0.003)
    assert np.abs(product).max() > 0.05


def test_group_normalization_modulates_and_activates():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 3, 8)).astype("float32")
    scale, shift = rng.normal(size=(2, 2, 8)).astype("float32")
    plain, fused = GroupNormalization(2), GroupNormalization(2, activation="silu")
    y = numpy_of(plain(x)) * (1 + scale[:, None, None]) + shift[:, None, None]
    actual = fused(x, scale=scale, shift=shift)
    np.testing.assert_allclose(numpy_of(actual), y / (1 + np.exp(-y)), atol=1e-5)


@pytest.mark.parametrize("heads", [{}, {"num_heads": 2}, {"head_dim": 2}])
def test_attention_is_the_published_formula(heads):
    layer = networks.SelfAttention(groups=2, output_scale=2.0, **heads)
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 8)).astype("float32")
    layer.build(x.shape)
    randomize(layer)
    count, size = {"num_heads": (2, 4), "head_dim": (4, 2)}.get(next(iter(heads), None), (1, 8))
    flat = numpy_of(layer.norm(x)).reshape(2, 6, 8)
    project = {
        name: flat @ numpy_of(getattr(layer, name).kernel) + numpy_of(getattr(layer, name).bias)
        for name in ("query", "key", "value")
    }
    mixed = np.zeros_like(flat)
    for head in range(count):
        part = slice(head * size, (head + 1) * size)
        q, k, v = (project[name][..., part] for name in ("query", "key", "value"))
        weights = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(size))
        mixed[..., part] = weights / weights.sum(-1, keepdims=True) @ v
    out = mixed @ numpy_of(layer.project.kernel) + numpy_of(layer.project.bias)
    np.testing.assert_allclose(numpy_of(layer(x)), (x + out.reshape(x.shape)) / 2, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 1])
def test_downsampling_pads_where_it_says(padding):
    layer = networks.Downsample("conv", padding=padding)
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 2)).astype("float32")
    layer.build(x.shape)
    kernel = numpy_of(layer.conv.kernel)
    before, after = (1, 1) if padding else (0, 1)
    padded = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    expected = np.zeros((1, 2, 2, 2))
    for i in range(2):
        for j in range(2):
            window = padded[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            expected[0, i, j] = np.einsum("ijc,ijcd->d", window, kernel)
    np.testing.assert_allclose(numpy_of(layer(x)), expected, atol=1e-5)


def test_upsampling_repeats_each_pixel():
    x = np.arange(4.0, dtype="float32").reshape(1, 2, 2, 1)
    actual = numpy_of(networks.Upsample("nearest")(x))[0, :, :, 0]
    np.testing.assert_array_equal(actual, np.kron(x[0, :, :, 0], np.ones((2, 2))))


@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_a_fresh_residual_block_is_its_shortcut(resample):
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 8)).astype("float32")
    layer = networks.ResidualBlock(8, groups=4, resample=resample, output_scale=2.0)
    expected = {
        None: x,
        "down": x.reshape(2, 2, 2, 2, 2, 8).mean((2, 4)),
        "up": x.repeat(2, axis=1).repeat(2, axis=2),
    }[resample]
    actual = layer(x, np.ones((2, 5), "float32"))
    np.testing.assert_allclose(numpy_of(actual), expected / 2, atol=1e-6)
    assert layer.compute_output_shape(x.shape) == expected.shape


# Laws of whole networks.


def test_ddpm_cifar10_has_the_published_number_of_parameters():
    network = UNet(out_channels=3, widths=(128, 256, 256, 256), attention_levels=(1,))
    network.build({"x": (None, 32, 32, 3), "time": (None,)})
    assert network.count_params() == 35_746_307
    assert len(network.weights) == 328


@pytest.mark.parametrize("name", MAKE)
def test_a_fresh_network_is_zero(name):
    network, fresh = shared(name)
    data = inputs(network)
    np.testing.assert_array_equal(fresh, np.zeros_like(data["x"]))
    assert tuple(network.compute_output_shape(shapes(data))) == (None, *data["x"].shape[1:])


def test_build_makes_all_weights(network):
    """So weights load into a network that was never called."""
    count = len(network.weights)
    run(network, inputs(network))
    assert len(network.weights) == count
    assert all(layer.built for layer in network._flatten_layers())


@fewer_networks
def test_saved_networks_load_with_the_same_outputs(network, tmp_path):
    network.save(tmp_path / "network.keras")
    loaded = keras.models.load_model(tmp_path / "network.keras")
    assert loaded.get_config() == network.get_config()
    data = inputs(network)
    np.testing.assert_array_equal(run(loaded, data), run(network, data))


def test_saved_networks_keep_their_dtype_policy(tmp_path):
    network = ready(mlp(dtype="mixed_bfloat16"))
    network.save(tmp_path / "network.keras")
    loaded = keras.models.load_model(tmp_path / "network.keras")
    assert loaded.dtype_policy.name == loaded.dense_in.dtype_policy.name == "mixed_bfloat16"


@pytest.mark.parametrize(
    "layer",
    [
        GroupNormalization(4, epsilon=1e-5, activation="silu"),
        TimeEmbedding(8, features=6, kind="fourier", freq_shift=0, flip_sin_to_cos=True),
        networks.SelfAttention(num_heads=2, groups=4, norm_epsilon=1e-5, output_scale=2.0),
        networks.Downsample("pool", padding=1),
        networks.Upsample("nearest"),
        networks.ResidualBlock(8, groups=4, scale_shift=True, resample="up", dropout=0.5),
        networks.ResidualDense(8),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_survive_serialization(layer):
    config = keras.saving.serialize_keras_object(layer)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()


def test_each_row_is_computed_alone(network):
    """Any batch size will do, no statistic of the batch enters, and nothing needs compiling."""
    data = inputs(network)
    together = run(network, data)
    alone = run(network, {name: value[1:2] for name, value in data.items()})
    np.testing.assert_allclose(alone[0], together[1], atol=1e-5, rtol=1e-5)
    if isinstance(network, MLP):
        np.testing.assert_allclose(numpy_of(network(data)), together, atol=1e-5, rtol=1e-5)


def test_time_and_label_matter(network):
    data = inputs(network)
    output = run(network, data)
    later = {**data, "time": data["time"] + np.float32(1.3)}
    other = {**data, "label": (data["label"] + 1) % (CLASSES + 1)}
    for changed in (later, other):
        difference = np.abs(run(network, changed) - output)
        assert (difference.reshape(3, -1).max(1) > 1e-6).all()


def test_the_null_label_has_its_own_row(network):
    data = inputs(network)  # labels 3, 4 and 5, which is null
    before, table = run(network, data), network.label_embedding.embeddings
    original = numpy_of(table)
    assert original.shape[0] == CLASSES + 1
    moved = original.copy()
    moved[CLASSES] += 1.0
    table.assign(moved)
    after = run(network, data)
    table.assign(original)
    np.testing.assert_array_equal(after[:2], before[:2])
    assert np.abs(after[2] - before[2]).max() > 1e-6


@pytest.mark.parametrize(
    ("name", "policy"), [("unet-attention", "mixed_bfloat16"), ("mlp", "mixed_float16")]
)
def test_dtype_policies(name, policy):
    reference = shared(name)[0]
    network = ready(MAKE[name](num_classes=CLASSES, dtype=policy))
    network.set_weights(reference.get_weights())
    data = inputs(network)
    expected, output = run(reference, data), run(network, data)
    assert output.dtype == np.float32
    error = output - expected
    assert np.sqrt(np.mean(error**2)) < 0.03 * np.std(expected)
    assert np.abs(error).max() > 0  # it did compute in the lower precision


def test_times_keep_their_digits_under_mixed_precision():
    """999 and 1000 are the same number in bfloat16."""
    network = ready(mlp(dtype="mixed_bfloat16"))
    data = {"x": np.zeros((2, 2), "float32"), "time": np.array([999.0, 1000.0], "float32")}
    first, second = run(network, data)
    assert np.abs(first - second).max() > 0


def test_dropout_is_active_only_in_training():
    layer = networks.ResidualBlock(8, groups=4, dropout=0.5)
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 8)).astype("float32")
    layer.build(x.shape)
    randomize(layer)
    still = numpy_of(layer(x))
    np.testing.assert_array_equal(numpy_of(layer(x)), still)
    assert np.abs(numpy_of(layer(x, training=True)) - still).max() > 1e-4


@fewer_networks
def test_runs_inside_a_compiled_loop(network):
    def loop(data):
        def body(_, x):
            return x + 0.1 * network({**data, "x": x})

        return ops.fori_loop(0, 2, body, data["x"])

    data = inputs(network)
    expected = data["x"]
    for _ in range(2):
        expected = expected + np.float32(0.1) * run(network, {**data, "x": expected})
    np.testing.assert_allclose(numpy_of(compiled(loop)(data)), expected, atol=1e-4)


@fewer_networks
def test_weights_can_be_substituted(network):
    """As EMA weights are: the output follows them and the variables stay."""
    data, original = inputs(network), network.get_weights()
    randomize(network, seed=1)
    others, expected = network.get_weights(), run(network, data)
    network.set_weights(original)
    mapping = [(v, ops.convert_to_tensor(other)) for v, other in zip(network.weights, others)]

    def substituted(data):
        with keras.StatelessScope(state_mapping=mapping):
            return network(data)

    output = numpy_of(compiled(substituted)(data))
    np.testing.assert_allclose(output, expected, atol=1e-4, rtol=1e-4)
    assert all(np.array_equal(a, b) for a, b in zip(original, network.get_weights()))


@fewer_networks
def test_all_weights_are_trained(network):
    """Every trainable weight has a gradient once the last layers have left zero."""
    data = inputs(network)

    def loss(*weights):
        with keras.StatelessScope(state_mapping=list(zip(network.trainable_variables, weights))):
            return ops.mean(ops.square(network(data) - 1.0))

    weights = [ops.convert_to_tensor(w.value) for w in network.trainable_variables]
    _, gradients = value_and_gradients(loss, weights)
    # A key's bias adds the same to all scores of a query, which the softmax does not see.
    unused = [
        weight.path
        for weight, gradient in zip(network.trainable_variables, gradients)
        if not np.abs(numpy_of(gradient)).max() > 0 and "key/bias" not in weight.path
    ]
    assert unused == []


# Sizes and configurations.


def test_28_by_28_has_three_levels():
    network = UNet(out_channels=1, widths=(8, 8, 8), blocks_per_level=1, groups=4)
    network.build({"x": (None, 28, 28, 1), "time": (None,)})
    data = {"x": np.zeros((1, 28, 28, 1), "float32"), "time": np.zeros(1, "float32")}
    assert run(network, data).shape == (1, 28, 28, 1)


def test_patches_are_blocks_of_pixels():
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype("float32")
    patches = numpy_of(to_patches(x, 2))
    np.testing.assert_array_equal(patches[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(numpy_of(from_patches(patches, 2)), x)
    network = unet(patch_size=2, widths=(8,))
    network.build({"x": (None, 4, 6, 3), "time": (None,)})
    assert network.conv_in.kernel.shape[2] == network.conv_out.kernel.shape[3] == 12
    assert run(network, {"x": x, "time": np.ones(2, "float32")}).shape == x.shape
    with pytest.raises(ValueError, match=r"patches of 2.*multiples of 2.*5x6.*5 -> 6"):
        unet(patch_size=2, widths=(8,)).build({"x": (None, 5, 6, 3), "time": (None,)})


def test_blocks_can_differ_by_level():
    network = unet(widths=(8, 16, 16), blocks_per_level=(1, 2, 3))
    assert len(network.steps.encoder) == 6 + 2
    assert len(network.steps.decoder) == 9 + 2


def test_a_size_that_cannot_be_halved_is_refused():
    network = unet(widths=(8, 8, 8, 8))
    with pytest.raises(ValueError, match=r"multiples of 8.*28x30.*28 -> 32, 30 -> 32"):
        network.build({"x": (None, 28, 30, 3), "time": (None,)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"widths": ()}, "`widths`.*at least one"),
        ({"widths": 64}, "`widths` must be a list or tuple.*64"),
        ({"widths": (8, 0)}, "`widths` must be a positive integer.*0"),
        ({"widths": (8, 12), "groups": 8}, r"multiple of `groups`.*\(8, 12\).*groups=4"),
        ({"groups": 0}, "`groups` must be a positive integer"),
        ({"out_channels": 1.5}, "`out_channels` must be a positive integer"),
        ({"blocks_per_level": (1, 1, 1)}, "one integer per level.*2 levels"),
        ({"blocks_per_level": 0}, "`blocks_per_level` must be a positive integer"),
        ({"attention_levels": (2,)}, r"0 to 1.*\(2,\)"),
        ({"attention_levels": 1}, r"`attention_levels`.*Received: attention_levels=1"),
        ({"num_heads": 3}, "`num_heads` must divide the channels.*3.*8"),
        ({"head_dim": 5}, "`head_dim` must divide the channels.*5.*8"),
        ({"num_heads": 2, "head_dim": 4}, "not both"),
        ({"downsample": "fir"}, "`downsample` must be one of 'conv', 'pool', 'resnet'.*'fir'"),
        ({"upsample": "pool"}, "`upsample` must be one of"),
        ({"downsample_padding": 2}, "`padding` must be one of 0, 1"),
        ({"dropout": 1.5}, r"dropout must lie in \[0, 1\)"),
        ({"output_scale": 0.0}, "`output_scale` must be a number above zero"),
        ({"norm_epsilon": -1.0}, "`epsilon` must be a number above zero"),
        ({"time_embedding": "learned"}, "'sinusoidal', 'fourier'.*'learned'"),
        ({"freq_shift": 2}, "`freq_shift` must be one of 0, 1"),
        ({"time_width": -1}, "`time_width` must be a positive integer"),
        ({"num_classes": 0}, "`num_classes` must be a positive integer"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        unet(**config)


@pytest.mark.parametrize("config", [{"width": 0}, {"depth": 0}, {"width": 5}, {"num_classes": -1}])
def test_bad_mlp_configurations_are_refused(config):
    with pytest.raises(ValueError, match="Received"):
        mlp(**config)


@pytest.mark.parametrize("make_one", [unet, mlp])
def test_misspelt_arguments_are_refused(make_one):
    with pytest.raises((TypeError, ValueError), match="attention_level"):
        make_one(attention_level=(0,))


def test_wrong_inputs_are_refused(make):
    data = inputs(make(num_classes=CLASSES))
    with pytest.raises(ValueError, match=r"num_classes=None takes.*\['time', 'x'\].*label"):
        make()(data)
    del data["label"]
    with pytest.raises(ValueError, match=r"num_classes=5 takes.*\['label', 'time', 'x'\]"):
        make(num_classes=CLASSES)(data)
    with pytest.raises(ValueError, match="takes a dict"):
        make()(data["x"])


def test_wrong_ranks_are_refused():
    with pytest.raises(ValueError, match=r"vectors \(B, D\).*UNet"):
        mlp().build({"x": (None, 8, 8, 3), "time": (None,)})
    with pytest.raises(ValueError, match=r"images \(B, H, W, C\)"):
        unet().build({"x": (None, 2), "time": (None,)})


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"groups=8, channels=12. Use groups=4"):
        GroupNormalization(8).build((None, 4, 4, 12))
