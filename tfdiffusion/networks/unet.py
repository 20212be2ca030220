"""The U-Net of diffusion models, one network for the configurations that papers publish.

An encoder of residual blocks halves the image level by level, a decoder doubles it back, and each
encoder output is handed to the decoder block of its size. DDPM (arXiv:2006.11239), improved DDPM
(arXiv:2102.09672) and ADM (arXiv:2105.05233) are settings of it.
"""

# ruff: noqa: D102 (`build`, `call` and the like are described in the class docstrings)

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import keras
from keras import ops

from tfdiffusion import _checks
from tfdiffusion.networks.layers import (
    Downsample,
    GroupNormalization,
    ResidualBlock,
    SelfAttention,
    TimeEmbedding,
    Upsample,
    check_inputs,
    check_tensors,
    choice,
    int_tuple,
    label_embedding,
    positive_int,
    split_heads,
)


@keras.saving.register_keras_serializable(package="tfdiffusion")
class UNet(keras.Model):
    """U-Net on images, conditioned on one number per image and, optionally, on a class.

    Args:
        out_channels: Channels of the output, usually those of the image.
        widths: Channels of each level; every level but the first has half the size of the one
            before it. Height and width must be multiples of
            `patch_size * 2 ** (len(widths) - 1)`.
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
        patch_size: Side of the pixel blocks that the network sees as one position; above 1 it works
            at `1 / patch_size` of the size throughout, at a fraction of the cost.
        downsample_padding: Of the strided convolution: 0 pads below and right, 1 all around.
        dropout: Dropout rate inside the residual blocks.
        output_scale: Divides each sum of shortcut and branch, e.g. sqrt(2).
        time_embedding: `"sinusoidal"`, with `widths[0]` features, or `"fourier"`, with as many
            frequencies, so twice the features.
        time_width: Size of the embedding. Default: `4 * widths[0]`.
        freq_shift, flip_sin_to_cos, fourier_scale: See `TimeEmbedding`.
        num_classes: Number of classes, or `None`. The embedding has one row more: label
            `num_classes` means "no label".
        remat: Whether training forgets what it computes inside the blocks and computes it again
            for the gradient: a third more time, and a fraction of the memory.
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
        >>> x, time = np.zeros((2, 28, 28, 1), "float32"), np.array([10.0, 999.0], "float32")
        >>> y = network({"x": x, "time": time, "label": np.array([3, 10])})  # 10: no label
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
        patch_size: int = 1,
        dropout: float = 0.0,
        output_scale: float = 1.0,
        time_embedding: str = "sinusoidal",
        time_width: int | None = None,
        freq_shift: int = 1,
        flip_sin_to_cos: bool = False,
        fourier_scale: float = 16.0,
        num_classes: int | None = None,
        remat: bool = False,
        **kwargs,
    ):
        # Times must reach the embedding in float32, so `call` leaves each cast to the layers.
        super().__init__(autocast=False, **kwargs)
        widths = int_tuple("widths", widths)
        if isinstance(blocks_per_level, int):
            blocks_per_level = (blocks_per_level,) * len(widths)
        blocks_per_level = int_tuple("blocks_per_level", blocks_per_level)
        _check_levels(widths, blocks_per_level, attention_levels, groups)
        time_width = 4 * widths[0] if time_width is None else positive_int("time_width", time_width)
        choice("time_embedding", time_embedding, ("sinusoidal", "fourier"))
        if remat and dropout:
            raise ValueError(
                "`remat` computes blocks twice, and dropout would drop other values the second "
                f"time. Received: remat=True, dropout={dropout}. Set one of them to zero."
            )
        policy = self.dtype_policy
        common = {
            "groups": groups,
            "norm_epsilon": norm_epsilon,
            "output_scale": output_scale,
            "dtype": policy,
        }

        # The network is made of steps, lists of layers. Each encoder step hands its output over as
        # a skip, each decoder step takes one, but for those that resize.
        def residual(width, resample=None):
            return ResidualBlock(
                width, scale_shift=scale_shift, dropout=dropout, resample=resample, **common
            )

        def attention(width):
            split_heads(width, num_heads, head_dim)  # refuse now what `build` would refuse
            return SelfAttention(num_heads=num_heads, head_dim=head_dim, **common)

        def step(width, level):
            return [residual(width), *([attention(width)] if level in attention_levels else [])]

        def halve(width):
            if choice("downsample", downsample, ("conv", "pool", "resnet")) == "resnet":
                return [residual(width, "down")]
            return [Downsample(downsample, padding=downsample_padding, dtype=policy)]

        def double(width):
            if choice("upsample", upsample, ("conv", "nearest", "resnet")) == "resnet":
                return [residual(width, "up")]
            return [Upsample(upsample, dtype=policy)]

        encoder, decoder = [], []
        for level, width in enumerate(widths):
            encoder += [halve(widths[level - 1])] if level else []
            encoder += [step(width, level) for _ in range(blocks_per_level[level])]
        for level, width in reversed(list(enumerate(widths))):
            decoder += [step(width, level) for _ in range(blocks_per_level[level] + 1)]
            decoder += [double(width)] if level else []
        extra = [attention(widths[-1])] if mid_attention else []

        self.widths = widths
        self.out_channels = positive_int("out_channels", out_channels)
        self.patch_size = positive_int("patch_size", patch_size)
        self.num_classes = num_classes
        self.time_embedding = TimeEmbedding(
            time_width,
            features=2 * widths[0] if time_embedding == "fourier" else widths[0],
            kind=time_embedding,
            freq_shift=freq_shift,
            flip_sin_to_cos=flip_sin_to_cos,
            fourier_scale=fourier_scale,
            dtype=policy,
        )
        self.label_embedding = label_embedding(num_classes, time_width)
        self.conv_in = keras.layers.Conv2D(widths[0], 3, padding="same", dtype=policy)
        middle = [residual(widths[-1]), *extra, residual(widths[-1])]
        # Keras saves lists of layers, but only from version 3.13 on lists of such lists. So it gets
        # a flat one, and a file is the same whoever wrote it.
        self.blocks = [layer for step in (*encoder, middle, *decoder) for layer in step]
        self.steps = SimpleNamespace(encoder=encoder, middle=middle, decoder=decoder)
        self.norm_out = GroupNormalization(
            groups, epsilon=norm_epsilon, activation="silu", dtype=policy
        )
        self.conv_out = keras.layers.Conv2D(
            out_channels * patch_size**2,
            3,
            padding="same",
            kernel_initializer="zeros",
            dtype=policy,
        )
        self._config = {
            "out_channels": out_channels,
            "widths": widths,
            "blocks_per_level": blocks_per_level,
            "attention_levels": tuple(attention_levels),
            "mid_attention": mid_attention,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "groups": groups,
            "norm_epsilon": norm_epsilon,
            "scale_shift": scale_shift,
            "downsample": downsample,
            "upsample": upsample,
            "downsample_padding": downsample_padding,
            "patch_size": patch_size,
            "dropout": dropout,
            "output_scale": output_scale,
            "time_embedding": time_embedding,
            "time_width": time_width,
            "freq_shift": freq_shift,
            "flip_sin_to_cos": flip_sin_to_cos,
            "fourier_scale": fourier_scale,
            "num_classes": num_classes,
            "remat": bool(remat),
        }

    def build(self, input_shape):
        check_inputs(input_shape, self.num_classes)
        x = tuple(input_shape["x"])  # a list after loading
        _check_size(x, len(self.widths), self.patch_size)
        embedding = (None, self.time_embedding.width)

        def build(step, shape):
            for layer in step:
                layer.build(*((shape, embedding) if _is_conditioned(layer) else (shape,)))
                shape = tuple(layer.compute_output_shape(shape))
            return shape

        self.time_embedding.build((None,))
        if self.label_embedding is not None:
            self.label_embedding.build((None,))
        sides = (side and side // self.patch_size for side in x[1:3])
        x = (x[0], *sides, x[3] * self.patch_size**2)
        self.conv_in.build(x)
        x = (*x[:-1], self.widths[0])
        skips = [x]
        for step in self.steps.encoder:
            x = build(step, x)
            skips.append(x)
        x = build(self.steps.middle, x)
        for step in self.steps.decoder:
            if not _is_resizing(step):
                x = (*x[:-1], x[-1] + skips.pop()[-1])
            x = build(step, x)
        self.norm_out.build(x)
        self.conv_out.build(x)
        self.built = True

    def call(self, inputs, training=False):
        check_inputs(inputs, self.num_classes)
        channels = self.conv_in.kernel.shape[2] // self.patch_size**2
        check_tensors(inputs, channels, 4, self.num_classes)
        _check_size(tuple(inputs["x"].shape), len(self.widths), self.patch_size)
        embedding = self.time_embedding(inputs["time"])
        if self.label_embedding is not None:
            embedding = embedding + self.label_embedding(inputs["label"])

        def run(step, x):
            def layers(x, embedding):
                for layer in step:
                    conditions = {"embedding": embedding, "training": training}
                    x = layer(x, **(conditions if _is_conditioned(layer) else {}))
                return x

            if training and self._config["remat"]:
                return keras.remat(layers)(x, embedding)
            return layers(x, embedding)

        x = to_patches(ops.cast(inputs["x"], self.compute_dtype), self.patch_size)
        x = self.conv_in(x)
        skips = [x]
        for step in self.steps.encoder:
            x = run(step, x)
            skips.append(x)
        x = run(self.steps.middle, x)
        for step in self.steps.decoder:
            if not _is_resizing(step):
                x = ops.concatenate([x, skips.pop()], axis=-1)
            x = run(step, x)
        x = ops.cast(self.conv_out(self.norm_out(x)), "float32")
        return from_patches(x, self.patch_size)

    def compute_output_shape(self, input_shape):
        return (*input_shape["x"][:-1], self.out_channels)

    def get_config(self):
        return {**super().get_config(), **self._config}


def to_patches(x, size):
    """(B, H, W, C) -> (B, H / size, W / size, size² C)."""
    if size == 1:
        return x
    _, height, width, channels = ops.shape(x)
    x = ops.reshape(x, (-1, height // size, size, width // size, size, channels))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    return ops.reshape(x, (-1, height // size, width // size, size * size * channels))


def from_patches(x, size):
    """The inverse of `to_patches`."""
    if size == 1:
        return x
    _, height, width, channels = ops.shape(x)
    x = ops.reshape(x, (-1, height, width, size, size, channels // size**2))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    return ops.reshape(x, (-1, height * size, width * size, channels // size**2))


def _is_conditioned(layer):
    return isinstance(layer, ResidualBlock)


def _is_resizing(step):
    layer = step[0]
    return isinstance(layer, Upsample) or getattr(layer, "resample", None) is not None


def _check_levels(widths, blocks_per_level, attention_levels, groups):
    levels = len(widths)
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
    if not isinstance(attention_levels, (list, tuple)) or any(
        not _checks.is_integer(level) or not 0 <= level < levels for level in attention_levels
    ):
        raise ValueError(
            f"`attention_levels` must be indices of levels, 0 to {levels - 1} for widths="
            f"{widths!r} (0 is the full size). Received: attention_levels={attention_levels!r}"
        )


def _check_size(shape, levels, patch_size):
    if len(shape) != 4 or shape[-1] is None:
        raise ValueError(f"`x` must be images (B, H, W, C) with C known. Received: shape {shape}")
    factor = patch_size * 2 ** (levels - 1)
    sizes = [size for size in shape[1:3] if size is not None]
    if any(size % factor for size in sizes):
        nearest = ", ".join(f"{size} -> {-(-size // factor) * factor}" for size in sizes)
        raise ValueError(
            f"With {levels} levels and patches of {patch_size}, height and width must be multiples "
            f"of {factor}. Received: {shape[1]}x{shape[2]}. Use fewer `widths`, or pad "
            f"the images ({nearest})."
        )
