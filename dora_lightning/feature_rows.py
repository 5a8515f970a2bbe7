"""Rows of visual features ``[rows, C]`` brought to the number that a model was trained with."""

from __future__ import annotations

from math import isqrt

from torch import Tensor
from torch.nn.functional import adaptive_max_pool1d, adaptive_max_pool2d, pad

GRID_ROWS, VIDEO_ROWS = 36, 64
"""Rows of an image's grid and of a video in the published recipes."""

VIDEO_EVERY = 1.5
"""Seconds from one frame of a video to the next in them."""


def pool_grid(features: Tensor, rows: int) -> Tensor:
    """Make a square grid of features smaller, as VL-Adapter makes 6 x 6 of CLIP's 7 x 7 (``--downsample``).

    Args:
        features: ``[..., n * n, C]``, the grid row by row.
        rows: rows of the result, a square number no larger than ``n * n``.

    Returns:
        ``[..., rows, C]``, the adaptive max pool of the grid.

    Raises:
        ValueError: one of the two is no square, or there would be more rows than before.
    """
    found = features.shape[-2]
    side, new_side = isqrt(found), isqrt(rows)
    if side * side != found:
        raise ValueError(f"expected the features of a square grid, found {found} rows")
    if new_side * new_side != rows or not 1 <= rows <= found:
        raise ValueError(f"a grid of {found} rows can be pooled to a square number from 1 to {found}, not to {rows}")
    if rows == found:
        return features
    grid = features.reshape(-1, side, side, features.shape[-1]).permute(0, 3, 1, 2)  # [N, C, n, n]
    pooled = adaptive_max_pool2d(grid, new_side).flatten(2).transpose(1, 2)
    return pooled.reshape(*features.shape[:-2], rows, features.shape[-1])


def fit_rows(features: Tensor, rows: int) -> Tensor:
    """Give a video's features a fixed number of rows, as VALUE does.

    Args:
        features: ``[T, C]``, one row a moment.
        rows: rows of the result.

    Returns:
        ``[rows, C]``: rows of zeros are appended to a shorter video, a longer one is max-pooled over time.
    """
    if len(features) <= rows:
        return pad(features, (0, 0, 0, rows - len(features)))
    return adaptive_max_pool1d(features.T[None], rows)[0].T
