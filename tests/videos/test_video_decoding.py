from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dora_lightning.videos import VideoInfo, check_video, decoding, read_frames, video_info, write_video
from tests.videos.video_examples import KINDS, X264, av, decoded_through, encode, make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return partial(make, tmp_path_factory.mktemp("videos"))


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
            shown = max(np.searchsorted(starts, time + decoding.ROUNDING, side="right") - 1, 0)
            assert np.array_equal(np.asarray(image), pictures[shown]), (time, shown)


def test_what_is_far_apart_is_not_decoded(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0

    class Counted(decoding.OpenVideo):
        def _frames(self) -> Any:
            nonlocal decoded
            for frame in super()._frames():
                decoded += frame is not None
                yield frame

    monkeypatch.setattr(decoding, "OpenVideo", Counted)
    for kind in ("h264.mp4", "starts-late.mkv"):
        decoded = 0
        read_frames(made(kind), [1.0, 5.0, 20.0])
        assert 3 <= decoded <= 3 * 13  # of 600; an entry point each 12 frames
    decoded = 0
    read_frames(made("mpeg4.avi"), [1.0, 5.0])
    assert decoded == 127


def test_a_file_without_length_is_measured_by_its_packets(tmp_path: Path) -> None:
    # browsers record so: as a stream, whose end is not known at its beginning
    path = encode(tmp_path / "live.mkv", 50, options=X264, container_options={"live": "1"})
    with av.open(str(path)) as container:
        assert not container.duration
    assert check_video(path, decode=True) == VideoInfo(2.0, 0, 25.0, 64, 64)
    _, pictures = decoded_through(path)
    assert np.array_equal(np.asarray(read_frames(path, [1.9])[0]), pictures[47])


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
