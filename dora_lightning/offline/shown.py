"""What prompts are about: images, a video's frames, or features that were computed before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dora_lightning.feature_files import NPZ_SUFFIX, SETTINGS_FILE, SUFFIXES, FeatureFolder, read_features
from dora_lightning.feature_rows import GRID_ROWS, VIDEO_ROWS, fit_rows, pool_grid
from dora_lightning.images import open_image
from dora_lightning.messages import check_real, check_whole
from dora_lightning.processing import AspectRatio
from dora_lightning.training.trained_inputs import differences
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
        image_aspect_ratio: ``pad`` or ``plain``, see :func:`~dora_lightning.processing.image_inputs`.
        exif_rotation: turn images upright as their EXIF data say.
        grid_rows: rows of an image's features where ``rows`` does not say; None for all.
        video_rows: likewise of a video's.

    Raises:
        ValueError: options that do not go together, or are out of range.
    """

    images: Sequence[str] = ()
    video: str | None = None
    frames: int | None = None
    every: float | None = None
    features: Sequence[str] = ()
    rows: int | None = None
    image_aspect_ratio: AspectRatio | None = None
    exif_rotation: bool | None = None
    grid_rows: int | None = GRID_ROWS
    video_rows: int | None = VIDEO_ROWS

    def __post_init__(self) -> None:
        """Check the numbers, and what goes together."""
        check_whole(1, none="the default", frames=self.frames, rows=self.rows)
        check_whole(1, none="all", grid_rows=self.grid_rows, video_rows=self.video_rows)
        check_real(above=0, none="the default", every=self.every)
        given = {"image": self.images, "video": self.video, "features": self.features}
        if len(several := [name for name, value in given.items() if value]) > 1:
            raise ValueError(f"give one of image, video and features, found {' and '.join(several)}")
        of_video = {"frames": self.frames, "every": self.every}
        if (chosen := [name for name, value in of_video.items() if value is not None]) and self.video is None:
            raise ValueError(f"{chosen[0]} says which frames of a video are looked at, and no video is given")
        if len(chosen) > 1:
            raise ValueError("give frames or every, the number or the distance of a video's frames, not both")
        if self.rows is not None and not self.features:
            raise ValueError("rows is what features are brought to, and no features are given")
        if self.exif_rotation is not None and not self.images:
            raise ValueError("exif_rotation is how images are turned, and no image is given")
        if self.image_aspect_ratio is not None and not (self.images or self.video):
            raise ValueError("image_aspect_ratio is how images are squared, and no image or video is given")
        if self.image_aspect_ratio not in (None, "pad", "plain"):
            raise ValueError(f"image_aspect_ratio must be 'pad' or 'plain', got {self.image_aspect_ratio!r}")

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.images or self.video or self.features)

    def as_trained(self, trained: Mapping[str, Any], published: Mapping[str, Any]) -> tuple[Shown, list[str]]:
        """What the user does not say as the model was trained, and messages of what differs or is not known.

        Args:
            trained: what the model says of its training, see :mod:`dora_lightning.training.trained_inputs`.
            published: options that count for this kind of model, and how published models were trained.
        """
        names = ["grid_rows", "video_rows"] if self.features else [name for name in published if self._takes(name)]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None and not self.features}
        if self.rows is not None:
            given = {"video_rows" if _is_of_video(Path(self.features[0]).expanduser()) else "grid_rows": self.rows}
        notes = list(differences(trained, given))
        defaults = {name: trained.get(name, published.get(name, getattr(self, name))) for name in names}
        if given.keys() & {"frames", "every"} or trained.keys() & {"frames", "every"}:
            # the number or the distance of a video's frames, never both
            said = given if given.keys() & {"frames", "every"} else trained
            defaults |= {name: said.get(name) for name in ("frames", "every") if name in names}
        if not trained.keys() & set(names) and names:
            options = ", ".join(f"{name} {value!r}" for name, value in (defaults | given).items() if value is not None)
            notes.append(f"nothing tells how what it looked at was prepared in its training; used is {options}")
        return replace(self, **(defaults | (given if self.rows is None else {}))), notes

    def times(self) -> list[float]:
        """When the frames of the video are.

        Raises:
            ValueError: it is missing or broken, or has more frames than can be looked at.
        """
        assert self.video is not None
        return sample_times((0.0, video_info(self.video).duration), self.every, self.frames)

    def pictures(self) -> list[Image.Image]:
        """The images, or the video's frames in their order; :meth:`as_trained` has said how.

        Raises:
            ValueError: a file is missing or broken.
        """
        if self.video is None:
            return [open_image(image, bool(self.exif_rotation)) for image in self.images]
        return [open_image(frame) for frame in read_frames(self.video, self.times())]

    def _takes(self, name: str) -> bool:
        if name in ("frames", "every"):
            return self.video is not None
        return bool(self.images) if name == "exif_rotation" else bool(self)

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
            rows = self.rows or self.video_rows
            return features if rows is None else fit_rows(features, rows)
        rows = self.rows or min(self.grid_rows or len(features), len(features))
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
