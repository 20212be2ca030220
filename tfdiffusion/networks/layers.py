"""Layers that the networks are built from.

Every layer works on channels-last features `(B, H, W, C)` and can be conditioned on an embedding
`(B, E)`, which the layers receive as a plain vector: they know neither time nor labels. One rule
holds for all of them: **a residual branch is zero when it is made.** Its last projection starts at
zero, so a fresh block is its own shortcut and a deep network starts as a shallow one.

Statistics, softmax and time features are computed in float32 whatever the dtype policy.
"""

# ruff: noqa: D102 (`build`, `call` and the like are described in the class docstrings)

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

from tfdiffusion import _checks

RESAMPLE = (None, "down", "up", "fir_down", "fir_up")

ACTIVATIONS = {
    "silu": ops.silu,
    "relu": ops.relu,
    "gelu": lambda x: ops.gelu(x, approximate=False),
    "mish": lambda x: x * ops.tanh(ops.softplus(x)),
}


def choice(argument: str, value: object, allowed: tuple) -> object:
    """Return `value`, or raise a `ValueError` that lists what is `allowed`."""
    listed = isinstance(value, str | int | float | None) and value in allowed
    if not listed or (isinstance(value, bool) and not any(value is a for a in allowed)):
        expected = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"`{argument}` must be one of {expected}. Received: {argument}={value!r}")
    return value


def positive_int(argument: str, value: object) -> int:
    """Return `value` as an int, or raise a `ValueError` if it is not an integer above zero."""
    if not _checks.is_integer(value) or not 1 <= value <= _checks.LARGEST:
        raise ValueError(f"`{argument}` must be a positive integer. Received: {argument}={value!r}")
    return int(value)


def positive_float(argument: str, value: object) -> float:
    """Return `value` as a float, or raise a `ValueError` if it is not a number above zero."""
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not real or not 0 < value <= _checks.HUGE:
        raise ValueError(
            f"`{argument}` must be a number above zero. Received: {argument}={value!r}"
        )
    return float(value)


def int_tuple(argument: str, values: object) -> tuple[int, ...]:
    """Return `values` as a tuple of positive integers, or raise a `ValueError`."""
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(
            f"`{argument}` must be a list or tuple of positive integers, with at least one. "
            f"Received: {argument}={values!r}"
        )
    return tuple(positive_int(argument, value) for value in values)


def split_heads(channels: int, num_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """Return (heads, channels per head), or raise a `ValueError` if they don't come out even."""
    if num_heads is not None and head_dim is not None:
        raise ValueError(
            "Give `num_heads` or `head_dim`, not both: one follows from the other. "
            f"Received: num_heads={num_heads!r}, head_dim={head_dim!r}"
        )
    heads = 1 if num_heads is None else num_heads
    name, part = ("num_heads", heads) if head_dim is None else ("head_dim", head_dim)
    if channels % positive_int(name, part):
        raise ValueError(
            f"`{name}` must divide the channels. Received: {name}={part}, channels={channels}"
        )
    other = channels // part
    return (part, other) if name == "num_heads" else (other, part)


def label_embedding(num_classes: int | None, width: int) -> keras.layers.Embedding | None:
    """Return an embedding of `num_classes + 1` labels, the last of which means "no label"."""
    if num_classes is None:
        return None
    return keras.layers.Embedding(
        positive_int("num_classes", num_classes) + 1,
        width,
        embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0),
        dtype="float32",
        name="label_embedding",
    )


def check_inputs(inputs: dict, num_classes: int | None) -> None:
    """Raise a `ValueError` unless `inputs` has what a network with `num_classes` takes."""
    expected = ["time", "x"] if num_classes is None else ["label", "time", "x"]
    received = sorted(inputs) if isinstance(inputs, dict) else type(inputs).__name__
    if received != expected:
        raise ValueError(
            f"A network with num_classes={num_classes} takes a dict with {expected}. Received: "
            f"{received}. 'label' goes with `num_classes`; the label {num_classes} is no label."
        )


def check_tensors(inputs: dict, channels: int, rank: int, num_classes: int | None = None) -> None:
    """Raise a `ValueError` unless tensors are what a built network takes.

    Of traced ones dtypes and shapes are looked at; of labels outside of graphs, the values too.

    Args:
        inputs: `"x"` `(B, ..., channels)` of `rank` axes, `"time"` and `"label"` `(B,)`.
        channels: That the network was built for.
        rank: Number of axes of x.
        num_classes: The largest label, which means "no label".
    """
    x = inputs["x"]
    _checks.real(**inputs)
    if len(x.shape) != rank or x.shape[-1] not in (None, channels):
        raise ValueError(
            f"`x` must have {rank} axes, the last of size {channels}. Received: shape "
            f"{tuple(x.shape)}"
        )
    for name in ("time", "label"):
        if name in inputs and tuple(inputs[name].shape) != (x.shape[0],):
            rows = (x.shape[0], *inputs[name].shape[:1])
            if len(inputs[name].shape) != 1 or None not in rows:
                raise ValueError(
                    f"`{name}` must be one number for each row of `x`. Received: shape "
                    f"{tuple(inputs[name].shape)} for {x.shape[0]} rows"
                )
    if "label" in inputs and "int" not in _checks.dtype(inputs["label"]):
        raise ValueError(
            f"`label` must be integers. Received: dtype {_checks.dtype(inputs['label'])}"
        )
    if "label" in inputs and not _checks.is_symbol(inputs["label"]):
        label = ops.convert_to_numpy(inputs["label"])
        if label.size and (label.min() < 0 or label.max() > num_classes):
            raise ValueError(
                f"`label` must be integers from 0 to {num_classes}, which is no label. Received: "
                f"{label.min()} to {label.max()}"
            )


def rate(argument: str, value: object) -> float:
    """Return `value` as a float, or raise a `ValueError` if it is not a number in [0, 1)."""
    return _checks.number(argument, value, "[0, 1)")


def sinusoids(inputs, features: int, freq_shift: float, flip_sin_to_cos: bool):
    """DDPM's positional encoding, see `TimeEmbedding`: `(B,)` -> `(B, features)`."""
    half = features // 2
    exponents = -math.log(10000.0) * np.arange(half) / (half - freq_shift)
    frequencies = ops.convert_to_tensor(np.exp(exponents).astype("float32"))
    encoded = waves(outer(inputs, frequencies), flip_sin_to_cos)
    return ops.pad(encoded, ((0, 0), (0, 1))) if features % 2 else encoded


def fourier(inputs, frequencies):
    """Random Fourier features, see `TimeEmbedding`: `(B,)`, `(F,)` -> `(B, 2 F)`."""
    # In this order, as others round: the angles are so large that their last digits count.
    return waves(2.0 * math.pi * outer(inputs, ops.convert_to_tensor(frequencies)))


def outer(inputs, frequencies):
    """`(B,)`, `(F,)` -> `(B, F)` in float32."""
    return ops.cast(inputs, "float32")[:, None] * frequencies[None, :]


def waves(angles, flip_sin_to_cos: bool = False):
    """Sines and cosines: `(B, F)` -> `(B, 2 F)`."""
    parts = [ops.sin(angles), ops.cos(angles)]
    return ops.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)


@keras.saving.register_keras_serializable(package="tfdiffusion")
class Dropout(keras.layers.Dropout):
    """Keras' dropout, which also saves where its random numbers stand.

    Keras leaves that out of its files; a training that is resumed would draw the first masks again.
    """

    def save_own_variables(self, store):
        if self.rate > 0:
            store["seed_state"] = self.seed_generator.state

    def load_own_variables(self, store):
        if self.rate > 0 and "seed_state" in store.keys():  # not in files of other layers
            self.seed_generator.state.assign(store["seed_state"])


@keras.saving.register_keras_serializable(package="tfdiffusion")
class GroupNormalization(keras.layers.Layer):
    """Group normalization (Wu & He 2018, arXiv:1803.08494), optionally with an activation.

    Gives what `keras.layers.GroupNormalization` gives, in a form that is several times faster on
    CPUs: the image is reduced to `(B, C)` sums first, groups are combined on those, and the result
    is one multiply-add. A modulation `normalized * (1 + scale) + shift` folds into the same two
    factors and costs nothing.

    The moments are taken about a constant `c`, which no derivative sees: mean = c + E[x - c] and
    variance = E[(x - c)^2] - E[x - c]^2 hold for every `c`, so all derivatives are exact, and with
    `c` at the group's mean nothing cancels.

    Args:
        groups: Number of groups; must divide the number of channels.
        epsilon: Added to the variance. (Keras' own layer defaults to 1e-3, the papers use 1e-6 or
            1e-5.)
        activation: `None`, or one of `"silu"`, `"relu"`, `"gelu"`, `"mish"`, applied to the result.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        inputs: `(B, ..., C)`.
        scale, shift: `(B, C)`, both or none.

    Raises:
        ValueError: If `groups` does not divide the channels.
    """

    def __init__(
        self, groups: int = 32, *, epsilon: float = 1e-6, activation: str | None = None, **kwargs
    ):
        super().__init__(autocast=False, **kwargs)
        self.groups = positive_int("groups", groups)
        self.epsilon = positive_float("epsilon", epsilon)
        self.activation = choice("activation", activation, (None, *ACTIVATIONS))

    def build(self, input_shape):
        channels = input_shape[-1]
        if channels % self.groups:
            raise ValueError(
                f"`groups` must divide the number of channels. Received: groups={self.groups}, "
                f"channels={channels}. Use groups={math.gcd(channels, self.groups)}, or widths "
                f"that are multiples of {self.groups}."
            )
        self.gamma = self.add_weight(name="gamma", shape=(channels,), initializer="ones")
        self.beta = self.add_weight(name="beta", shape=(channels,), initializer="zeros")
        self.built = True

    def call(self, inputs, scale=None, shift=None):
        channels, space = inputs.shape[-1], tuple(range(1, len(inputs.shape) - 1))
        grouped = (self.groups, channels // self.groups)
        count = grouped[1] * math.prod(ops.shape(inputs)[axis] for axis in space)

        def mean_of(x):  # (B, ..., C) -> (B, G, 1)
            sums = ops.reshape(ops.sum(x, axis=space), (-1, *grouped))
            return ops.sum(sums, axis=-1, keepdims=True) / ops.cast(count, "float32")

        def split(x):  # (B, C) or (C,) -> (B or 1, G, C / G)
            return ops.reshape(ops.cast(x, "float32"), (-1, *grouped))

        def join(x):  # (B, G, C / G) -> (B, 1, ..., C)
            return ops.reshape(x, (-1, *[1] * len(space), channels))

        x = ops.cast(inputs, "float32")
        mean = mean_of(x)
        center = ops.stop_gradient(mean)
        x = x - join(center + ops.zeros(grouped))
        mean = mean - center  # zero in value, not in its derivatives
        variance = mean_of(ops.square(x)) - ops.square(mean)

        multiplier = ops.rsqrt(variance + self.epsilon) * split(self.gamma)  # (B, G, C / G)
        offset = split(self.beta) - mean * multiplier
        if scale is not None:
            factor = 1.0 + split(scale)
            multiplier, offset = multiplier * factor, offset * factor + split(shift)
        x = x * join(multiplier) + join(offset)
        if self.activation is not None:
            x = ACTIVATIONS[self.activation](x)
        return ops.cast(x, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "groups": self.groups,
            "epsilon": self.epsilon,
            "activation": self.activation,
        }


@keras.saving.register_keras_serializable(package="tfdiffusion")
class TimeEmbedding(keras.layers.Layer):
    """Embed a scalar per example: fixed sines and cosines, then Dense, SiLU, Dense.

    `"sinusoidal"` is the positional encoding of DDPM (arXiv:2006.11239), with the frequencies
    `exp(-ln(10000) i / (half - freq_shift))`, `i = 0 ... half - 1`, `half = features / 2`; it suits
    integer-like times up to some thousands. `"fourier"` has random fixed frequencies `2 pi W`,
    `W ~ N(0, fourier_scale^2)` (Song et al. 2021, arXiv:2011.13456); it suits `ln sigma`.
    All of it is computed in float32: a bfloat16 cannot tell timestep 999 from 1000.

    Args:
        width: Size of the embedding.
        features: Number of sines and cosines together, even. Default: `width`.
        kind: `"sinusoidal"` or `"fourier"`.
        freq_shift: 0 or 1, see above. Projects differ, so imported weights need theirs.
        flip_sin_to_cos: `False` for `[sin, cos]`, `True` for `[cos, sin]`.
        fourier_scale: Standard deviation of the random frequencies.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: `(B,)`, any real numbers. Returns `(B, width)` float32.
    """

    def __init__(
        self,
        width: int,
        *,
        features: int | None = None,
        kind: str = "sinusoidal",
        freq_shift: int = 1,
        flip_sin_to_cos: bool = False,
        fourier_scale: float = 16.0,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        self.width = positive_int("width", width)
        self.features = positive_int("features", width if features is None else features)
        self.kind = choice("kind", kind, ("sinusoidal", "fourier"))
        self.freq_shift = choice("freq_shift", freq_shift, (0, 1))
        self.flip_sin_to_cos = bool(flip_sin_to_cos)
        self.fourier_scale = positive_float("fourier_scale", fourier_scale)
        if self.features % 2 or self.features < 4:
            raise ValueError(
                "`features` must be even and at least 4: half of them are sines, half cosines. "
                f"Received: features={features!r}, width={width!r}"
            )
        self.dense_1 = keras.layers.Dense(self.width, dtype="float32", name="dense_1")
        self.dense_2 = keras.layers.Dense(self.width, dtype="float32", name="dense_2")

    def build(self, input_shape):
        if self.kind == "fourier":
            self.frequencies = self.add_weight(
                name="frequencies",
                shape=(self.features // 2,),
                initializer=keras.initializers.RandomNormal(stddev=self.fourier_scale),
                dtype="float32",
                trainable=False,
            )
        self.dense_1.build((None, self.features))
        self.dense_2.build((None, self.width))
        self.built = True

    def encode(self, inputs):
        """Return the sines and cosines `(B, features)` of `inputs` `(B,)`."""
        if self.kind == "sinusoidal":
            return sinusoids(inputs, self.features, self.freq_shift, self.flip_sin_to_cos)
        encoded = fourier(inputs, self.frequencies)
        return ops.roll(encoded, self.features // 2, axis=-1) if self.flip_sin_to_cos else encoded

    def call(self, inputs):
        return self.dense_2(ops.silu(self.dense_1(self.encode(inputs))))

    def compute_output_shape(self, input_shape):
        return (*input_shape, self.width)

    def get_config(self):
        return {
            **super().get_config(),
            "width": self.width,
            "features": self.features,
            "kind": self.kind,
            "freq_shift": self.freq_shift,
            "flip_sin_to_cos": self.flip_sin_to_cos,
            "fourier_scale": self.fourier_scale,
        }


@keras.saving.register_keras_serializable(package="tfdiffusion")
class SelfAttention(keras.layers.Layer):
    """Self-attention over all positions of an image, as a residual branch.

    `(x + project(softmax(q k^T / sqrt(head_dim)) v)) / output_scale` on the group-normalized
    input (arXiv:1706.03762; in a U-Net: arXiv:2006.11239). The softmax is computed in float32.

    Args:
        num_heads: Number of heads; must divide the channels. Not with `head_dim`.
        head_dim: Channels per head, instead of `num_heads`.
        groups: See `GroupNormalization`; `None` for no normalization.
        norm_epsilon: See `GroupNormalization`.
        output_scale: Divides the sum of shortcut and branch, e.g. sqrt(2).
        width: Channels of all heads together. Default: those of the input.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: `(B, H, W, C)`. Returns the same shape.
    """

    def __init__(
        self,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        groups: int | None = 32,
        norm_epsilon: float = 1e-6,
        output_scale: float = 1.0,
        width: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_heads, self.head_dim, self.groups = num_heads, head_dim, groups
        self.norm_epsilon = positive_float("norm_epsilon", norm_epsilon)
        self.output_scale = positive_float("output_scale", output_scale)
        self.width = None if width is None else positive_int("width", width)
        self.norm = None
        if groups is not None:
            self.norm = GroupNormalization(
                groups, epsilon=norm_epsilon, dtype=self.dtype_policy, name="norm"
            )

    def build(self, input_shape):
        channels = input_shape[-1]
        width = self.width or channels
        self.split = split_heads(width, self.num_heads, self.head_dim)
        if self.norm is not None:
            self.norm.build(input_shape)

        def dense(name, size, units, initializer="glorot_uniform"):
            layer = keras.layers.Dense(
                units, kernel_initializer=initializer, dtype=self.dtype_policy, name=name
            )
            layer.build((None, size))
            return layer

        self.query, self.key = dense("query", channels, width), dense("key", channels, width)
        self.value = dense("value", channels, width)
        self.project = dense("project", width, channels, "zeros")
        self.built = True

    def call(self, inputs):
        _, height, width, channels = ops.shape(inputs)
        tokens = height * width
        x = inputs if self.norm is None else self.norm(inputs)
        x = ops.reshape(x, (-1, channels))  # (B N, C)

        def split(x, axes):  # (B N, C) -> (B, N, heads, head_dim), transposed
            return ops.transpose(ops.reshape(x, (-1, tokens, *self.split)), axes)

        query = split(self.query(x) * self.split[1] ** -0.5, (0, 2, 1, 3))  # (B, h, N, d)
        key, value = split(self.key(x), (0, 2, 3, 1)), split(self.value(x), (0, 2, 1, 3))
        weights = ops.softmax(ops.cast(ops.matmul(query, key), "float32"), axis=-1)
        x = ops.matmul(ops.cast(weights, self.compute_dtype), value)
        x = ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (-1, math.prod(self.split)))
        x = self.project(x)
        x = ops.reshape(x, (-1, height, width, channels))
        return _rescale(inputs + x, self.output_scale)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "groups": self.groups,
            "norm_epsilon": self.norm_epsilon,
            "output_scale": self.output_scale,
            "width": self.width,
        }


@keras.saving.register_keras_serializable(package="tfdiffusion")
class Downsample(keras.layers.Layer):
    """Halve height and width.

    Args:
        kind: `"conv"`, a 3x3 convolution with stride 2; `"pool"`, the mean of each 2x2 square;
            `"fir"`, the smooth filter (1, 3, 3, 1)/8 along both axes (Zhang 2019,
            arXiv:1904.11486); or `"fir_conv"`, that filter and then the convolution.
        padding: For `"conv"`: 0 pads one row below and one column to the right, 1 pads one on
            all four sides. Imported weights need the one that they were trained with.
        width: Channels that a convolution gives. Default: those of the input.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: `(B, H, W, C)` with even H and W. Returns `(B, H / 2, W / 2, C)`.
    """

    def __init__(self, kind: str = "conv", *, padding: int = 0, width: int | None = None, **kwargs):
        super().__init__(**kwargs)
        self.kind = choice("kind", kind, ("conv", "pool", "fir", "fir_conv"))
        self.padding = choice("padding", padding, (0, 1))
        self.width = None if width is None else positive_int("width", width)

    def build(self, input_shape):
        if "conv" in self.kind:
            self.conv = keras.layers.Conv2D(
                self.width or input_shape[-1],
                3,
                strides=2,
                padding="valid" if self.padding or self.kind == "fir_conv" else "same",
                dtype=self.dtype_policy,
                name="conv",
            )
            self.conv.build((None, None, None, input_shape[-1]))
        self.built = True

    def call(self, inputs):
        if self.kind == "pool":
            return ops.average_pool(inputs, 2, strides=2, padding="valid")
        if self.kind == "fir":
            return _smooth(_smooth(inputs, 1, pad=1, stride=2), 2, pad=1, stride=2)
        if self.kind == "fir_conv":
            return self.conv(_smooth(_smooth(inputs, 1, pad=2), 2, pad=2))
        if self.padding:
            inputs = ops.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return self.conv(inputs)

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        if "conv" in self.kind:
            channels = self.width or channels
        return batch, height and height // 2, width and width // 2, channels

    def get_config(self):
        config = {"kind": self.kind, "padding": self.padding, "width": self.width}
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable(package="tfdiffusion")
class Upsample(keras.layers.Layer):
    """Double height and width: each pixel becomes four, then a 3x3 convolution.

    Args:
        kind: `"conv"`; `"nearest"` leaves the convolution out; `"fir"` does too, and smooths: of
            the two pixels between neighbours each is 3/4 the nearer and 1/4 the other one.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: `(B, H, W, C)`. Returns `(B, 2 H, 2 W, C)`.
    """

    def __init__(self, kind: str = "conv", **kwargs):
        super().__init__(**kwargs)
        self.kind = choice("kind", kind, ("conv", "nearest", "fir"))

    def build(self, input_shape):
        if self.kind == "conv":
            self.conv = keras.layers.Conv2D(
                input_shape[-1], 3, padding="same", dtype=self.dtype_policy, name="conv"
            )
            self.conv.build((None, None, None, input_shape[-1]))
        self.built = True

    def call(self, inputs):
        if self.kind == "fir":
            return _interpolate(_interpolate(inputs, 1), 2)
        x = ops.repeat(ops.repeat(inputs, 2, axis=1), 2, axis=2)
        return self.conv(x) if self.kind == "conv" else x

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        return batch, height and height * 2, width and width * 2, channels

    def get_config(self):
        return {**super().get_config(), "kind": self.kind}


@keras.saving.register_keras_serializable(package="tfdiffusion")
class ResidualBlock(keras.layers.Layer):
    """Two 3x3 convolutions conditioned on an embedding, beside a shortcut.

    norm, SiLU, (resample), conv, + embedding, norm, SiLU, dropout, conv; then
    `(shortcut + branch) / output_scale`. The shortcut has a 1x1 convolution where the number of
    channels changes. The block of DDPM (arXiv:2006.11239); with `scale_shift` and `resample`, of
    improved DDPM (arXiv:2102.09672) and ADM (arXiv:2105.05233).

    Args:
        width: Number of output channels.
        groups, norm_epsilon: See `GroupNormalization`.
        groups_out: Of the second normalization. Default: `groups`.
        scale_shift: `True` modulates the second normalization, `normalized * (1 + scale) + shift`;
            `False` adds the embedding before it.
        resample: `None`, `"down"` (mean of each 2x2 square) or `"up"` (nearest) in branch and
            shortcut; `"fir_down"` and `"fir_up"` smooth as in `Downsample` and `Upsample`.
        dropout: Rate of the dropout before the last convolution.
        output_scale: Divides the sum, e.g. sqrt(2).
        activation: Of `GroupNormalization`, in place of SiLU.
        project_shortcut: Whether the shortcut has its 1x1 convolution in any case.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: `(B, H, W, C)`.
        embedding: `(B, E)`, or `None` for an unconditional block.
        training: Whether dropout is active.
    """

    def __init__(
        self,
        width: int,
        *,
        groups: int = 32,
        groups_out: int | None = None,
        norm_epsilon: float = 1e-6,
        scale_shift: bool = False,
        resample: str | None = None,
        dropout: float = 0.0,
        output_scale: float = 1.0,
        activation: str = "silu",
        project_shortcut: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.width = positive_int("width", width)
        self.activation = choice("activation", activation, tuple(ACTIVATIONS))
        self.project_shortcut = bool(project_shortcut)
        self.scale_shift = bool(scale_shift)
        self.resample = choice("resample", resample, RESAMPLE)
        self.rate = rate("dropout", dropout)
        self.output_scale = positive_float("output_scale", output_scale)
        policy = self.dtype_policy
        norm = {"epsilon": norm_epsilon, "activation": activation, "dtype": policy}
        conv = {"padding": "same", "dtype": policy}
        self.norm_1 = GroupNormalization(groups, **norm, name="norm_1")
        self.conv_1 = keras.layers.Conv2D(self.width, 3, **conv, name="conv_1")
        groups_out = groups if groups_out is None else groups_out
        self.norm_2 = GroupNormalization(groups_out, **norm, name="norm_2")
        self.conv_2 = keras.layers.Conv2D(
            self.width, 3, kernel_initializer="zeros", **conv, name="conv_2"
        )
        self.dropout = Dropout(self.rate, dtype=policy) if self.rate else None
        self.embed = self.shortcut = self.resampler = None
        if self.resample in ("down", "fir_down"):
            self.resampler = Downsample("pool" if resample == "down" else "fir", dtype=policy)
        elif self.resample in ("up", "fir_up"):
            self.resampler = Upsample("nearest" if resample == "up" else "fir", dtype=policy)

    def build(self, inputs_shape, embedding_shape=None):
        channels = inputs_shape[-1]
        inner = (None, None, None, self.width)
        for layer in (self.norm_1, self.resampler, self.dropout):
            if layer is not None:
                layer.build(inputs_shape)
        self.conv_1.build((None, None, None, channels))
        self.norm_2.build(inner)
        self.conv_2.build(inner)
        if embedding_shape is not None:
            units = 2 * self.width if self.scale_shift else self.width
            self.embed = keras.layers.Dense(units, dtype=self.dtype_policy, name="embed")
            self.embed.build(embedding_shape)
        if channels != self.width or self.project_shortcut:
            self.shortcut = keras.layers.Conv2D(
                self.width, 1, dtype=self.dtype_policy, name="shortcut"
            )
            self.shortcut.build((None, None, None, channels))
        self.built = True

    def call(self, inputs, embedding=None, training=False):
        x, residual = self.norm_1(inputs), inputs
        if self.resampler is not None:
            x, residual = self.resampler(x), self.resampler(residual)
        x = self.conv_1(x)
        if self.embed is None:
            x = self.norm_2(x)
        else:
            embedding = self.embed(ACTIVATIONS[self.activation](embedding))
            if self.scale_shift:
                scale, shift = ops.split(embedding, 2, axis=-1)
                x = self.norm_2(x, scale=scale, shift=shift)
            else:
                x = self.norm_2(x + embedding[:, None, None, :])
        if self.dropout is not None:
            x = self.dropout(x, training=training)
        if self.shortcut is not None:
            residual = self.shortcut(residual)
        return _rescale(residual + self.conv_2(x), self.output_scale)

    def compute_output_shape(self, inputs_shape, embedding_shape=None):
        if self.resampler is not None:
            inputs_shape = self.resampler.compute_output_shape(inputs_shape)
        return (*inputs_shape[:-1], self.width)

    def get_config(self):
        return {
            **super().get_config(),
            "width": self.width,
            "groups": self.norm_1.groups,
            "groups_out": self.norm_2.groups,
            "norm_epsilon": self.norm_1.epsilon,
            "scale_shift": self.scale_shift,
            "resample": self.resample,
            "dropout": self.rate,
            "output_scale": self.output_scale,
            "activation": self.activation,
            "project_shortcut": self.project_shortcut,
        }


def _smooth(x, axis: int, pad: int, stride: int = 1):
    """(1, 3, 3, 1)/8 along an axis, beyond whose ends `pad` zeros are added."""
    size = ops.shape(x)[axis] + 2 * pad - 3  # of the result, with stride 1
    x = _pad(x, axis, pad)
    ends, middle = _slice(x, axis, 0, size, stride), _slice(x, axis, 1, size, stride)
    ends = ends + _slice(x, axis, 3, size, stride)
    middle = middle + _slice(x, axis, 2, size, stride)
    return ends / 8.0 + middle * 0.375


def _interpolate(x, axis: int):
    """Twice as many pixels along an axis, (x_{i-1} + 3 x_i)/4 and (3 x_i + x_{i+1})/4; 0 beyond."""
    size = ops.shape(x)[axis]
    padded = _pad(x, axis, 1)
    before, after = _slice(padded, axis, 0, size), _slice(padded, axis, 2, size)
    both = ops.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis=axis + 1)
    shape = ops.shape(x)
    return ops.reshape(both, (-1, *shape[1:axis], 2 * size, *shape[axis + 1 :]))


def _pad(x, axis: int, size: int):
    return ops.pad(x, [(size, size) if i == axis else (0, 0) for i in range(len(x.shape))])


def _slice(x, axis: int, start: int, size, stride: int = 1):
    """Elements start, start + stride, ... along an axis, up to start + size."""
    return x[(slice(None),) * axis + (slice(start, start + size, stride),)]


def _rescale(x, output_scale):
    return x if output_scale == 1.0 else x / output_scale
