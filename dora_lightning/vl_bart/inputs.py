"""What the model reads beside its text, made of features that were computed before, or of pixels.

Shapes: U different things to look at, V visual tokens, C features of one, N images or frames of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dora_lightning.open_clip_tower import normalized


def feature_inputs(seen: Sequence[Sequence[Tensor]], of_videos: bool) -> dict[str, Tensor]:
    """VL-BART's inputs of features that were computed before.

    Args:
        seen: Of each of U samples, features ``[rows, C]`` of each of its images, or of its one video.
        of_videos: Whether rows are moments of a video, rather than places of an image.

    Returns:
        ``features [U, V, C]``, ``image_order``, ``object_order`` and ``visual_mask`` ``[U, V]``, 0 on what fills up.
    """
    rows = [torch.cat(list(images)) for images in seen]
    features = pad_sequence(rows, batch_first=True)
    image_order = torch.zeros(features.shape[:2], dtype=torch.int64)
    object_order = torch.zeros_like(image_order)
    for place, images in enumerate(seen):
        start = 0
        for number, image in enumerate(images):
            end = start + len(image)
            image_order[place, start:end] = 0 if of_videos else number
            object_order[place, start:end] = torch.arange(len(image))
            start = end
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(features.shape[1]) < lengths[:, None]).long()
    return {"features": features, "image_order": image_order, "object_order": object_order, "visual_mask": mask}


def pixel_inputs(seen: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]) -> dict[str, Tensor]:
    """VL-BART's inputs of pixels: ``pixel_values [N, 3, size, size]`` and ``image_counts [U]``.

    Args:
        seen: Of each of U samples, its images or frames ``[n, 3, size, size]`` of uint8.
        mean: What is taken from each colour of a pixel in [0, 1].
        std: What it is divided by then.
    """
    pixel_values = normalized(torch.cat(list(seen)), mean, std)
    return {"pixel_values": pixel_values, "image_counts": torch.tensor([len(images) for images in seen])}
