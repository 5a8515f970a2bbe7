"""Images as samples refer to them: opened, measured and checked, with errors that name the image.

A source is a path, the ``bytes`` of an encoded file, a PIL image, or any object with ``open() -> PIL.Image.Image`` (a
new image each time) and a ``__str__`` that names it, such as a row of a hub data set that is decoded when it is needed.
Where it also has a ``size``, ``(width, height)`` as it is shown, it is not opened to be measured.

Photos are turned upright as their EXIF data say, as videos are; ``exif_rotation=False`` leaves them as they are stored,
which is how LLaVA was trained and published.
"""

from __future__ import annotations

import io
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from dora_lightning.files.special import special_file
from dora_lightning.image_pixels import UPRIGHT, exif_orientation, to_rgb, turned, turned_size

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow is asked to read; its decoders of rare formats are not let loose on files from anywhere."""

_BEGINNINGS = {
    b"%!PS": "PostScript",
    b"%PDF": "a PDF",
    b"8BPS": "a Photoshop file",
    b"<": "text with markup, such as SVG or a web page",
    b"ftyp": "AVIF, HEIC or a video",
    b"\x00\x00\x00\x0cjP": "JPEG 2000",
    b"version https://git-lfs": "a Git LFS pointer, in place of the image that is to be downloaded",
}
"""How files begin (or go on after four bytes) that are often met with an image's ending."""

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


def image_key(source: Any) -> Hashable:
    """What two sources have in common if they are the same image: a path, or the source itself where equals know it."""
    if isinstance(source, str | Path):
        return str(source)
    return source if isinstance(source, Hashable) else id(source)


def open_image(source: Any, exif_rotation: bool = True) -> Image.Image:
    """The image as RGB, decoded; nothing stays open. :func:`~dora_lightning.image_pixels.to_rgb` says what becomes of
    other kinds of pixels.

    Args:
        source: The image.
        exif_rotation: Turn it as its EXIF data say.

    Raises:
        ValueError: The image is missing, broken, no file, of a format or kind of pixels that is not read, too small,
            too large or too elongated; the message names it.
    """
    with _opened(source) as image:
        _check_size(*image.size)
        stored = exif_orientation(image) if exif_rotation else UPRIGHT
        return turned(to_rgb(image), stored)


def open_encoded(file: str | Path | bytes) -> Image.Image:
    """An image file, or its content, as Pillow opens it: the pixels are not decoded yet.

    Raises:
        ValueError: It is no file, such as a folder or a named pipe, or of no format that is read.
        OSError: It is missing or broken.
    """
    if not isinstance(file, bytes) and (kind := special_file(file)) is not None:
        raise _UnusableError(f"expected an image file, found {kind}")
    try:
        return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise _UnusableError(f"not an image that is read ({', '.join(FORMATS)}){_found(file)}") from error


def image_size(source: Any, exif_rotation: bool = True) -> tuple[int, int]:
    """``(width, height)`` in pixels as :func:`open_image` gives it, from the header of the file alone.

    Raises:
        ValueError: The image is missing or is no image; the message names it.
    """
    with _measured(source, exif_rotation) as size:
        return size


def check_image(source: Any, decode: bool, exif_rotation: bool = True) -> tuple[int, int]:
    """See whether an image can be trained on.

    Args:
        source: The image.
        decode: Decode it whole, which finds broken and truncated files; else read the header alone.
        exif_rotation: As in :func:`open_image`.

    Returns:
        ``(width, height)`` in pixels.

    Raises:
        ValueError: As in :func:`open_image`; without ``decode``, data that is broken after the header goes unseen.
    """
    if decode:
        return open_image(source, exif_rotation).size
    with _measured(source, exif_rotation) as size:
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
def _measured(source: Any, exif_rotation: bool) -> Iterator[tuple[int, int]]:
    """``(width, height)``, as far as possible without decoding; errors as in :func:`_opened`."""
    with _naming(source):
        if hasattr(source, "open") and hasattr(source, "size"):
            yield source.size
            return
    with _opened(source) as image:
        yield turned_size(image.size, exif_orientation(image) if exif_rotation else UPRIGHT)


@contextmanager
def _naming(source: Any) -> Iterator[None]:
    try:
        yield
    # Pillow's plugins raise what they stumble over: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise ValueError(f"{describe(source)}: {_reason(source, error)}") from error


def _open(source: Any) -> Image.Image:
    if isinstance(source, bytes | str | Path):
        return open_encoded(source)
    if not callable(getattr(source, "open", None)):
        raise TypeError(f"expected a path, bytes, a PIL image or something with open(), found {type(source).__name__}")
    return source.open()


def _reason(source: Any, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such image"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"too large: at most {MAX_SIDE} pixels a side"
    if isinstance(error, _UnusableError):
        return str(error)
    return f"cannot be decoded: {error}"


def _found(file: str | Path | bytes) -> str:
    """What a file that is no image begins like, to complete a message."""
    if isinstance(file, bytes):
        start = file[:64]
    else:
        with open(file, "rb") as opened:
            start = opened.read(64)
    if not start:
        return "; found an empty file"
    for beginning, kind in _BEGINNINGS.items():
        if start.startswith(beginning) or start[4:].startswith(beginning):
            return f"; found {kind}"
    return f"; found a file that begins with {start[:8]!r}"


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
