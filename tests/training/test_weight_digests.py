"""The digest of a weight is that of its bytes, however it is cut; projections tell rounding from another order."""

import hashlib
import itertools
import random

import pytest
import torch

from dora_lightning.training import weight_digests
from dora_lightning.training.weight_digests import (
    columns_of,
    digest_of,
    digest_of_rows,
    project,
    same_but_for_rounding,
    whole_digest,
)

TOLERANCE = 2.0**-7


def by_hand(weight: torch.Tensor) -> str:
    content = weight.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    rows = len(weight) if weight.ndim else 1
    width, total = len(content) // max(1, rows), 0
    if width >= 64:
        for row in range(rows):
            piece = f"{row}:".encode() + content[row * width : (row + 1) * width]
            total += int(hashlib.sha256(piece).digest()[::-1].hex(), 16)
        content = b""
    return hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)} {total % 2**256:x}".encode() + content).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (300, 257), (16385,), (2, 0), (7, 4, 3, 3), (5, 64)])
def test_a_digest_is_that_of_the_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = (torch.rand(shape) * 100).to(dtype)
    assert digest_of(weight) == by_hand(weight)
    if weight.ndim == 2:
        assert digest_of(weight.T) == by_hand(weight.T)


@pytest.mark.parametrize("shape", [(700, 40), (700,), (700, 3)])
def test_however_it_is_cut_over_however_many_processes(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_digests, "_SLAB", 1000)  # several slabs
    random_ = random.Random(0)
    weight = torch.randn(shape).to(torch.bfloat16)
    columns = columns_of(shape)
    for _ in range(20):
        cuts = sorted({0, len(weight), *(random_.randrange(len(weight)) for _ in range(random_.randrange(9)))})
        pieces = [digest_of_rows(weight[a:b], a * columns, columns) for a, b in itertools.pairwise(cuts)]
        random_.shuffle(pieces)
        assert whole_digest(weight.dtype, weight.shape, pieces) == by_hand(weight)


def test_rows_in_another_order_are_another_weight() -> None:
    weight = torch.randn(64, 32)
    swapped, cyclic, exchanged = weight.clone(), weight.roll(1, 0), weight.clone()
    swapped[[3, 40]] = swapped[[40, 3]]
    exchanged[0, 0], exchanged[0, 1] = weight[0, 1], weight[0, 0]
    assert len({digest_of(weight), digest_of(swapped), digest_of(cyclic), digest_of(exchanged)}) == 4


def test_dtype_and_shape_are_part_of_it() -> None:
    weight = torch.zeros(4, 6)
    others = [weight.view(6, 4), weight.view(24), torch.zeros(4, 12, dtype=torch.float16), weight[:3]]
    assert len({digest_of(weight), *map(digest_of, others)}) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [torch.randn(96, 64), torch.randn(64), torch.full((40,), 1.003), torch.zeros(3, 3)])
def test_projections_do_not_see_rounding(weight: torch.Tensor, dtype: torch.dtype) -> None:
    columns = weight.shape[1] if weight.ndim > 1 else 1
    whole, rounded = project(weight, 0, columns), project(weight.to(dtype), 0, columns)
    assert same_but_for_rounding(whole.tolist(), rounded.tolist(), TOLERANCE)
    assert float(whole[-1]) == pytest.approx(float(weight.double().square().sum()))


@pytest.mark.parametrize("seed", range(5))
def test_projections_see_rows_and_columns_in_another_order(seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(128, 96)
    two = torch.arange(128)
    two[[3, 77]] = two[[77, 3]]
    others = [weight[torch.randperm(128)], weight[two], weight[:, torch.randperm(96)], -weight, weight * 1.1]
    others.append(weight.index_fill(0, torch.tensor([5]), 0.0))
    for other in others:
        assert not same_but_for_rounding(project(weight, 0, 96).tolist(), project(other, 0, 96).tolist(), TOLERANCE)
    assert not same_but_for_rounding([float("nan")] * 9, project(weight, 0, 96).tolist(), TOLERANCE)


def test_projections_of_rows_add_up() -> None:
    weight = torch.randn(50, 7)
    parts = project(weight[:13], 0, 7) + project(weight[13:], 13 * 7, 7)
    torch.testing.assert_close(parts, project(weight, 0, 7), rtol=1e-4, atol=1e-4)
