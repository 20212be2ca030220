"""Networks that know nothing of diffusion, and the layers they are made of.

A network is called with one dict, `network({"x": x, "time": time, "label": label})`, and returns a
float32 tensor of the shape of `x` (with `out_channels` channels). What `time` is, a timestep or
`ln sigma`, is up to the caller; `label` is there if the network was made with `num_classes`, and
the label `num_classes` means "no label".
"""

from tfdiffusion.networks.layers import (
    Downsample,
    GroupNormalization,
    ResidualBlock,
    SelfAttention,
    TimeEmbedding,
    Upsample,
)
from tfdiffusion.networks.mlp import MLP, ResidualDense
from tfdiffusion.networks.unet import UNet
from tfdiffusion.networks.unet2d import Level, UNet2D

__all__ = [
    "MLP",
    "Downsample",
    "GroupNormalization",
    "Level",
    "ResidualBlock",
    "ResidualDense",
    "SelfAttention",
    "TimeEmbedding",
    "UNet",
    "UNet2D",
    "Upsample",
]
