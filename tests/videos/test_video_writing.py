from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dora_lightning.videos import VideoInfo, check_video, read_frames, sample_times, write_video
from tests.videos.video_examples import av, picture


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
