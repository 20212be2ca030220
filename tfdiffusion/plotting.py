"""The pictures of a diffusion project: image grids, sampling GIFs, curves and 2-D fields.

Each function takes plain arrays (anything that `numpy.asarray` reads, also tensors of either
backend) and returns what it drew, a `uint8` array or a matplotlib `Figure`. With a path it also
saves it, by writing a file aside and renaming it, so that a reader never meets half a picture.

Figures are made with matplotlib's object interface: no display is needed, no global state is
touched, nothing has to be closed, and a figure shows itself as the last line of a notebook cell.
Colours are those of Okabe and Ito, or of the `viridis` family, which colour-blind readers can
tell apart.

>>> import numpy as np
>>> from tfdiffusion import plotting
>>> plotting.image_grid(np.zeros((6, 8, 8, 1)), columns=3, padding=0, scale=2).shape
(32, 48)
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tfdiffusion import _checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GRID_WIDTH = 720  # pixels that an automatic scale fills at most
_MAX_SCALE = 16
_MOST_PIXELS = 10_000  # of columns, paddings and factors: beyond it they are mistakes
_GIF_BYTES = 5_000_000  # an automatic scale stays below
_GREY_LEVELS = 16  # of a moving frame; noise has no use for more, and does not compress
_CUBE_LEVELS = 6  # of each colour channel of a moving frame: 6**3 = 216 of a GIF's 256 colours
_MIN_FRAME_MS = 20  # browsers slow faster frames down to 100 ms


# ----------------------------------------------------------------------------------------- style


def use_notebook_style() -> None:
    """Give what a notebook draws with matplotlib the look of this module's figures.

    Sets `matplotlib.rcParams`: the colours of Okabe and Ito in a fixed order, text that can be read
    at the width of a notebook, light grid lines, layout that leaves room for labels, 100 dots per
    inch on screen and in files. The only function here that touches global state; call it in the
    first cell.
    """
    import matplotlib

    matplotlib.rcParams.update(
        {
            "axes.axisbelow": True,
            "axes.grid": True,
            "axes.labelsize": 11,
            "axes.prop_cycle": matplotlib.cycler(color=_PALETTE),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 11,
            "figure.constrained_layout.use": True,
            "figure.dpi": 100,
            "figure.figsize": (6.4, 3.8),
            "figure.titlesize": 12,
            "font.size": 10.5,
            "grid.color": "0.9",
            "grid.linewidth": 0.8,
            "image.cmap": "viridis",
            "legend.fontsize": 10,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "savefig.dpi": 100,
            "savefig.facecolor": "white",
        }
    )


# ---------------------------------------------------------------------------------------- images


def image_grid(
    images: Any,
    columns: int | None = None,
    padding: int = 1,
    scale: int | None = None,
    background: int = 255,
) -> np.ndarray:
    """Lay images out in one picture, row by row.

    Args:
        images: (N, H, W, C) with C = 1 or 3; `uint8`, or floats in [-1, 1]. Floats outside are
            clipped, as the states on a sampling path need.
        columns: images in a row; about the square root of N when None.
        padding: pixels around each image, before the enlargement.
        scale: whole factor by which each pixel is repeated. None takes the largest that keeps
            the picture within 720 pixels of width (and at most 16), so that small digits can
            be seen.
        background: grey level, 0 to 255, of the padding and of empty places.

    Returns:
        `uint8` array, (H', W') for one channel and (H', W', 3) for three.

    Raises:
        ValueError: on a wrong shape, a NaN or infinite value, or floats that look like [0, 255].
        TypeError: on a data type that is neither `uint8` nor float.
    """
    pixels = _uint8(images, "images")
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(
            f"images has shape {pixels.shape}; expected (N, H, W, C) with N, H, W > 0 and C = 1 "
            "or 3. Add the missing axis: x[None] for one image, x[..., None] for grey ones."
        )
    n, h, w, c = pixels.shape
    columns = _default_columns(n) if columns is None else columns
    _checks.integer("columns", columns, 1, _MOST_PIXELS)
    _checks.integer("padding", padding, 0, _MOST_PIXELS)
    _checks.integer("background", background, 0, 255)
    rows = math.ceil(n / columns)
    cells = np.full((rows * columns, h + padding, w + padding, c), background, np.uint8)
    cells[:n, padding:, padding:] = pixels
    grid = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)  # (rows, H, columns, W, C)
    grid = grid.reshape(rows * (h + padding), columns * (w + padding), c)
    grid = np.pad(grid, ((0, padding), (0, padding), (0, 0)), constant_values=background)
    if scale is None:
        scale = min(max(_GRID_WIDTH // grid.shape[1], 1), _MAX_SCALE)
    _checks.integer("scale", scale, 1, _MOST_PIXELS)
    grid = grid.repeat(scale, axis=0).repeat(scale, axis=1)
    return grid[..., 0] if c == 1 else grid


def save_grid(
    images: Any,
    path: str | os.PathLike,
    columns: int | None = None,
    padding: int = 1,
    scale: int | None = None,
    background: int = 255,
) -> np.ndarray:
    """Save `image_grid(images, ...)` as a PNG file and return it.

    Args:
        images: as in `image_grid`.
        path: file name ending in `.png`; missing folders are made.
        columns: as in `image_grid`.
        padding: as in `image_grid`.
        scale: as in `image_grid`.
        background: as in `image_grid`.

    Returns:
        The grid, `uint8`.

    Raises:
        ValueError: as `image_grid`, or when `path` does not end in `.png`.
        TypeError: as `image_grid`.
    """
    import imageio.v3 as iio

    path = _path(path, (".png",))
    grid = image_grid(images, columns, padding, scale, background)
    _write(path, iio.imwrite("<bytes>", grid, extension=".png"))
    return grid


def show_grid(
    images: Any,
    path: str | os.PathLike | None = None,
    columns: int | None = None,
    title: str | None = None,
    row_labels: Sequence[str] | None = None,
) -> Figure:
    """Draw an image grid as a figure, with a title and a label for each row.

    Args:
        images: as in `image_grid`.
        path: where to save it, `.png`, `.pdf` or `.svg`; not saved when None.
        columns: images in a row; about the square root of N when None.
        title: above the grid.
        row_labels: one text for each row, at its left.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: as `image_grid`, or when the number of `row_labels` is not that of the rows.
        TypeError: as `image_grid`.
    """
    grid = image_grid(images, columns)
    height, width = grid.shape[:2]
    n = len(np.asarray(images))
    rows = math.ceil(n / (columns or _default_columns(n)))
    _check_texts("row_labels", row_labels, rows, "one for each row of images")
    inches = width / 110
    figure, axes = _figure(1, 1, inches + (0.8 if row_labels else 0), inches * height / width + 0.3)
    ax = axes[0]
    ax.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    ax.spines[:].set_visible(False)
    ax.grid(False)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.set_yticks(
        (np.arange(rows) + 0.5) * height / rows if row_labels else [], labels=row_labels or []
    )
    if title:
        ax.set_title(title)
    return _save(figure, path)


def save_path_gif(
    path_states: Any,
    path: str | os.PathLike,
    seconds: float = 3.5,
    hold: float = 1.5,
    frames: int = 48,
    columns: int | None = None,
    padding: int = 1,
    scale: int | None = None,
) -> np.ndarray:
    """Save the way from noise to images as a GIF that loops forever.

    Of a long path the frames are chosen so that each brings the picture about as much nearer to
    its end as the others, which shows the interesting part of any schedule and of any sampler.
    Frames in motion have few grey levels or colours, as noise does not compress; the last, which
    is held, has all that a GIF can have.

    Args:
        path_states: (S, N, H, W, C), from noise to images, as `sample(..., return_path=True)`
            gives it; floats are clipped to [-1, 1].
        path: file name ending in `.gif`; missing folders are made.
        seconds: how long the way takes, without the hold.
        hold: seconds that the last state stays.
        frames: the most frames to write; a path with fewer states gives one frame a state.
        columns: as in `image_grid`.
        padding: as in `image_grid`.
        scale: as in `image_grid`. None also goes down until the file is below 5 MB.

    Returns:
        The indices of the states that became frames, increasing, the last one S - 1. States that
        look the same become one frame, shown for as long as they would be together.

    Raises:
        ValueError: on a wrong shape, NaN, durations that are not positive or fewer than 2 frames.
        TypeError: on a data type that is neither `uint8` nor float.
    """
    path = _path(path, (".gif",))
    states = _array(path_states, "path_states")
    if states.ndim != 5 or len(states) < 2 or 0 in states.shape:
        raise ValueError(
            f"path_states has shape {states.shape}; expected (S, N, H, W, C) with S >= 2 states, "
            "as sample(..., return_path=True) returns."
        )
    _check_times(seconds, hold, frames)
    if scale is not None:
        _checks.integer("scale", scale, 1, _MOST_PIXELS)
    states = _uint8(states, "path_states")
    chosen = _choose_frames(states, frames)
    moving = max(round(seconds * 100 / (len(chosen) - 1)) * 10, _MIN_FRAME_MS)
    durations = [moving] * (len(chosen) - 1) + [max(round(hold * 100) * 10, _MIN_FRAME_MS)]
    grids = [image_grid(states[i], columns, padding, scale=1) for i in chosen]
    factors = [scale]
    if scale is None:
        factors = range(min(max(_GRID_WIDTH // grids[0].shape[1], 1), _MAX_SCALE), 0, -1)
    for factor in factors:
        data = _encode_gif(grids, durations, factor)
        if len(data) < _GIF_BYTES:
            break
    _write(path, data)
    return chosen


def _uint8(images: Any, name: str) -> np.ndarray:
    """Pixels of `uint8` images, or of floats that are clipped to [-1, 1]."""
    images = _array(images, name)
    if images.dtype == np.uint8:
        return images
    # numpy does not count bfloat16, a JAX and mixed-precision type, among the floats.
    if not (np.issubdtype(images.dtype, np.floating) or images.dtype.name == "bfloat16"):
        raise TypeError(
            f"{name} has dtype {images.dtype}; expected uint8 in [0, 255] or floats in [-1, 1]."
        )
    images = images.astype("float32")
    if not np.all(np.isfinite(images)):
        count = int(np.sum(~np.isfinite(images)))
        raise ValueError(f"{name} holds {count} NaN or infinite values of {images.size}.")
    if images.size and images.min() >= 0 and images.max() > 2:
        raise ValueError(
            f"{name} are floats from {images.min():g} to {images.max():g}, which looks like "
            "[0, 255]; expected [-1, 1]. Cast to uint8, or use x / 127.5 - 1."
        )
    return np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


def _array(values: Any, name: str) -> np.ndarray:
    """An array of whatever was given."""
    try:
        return np.asarray(values)
    except Exception as error:  # ragged lists, symbols of a graph
        raise ValueError(f"{name} must be one array. Received {_checks.shown(values)}.") from error


def _numbers(values: Any, name: str, rank: int = 1) -> np.ndarray:
    """float64, NaN and infinities included, with so many axes."""
    values = _array(values, name)
    if _checks.kind(values) not in "iuf" or values.ndim != rank:
        raise ValueError(
            f"{name} must be numbers with {rank} {'axis' if rank == 1 else 'axes'}. "
            f"Received {_checks.shown(values)}."
        )
    return values.astype("float64")


def _check_times(seconds: float, hold: float, frames: int) -> None:
    """Of a film."""
    _checks.number("seconds", seconds, "(0, 3600]")
    _checks.number("hold", hold, "(0, 3600]")
    _checks.integer("frames", frames, 2, _MOST_PIXELS)


def _check_texts(name: str, texts: Any, count: int, wanted: str, optional: bool = True) -> None:
    """Raises a ValueError unless there are so many texts, or None."""
    if texts is None and optional:
        return
    listed = isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
    if not listed or len(texts) != count:
        raise ValueError(
            f"{name} must be {count} texts, {wanted}. Received {_checks.shown(texts)}."
        )


def _check_curves(curves: Any, wanted: str) -> None:
    """Raises unless it is a dictionary from names to pairs."""
    if not isinstance(curves, Mapping):
        raise TypeError(f"curves must be a dictionary, {wanted}. Received {_checks.shown(curves)}.")
    for name, pair in curves.items():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"{name!r} must be a pair, {wanted}. Received {_checks.shown(pair)}.")


def _default_columns(n: int) -> int:
    """The first divisor of n from its square root on, unless the grid would be very flat."""
    root = math.isqrt(n - 1) + 1
    return next((c for c in range(root, 2 * root) if n % c == 0), root)


def _choose_frames(states: np.ndarray, frames: int) -> np.ndarray:
    """Indices of states at equal steps of progress: half by time, half by nearness to the end."""
    if len(states) <= frames:
        return np.arange(len(states))
    time = np.linspace(0, 1, len(states))
    end = states[-1].astype("float32")
    distance = np.array([np.sqrt(np.mean((s - end) ** 2)) for s in states])
    nearness = np.maximum.accumulate(1 - distance / max(distance.max(), 1e-9))
    progress = time + nearness  # strictly increasing
    wanted = np.linspace(progress[0], progress[-1], frames)
    return np.unique(np.rint(np.interp(wanted, progress, np.arange(len(states)))).astype(int))


def _encode_gif(grids: list[np.ndarray], durations: list[int], scale: int) -> bytes:
    """Encode with one palette for all moving frames, so that frames are stored as differences."""
    from PIL import Image

    cube = np.linspace(0, 255, _CUBE_LEVELS).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(cube, cube, cube, indexing="ij"), axis=-1).reshape(-1)
    images = []
    for i, grid in enumerate(grids):
        grey, last = grid.ndim == 2, i == len(grids) - 1
        if not last and grey:
            step = 255 / (_GREY_LEVELS - 1)
            grid = np.rint(np.rint(grid / step) * step).astype(np.uint8)
        elif not last:
            level = np.rint(grid / 255 * (_CUBE_LEVELS - 1)).astype(np.uint8)
            grid = level @ np.array([_CUBE_LEVELS**2, _CUBE_LEVELS, 1], np.uint8)
        image = Image.fromarray(grid)
        if not grey and last:
            image = image.quantize(256, dither=Image.Dither.NONE)
        elif not grey:
            image.putpalette(cube.tobytes())
        size = (image.width * scale, image.height * scale)
        images.append(image.resize(size, Image.Resampling.NEAREST))
    return _gif(images, durations)


def _gif(images: list, durations: Any) -> bytes:
    """PIL images as a GIF that plays again and again."""
    file = io.BytesIO()
    images[0].save(
        file,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=durations,
        loop=0,
        optimize=True,  # store what changed only
    )
    return file.getvalue()


# ---------------------------------------------------------------------------------------- curves


def loss_curve(history: Mapping[str, Sequence[float]], path: str | os.PathLike | None = None):
    """Draw the loss of each epoch, and the validation loss by noise level where it is known.

    Args:
        history: the dictionary `keras.callbacks.History.history`: "loss", and where present
            "val_loss" and the parts "val_loss_<name>" (for example q1 to q4, quarters of the
            noise levels), which get a panel of their own. Other entries are left out.
            Validation entries may be shorter, as `validation_freq` makes them.
        path: where to save it, `.png`, `.pdf` or `.svg`; not saved when None.

    Returns:
        The matplotlib figure.

    Raises:
        TypeError: if `history` is no mapping.
        ValueError: if no finite value of "loss" or "val_loss" is there.
    """
    if not isinstance(history, Mapping):
        raise TypeError(
            f"history is a {type(history).__name__}; expected a dictionary of lists. "
            "fit() returns an object whose attribute .history is one."
        )
    curves = {
        key: _numbers(values, f"history[{key!r}]")
        for key, values in history.items()
        if isinstance(key, str) and re.fullmatch(r"(val_)?loss|val_loss_.+", key)
    }
    curves = {key: values for key, values in curves.items() if np.isfinite(values).any()}
    if not {"loss", "val_loss"} & set(curves):
        raise ValueError(
            "history must have a finite value in 'loss' or 'val_loss'. Received "
            f"{sorted(map(str, history))}."
        )
    epochs = max(len(values) for values in curves.values())
    parts = _natural_order(key for key in curves if key.startswith("val_loss_"))
    figure, axes = _figure(1, 2 if parts else 1, 9.6 if parts else 6.4, 3.8)
    styles = {"loss": ("training", _PALETTE[0]), "val_loss": ("validation", _PALETTE[1])}
    for key in [key for key in styles if key in curves]:
        _plot_epochs(axes[0], curves[key], epochs, *styles[key])
    shades = _shades(len(parts))
    for key, colour in zip(parts, shades):
        _plot_epochs(axes[1], curves[key], epochs, key.removeprefix("val_loss_"), colour)
    titles = ["loss", "validation loss by noise level"]
    shown = [[curves[key] for key in styles if key in curves], [curves[key] for key in parts]]
    for ax, title, values in zip(axes, titles, shown):
        ax.set(title=title, xlabel="epoch", ylabel="loss")
        ax.xaxis.get_major_locator().set_params(integer=True)
        _log_axis(ax, np.concatenate(values))
        ax.legend(frameon=False)
    missing = sum(int(np.sum(~np.isfinite(values))) for values in curves.values())
    if missing:
        axes[0].set_title(f"loss ({missing} non-finite values not shown)")
    return _save(figure, path)


def schedule_curves(processes: Any, path: str | os.PathLike | None = None) -> Figure:
    """Draw alpha, sigma and the log signal-to-noise ratio of processes over t.

    Args:
        processes: one process, a list of them, or a dictionary from the name to show to the
            process; an object with `alpha(t)`, `sigma(t)` and `log_snr(t)` for t of shape (T,).
        path: where to save it, `.png`, `.pdf` or `.svg`; not saved when None.

    Returns:
        The matplotlib figure.

    Raises:
        TypeError: if something given is no process.
        ValueError: if none is given.
    """
    if not isinstance(processes, Mapping):
        several = list(processes) if isinstance(processes, list | tuple) else [processes]
        processes = _named(several)
    if not processes:
        raise ValueError("processes must be at least one process. Received none.")
    for name, process in processes.items():
        for method in ("alpha", "sigma", "log_snr"):
            if not callable(getattr(process, method, None)):
                raise TypeError(
                    f"{name!r} is a {type(process).__name__} without {method}(t); expected "
                    "processes, as tfdiffusion.processes.get(name) gives them."
                )
    t = np.linspace(0, 1, 401, dtype="float32")
    figure, axes = _figure(1, 3, 11.5, 3.6)
    panels = [
        ("alpha", r"signal scale $\alpha(t)$"),
        ("sigma", r"noise scale $\sigma(t)$"),
        ("log_snr", r"log-SNR $\ln\,\alpha^2/\sigma^2$"),
    ]
    for ax, (method, title) in zip(axes, panels):
        for i, (name, process) in enumerate(processes.items()):
            values = np.asarray(getattr(process, method)(t), "float64").reshape(-1)
            values = np.where(np.isfinite(values), values, np.nan)  # the ends may be infinite
            dash = ("-", "--", ":")[i // len(_PALETTE) % 3]
            ax.plot(t, values, dash, color=_PALETTE[i % len(_PALETTE)], label=name)
        ax.set(title=title, xlabel="t (0: data, 1: noise)", xlim=(0, 1))
    low, high = axes[1].get_ylim()
    if high > 4:  # a variance-exploding process
        axes[1].set_yscale("symlog", linthresh=1)
        axes[1].set_ylim(min(low, 0), high * 1.2)
    if len(processes) > 1:
        columns = min(len(processes), 6)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return _save(figure, path)


def bits_by_time(curves: Mapping[str, Any], path: str | os.PathLike | None = None) -> Figure:
    """Draw where the bits of the variational bound are: density over t, and sum from t on.

    Args:
        curves: from the name to show to (edges, bits), as `Bound.by_time()` gives them: bits a
            dimension in each interval of t.
        path: where to save it, `.png`, `.pdf` or `.svg`; not saved when None.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: if there is no curve, or the edges are not one more than the bits.
    """
    _check_curves(curves, "{name: bound.by_time()}")
    if not curves:
        raise ValueError("curves is empty; expected {name: bound.by_time()}. Received none.")
    figure, axes = _figure(1, 2, 9.6, 3.8)
    positive = []
    for i, (name, (edges, bits)) in enumerate(curves.items()):
        edges, bits = _numbers(edges, f"edges of {name!r}"), _numbers(bits, f"bits of {name!r}")
        if edges.shape != (bits.size + 1,):
            raise ValueError(
                f"{name!r}: received {edges.size} edges for {bits.size} bits; expected one more."
            )
        style = {"color": _PALETTE[i % len(_PALETTE)], "label": name}
        density = np.where(bits > 0, bits / np.diff(edges), np.nan)
        positive.append(density[bits > 0])
        axes[0].stairs(density, edges, linewidth=1.6, **style)
        from_here = np.append(np.cumsum(bits[::-1])[::-1], 0.0)
        axes[1].plot(edges, from_here, **style)
    axes[0].set(title="bits a dimension, per unit of t", ylabel="bits / dimension / t")
    _log_axis(axes[0], np.concatenate(positive) if positive else np.ones(1))
    axes[1].set(title="sum over the steps from t to 1", ylabel="bits / dimension", ylim=(0, None))
    for ax in axes:
        ax.set(xlabel="t (0: data, 1: noise)", xlim=(0, 1))
    if len(curves) > 1:
        axes[1].legend(frameon=False)
    return _save(figure, path)


def rate_distortion(curves: Mapping[str, Any], path: str | os.PathLike | None = None) -> Figure:
    """Draw what the receiver of a progressive code sees after so many bits.

    Args:
        curves: from the name to show to (rate, distortion), as
            `tfdiffusion.likelihood.rate_distortion` gives them, for data in [-1, 1].
        path: where to save it, `.png`, `.pdf` or `.svg`; not saved when None.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: if there is no curve.
    """
    _check_curves(curves, "{name: rate_distortion(bound)}")
    if not curves:
        raise ValueError("curves is empty; expected {name: rate_distortion(bound)}. Received none.")
    figure, axes = _figure(1, 1, 5.6, 3.8)
    for i, (name, (rate, distortion)) in enumerate(curves.items()):
        rate, grey = _numbers(rate, "rate"), 127.5 * _numbers(distortion, "distortion")
        if rate.shape != grey.shape:
            raise ValueError(
                f"{name!r}: rate and distortion must be of one length. Received {rate.size} and "
                f"{grey.size}."
            )
        axes[0].plot(rate, grey, color=_PALETTE[i % len(_PALETTE)], label=name)
    axes[0].set(
        title="progressive coding",
        xlabel="rate (bits / dimension)",
        ylabel="distortion (RMS, grey levels of 255)",
        xlim=(0, None),
        ylim=(0, None),
    )
    if len(curves) > 1:
        axes[0].legend(frameon=False)
    return _save(figure, path)


def _plot_epochs(ax: Axes, values: np.ndarray, epochs: int, label: str, colour: Any) -> None:
    """Plot at the epochs 1, 2, ..., or at every k-th for a curve that is shorter."""
    every = max(epochs // len(values), 1)
    marker = "o" if len(values) < 30 else None
    ax.plot(
        every * np.arange(1, len(values) + 1),
        values,
        color=colour,
        label=label,
        marker=marker,
        markersize=3.5,
    )


def _log_axis(ax: Axes, values: np.ndarray) -> None:
    """Use a logarithmic y axis with plain numbers where the values span more than a factor 3."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = values[np.isfinite(values)]
    if not values.size or values.min() <= 0 or values.max() < 3 * values.min():
        return
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _natural_order(keys: Any) -> list[str]:
    """Sort with q2 before q10."""
    return sorted(keys, key=lambda key: [int(d or 0) or w for d, w in _split_digits(key)])


def _split_digits(text: str) -> list[tuple[str, str]]:
    return re.findall(r"(\d+)|(\D+)", text)


def _named(objects: Sequence[Any]) -> dict[str, Any]:
    """Name each object by its class, with a number where a class comes twice."""
    names: dict[str, Any] = {}
    for item in objects:
        base = getattr(item, "name", None) or type(item).__name__
        name, i = base, 2
        while name in names:
            name, i = f"{base} {i}", i + 1
        names[name] = item
    return names


# ----------------------------------------------------------------------------------- two dimensions


def scatter_2d(
    samples: Any,
    path: str | os.PathLike | None = None,
    limits: tuple[float, float] | None = None,
    titles: Sequence[str] | None = None,
) -> Figure:
    """Draw sets of points in the plane side by side, on the same axes.

    Args:
        samples: (N, 2), or a list of such arrays, or an array (S, N, 2), for example the states
            on a sampling path, or a dictionary from title to array.
        path: where to save it, `.png`, `.pdf` or `.svg`; not saved when None.
        limits: (low, high) of both axes; from the data when None.
        titles: one for each set; not with a dictionary, whose keys are the titles.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: on a wrong shape, NaN, or a wrong number of titles.
    """
    if isinstance(samples, Mapping):
        if titles is not None:
            raise ValueError("titles come with a dictionary of samples; its keys are the titles.")
        titles, sets = [str(key) for key in samples], list(samples.values())
    else:
        if not isinstance(samples, list | tuple):
            samples = _array(samples, "samples")
            samples = samples if samples.ndim == 3 else [samples]
        sets = list(samples)
        _check_texts("titles", titles, len(sets), "one for each set of points")
        titles = [""] * len(sets) if titles is None else list(titles)
    if not sets:
        raise ValueError("samples must be at least one set of points. Received none.")
    sets = [_points(points, f"samples[{i}]") for i, points in enumerate(sets)]
    limits = _limits(limits, np.concatenate(sets))
    columns = min(len(sets), 5)
    rows = math.ceil(len(sets) / columns)
    side = 4.6 if len(sets) == 1 else 2.8
    figure, axes = _figure(rows, columns, side * columns, (side + 0.5) * rows, same_axes=True)
    for ax in axes[len(sets) :]:
        ax.set_visible(False)
    for ax, points, title in zip(axes, sets, titles):
        size = float(np.clip(6000 / len(points), 1.5, 14))
        alpha = float(np.clip(1500 / len(points), 0.25, 0.8))
        ax.scatter(*points.T, s=size, alpha=alpha, color=_PALETTE[0], linewidths=0)
        _set_plane(ax, title, limits)
    return _save(figure, path)


def _set_plane(ax: Axes, title: str, limits: tuple[float, float]) -> None:
    """Equal axes of the plane, with their names at the outer ones."""
    ax.set(title=title, xlim=limits, ylim=limits, aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    ax.label_outer()


def field_2d(
    fn: Callable[[np.ndarray], Any],
    path: str | os.PathLike | None = None,
    limits: tuple[float, float] | None = None,
    samples: Any = None,
    density: Callable[[np.ndarray], Any] | None = None,
    resolution: int = 24,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw a vector field in the plane: a score, a velocity, a denoiser's correction.

    Arrows have the field's direction; their length is compressed to the square root of its norm,
    and the colour tells the norm itself, so that a score, which is large far from the data and
    small near them, can be read in both places.

    Args:
        fn: maps points, `float32` of shape (N, 2), to vectors of shape (N, 2).
        path: where to save it, `.png`, `.pdf` or `.svg`; not saved when None.
        limits: (low, high) of both axes; around `samples` when None, else (-2, 2).
        samples: (M, 2) points to draw below the arrows.
        density: maps points (N, 2) to a density or log density (N,), drawn as contours below.
        resolution: arrows along each axis.
        title: above the field.
        ax: axes to draw in, of a figure of yours, with the colour bar below; a new figure when
            None.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: on a wrong shape, or on values of the field that are not finite.
    """
    _check_field("density", density)
    points, limits, places, spacing = _lattice(samples, limits, resolution)
    vectors = _vectors(fn, places)

    bar = {"shrink": 0.85} if ax is None else {"shrink": 0.7, "location": "bottom"}
    if ax is None:
        _, (ax,) = _figure(1, 1, 5.6, 4.8)
    figure = ax.figure
    ax.grid(False)
    if density is not None:
        _contours(ax, density, limits)
    if points is not None:
        size = float(np.clip(6000 / len(points), 1.5, 12))
        ax.scatter(*points.T, s=size, alpha=0.5, color=_PALETTE[4], linewidths=0)
    quiver = _arrows(ax, places, vectors, spacing)
    figure.colorbar(quiver, ax=ax, label="norm", **bar)
    ax.set(title=title or "", xlim=limits, ylim=limits, aspect="equal")
    return _save(figure, path)


def save_points_gif(
    states: Any,
    path: str | os.PathLike,
    limits: tuple[float, float] | None = None,
    titles: Sequence[str] | None = None,
    samples: Any = None,
    density: Callable[[np.ndarray], Any] | None = None,
    trail: int = 0,
    seconds: float = 4.0,
    hold: float = 1.5,
    frames: int = 48,
) -> np.ndarray:
    """Save points that move in the plane as a GIF that loops forever.

    Args:
        states: (S, N, 2), from the first state to the last; or a dictionary from title to such an
            array, all of S states, drawn side by side.
        path: file name ending in `.gif`; missing folders are made.
        limits: (low, high) of both axes; around all states when None.
        titles: S texts, one shown above each state, such as "step 30".
        samples: (M, 2) points to draw below.
        density: maps points (N, 2) to a density or log density (N,), drawn as contours below.
        trail: how many of the states before a state are drawn as the line that led there.
        seconds: how long the way takes, without the hold.
        hold: seconds that the last state stays.
        frames: the most frames to write, at equal distances on the path.

    Returns:
        The indices of the states that became frames, increasing, the last one S - 1.

    Raises:
        ValueError: on a wrong shape, NaN, a wrong number of titles, durations that are not positive
            or fewer than 2 frames.
    """
    path = _path(path, (".gif",))
    panels = states if isinstance(states, Mapping) else {"": states}
    panels = {str(name): _numbers(panel, "states", rank=3) for name, panel in panels.items()}
    lengths = {len(panel) for panel in panels.values() if panel.ndim == 3}
    if any(panel.ndim != 3 for panel in panels.values()) or len(lengths) != 1 or min(lengths) < 2:
        shapes = ", ".join(str(panel.shape) for panel in panels.values())
        raise ValueError(f"states has shape {shapes}; expected (S, N, 2) with the same S >= 2.")
    (count,) = lengths
    _check_times(seconds, hold, frames)
    _checks.integer("trail", trail, 0)
    _check_texts("titles", titles, count, "one for each state")
    _check_field("density", density)
    flat = [_points(np.concatenate(panel), "states") for panel in panels.values()]
    limits = _limits(limits, np.concatenate(flat))
    figure, axes = _figure(1, len(panels), 3.5 * len(panels), 3.7, same_axes=True)
    figure.set_dpi(100)
    for ax, name in zip(axes, panels):
        ax.grid(False)
        if density is not None:
            _contours(ax, density, limits)
        if samples is not None:
            ax.scatter(*_points(samples, "samples").T, s=1.5, color=_PALETTE[4], linewidths=0)
        ax.set(title=name, xlim=limits, ylim=limits, aspect="equal")
    chosen = np.unique(np.rint(np.linspace(0, count - 1, min(frames, count))).astype(int))
    if titles is not None:
        figure.suptitle(titles[0], fontsize=11)
    for _ in range(2):  # until the layout rests, which then holds for all frames
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    pictures = []
    for i in chosen:
        drawn = [
            _moving(ax, panel[max(i - trail, 0) : i + 1])
            for ax, panel in zip(axes, panels.values())
        ]
        if titles is not None:
            figure.suptitle(titles[i], fontsize=11)
        pictures.append(_render(figure, "png"))
        for artist in itertools.chain(*drawn):
            artist.remove()
    moving = max(round(seconds * 100 / (len(chosen) - 1)) * 10, _MIN_FRAME_MS)
    durations = [moving] * (len(chosen) - 1) + [max(round(hold * 100) * 10, _MIN_FRAME_MS)]
    _write(path, _gif_of_pictures(pictures, durations))
    return chosen


def _moving(ax: Axes, states: np.ndarray) -> list[Any]:
    """Draw the last of some states, and the lines that led there; returns what was drawn."""
    size = float(np.clip(6000 / states.shape[1], 1.5, 14))
    lines = ax.plot(states[..., 0], states[..., 1], color=_PALETTE[1], linewidth=0.6, alpha=0.7)
    points = ax.scatter(*states[-1].T, s=size, color=_PALETTE[0], linewidths=0, zorder=3)
    return [*lines, points]


def _gif_of_pictures(pictures: Sequence[bytes], durations: list[int]) -> bytes:
    """PNG files of one size as a GIF, with one palette for all so that differences are small."""
    from PIL import Image

    images = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
    palette = images[-1].quantize(64, dither=Image.Dither.NONE)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    return _gif(images, durations)


def _contours(ax: Axes, density: Callable[[np.ndarray], Any], limits: tuple[float, float]) -> None:
    """A density as grey areas."""
    fine = 128
    heights = _array(density(_mesh(limits, fine)), "density")
    if heights.size != fine**2 or _checks.kind(heights) not in "iuf":
        raise ValueError(
            "density must map points (N, 2) to numbers (N,). Received "
            f"{_checks.shown(heights)} for {fine**2} points."
        )
    heights = heights.astype("float64").reshape(fine, fine)
    if not np.isfinite(heights).any():
        raise ValueError("density must be finite somewhere. Received NaN or infinities only.")
    line = np.linspace(*limits, fine)
    ax.contourf(line, line, heights, levels=14, cmap="Greys", alpha=0.6)


def compare_fields_2d(
    learned: Callable[[np.ndarray], Any],
    exact: Callable[[np.ndarray], Any],
    path: str | os.PathLike | None = None,
    limits: tuple[float, float] | None = None,
    samples: Any = None,
    resolution: int = 20,
    titles: Sequence[str] = ("exact", "learned", "error"),
) -> Figure:
    """Draw an exact vector field, a learned one, and the difference, on one scale.

    Args:
        learned: maps points, `float32` of shape (N, 2), to vectors of shape (N, 2).
        exact: the same.
        path: where to save it, `.png`, `.pdf` or `.svg`; not saved when None.
        limits: (low, high) of both axes; around `samples` when None, else (-2, 2).
        samples: (M, 2) points to draw below the arrows.
        resolution: arrows along each axis.
        titles: of the three panels. Behind that of the third stands the root mean square of the
            error relative to that of the exact field, over the lattice.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: on a wrong shape, or on values of a field that are not finite.
    """
    _check_texts("titles", titles, 3, "one for each panel", optional=False)
    points, limits, places, spacing = _lattice(samples, limits, resolution)
    true, found = _vectors(exact, places), _vectors(learned, places)
    error = math.sqrt(np.sum((found - true) ** 2) / max(np.sum(true**2), 1e-30))
    largest = max(np.linalg.norm(field, axis=1).max() for field in (true, found))
    figure, axes = _figure(1, 3, 12.6, 4.5, same_axes=True)
    panels = (true, found, found - true)
    titles = [*titles[:2], f"{titles[2]} ({100 * error:.0f}% of the field)"]
    for ax, field, title in zip(axes, panels, titles):
        ax.grid(False)
        if points is not None:
            size = float(np.clip(6000 / len(points), 1.5, 12))
            ax.scatter(*points.T, s=size, alpha=0.4, color=_PALETTE[4], linewidths=0)
        quiver = _arrows(ax, places, field, spacing, largest)
        _set_plane(ax, title, limits)
    figure.colorbar(quiver, ax=axes, label="norm", shrink=0.85)
    return _save(figure, path)


def costs(
    sizes: Sequence[float],
    seconds: Mapping[str, Sequence[float]],
    path: str | os.PathLike | None = None,
    xlabel: str = "dimension",
) -> Figure:
    """Draw times against a size, both logarithmic, with a slope to read them by.

    Args:
        sizes: (N,), positive.
        seconds: name → (N,) times; NaN where none was taken.
        path: where to save it, `.png`, `.pdf` or `.svg`; not saved when None.
        xlabel: what the sizes are.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: if the lengths differ or nothing is there to draw.
    """
    if not isinstance(seconds, Mapping):
        raise TypeError(
            f"seconds must be a dictionary, {{name: times}}. Received {_checks.shown(seconds)}."
        )
    sizes = _numbers(sizes, "sizes")
    seconds = {name: _numbers(values, f"times of {name!r}") for name, values in seconds.items()}
    for name, values in seconds.items():
        if len(values) != len(sizes):
            raise ValueError(f"{name!r}: received {len(values)} times for {len(sizes)} sizes.")
    if not seconds or not len(sizes):
        raise ValueError("There is nothing to draw: received no times or no sizes.")
    if not (sizes > 0).all() or not np.isfinite(sizes).all():
        raise ValueError(f"sizes must be positive and finite. Received {sizes.tolist()[:5]}.")
    figure, axes = _figure(1, 1, 6.4, 4.2)
    ax = axes[0]
    for i, (name, values) in enumerate(seconds.items()):
        milliseconds = 1000 * values
        colour = _PALETTE[i % len(_PALETTE)]
        ax.plot(sizes, milliseconds, "o-", markersize=3.5, color=colour, label=name)
    ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="milliseconds")
    ax.legend(frameon=False)
    return _save(figure, path)


def _vectors(fn: Callable[[np.ndarray], Any], places: np.ndarray) -> np.ndarray:
    """A field's vectors at places, checked."""
    _check_field("fn", fn, optional=False)
    vectors = _numbers(fn(places), "what fn gives", rank=2)
    if vectors.shape != places.shape:
        raise ValueError(
            f"fn must give vectors (N, 2) for points {places.shape}. Received {vectors.shape}."
        )
    if not np.all(np.isfinite(vectors)):
        bad = int(np.sum(~np.isfinite(vectors).all(axis=1)))
        raise ValueError(
            f"fn must give finite vectors. Received NaN or infinite ones at {bad} of "
            f"{len(places)} points."
        )
    return vectors


def _check_field(name: str, function: Any, optional: bool = True) -> None:
    if not (callable(function) or (optional and function is None)):
        raise TypeError(
            f"{name} must be a function of points (N, 2). Received {_checks.shown(function)}."
        )


def _arrows(
    ax: Axes, places: np.ndarray, vectors: np.ndarray, spacing: float, largest: float | None = None
) -> Any:
    """Arrows with lengths as the square root of the norms, and colours as the norms."""
    norms = np.linalg.norm(vectors, axis=1)
    largest = max(norms.max() if largest is None else largest, 1e-30)
    lengths = np.sqrt(norms / largest)
    arrows = vectors / np.maximum(norms, 1e-30)[:, None] * (0.95 * spacing * lengths)[:, None]
    return ax.quiver(
        *places.T,
        *arrows.T,
        norms,
        cmap="viridis",
        clim=(0.0, largest),
        angles="xy",
        scale_units="xy",
        scale=1,
    )


def _points(points: Any, name: str) -> np.ndarray:
    points = _array(points, name)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"{name} has shape {points.shape}; expected (N, 2) with N > 0.")
    points = _numbers(points, name, rank=2)
    if not np.all(np.isfinite(points)):
        raise ValueError(
            f"{name} must be finite. Received {int(np.sum(~np.isfinite(points)))} NaN or "
            "infinities."
        )
    _checks.moderate(name, points)
    return points


def _limits(limits: tuple[float, float] | None, points: np.ndarray) -> tuple[float, float]:
    """Check the limits, or make a square around the points."""
    if limits is None:
        margin = 0.05 * np.ptp(points) or 1.0
        return float(points.min() - margin), float(points.max() + margin)
    ends = _numbers(limits, "limits")
    if len(ends) != 2 or not np.isfinite(ends).all() or not ends[0] < ends[1]:
        raise ValueError(f"limits={limits}; expected (low, high) with low < high. Received {ends}.")
    low, high = ends
    return float(low), float(high)


def _mesh(limits: tuple[float, float], n: int) -> np.ndarray:
    """Points (n*n, 2) of a square lattice, x fastest."""
    line = np.linspace(*limits, n, dtype="float32")
    return np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)


# ----------------------------------------------------------------------------- figures and files


@functools.cache
def _figure_class() -> type:
    """A matplotlib Figure that notebooks can show although pyplot was never imported."""
    from matplotlib.figure import Figure

    class TfdFigure(Figure):
        def _repr_png_(self) -> bytes:
            return _render(self, "png")

    return TfdFigure


def _figure(
    rows: int, columns: int, width: float, height: float, same_axes: bool = False
) -> tuple[Figure, list[Axes]]:
    """A new figure and its axes as a flat list, in the library's plain style."""
    import matplotlib

    dpi = matplotlib.rcParams["savefig.dpi"]  # of the notebook style, or whoever set it
    dpi = 140 if dpi == "figure" else dpi
    figure = _figure_class()(figsize=(width, height), dpi=dpi, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=same_axes, sharey=same_axes)
    axes = list(axes.flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.title.set_fontsize(11)
    return figure, axes


def _shades(n: int) -> list[Any]:
    """Colours in an order, dark to light."""
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0.05, 0.85, max(n, 1))))


def _render(figure: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, facecolor="white")
    return file.getvalue()


def _save(figure: Figure, path: str | os.PathLike | None) -> Figure:
    if path is not None:
        path = _path(path, (".png", ".pdf", ".svg"))
        _write(path, _render(figure, path.suffix[1:].lower()))
    return figure


def _path(path: str | os.PathLike, suffixes: tuple[str, ...]) -> Path:
    path = _checks.path("path", path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"path={str(path)!r}; expected a name ending in {' or '.join(suffixes)}.")
    return path


def _write(path: Path, data: bytes) -> None:
    """Write aside, then rename: readers see the old file or the new one, nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _lattice(samples: Any, limits: Any, resolution: int) -> tuple:
    """(samples as points, limits of both axes, where arrows stand, how far apart they are)."""
    points = None if samples is None else _points(samples, "samples")
    limits = (-2.0, 2.0) if limits is None and points is None else _limits(limits, points)
    _checks.integer("resolution", resolution, 2, 1000)
    spacing = (limits[1] - limits[0]) / resolution
    return (
        points,
        limits,
        _mesh((limits[0] + spacing / 2, limits[1] - spacing / 2), resolution),
        spacing,
    )
