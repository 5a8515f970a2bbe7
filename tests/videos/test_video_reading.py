import gc
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dora_lightning.videos import check_video, read_frames, sample_times, video_info, write_video
from dora_lightning.videos.decoding import _clock_seconds
from tests.videos.video_examples import X264, add_sound, av, decoded_through, encode, every_way, make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return partial(make, tmp_path_factory.mktemp("videos"))


def test_the_head(made: Callable[[str], Path]) -> None:
    for kind, frames in [("h264.mp4", 600), ("vp9.webm", 0), ("mpeg4.avi", 400), ("h264.ts", 0), ("sound.mp4", 400)]:
        for info in (video_info(made(kind)), check_video(made(kind), decode=False), check_video(made(kind), True)):
            assert info.duration == pytest.approx(len(decoded_through(made(kind))[0]) / 25, abs=0.001)
            assert info[1:] == (frames, 25.0, 64, 64)
    # 30 frames' sound is no part of it, and a first frame after 2.8 s none either
    assert check_video(made("starts-late.mp4"), True).duration == pytest.approx(24)
    assert check_video(made("starts-late.mkv"), True).duration == pytest.approx(24)


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
        ({"span": (0.0, 2.0), "count": 0}, "from 1 to 100000 frames of a video, found 0"),
    ],
)
def test_spans_that_are_none(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_times(**arguments)


def test_without_pyav(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    for use in (
        lambda: video_info("a.mp4"),
        lambda: write_video(tmp_path / "a.mp4", [np.zeros((16, 16, 3), np.uint8)], 8.0),
    ):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'dora-lightning\[video\]'"):
            use()


def test_more_times_and_frames_than_can_be_held_are_refused(made: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"count must be from 1 to 100000 frames of a video, found 100001"):
        sample_times((0.0, 10.0), count=100_001)
    # as of a head that promises any length
    with pytest.raises(ValueError, match=r"every=1.5 s gives more than 100000 frames of 1e\+12 s of video"):
        sample_times((0.0, 1e12), every=1.5)
    path = made("h264.mp4")  # 24 s of 64 x 64 pixels: 12 KiB each
    times = [0.0] * 800_000
    with pytest.raises(ValueError, match=r"mp4: 800000 frames of 64 x 64 pixels take 9 GiB, at most 8 GiB are read"):
        read_frames(path, times)


def test_a_head_with_absurd_values(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dora_lightning.videos.decoding.MAX_SIDE", 63)
    with pytest.raises(ValueError, match=r"h264.mp4: too large: expected at most 63 pixels a side, found 64 x 64"):
        video_info(made("h264.mp4"))


@pytest.mark.parametrize("tag", ["", "long", "1:2", "nan:00:01", "inf:0:0", "-1:00:00", "0:0:0"])
def test_a_clock_that_says_nothing(tag: str) -> None:
    assert _clock_seconds(tag) is None
    assert _clock_seconds("01:02:03.5") == 3723.5
