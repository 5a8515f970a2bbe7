"""Video files measured, checked and read at given times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dora_lightning.videos.decoding import SEEK_GAP, InexactError, VideoInfo, open_video

VIDEO_SUFFIXES = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv")
"""Endings that video files are found by; what a file is, its content says."""


MAX_TIMES = 100_000
"""Most times of one video: more than 40 hours at a frame each 1.5 s. A head may promise any length."""

_FEW = 32  # of any size that is read

MAX_BYTES = 8 * 2**30
"""Most bytes of the frames that are read at once, which are all held in memory."""


def video_info(path: str | Path) -> VideoInfo:
    """Length and size of a video, from the head of the file alone where that has them; no frame is decoded.

    Raises:
        ValueError: There is no such file, it is empty or no video, it has no picture or no length.
        ModuleNotFoundError: PyAV is not installed.
    """
    with open_video(path) as video:
        return video.info


def check_video(path: str | Path, decode: bool) -> VideoInfo:
    """See whether a video can be read.

    Args:
        path: The file.
        decode: Decode it whole, which finds broken and truncated data; else read the head alone.

    Raises:
        ValueError: As in :func:`video_info` and, with ``decode``, data are broken or end before the head says.
    """
    if decode:
        _read(path, [math.inf])
    return video_info(path)


def read_frames(path: str | Path, times: Sequence[float]) -> list[Image.Image]:
    """The frames at some times, RGB and upright.

    Args:
        path: The file.
        times: Seconds, in any order. A frame is shown from its own time until the next one's, the first one also
            before it, the last one for one frame's length longer than it is.

    Returns:
        An image of its own for each time. Only what is needed of the file is decoded, and the frames are those that
        decoding all of it gives.

    Raises:
        ValueError: As in :func:`video_info`; a time is negative, not finite or past the end; or the data up to the last
            of the times are broken or cut off.
    """
    for time in times:
        if not 0 <= time < math.inf:
            raise ValueError(f"{path}: expected times of at least 0 s, found {time} s")
    if len(times) > _FEW:
        info = video_info(path)
        if (needed := 3 * info.width * info.height * len(times)) > MAX_BYTES:
            raise ValueError(
                f"{path}: {len(times)} frames of {info.width} x {info.height} pixels take {needed / 2**30:.0f} GiB, at "
                f"most {MAX_BYTES // 2**30} GiB are read at once: choose fewer frames"
            )
    images: dict[float, Image.Image] = {}
    wanted: list[float] = []
    for time in sorted(set(times)):
        if wanted and time - wanted[-1] > SEEK_GAP:
            images |= _read(path, wanted)
            wanted = []
        wanted.append(time)
    images |= _read(path, wanted) if wanted else {}
    return [images[time].copy() for time in times]


def sample_times(span: tuple[float, float], every: float | None = None, count: int | None = None) -> list[float]:
    """Times within a span to look at; exactly one of ``every`` and ``count`` is given.

    Args:
        span: Start and end, in seconds.
        every: Seconds from one time to the next, the first one at the start, all before the end.
        count: How many; the middles of as many equal parts.

    Raises:
        ValueError: The span is empty or before 0, or not exactly one of the two is given, above 0.

    >>> sample_times((3.0, 7.0), every=1.5)
    [3.0, 4.5, 6.0]
    >>> sample_times((0.0, 2.0), count=4)
    [0.25, 0.75, 1.25, 1.75]
    """
    start, end = span
    if not 0 <= start < end < math.inf:
        raise ValueError(f"expected a span of time, start before end, from 0 s on; found {start} s to {end} s")
    if (every is None) == (count is None):
        raise ValueError(f"expected either every or count, found every={every!r} and count={count!r}")
    if count is not None:
        if not 1 <= count <= MAX_TIMES:
            raise ValueError(f"count must be from 1 to {MAX_TIMES} frames of a video, found {count}")
        return [start + (end - start) * (part + 0.5) / count for part in range(count)]
    assert every is not None
    if not 0 < every < math.inf:
        raise ValueError(f"every must be a number of seconds above 0, found {every}")
    # rounding must not add a time that is the end itself
    if (end - start) / every > MAX_TIMES:
        raise ValueError(
            f"every={every} s gives more than {MAX_TIMES} frames of {end - start:g} s of video: choose a larger one"
        )
    steps = max(1, math.ceil((end - start) / every - 1e-9))
    return [start + step * every for step in range(steps)]


def _read(path: str | Path, times: Sequence[float]) -> dict[float, Image.Image]:
    """The frames at ascending times; infinity decodes all of the file and gives no frame."""
    try:
        with open_video(path) as video:
            return video.read(times, skip=math.inf not in times)
    except InexactError:
        with open_video(path) as video:
            return video.read(times, skip=False)
