"""Folders of image files: found, checked one by one, and decoded once or on demand."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tfdiffusion.data.examples import Examples, fits_in_memory
from tfdiffusion.data.pixels import decode, square

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # Pillow's name, whatever the suffix says
COMMON_SHARE = 0.9  # of the images must agree on a size for the others to be the odd ones
REPORTED = 10  # files named in a message


class ImageFiles:
    """Image files that are decoded to uint8 (B, H, W, C) when indexed by positions (B,)."""

    def __init__(self, paths: list[Path], channels: int, image_size: int | None):
        self.paths, self.channels, self.image_size = paths, channels, image_size

    def decode(self, position: int) -> np.ndarray:
        """Decode one file, or raise what Pillow raises."""
        with _open(self.paths[position]) as image:
            return square(decode(image, self.channels), self.image_size)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        images = []
        for position in positions:
            try:
                images.append(self.decode(position))
            except Exception as error:  # it could be read when the folder was
                raise RuntimeError(f"{self.paths[position]}: {_reason(error)}") from error
        return np.stack(images)


def read_folder(
    root: Path,
    image_size: int | None,
    channels: int | None,
    labels: bool,
    strict: bool,
    cache: bool,
) -> Examples:
    """Read a folder; see :func:`tfdiffusion.data.read`."""
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "does not exist"
        raise ValueError(f"Folder {str(root)!r} {problem}.")
    names = sorted(_find(root))
    if not names:
        raise ValueError(f"Folder {str(root)!r} has no images ({', '.join(SUFFIXES)}).")
    paths = [root / name for name in names]
    class_names = _class_names(names, root) if labels else None

    headers, bad = _try_all(lambda i: _header(paths[i], image_size is None), range(len(paths)))
    if channels is None:
        channels = 1 if all(grey for _, grey in headers.values()) else 3
    shape = (image_size or 0, image_size or 0, channels)
    if image_size is None and headers:
        size = _common_size({names[i]: size for i, (size, _) in headers.items()}, root)
        shape = (*size, channels)
        for i in [i for i, (other, _) in headers.items() if other != size]:
            bad[i] = f"is {headers.pop(i)[0][::-1]} pixels, the others are {size[::-1]}"

    files = ImageFiles(paths, channels, image_size)
    in_memory = cache and fits_in_memory(len(headers), shape)
    pixels = np.empty((len(paths) if in_memory else 0, *shape), np.uint8)

    def check(position: int) -> None:
        image = files.decode(position)
        if in_memory:
            pixels[position] = image

    good, worse = _try_all(check, headers)
    skipped = tuple((str(names[i]), reason) for i, reason in sorted({**bad, **worse}.items()))
    if skipped:
        _report(skipped, len(paths), root, strict)
    good = np.array(sorted(good))
    if in_memory and len(good) < len(paths):
        pixels = pixels[good]
    label_of = {name: label for label, name in enumerate(class_names or ())}
    return Examples(
        str(root),
        len(good),
        shape,
        class_names,
        skipped,
        pixels if in_memory else ImageFiles([paths[i] for i in good], channels, image_size),
        np.array([label_of[names[i].parts[0]] for i in good], np.int32) if label_of else None,
    )


def _find(root: Path) -> Iterator[Path]:
    """Yield the image files below a folder, relative to it; hidden ones are left out."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(name for name in folders if name[0] != ".")
        if real not in seen:
            relative = Path(folder).relative_to(root)
            for name in files:
                if name.lower().endswith(SUFFIXES) and name[0] != ".":
                    yield relative / name
        seen.add(real)


def _class_names(names: list[Path], root: Path) -> tuple[str, ...] | None:
    """Name the classes of a folder: its sub-folders with images, in alphabetical order."""
    loose = [str(name) for name in names if len(name.parts) == 1]
    if loose and len(loose) < len(names):
        raise ValueError(
            f"Folder {str(root)!r} has images in sub-folders, which are classes, and {len(loose)} "
            f"beside them, such as {loose[0]!r}. Move those, or pass labels=False to use all."
        )
    return None if loose else tuple(sorted({name.parts[0] for name in names}))


def _open(path: Path) -> Any:
    from PIL import Image

    return Image.open(path, formats=FORMATS)


def _header(path: Path, with_size: bool) -> tuple[tuple[int, int] | None, bool]:
    """Return (height, width) as shown, if asked for, and whether the image is grey."""
    from PIL import Image

    with _open(path) as image:
        grey = Image.getmodebase(image.mode) == "L"
        if not with_size:
            return None, grey
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientation
        return ((width, height) if turned else (height, width)), grey


def _try_all(
    function: Callable[[int], Any], positions: Any
) -> tuple[dict[int, Any], dict[int, str]]:
    """Call a function of each position in threads: results, and reasons of those that failed."""
    positions = list(positions)

    def attempt(chunk: list[int]) -> list[tuple[int, Any, str | None]]:
        outcomes = []
        for position in chunk:
            try:
                outcomes.append((position, function(position), None))
            except Exception as error:  # decoders raise nearly anything on broken files
                outcomes.append((position, None, _reason(error)))
        return outcomes

    results, reasons = {}, {}
    with ThreadPoolExecutor() as pool:
        for outcomes in pool.map(
            attempt, [positions[i : i + 64] for i in range(0, len(positions), 64)]
        ):
            for position, result, reason in outcomes:
                if reason is None:
                    results[position] = result
                else:
                    reasons[position] = reason
    return results, reasons


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "is not a PNG, JPEG, WebP, BMP or GIF image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _common_size(sizes: dict[Path, tuple[int, int]], root: Path) -> tuple[int, int]:
    """Return the (height, width) of nearly all images."""
    counts = Counter(sizes.values())
    size, count = counts.most_common(1)[0]
    if count < COMMON_SHARE * len(sizes):
        examples = {other: name for name, other in reversed(sizes.items())}
        listed = ", ".join(f"{examples[s]} is {s[1]}×{s[0]}" for s, _ in counts.most_common(3))
        raise ValueError(
            f"The images in {str(root)!r} have {len(counts)} sizes ({listed}). Pass image_size to "
            "crop and resize them."
        )
    return size


def _report(skipped: tuple[tuple[str, str], ...], total: int, root: Path, strict: bool) -> None:
    """Name the unusable files in a warning, or in an error on request or if none is left."""
    listed = "".join(f"\n  {name}: {reason}" for name, reason in skipped[:REPORTED])
    if len(skipped) > REPORTED:
        listed += f"\n  and {len(skipped) - REPORTED} more"
    message = f"{len(skipped)} of {total} images in {str(root)!r} cannot be used"
    if strict:
        raise ValueError(f"{message} (strict=False skips them):{listed}")
    if len(skipped) == total:
        raise ValueError(f"{message}:{listed}")
    warnings.warn(f"{message} and are skipped:{listed}", stacklevel=4)
