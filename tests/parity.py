"""Networks of diffusers with random weights, beside ours with the same: what `convert` has to meet.

The published configurations are scaled down (fewer channels, smaller images), but for the first;
the others have what published ones do not.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import UNet2DModel
from keras import ops

from tfdiffusion import _backend
from tfdiffusion.convert import unet

_DDPM = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
_TINY = {"sample_size": 8, "norm_num_groups": 4, "layers_per_block": 1}
_PLAIN = {
    **_TINY,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def _types(side: str, kinds: str) -> tuple[str, ...]:
    """Block names from letters: P(lain), A(ttention), R(esnet), S(kip), T for AttnSkip."""
    names = {
        "P": f"{side}Block2D",
        "A": f"Attn{side}Block2D",
        "R": f"Resnet{side}sampleBlock2D",
        "S": f"Skip{side}Block2D",
        "T": f"AttnSkip{side}Block2D",
    }
    return tuple(names[kind] for kind in kinds)


def _levels(widths: tuple[int, ...], kinds: str, up: str | None = None) -> dict:
    return {
        "block_out_channels": widths,
        "down_block_types": _types("Down", kinds),
        "up_block_types": _types("Up", kinds[::-1] if up is None else up),
    }


FULL = {
    **_DDPM,
    "sample_size": 32,
    **_levels((128, 256, 256, 256), "PAPP"),
}
#: Configurations of `UNet2DModel` by name.
CONFIGURATIONS: dict[str, dict] = {
    "google/ddpm-cifar10-32, 1/16": {
        **FULL,
        "sample_size": 16,
        "norm_num_groups": 4,
        **_levels((8, 16, 16, 16), "PAPP"),
    },
    "google/ddpm-celebahq-256, ddpm-church-256, 1/16": {
        **_DDPM,
        "sample_size": 32,
        "norm_num_groups": 8,
        "layers_per_block": 1,
        **_levels((8, 8, 16, 16, 32, 32), "PPPPAP"),
    },
    "google/ncsnpp-*-256, 1/8": {
        "sample_size": 64,
        "norm_num_groups": None,
        "attention_head_dim": None,
        "time_embedding_type": "fourier",
        "freq_shift": 0,
        "mid_block_scale_factor": 2.0**0.5,
        "norm_eps": 1e-6,
        "layers_per_block": 1,
        **_levels((16, 16, 32, 32, 32, 32, 32), "SSSSTSS"),
    },
    "CompVis/ldm-celebahq-256, 1/14": {
        "sample_size": 16,
        "norm_num_groups": 16,
        "attention_head_dim": 8,
        **_levels((16, 32, 48, 64), "PAAA"),
    },
    "one level": {**_TINY, **_levels((8,), "A")},
    "attention everywhere, one head": {
        **_TINY,
        "attention_head_dim": None,
        **_levels((8, 8), "AA"),
    },
    "many heads": {**_PLAIN, "attention_head_dim": 2},
    "heads that do not fill the channels": {
        **_PLAIN,
        **_levels((12, 20), "AA"),
        "attention_head_dim": 8,
    },
    "five channels in, two out, 8x16": {
        **_PLAIN,
        "sample_size": (8, 16),
        "in_channels": 5,
        "out_channels": 2,
        "center_input_sample": True,
    },
    "scale-shift": {**_PLAIN, "resnet_time_scale_shift": "scale_shift"},
    "scale-shift, normalized attention, mid scale 2": {
        **_PLAIN,
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8,
        "mid_block_scale_factor": 2.0,
    },
    "resnet resampling": {
        **_TINY,
        **_levels((8, 8, 16, 16), "RAPA"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "other blocks down than up": {
        **_TINY,
        "sample_size": 16,
        **_levels((32, 32, 64), "STR", up="PTS"),
        "act_fn": "mish",
    },
    "classes": {**_PLAIN, "num_class_embeds": 3, "time_embedding_dim": 24, "act_fn": "gelu"},
    "classes as times": {**_PLAIN, "class_embed_type": "timestep", "act_fn": "relu"},
    "classes as vectors, learned times": {
        **_PLAIN,
        "class_embed_type": "identity",
        "time_embedding_type": "learned",
        "num_train_timesteps": 20,
    },
    "no attention in the middle, dropout": {**_PLAIN, "add_attention": False, "dropout": 0.5},
    "no middle, odd first width": {
        **_TINY,
        **_levels((15, 20), "PA"),
        "norm_num_groups": 5,
        "mid_block_type": None,
        "freq_shift": 1,
    },
}


def theirs(config: dict, seed: int = 0) -> UNet2DModel:
    """The network in PyTorch; every weight is moved, so that none is zero or one."""
    torch.manual_seed(seed)
    network = UNet2DModel(**config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def ours(network: UNet2DModel):
    """The network in Keras, with the weights of one in PyTorch."""
    converted = unet.network(dict(network.config))
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    unet.assign(list(unet.slots(converted)), state, "a network")
    return converted


def inputs(config: dict, batch: int = 2) -> dict[str, np.ndarray]:
    """What both are called with: images, times and labels."""
    generator = np.random.default_rng(1)
    size = config["sample_size"]
    sides = (size, size) if isinstance(size, int) else size
    channels = config.get("in_channels", 3)
    kind = config.get("time_embedding_type")
    # Of `fourier`, σ.
    times = {"learned": [3.0, 19.0], "fourier": [0.02, 41.0]}.get(kind, [7.0, 998.0])
    label: dict = {}
    if config.get("class_embed_type") == "identity":
        label = {"label": generator.normal(size=(batch, 4 * config["block_out_channels"][0]))}
    elif config.get("class_embed_type") == "timestep":
        label = {"label": np.array([1.0, 400.0])[:batch]}
    elif config.get("num_class_embeds"):
        label = {"label": np.array([2, 0])[:batch]}
    called = {
        "x": generator.normal(size=(batch, *sides, channels)),
        "time": np.array(times)[:batch],
        **label,
    }
    return {
        name: value.astype("int32" if value.dtype.kind == "i" else "float32")
        for name, value in called.items()
    }


def their_output(network: UNet2DModel, x, time, label=None) -> torch.Tensor:
    """Output of the network in PyTorch, channels first, for tensors of PyTorch."""
    if isinstance(network.time_proj, torch.nn.Embedding):
        time = time.long()
    return network(x, time, class_labels=label).sample


def to_torch(called: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Inputs with the channels first."""
    tensors = {name: torch.tensor(value) for name, value in called.items()}
    if "label" in tensors and tensors["label"].dtype == torch.int32:
        tensors["label"] = tensors["label"].long()
    tensors["x"] = tensors["x"].permute(0, 3, 1, 2)
    return tensors


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def output_error(network: UNet2DModel, converted, called: dict) -> float:
    """Relative difference of the outputs."""
    with torch.no_grad():
        expected = their_output(network, **to_torch(called)).permute(0, 2, 3, 1).numpy()
    return distance(ops.convert_to_numpy(converted(called)), expected)


#: Beginnings of names of weights whose gradients are compared.
_SOME = (
    *("conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.norm1.weight"),
    *("mid_block.attentions.0.to_v.weight", "up_blocks.0.resnets.0.conv2.bias"),
    *("down_blocks.1.attentions.0.to_q.weight", "down_blocks.0.attentions.0.to_k.weight"),
    *("up_blocks.0.attentions.0.to_out.0.weight", "class_embedding", "time_proj"),
    *("down_blocks.0.downsamplers", "down_blocks.0.resnet_down", "down_blocks.0.skip_conv"),
    *("up_blocks.0.upsamplers", "up_blocks.0.resnet_up", "up_blocks.0.skip"),
)


def gradient_errors(network: UNet2DModel, converted, called: dict) -> dict[str, float]:
    """Relative differences of the gradients of a loss, by what it is differentiated by.

    The loss is the sum of the outputs, each with a random weight.
    """
    slots = [slot for slot in unet.slots(converted) if slot.name.startswith(_SOME)]
    slots = [slot for slot in slots if slot.variable.trainable]
    tensors = to_torch(called)
    tensors["x"].requires_grad_(True)
    output = their_output(network, **tensors)
    weight = np.random.default_rng(2).normal(size=output.shape).astype("float32")
    parameters = dict(network.named_parameters())
    wanted = [tensors["x"], *(parameters[slot.name] for slot in slots)]
    expected = torch.autograd.grad((output * torch.tensor(weight)).sum(), wanted)

    variables = [slot.variable for slot in slots]
    values = [called["x"], *(ops.convert_to_numpy(variable) for variable in variables)]
    ends = np.cumsum([value.size for value in values])

    def loss(flat):
        parts = ops.split(flat, ends[:-1].tolist())
        x, *others = [ops.reshape(part, value.shape) for part, value in zip(parts, values)]
        with _backend.substituted(list(zip(variables, others))):
            return ops.sum(converted({**called, "x": x}) * weight.transpose(0, 2, 3, 1))

    flat = np.concatenate([value.ravel() for value in values])
    gradient = np.split(ops.convert_to_numpy(_backend.vjp(loss, flat)[1]), ends[:-1])
    errors = {"x": distance(gradient[0], expected[0].permute(0, 2, 3, 1).numpy().ravel())}
    for slot, value, mine, other in zip(slots, values[1:], gradient[1:], expected[1:]):
        mine = mine.reshape(value.shape)
        errors[slot.name] = distance(mine, slot.ours(other.numpy()))
    return errors
