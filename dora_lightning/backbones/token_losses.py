"""Cross-entropy of tokens without the logits of all of them at once.

Shapes: N tokens, D hidden features, V vocabulary. ``[N, V]`` in fp32 would be 2 GiB at 4,096 tokens of a vocabulary of
128,000, and three of them are needed: logits, logarithms of the softmax, gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**26
"""Most logits there are at once: 256 MiB in fp32. Larger pieces are no faster."""


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens have their logits at the same time.

    >>> tokens_at_once(128_000)
    524
    """
    return max(1, LOGITS_AT_ONCE // vocabulary)


def token_losses(logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Cross-entropy of each token ``[N]``, in fp32.

    Where there are more than :func:`tokens_at_once`, they come in pieces, whose logits are computed once more in the
    backward pass: as many operations as the output embedding's forward pass has.

    Args:
        logits: makes ``[n, V]`` of ``[n, D]``; the output embedding as a rule.
        hidden: ``[N, D]``.
        targets: ``[N]``, the tokens that should follow.
        vocabulary: V.
    """

    def losses(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits(hidden).float(), targets, reduction="none")

    size = tokens_at_once(vocabulary)
    if len(targets) <= size:
        return losses(hidden, targets)
    pieces = zip(hidden.split(size), targets.split(size), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([losses(*piece) for piece in pieces])
    return torch.cat([checkpoint(losses, *piece, use_reentrant=False) for piece in pieces])
