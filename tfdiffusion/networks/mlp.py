"""A residual multilayer perceptron, for data that are plain vectors such as points in the plane."""

# ruff: noqa: D102 (`build`, `call` and the like are described in the class docstrings)

from __future__ import annotations

import keras
from keras import ops

from tfdiffusion.networks.layers import (
    GroupNormalization,
    TimeEmbedding,
    check_inputs,
    check_tensors,
    label_embedding,
    positive_int,
)


@keras.saving.register_keras_serializable(package="tfdiffusion")
class ResidualDense(keras.layers.Layer):
    """`x + Dense(SiLU(Dense(SiLU(LayerNorm(x))) + Dense(SiLU(embedding))))`, the last one zero.

    Args:
        width: Number of hidden units.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: `(B, D)`. Returns the same shape.
        embedding: `(B, E)`.
    """

    def __init__(self, width: int, **kwargs):
        super().__init__(**kwargs)
        self.width = positive_int("width", width)
        policy = self.dtype_policy
        # One group is layer normalization. Keras' own has a wrong second derivative on TensorFlow
        # (its variance stops a gradient), which implicit and sliced score matching would exploit.
        self.norm = GroupNormalization(1, epsilon=1e-6, dtype=policy, name="norm")
        self.dense_1 = keras.layers.Dense(self.width, dtype=policy, name="dense_1")
        self.embed = keras.layers.Dense(self.width, dtype=policy, name="embed")

    def build(self, inputs_shape, embedding_shape):
        self.norm.build(inputs_shape)
        self.dense_1.build(inputs_shape)
        self.embed.build(embedding_shape)
        self.dense_2 = keras.layers.Dense(
            inputs_shape[-1], kernel_initializer="zeros", dtype=self.dtype_policy, name="dense_2"
        )
        self.dense_2.build((None, self.width))
        self.built = True

    def call(self, inputs, embedding):
        x = self.dense_1(ops.silu(self.norm(inputs))) + self.embed(ops.silu(embedding))
        return inputs + self.dense_2(ops.silu(x))

    def compute_output_shape(self, inputs_shape, embedding_shape=None):
        return tuple(inputs_shape)

    def get_config(self):
        return {**super().get_config(), "width": self.width}


@keras.saving.register_keras_serializable(package="tfdiffusion")
class MLP(keras.Model):
    """Residual MLP on vectors, conditioned on one number per vector and, optionally, on a class.

    All activations are SiLU, so that the network has second derivatives (score matching).

    Args:
        width: Number of hidden units, and size of the embedding.
        depth: Number of residual blocks.
        out_features: Size of the output. Default: that of the data.
        time_embedding: `"sinusoidal"` or `"fourier"`, see `TimeEmbedding`.
        fourier_scale: Standard deviation of the Fourier frequencies.
        num_classes: Number of classes, or `None`. Label `num_classes` means "no label".
        **kwargs: `name`, `dtype` and `trainable` of `keras.Model`; anything else is refused.

    Call arguments:
        inputs: A dict: `"x"` `(B, D)`, `"time"` `(B,)` float32 and, with `num_classes`,
            `"label"` `(B,)` int.

    Returns:
        `(B, out_features)` float32: exactly zero before training, by initialization.

    Raises:
        ValueError: For a configuration or inputs that can't work.

    Example:
        >>> network = MLP(width=64, depth=2)
        >>> x, time = np.zeros((5, 2), "float32"), np.linspace(0.0, 999.0, 5)
        >>> tuple(network({"x": x, "time": time}).shape)
        (5, 2)
    """

    def __init__(
        self,
        *,
        width: int = 128,
        depth: int = 4,
        out_features: int | None = None,
        time_embedding: str = "sinusoidal",
        fourier_scale: float = 16.0,
        num_classes: int | None = None,
        **kwargs,
    ):
        # Times must reach the embedding in float32, so `call` leaves each cast to the layers.
        super().__init__(autocast=False, **kwargs)
        self.width = positive_int("width", width)
        self.depth = positive_int("depth", depth)
        if out_features is not None:
            out_features = positive_int("out_features", out_features)
        self.out_features = out_features
        self.num_classes = num_classes
        policy = self.dtype_policy
        self.time_embedding = TimeEmbedding(
            self.width, kind=time_embedding, fourier_scale=fourier_scale, dtype=policy
        )
        self.label_embedding = label_embedding(num_classes, self.width)
        self.dense_in = keras.layers.Dense(self.width, dtype=policy, name="dense_in")
        self.blocks = [ResidualDense(self.width, dtype=policy) for _ in range(self.depth)]
        self.norm_out = GroupNormalization(1, epsilon=1e-6, dtype=policy, name="norm_out")

    def build(self, input_shape):
        check_inputs(input_shape, self.num_classes)
        shape = tuple(input_shape["x"])
        if len(shape) != 2 or shape[-1] is None:
            raise ValueError(
                f"`x` must be vectors (B, D) with D known. Received: shape {shape}. "
                "For images there is `UNet`."
            )
        hidden = (None, self.width)
        self.time_embedding.build((None,))
        if self.label_embedding is not None:
            self.label_embedding.build((None,))
        self.dense_in.build(shape)
        for block in self.blocks:
            block.build(hidden, hidden)
        self.norm_out.build(hidden)
        self.dense_out = keras.layers.Dense(
            self.out_features or shape[-1],
            kernel_initializer="zeros",
            dtype=self.dtype_policy,
            name="dense_out",
        )
        self.dense_out.build(hidden)
        self.built = True

    def call(self, inputs, training=False):
        check_inputs(inputs, self.num_classes)
        check_tensors(inputs, self.dense_in.kernel.shape[0], 2, self.num_classes)
        embedding = self.time_embedding(inputs["time"])
        if self.label_embedding is not None:
            embedding = embedding + self.label_embedding(inputs["label"])
        x = self.dense_in(inputs["x"])
        for block in self.blocks:
            x = block(x, embedding)
        return ops.cast(self.dense_out(ops.silu(self.norm_out(x))), "float32")

    def compute_output_shape(self, input_shape):
        batch, size = input_shape["x"]
        return batch, self.out_features or size

    def get_config(self):
        return {
            **super().get_config(),
            "width": self.width,
            "depth": self.depth,
            "out_features": self.out_features,
            "time_embedding": self.time_embedding.kind,
            "fourier_scale": self.time_embedding.fourier_scale,
            "num_classes": self.num_classes,
        }
