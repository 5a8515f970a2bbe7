"""Videos of several codecs and containers, made with PyAV, whose plain decoding is what reading is held to."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dora_lightning.videos import check_video, read_frames, video_frames, video_info

av = pytest.importorskip("av")


def picture(number: int, size: int = 64) -> np.ndarray:
    """A picture that differs from the others by more than its encoding does: shades, and a bar that moves."""
    pixels = np.empty((size, size, 3), np.uint8)
    pixels[...] = (number * 37 % 256, number * 91 % 256, 128)
    pixels[:, number * 3 % size][:] = 255
    return pixels


def encode(
    path: Path,
    frames: int = 30,
    codec: str = "libx264",
    rate: int = 25,
    pts: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    sound: float = 0.0,
) -> Path:
    """A video of ``frames`` pictures, the n-th one at ``pts[n] / rate`` s, with ``sound`` s of sound."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.options = options or {}
        stream.codec_context.thread_count = 1
        if sound:
            add_sound(container, sound)
        container.start_encoding()
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number))
            frame.pts = number if pts is None else pts[number]
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None) if frames else [])
    return path


def add_sound(container: Any, seconds: float) -> None:
    stream = container.add_stream("mp2" if container.format.name == "matroska" else "aac", rate=16000)
    stream.layout = "mono"
    samples = int(seconds * 16000)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, samples), np.int16), format="s16", layout="mono")
    frame.sample_rate = 16000
    frame.pts = 0
    resampler = av.AudioResampler(stream.format, "mono", 16000, frame_size=1152 if stream.name == "mp2" else 1024)
    packets = [packet for part in resampler.resample(frame) for packet in stream.encode(part)]
    container.mux(packets + stream.encode(None))


def decoded_through(path: Path) -> tuple[list[float], list[np.ndarray]]:
    """Times and pictures of all frames."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        origin = Fraction(container.start_time, 1_000_000)
        frames = list(container.decode(stream))
        times = [float(frame.pts * stream.time_base - origin) for frame in frames]
        return times, [np.asarray(frame.to_image(threads=1)) for frame in frames]


X264 = {"preset": "fast", "g": "12", "keyint_min": "12", "bf": "3", "sc_threshold": "0"}
LONG = 25 * 24

KINDS: dict[str, Callable[[Path], Path]] = {
    "h264.mp4": lambda path: encode(path, LONG, options=X264),
    "open-gop.mp4": lambda path: encode(
        path, LONG, options={**X264, "x264-params": "open-gop=1:b-adapt=0:bframes=3:keyint=12:min-keyint=1"}
    ),
    "intra-refresh.mp4": lambda path: encode(path, LONG, options={**X264, "x264-params": "intra-refresh=1:keyint=12"}),
    "one-entry.mp4": lambda path: encode(path, LONG, options={**X264, "g": "100000"}),
    "starts-late.mp4": lambda path: encode(path, LONG, pts=range(70, 70 + LONG), options=X264),
    "starts-late.mkv": lambda path: encode(path, LONG, pts=range(70, 70 + LONG), options=X264),
    "uneven.mp4": lambda path: encode(path, 300, pts=uneven(), options=X264),
    "uneven.mkv": lambda path: encode(path, 300, pts=uneven(), options=X264),
    "h265.mp4": lambda path: encode(
        path, 500, "libx265", options={"preset": "ultrafast", "x265-params": "keyint=12:log-level=none"}
    ),
    "vp9.webm": lambda path: encode(path, 500, "libvpx-vp9", options={"deadline": "realtime", "g": "12"}),
    "mpeg4.avi": lambda path: encode(path, 400, "mpeg4", options={"g": "12"}),
    "b-frames.avi": lambda path: encode(path, 400, "mpeg4", options={"g": "12", "bf": "2"}),
    "h264.ts": lambda path: encode(path, 400, options=X264),
    "mpeg2.mpg": lambda path: encode(path, 400, "mpeg2video", options={"g": "12"}),
    "sound.mp4": lambda path: encode(path, 400, options=X264, sound=30.0),
}


def make(folder: Path, kind: str) -> Path:
    """The video of a kind, encoded once for each folder."""
    path = folder / kind
    return path if path.exists() else KINDS[kind](path)


def uneven() -> list[int]:
    """Frames that stay for 1 to 12 times as long as others."""
    gaps = np.random.default_rng(0).choice([1, 2, 5, 12], 300)
    return [0, *np.cumsum(gaps[:-1]).tolist()]


def every_way(path: Path) -> list[Callable[[], Any]]:
    return [
        lambda: video_info(path),
        lambda: check_video(path, decode=False),
        lambda: check_video(path, decode=True),
        lambda: read_frames(path, [0.0]),
        lambda: video_frames(path, [0.0])[0].open(),
    ]
