"""What ``A`` and ``B`` start from, as PEFT's ``init_lora_weights`` defines it.

``pissa`` (Meng et al., NeurIPS 2024, https://arxiv.org/abs/2404.02948) and ``olora`` (Büyükakyüz 2024,
https://arxiv.org/abs/2406.01775) start from factors of the weight itself, with ``B A`` not zero. PEFT takes them out of
the base weight, which then is another base. Here the base stays what it is, and the first values are taken out of the
update: it is ``s (B A - B0 A0)``, the product of ``[B, -B0]`` and ``[A; A0]``, so that identity, merging and export see
a low-rank update of the pretrained weight like any other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def draws_from_weight(init: str) -> bool:
    """Whether ``A`` and ``B`` start from the weight, and their first values are taken out of the update."""
    return init == "olora" or init.startswith("pissa")


@torch.no_grad()
def start_low_rank(
    lora_A: Tensor, lora_B: Tensor, init: str, weight: Tensor, scaling: float, lookup: bool = False
) -> None:
    """Fill ``lora_A [rank, in]`` and ``lora_B [out, rank]`` with the values training starts from.

    Args:
        lora_A: filled in place.
        lora_B: filled in place.
        init: see :class:`~dora_lightning.adapters.config.AdapterConfig`.
        weight: ``W [out, in]``; only read where :func:`draws_from_weight`.
        scaling: ``s``.
        lookup: of an embedding, which starts from zero ``A`` and normal ``B``.
    """
    if draws_from_weight(init):
        if not weight.is_meta:
            B, A = _olora(weight, len(lora_A)) if init == "olora" else _pissa(weight, len(lora_A), init)
            lora_A.copy_(A / (1 if init == "olora" else math.sqrt(scaling)))
            lora_B.copy_(B / (1 if init == "olora" else math.sqrt(scaling)))
    elif init == "orthogonal":
        _orthogonal(lora_A, lora_B)
    elif lookup:
        nn.init.zeros_(lora_A)
        nn.init.normal_(lora_B)
    else:
        if init == "gaussian":
            nn.init.normal_(lora_A, std=1 / len(lora_A))
        else:
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        nn.init.zeros_(lora_B)


def _pissa(weight: Tensor, rank: int, init: str) -> tuple[Tensor, Tensor]:
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if init == "pissa":
        U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    else:
        U, S, V = torch.svd_lowrank(wide, rank, niter=int(init.rpartition("_")[2]))
        Vh = V.T
    root = S.sqrt()
    return U * root, root[:, None] * Vh


def _olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    Q, R = torch.linalg.qr(wide)
    return Q[:, :rank], R[:rank]


def _orthogonal(lora_A: Tensor, lora_B: Tensor) -> None:
    """Odd and even rows of one orthogonal matrix, so that ``B A`` is zero although neither is."""
    rank, half = len(lora_A), len(lora_A) // 2
    Q = torch.linalg.qr(torch.randn(rank, rank, dtype=lora_A.dtype, device=lora_A.device)).Q
    lora_A.copy_((lora_A.new_empty(lora_A.shape[1], half).normal_() @ Q[0::2]).T / 10)
    lora_B.copy_(lora_B.new_empty(lora_B.shape[0], half).normal_() @ Q[1::2] / 10)
