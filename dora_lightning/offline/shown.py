"""What prompts are about: images, a video's frames, or features that were computed before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from dora_lightning.feature_files import NPZ_SUFFIX, SETTINGS_FILE, SUFFIXES, FeatureFolder, read_features
from dora_lightning.feature_rows import GRID_ROWS, VIDEO_ROWS, fit_rows, pool_grid
from dora_lightning.images import open_image
from dora_lightning.videos import read_frames, sample_times, video_info
from dora_lightning.vl_bart.inputs import feature_inputs


@dataclass
class Shown:
    """What is shown to a model beside its prompts; one of images, video and features, or nothing.

    Args:
        images: image files.
        video: video file.
        frames: frames of the video, the middles of as many equal parts.
        every: seconds from one frame of the video to the next, instead.
        features: files of features, of an image each, or of one video.
        rows: rows that features are brought to; None for the published numbers.

    Raises:
        ValueError: options that do not go together, or are out of range.
    """

    images: Sequence[str] = ()
    video: str | None = None
    frames: int | None = None
    every: float | None = None
    features: Sequence[str] = ()
    rows: int | None = None

    def __post_init__(self) -> None:
        """Check what goes together."""
        given = {"image": self.images, "video": self.video, "features": self.features}
        if len(several := [name for name, value in given.items() if value]) > 1:
            raise ValueError(f"give one of image, video and features, found {' and '.join(several)}")
        of_video = {"frames": self.frames, "every": self.every}
        if (chosen := [name for name, value in of_video.items() if value is not None]) and self.video is None:
            raise ValueError(f"{chosen[0]} says which frames of a video are looked at, and no video is given")
        if len(chosen) > 1:
            raise ValueError("give frames or every, the number or the distance of a video's frames, not both")
        for name, number in (of_video | {"rows": self.rows}).items():
            if number is not None and number <= 0:
                raise ValueError(f"{name} must be above 0, got {number}")
        if self.rows is not None and not self.features:
            raise ValueError("rows is what features are brought to, and no features are given")

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.images or self.video or self.features)

    def pictures(self, frames: int | None = None, every: float | None = None) -> list[Image.Image]:
        """The images, or the video's frames in their order.

        Args:
            frames: frames of a video, if the user does not say.
            every: seconds between them, likewise; one of the two.

        Raises:
            ValueError: a file is missing or broken.
        """
        if self.video is None:
            return [open_image(image) for image in self.images]
        if self.frames is not None or self.every is not None:
            frames, every = self.frames, self.every
        times = sample_times((0.0, video_info(self.video).duration), every, frames)
        return [open_image(frame) for frame in read_frames(self.video, times)]

    def feature_inputs(self, feature_dim: int) -> dict[str, Tensor]:
        """VL-BART's inputs of the features: ``features [1, V, C]``, ``image_order``, ``object_order``, ``visual_mask``.

        Args:
            feature_dim: features of a visual token that the model reads, C.

        Raises:
            ValueError: a file is missing or broken, or its features are others than the model reads.
        """
        paths = [Path(name).expanduser() for name in self.features]
        videos = [path for path in paths if _is_of_video(path)]
        if videos and len(paths) > 1:
            raise ValueError(f"{videos[0]} holds features of a video, of which one is shown; found {len(paths)} files")
        return feature_inputs([[self._rows_of(path, bool(videos), feature_dim) for path in paths]], bool(videos))

    def _rows_of(self, path: Path, of_video: bool, feature_dim: int) -> Tensor:
        features = read_features(path)
        if features.shape[1] != feature_dim:
            raise ValueError(f"{path}: features of {features.shape[1]} numbers, and this model reads {feature_dim}")
        if of_video:
            return fit_rows(features, self.rows or VIDEO_ROWS)
        rows = self.rows or min(GRID_ROWS, len(features))
        if rows == len(features):
            return features
        try:
            return pool_grid(features, rows)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; rows={len(features)} leaves them as they are") from error


def _is_of_video(path: Path) -> bool:
    """Whether features are of a video, as VALUE's files are, and those of ours whose folder tells so."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a file of features, ending in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"no file of features at {path}")
    folder = next((parent for parent in path.parents if (parent / SETTINGS_FILE).is_file()), None)
    settings = FeatureFolder(folder).settings if folder is not None else None
    return path.suffix == NPZ_SUFFIX or "every" in (settings or {})
