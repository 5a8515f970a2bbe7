"""Files of images and videos as a tower reads them, in the same batches however often a run is interrupted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dora_lightning.images import check_image, open_image
from dora_lightning.open_clip_tower import OpenClipTower, image_pixels
from dora_lightning.videos import VIDEO_SUFFIXES, read_frames, sample_times, video_info

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Endings that image files are found by."""


class VisualFile(NamedTuple):
    """An image, or a video with the times of its frames."""

    name: str
    path: Path
    times: tuple[float, ...] | None = None

    @property
    def frames(self) -> int:
        """How many pictures are read of it."""
        return 1 if self.times is None else len(self.times)


class BadFile(NamedTuple):
    """A file that cannot be read, and why."""

    path: Path
    reason: str


class Piece(NamedTuple):
    """Frames ``start`` to ``stop`` of a file, which lie in one batch; files are numbered."""

    file: int
    start: int
    stop: int


class PixelBatches(Dataset[tuple[Tensor, dict[int, str]]]):
    """Whole batches as the tower reads them, and what is wrong with files in them."""

    def __init__(
        self, files: list[VisualFile], batches: list[list[Piece]], tower: OpenClipTower, exif_rotation: bool = True
    ) -> None:
        self.files = files
        self.batches = batches
        self.exif_rotation = exif_rotation
        self.size, self.mean, self.std = tower.image_size, tower.mean, tower.std

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, dict[int, str]]:
        """Pixels ``[B, 3, S, S]``, black in place of what cannot be read, and the reasons by file."""
        pixels, reasons = [], {}
        for piece in self.batches[number]:
            file = self.files[piece.file]
            try:
                if file.times is None:
                    images = [open_image(file.path, self.exif_rotation)]
                else:
                    images = read_frames(file.path, file.times[piece.start : piece.stop])
                pixels += [image_pixels(image, self.size, self.mean, self.std) for image in images]
            except ValueError as error:
                reasons[piece.file] = str(error)
                pixels += [torch.zeros(3, self.size, self.size)] * (piece.stop - piece.start)
        return torch.stack(pixels), reasons


def find_files(source: Path) -> dict[str, Path]:
    """Images and videos by their ids, sorted; an id is the path in the folder without its ending.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is none in it, or two of them have one name.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"no folder of images or videos at {source}")
    found: dict[str, Path] = {}
    stems: dict[str, Path] = {}
    for folder, _, names in os.walk(source, followlinks=True):
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or path.suffix.lower() not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
                continue
            if path.stem in stems:
                both = ", ".join(sorted(map(str, (stems[path.stem], path))))
                raise ValueError(f"two files have the name {path.stem!r}, by which a data set's rows know it: {both}")
            stems[path.stem] = path
            found[path.relative_to(source).with_suffix("").as_posix()] = path
    if not found:
        raise ValueError(f"{source}: no images or videos ({', '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)})")
    return dict(sorted(found.items()))


def is_video(path: Path) -> bool:
    """Whether a file is a video by its ending."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def measure_file(name: str, path: Path, every: float) -> VisualFile | BadFile:
    """What the head of a file says: a video is read every so many seconds from its start."""
    try:
        if not is_video(path):
            check_image(path, decode=False)
            return VisualFile(name, path)
        duration = video_info(path).duration
    except ValueError as error:
        return BadFile(path, str(error))
    return VisualFile(name, path, tuple(sample_times((0.0, duration), every=every)))


def batches_of(files: Sequence[VisualFile], batch_size: int) -> list[list[Piece]]:
    """All frames of all files in batches of ``batch_size``, the last one smaller.

    A batch may hold frames of several files, and a file's frames may lie in several batches.
    """
    batches: list[list[Piece]] = []
    room = 0
    for number, file in enumerate(files):
        start = 0
        while start < file.frames:
            if room == 0:
                batches.append([])
                room = batch_size
            stop = min(file.frames, start + room)
            batches[-1].append(Piece(number, start, stop))
            room -= stop - start
            start = stop
    return batches
