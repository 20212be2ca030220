"""Images as arrays: value ranges, channels, crops and sizes. NumPy and Pillow only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tfdiffusion import _checks

if TYPE_CHECKING:
    from PIL import Image


def to_float(images: np.ndarray) -> np.ndarray:
    """Map uint8 images, 0..255, to float32 in [-1, 1].

    Raises:
        ValueError: If they are of another dtype.
    """
    images = _checks.array("images", images, "uint8, from 0 to 255", kinds="u")
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8, from 0 to 255. Received dtype {images.dtype}.")
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Map images in [-1, 1] to the nearest of the uint8 levels; values outside are clipped.

    Raises:
        ValueError: If they are no floats, or a value is NaN or infinite.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind == "f":
        check_finite(images, "images")
    images = _checks.array("images", images, "floats in [-1, 1]", kinds="f")
    return np.rint((np.clip(images, -1, 1) + 1) * np.float32(127.5)).astype(np.uint8)


def check_finite(array: np.ndarray, what: str) -> None:
    """Raise a ValueError that says which rows of an array (N, ...) have NaN or infinite values."""
    finite = np.isfinite(array)
    if not finite.all():
        bad = np.flatnonzero(~finite.reshape(len(array), -1).all(axis=1)) if array.ndim else [0]
        raise ValueError(
            f"Found NaN or infinite values in {len(bad)} of {array.shape[0] if array.ndim else 1} "
            f"{what}, the first at index {bad[0]}."
        )


def convert_channels(images: np.ndarray, channels: int | None) -> np.ndarray:
    """Convert (..., C) between grey and colour; grey is the luma of ITU-R BT.601."""
    have = images.shape[-1]
    if channels in (None, have):
        return images
    if have == 1:
        return np.repeat(images, channels, axis=-1)
    if have != 3:
        raise ValueError(
            f"Cannot make {channels} channels of images with {have}; pass channels=None."
        )
    grey = images @ np.array([0.299, 0.587, 0.114], np.float32)
    grey = np.rint(grey) if images.dtype == np.uint8 else grey
    return grey[..., None].astype(images.dtype)


def square(image: np.ndarray, size: int | None) -> np.ndarray:
    """Centre crop (H, W, C), uint8 or float32, to a square and resize it to (size, size, C)."""
    if size is None or image.shape[:2] == (size, size):
        return image
    from PIL import Image

    height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side]
    if side == size:
        return image

    def resize(plane: np.ndarray) -> np.ndarray:
        # Pillow's filters widen with the scale, so that shrinking does not alias.
        plane = Image.fromarray(np.ascontiguousarray(plane))
        return np.asarray(plane.resize((size, size), Image.Resampling.LANCZOS))

    if image.shape[-1] == 3 and image.dtype == np.uint8:
        return resize(image)
    planes = [resize(image[..., channel]) for channel in range(image.shape[-1])]
    return np.stack(planes, axis=-1)


def decode(image: Image.Image, channels: int) -> np.ndarray:
    """Return the pixels of a Pillow image of any mode: upright, opaque, uint8 (H, W, channels).

    Transparent pixels show white, 16-bit values are rounded to 8 bits.

    Raises:
        ValueError: If the values have no 8-bit reading (32-bit integers, floats).
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels")
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return image[..., None] if channels == 1 else image
