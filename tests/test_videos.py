"""Videos of several codecs and containers are made here with PyAV, whose plain decoding is what reading is held to."""

import gc
import pickle
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dora_lightning import videos
from dora_lightning.images import check_image, open_image
from dora_lightning.videos import (
    VideoInfo,
    check_video,
    read_frames,
    sample_times,
    video_frames,
    video_info,
    write_video,
)

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


def uneven() -> list[int]:
    """Frames that stay for 1 to 12 times as long as others."""
    gaps = np.random.default_rng(0).choice([1, 2, 5, 12], 300)
    return [0, *np.cumsum(gaps[:-1]).tolist()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("videos")

    def make(kind: str) -> Path:
        path = folder / kind
        return path if path.exists() else KINDS[kind](path)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_decoding_through(made: Callable[[str], Path], kind: str) -> None:
    path = made(kind)
    starts, pictures = decoded_through(path)
    end = starts[-1] + 0.03
    generator = np.random.default_rng(1)
    requests = [
        [0.0],
        [end],
        [starts[len(starts) // 2]],  # a frame's own time
        [0.01, end],
        [end / 2, 0.0, end / 2, end, end / 2 + 0.5],  # in no order, one of them twice
        np.arange(0, end, 1.5).tolist(),
        generator.uniform(0, end, 20).tolist(),
        *([time] for time in generator.uniform(end / 2, end, 20)),
        [start for start in starts if 11 < start < 13],
    ]
    for times in requests:
        found = read_frames(path, times)
        assert len(found) == len(times)
        for time, image in zip(times, found, strict=True):
            shown = max(np.searchsorted(starts, time + videos.ROUNDING, side="right") - 1, 0)
            assert np.array_equal(np.asarray(image), pictures[shown]), (time, shown)


def test_what_is_far_apart_is_not_decoded(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0

    class Counted(videos._Video):
        def _frames(self) -> Any:
            nonlocal decoded
            for frame in super()._frames():
                decoded += frame is not None
                yield frame

    monkeypatch.setattr(videos, "_Video", Counted)
    for kind in ("h264.mp4", "starts-late.mkv"):
        decoded = 0
        read_frames(made(kind), [1.0, 5.0, 20.0])
        assert 3 <= decoded <= 3 * 13  # of 600; an entry point each 12 frames
    decoded = 0
    read_frames(made("mpeg4.avi"), [1.0, 5.0])
    assert decoded == 127


def test_the_head(made: Callable[[str], Path]) -> None:
    for kind, frames in [("h264.mp4", 600), ("vp9.webm", 0), ("mpeg4.avi", 400), ("h264.ts", 0), ("sound.mp4", 400)]:
        for info in (video_info(made(kind)), check_video(made(kind), decode=False), check_video(made(kind), True)):
            assert info.duration == pytest.approx(len(decoded_through(made(kind))[0]) / 25, abs=0.001)
            assert info[1:] == (frames, 25.0, 64, 64)
    # 30 frames' sound is no part of it, and a first frame after 2.8 s none either
    assert check_video(made("starts-late.mp4"), True).duration == pytest.approx(24)
    assert check_video(made("starts-late.mkv"), True).duration == pytest.approx(24)


def test_a_file_without_length_is_measured_by_its_packets(tmp_path: Path) -> None:
    # browsers record so: as a stream, whose end is not known at its beginning
    path = encode(tmp_path / "live.mkv", 50, options=X264, container_options={"live": "1"})
    with av.open(str(path)) as container:
        assert not container.duration
    assert check_video(path, decode=True) == VideoInfo(2.0, 0, 25.0, 64, 64)
    _, pictures = decoded_through(path)
    assert np.array_equal(np.asarray(read_frames(path, [1.9])[0]), pictures[47])


def test_the_first_frame_is_shown_before_its_time_and_the_last_one_a_little_longer(tmp_path: Path) -> None:
    # the sound begins with the file, the pictures 0.4 s later
    path = encode(tmp_path / "a.mp4", 10, pts=range(10, 20), options=X264, sound=1.0)
    starts, pictures = decoded_through(path)
    assert starts[0] == pytest.approx(0.4)
    early, first, last = read_frames(path, [0.0, 0.41, 0.83])
    assert np.array_equal(np.asarray(early), pictures[0])
    assert np.array_equal(np.asarray(first), pictures[0])
    assert np.array_equal(np.asarray(last), pictures[9])
    for decode in (lambda: read_frames(path, [0.5, 0.85]), lambda: read_frames(path, [400.0])):
        with pytest.raises(ValueError, match=r"a.mp4: (0.85|400.00)0 s is past the end of the video, which is 0.800 s"):
            decode()
    assert read_frames(path, []) == []


@pytest.mark.parametrize("time", [-0.01, float("nan"), float("inf"), float("-inf")])
def test_times_that_are_none(made: Callable[[str], Path], time: float) -> None:
    with pytest.raises(ValueError, match=r"h264.mp4: expected times of at least 0 s, found (-|nan|inf)"):
        read_frames(made("h264.mp4"), [1.0, time])


def every_way(path: Path) -> list[Callable[[], Any]]:
    return [
        lambda: video_info(path),
        lambda: check_video(path, decode=False),
        lambda: check_video(path, decode=True),
        lambda: read_frames(path, [0.0]),
        lambda: video_frames(path, [0.0])[0].open(),
    ]


def test_what_is_no_video_is_named(tmp_path: Path, made: Callable[[str], Path]) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "head.mp4").write_bytes(made("h264.mp4").read_bytes()[:-600])  # which comes last in this file
    (tmp_path / "head.mkv").write_bytes(made("starts-late.mkv").read_bytes()[:30])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        add_sound(container, 1.0)
    encode(tmp_path / "none.mp4", frames=0)
    encode(tmp_path / "none.mkv", frames=0)
    for name, message in [
        ("absent.mp4", "no such video"),
        (".", "not a file"),
        ("empty.mp4", "the file is empty"),
        ("text.mp4", "not a video"),
        ("list.mp4", "not a video|no picture|broken data"),
        ("head.mp4", "not a video that FFmpeg can read, or its head is cut off"),
        ("head.mkv", "not a video that FFmpeg can read, or its head is cut off|no picture"),
        ("sound.mp4", "no picture in the file, only audio"),
        ("none.mp4", "of zero length"),
        ("none.mkv", "of zero length|End of file"),
    ]:
        for read in every_way(tmp_path / name):
            with pytest.raises(ValueError, match=message) as caught:
                read()
            assert str(caught.value).startswith(f"{tmp_path / name}: ")
            assert str(caught.value).count(str(tmp_path / name)) == 1


@pytest.mark.parametrize("kind", ["cut.mp4", "cut.webm", "cut.avi"])
@pytest.mark.parametrize("kept", [0.5, 0.8])
def test_data_that_are_cut_off(tmp_path: Path, kind: str, kept: float) -> None:
    codec = {"cut.mp4": "libx264", "cut.webm": "libvpx-vp9", "cut.avi": "mpeg4"}[kind]
    options = {"libx264": X264, "libvpx-vp9": {"deadline": "realtime", "g": "12"}, "mpeg4": {"g": "12"}}[codec]
    faststart = {"movflags": "+faststart"} if kind == "cut.mp4" else {}
    path = encode(tmp_path / kind, 500, codec, options=options, container_options=faststart)
    assert check_video(path, decode=True).duration == pytest.approx(20)
    whole = read_frames(path, [0.0, 5.0])
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert check_video(path, decode=False).duration == pytest.approx(20)
    for read in (lambda: check_video(path, decode=True), lambda: read_frames(path, [0.0, 19.9])):
        with pytest.raises(ValueError, match=rf"{kind}: (cut off or broken: its frames end|broken or cut off) at \d+"):
            read()
    # what is there is read
    for image, same in zip(whole, read_frames(path, [0.0, 5.0]), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(same))


def test_data_that_are_overwritten(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", 100, options=X264)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 2000
    data[start : start + 3000] = bytes(3000)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a.mp4: broken data, or none that FFmpeg can decode: Invalid data"):
        check_video(path, decode=True)


def test_a_video_that_is_to_be_turned(tmp_path: Path) -> None:
    half = np.zeros((32, 64, 3), np.uint8)
    half[:, :32] = (255, 0, 0)
    write_video(tmp_path / "a.mp4", [half] * 3, 8.0)
    data = (tmp_path / "a.mp4").read_bytes()
    # the matrix in the track's head, a quarter clockwise as phones write it
    plain, turned = (
        b"".join(int(value).to_bytes(4, "big", signed=True) for value in matrix)
        for matrix in ((65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30), (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30))
    )
    place = data.index(plain, data.index(b"tkhd"))
    (tmp_path / "b.mp4").write_bytes(data[:place] + turned + data[place + 36 :])
    (image,) = read_frames(tmp_path / "b.mp4", [0.1])
    assert image.size == (32, 64)
    assert image.getpixel((16, 10))[0] > 200 > 50 > image.getpixel((16, 54))[0]  # the left half is above
    assert video_info(tmp_path / "b.mp4")[3:] == (64, 32)


@pytest.mark.parametrize(("color_range", "colorspace"), [(1, 1), (2, 1), (1, 6), (2, 6), (0, 2)])
def test_colours_of_every_range(tmp_path: Path, color_range: int, colorspace: int) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 64
        stream.codec_context.color_range, stream.codec_context.colorspace = color_range, colorspace
        pixels = np.full((64, 64, 3), (200, 60, 30), np.uint8)
        frame = av.VideoFrame.from_ndarray(pixels).reformat(
            format="yuv420p", dst_colorspace=6 if colorspace == 2 else colorspace, dst_color_range=color_range or 1
        )
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found = read_frames(tmp_path / "a.mp4", [0.0])[0].getpixel((20, 20))
    assert np.abs(np.array(found) - (200, 60, 30)).max() <= 3


def test_sample_times() -> None:
    assert sample_times((0.0, 4.5), every=1.5) == [0.0, 1.5, 3.0]
    assert sample_times((0.0, 4.6), every=1.5) == [0.0, 1.5, 3.0, 4.5]
    assert sample_times((0.3, 0.9), every=0.1) == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    assert sample_times((2.0, 2.5), every=1.5) == [2.0]
    assert sample_times((10.0, 12.0), count=2) == [10.5, 11.5]
    assert sample_times((0.0, 1.0), count=1) == [0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"span": (2.0, 2.0), "count": 1},
            "expected a span of time, start before end, from 0 s on; found 2.0 s to 2.0 s",
        ),
        ({"span": (3.0, 2.0), "every": 1.0}, "start before end"),
        ({"span": (-1.0, 2.0), "every": 1.0}, "from 0 s on"),
        ({"span": (0.0, float("nan")), "every": 1.0}, "expected a span"),
        ({"span": (0.0, float("inf")), "every": 1.0}, "expected a span"),
        ({"span": (0.0, 2.0)}, "either every or count, found every=None and count=None"),
        ({"span": (0.0, 2.0), "every": 1.0, "count": 2}, "either every or count, found every=1.0 and count=2"),
        ({"span": (0.0, 2.0), "every": 0.0}, "above 0, found 0.0"),
        ({"span": (0.0, 2.0), "every": float("nan")}, "above 0, found nan"),
        ({"span": (0.0, 2.0), "count": 0}, "at least 1, found 0"),
    ],
)
def test_spans_that_are_none(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_times(**arguments)


class Reads:
    """Counts how often frames are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._read = videos.read_frames
        monkeypatch.setattr(videos, "read_frames", self)
        monkeypatch.setattr(videos._FramesOfVideo, "_kept", type(videos._FramesOfVideo._kept)())

    def __call__(self, path: Path, times: Sequence[float]) -> list[Image.Image]:
        self.count += 1
        return self._read(path, times)


def test_frames_are_image_sources_that_are_decoded_together(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, times = made("h264.mp4"), [3.0, 0.5, 7.25]
    expected = [np.asarray(image) for image in read_frames(path, times)]
    reads = Reads(monkeypatch)
    frames = video_frames(str(path), times)
    assert reads.count == 0
    assert [str(frame) for frame in frames] == [f"{path} at {time} s" for time in ("3.000", "0.500", "7.250")]
    for _ in range(2):
        for frame, pixels in zip(frames, expected, strict=True):
            assert np.array_equal(np.asarray(open_image(frame)), pixels)
    assert reads.count == 2  # nothing is kept once all were opened
    assert not videos._FramesOfVideo._kept
    assert check_image(frames[1], decode=True) == (64, 64)
    frames[1].open().close()
    assert np.array_equal(np.asarray(frames[1].open()), expected[1])  # an image of its own
    assert reads.count == 3
    with pytest.raises(ValueError, match=r"absent.mp4 at 1.000 s: .*absent.mp4: no such video"):
        open_image(video_frames("absent.mp4", [1.0])[0])


def test_frames_of_few_videos_are_kept(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch)
    several = [video_frames(made("h264.mp4"), [number * 0.1, 5.0]) for number in range(6)]
    for frames in several:
        frames[0].open()
    assert reads.count == 6
    assert len(videos._FramesOfVideo._kept) == videos._FramesOfVideo.KEPT
    several[5][1].open()
    assert reads.count == 6
    several[0][1].open()  # whose video was left since
    assert reads.count == 7


def test_frames_are_opened_by_several_threads(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, times = made("h264.mp4"), [0.1 * number for number in range(40)]
    expected = [np.asarray(image) for image in read_frames(path, times)]
    reads = Reads(monkeypatch)
    frames = video_frames(path, times)
    found: dict[int, np.ndarray] = {}

    def work(first: int) -> None:
        for number in range(first, 40, 4):
            found[number] = np.asarray(frames[number].open())

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reads.count == 1
    assert all(np.array_equal(found[number], expected[number]) for number in range(40))


def test_frames_go_to_other_processes_undecoded(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    frames = video_frames(made("h264.mp4"), [0.5, 1.0])
    pixels = np.asarray(frames[0].open())
    sent = pickle.dumps(frames)
    assert len(sent) < 1000
    reads = Reads(monkeypatch)
    copies = pickle.loads(sent)
    assert np.array_equal(np.asarray(copies[0].open()), pixels)
    copies[1].open()
    assert reads.count == 1  # they still go together


def test_what_is_written_is_read(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (128, 64, 200), (255, 255, 255), (0, 0, 0)]
    frames = [Image.new("RGB", (64, 48), colour) for colour in colours]
    write_video(tmp_path / "images.mp4", frames, 12.5)
    write_video(str(tmp_path / "arrays.mp4"), (np.asarray(frame) for frame in frames), 12.5, preset="ultrafast")
    for name in ("images.mp4", "arrays.mp4"):
        path = tmp_path / name
        assert check_video(path, decode=True) == VideoInfo(pytest.approx(0.56), 7, 12.5, 64, 48)
        for image, colour in zip(read_frames(path, [number / 12.5 for number in range(7)]), colours, strict=True):
            assert np.abs(np.asarray(image).astype(int) - colour).max() <= 4
    with av.open(str(tmp_path / "images.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.video[0].pix_fmt == "yuv420p"
    before = (tmp_path / "images.mp4").read_bytes()
    write_video(tmp_path / "images.mp4", frames, 12.5)
    assert (tmp_path / "images.mp4").read_bytes() == before


def test_frames_that_are_encoded_by_themselves_come_out_alike_in_any_order(tmp_path: Path) -> None:
    frames = [picture(number) for number in range(12)]
    for entry_every, same in ((1, True), (250, False)):
        read = []
        for name, order in (("forwards.mp4", 1), ("backwards.mp4", -1)):
            write_video(tmp_path / name, frames[::order], 8.0, entry_every=entry_every)
            images = read_frames(tmp_path / name, sample_times((0.0, 1.5), count=12))
            read.append(np.stack([np.asarray(image) for image in images]))
        assert np.array_equal(read[0], read[1][::-1]) == same


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    black = np.zeros((16, 16, 3), np.uint8)

    def broken() -> Any:
        yield black
        raise RuntimeError("no more")

    for frames, rate, message in [
        ([], 8.0, "no frames"),
        ([black, np.zeros((16, 18, 3), np.uint8)], 8.0, r"frame 1 is \(16, 18, 3\) of uint8, expected \(16, 16, 3\)"),
        ([black.astype(np.float32)], 8.0, "frame 0 is .* of float32, expected .* of uint8"),
        ([np.zeros((16, 17, 3), np.uint8)], 8.0, r".*even sides, found \(16, 17, 3\)"),
        ([black[..., 0]], 8.0, "expected frames"),
        ([black], 0.0, "rate must be above 0"),
        ([black], float("nan"), "rate must be above 0"),
    ]:
        with pytest.raises(ValueError, match=rf"a.mp4: {message}"):
            write_video(tmp_path / "a.mp4", frames, rate)
    with pytest.raises(ValueError, match=r"a.avi: .*expected the ending .mp4"):
        write_video(tmp_path / "a.avi", [black], 8.0)
    with pytest.raises(RuntimeError, match="no more"):
        write_video(tmp_path / "a.mp4", broken(), 8.0)
    assert list(tmp_path.iterdir()) == []


def test_names_that_ffmpeg_would_read_something_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a.mp4", "with space %03d.mp4", "-é.mp4"):
        write_video(name, [np.zeros((16, 16, 3), np.uint8)], 8.0)
        assert check_video(name, decode=True).frames == 1


def test_files_are_closed(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = shutil.copy(made("h264.mp4"), tmp_path / "a.mp4")
    (tmp_path / "text.mp4").write_text("no")
    opened = Path("/proc/self/fd")
    if not opened.is_dir():
        pytest.skip("needs /proc")
    gc.collect()
    before = len(list(opened.iterdir()))
    held = []
    for read in [*every_way(path), *every_way(tmp_path / "text.mp4"), lambda: read_frames(path, [99.0])]:
        try:
            held.append(read())
        except ValueError as error:
            held.append(error)  # its traceback keeps frames alive
    assert len(list(opened.iterdir())) == before


def test_without_pyav(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    for use in (
        lambda: video_info("a.mp4"),
        lambda: write_video(tmp_path / "a.mp4", [np.zeros((16, 16, 3), np.uint8)], 8.0),
    ):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'dora-lightning\[video\]'"):
            use()
