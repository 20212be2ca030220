"""Score networks: NCSN and NCSNv2, a RefineNet of four cascades, and MLPs for points in the plane.

A score network is called with `{"x": x, "time": level}`: data and the number of their noise level,
0 for the largest noise. It returns ∇ log q_σ(x), of the shape of x.

NCSN (Song & Ermon 2019, arXiv:1907.05600, app. A) tells the levels apart in its normalization, of
which each level has its own copy. NCSNv2 (arXiv:2006.09011, app. B) is not told the level at all:
its output is divided by σ (technique 3), because the norm of a score is about √D/σ. Both follow the
RefineNet of Lin et al. 2017 (arXiv:1611.06612) with dilated convolutions for strides:

    x → conv → residual blocks: width w, 2w at half the size, 2w with dilation 2, 2w with dilation 4
        ← four refine blocks, from the last to the first: adapt, fuse (resizing), pool in chains

All activations are ELU, of which the second derivative does not vanish.
"""

# ruff: noqa: D102 (`build`, `call` and the like are described in the class docstrings)

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import keras
import numpy as np
from keras import ops

from tfdiffusion import _backend
from tfdiffusion.networks import MLP
from tfdiffusion.networks.layers import check_inputs, check_tensors, positive_int
from tfdiffusion.networks.unet import from_patches, to_patches
from tfdiffusion.score_matching.ladders import check_ladder

_register = keras.saving.register_keras_serializable(package="tfdiffusion")

_EPSILON = 1e-5


def _level(time):
    """Level numbers as integers (B,); they may come through floating-point times."""
    return ops.cast(ops.round(time), "int32")


@_register
class InstanceNormPlus(keras.layers.Layer):
    """InstanceNorm++, and CondInstanceNorm++ with a copy of γ, α, β for each noise level.

    With μ_k, s_k the mean and standard deviation of channel k of one image, and m, v those of the
    μ_k over the channels (arXiv:1907.05600, app. A.1),

        z_k = γ_k [(x_k − μ_k)/s_k + α_k (μ_k − m)/v] + β_k.

    Instance normalization alone would hide the means, that is the colours; α keeps them in view.

    Args:
        num_levels: None for one γ, α, β; else how many levels have their own.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: `(B, H, W, C)`, C >= 2.
        level: int `(B,)`, with `num_levels` only.
    """

    def __init__(self, num_levels: int | None = None, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.num_levels = None if num_levels is None else positive_int("num_levels", num_levels)

    def build(self, input_shape):
        channels = input_shape[-1]
        if channels < 2:
            raise ValueError(f"InstanceNormPlus needs at least 2 channels. Received {channels}.")
        shape = (self.num_levels or 1, channels)
        near_one = keras.initializers.RandomNormal(1.0, 0.02)
        self.gamma = self.add_weight(name="gamma", shape=shape, initializer=near_one)
        self.alpha = self.add_weight(name="alpha", shape=shape, initializer=near_one)
        self.beta = self.add_weight(name="beta", shape=shape, initializer="zeros")
        self.built = True

    def call(self, inputs, level=None):
        def of_level(table):  # (levels, C) -> (B or 1, C)
            table = ops.cast(table, "float32")
            return table if self.num_levels is None else ops.take(table, level, axis=0)

        x = ops.cast(inputs, "float32")
        mean = ops.mean(x, axis=(1, 2))  # (B, C)
        variance = ops.mean(ops.square(x - mean[:, None, None]), axis=(1, 2))
        centered = mean - ops.mean(mean, axis=-1, keepdims=True)
        # The unbiased variance, as in the authors' networks.
        spread = ops.sum(ops.square(centered), axis=-1, keepdims=True) / (mean.shape[-1] - 1)
        across = centered * ops.rsqrt(spread + _EPSILON)

        multiplier = of_level(self.gamma) * ops.rsqrt(variance + _EPSILON)
        offset = of_level(self.gamma) * of_level(self.alpha) * across + of_level(self.beta)
        x = (x - mean[:, None, None]) * multiplier[:, None, None] + offset[:, None, None]
        return ops.cast(x, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return {**super().get_config(), "num_levels": self.num_levels}


def _conv(
    channels: int, kernel: int = 3, *, dilation: int = 1, bias: bool = True, dtype=None, name=None
):
    """A convolution that keeps the size, with weights uniform on ±1/√fan_in."""
    uniform = keras.initializers.VarianceScaling(1.0 / 3.0, "fan_in", "uniform")
    return keras.layers.Conv2D(
        channels,
        kernel,
        padding="same",
        dilation_rate=dilation,
        use_bias=bias,
        kernel_initializer=uniform,
        dtype=dtype,
        name=name,
    )


class _Block(keras.layers.Layer):
    """A layer of convolutions with a norm before each, if it has norms at all.

    Args:
        num_levels: of its norms; 0 for none, None for norms that levels share.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(self, num_levels: int | None, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.num_levels = num_levels

    def _norm(self, name: str):
        if self.num_levels == 0:
            return None
        return InstanceNormPlus(self.num_levels, dtype=self.dtype_policy, name=name)


def _build(layer, shape) -> tuple:
    """Builds a layer, or none, for a shape; returns the shape that comes out."""
    if layer is None:
        return shape
    layer.build(shape)
    return layer.compute_output_shape(shape)


class ResidualBlock(_Block):
    """`shortcut(x) + conv(ELU(norm(conv(ELU(norm(x))))))`, with a change of size or of dilation.

    Args:
        channels: of the output.
        num_levels: see `_Block`.
        down: halve the size by 2×2 means or, with a dilation, keep it; the shortcut is then a
            convolution.
        dilation: of all its 3×3 convolutions.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: `(B, H, W, C)`; height and width even if they are halved.
        level: int `(B,)`.
    """

    def __init__(self, channels, num_levels, *, down=False, dilation=1, **kwargs):
        super().__init__(num_levels, **kwargs)
        self.channels, self.down, self.dilation = channels, down, dilation
        self.halves = down and dilation == 1

    def build(self, input_shape):
        policy, dilation = self.dtype_policy, self.dilation
        inner = input_shape[-1] if self.down else self.channels
        self.norm_1, self.norm_2 = self._norm("norm_1"), self._norm("norm_2")
        self.conv_1 = _conv(inner, dilation=dilation, dtype=policy, name="conv_1")
        self.conv_2 = _conv(self.channels, dilation=dilation, dtype=policy, name="conv_2")
        self.shortcut = None
        if self.down:
            kernel = 1 if self.halves else 3
            self.shortcut = _conv(
                self.channels, kernel, dilation=dilation, dtype=policy, name="shortcut"
            )
            self.shortcut.build(input_shape)
        shape = input_shape
        for layer in (self.norm_1, self.conv_1, self.norm_2, self.conv_2):
            shape = _build(layer, shape)
        self.built = True

    def call(self, inputs, level=None):
        x = self.conv_1(ops.elu(self.norm_1(inputs, level)))
        x = self.conv_2(ops.elu(self.norm_2(x, level)))
        x = x + (inputs if self.shortcut is None else self.shortcut(inputs))
        return ops.average_pool(x, 2, 2) if self.halves else x

    def compute_output_shape(self, input_shape):
        batch, height, width, _ = input_shape
        if self.halves:
            height, width = (side and side // 2 for side in (height, width))
        return batch, height, width, self.channels


class ResidualConvUnits(_Block):
    """RefineNet's RCU: `blocks` times `x + conv(ELU(conv(ELU(x))))`, without biases.

    Args:
        num_levels: see `_Block`.
        blocks: how many.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(self, num_levels, blocks: int, **kwargs):
        super().__init__(num_levels, **kwargs)
        self.blocks = blocks

    def build(self, input_shape):
        self.norms, self.convs = [], []
        for i in range(2 * self.blocks):
            norm = self._norm(f"norm_{i}")
            conv = _conv(input_shape[-1], bias=False, dtype=self.dtype_policy, name=f"conv_{i}")
            _build(norm, input_shape)
            conv.build(input_shape)
            self.norms += [] if norm is None else [norm]
            self.convs.append(conv)
        self.built = True

    def call(self, inputs, level=None):
        x = inputs
        for i in range(self.blocks):
            residual = x
            for k in (2 * i, 2 * i + 1):
                x = self.norms[k](x, level) if self.norms else x
                x = self.convs[k](ops.elu(x))
            x = x + residual
        return x

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)


class ChainedResidualPooling(_Block):
    """RefineNet's CRP: two stages of `path ← conv(pool(path))`, each added to what was there.

    The pools are 5×5 with stride 1: maxima without norms (NCSNv2), means behind norms (NCSN).

    Args:
        num_levels: see `_Block`.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def build(self, input_shape):
        self.norms, self.convs = [], []
        for i in range(2):
            norm = self._norm(f"norm_{i}")
            conv = _conv(input_shape[-1], bias=False, dtype=self.dtype_policy, name=f"conv_{i}")
            _build(norm, input_shape)
            conv.build(input_shape)
            self.norms += [] if norm is None else [norm]
            self.convs.append(conv)
        self.built = True

    def call(self, inputs, level=None):
        x = path = ops.elu(inputs)
        for norm, conv in zip(self.norms or (None, None), self.convs):
            if norm is None:
                path = ops.max_pool(path, 5, 1, padding="same")
            else:
                path = ops.average_pool(norm(path, level), 5, 1, padding="same")
            path = conv(path)
            x = x + path
        return x

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)


def resize_bilinear(x, height: int, width: int):
    """Bilinear resizing that maps corners onto corners: `(B, H, W, C)` → `(B, height, width, C)`.

    Written as a product with one matrix an axis. `keras.ops.image.resize` aligns the pixels'
    outer edges instead, which RefineNet's published weights don't expect.
    """
    rows, columns = x.shape[1], x.shape[2]
    if rows != height:
        x = ops.einsum("oh,bhwc->bowc", ops.cast(_interpolation(rows, height), x.dtype), x)
    if columns != width:
        x = ops.einsum("ow,bhwc->bhoc", ops.cast(_interpolation(columns, width), x.dtype), x)
    return x


def _interpolation(size: int, new_size: int) -> np.ndarray:
    """float32 (new_size, size): how much each old place weighs in each new one."""
    places = np.linspace(0.0, size - 1.0, new_size)[:, None]
    return np.maximum(1.0 - np.abs(places - np.arange(size)), 0.0).astype("float32")


class RefineBlock(_Block):
    """Adapts each input, fuses them at the size of the first, pools in chains, adapts again.

    Args:
        channels: of the output.
        num_levels: see `_Block`.
        last: three residual units at the end instead of one.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: list of one or two `(B, H, W, C)`, the larger one first.
        level: int `(B,)`.
    """

    def __init__(self, channels, num_levels, *, last: bool = False, **kwargs):
        super().__init__(num_levels, **kwargs)
        self.channels, self.last = channels, last

    def build(self, input_shape):
        policy, levels = self.dtype_policy, self.num_levels
        self.adapt, self.fuse_norms, self.fuse = [], [], []
        for i, shape in enumerate(input_shape):
            self.adapt.append(ResidualConvUnits(levels, 2, dtype=policy, name=f"adapt_{i}"))
            self.adapt[-1].build(shape)
            if len(input_shape) > 1:
                norm = self._norm(f"fuse_norm_{i}")
                _build(norm, shape)
                self.fuse_norms += [] if norm is None else [norm]
                self.fuse.append(_conv(self.channels, dtype=policy, name=f"fuse_{i}"))
                self.fuse[-1].build(shape)
        fused = (*input_shape[0][:3], self.channels)
        self.pool = ChainedResidualPooling(levels, dtype=policy, name="pool")
        self.pool.build(fused)
        self.out = ResidualConvUnits(levels, 3 if self.last else 1, dtype=policy, name="out")
        self.out.build(fused)
        self.built = True

    def call(self, inputs, level=None):
        xs = [adapt(x, level) for adapt, x in zip(self.adapt, inputs)]
        if self.fuse:
            if self.fuse_norms:
                xs = [norm(x, level) for norm, x in zip(self.fuse_norms, xs)]
            height, width = inputs[0].shape[1:3]
            xs = [resize_bilinear(conv(x), height, width) for conv, x in zip(self.fuse, xs)]
        return self.out(self.pool(sum(xs[1:], xs[0]), level), level)

    def compute_output_shape(self, input_shape):
        return (*input_shape[0][:3], self.channels)


class _RefineNet(keras.Model):
    """The network that NCSN and NCSNv2 share.

    Args:
        width: w, channels at full size.
        num_levels: of the norms in residual blocks: None for norms that levels share.
        refine_levels: of the norms in refine blocks, 0 for none.
        patch_size: side of the pixel blocks seen as one position.
        **kwargs: `name`, `dtype` and `trainable` of `keras.Model`.
    """

    num_classes = None

    def __init__(self, width, num_levels, refine_levels, patch_size, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.width = w = positive_int("width", width)
        self.patch_size = positive_int("patch_size", patch_size)
        policy = self.dtype_policy

        def cascade(channels, name, **changes):
            first = ResidualBlock(channels, num_levels, dtype=policy, name=f"{name}_0", **changes)
            changes.pop("down", None)
            second = ResidualBlock(channels, num_levels, dtype=policy, name=f"{name}_1", **changes)
            return [first, second]

        def refine(channels, name, last=False):
            return RefineBlock(channels, refine_levels, last=last, dtype=policy, name=name)

        self.conv_in = _conv(w, dtype=policy, name="conv_in")
        cascades = [
            cascade(w, "residual_1"),
            cascade(2 * w, "residual_2", down=True),
            cascade(2 * w, "residual_3", down=True, dilation=2),
            cascade(2 * w, "residual_4", down=True, dilation=4),
        ]
        # For files that do not depend on the version of Keras; see `UNet`.
        self.blocks = [block for blocks in cascades for block in blocks]
        self.steps = SimpleNamespace(cascades=cascades)
        self.refines = [
            refine(2 * w, "refine_4"),
            refine(2 * w, "refine_3"),
            refine(w, "refine_2"),
            refine(w, "refine_1", last=True),
        ]
        self.norm_out = InstanceNormPlus(num_levels, dtype=policy, name="norm_out")

    def build(self, input_shape):
        check_inputs(input_shape, None)
        shape = tuple(input_shape["x"])
        if len(shape) != 4 or None in shape[1:]:
            raise ValueError(
                f"`x` must be images (B, H, W, C) of known size. Received: shape {shape}."
            )
        factor = 2 * self.patch_size
        if shape[1] % factor or shape[2] % factor:
            raise ValueError(
                f"With patches of {self.patch_size}, height and width must be multiples of "
                f"{factor}. Received: shape {shape}."
            )
        sides = (side // self.patch_size for side in shape[1:3])
        x = (None, *sides, shape[3] * self.patch_size**2)
        # The score starts at zero, whatever the width.
        self.conv_out = keras.layers.Conv2D(
            x[-1],
            3,
            padding="same",
            kernel_initializer="zeros",
            dtype=self.dtype_policy,
            name="conv_out",
        )
        x = _build(self.conv_in, x)
        shapes = []
        for blocks in self.steps.cascades:
            for block in blocks:
                x = _build(block, x)
            shapes.append(x)
        x = None
        for block, side in zip(self.refines, reversed(shapes)):
            x = _build(block, [side] if x is None else [side, x])
        self.norm_out.build(x)
        self.conv_out.build(x)
        self.built = True

    def features(self, inputs, level):
        """What comes before the scale of the output: float32, the shape of x."""
        check_inputs(inputs, None)
        check_tensors(inputs, self.conv_in.kernel.shape[2] // self.patch_size**2, rank=4)
        x = inputs["x"]
        x = to_patches(ops.cast(x, self.compute_dtype), self.patch_size)
        x = self.conv_in(x)
        outputs = []
        for blocks in self.steps.cascades:
            for block in blocks:
                x = block(x, level)
            outputs.append(x)
        x = None
        for block, side in zip(self.refines, reversed(outputs)):
            x = block([side] if x is None else [side, x], level)
        x = self.conv_out(ops.elu(self.norm_out(x, level)))
        return ops.cast(from_patches(x, self.patch_size), "float32")

    def compute_output_shape(self, input_shape):
        return tuple(input_shape["x"])

    def get_config(self):
        return {**super().get_config(), "width": self.width, "patch_size": self.patch_size}


@_register
class NCSN(_RefineNet):
    """The noise-conditional score network with CondInstanceNorm++ (arXiv:1907.05600, app. A).

    Args:
        num_levels: how many noise levels it tells apart.
        width: channels at full size; the published networks have 128 (CIFAR-10, CelebA) and 64
            (MNIST).
        patch_size: side of the pixel blocks that the network sees as one position; 1 in the paper.
        **kwargs: `name`, `dtype` and `trainable` of `keras.Model`; anything else is refused.

    Call arguments:
        inputs: `{"x": (B, H, W, C), "time": (B,)}`: images and level numbers, 0 for most noise.
            Height and width are multiples of `2 * patch_size`.

    Returns:
        The score, float32 `(B, H, W, C)`: exactly zero before training, by initialization.

    Raises:
        ValueError: For a configuration or inputs that can't work.
    """

    def __init__(self, num_levels: int = 10, *, width: int = 128, patch_size: int = 1, **kwargs):
        self_levels = positive_int("num_levels", num_levels)
        super().__init__(width, self_levels, self_levels, patch_size, **kwargs)
        self.num_levels = self_levels

    def call(self, inputs, training=False):
        return self.features(inputs, _level(inputs["time"]))

    def get_config(self):
        return {**super().get_config(), "num_levels": self.num_levels}


@_register
class NCSNv2(_RefineNet):
    """The score network with InstanceNorm++ and its output divided by σ (arXiv:2006.09011, app. B).

    Args:
        sigmas: the ladder, falling, of which the level number tells the σ to divide by.
        width: channels at full size; the published networks for 32×32 and 64×64 have 128.
        patch_size: side of the pixel blocks that the network sees as one position; 1 in the paper.
        **kwargs: `name`, `dtype` and `trainable` of `keras.Model`; anything else is refused.

    Call arguments:
        inputs: as for `NCSN`.

    Returns:
        The score, float32 `(B, H, W, C)`: exactly zero before training, by initialization.

    Raises:
        ValueError: For a configuration or inputs that can't work.
    """

    def __init__(self, sigmas: Sequence[float], *, width: int = 128, patch_size: int = 1, **kwargs):
        sigmas = check_ladder(sigmas)
        super().__init__(width, None, 0, patch_size, **kwargs)
        self.sigmas = sigmas.tolist()

    def call(self, inputs, training=False):
        return _over_sigma(self.features(inputs, None), inputs["time"], self.sigmas)

    def get_config(self):
        return {**super().get_config(), "sigmas": self.sigmas}


def _over_sigma(x, time, sigmas):
    """x/σ with the σ of each row's level."""
    sigma = ops.take(ops.cast(np.asarray(sigmas), "float32"), _level(time), axis=0)
    return x / _backend.rows(sigma, x)


@_register
class ScoreMLP(keras.Model):
    """A residual MLP for the score of points: −x/(1 + σ²) + f(x/√(1 + σ²), level)/σ.

    The first term is the score of data that are N(0, I), so the network has to learn how the data
    differ from that, and the field points back to them from far away, where it never saw any.

    Args:
        sigmas: the ladder, falling; None for one score without noise, −x + f(x).
        width: Number of hidden units.
        depth: Number of residual blocks.
        energy: learn an energy E = ‖x‖²/(2(1 + σ²)) + f/σ with one number f a point; the score is
            then −∇E, a field without curl by construction.
        **kwargs: `name`, `dtype` and `trainable` of `keras.Model`; anything else is refused.

    Call arguments:
        inputs: `{"x": (B, D), "time": (B,)}`: points and level numbers, 0 for most noise.

    Returns:
        The score, float32 `(B, D)`: that of N(0, I) before training, by initialization.

    Raises:
        ValueError: For a configuration or inputs that can't work.

    Example:
        >>> network = ScoreMLP([1.0, 0.1], width=64, depth=2)
        >>> x, level = np.zeros((5, 2), "float32"), np.array([0, 0, 1, 1, 1])
        >>> tuple(network({"x": x, "time": level}).shape)
        (5, 2)
    """

    num_classes = None

    def __init__(
        self,
        sigmas: Sequence[float] | None = None,
        *,
        width: int = 128,
        depth: int = 3,
        energy: bool = False,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        self.sigmas = None if sigmas is None else check_ladder(sigmas).tolist()
        self.has_energy = bool(energy)
        self.body = MLP(
            width=width,
            depth=depth,
            out_features=1 if energy else None,
            dtype=self.dtype_policy,
            name="body",
        )

    def build(self, input_shape):
        check_inputs(input_shape, None)
        self.body.build(input_shape)
        if self.has_energy:  # known up to a constant
            self.body.dense_out.bias.trainable = False
        self.built = True

    def _scales(self, time, x):
        """1 + σ² and σ of each row's level, (B, 1); both 1 without a ladder."""
        if self.sigmas is None:
            return 1.0, 1.0
        sigma = ops.take(ops.cast(np.asarray(self.sigmas), "float32"), _level(time), axis=0)
        sigma = _backend.rows(ops.broadcast_to(sigma, ops.shape(x)[:1]), x)
        return 1.0 + sigma**2, sigma

    def energy(self, inputs):
        """E(x, level) up to a constant, float32 `(B,)`; the score is −∇E.

        Raises:
            ValueError: If the network was made without `energy=True`.
        """
        if not self.has_energy:
            raise ValueError(
                "This network learns a score that need not be a gradient, so it has no energy. "
                "Make it with ScoreMLP(..., energy=True)."
            )
        x = ops.convert_to_tensor(inputs["x"], dtype="float32")
        variance, sigma = self._scales(inputs["time"], x)
        learned = self.body({"x": x / variance**0.5, "time": inputs["time"]}) / sigma
        return ops.sum(0.5 * x**2 / variance, axis=-1) + learned[:, 0]

    def call(self, inputs, training=False):
        check_inputs(inputs, None)
        x, time = inputs["x"], inputs["time"]
        if not self.has_energy:
            variance, sigma = self._scales(time, x)
            return self.body({"x": x / variance**0.5, "time": time}) / sigma - x / variance
        _, gradient = _backend.vjp(lambda x: self.energy({"x": x, "time": time}), x)
        return -gradient

    def compute_output_shape(self, input_shape):
        return tuple(input_shape["x"])

    def get_config(self):
        return {
            **super().get_config(),
            "sigmas": self.sigmas,
            "width": self.body.width,
            "depth": self.body.depth,
            "energy": self.has_energy,
        }
