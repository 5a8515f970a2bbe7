"""Losses of many tokens are those of one product with the vocabulary, without its memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from dora_lightning import AdapterConfig, inject_adapters
from dora_lightning.backbones import token_losses as module
from dora_lightning.backbones.token_losses import token_losses, tokens_at_once


class Largest(TorchFunctionMode):
    """The most elements that a product's result has."""

    def __init__(self) -> None:
        self.elements = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (F.linear, F.cross_entropy, torch.Tensor.float) and isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("adapted", [False, True])
def test_pieces_give_losses_and_gradients_of_the_whole(adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(16, 50, bias=False))
    if adapted:
        inject_adapters(head, AdapterConfig(rank=4, target_modules="all-linear"))
        nn.init.normal_(head[0].lora_B)
    targets = torch.randint(50, (23,))
    weights = torch.rand(23)

    def run() -> tuple[torch.Tensor, list[torch.Tensor], int]:
        hidden = torch.randn(23, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with Largest() as largest:
            losses = token_losses(head, hidden, targets, 50)
            head.zero_grad()
            (weights * losses).sum().backward()
        assert hidden.grad is not None
        gradients = [p.grad.clone() for p in head.parameters() if p.grad is not None]
        return losses.detach(), [hidden.grad, *gradients], largest.elements

    losses, gradients, whole = run()
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 250)
    in_pieces, others, piece = run()
    assert tokens_at_once(50) == 5
    assert (whole, piece) == (23 * 50, 5 * 50)
    torch.testing.assert_close(in_pieces, losses, rtol=1e-6, atol=1e-6)
    assert len(gradients) == (4 if adapted else 2)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(
            token_losses(head, torch.zeros(23, 16), targets, 50),
            torch.cat([F.cross_entropy(head(torch.zeros(1, 16)), t[None], reduction="none") for t in targets]),
        )


def test_of_no_tokens_there_are_no_losses_and_a_gradient_of_zero() -> None:
    head = nn.Linear(4, 6)
    losses = token_losses(head, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 6)
    losses.sum().backward()
    assert losses.shape == (0,)
    assert head.weight.grad is not None
    assert not head.weight.grad.any()
