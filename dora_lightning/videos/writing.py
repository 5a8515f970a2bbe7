"""Videos written as mp4 of H.264."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from dora_lightning.files import write_atomically
from dora_lightning.videos.decoding import import_av


def write_video(
    path: str | Path,
    frames: Iterable[Image.Image | np.ndarray],
    rate: float,
    preset: str = "medium",
    entry_every: int = 250,
) -> None:
    """Write an mp4 of H.264 at high quality (crf or qp 18, yuv420p); the file is there whole or not at all.

    Args:
        path: Where to, with the ending ``.mp4``.
        frames: RGB images, or arrays ``[height, width, 3]`` of uint8, all of one size with even sides.
        rate: Frames per second.
        preset: Of x264, ``ultrafast`` to ``veryslow``: the faster, the larger the file.
        entry_every: Most frames from one that is encoded without others to the next; with 1, how a frame
            comes out depends on nothing but itself.

    Raises:
        ValueError: No frames, or such that cannot be encoded; or another ending.
        ModuleNotFoundError: PyAV is not installed.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"{path}: videos are written as mp4, expected the ending .mp4")
    if not 0 < rate < math.inf:
        raise ValueError(f"{path}: rate must be above 0 frames per second, found {rate}")
    try:
        write_atomically(path, lambda file: encode_video(file, frames, rate, preset, entry_every))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def encode_video(
    file: IO[bytes],
    frames: Iterable[Image.Image | np.ndarray],
    rate: float,
    preset: str = "medium",
    entry_every: int = 250,
) -> None:
    """As :func:`write_video`, to a file that is open for writing; the same frames give the same bytes.

    Raises:
        ValueError: As in :func:`write_video`.
    """
    av = import_av()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(100_000))
        stream.pix_fmt = "yuv420p"
        # crf makes a frame's quality depend on what came before it
        quality = {"qp": "18"} if entry_every == 1 else {"crf": "18"}
        stream.options = {**quality, "preset": preset, "g": str(entry_every)}
        # what the conversion from RGB makes, which players would not guess of large pictures
        stream.codec_context.colorspace = 6  # BT.601
        stream.codec_context.color_range = 1  # limited
        # one thread gives the same bytes each time, and is the fastest for small pictures
        stream.codec_context.thread_count = 1
        shape: tuple[int, ...] | None = None
        for number, frame in enumerate(frames):
            pixels = np.asarray(frame.convert("RGB") if isinstance(frame, Image.Image) else frame)
            if shape is None:
                shape = pixels.shape
                if pixels.ndim != 3 or shape[2] != 3 or shape[0] % 2 or shape[1] % 2:
                    raise ValueError(f"expected frames [height, width, 3] with even sides, found {shape}")
                stream.height, stream.width = shape[:2]
            if pixels.shape != shape or pixels.dtype != np.uint8:
                raise ValueError(f"frame {number} is {pixels.shape} of {pixels.dtype}, expected {shape} of uint8")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels))))
        if shape is None:
            raise ValueError("no frames to write")
        container.mux(stream.encode(None))
