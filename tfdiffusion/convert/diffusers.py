"""Folders of diffusers: a pipeline, a U-Net with its scheduler, or a U-Net alone; in and out."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from tfdiffusion import _checks
from tfdiffusion.convert import files, schedulers, unet
from tfdiffusion.networks import UNet2D
from tfdiffusion.training import DiffusionModel

_CONFIG, _INDEX, _SCHEDULER = "config.json", "model_index.json", "scheduler_config.json"
# The first version whose files are as those written here.
_VERSION = "0.30.0"
# DDPMPipeline takes the others, but for Euler's, Heun's and UniPC's, for which diffusers has none.
_PIPELINES = {
    "DDIMScheduler": "DDIMPipeline",
    "PNDMScheduler": "PNDMPipeline",
    "ScoreSdeVeScheduler": "ScoreSdeVePipeline",
}
_CODERS = ("vae", "vqvae", "movq")


def from_diffusers(
    path: str | os.PathLike,
    *,
    image_size: int | tuple[int, int] | None = None,
    ema_decay: float | None = 0.999,
) -> DiffusionModel:
    """Makes a Keras model of a diffusers checkpoint: the same numbers, to sample, train and export.

    Its process, prediction and way to sample come from the scheduler's configuration. A checkpoint
    without one counts as DDPM's: 1000 steps, β from 1e-4 to 0.02, noise prediction. Images are in
    [−1, 1], also those that a ScoreSdeVeScheduler has in [0, 1]. The labels of a class-conditional
    network have no "no label" yet, for guidance: it starts as a vector of zeros, and `fit` trains
    it.

    Args:
        path: a folder or the name of one on the Hugging Face Hub (pip install
            'tfdiffusion[convert]'): of a pipeline (`model_index.json`), with `unet` and `scheduler`
            in it, or of a `UNet2DModel` (`config.json`).
        image_size: side, or (height, width), of the images; by default the checkpoint's.
        ema_decay: of the averaged weights, if the model is trained further; see `DiffusionModel`.

    Returns:
        A `DiffusionModel`, built. Of a latent diffusion, it is the model of the latents.

    Raises:
        FileNotFoundError: If the folder is not there, or is none of these.
        ValueError: If a file is damaged, the tensors are not those of the configuration, or the
            configuration is of what cannot be converted; the message names keys and values.
        ImportError: If the path is a name on the hub and `huggingface_hub` is not installed.
        OSError: If the hub cannot be reached.

    Example:
        >>> model = tfd.convert.from_diffusers("google/ddpm-cifar10-32")
        >>> images = model.sample(16, seed=0)  # (16, 32, 32, 3) in [-1, 1]
    """
    if image_size is not None:
        sides = image_size if isinstance(image_size, tuple | list) else (image_size,) * 2
        image_size = _checks.shape(sides, "image_size")
        if len(image_size) != 2:
            raise ValueError(
                f"image_size must be a side, or (height, width). Received {image_size}."
            )
    parts = _Parts.of(files.locate(path))
    config = files.read_json(parts.unet / _CONFIG)
    size = _size(config, image_size)
    schedule = parts.schedule()
    network = _read_network(parts.unet, schedule.unit_range)
    if network.label not in (None, "class"):
        raise ValueError(
            f"class_embed_type={config['class_embed_type']!r}: a DiffusionModel's labels are "
            "classes. tfdiffusion.convert.read_network(path) gives the network alone."
        )
    arguments = schedule.model_arguments()
    if parts.latent:
        arguments["bounded"] = False
    model = DiffusionModel(network, ema_decay=ema_decay, **arguments)
    model.build((None, *size, int(network.conv_in.kernel.shape[2])))
    return model


def read_network(folder: str | os.PathLike) -> UNet2D:
    """Makes the Keras network of a `UNet2DModel`, with its weights.

    It is told what the PyTorch one is told; images are channels-last.

    Args:
        folder: with `config.json` and the weights, or a folder with such a `unet` in it.

    Raises:
        FileNotFoundError, ValueError: As `from_diffusers`.
    """
    return _read_network(_Parts.of(files.locate(folder)).unet)


def _read_network(folder: Path, unit_range: bool = False) -> UNet2D:
    network = unet.network(files.read_json(folder / _CONFIG), unit_range)
    tensors, file = files.read_weights(folder)
    unet.assign(list(unet.slots(network)), unet.modern(tensors), str(file))
    return network


class _Parts:
    """Where the parts of a checkpoint lie.

    Attributes:
        unet: the folder of the network.
        scheduler: the file of its configuration, or None.
        latent: whether there is an autoencoder around it.
    """

    def __init__(self, unet: Path, scheduler: Path | None, latent: bool):
        self.unet, self.scheduler, self.latent = unet, scheduler, latent

    @classmethod
    def of(cls, folder: Path) -> _Parts:
        index = files.read_json(folder / _INDEX) if (folder / _INDEX).is_file() else {}
        kind = index.get("unet", [None, "UNet2DModel"])[1]
        if index and ("unet" not in index or kind != "UNet2DModel"):
            held = ", ".join(key for key in index if not key.startswith("_"))
            raise ValueError(
                f"The pipeline {index.get('_class_name')} in {str(folder)!r} has no UNet2DModel, "
                f"which is all that can be converted so far. It has: {held}"
                f"{'' if kind in (None, 'UNet2DModel') else f'; its unet is a {kind}'}."
            )
        unet = folder / "unet" if (folder / "unet").is_dir() else folder
        scheduler = folder / "scheduler" / _SCHEDULER
        if not scheduler.is_file():
            scheduler = folder / _SCHEDULER
        if not (unet / _CONFIG).is_file():
            held = sorted(file.name for file in unet.iterdir())
            raise FileNotFoundError(
                f"{str(unet)!r} is no folder of diffusers: it has no {_CONFIG}. Expected that of a "
                f"pipeline ({_INDEX}), one with unet/ and scheduler/, or a UNet2DModel's. It has: "
                f"{', '.join(held[:10]) or 'nothing'}{', ...' if len(held) > 10 else ''}."
            )
        latent = any(name in index or (folder / name).is_dir() for name in _CODERS)
        return cls(unet, scheduler if scheduler.is_file() else None, latent)

    def schedule(self) -> schedulers.Schedule:
        """What the scheduler's configuration says; DDPM's without one."""
        if self.scheduler is None:
            return schedulers.read({"_class_name": "DDPMScheduler"})
        return schedulers.read(files.read_json(self.scheduler))


def _size(config: dict, image_size) -> tuple[int, int]:
    size = config.get("sample_size") if image_size is None else image_size
    if size is None:
        raise ValueError(
            "The configuration has no sample_size. Pass image_size=..., the side of the images, or "
            "(height, width)."
        )
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def to_diffusers(
    model: DiffusionModel, folder: str | os.PathLike, *, overwrite: bool = False
) -> Path:
    """Writes a pipeline that diffusers loads, with the averaged weights.

    >>> tfd.convert.to_diffusers(model, "folder")
    >>> pipeline = diffusers.DDPMPipeline.from_pretrained("folder")

    A class-conditional network gets one class more, the last, which is "no label"; it has none if
    it came from diffusers and was not trained here.

    Args:
        model: a `DiffusionModel` of images on a chain of steps, with a `networks.UNet` or `UNet2D`.
        folder: to make. It is written aside and renamed: it is there complete, or not at all.
        overwrite: whether it may replace a folder that such a pipeline lies in.

    Returns:
        The folder.

    Raises:
        ValueError: If diffusers cannot be this model, by key and value.
        TypeError: If it is a model or network of another kind.
        FileExistsError: If the folder is there, and is not to be, or not a pipeline's.
        OSError: If it cannot be written.
    """
    folder = _checks.path("folder", folder)
    if type(model) is not DiffusionModel:
        raise TypeError(f"Only a DiffusionModel can be written. Received a {type(model).__name__}.")
    if model.sample_shape is None:
        raise ValueError("The model has no shape yet: call fit, or build((None, H, W, C)).")
    if len(model.sample_shape) != 3:
        raise ValueError(
            f"Only a model of images can be written. Received one of shape {model.sample_shape}."
        )
    _check_free(folder, overwrite)
    height, width = model.sample_shape[:2]
    scheduler = schedulers.write(model)
    size = height if height == width else [height, width]
    config = unet.configuration(model.network, size, schedulers.read(scheduler).unit_range)
    tensors = unet.collect(list(unet.slots(model.averaged().network)))
    if "class_embedding.weight" in tensors:
        config["num_class_embeds"] = len(tensors["class_embedding.weight"])
    kind = scheduler["_class_name"]
    index = {
        "_class_name": _PIPELINES.get(kind, "DDPMPipeline"),
        "_diffusers_version": _VERSION,
        "scheduler": ["diffusers", kind],
        "unet": ["diffusers", "UNet2DModel"],
    }
    stamp = {"_class_name": "UNet2DModel", "_diffusers_version": _VERSION}
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_json(aside / _INDEX, index)
        _write_json(aside / "scheduler" / _SCHEDULER, scheduler)
        _write_json(aside / "unet" / _CONFIG, {**stamp, **config})
        files.write_safetensors(aside / "unet" / f"{files.NAME}.safetensors", tensors)
        aside.chmod(0o755)  # mkdtemp's is for its owner alone
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _check_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{str(folder)!r} is there already. Pass overwrite=True.")
    if not (folder / _INDEX).is_file():
        raise FileExistsError(f"{str(folder)!r} is no pipeline of diffusers, and is not replaced.")


def _write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
