"""Pooling against torch, on grids laid out by hand."""

import pytest
import torch
from torch import Tensor, nn

from dora_lightning.feature_rows import fit_rows, pool_grid

CHANNELS = 5


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("side", "new_side"), [(7, 6), (7, 7), (8, 8), (3, 1), (5, 2)])
def test_grid_is_pooled_row_by_row(side: int, new_side: int) -> None:
    features = numbers(2, side * side, CHANNELS)
    grid = torch.empty(2, CHANNELS, side, side)
    for row in range(side):
        for column in range(side):
            grid[:, :, row, column] = features[:, side * row + column]
    expected = nn.AdaptiveMaxPool2d(new_side)(grid)
    pooled = pool_grid(features, new_side * new_side)
    assert pooled.shape == (2, new_side * new_side, CHANNELS)
    for row in range(new_side):
        for column in range(new_side):
            assert torch.equal(pooled[:, new_side * row + column], expected[:, :, row, column])
    assert torch.equal(pool_grid(features[0], new_side * new_side), pooled[0])


def test_grid_refuses_what_is_no_square() -> None:
    with pytest.raises(ValueError, match="square grid, found 48 rows"):
        pool_grid(numbers(48, CHANNELS), 36)
    for rows in (35, 64, 0):
        with pytest.raises(ValueError, match=f"square number from 1 to 49, not to {rows}"):
            pool_grid(numbers(49, CHANNELS), rows)


def test_video_is_padded_or_pooled_over_time() -> None:
    features = numbers(7, CHANNELS)
    assert torch.equal(fit_rows(features, 7), features)
    longer = fit_rows(features, 10)
    assert torch.equal(longer[:7], features)
    assert torch.equal(longer[7:], torch.zeros(3, CHANNELS))
    # 7 moments in 3: windows of adaptive pooling are [0, 3), [2, 5), [4, 7)
    shorter = fit_rows(features, 3)
    expected = torch.stack([features[start:end].amax(0) for start, end in ((0, 3), (2, 5), (4, 7))])
    assert torch.equal(shorter, expected)
    assert torch.equal(shorter, nn.AdaptiveMaxPool1d(3)(features.T[None])[0].T)
