import pickle
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dora_lightning.images import check_image, open_image
from dora_lightning.videos import read_frames, video_frames
from dora_lightning.videos.frames import _FramesOfVideo
from tests.videos.video_examples import make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return partial(make, tmp_path_factory.mktemp("videos"))


class Reads:
    """Counts how often frames are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._read = read_frames
        monkeypatch.setattr("dora_lightning.videos.frames.read_frames", self)
        monkeypatch.setattr(_FramesOfVideo, "_kept", type(_FramesOfVideo._kept)())

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
    assert not _FramesOfVideo._kept
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
    assert len(_FramesOfVideo._kept) == _FramesOfVideo.KEPT
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
