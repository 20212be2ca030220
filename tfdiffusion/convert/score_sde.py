"""Checkpoints of score_sde: NCSN++ and DDPM++ of Song et al. 2021 (arXiv:2011.13456, app. H).

Its files number the layers in the order in which they were made, `all_modules.0` and so on. Beside
the weights they hold their average, which is what the paper samples from, as a list without names:
the order is that of the named ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfdiffusion import _checks, _names, processes, samplers, times
from tfdiffusion.convert import files
from tfdiffusion.convert.unet import Slot, assign, conv, dense, norm, present, residual_block
from tfdiffusion.networks import Level, UNet2D
from tfdiffusion.samplers import Sampling
from tfdiffusion.training import DiffusionModel

_DEFAULTS: dict[str, Any] = {
    "sde": "vesde",
    "continuous": True,
    "image_size": 32,
    "num_channels": 3,
    "centered": True,
    "nf": 128,
    "ch_mult": (1, 2, 2, 2),
    "num_res_blocks": 4,
    "attn_resolutions": (16,),
    "resblock_type": "biggan",
    "nonlinearity": "swish",
    "conditional": True,
    "fir": False,
    "fir_kernel": (1, 3, 3, 1),
    "skip_rescale": True,
    "progressive": "none",
    "progressive_input": "none",
    "progressive_combine": "sum",
    "embedding_type": "positional",
    "scale_by_sigma": False,
    "dropout": 0.1,
    "sigma_min": 0.01,
    "sigma_max": 50.0,
    "beta_min": 0.1,
    "beta_max": 20.0,
    "snr": 0.16,
}
_NCSNPP = {"fir": True, "progressive_input": "residual"}
_VE = {
    **_NCSNPP,
    "centered": False,
    "embedding_type": "fourier",
    "scale_by_sigma": True,
}
_VP, _SUB_VP, _DEEP = {"sde": "vpsde"}, {"sde": "subvpsde"}, {"num_res_blocks": 8}
#: Settings by the name of the configuration file in score_sde, where they differ from `_DEFAULTS`.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "ve/cifar10_ncsnpp_continuous": _VE,
    "ve/cifar10_ncsnpp_deep_continuous": {**_VE, **_DEEP},
    "vp/cifar10_ncsnpp_continuous": {**_VP, **_NCSNPP},
    "vp/cifar10_ncsnpp_deep_continuous": {**_VP, **_NCSNPP, **_DEEP},
    "vp/cifar10_ddpmpp": {**_VP, "continuous": False},
    "vp/cifar10_ddpmpp_continuous": _VP,
    "vp/cifar10_ddpmpp_deep_continuous": {**_VP, **_DEEP},
    "subvp/cifar10_ncsnpp_continuous": {**_SUB_VP, **_NCSNPP},
    "subvp/cifar10_ncsnpp_deep_continuous": {**_SUB_VP, **_NCSNPP, **_DEEP},
    "subvp/cifar10_ddpmpp_continuous": _SUB_VP,
    "subvp/cifar10_ddpmpp_deep_continuous": {**_SUB_VP, **_DEEP},
}
# What else the settings could be there, and cannot here.
_ONLY: dict[str, tuple] = {
    "resblock_type": ("biggan",),
    "nonlinearity": ("swish", "relu"),
    "conditional": (True,),
    "fir_kernel": ((1, 3, 3, 1),),
    "progressive": ("none",),
    "progressive_input": ("none", "residual"),
    "progressive_combine": ("sum",),
    "embedding_type": ("positional", "fourier"),
    "sde": ("vesde", "vpsde", "subvpsde"),
}


def from_score_sde(
    path: str | os.PathLike,
    config: str | Mapping[str, Any],
    *,
    average: bool = True,
    ema_decay: float | None = 0.999,
) -> DiffusionModel:
    """Makes a Keras model of a checkpoint of score_sde, whose pickle is read and not executed.

    The images are in [−1, 1] as everywhere here. Where score_sde has them in [0, 1], which is in
    the VE models, the process has twice its σ, and the network is told half of it.

    Args:
        path: of a `.pth` file.
        config: the name of its configuration file, such as "ve/cifar10_ncsnpp_continuous", or
            its settings of `data`, `model`, `training` and `sampling` in one dict; those left out
            are those of CIFAR-10's DDPM++.
        average: whether to take the averaged weights, which are those that the paper samples from.
        ema_decay: of the averaged weights, if the model is trained further; see `DiffusionModel`.

    Returns:
        A `DiffusionModel`, built.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If it is damaged, the settings are not known or not its own, by name.

    Example:
        >>> name = "ve/cifar10_ncsnpp_continuous"
        >>> model = tfd.convert.from_score_sde("checkpoint_24.pth", name)
    """
    path, settings = _checks.path("path", path), _settings(config)
    size, channels = settings["image_size"], settings["num_channels"]
    tensors = _read(path, average)
    network = UNet2D(**_arguments(settings))
    network.build({"x": (None, size, size, channels), "time": (None,)})
    assign(list(slots(network)), tensors, str(path))
    model = DiffusionModel(network, ema_decay=ema_decay, **_schedule(settings))
    model.build((None, size, size, channels))
    return model


def _settings(config: str | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        config = _names.look_up("configuration of score_sde", config, CONFIGURATIONS)
    for key in config:
        _names.look_up("setting of score_sde", key, _DEFAULTS)
    settings = {**_DEFAULTS, **config}
    for key in ("ch_mult", "attn_resolutions", "fir_kernel"):
        settings[key] = tuple(settings[key])
    for key, known in _ONLY.items():
        if settings[key] not in known:
            raise ValueError(
                f"{key}={settings[key]!r} cannot be converted, only "
                f"{', '.join(repr(value) for value in known)}."
            )
    if settings["sde"] == "vesde" and not (settings["continuous"] and settings["scale_by_sigma"]):
        raise ValueError(
            "sde='vesde' needs continuous=True and scale_by_sigma=True: networks that are told the "
            "number of a level cannot be converted. Received "
            f"continuous={settings['continuous']}, scale_by_sigma={settings['scale_by_sigma']}."
        )
    if settings["progressive_input"] != "none" and not settings["fir"]:
        raise ValueError("progressive_input='residual' needs fir=True.")
    return settings


def _schedule(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `DiffusionModel` beside the network."""
    if settings["sde"] == "vesde":
        scale = _noise_scale(settings)
        exact = {"measured": True, "correct_last": True}
        sampler = samplers.PredictorCorrector("reverse_diffusion", settings["snr"], **exact)
        return {
            "process": processes.VarianceExploding(
                scale * settings["sigma_min"], scale * settings["sigma_max"]
            ),
            "prediction": "score",
            "time_input": "sigma",
            "scale_input": False,
            "sampling": Sampling(sampler, times.Shifted(1e-5), 1000, None),
        }
    betas = settings["beta_min"], settings["beta_max"]
    sampling = Sampling(samplers.EulerMaruyama(), times.Shifted(1e-3), 1000, None)
    common = {"prediction": "noise", "scale_input": False}
    if not settings["continuous"]:
        chain = processes.LinearBeta(1000, betas[0] / 1000, betas[1] / 1000)
        ancestral = Sampling(samplers.DDPM("beta"), "uniform", 1000, None)
        return {**common, "process": chain, "time_input": "timestep", "sampling": ancestral}
    kinds = {"vpsde": processes.VariancePreserving, "subvpsde": processes.SubVariancePreserving}
    process = kinds[settings["sde"]](*betas)
    return {**common, "process": process, "time_input": "thousandths", "sampling": sampling}


def _noise_scale(settings: dict[str, Any]) -> float:
    """σ of images in [−1, 1] over that of images in [0, 1], if that is where they are there."""
    return 1.0 if settings["centered"] else 2.0


def _arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `networks.UNet2D`."""
    widths = [settings["nf"] * factor for factor in settings["ch_mult"]]
    blocks = settings["num_res_blocks"]
    shared = {
        "groups": "quarter",
        "attention_groups": "quarter",
        "output_scale": 2.0**0.5 if settings["skip_rescale"] else 1.0,
    }
    pyramid = None if settings["progressive_input"] == "none" else "residual"

    def level(i, blocks, attention, last, **kwargs):
        attended = settings["image_size"] // 2**i in settings["attn_resolutions"]
        return Level(
            width=widths[i],
            blocks=blocks,
            attention=attention if attended else None,
            resample=None if i == last else ("smooth" if settings["fir"] else "projected"),
            **shared,
            **kwargs,
        )

    lowest = len(widths) - 1
    fourier = settings["embedding_type"] == "fourier"
    time_scale = 1.0 / _noise_scale(settings) if fourier else 1.0
    if not fourier and settings["continuous"]:
        time_scale = 0.999  # it counts from 0 to 999
    return {
        "out_channels": settings["num_channels"],
        "encoder": [
            level(i, blocks, "each", lowest, pyramid=None if i == lowest else pyramid)
            for i in range(len(widths))
        ],
        "middle": Level(width=widths[-1], blocks=2, attention="each", **shared),
        "decoder": [level(i, blocks + 1, "last", 0) for i in reversed(range(len(widths)))],
        "norm_epsilon": 1e-6,
        "out_groups": "quarter",
        "activation": {"swish": "silu"}.get(settings["nonlinearity"], settings["nonlinearity"]),
        "dropout": settings["dropout"],
        "time_embedding": "fourier" if fourier else "sinusoidal",
        "time_scale": time_scale,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "divide_by_sigma": settings["scale_by_sigma"],
    }


# Files.


def _read(path: Path, average: bool) -> dict[str, np.ndarray]:
    """The tensors of the network, by name."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    held = files.read_pytorch(path)
    state = held.get("model", held) if isinstance(held, dict) else None
    if not isinstance(state, dict) or not any("all_modules." in str(name) for name in state):
        raise ValueError(
            f"{str(path)!r} holds no network of score_sde: no tensor is named all_modules.N."
        )
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    state.pop("sigmas", None)  # of the discrete chain
    if average and "ema" in held:
        return _averaged(path, state, held["ema"])
    return state


def _averaged(path: Path, state: dict, ema: Any) -> dict[str, np.ndarray]:
    trained = [name for name in state if not name.endswith("all_modules.0.W")]
    averages = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(averages, list) or len(averages) != len(trained):
        count = len(averages) if isinstance(averages, list) else "no"
        raise ValueError(
            f"{str(path)!r} has {count} averages for {len(trained)} weights. average=False takes "
            "the weights themselves."
        )
    return {**state, **dict(zip(trained, averages))}


def slots(network: UNet2D) -> Iterator[Slot]:
    """Every variable of a network by score_sde's name for it."""
    for number, layer in enumerate(_layers(network)):
        yield from layer(f"all_modules.{number}")


def _layers(network: UNet2D) -> Iterator:
    """For each of `all_modules`, a function from its name to its slots."""

    def of(naming, layer):
        return lambda name: naming(name, layer)

    if network.time_features.kind == "fourier":
        yield lambda name: iter([Slot(f"{name}.W", network.time_features.table)])
    yield of(dense, network.time_embedding.dense_1)
    yield of(dense, network.time_embedding.dense_2)
    yield of(conv, network.conv_in)
    for block in [*network.encoder, network.middle]:
        for residual, attention in zip(block.residuals, block.attentions):
            yield of(_residual, residual)
            if attention is not None:
                yield of(_attention, attention)
        if block.downsample is not None:
            yield of(_residual, block.downsample)
        if block.pyramid is not None:
            yield of(_smoothed, block.pyramid.down)
    for block in network.decoder:
        for residual in block.residuals:
            yield of(_residual, residual)
        for attention in present(block.attentions):
            yield of(_attention, attention)
        if block.upsample is not None:
            yield of(_residual, block.upsample)
    yield of(norm, network.norm_out)
    yield of(conv, network.conv_out)


_RESIDUAL = ("GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1", "Conv_2")


def _residual(name: str, layer) -> Iterator[Slot]:
    return residual_block(name, layer, _RESIDUAL)


def _attention(name: str, layer) -> Iterator[Slot]:
    yield from norm(f"{name}.GroupNorm_0", layer.norm)
    for number, projection in enumerate((layer.query, layer.key, layer.value, layer.project)):
        yield Slot(f"{name}.NIN_{number}.W", projection.kernel)
        yield Slot(f"{name}.NIN_{number}.b", projection.bias)


def _smoothed(name: str, layer) -> Iterator[Slot]:
    yield from conv(f"{name}.Conv2d_0", layer.conv)
