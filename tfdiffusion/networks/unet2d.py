"""The U-Net that published checkpoints need: each level says what it is made of.

`UNet` has one kind of level and few arguments, and is what to train. `UNet2D` is a list of levels,
and holds what others have trained: diffusers' `UNet2DModel` with its five kinds of blocks, and the
NCSN++ and DDPM++ of Song et al. 2021 (arXiv:2011.13456, app. H). `tfdiffusion.convert` makes it
from their files.
"""

# ruff: noqa: D102 (`build`, `call` and the like are described in the class docstrings)

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import keras
from keras import ops

from tfdiffusion import _checks
from tfdiffusion.networks.blocks import (
    DecoderBlock,
    Embedding,
    EncoderBlock,
    InputPyramid,
    OutputPyramid,
    TimeFeatures,
    quarter,
)
from tfdiffusion.networks.layers import (
    Downsample,
    GroupNormalization,
    ResidualBlock,
    SelfAttention,
    Upsample,
    check_tensors,
    choice,
    int_tuple,
    label_embedding,
    positive_float,
    positive_int,
)

#: Numbers of groups that follow from the channels (of x, of the skip that is put beside it).
GROUPS = {
    # At least four channels in a group, at most 32 groups.
    "quarter": lambda channels, skip: quarter(channels + skip),
    # The same, but that where there is a skip, diffusers' AttnSkipUpBlock2D divides only that.
    "quarter_of_skip": lambda channels, skip: (
        min(channels + skip // 4, 32) if skip else quarter(channels)
    ),
}


@dataclasses.dataclass(frozen=True)
class Level:
    """What one level of a `UNet2D`, in the encoder, the middle or the decoder, is made of.

    Args:
        width: Channels.
        blocks: Residual blocks.
        attention: `None`, `"each"` behind each residual block (in the middle: between them), or
            `"last"` behind the last.
        resample: To the next level: `"conv"`; `"residual"`, a residual block that averages or
            repeats; `"projected"`, one with a 1x1 convolution in its shortcut; `"smooth"`, one that
            smooths, too; or `None` for the last.
        pyramid: Of the image, `"skip"` or, in the encoder, `"residual"`; see `networks.blocks`.
        groups: Of the normalizations, a number or a key of `GROUPS`.
        attention_groups: Of the attention's, a number, `"quarter"`, or `None` for no normalization.
        head_dim: Channels of a head of attention. Default: one head.
        output_scale: Divides each sum of shortcut and branch.
    """

    width: int
    blocks: int
    attention: str | None = None
    resample: str | None = None
    pyramid: str | None = None
    groups: int | str = 32
    attention_groups: int | str | None = 32
    head_dim: int | None = None
    output_scale: float = 1.0

    def __post_init__(self):
        positive_int("width", self.width)
        positive_int("blocks", self.blocks)
        choice("attention", self.attention, (None, "each", "last"))
        choice("resample", self.resample, (None, "conv", "residual", "projected", "smooth"))
        choice("pyramid", self.pyramid, (None, "skip", "residual"))
        for name in ("groups", "attention_groups"):
            _check_groups(name, getattr(self, name), none=name == "attention_groups")
        positive_float("output_scale", self.output_scale)
        head_dim = self.width if self.head_dim is None else positive_int("head_dim", self.head_dim)
        if self.attention and head_dim > self.width:
            raise ValueError(
                "`head_dim` must be at most the width. Received: "
                f"head_dim={self.head_dim}, width={self.width}."
            )

    def has_attention(self, block: int) -> bool:
        """Whether there is attention behind a residual block."""
        return self.attention == "each" or (self.attention == "last" and block == self.blocks - 1)


@keras.saving.register_keras_serializable(package="tfdiffusion")
class UNet2D(keras.Model):
    """U-Net on images, level by level.

    Args:
        out_channels: Channels of the output.
        encoder: `Level`s (or dicts of their arguments) from the full size down. Every level but the
            last resamples. Height and width must be multiples of `2 ** (len(encoder) - 1)`.
        middle: A `Level` of two residual blocks, or `None`.
        decoder: Levels from the smallest size up, as many as in the encoder. Together they have as
            many residual blocks as the encoder has skips: one for `conv_in`, for each residual
            block and for each resampling.
        norm_epsilon: Epsilon of the normalizations.
        out_groups: Of the last normalization, a number or `"quarter"`.
        activation: Of the residual blocks: `"silu"`, `"relu"`, `"gelu"` or `"mish"`.
        scale_shift: Whether the embedding modulates the normalization instead of being added.
        downsample_padding: Of strided convolutions: 0 pads below and right, 1 all around.
        dropout: Dropout rate inside the residual blocks.
        time_embedding: `"sinusoidal"` or `"learned"`, of timesteps; or `"fourier"`, of the
            logarithm of σ, with as many frequencies as the first level has channels.
        time_width: Size of the embedding. Default: `4 * encoder[0].width`.
        time_scale, time_shift: What is embedded is `time_scale * time + time_shift`.
        freq_shift, flip_sin_to_cos, num_times: See `TimeFeatures`.
        label: `None`; `"class"`, with a vector for each of `num_classes` and one for "no label";
            `"time"`, a number that is embedded as the time is; `"vector"`, `(B, time_width)`.
        num_classes: Of `label="class"`.
        input_map: `"center"` maps x from [0, 1] to [−1, 1] first, `"uncenter"` from [−1, 1] to
            [0, 1]; `None` leaves it.
        divide_by_sigma: Whether the output is divided by `time`, then σ, as a score's is.
        **kwargs: `name`, `dtype` and `trainable` of `keras.Model`; anything else is refused.

    Call arguments:
        inputs: A dict: `"x"` `(B, H, W, C)`, `"time"` `(B,)` float32 and, with `label`, `"label"`.
        training: Whether dropout is active.

    Returns:
        `(B, H, W, out_channels)` float32.

    Raises:
        ValueError: For a configuration, a size or inputs that can't work.

    Example:
        >>> level = {"width": 32, "blocks": 1, "groups": 8}
        >>> network = UNet2D(out_channels=1, encoder=[level], middle=None,
        ...                  decoder=[{**level, "blocks": 2}], out_groups=8)
        >>> x, time = np.zeros((2, 8, 8, 1), "float32"), np.array([0.0, 999.0], "float32")
        >>> tuple(network({"x": x, "time": time}).shape)
        (2, 8, 8, 1)
    """

    def __init__(
        self,
        *,
        out_channels: int,
        encoder: Sequence[Level | dict],
        middle: Level | dict | None,
        decoder: Sequence[Level | dict],
        norm_epsilon: float = 1e-5,
        out_groups: int | str = 32,
        activation: str = "silu",
        scale_shift: bool = False,
        downsample_padding: int = 1,
        dropout: float = 0.0,
        time_embedding: str = "sinusoidal",
        time_width: int | None = None,
        time_scale: float = 1.0,
        time_shift: float = 0.0,
        freq_shift: float = 0,
        flip_sin_to_cos: bool = True,
        num_times: int | None = None,
        label: str | None = None,
        num_classes: int | None = None,
        input_map: str | None = None,
        divide_by_sigma: bool = False,
        **kwargs,
    ):
        # Times must reach the embedding in float32, so `call` leaves each cast to the layers.
        super().__init__(autocast=False, **kwargs)
        for name, levels in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(levels, list | tuple) or not levels:
                raise ValueError(
                    f"`{name}` must be a list of Levels, with at least one. Received: "
                    f"{name}={_checks.shown(levels)}"
                )
        choice("time_embedding", time_embedding, ("sinusoidal", "learned", "fourier"))
        _checks.numbers(time_scale=time_scale, time_shift=time_shift, freq_shift=freq_shift)
        _check_groups("out_groups", out_groups)
        self.levels = [_level(level) for level in encoder], [_level(level) for level in decoder]
        self.middle_level = None if middle is None else _level(middle)
        _check_levels(*self.levels)
        choice("label", label, (None, "class", "time", "vector"))
        choice("input_map", input_map, (None, "center", "uncenter"))
        if (label == "class") != (num_classes is not None):
            raise ValueError(
                f"`num_classes` goes with label='class'. Received: label={label!r}, "
                f"num_classes={num_classes!r}."
            )
        self.out_channels = positive_int("out_channels", out_channels)
        self.num_classes, self.label = num_classes, label
        self.time_scale, self.time_shift = float(time_scale), float(time_shift)
        self.input_map, self.divide_by_sigma = input_map, bool(divide_by_sigma)
        first = self.levels[0][0].width
        time_width = 4 * first if time_width is None else time_width
        self.time_width = positive_int("time_width", time_width)
        policy = self.dtype_policy
        self._common = {"norm_epsilon": norm_epsilon, "dtype": policy}
        self._residual = {
            "activation": activation,
            "scale_shift": scale_shift,
            "dropout": dropout,
            **self._common,
        }
        self._padding = downsample_padding

        self.time_features = TimeFeatures(
            time_embedding,
            2 * first if time_embedding == "fourier" else first,
            freq_shift=freq_shift,
            flip_sin_to_cos=flip_sin_to_cos,
            num_times=num_times,
        )
        self.time_embedding = Embedding(self.time_width)
        self.label_embedding = label_embedding(num_classes, self.time_width)
        if label == "time":
            self.label_embedding = Embedding(self.time_width)
        self.conv_in = keras.layers.Conv2D(first, 3, padding="same", dtype=policy)
        self.encoder, self.decoder, self.middle = [], [], None
        channels, self._skips = first, [first]
        for level in self.levels[0]:
            self.encoder.append(self._encoder_block(level, channels))
            self._skips += [level.width] * (level.blocks + (level.resample is not None))
            channels = level.width
        if self.middle_level is not None:
            self.middle = self._encoder_block(self.middle_level, channels, middle=True)
        skips = list(self._skips)
        for level in self.levels[1]:
            taken = [skips.pop() for _ in range(level.blocks)]
            self.decoder.append(self._decoder_block(level, channels, taken))
            channels = level.width
        self.norm_out = GroupNormalization(
            _groups(out_groups, channels), epsilon=norm_epsilon, activation="silu", dtype=policy
        )
        self.conv_out = keras.layers.Conv2D(
            out_channels, 3, padding="same", kernel_initializer="zeros", dtype=policy
        )
        self._config = {
            "out_channels": out_channels,
            "encoder": [dataclasses.asdict(level) for level in self.levels[0]],
            "middle": self.middle_level and dataclasses.asdict(self.middle_level),
            "decoder": [dataclasses.asdict(level) for level in self.levels[1]],
            "norm_epsilon": norm_epsilon,
            "out_groups": out_groups,
            "activation": activation,
            "scale_shift": scale_shift,
            "downsample_padding": downsample_padding,
            "dropout": dropout,
            "time_embedding": time_embedding,
            "time_width": self.time_width,
            "time_scale": time_scale,
            "time_shift": time_shift,
            "freq_shift": freq_shift,
            "flip_sin_to_cos": flip_sin_to_cos,
            "num_times": num_times,
            "label": label,
            "num_classes": num_classes,
            "input_map": input_map,
            "divide_by_sigma": divide_by_sigma,
        }

    # What a level is made of.

    def _residual_block(self, level, channels, skip=0, **kwargs):
        return ResidualBlock(
            level.width,
            groups=_groups(level.groups, channels, skip),
            groups_out=_groups(level.groups, level.width),
            output_scale=level.output_scale,
            **self._residual,
            **kwargs,
        )

    def _attention(self, level):
        head_dim = level.head_dim or level.width
        return SelfAttention(
            head_dim=head_dim,
            width=level.width // head_dim * head_dim,
            groups=_groups(level.attention_groups, level.width),
            output_scale=level.output_scale,
            **self._common,
        )

    def _resampling(self, level, direction):
        """The layer between a level and the next, or None."""
        if level.resample is None:
            return None
        if level.resample == "conv":
            if direction == "up":
                return Upsample("conv", dtype=self.dtype_policy)
            return Downsample("conv", padding=self._padding, dtype=self.dtype_policy)
        return self._residual_block(
            level,
            level.width,
            resample=f"fir_{direction}" if level.resample == "smooth" else direction,
            project_shortcut=level.resample != "residual",
        )

    def _encoder_block(self, level, channels, middle=False):
        residuals = [
            self._residual_block(level, channels if block == 0 else level.width)
            for block in range(level.blocks)
        ]
        last = level.blocks - 1 if middle else level.blocks
        attentions = [
            self._attention(level) if level.has_attention(block) and block < last else None
            for block in range(level.blocks)
        ]
        pyramid = None
        if level.pyramid and level.resample:
            scale = {"output_scale": level.output_scale, "dtype": self.dtype_policy}
            pyramid = InputPyramid(level.pyramid, level.width, **scale)
        return EncoderBlock(residuals, attentions, self._resampling(level, "down"), pyramid)

    def _decoder_block(self, level, channels, skips):
        residuals = [
            self._residual_block(level, channels if block == 0 else level.width, skip)
            for block, skip in enumerate(skips)
        ]
        attentions = [
            self._attention(level) if level.has_attention(block) else None
            for block in range(level.blocks)
        ]
        pyramid = None
        if level.pyramid:
            pyramid = OutputPyramid(
                self.out_channels if level.resample else 0, quarter(level.width), **self._common
            )
        return DecoderBlock(residuals, attentions, self._resampling(level, "up"), pyramid)

    # Keras.

    def build(self, input_shape):
        self._check_inputs(input_shape)
        x = tuple(input_shape["x"])  # a list after loading
        self._check_size(x)
        embedding = (None, self.time_width)
        self.time_features.build((None,))
        self.time_embedding.build((None, self.time_features.features))
        if self.label == "class":
            self.label_embedding.build((None,))
        elif self.label == "time":
            self.label_embedding.build((None, self.time_features.features))
        self.conv_in.build(x)
        space, image = (None, None, None), x[-1]
        channels, skips = self.levels[0][0].width, list(self._skips)
        for block, level in zip(self.encoder, self.levels[0]):
            block.build((*space, channels), embedding, (*space, image))
            channels = level.width
            image = channels if level.pyramid == "residual" else image
        if self.middle is not None:
            self.middle.build((*space, channels), embedding)
        for block, level in zip(self.decoder, self.levels[1]):
            skips, taken = skips[: -level.blocks], skips[-level.blocks :]
            block.build((*space, channels), taken, embedding)
            channels = level.width
        self.norm_out.build((*space, channels))
        self.conv_out.build((*space, channels))
        self.built = True

    def call(self, inputs, training=False):
        self._check_inputs(inputs)
        looked_at = {k: v for k, v in inputs.items() if k != "label" or self.label == "class"}
        check_tensors(looked_at, self.conv_in.kernel.shape[2], 4, self.num_classes)
        time = ops.cast(inputs["time"], "float32")
        embedding = self._embed(time, inputs.get("label"))
        x = ops.cast(inputs["x"], self.compute_dtype)
        if self.input_map is not None:
            x = 2.0 * x - 1.0 if self.input_map == "center" else 0.5 * x + 0.5
        conditions = {"embedding": embedding, "training": training}

        image, x = x, self.conv_in(x)
        skips = [x]
        for block in self.encoder:
            x, more, image = block(x, image=image, **conditions)
            skips += more
        if self.middle is not None:
            x, _, _ = self.middle(x, **conditions)
        image = None
        for block, level in zip(self.decoder, self.levels[1]):
            skips, taken = skips[: -level.blocks], skips[-level.blocks :]
            x, image = block(x, skips=taken, image=image, **conditions)
        x = ops.cast(self.conv_out(self.norm_out(x)), "float32")
        if image is not None:
            x = x + ops.cast(image, "float32")
        return x / time[:, None, None, None] if self.divide_by_sigma else x

    def _embed(self, time, label=None):
        def features(number):
            return self.time_features(self.time_scale * number + self.time_shift)

        embedding = self.time_embedding(features(time))
        if self.label is None:
            return embedding
        if self.label == "time":
            return embedding + self.label_embedding(self.time_features(label))
        return embedding + (label if self.label == "vector" else self.label_embedding(label))

    def compute_output_shape(self, input_shape):
        return (*input_shape["x"][:-1], self.out_channels)

    def get_config(self):
        return {**super().get_config(), **self._config}

    def _check_inputs(self, inputs):
        expected = ["time", "x"] if self.label is None else ["label", "time", "x"]
        received = sorted(inputs) if isinstance(inputs, dict) else type(inputs).__name__
        if received != expected:
            raise ValueError(
                f"A network with label={self.label!r} takes a dict with {expected}. Received: "
                f"{received}."
            )

    def _check_size(self, shape):
        if len(shape) != 4 or shape[-1] is None:
            raise ValueError(
                f"`x` must be images (B, H, W, C) with C known. Received: shape {shape}"
            )
        factor = 2 ** (len(self.encoder) - 1)
        if any(size % factor for size in shape[1:3] if size is not None):
            raise ValueError(
                f"With {len(self.encoder)} levels, height and width must be multiples of {factor}. "
                f"Received: {shape[1]}x{shape[2]}. Pad the images."
            )


def _level(level: Level | dict) -> Level:
    if isinstance(level, Level):
        return level
    known = {field.name for field in dataclasses.fields(Level)}
    if not isinstance(level, dict) or not {"width", "blocks"} <= set(level) <= known:
        raise ValueError(
            "A level must be a Level, or a dict of its arguments: width, blocks and what else is "
            f"not by default. Received: {_checks.shown(level)}"
        )
    return Level(**level)


def _check_groups(name: str, groups: object, none: bool = False) -> None:
    if isinstance(groups, str):
        choice(name, groups, tuple(GROUPS))
    elif groups is not None or not none:
        positive_int(name, groups)


def _groups(groups: int | str | None, channels: int, skip: int = 0) -> int | None:
    return GROUPS[groups](channels, skip) if isinstance(groups, str) else groups


def _check_levels(encoder: list[Level], decoder: list[Level]) -> None:
    int_tuple("encoder", [level.width for level in encoder])  # one at least
    for name, levels in (("encoder", encoder), ("decoder", decoder)):
        halts = [level.resample is None for level in levels]
        if halts != [False] * (len(levels) - 1) + [True]:
            raise ValueError(
                f"Every level of `{name}` but the last must resample. Received: "
                f"resample={[level.resample for level in levels]}."
            )
    if len(encoder) != len(decoder):
        raise ValueError(
            f"Encoder and decoder must have as many levels. Received: {len(encoder)} and "
            f"{len(decoder)}."
        )
    made = 1 + sum(level.blocks + (level.resample is not None) for level in encoder)
    taken = sum(level.blocks for level in decoder)
    if made != taken:
        raise ValueError(
            f"The decoder must have a residual block for each of the {made} skips of the encoder. "
            f"Received: {taken} blocks."
        )
    image = [level.pyramid for level in encoder[:-1]]
    if image != sorted(image, key=lambda kind: kind is None):
        raise ValueError(
            "The image's pyramid must begin at the first level of the encoder, so that it has the "
            f"size of the next. Received: pyramid={image}."
        )
    image = [level.pyramid for level in decoder]
    if image != sorted(image, key=lambda kind: kind is not None) or "residual" in image:
        raise ValueError(
            "The image's pyramid of the decoder, of kind 'skip', must go on to its last level. "
            f"Received: pyramid={image}."
        )
