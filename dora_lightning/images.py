"""Images as samples refer to them: opened, measured and checked, with errors that name the image.

A source is a path, the ``bytes`` of an encoded file, a PIL image, or any object with ``open() -> PIL.Image.Image`` (a
new image each time) and a ``__str__`` that names it, such as a row of a hub data set that is decoded when it is needed.
Where it also has a ``size``, ``(width, height)``, it is not opened to be measured.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

IMAGE = "<image>"
"""Stands in a prompt where an image is read; the n-th one is for the n-th of ``Sample.images``."""

MIN_SIDE = 4
"""Fewest pixels of a side: image processors take a dimension of 1 or 3 for the colour channels, and read such an image
askew. Nothing is to be seen on so few pixels either."""

MAX_SIDE = 9000
"""Most pixels of a side: an image is padded to a square before it is scaled, and a square of this side, 81 million
pixels or 243 MB, is just below what Pillow takes for a decompression bomb (89 million)."""

MAX_ASPECT_RATIO = 200
"""How many times longer than the other a side may be: squared and scaled to 336 pixels, more would leave less than two
pixels of the shorter side; scaled by the shorter side instead, the longer one would have more than 67,000."""


def describe(source: Any) -> str:
    """Name of an image source, for messages."""
    if isinstance(source, bytes):
        return f"an encoded image of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"an image of {source.width} x {source.height} pixels in memory"
    return str(source)


def open_image(source: Any) -> Image.Image:
    """The image as RGB, decoded; nothing stays open. Transparency and EXIF orientation are ignored, as in LLaVA.

    Raises:
        ValueError: The image is missing, broken, too small, too large or too elongated; the message names it.
    """
    with _opened(source) as image:
        _check_size(*image.size)
        # Pillow warns if it has to drop the alpha values of a palette; by way of RGBA the colours are the same
        return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def image_size(source: Any) -> tuple[int, int]:
    """``(width, height)`` in pixels, from the header of the file alone.

    Raises:
        ValueError: The image is missing or is no image; the message names it.
    """
    with _measured(source) as size:
        return size


def check_image(source: Any, decode: bool) -> tuple[int, int]:
    """See whether an image can be trained on.

    Args:
        source: The image.
        decode: Decode it whole, which finds broken and truncated files; else read the header alone.

    Returns:
        ``(width, height)`` in pixels.

    Raises:
        ValueError: As in :func:`open_image`; without ``decode``, data that is broken after the header goes unseen.
    """
    if decode:
        return open_image(source).size
    with _measured(source) as size:
        _check_size(*size)
        return size


def pad_to_square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The RGB image in the middle of a square of its longer side, as LLaVA-1.5 does it.

    >>> pad_to_square(Image.new("RGB", (5, 2)), (122, 116, 104)).size
    (5, 5)
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


@contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """The image, closed afterwards if it was opened here; whatever goes wrong is a ValueError with its name."""
    with _naming(source):
        if isinstance(source, Image.Image):
            yield source
            return
        with _open(source) as image:
            yield image


@contextmanager
def _measured(source: Any) -> Iterator[tuple[int, int]]:
    """``(width, height)``, as far as possible without decoding; errors as in :func:`_opened`."""
    with _naming(source):
        if hasattr(source, "open") and hasattr(source, "size"):
            yield source.size
            return
    with _opened(source) as image:
        yield image.size


@contextmanager
def _naming(source: Any) -> Iterator[None]:
    try:
        yield
    # Pillow's plugins raise what they stumble over: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise ValueError(f"{describe(source)}: {_reason(source, error)}") from error


def _open(source: Any) -> Image.Image:
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source))
    if isinstance(source, str | Path):
        return Image.open(source)
    if not callable(getattr(source, "open", None)):
        raise TypeError(f"expected a path, bytes, a PIL image or something with open(), found {type(source).__name__}")
    return source.open()


def _reason(source: Any, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such image"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of a kind that Pillow cannot read"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"too large: at most {MAX_SIDE} pixels a side"
    if isinstance(error, _UnusableError):
        return str(error)
    return f"cannot be decoded: {error}"


class _UnusableError(ValueError):
    """An image that is whole but cannot be used."""


def _check_size(width: int, height: int) -> None:
    found = f"{width} x {height} pixels"
    if min(width, height) < MIN_SIDE:
        raise _UnusableError(f"too small: expected at least {MIN_SIDE} pixels a side, found {found}")
    if max(width, height) > MAX_SIDE:
        raise _UnusableError(f"too large: expected at most {MAX_SIDE} pixels a side, found {found}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise _UnusableError(
            f"too elongated: expected at most {MAX_ASPECT_RATIO} times as long as the other side, found {found}"
        )
