"""The U-Net of diffusion models, one network for the configurations that papers publish.

An encoder of residual blocks halves the image level by level, a decoder doubles it back, and each
encoder output is handed to the decoder block of its size. DDPM (arXiv:2006.11239), improved DDPM
(arXiv:2102.09672) and ADM (arXiv:2105.05233) are settings of it.
"""

# ruff: noqa: D102 (`build`, `call` and the like are described in the class docstrings)

from __future__ import annotations

import math
from collections.abc import Sequence

import keras
from keras import ops

from tfdiffusion.networks.layers import (
    Downsample,
    GroupNormalization,
    ResidualBlock,
    SelfAttention,
    TimeEmbedding,
    Upsample,
    choice,
    positive_int,
)


@keras.saving.register_keras_serializable(package="tfdiffusion")
class UNet(keras.Model):
    """U-Net on images, conditioned on one number per image and, optionally, on a class.

    Args:
        out_channels: Channels of the output, usually those of the image.
        widths: Channels of each level; every level but the first has half the size of the one
            before it. Height and width must be multiples of `2 ** (len(widths) - 1)`.
        blocks_per_level: Residual blocks of each encoder level, an int or one per level; a decoder
            level has one more.
        attention_levels: Indices of the levels with self-attention, 0 being the full size.
        mid_attention: Whether there is self-attention between the two middle blocks.
        num_heads, head_dim: Heads of the attention, or channels per head; one head if both are
            `None`.
        groups: Groups of the normalizations; must divide each of `widths`.
        norm_epsilon: Epsilon of the normalizations.
        scale_shift: Whether the embedding modulates the normalization instead of being added.
        downsample: `"conv"`, `"pool"` or `"resnet"` (a residual block that averages).
        upsample: `"conv"`, `"nearest"` or `"resnet"` (a residual block that repeats).
        downsample_padding: Of the strided convolution: 0 pads below and right, 1 all around.
        dropout: Dropout rate inside the residual blocks.
        output_scale: Divides each sum of shortcut and branch, e.g. sqrt(2).
        time_embedding: `"sinusoidal"` or `"fourier"`.
        time_width: Size of the embedding. Default: `4 * widths[0]`.
        freq_shift, flip_sin_to_cos, fourier_scale: See `TimeEmbedding`.
        num_classes: Number of classes, or `None`. The embedding has one row more: label
            `num_classes` means "no label".
        **kwargs: `name`, `dtype` and `trainable` of `keras.Model`; anything else is refused.

    Call arguments:
        inputs: A dict: `"x"` `(B, H, W, C)`, `"time"` `(B,)` float32 and, with `num_classes`,
            `"label"` `(B,)` int.
        training: Whether dropout is active.

    Returns:
        `(B, H, W, out_channels)` float32: exactly zero before training, by initialization.

    Raises:
        ValueError: For a configuration, a size or inputs that can't work.

    Example:
        >>> network = UNet(out_channels=1, widths=(32, 64), groups=8, num_classes=10)
        >>> x = keras.random.normal((2, 28, 28, 1))
        >>> y = network({"x": x, "time": [10.0, 999.0], "label": [3, 10]})
        >>> tuple(y.shape)
        (2, 28, 28, 1)
    """

    def __init__(
        self,
        *,
        out_channels: int,
        widths: Sequence[int] = (64, 128, 256),
        blocks_per_level: int | Sequence[int] = 2,
        attention_levels: Sequence[int] = (),
        mid_attention: bool = True,
        num_heads: int | None = None,
        head_dim: int | None = None,
        groups: int = 32,
        norm_epsilon: float = 1e-6,
        scale_shift: bool = False,
        downsample: str = "conv",
        upsample: str = "conv",
        downsample_padding: int = 0,
        dropout: float = 0.0,
        output_scale: float = 1.0,
        time_embedding: str = "sinusoidal",
        time_width: int | None = None,
        freq_shift: int = 1,
        flip_sin_to_cos: bool = False,
        fourier_scale: float = 16.0,
        num_classes: int | None = None,
        **kwargs,
    ):
        # Times must reach the embedding in float32, so `call` leaves each cast to the layers.
        super().__init__(autocast=False, **kwargs)
        widths = tuple(positive_int("widths", width) for width in widths)
        if isinstance(blocks_per_level, int):
            blocks_per_level = (blocks_per_level,) * len(widths)
        _check_levels(widths, blocks_per_level, attention_levels, groups)
        self.out_channels = positive_int("out_channels", out_channels)
        self.num_classes = None if num_classes is None else positive_int("num_classes", num_classes)
        self.widths = widths
        self.config = {
            "out_channels": self.out_channels,
            "widths": widths,
            "blocks_per_level": tuple(
                positive_int("blocks_per_level", n) for n in blocks_per_level
            ),
            "attention_levels": tuple(attention_levels),
            "mid_attention": bool(mid_attention),
            "num_heads": num_heads,
            "head_dim": head_dim,
            "groups": groups,
            "norm_epsilon": norm_epsilon,
            "scale_shift": bool(scale_shift),
            "downsample": choice("downsample", downsample, ("conv", "pool", "resnet")),
            "upsample": choice("upsample", upsample, ("conv", "nearest", "resnet")),
            "downsample_padding": downsample_padding,
            "dropout": dropout,
            "output_scale": output_scale,
            "time_embedding": time_embedding,
            "time_width": 4 * widths[0] if time_width is None else time_width,
            "freq_shift": freq_shift,
            "flip_sin_to_cos": bool(flip_sin_to_cos),
            "fourier_scale": fourier_scale,
            "num_classes": self.num_classes,
        }
        self._make_layers()

    def _make_layers(self):
        config, policy = self.config, self.dtype_policy
        widths, blocks, attended = (
            self.widths,
            config["blocks_per_level"],
            config["attention_levels"],
        )
        norm = {name: config[name] for name in ("groups", "norm_epsilon")}
        scale = {"output_scale": config["output_scale"]}
        residual = {name: config[name] for name in ("scale_shift", "dropout")}
        residual = {**residual, **norm, **scale, "dtype": policy}
        heads = {name: config[name] for name in ("num_heads", "head_dim")}
        attention = {**heads, **norm, **scale, "dtype": policy}

        self.time_embedding = TimeEmbedding(
            config["time_width"],
            features=widths[0],
            kind=config["time_embedding"],
            **{name: config[name] for name in ("freq_shift", "flip_sin_to_cos", "fourier_scale")},
            dtype=policy,
        )
        self.label_embedding = None
        if self.num_classes is not None:
            self.label_embedding = keras.layers.Embedding(
                self.num_classes + 1,  # the last row is "no label"
                config["time_width"],
                embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0),
                dtype="float32",
            )

        # Each step is a list of layers; its output is a skip (encoder) or takes one (decoder, but
        # for the steps that resize). So the two paths mirror each other and no level is special.
        def step(width, level=None):
            block = [ResidualBlock(width, **residual)]
            return [*block, SelfAttention(**attention)] if level in attended else block

        def down(width):
            if config["downsample"] == "resnet":
                return [ResidualBlock(width, resample="down", **residual)]
            padding = config["downsample_padding"]
            return [Downsample(config["downsample"], padding=padding, dtype=policy)]

        def up(width):
            if config["upsample"] == "resnet":
                return [ResidualBlock(width, resample="up", **residual)]
            return [Upsample(config["upsample"], dtype=policy)]

        encoder, decoder = [], []
        for level, width in enumerate(widths):
            encoder += [down(widths[level - 1])] if level else []
            encoder += [step(width, level) for _ in range(blocks[level])]
        for level, width in reversed(list(enumerate(widths))):
            decoder += [step(width, level) for _ in range(blocks[level] + 1)]
            decoder += [up(width)] if level else []
        middle = [ResidualBlock(widths[-1], **residual) for _ in range(2)]
        if config["mid_attention"]:
            middle.insert(1, SelfAttention(**attention))

        self.conv_in = keras.layers.Conv2D(widths[0], 3, padding="same", dtype=policy)
        self.encoder, self.middle, self.decoder = encoder, middle, decoder
        self.norm_out = GroupNormalization(
            config["groups"], epsilon=config["norm_epsilon"], activation="silu", dtype=policy
        )
        self.conv_out = keras.layers.Conv2D(
            self.out_channels, 3, padding="same", kernel_initializer="zeros", dtype=policy
        )

    def build(self, input_shape):
        # After loading, shapes arrive as lists.
        shapes = {name: tuple(shape) for name, shape in input_shape.items()}
        x = shapes["x"]
        _check_inputs(shapes, self.num_classes)
        _check_size(x, len(self.widths))
        embedding = (None, self.config["time_width"])

        def build(step, shape):
            for layer in step:
                layer.build(*((shape, embedding) if _is_conditioned(layer) else (shape,)))
                shape = tuple(layer.compute_output_shape(shape))
            return shape

        self.time_embedding.build((None,))
        if self.label_embedding is not None:
            self.label_embedding.build((None,))
        self.conv_in.build(x)
        x = (*x[:-1], self.widths[0])
        skips = [x]
        for step in self.encoder:
            x = build(step, x)
            skips.append(x)
        x = build(self.middle, x)
        for step in self.decoder:
            if not _is_resizing(step):
                x = (*x[:-1], x[-1] + skips.pop()[-1])
            x = build(step, x)
        self.norm_out.build(x)
        self.conv_out.build(x)
        self.built = True

    def call(self, inputs, training=False):
        _check_inputs(inputs, self.num_classes)
        embedding = self.time_embedding(inputs["time"])
        if self.label_embedding is not None:
            embedding = embedding + self.label_embedding(inputs["label"])

        def run(step, x):
            for layer in step:
                x = layer(x, embedding, training=training) if _is_conditioned(layer) else layer(x)
            return x

        x = self.conv_in(ops.cast(inputs["x"], self.compute_dtype))
        skips = [x]
        for step in self.encoder:
            x = run(step, x)
            skips.append(x)
        x = run(self.middle, x)
        for step in self.decoder:
            if not _is_resizing(step):
                x = ops.concatenate([x, skips.pop()], axis=-1)
            x = run(step, x)
        return ops.cast(self.conv_out(self.norm_out(x)), "float32")

    def compute_output_shape(self, input_shape):
        return (*input_shape["x"][:-1], self.out_channels)

    def get_config(self):
        base = {"name": self.name, "trainable": self.trainable, "dtype": self.dtype_policy.name}
        return {**base, **self.config}


def _is_conditioned(layer):
    return isinstance(layer, ResidualBlock)


def _is_resizing(step):
    layer = step[0]
    return isinstance(layer, Upsample) or getattr(layer, "resample", None) is not None


def _check_levels(widths, blocks_per_level, attention_levels, groups):
    levels = len(widths)
    if not levels:
        raise ValueError(f"`widths` must have at least one width. Received: widths={widths!r}")
    if len(blocks_per_level) != levels:
        raise ValueError(
            "`blocks_per_level` must be an integer or one integer per level. Received: "
            f"blocks_per_level={blocks_per_level!r} for {levels} levels (widths={widths!r})"
        )
    positive_int("groups", groups)
    bad = [width for width in widths if width % groups]
    if bad:
        raise ValueError(
            f"Each of `widths` must be a multiple of `groups`. Received: widths={widths!r}, "
            f"groups={groups}. Use groups={math.gcd(*widths)} or a divisor of it."
        )
    if any(level not in range(levels) for level in attention_levels):
        raise ValueError(
            f"`attention_levels` must be indices of levels, 0 to {levels - 1} for widths="
            f"{widths!r} (0 is the full size). Received: attention_levels={attention_levels!r}"
        )


def _check_inputs(inputs, num_classes):
    expected = {"x", "time"} if num_classes is None else {"x", "time", "label"}
    if set(inputs) != expected:
        raise ValueError(
            f"With num_classes={num_classes}, the network takes a dict with {sorted(expected)}. "
            f"Received: {sorted(inputs)}. ('label' goes with num_classes; the label num_classes "
            "means no label.)"
        )


def _check_size(shape, levels):
    if len(shape) != 4 or shape[-1] is None:
        raise ValueError(f"`x` must be images (B, H, W, C) with C known. Received: shape {shape}")
    factor = 2 ** (levels - 1)
    sizes = [size for size in shape[1:3] if size is not None]
    if any(size % factor for size in sizes):
        nearest = ", ".join(f"{size} -> {-(-size // factor) * factor}" for size in sizes)
        raise ValueError(
            f"With {levels} levels, height and width are halved {levels - 1} times and must be "
            f"multiples of {factor}. Received: {shape[1]}x{shape[2]}. Use fewer `widths`, or pad "
            f"the images ({nearest})."
        )
