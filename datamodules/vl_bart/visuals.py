"""What VL-BART looks at: features that were computed before, or pixels of images and of videos' frames."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dora_lightning.feature_files import FeatureFolder
from dora_lightning.feature_rows import GRID_ROWS, VIDEO_EVERY, VIDEO_ROWS, fit_rows, pool_grid
from dora_lightning.images import check_image, open_image
from dora_lightning.messages import check_real, check_whole
from dora_lightning.open_clip_tower import scaled_pixels
from dora_lightning.videos import VIDEO_SUFFIXES, check_video, read_frames, sample_times, video_info

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


@dataclass
class VisualFiles:
    """Where a task's images or videos are, or the features that were computed of them; one of the three.

    Args:
        features: Folder of feature files, see :class:`~dora_lightning.feature_files.FeatureFolder`.
        images: Folder of images, with any folders in it; ids that are paths of files need none.
        videos: Folder of videos, likewise.
        grid_rows: Rows that an image's features are max-pooled to, as published 36 of 49; null for all of them.
        video_rows: Rows that a video's features are brought to, as published: filled up with zeros, or max-pooled over
            time. Null for as many as there are, where what fills a batch up is masked.
        every: Seconds from one frame of a video to the next, read on the fly.
        frames: Frames of a video instead, evenly spread over it.
        exif_rotation: Turn images upright as their EXIF data say; false leaves them as they are stored.

    Raises:
        ValueError: More than one of the three, or options that do not go with them.
    """

    features: str | None = None
    images: str | None = None
    videos: str | None = None
    grid_rows: int | None = GRID_ROWS
    video_rows: int | None = VIDEO_ROWS
    every: float | None = None
    frames: int | None = None
    exif_rotation: bool = True

    def __post_init__(self) -> None:
        """Check what goes together."""
        check_whole(1, none="all rows", grid_rows=self.grid_rows, video_rows=self.video_rows)
        check_whole(1, none="frames at a distance", frames=self.frames)
        check_real(above=0, none="a number of frames", every=self.every)
        given = [name for name in ("features", "images", "videos") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of features, images and videos, found {' and '.join(given)}")
        for name in given:
            if not Path(getattr(self, name)).is_dir():
                raise FileNotFoundError(f"{name}: no such folder: {getattr(self, name)}")
        if self.every is not None and self.frames is not None:
            raise ValueError("give every or frames, the distance or the number of a video's frames, not both")
        if self.features is not None and (self.every or self.frames):
            raise ValueError("features were computed of frames already; every and frames are for videos")
        if self.features is not None and not self.exif_rotation:
            raise ValueError("features were computed already; exif_rotation is for images, and for extract-features")


class Visuals:
    """Opens what a task's rows look at.

    Args:
        files: Where it is.
        of_videos: Whether an id names a video.
        keep: Keep pixels in memory once they were read.
    """

    def __init__(self, files: VisualFiles, of_videos: bool, keep: bool = False) -> None:
        self.files = files
        self.of_videos = of_videos
        self.keep = keep
        self._pixels: dict[str, Tensor] = {}

    @property
    def from_features(self) -> bool:
        """Whether features were computed before."""
        return self.files.features is not None

    def trained_inputs(self) -> dict[str, Any]:
        """See :mod:`dora_lightning.training.trained_inputs`."""
        files = self.files
        if self.from_features:
            return {"video_rows": files.video_rows} if self.of_videos else {"grid_rows": files.grid_rows}
        if not self.of_videos:
            return {"exif_rotation": files.exif_rotation}
        return {"frames": files.frames, "every": self._every}

    def check(self, name: str, decode: bool) -> None:
        """See whether what an id stands for can be read.

        Args:
            name: The id.
            decode: Decode images and videos whole, and read features; else images' and videos' headers alone.

        Raises:
            ValueError: It is missing or broken.
        """
        if self.from_features:
            if name not in self._features:
                raise ValueError(f"no features of {name!r} in {self.files.features}")
            if decode:
                self.features(name)
        elif self.of_videos:
            check_video(self.path(name), decode)
        else:
            check_image(self.path(name), decode)

    def features(self, name: str) -> Tensor:
        """Features ``[rows, C]`` of an image, or of a video's moments."""
        features = self._features.read(name)
        if self.of_videos:
            return features if self.files.video_rows is None else fit_rows(features, self.files.video_rows)
        return features if self.files.grid_rows is None else pool_grid(features, self.files.grid_rows)

    def pixels(self, name: str, size: int) -> Tensor:
        """Images or frames, ``[N, 3, size, size]`` of uint8, scaled straight to the square.

        Args:
            name: The id.
            size: Pixels of a side.

        Raises:
            ValueError: The file is missing or broken.
        """
        pixels = self._pixels.get(name)
        if pixels is None:
            pixels = torch.stack([scaled_pixels(image, size) for image in self._open(name)])
            if self.keep:
                self._pixels[name] = pixels
        return pixels

    def path(self, name: str) -> str:
        """The file of an id.

        Raises:
            ValueError: There is none.
        """
        folder = self.files.videos if self.of_videos else self.files.images
        if folder is None:
            return name
        found = self._paths.get(name, [])
        if not found:
            kind = "video" if self.of_videos else "image"
            raise ValueError(f"no {kind} {name!r} in {folder}")
        if len(found) > 1:
            raise ValueError(f"two files for {name!r}: {found[0]} and {found[1]}")
        return found[0]

    @property
    def _every(self) -> float | None:
        """Seconds between a video's frames, unless their number is said."""
        return VIDEO_EVERY if self.files.every is None and self.files.frames is None else self.files.every

    def _open(self, name: str) -> list[Image.Image]:
        path = self.path(name)
        if not self.of_videos:
            return [open_image(path, self.files.exif_rotation)]
        times = sample_times((0.0, video_info(path).duration), every=self._every, count=self.files.frames)
        return read_frames(path, times)

    @cached_property
    def _features(self) -> FeatureFolder:
        assert self.files.features is not None
        return FeatureFolder(self.files.features)

    @cached_property
    def _paths(self) -> dict[str, list[str]]:
        """Id -> its files; more than one is an error where it is asked for."""
        folder = self.files.videos if self.of_videos else self.files.images
        suffixes = VIDEO_SUFFIXES if self.of_videos else _IMAGE_SUFFIXES
        assert folder is not None
        paths: dict[str, list[str]] = {}
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix.lower() in suffixes:
                paths.setdefault(path.stem, []).append(str(path))
        return paths
