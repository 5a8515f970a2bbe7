"""Which samples have images that can be trained on, found out before a run starts."""

import time
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from datamodules.rows import OnBadRow
from dora_lightning.data import Sample
from dora_lightning.images import IMAGE, check_image, image_key
from dora_lightning.videos import VideoFrame

_MANY = 1000  # images that take long enough to say so
_SECONDS = 30.0  # between messages of how far it is


class ImageSample(NamedTuple):
    """A sample whose images can be used."""

    sample: Sample
    sizes: tuple[tuple[int, int], ...]
    """``(width, height)`` of each image, in pixels."""


def sample_name(sample: Sample) -> str:
    """What a message calls a sample: the file and row it was read from, if ``Sample.row`` says so."""
    row = sample.row or {}
    if "file" in row and "row" in row:
        return f"{row['file']}, row {row['row']}"
    question = f", question {row['question_id']}" if "question_id" in row else ""
    return (sample.source or "sample") + question


def usable_samples(samples: Sequence[Sample], on_bad_row: OnBadRow, exif_rotation: bool = True) -> list[ImageSample]:
    """The samples with as many images as placeholders, every one of which can be used.

    Args:
        samples: What to look through.
        on_bad_row: ``raise`` reads the header of every image and stops at the first sample that cannot be used; an
            image that is broken after its header shows when it is decoded. ``skip`` decodes every image once, in
            threads, so that what is left out is known and counted before training starts.
        exif_rotation: Measure images as they are turned by their EXIF data.

    Raises:
        ValueError: A sample cannot be used and ``on_bad_row="raise"``, or none can.
    """
    good: list[ImageSample] = []
    bad: list[str] = []
    sizes = _sizes([image for sample in samples for image in sample.images], on_bad_row == "skip", exif_rotation)
    for sample in samples:
        try:
            _check_placeholders(sample)
            keys = [_key(image, on_bad_row == "skip") for image in sample.images]
            good.append(ImageSample(sample, tuple(_size(sizes[key]) for key in keys)))
        except ValueError as error:
            message = f"{sample_name(sample)}: {error}"
            if on_bad_row == "raise":
                raise ValueError(message) from error
            bad.append(message)
    report_skipped(bad, len(samples), "for their images")
    return good


def report_skipped(bad: Sequence[str], total: int, why: str) -> None:
    """Say how many samples were left out.

    Args:
        bad: A message for each.
        total: How many there were before.
        why: Completes the sentence.

    Raises:
        ValueError: All of them were.
    """
    if not bad:
        return
    message = f"{len(bad)} of {total} samples were skipped {why}; the first: {bad[0]}"
    if len(bad) == total:
        raise ValueError(message)
    rank_zero_warn(message)


def _check_placeholders(sample: Sample) -> None:
    if IMAGE in sample.target or any(IMAGE in sample.prompt[start:end] for start, end in sample.answered):
        raise ValueError(f"an answer holds {IMAGE!r}, which is read as an image; expected it in questions alone")
    places, images = sample.prompt.count(IMAGE), len(sample.images)
    if places != images:
        raise ValueError(
            f"expected one {IMAGE!r} in the text for each image, found {places} of them and {images} images"
        )


def _sizes(images: Sequence[Any], decode: bool, exif_rotation: bool) -> dict[Any, tuple[int, int] | ValueError]:
    """Size of each image, or what is wrong with it.

    An image that several samples share is looked at once, and so is the header of a video. One process looks: what it
    cannot read is left out by all, or their batches would differ.
    """
    unique = {_key(image, decode): image for image in images}
    in_group = dist.is_available() and dist.is_initialized()
    rank, processes = (dist.get_rank(), dist.get_world_size()) if in_group else (0, 1)
    own = list(unique.values())[rank::processes]
    what = "Decoding" if decode else "Reading the headers of"
    if len(unique) >= _MANY:
        rank_zero_info(f"{what} {len(unique)} images to find those that cannot be used")

    def look(image: Any) -> tuple[int, int] | ValueError:
        try:
            return check_image(image, decode, exif_rotation)
        except ValueError as error:
            return error

    found: list[tuple[int, int] | ValueError] = []
    said = time.monotonic()
    with ThreadPoolExecutor() as threads:
        for result in threads.map(look, own):
            found.append(result)
            if time.monotonic() - said > _SECONDS:
                said = time.monotonic()
                rank_zero_info(f"{what} images: {len(found) * processes} of {len(unique)}")
    shares: list[Any] = [found]
    if processes > 1:
        shares = [None] * processes
        dist.all_gather_object(shares, found)
    return {key: shares[place % processes][place // processes] for place, key in enumerate(unique)}


def _key(image: Any, decode: bool) -> Hashable:
    return image.path if isinstance(image, VideoFrame) and not decode else image_key(image)


def _size(found: tuple[int, int] | ValueError) -> tuple[int, int]:
    if isinstance(found, ValueError):
        raise found
    return found
