"""An open video file, and its frames at given times: what is needed of it is decoded, by PyAV (FFmpeg)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from dora_lightning.images import MAX_SIDE

ROUNDING = 0.0006
"""Seconds by which a frame may come after the time it is asked for: times are floats, and Matroska's frames lie on
whole milliseconds."""

SEEK_GAP = 10.0
"""Seconds between two times from which the file's index is asked for the way; over less, what lies between is read and
skipped undecoded, since an index may well lead back to before the first of them."""


class VideoInfo(NamedTuple):
    """What the head of a video file says."""

    duration: float
    """When the last frame ends, in seconds."""

    frames: int
    """How many there are; 0 if the file does not say."""

    rate: float
    """Frames in a second, on average; 0 if the file does not say."""

    width: int
    """In pixels, as encoded: a video that is to be turned by a quarter is read with width and height exchanged."""

    height: int


class InexactError(Exception):
    """What was skipped was needed after all."""


@contextmanager
def open_video(path: str | Path) -> Iterator[OpenVideo]:
    """The open file.

    Raises:
        ValueError: Whatever goes wrong with it, here or while it is open; the message begins with its name.
        ModuleNotFoundError: PyAV is not installed.
    """
    av = import_av()
    if not Path(path).is_file():
        raise ValueError(f"{path}: " + ("not a file" if Path(path).exists() else "no such video"))
    if Path(path).stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty, expected a video")
    try:
        # the protocol is named lest FFmpeg takes what is before a colon in the path for one, and no other is allowed
        # lest a playlist with the ending of a video makes it fetch something
        container = av.open(f"file:{path}", options={"protocol_whitelist": "file"})
    except (av.FFmpegError, UnicodeError) as error:
        raise ValueError(
            f"{path}: not a video that FFmpeg can read, or its head is cut off: {_reason(error)}"
        ) from error
    with container:
        try:
            yield OpenVideo(path, container)
        except av.FFmpegError as error:
            raise ValueError(f"{path}: broken data, or none that FFmpeg can decode: {_reason(error)}") from error


class OpenVideo:
    """An open video file. Reads its frames once."""

    def __init__(self, path: str | Path, container: Any) -> None:
        self.path = path
        self.container = container
        # a song's cover is a stream of video too
        streams = [stream for stream in container.streams.video if "attached_pic" not in str(stream.disposition)]
        if not streams:
            found = ", ".join(sorted({stream.type for stream in container.streams}))
            raise ValueError(f"{path}: " + (f"no picture in the file, only {found}" if found else "of zero length"))
        self.stream = streams[0]
        # data are read by several processes, each of which reads many videos
        self.stream.codec_context.thread_count = 1
        self.converter = import_av().video.reformatter.VideoReformatter()
        self.origin = Fraction(container.start_time or 0, 1_000_000)
        rate = self.stream.average_rate or self.stream.guessed_rate
        self.frame_length = float(1 / rate) if rate else 0.0
        duration, self.duration_is_pictures = self._duration()
        width, height = self.stream.codec_context.width, self.stream.codec_context.height
        if max(width, height) > MAX_SIDE:
            raise ValueError(f"{path}: too large: expected at most {MAX_SIDE} pixels a side, found {width} x {height}")
        self.info = VideoInfo(duration, self.stream.frames, float(rate or 0), width, height)
        # the others' packets have no times to rely on, or no index
        self.skips = bool({"mp4", "matroska"} & set(container.format.name.split(",")))
        self.wanted = 0.0
        self.trusted = -math.inf

    def read(self, times: Sequence[float], skip: bool) -> dict[float, Image.Image]:
        """The frames at ascending times.

        Raises:
            InexactError: Not possible with ``skip``, which leaves out what is before an entry point.
        """
        self.skips &= skip
        images: dict[float, Image.Image] = {}
        waiting = list(times)
        self.wanted = waiting[0]
        shown: Any = None
        for frame in self._frames():
            if frame is None:  # something was skipped
                shown = None
                continue
            while waiting and waiting[0] + ROUNDING < self._seconds(frame.pts):
                if shown is None and self.trusted > -math.inf:
                    raise InexactError
                images[waiting.pop(0)] = self._image(shown or frame)
            if not waiting:
                return images
            self.wanted = waiting[0]
            shown = frame
        if shown is None and self.trusted > -math.inf:
            raise InexactError
        return images | self._at_the_end(waiting, shown)

    def _at_the_end(self, times: Sequence[float], last: Any) -> dict[float, Image.Image]:
        if last is None:
            raise ValueError(f"{self.path}: of zero length, there is no frame in it")
        end = self._seconds(last.pts) + (float(last.duration * last.time_base) or self.frame_length)
        cut_off = self.duration_is_pictures and end + 1.5 * self.frame_length < self.info.duration
        images = {}
        for time in times:
            if cut_off and time >= end:
                raise ValueError(
                    f"{self.path}: cut off or broken: its frames end at {end:.3f} s, its head promises "
                    f"{self.info.duration:.3f} s"
                )
            if time < end + self.frame_length:
                images[time] = self._image(last)
            elif time < math.inf:
                raise ValueError(f"{self.path}: {time:.3f} s is past the end of the video, which is {end:.3f} s long")
        return images

    def _frames(self) -> Iterator[Any]:
        """Decoded frames as they are shown, and None where some were skipped."""
        for packets, next_entry in self._parts():
            for packet in packets:
                if self.skips and next_entry <= self.wanted:
                    # whatever is wanted is shown at the next entry point or after it
                    self.stream.codec_context.flush_buffers()
                    self.trusted = next_entry
                    yield None
                    break
                if packet.is_corrupt:
                    raise ValueError(f"{self.path}: broken or cut off at {self._seconds(packet.pts):.3f} s")
                for frame in packet.decode():
                    if frame.pts is None:
                        raise ValueError(f"{self.path}: its frames have no times")
                    # what is shown before an entry point may be decoded from frames that were skipped
                    if self._seconds(frame.pts) >= self.trusted:
                        yield frame

    def _parts(self) -> Iterator[tuple[list[Any], float]]:
        """Packets from one entry point up to the next one, with that one's time."""
        part: list[Any] = []
        for packet in self._packets():
            if part and not self.skips:
                yield part, math.inf
                part = []
            elif part and _is_entry(packet):
                yield part, self._seconds(packet.pts)
                part = []
            part.append(packet)
        yield part, math.inf

    def _packets(self) -> Iterator[Any]:
        """Packets from the beginning, or from the last entry point before a time that is far from it."""
        if not self.skips or self.wanted <= SEEK_GAP:
            yield from self.container.demux(self.stream)
            return
        # an index by the order of decoding may lead to an entry point that is shown a little later
        for time in (self.wanted, self.wanted - SEEK_GAP):
            offset = math.floor((Fraction(time) + self.origin) / self.stream.time_base)
            self.container.seek(offset, stream=self.stream)
            packets = self.container.demux(self.stream)
            first = next(packets)
            if _is_entry(first) and self._seconds(first.pts) <= self.wanted:
                self.trusted = self._seconds(first.pts)
                yield first
                yield from packets
                return
        raise InexactError

    def _image(self, frame: Any) -> Image.Image:
        # one thread is several times as fast with small pictures, and processes read side by side
        image = self.converter.reformat(frame, format="rgb24", threads=1).to_image()
        return image.rotate(frame.rotation, expand=True) if frame.rotation else image

    def _seconds(self, timestamp: int) -> float:
        return float(timestamp * self.stream.time_base - self.origin)

    def _duration(self) -> tuple[float, bool]:
        """When the last frame ends, and whether that was said of the pictures, not of the sound as well."""
        if self.container.format.name == "avi" and self.stream.frames and self.frame_length:
            # FFmpeg's duration is what is there of a file that is cut off
            return self.stream.frames * self.frame_length, True
        if self.stream.duration:
            return self._seconds((self.stream.start_time or 0) + self.stream.duration), True
        # Matroska counts from 0, not from its first frame
        start = float(self.origin) if "matroska" in self.container.format.name else 0.0
        if (seconds := _clock_seconds(self.stream.metadata.get("DURATION", ""))) is not None:
            return seconds - start, True
        if self.container.duration:
            return self.container.duration / 1_000_000 - start, len(self.container.streams) == 1
        # written as it was recorded, as browsers do it
        ends = [
            self._seconds(packet.pts + (packet.duration or 0))
            for packet in self.container.demux(self.stream)
            if packet.pts is not None
        ]
        if not ends:
            raise ValueError(f"{self.path}: of zero length, or its frames have no times")
        self.container.seek(0)
        return max(ends), True


def _clock_seconds(tag: str) -> float | None:
    """Seconds of ``01:02:03.5``; None of anything else."""
    try:
        hours, minutes, seconds = map(float, tag.split(":"))
    except ValueError:
        return None
    total = hours * 3600 + minutes * 60 + seconds
    return total if 0 < total < math.inf else None


def _is_entry(packet: Any) -> bool:
    """Whether frames from this one's time on can be decoded without what comes before."""
    return packet.is_keyframe and packet.pts is not None and not packet.is_discard


def _reason(error: Exception) -> str:
    # without the file's name and a number
    return getattr(error, "strerror", None) or str(error)


def import_av() -> Any:
    """The library PyAV.

    Raises:
        ModuleNotFoundError: It is not installed; the message says how it is.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("videos are read with PyAV: pip install 'dora-lightning[video]'") from error
    return av
