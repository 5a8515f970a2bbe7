"""Pixels of every kind that image files hold, as 8-bit RGB, and which way up they are.

Pillow converts 8-bit images as one expects and cuts off all others at 255, so that a 16-bit grey image would come out
white, and floating point numbers from 0 to 1 black. Those are scaled where it is known what is white, else refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

UPRIGHT = 1
_ORIENTATION = 0x0112  # EXIF and TIFF
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = (5, 6, 7, 8)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB; of several frames or pages the first.

    Transparency is dropped and the colors below it are kept, as in LLaVA. Colors of 16 bits keep their upper 8, as
    Pillow reads them; grey values of 12 and 16 bits are scaled and rounded.

    Raises:
        ValueError: whole numbers of more than 16 bits, or floating point numbers that are not from 0 to 1: nothing says
            which of them is white.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled(image).convert("RGB")
    # Pillow warns if it has to drop the alpha values of a palette; by way of RGBA the colors are the same
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def exif_orientation(image: Image.Image) -> int:
    """EXIF's number for how the stored pixels lie, 1 to 8; 1 is upright.

    TIFF is turned by Pillow as it is read. What stands behind the pixels of a PNG does not count, so that the header
    alone tells the size.
    """
    if image.format == "TIFF":
        return UPRIGHT
    try:
        # PngImageFile's own method would decode the image
        found: Any = Image.Image.getexif(image).get(_ORIENTATION)
    except Exception:  # broken EXIF data raise anything, and say nothing
        return UPRIGHT
    return found if found in _TURNS else UPRIGHT


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """An image whose pixels lie as ``orientation`` says, upright."""
    return image if orientation == UPRIGHT else image.transpose(_TURNS[orientation])


def turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """``(width, height)`` of :func:`turned`.

    >>> turned_size((640, 480), 6)
    (480, 640)
    """
    return (size[1], size[0]) if orientation in _QUARTER_TURNS else size


def _scaled(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    white = _white(image, values)
    grey = np.round(values.astype(np.float64) * (255 / white)).astype(np.uint8)
    if image.format == "TIFF" and _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    return Image.fromarray(grey)


def _white(image: Image.Image, values: np.ndarray[Any, Any]) -> float:
    """The value that stands for white."""
    low, high = values.min(), values.max()
    if image.mode == "F":
        if low >= 0 and high <= 1:  # false for NaN
            return 1
        raise ValueError(
            f"floating point numbers from {low:g} to {high:g}: expected 0 (black) to 1 (white); save it with 8 or "
            "16 bits"
        )
    if image.mode != "I":
        bits = _tag(image, _BITS_PER_SAMPLE) if image.format == "TIFF" else 16
        return 2**bits - 1
    # Pillow scales PGM of any range to 16 bits; 0 to 255 is its own range of grey images of this kind
    if image.format in ("PNG", "PPM"):
        return 65535
    if low >= 0 and high <= 255:
        return 255
    raise ValueError(
        f"whole numbers from {low} to {high}, of 32 bits or signed, and nothing says which of them is white; save it "
        "with 8 or 16 bits"
    )


def _tag(image: Any, number: int) -> int:
    value = image.tag_v2.get(number, 16 if number == _BITS_PER_SAMPLE else 1)
    return int(value[0] if isinstance(value, tuple) else value)
