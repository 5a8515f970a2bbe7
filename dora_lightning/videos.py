"""Videos: measured, checked, read at given times, and written. Decoded by PyAV (FFmpeg), which is imported when needed.

Times are seconds from the beginning of the file, where its container's clock starts, as players and FFmpeg count them;
the frame of a time is the one that is on the screen at that moment. Whatever is wrong with a file is a ValueError that
names it.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from dora_lightning.files import write_atomically

VIDEO_SUFFIXES = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv")
"""Endings that video files are found by; what a file is, its content says."""

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


def video_info(path: str | Path) -> VideoInfo:
    """Length and size of a video, from the head of the file alone where that has them; no frame is decoded.

    Raises:
        ValueError: There is no such file, it is empty or no video, it has no picture or no length.
        ModuleNotFoundError: PyAV is not installed.
    """
    with _opened(path) as video:
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
        if count < 1:
            raise ValueError(f"count must be at least 1, found {count}")
        return [start + (end - start) * (part + 0.5) / count for part in range(count)]
    assert every is not None
    if not 0 < every < math.inf:
        raise ValueError(f"every must be a number of seconds above 0, found {every}")
    # rounding must not add a time that is the end itself
    steps = max(1, math.ceil((end - start) / every - 1e-9))
    return [start + step * every for step in range(steps)]


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

    def __str__(self) -> str:
        """Its name, for messages."""
        return f"{self._video.path} at {self._video.times[self._number]:.3f} s"


def video_frames(path: str | Path, times: Sequence[float]) -> list[VideoFrame]:
    """Image sources for the frames at some times, decoded together when the first of them is opened."""
    video = _FramesOfVideo(Path(path), tuple(times))
    return [VideoFrame(video, number) for number in range(len(times))]


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
    av = _av()
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


class _InexactError(Exception):
    """What was skipped was needed after all."""


def _read(path: str | Path, times: Sequence[float]) -> dict[float, Image.Image]:
    """The frames at ascending times; infinity decodes all of the file and gives no frame."""
    try:
        with _opened(path) as video:
            return video.read(times, skip=math.inf not in times)
    except _InexactError:
        with _opened(path) as video:
            return video.read(times, skip=False)


@contextmanager
def _opened(path: str | Path) -> Iterator[_Video]:
    """The open file; whatever goes wrong with it is a ValueError with its name."""
    av = _av()
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
            yield _Video(path, container)
        except av.FFmpegError as error:
            raise ValueError(f"{path}: broken data, or none that FFmpeg can decode: {_reason(error)}") from error


class _Video:
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
        self.converter = _av().video.reformatter.VideoReformatter()
        self.origin = Fraction(container.start_time or 0, 1_000_000)
        rate = self.stream.average_rate or self.stream.guessed_rate
        self.frame_length = float(1 / rate) if rate else 0.0
        duration, self.duration_is_pictures = self._duration()
        width, height = self.stream.codec_context.width, self.stream.codec_context.height
        self.info = VideoInfo(duration, self.stream.frames, float(rate or 0), width, height)
        # the others' packets have no times to rely on, or no index
        self.skips = bool({"mp4", "matroska"} & set(container.format.name.split(",")))
        self.wanted = 0.0
        self.trusted = -math.inf

    def read(self, times: Sequence[float], skip: bool) -> dict[float, Image.Image]:
        """The frames at ascending times.

        Raises:
            _InexactError: Not possible with ``skip``, which leaves out what is before an entry point.
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
                    raise _InexactError
                images[waiting.pop(0)] = self._image(shown or frame)
            if not waiting:
                return images
            self.wanted = waiting[0]
            shown = frame
        if shown is None and self.trusted > -math.inf:
            raise _InexactError
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
        raise _InexactError

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
        if tag := self.stream.metadata.get("DURATION"):
            hours, minutes, seconds = map(float, tag.split(":"))
            return hours * 3600 + minutes * 60 + seconds - start, True
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


def _is_entry(packet: Any) -> bool:
    """Whether frames from this one's time on can be decoded without what comes before."""
    return packet.is_keyframe and packet.pts is not None and not packet.is_discard


def _reason(error: Exception) -> str:
    # without the file's name and a number
    return getattr(error, "strerror", None) or str(error)


def _av() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("videos are read with PyAV: pip install 'dora-lightning[video]'") from error
    return av
