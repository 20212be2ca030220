"""Finding models: those that ship with the package, files, run folders; and a network for an image.

A model is named in one way everywhere: "mnist" is a model that ships with the package, "x.keras" a
saved model, and any other path the folder that `tfdiffusion train` wrote.

>>> model = tfd.models.load("runs/digits")
>>> images = model.sample(10, label=np.arange(10))
"""

from __future__ import annotations

import difflib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tfdiffusion.fitting import NoiseConditionalModel
    from tfdiffusion.networks import UNet
    from tfdiffusion.score_matching import NCSN, NCSNv2

_PRETRAINED = Path(__file__).parent / "pretrained"
_IN_RUN_FOLDER = "model.keras"

# Of `unet`: the widest grid of positions a side, and the widths of its levels.
_SIZES = {
    "small": (16, (64, 128, 128), 1),
    "base": (32, (96, 192, 192, 192), 2),
}
_COARSEST = 16  # positions a side at the lowest level, which attends from each to each


def names() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(file.stem for file in _PRETRAINED.glob("*.keras"))


def path(model: str | os.PathLike) -> Path:
    """Finds the file of a model.

    Args:
        model: the name of a model that ships with the package, a `.keras` file, or a folder that
            `tfdiffusion train` wrote. A name wins over a folder of that name; "./name" is the
            folder.

    Returns:
        Path of a `.keras` file that exists.

    Raises:
        FileNotFoundError: If there is no such name, file or folder, or no model in the folder.
        ValueError: If the file or folder is of another kind.
    """
    from tfdiffusion import _checks  # with NumPy, for which the texts of help do not wait

    if isinstance(model, str) and model in names():
        return _PRETRAINED / f"{model}.keras"
    found = _checks.path("model", model).expanduser()
    if found.is_dir():
        return _in_folder(found)
    if not found.is_file():
        nearest = difflib.get_close_matches(str(model), names(), n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise FileNotFoundError(
            f"There is no model {str(model)!r}: neither a .keras file, nor a run folder, nor one "
            f"that ships with the package ({', '.join(names()) or 'none'}).{hint}"
        )
    if found.suffix != ".keras":
        raise ValueError(f"{str(found)!r} is not a .keras file, which is how models are saved.")
    return found


def _in_folder(folder: Path) -> Path:
    if (folder / _IN_RUN_FOLDER).is_file():
        return folder / _IN_RUN_FOLDER
    if (folder / "saved_model.pb").is_file():
        raise ValueError(
            f"{str(folder)!r} is an exported SavedModel, for tf.saved_model.load and servers. Pass "
            "the .keras file or the run folder that it was made from."
        )
    raise FileNotFoundError(
        f"Expected a run folder. Received {str(folder)!r}, which has no {_IN_RUN_FOLDER}."
    )


def load(model: str | os.PathLike, compile: bool = False) -> NoiseConditionalModel:
    """Loads a model, to sample from it or to train on (then compile it again).

    Args:
        model: see `path`.
        compile: whether to bring the optimizer back too, with its state.

    Returns:
        The model, a `DiffusionModel` or a `score_matching.ScoreModel`, not compiled by default.

    Raises:
        FileNotFoundError: See `path`.
        ValueError: If the file is damaged, or holds something else.
    """
    file = path(model)
    import keras

    # Registers what a model may hold.
    from tfdiffusion import fitting, networks, score_matching, training, variational  # noqa: F401

    try:
        loaded = keras.saving.load_model(file, compile=compile)
    except Exception as error:  # a damaged file fails anywhere from zip to HDF5 to Keras
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = reason.split(". ")[0].rstrip(".:")
        raise ValueError(
            f"{str(file)!r} cannot be read as a Keras model: {reason}. It is incomplete or was "
            f"changed, or a newer version wrote it ({_writer(file)})."
        ) from error
    if not isinstance(loaded, fitting.NoiseConditionalModel):
        raise ValueError(
            f"{str(file)!r} holds a {type(loaded).__name__}, not a tfdiffusion.DiffusionModel or "
            "ScoreModel."
        )
    return loaded


def _writer(file: Path) -> str:
    """Which Keras wrote a model file, as far as that can be told, and what reads it here."""
    import keras

    from tfdiffusion import __version__

    try:
        with zipfile.ZipFile(file) as archive:
            wrote = str(json.loads(archive.read("metadata.json"))["keras_version"])
    except Exception:  # whatever kept it from loading
        wrote = "an unknown version"
    return f"written by Keras {wrote}; this is Keras {keras.__version__}, tfdiffusion {__version__}"


def unet(
    shape: Sequence[int],
    num_classes: int | None = None,
    size: str = "small",
    dtype: str | None = None,
) -> UNet:
    """Makes a U-Net that fits images of a shape, with a cost that hardly depends on their side.

    Large images are read in patches, so that the network works on at most 16 ("small") or 32
    ("base") positions a side; each level halves them while that leaves at least 4.

    >>> network = tfd.models.unet((28, 28, 1), num_classes=10)  # patches of 2, levels of 14 and 7

    Args:
        shape: (H, W, C) of one image.
        num_classes: None for an unconditional network.
        size: "small", for two processor cores and minutes, or "base", for a GPU and hours.
        dtype: Keras dtype policy, such as "mixed_bfloat16".

    Returns:
        A network, not yet built.

    Raises:
        ValueError: If the size is unknown, the shape is not that of images, or its sides can't be
            halved often enough.
    """
    from tfdiffusion import _names, networks

    finest, widths, blocks = _names.look_up("size", size, _SIZES)
    shape = _image_shape(shape)
    _check_policy(dtype)
    patch_size, grids = _plan([int(side) for side in shape[:2]], finest, len(widths))
    if max(grids[-1]) > _COARSEST:
        raise ValueError(
            f"Images of {shape[0]}x{shape[1]} cannot be halved often enough for a U-Net. Use an "
            f"image_size that can, such as {_nearest_side(max(shape[:2]), finest, len(widths))}."
        )
    if max(grids[0]) <= 8:  # tiny images need less
        widths, blocks = [width // 2 for width in widths], 1
    attended = [i for i, grid in enumerate(grids) if i and max(grid) <= _COARSEST]
    return networks.UNet(
        out_channels=int(shape[2]),
        widths=tuple(widths[: len(grids)]),
        blocks_per_level=blocks,
        attention_levels=attended if size != "small" else (),
        groups=8,
        patch_size=patch_size,
        num_classes=num_classes,
        dtype=dtype,
    )


def refinenet(
    shape: Sequence[int],
    sigmas: Sequence[float],
    method: str = "ncsnv2",
    size: str = "small",
    dtype: str | None = None,
) -> NCSN | NCSNv2:
    """Makes a score network that fits images of a shape, in patches where they are large.

    >>> network = tfd.models.refinenet((28, 28, 1), sigmas)  # width 32 on patches of 2

    Args:
        shape: (H, W, C) of one image.
        sigmas: its ladder of noise levels, falling.
        method: "ncsn" or "ncsnv2".
        size: "small" (width 32, on at most 16 positions a side) or "base" (the published width of
            128, on at most 32).
        dtype: Keras dtype policy, such as "mixed_bfloat16".

    Returns:
        A network, not yet built.

    Raises:
        ValueError: If a name is unknown, the shape is not that of images, or its sides are odd.
    """
    from tfdiffusion import _names, score_matching

    finest, _, _ = _names.look_up("size", size, _SIZES)
    from tfdiffusion.score_matching.ladders import check_ladder

    shape, sigmas = _image_shape(shape), check_ladder(sigmas)
    _check_policy(dtype)
    make = _names.look_up(
        "method",
        method,
        {
            "ncsn": lambda **config: score_matching.NCSN(len(sigmas), **config),
            "ncsnv2": lambda **config: score_matching.NCSNv2(sigmas, **config),
        },
    )
    patch_size, _ = _plan([int(side) for side in shape[:2]], finest, 2)
    return make(width=32 if size == "small" else 128, patch_size=patch_size, dtype=dtype)


def _image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    from tfdiffusion import _checks

    shape = _checks.shape(shape)
    if len(shape) != 3:
        raise ValueError(f"Expected the shape of an image, (H, W, C). Received {shape}.")
    return shape


def _check_policy(dtype: str | None) -> None:
    """Raises a ValueError unless Keras knows the dtype policy."""
    import keras

    from tfdiffusion import _checks

    try:
        keras.dtype_policies.get(dtype)
    except Exception as error:  # of several kinds
        raise ValueError(
            "dtype must be a dtype policy of Keras, such as 'float32' or 'mixed_bfloat16'. "
            f"Received dtype={_checks.shown(dtype)}."
        ) from error


def _plan(sides: list[int], finest: int, levels: int) -> tuple[int, list[list[int]]]:
    """Patch size and the sides of each level, as far as they can be halved."""
    patch_size = 1
    while max(sides) > finest and _even(sides):
        sides, patch_size = [side // 2 for side in sides], 2 * patch_size
    grids = [sides]
    while _even(grids[-1]) and min(grids[-1]) >= 8 and len(grids) < levels:
        grids.append([side // 2 for side in grids[-1]])
    return patch_size, grids


def _nearest_side(side: int, finest: int, levels: int) -> int:
    others = sorted(range(1, 2 * side), key=lambda other: abs(other - side))
    return next(o for o in others if max(_plan([o, o], finest, levels)[1][-1]) <= _COARSEST)


def _even(sides: Sequence[int]) -> bool:
    return all(side % 2 == 0 for side in sides)
