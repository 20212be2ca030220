"""What one level of a U-Net, or of an autoencoder, is made of.

A block is given its layers when it is made, so that one class serves residual blocks with
self-attention, with cross-attention or with none. Whoever makes the network decides which layers;
the block knows in which order they run and what is handed on as a skip.

Beside the features there may be a pyramid of the image itself (StyleGAN2, arXiv:1912.04958, sec. 4;
in diffusion: Song et al. 2021, arXiv:2011.13456, app. H): the encoder sees it at every size, the
decoder adds its output up from size to size.
"""

# ruff: noqa: D102 (`build`, `call` and the like are described in the class docstrings)

from __future__ import annotations

from collections.abc import Sequence

import keras
from keras import ops

from tfdiffusion.networks.layers import (
    Downsample,
    GroupNormalization,
    ResidualBlock,
    Upsample,
    choice,
    fourier,
    positive_int,
    sinusoids,
)


def quarter(channels: int) -> int:
    """Number of groups of a normalization that holds at least four channels in each."""
    return min(channels // 4, 32)


class Embedding(keras.layers.Layer):
    """Dense, SiLU, Dense, in float32.

    Args:
        width: Size of the result.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: `(B, F)`. Returns `(B, width)`.
    """

    def __init__(self, width: int, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.width = positive_int("width", width)
        self.dense_1 = keras.layers.Dense(width, dtype="float32", name="dense_1")
        self.dense_2 = keras.layers.Dense(width, dtype="float32", name="dense_2")

    def build(self, input_shape):
        self.dense_1.build(input_shape)
        self.dense_2.build((None, self.width))
        self.built = True

    def call(self, inputs):
        return self.dense_2(ops.silu(self.dense_1(inputs)))


class TimeFeatures(keras.layers.Layer):
    """What a network is told of a number: `(B,)` -> `(B, features)`, in float32.

    Args:
        kind: `"sinusoidal"` as in `TimeEmbedding`; `"fourier"`, as there, of the logarithm; or
            `"learned"`, a vector for each of the times 0 ... num_times - 1, to which others are
            rounded.
        features: Size of the result; for `"fourier"` even.
        freq_shift, flip_sin_to_cos: Of `"sinusoidal"`, see `TimeEmbedding`. Any number.
        num_times: Of `"learned"`.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(
        self,
        kind: str,
        features: int,
        *,
        freq_shift: float = 0,
        flip_sin_to_cos: bool = True,
        num_times: int | None = None,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        self.kind = choice("time_embedding", kind, ("sinusoidal", "fourier", "learned"))
        self.features = positive_int("features", features)
        self.freq_shift, self.flip_sin_to_cos = float(freq_shift), bool(flip_sin_to_cos)
        self.num_times = positive_int("num_times", num_times) if kind == "learned" else None
        if kind == "sinusoidal" and features // 2 in (0, self.freq_shift):
            raise ValueError(
                f"`features` // 2 must be above 0 and another number than `freq_shift`, which is "
                f"taken from it. Received: features={features}, freq_shift={freq_shift}."
            )

    def build(self, input_shape):
        def table(name, shape, stddev, trainable):
            normal = keras.initializers.RandomNormal(stddev=stddev)
            return self.add_weight(
                name=name, shape=shape, initializer=normal, dtype="float32", trainable=trainable
            )

        if self.kind == "fourier":
            self.table = table("frequencies", (self.features // 2,), 16.0, False)
        elif self.kind == "learned":
            self.table = table("table", (self.num_times, self.features), 1.0, True)
        self.built = True

    def call(self, inputs):
        if self.kind == "sinusoidal":
            return sinusoids(inputs, self.features, self.freq_shift, self.flip_sin_to_cos)
        if self.kind == "fourier":
            return fourier(ops.log(inputs), self.table)
        index = ops.cast(ops.round(inputs), "int32")
        return ops.take(ops.convert_to_tensor(self.table), index, axis=0)

    def compute_output_shape(self, input_shape):
        return (*input_shape, self.features)


class InputPyramid(keras.layers.Layer):
    """Shows the encoder the image at half the size.

    `"skip"`: `x + conv1x1(image')` with the smoothed image' of half the size. `"residual"`:
    `(x + conv3x3(image'))/output_scale`, and that sum is the image of the next level.

    Args:
        kind: `"skip"` or `"residual"`.
        width: Channels of x.
        output_scale: See above.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        x: `(B, H, W, width)`.
        image: `(B, 2 H, 2 W, C)`. Returns x and the image of half the size.
    """

    def __init__(self, kind: str, width: int, *, output_scale: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.kind, self.width = choice("pyramid", kind, ("skip", "residual")), width
        self.output_scale = output_scale
        policy = self.dtype_policy
        if kind == "skip":
            self.down = Downsample("fir", dtype=policy, name="down")
            self.conv = keras.layers.Conv2D(width, 1, dtype=policy, name="conv")
        else:
            self.down = Downsample("fir_conv", width=width, dtype=policy, name="down")
            self.conv = None

    def build(self, image_shape):
        self.down.build(image_shape)
        if self.conv is not None:
            self.conv.build(image_shape)
        self.built = True

    def call(self, x, image):
        image = self.down(image)
        if self.conv is not None:
            return x + self.conv(image), image
        x = (x + image) / self.output_scale
        return x, x


class OutputPyramid(keras.layers.Layer):
    """Adds what a level of the decoder has to say to the image, made twice as large before.

    Args:
        out_channels: Of the image; 0 for a level that only makes it larger.
        groups, norm_epsilon: See `GroupNormalization`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        x: `(B, H, W, C)`.
        image: `(B, H / 2, W / 2, out_channels)`, or `None`. Returns `(B, H, W, out_channels)`.
    """

    def __init__(self, out_channels: int, groups: int, *, norm_epsilon: float = 1e-6, **kwargs):
        super().__init__(**kwargs)
        policy = self.dtype_policy
        self.up = Upsample("fir", dtype=policy, name="up")
        self.norm = self.conv = None
        if out_channels:
            norm = {"epsilon": norm_epsilon, "activation": "silu"}
            self.norm = GroupNormalization(groups, **norm, dtype=policy, name="norm")
            self.conv = keras.layers.Conv2D(
                out_channels, 3, padding="same", dtype=policy, name="conv"
            )

    def build(self, input_shape):
        if self.conv is not None:
            self.norm.build(input_shape)
            self.conv.build(input_shape)
        self.built = True

    def call(self, x, image=None):
        image = None if image is None else self.up(image)
        if self.conv is None:
            return image
        here = self.conv(self.norm(x))
        return here if image is None else image + here


class EncoderBlock(keras.layers.Layer):
    """Residual blocks with attention behind them, then half the size.

    Args:
        residuals: `ResidualBlock` layers.
        attentions: For each of them a layer that maps `(B, H, W, C)` to the same, or `None`.
        downsample: A `Downsample`, a `ResidualBlock` that resamples, or `None`.
        pyramid: An `InputPyramid`, or `None`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        x: `(B, H, W, C)`.
        embedding: `(B, E)`, or `None` for an unconditional block.
        image: For the pyramid.
        training: Whether dropout is active.

    Returns:
        x, the list of skips (each residual block's result, and x if it was made smaller), image.
    """

    def __init__(
        self,
        residuals: Sequence,
        attentions: Sequence | None = None,
        downsample=None,
        pyramid=None,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        self.residuals = list(residuals)
        self.attentions = _each(attentions, self.residuals)
        self.downsample, self.pyramid = downsample, pyramid

    def build(self, x_shape, embedding_shape=None, image_shape=None):
        for residual, attention in zip(self.residuals, self.attentions):
            x_shape = _build(attention, _build(residual, x_shape, embedding_shape))
        _build(self.downsample, x_shape, embedding_shape)
        if self.pyramid is not None:
            self.pyramid.build(image_shape)
        self.built = True

    def call(self, x, embedding=None, image=None, training=False):
        skips = []
        for residual, attention in zip(self.residuals, self.attentions):
            x = residual(x, embedding=embedding, training=training)
            x = x if attention is None else attention(x)
            skips.append(x)
        if self.downsample is not None:
            x = _resample(self.downsample, x, embedding, training)
            if self.pyramid is not None:
                x, image = self.pyramid(x, image)
            skips.append(x)
        return x, skips, image


class DecoderBlock(keras.layers.Layer):
    """Residual blocks, each of which takes a skip, with attention behind them; then twice the size.

    Args:
        residuals, attentions: As in `EncoderBlock`.
        upsample: An `Upsample`, a `ResidualBlock` that resamples, or `None`.
        pyramid: An `OutputPyramid`, or `None`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        x: `(B, H, W, C)`.
        skips: As many `(B, H, W, C')` as there are residual blocks, the last of which is taken
            first; or `None` for a decoder without.
        embedding, image, training: As in `EncoderBlock`.

    Returns:
        x and image.
    """

    def __init__(
        self,
        residuals: Sequence,
        attentions: Sequence | None = None,
        upsample=None,
        pyramid=None,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        self.residuals = list(residuals)
        self.attentions = _each(attentions, self.residuals)
        self.upsample, self.pyramid = upsample, pyramid

    def build(self, x_shape, skip_channels: Sequence[int] = (), embedding_shape=None):
        skip_channels = list(skip_channels) or [0] * len(self.residuals)
        for residual, attention in zip(self.residuals, self.attentions):
            joined = (*x_shape[:-1], x_shape[-1] + skip_channels.pop())
            x_shape = _build(attention, _build(residual, joined, embedding_shape))
        if self.pyramid is not None:
            self.pyramid.build(x_shape)
        _build(self.upsample, x_shape, embedding_shape)
        self.built = True

    def call(self, x, skips=None, embedding=None, image=None, training=False):
        skips = None if skips is None else list(skips)
        for residual, attention in zip(self.residuals, self.attentions):
            if skips is not None:
                x = ops.concatenate([x, skips.pop()], axis=-1)
            x = residual(x, embedding=embedding, training=training)
            x = x if attention is None else attention(x)
        if self.pyramid is not None:
            image = self.pyramid(x, image)
        if self.upsample is not None:
            x = _resample(self.upsample, x, embedding, training)
        return x, image


def _each(attentions, residuals) -> list:
    return list(attentions) if attentions is not None else [None] * len(residuals)


def _resample(layer, x, embedding, training):
    if isinstance(layer, ResidualBlock):
        return layer(x, embedding=embedding, training=training)
    return layer(x)


def _build(layer, shape, embedding_shape=None) -> tuple:
    """Builds a layer, or none, for a shape; returns the shape that comes out."""
    if layer is None:
        return shape
    if isinstance(layer, ResidualBlock) and embedding_shape is not None:
        layer.build(shape, embedding_shape)
    else:
        layer.build(shape)
    return tuple(layer.compute_output_shape(shape))
