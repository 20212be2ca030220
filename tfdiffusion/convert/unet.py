"""diffusers' `UNet2DModel`: its configuration, and the names of its tensors, in both directions.

A configuration is a dict as in `config.json`. `arguments` says which `networks.UNet2D` it is;
`configuration` is the inverse, for `networks.UNet` too. `tensors` names each variable of a network
as diffusers does.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfdiffusion import _names
from tfdiffusion.convert.files import Tensors
from tfdiffusion.networks import Level, SelfAttention, UNet, UNet2D

# What `UNet2DModel` takes for keys that a file leaves out.
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}

# Fields of `Level` by the name of the block.
_SKIP = {
    "resample": "smooth",
    "pyramid": "skip",
    "groups": "quarter",
    "attention_groups": 32,
    "output_scale": 2.0**0.5,
}
_DOWN = {
    "DownBlock2D": {"resample": "conv"},
    "AttnDownBlock2D": {"attention": "each"},
    "ResnetDownsampleBlock2D": {"resample": "residual"},
    "SkipDownBlock2D": _SKIP,
    "AttnSkipDownBlock2D": {**_SKIP, "attention": "each"},
}
_UP = {
    "UpBlock2D": {"resample": "conv"},
    "AttnUpBlock2D": {"attention": "each"},
    "ResnetUpsampleBlock2D": {"resample": "residual"},
    "SkipUpBlock2D": _SKIP,
    "AttnSkipUpBlock2D": {**_SKIP, "attention": "last", "groups": "quarter_of_skip"},
}
_MIDDLE = {"UNetMidBlock2D": True, None: False}
_RESAMPLING = {"conv": "conv", "resnet": "residual"}
_TIMES = {"positional": "sinusoidal", "fourier": "fourier", "learned": "learned"}
_SCALE_SHIFT = {"default": False, "scale_shift": True}
_LABELS = {None: None, "timestep": "time", "identity": "vector"}
_ACTIVATIONS = {name: name for name in ("silu", "relu", "gelu", "mish")} | {"swish": "silu"}


def network(config: dict, unit_range: bool = False) -> UNet2D:
    """Makes the network of a configuration, built and with fresh weights.

    Args:
        config: of a `UNet2DModel`; keys that it leaves out have diffusers' defaults.
        unit_range: whether there it is a score of images in [0, 1], told their σ; here it is the
            score of the same images in [−1, 1], told twice as much.

    Raises:
        ValueError: For what the network cannot be, by key and value.
    """
    made = UNet2D(**_arguments_in(unit_range, config))
    channels = config.get("in_channels", DEFAULTS["in_channels"])
    shapes: dict[str, tuple] = {"x": (None, None, None, channels), "time": (None,)}
    if made.label is not None:
        shapes["label"] = (None, made.time_width) if made.label == "vector" else (None,)
    made.build(shapes)
    return made


def arguments(config: dict) -> dict[str, Any]:
    """Arguments of `networks.UNet2D` for a configuration; see `network`."""
    _check_class(config)
    config = _complete(config)
    widths, blocks = list(config["block_out_channels"]), config["layers_per_block"]
    down, up = config["down_block_types"], config["up_block_types"]
    if not len(widths) == len(down) == len(up):
        raise ValueError(
            "block_out_channels, down_block_types and up_block_types must be equally long. "
            f"Received: {len(widths)}, {len(down)} and {len(up)}."
        )
    if not isinstance(blocks, int):
        raise ValueError(f"layers_per_block must be an integer. Received: {blocks!r}.")
    groups, head_dim = config["norm_num_groups"], config["attention_head_dim"]
    shared = {"groups": groups, "attention_groups": groups, "head_dim": head_dim}

    def levels(key, kinds, types, widths, blocks):
        resample = _choice(config, key, _RESAMPLING)
        for i, (name, width) in enumerate(zip(types, widths)):
            fields = {"resample": resample, **shared, **_look_up_block(name, kinds)}
            if i == len(widths) - 1:
                fields["resample"] = None
            if fields["groups"] is None:
                raise ValueError(f"norm_num_groups=None goes with Skip blocks only, not {name!r}.")
            yield Level(width=width, blocks=blocks, **fields)

    encoder = list(levels("downsample_type", _DOWN, down, widths, blocks))
    decoder = list(levels("upsample_type", _UP, up, widths[::-1], blocks + 1))
    scale_shift = _choice(config, "resnet_time_scale_shift", _SCALE_SHIFT)
    middle = None
    if _choice(config, "mid_block_type", _MIDDLE):
        attention_groups = config["attn_norm_num_groups"]
        if attention_groups is None and not scale_shift:
            attention_groups = groups or "quarter"
        middle = Level(
            width=widths[-1],
            blocks=2,
            attention="each" if config["add_attention"] else None,
            groups=groups or "quarter",
            attention_groups=attention_groups,
            head_dim=head_dim,
            output_scale=config["mid_block_scale_factor"],
        )
    label, num_classes = _choice(config, "class_embed_type", _LABELS), config["num_class_embeds"]
    if label is None and num_classes is not None:
        label = "class"
    time = _choice(config, "time_embedding_type", _TIMES)
    return {
        "out_channels": config["out_channels"],
        "encoder": encoder,
        "middle": middle,
        "decoder": decoder,
        "norm_epsilon": config["norm_eps"],
        "out_groups": groups or "quarter",
        "activation": _choice(config, "act_fn", _ACTIVATIONS),
        "scale_shift": scale_shift,
        "downsample_padding": _choice(config, "downsample_padding", {0: 0, 1: 1}),
        "dropout": config["dropout"],
        "time_embedding": time,
        "time_width": config["time_embedding_dim"] or 4 * widths[0],
        "freq_shift": config["freq_shift"],
        "flip_sin_to_cos": config["flip_sin_to_cos"],
        "num_times": config["num_train_timesteps"] if time == "learned" else None,
        "label": label,
        "num_classes": num_classes if label == "class" else None,
        "input_map": "center" if config["center_input_sample"] else None,
        "divide_by_sigma": time == "fourier",
    }


def _arguments_in(unit_range: bool, config: dict) -> dict[str, Any]:
    """`arguments`, of a score of images in [0, 1] if so.

    With x' = 2x − 1 and σ' = 2σ the score is half as long. A network that divides by σ does so by
    twice as much then.
    """
    made = arguments(config)
    if not unit_range:
        return made
    if not made["divide_by_sigma"]:
        raise ValueError(
            "The network of a ScoreSdeVeScheduler must have time_embedding_type='fourier', which "
            f"divides by sigma. Received: {config.get('time_embedding_type', 'positional')!r}."
        )
    return {
        **made,
        "time_scale": 0.5,
        "input_map": None if made["input_map"] == "center" else "uncenter",
    }


def _check_class(config: dict) -> None:
    name = config.get("_class_name", "UNet2DModel")
    if name != "UNet2DModel":
        raise ValueError(f"The network is a {name}; only UNet2DModel can be converted so far.")


def _complete(config: dict) -> dict:
    unknown = [key for key in config if key not in DEFAULTS and not key.startswith("_")]
    if unknown:
        warnings.warn(f"UNet2DModel has no {unknown}; left out, as in diffusers.", stacklevel=3)
    return {**DEFAULTS, **config}


def _choice(config: dict, key: str, table: dict):
    value = config[key]
    if not isinstance(value, (str, int, type(None))) or value not in table:
        known = ", ".join(repr(name) for name in table)
        raise ValueError(f"{key}={value!r} cannot be converted. Known: {known}.")
    return table[value]


def _look_up_block(name: str, kinds: dict) -> dict:
    return _names.look_up("block", str(name).removeprefix("UNetRes"), kinds)


# And back.


def configuration(
    network, sample_size: int | list[int], unit_range: bool = False
) -> dict[str, Any]:
    """The configuration of a network, complete.

    Args:
        network: a built `networks.UNet2D` or `networks.UNet`.
        sample_size: side of its images, or [height, width].
        unit_range: whether it is to be a score of images in [0, 1]; see `network`.

    Raises:
        ValueError: If a `UNet2DModel` cannot be this network, by key and value.
        TypeError: If the network is of another kind.
    """
    if isinstance(network, UNet2D):
        guess = _configuration_2d(network, unit_range)
    elif isinstance(network, UNet) and not unit_range:
        guess = _configuration_own(network)
    else:
        raise TypeError(
            f"diffusers' UNet2DModel can be a tfdiffusion.networks.UNet2D, or a UNet unless its "
            f"scheduler is ScoreSdeVe. Received a {type(network).__name__}."
        )
    channels = int(network.conv_in.kernel.shape[2])
    return {**DEFAULTS, **guess, "sample_size": sample_size, "in_channels": channels}


def _configuration_2d(network: UNet2D, unit_range: bool) -> dict[str, Any]:
    """Guesses the configuration, and makes sure that it is this network's."""
    config, (encoder, decoder) = network.get_config(), network.levels
    middle = network.middle_level
    levels = [*encoder, *decoder, *([middle] if middle else [])]
    groups = [level.groups for level in levels if isinstance(level.groups, int)]
    heads = [level.head_dim for level in levels if level.attention]
    guess = {
        "out_channels": config["out_channels"],
        "center_input_sample": config["input_map"] == (None if unit_range else "center"),
        "time_embedding_type": _key(_TIMES, config["time_embedding"]),
        "time_embedding_dim": config["time_width"],
        "freq_shift": config["freq_shift"],
        "flip_sin_to_cos": config["flip_sin_to_cos"],
        "down_block_types": [_block_type(level, _DOWN) for level in encoder],
        "mid_block_type": None if middle is None else "UNetMidBlock2D",
        "up_block_types": [_block_type(level, _UP) for level in decoder],
        "block_out_channels": [level.width for level in encoder],
        "layers_per_block": encoder[0].blocks,
        "mid_block_scale_factor": 1 if middle is None else middle.output_scale,
        "downsample_padding": config["downsample_padding"],
        "downsample_type": _resampling(encoder),
        "upsample_type": _resampling(decoder),
        "dropout": config["dropout"],
        "act_fn": config["activation"],
        "attention_head_dim": heads[0] if heads else None,
        "norm_num_groups": groups[0] if groups else None,
        "attn_norm_num_groups": None,
        "norm_eps": config["norm_epsilon"],
        "resnet_time_scale_shift": _key(_SCALE_SHIFT, config["scale_shift"]),
        "add_attention": middle is None or middle.attention is not None,
        "class_embed_type": _key(_LABELS, None if network.label == "class" else network.label),
        "num_class_embeds": config["num_classes"],
        "num_train_timesteps": config["num_times"],
    }
    if config["time_width"] == 4 * encoder[0].width:
        guess["time_embedding_dim"] = None
    if middle is not None and isinstance(middle.attention_groups, int):
        usual = not config["scale_shift"] and middle.attention_groups == guess["norm_num_groups"]
        guess["attn_norm_num_groups"] = None if usual else middle.attention_groups
    _verify(UNet2D(**_arguments_in(unit_range, guess)).get_config(), config)
    return guess


def _verify(theirs: dict, ours: dict) -> None:
    """Makes sure that a guess comes back as the network that it was made from."""
    for key in ours:
        if key in ("name", "dtype", "trainable"):
            continue
        mine, made = ours[key], theirs[key]
        if key in ("encoder", "decoder"):
            pairs = [
                (f"{key}[{i}].{field}", level[field], other[field])
                for i, (level, other) in enumerate(zip(mine, made))
                for field in level
                if not _without_effect(level, field)
            ]
        elif key == "middle" and mine is not None:
            pairs = [
                (f"middle.{field}", mine[field], made[field])
                for field in mine
                if not _without_effect(mine, field)
            ]
        else:
            pairs = [(key, mine, made)]
        for name, value, other in pairs:
            if value != other:
                raise ValueError(
                    f"diffusers' UNet2DModel cannot have {name}={value!r}; it would be {other!r}."
                )


def _without_effect(level: dict, field: str) -> bool:
    """Whether nothing depends on a field of a level."""
    if field in ("attention_groups", "head_dim"):
        return level["attention"] is None
    return False


def _block_type(level: Level, kinds: dict) -> str:
    """The name of the block that has a level's attention, resampling and pyramid."""
    residual = level.resample == "residual" and not level.attention
    for name, fields in kinds.items():
        if (
            fields.get("attention") == level.attention
            and fields.get("pyramid") == level.pyramid
            and (fields.get("resample") == "residual") == residual
        ):
            return name
    raise ValueError(
        f"diffusers has no block with attention={level.attention!r}, pyramid={level.pyramid!r} and "
        f"resample={level.resample!r}. It has {', '.join(kinds)}."
    )


def _resampling(levels: list[Level]) -> str:
    kinds = [level.resample for level in levels if level.attention and level.pyramid is None]
    return "resnet" if "residual" in kinds else "conv"


def _configuration_own(network: UNet) -> dict[str, Any]:
    config = network.get_config()
    blocks, widths = config["blocks_per_level"], config["widths"]
    _refuse(config, "patch_size", 1)
    _refuse(config, "output_scale", 1.0)
    # diffusers divides the output of such a network by σ.
    _refuse(config, "time_embedding", "sinusoidal")
    for key, known in (("downsample", ("conv", "resnet")), ("upsample", ("conv", "resnet"))):
        if len(widths) > 1 and config[key] not in known:
            raise ValueError(f"diffusers' UNet2DModel cannot have {key}={config[key]!r}.")
    if len(set(blocks)) != 1:
        raise ValueError(f"diffusers' UNet2DModel cannot have blocks_per_level={blocks!r}.")
    attended = {widths[level] for level in config["attention_levels"]}
    attended |= {widths[-1]} if config["mid_attention"] else set()
    head_dim = config["head_dim"]
    if config["num_heads"] is not None:
        if len(attended) > 1:
            raise ValueError(
                f"diffusers' UNet2DModel cannot have num_heads={config['num_heads']} on levels of "
                f"the widths {sorted(attended)}: its heads have one size. Use head_dim."
            )
        head_dim = max(attended) // config["num_heads"] if attended else None

    def types(side, resnet):
        return [
            f"Attn{side}Block2D"
            if level in config["attention_levels"]
            else (f"Resnet{side}sampleBlock2D" if resnet else f"{side}Block2D")
            for level in range(len(widths))
        ]

    down, up = config["downsample"] == "resnet", config["upsample"] == "resnet"
    return {
        "out_channels": config["out_channels"],
        "time_embedding_dim": config["time_width"],
        "freq_shift": config["freq_shift"],
        "flip_sin_to_cos": config["flip_sin_to_cos"],
        "down_block_types": types("Down", down),
        "up_block_types": types("Up", up)[::-1],
        "block_out_channels": list(widths),
        "layers_per_block": blocks[0],
        "downsample_padding": config["downsample_padding"],
        "downsample_type": "resnet" if down else "conv",
        "upsample_type": "resnet" if up else "conv",
        "dropout": config["dropout"],
        "attention_head_dim": head_dim,
        "norm_num_groups": config["groups"],
        "attn_norm_num_groups": config["groups"],
        "norm_eps": config["norm_epsilon"],
        "resnet_time_scale_shift": _key(_SCALE_SHIFT, config["scale_shift"]),
        "add_attention": config["mid_attention"],
        "num_class_embeds": config["num_classes"],
    }


def _refuse(config: dict, key: str, only: Any) -> None:
    if config[key] != only:
        raise ValueError(
            f"diffusers' UNet2DModel cannot have {key}={config[key]!r}, only {only!r}."
        )


def _key(table: dict, value: Any):
    return next(key for key, known in table.items() if known == value)


# Tensors.


@dataclass(frozen=True)
class Slot:
    """A variable of a network under the name that its tensor has elsewhere.

    Args:
        name: there.
        variable: the Keras variable.
        kind: how they differ: "conv" (OIHW there, HWIO here), "dense" (transposed), "labels" (here
            with one more row, for "no label"), "same".
    """

    name: str
    variable: Any
    kind: str = "same"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor there."""
        shape = tuple(self.variable.shape)
        if self.kind == "conv":
            return (shape[3], shape[2], shape[0], shape[1])
        if self.kind == "labels":
            return (shape[0] - 1, shape[1])
        return shape[::-1] if self.kind == "dense" else shape

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """A tensor from there as a value of the variable, float32."""
        value = np.asarray(tensor, "float32")
        if self.kind == "conv":
            return value.transpose(2, 3, 1, 0)
        if self.kind == "labels":
            return np.concatenate([value, np.zeros_like(value[:1])])
        return value.T if self.kind == "dense" else value

    def theirs(self) -> np.ndarray:
        """The variable's value as the tensor there; "labels" only with a row that is not zero."""
        value = np.asarray(self.variable, "float32")
        if self.kind == "conv":
            value = value.transpose(3, 2, 0, 1)
        elif self.kind == "dense":
            value = value.T
        elif self.kind == "labels" and not value[-1].any():
            value = value[:-1]
        return np.ascontiguousarray(value)


def slots(network: UNet | UNet2D) -> Iterator[Slot]:
    """Every variable of a network by diffusers' name for it."""
    yield from conv("conv_in", network.conv_in)
    if isinstance(network, UNet2D):
        if network.time_features.kind != "sinusoidal":
            yield Slot("time_proj.weight", network.time_features.table)
        yield from _embedding("time_embedding", network.time_embedding)
        if network.label == "time":
            yield from _embedding("class_embedding", network.label_embedding)
    else:
        yield from _embedding("time_embedding", network.time_embedding)
    if network.num_classes is not None:
        yield Slot("class_embedding.weight", network.label_embedding.embeddings, "labels")
    down, middle, up = _levels(network)
    for i, (residuals, attentions, resampling, pyramid) in enumerate(down):
        yield from _block(f"down_blocks.{i}", residuals, attentions)
        yield from _resampled(f"down_blocks.{i}", "down", resampling, pyramid)
        if pyramid is not None:
            yield from conv(f"down_blocks.{i}.skip_conv", pyramid.conv)
    yield from _block("mid_block", *middle)
    for i, (residuals, attentions, resampling, pyramid) in enumerate(up):
        yield from _block(f"up_blocks.{i}", residuals, attentions)
        yield from _resampled(f"up_blocks.{i}", "up", resampling, pyramid)
        if pyramid is not None and pyramid.conv is not None:
            yield from norm(f"up_blocks.{i}.skip_norm", pyramid.norm)
            yield from conv(f"up_blocks.{i}.skip_conv", pyramid.conv)
    yield from norm("conv_norm_out", network.norm_out)
    yield from conv("conv_out", network.conv_out)


def _levels(network: UNet | UNet2D) -> tuple:
    """(residuals, attentions, resampling, pyramid) of each level down and up; those of the middle.

    Attentions are dense: those that there are.
    """

    def of(block, resampling):
        return block.residuals, present(block.attentions), getattr(block, resampling), block.pyramid

    if isinstance(network, UNet2D):
        middle = network.middle
        return (
            [of(block, "downsample") for block in network.encoder],
            ([], []) if middle is None else (middle.residuals, present(middle.attentions)),
            [of(block, "upsample") for block in network.decoder],
        )
    blocks = network.get_config()["blocks_per_level"]

    def gather(steps, counts):
        steps, levels = list(steps), []
        for i, count in enumerate(counts):
            level = [steps.pop(0) for _ in range(count)]
            resampling = steps.pop(0)[0] if i < len(counts) - 1 else None
            attentions = [layer for step in level for layer in step[1:]]
            levels.append(([step[0] for step in level], attentions, resampling, None))
        return levels

    attentions = [layer for layer in network.steps.middle if isinstance(layer, SelfAttention)]
    residuals = [layer for layer in network.steps.middle if not isinstance(layer, SelfAttention)]
    return (
        gather(network.steps.encoder, blocks),
        (residuals, attentions),
        gather(network.steps.decoder, [count + 1 for count in reversed(blocks)]),
    )


def present(layers) -> list:
    """The layers that are there."""
    return [layer for layer in layers if layer is not None]


def _block(name: str, residuals, attentions) -> Iterator[Slot]:
    for i, layer in enumerate(residuals):
        yield from _residual(f"{name}.resnets.{i}", layer)
    for i, layer in enumerate(attentions):
        yield from _attention(f"{name}.attentions.{i}", layer)


def _resampled(name: str, direction: str, layer, pyramid) -> Iterator[Slot]:
    if layer is None:
        return
    if pyramid is not None:
        yield from _residual(f"{name}.resnet_{direction}", layer)
    elif hasattr(layer, "conv_1"):
        yield from _residual(f"{name}.{direction}samplers.0", layer)
    else:
        yield from conv(f"{name}.{direction}samplers.0.conv", layer.conv)


def residual_block(name: str, layer, parts: Sequence[str]) -> Iterator[Slot]:
    """Of a residual block: norm, convolution, embedding, norm, convolution, shortcut."""
    yield from norm(f"{name}.{parts[0]}", layer.norm_1)
    yield from conv(f"{name}.{parts[1]}", layer.conv_1)
    yield from dense(f"{name}.{parts[2]}", layer.embed)
    yield from norm(f"{name}.{parts[3]}", layer.norm_2)
    yield from conv(f"{name}.{parts[4]}", layer.conv_2)
    if layer.shortcut is not None:
        yield from conv(f"{name}.{parts[5]}", layer.shortcut)


_RESIDUAL = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")


def _residual(name: str, layer) -> Iterator[Slot]:
    return residual_block(name, layer, _RESIDUAL)


def _attention(name: str, layer: SelfAttention) -> Iterator[Slot]:
    if layer.norm is not None:
        yield from norm(f"{name}.group_norm", layer.norm)
    for theirs, ours in _PROJECTIONS.items():
        yield from dense(f"{name}.{theirs}", getattr(layer, ours))


_PROJECTIONS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "project"}


def _embedding(name: str, layer) -> Iterator[Slot]:
    yield from dense(f"{name}.linear_1", layer.dense_1)
    yield from dense(f"{name}.linear_2", layer.dense_2)


def conv(name: str, layer) -> Iterator[Slot]:
    """Kernel and bias of a convolution."""
    yield Slot(f"{name}.weight", layer.kernel, "conv")
    yield Slot(f"{name}.bias", layer.bias)


def dense(name: str, layer) -> Iterator[Slot]:
    """Kernel and bias of a dense layer."""
    yield Slot(f"{name}.weight", layer.kernel, "dense")
    yield Slot(f"{name}.bias", layer.bias)


def norm(name: str, layer) -> Iterator[Slot]:
    """Scale and offset of a normalization."""
    yield Slot(f"{name}.weight", layer.gamma)
    yield Slot(f"{name}.bias", layer.beta)


_LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY_NAME = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.")


def modern(tensors: Tensors) -> Tensors:
    """Tensors with the names that attention has had since diffusers 0.15."""
    return {
        _LEGACY_NAME.sub(lambda found: f"{found[1]}.{_LEGACY[found[2]]}.", name): tensor
        for name, tensor in tensors.items()
    }


def assign(places: list[Slot], tensors: Tensors, source: str) -> None:
    """Gives each variable its tensor.

    Args:
        places: all variables of a network.
        tensors: by name, exactly those.
        source: of the tensors, for messages.

    Raises:
        ValueError: If tensors are missing, left over, or of another shape, by name.
    """
    names = [place.name for place in places]
    missing = [name for name in names if name not in tensors]
    extra = sorted(set(tensors) - set(names))
    wrong = [
        f"{place.name} {tuple(tensors[place.name].shape)} instead of {place.shape}"
        for place in places
        if place.name in tensors and tuple(tensors[place.name].shape) != place.shape
    ]
    faults = (("missing", missing), ("left over", extra), ("of another shape", wrong))
    told = [f"{len(what)} {kind}: {_first_ten(what)}" for kind, what in faults if what]
    if told:
        raise ValueError(
            f"The tensors of {source} are not those of its configuration. {'; '.join(told)}."
        )
    for place in places:
        place.variable.assign(place.ours(tensors[place.name]))


def _first_ten(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def collect(places: list[Slot]) -> dict[str, np.ndarray]:
    """The value of each variable, by name and in the layout of the other side."""
    return {place.name: place.theirs() for place in places}
