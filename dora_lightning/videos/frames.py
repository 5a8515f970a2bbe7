"""Frames of videos as image sources, those of one video decoded together."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from dora_lightning.videos.reading import read_frames


class VideoFrame:
    """One of a video's frames that are read together: an image source, see :mod:`dora_lightning.images`.

    The first of them that is opened decodes all of them. They are kept until each was opened, or until several other
    videos were opened since. May be opened by several threads; goes to other processes undecoded.
    """

    def __init__(self, video: _FramesOfVideo, number: int) -> None:
        self._video = video
        self._number = number

    def open(self) -> Image.Image:
        """A new image, RGB.

        Raises:
            ValueError: As in :func:`read_frames`.
        """
        return self._video.image(self._number)

    @property
    def size(self) -> tuple[int, int]:
        """``(width, height)`` in pixels as it is shown, for which the video's first frame alone is decoded.

        Raises:
            ValueError: As in :func:`read_frames`.
        """
        return self._video.size

    @property
    def path(self) -> Path:
        """The video's file, all frames of which have one size."""
        return self._video.path

    def __str__(self) -> str:
        """Its name, for messages."""
        return f"{self._video.path} at {self._video.times[self._number]:.3f} s"

    def __eq__(self, other: object) -> bool:
        """Whether it is the same frame, and decoded with the same others."""
        return isinstance(other, VideoFrame) and self._identity() == other._identity()

    def __hash__(self) -> int:
        """Equal for equal frames."""
        return hash(self._identity())

    def _identity(self) -> tuple[Path, tuple[float, ...], int]:
        return self._video.path, self._video.times, self._number


def video_frames(path: str | Path, times: Sequence[float]) -> list[VideoFrame]:
    """Image sources for the frames at some times, decoded together when the first of them is opened."""
    video = _FramesOfVideo(Path(path), tuple(times))
    return [VideoFrame(video, number) for number in range(len(times))]


class _FramesOfVideo:
    """The frames that :func:`video_frames` promises, and those of them that are decoded."""

    KEPT = 4
    """Videos whose frames are kept; one process reads few at a time, and each may take many megabytes."""

    _kept: ClassVar[OrderedDict[_FramesOfVideo, list[Image.Image]]] = OrderedDict()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: Path, times: tuple[float, ...]) -> None:
        self.path = path
        self.times = times
        self._unopened = set(range(len(times)))
        self._decoding = threading.Lock()

    @cached_property
    def size(self) -> tuple[int, int]:
        return read_frames(self.path, [0.0])[0].size

    def image(self, number: int) -> Image.Image:
        with self._decoding:
            with self._lock:
                images = self._kept.pop(self, None)
            if images is None:
                self._unopened = set(range(len(self.times)))
                images = read_frames(self.path, self.times)
            self._unopened.discard(number)
            with self._lock:
                if self._unopened:
                    self._kept[self] = images
                while len(self._kept) > self.KEPT:
                    self._kept.popitem(last=False)
            return images[number].copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return _FramesOfVideo, (self.path, self.times)
