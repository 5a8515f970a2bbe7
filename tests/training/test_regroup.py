"""An optimiser's groups are split in place, and the schedulers that drive it with them."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, ReduceLROnPlateau, SequentialLR, StepLR

from dora_lightning.training.regroup import Part, split_groups


def parameters(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(1)) for _ in range(count)]


def test_groups_are_split_in_place_and_keep_their_options() -> None:
    a, b, c = parameters(3)
    optimizer = SGD([{"params": [a, b], "momentum": 0.5}, {"params": [c], "lr": 0.2}], lr=0.1, weight_decay=0.3)
    groups = optimizer.param_groups
    parts = [[Part("a", [a], 2.0, {}), Part("b", [b], 1.0, {"weight_decay": 0.0})], [Part("c", [c], 1.0, {})]]
    split_groups(optimizer, [], parts)
    assert optimizer.param_groups is groups  # wrappers such as SAM share the list
    assert [group["params"][0] is p for group, p in zip(groups, (a, b, c), strict=True)] == [True] * 3
    shown = [(group["name"], group["lr"], group["momentum"], group["weight_decay"]) for group in groups]
    assert shown == [("a", 0.2, 0.5, 0.3), ("b", 0.1, 0.5, 0.0), ("c", 0.2, 0, 0.3)]


def test_lists_per_group_are_split_whatever_the_number_of_groups() -> None:
    a, b, c = parameters(3)
    optimizer = SGD([{"params": [a, b]}, {"params": [c], "lr": 0.2}], lr=0.1)
    lambdas = [lambda step: 1.0 / (step + 1), lambda step: 3.0]
    scheduler = LambdaLR(optimizer, lambdas)
    split_groups(
        optimizer, [scheduler], [[Part("a", [a], 2.0, {}), Part("b", [b], 1.0, {})], [Part("c", [c], 10.0, {})]]
    )
    assert scheduler.base_lrs == [0.2, 0.1, 2.0]
    assert scheduler.lr_lambdas == [lambdas[0], lambdas[0], lambdas[1]]
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.1, 0.05, 6.0])


def test_momenta_are_copied_and_rates_scaled_in_a_cycle() -> None:
    a, b = parameters(2)
    optimizer = SGD([a, b], lr=0.1, momentum=0.9)
    scheduler = CyclicLR(optimizer, 0.1, 0.5, step_size_up=2)
    split_groups(optimizer, [scheduler], [[Part("a", [a], 1.0, {}), Part("b", [b], 2.0, {})]])
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.5, 1.0])
    assert [group["momentum"] for group in optimizer.param_groups] == pytest.approx([0.8, 0.8])


def test_a_floor_per_group_scales() -> None:
    a, b = parameters(2)
    optimizer = SGD([a, b], lr=0.1)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.1, patience=0, min_lr=0.05)
    split_groups(optimizer, [scheduler], [[Part("a", [a], 1.0, {}), Part("b", [b], 2.0, {})]])
    for _ in range(3):
        scheduler.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.1])


def test_schedulers_inside_of_a_chain_are_split_too() -> None:
    a, b = parameters(2)
    optimizer = SGD([a, b], lr=0.1)
    inner = [StepLR(optimizer, 1, 0.5), StepLR(optimizer, 1, 0.1)]
    scheduler = SequentialLR(optimizer, inner, milestones=[2])
    split_groups(optimizer, [scheduler], [[Part("a", [a], 1.0, {}), Part("b", [b], 4.0, {})]])
    assert [each.base_lrs for each in inner] == [[0.1, 0.4]] * 2
    for expected in (0.05, 0.1, 0.01):  # at the milestone the second begins at the base rate
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr() == pytest.approx([expected, 4 * expected])


def test_a_rate_that_is_a_tensor_is_not_shared() -> None:
    a, b = parameters(2)
    optimizer = AdamW([a, b], lr=torch.tensor(0.1))
    split_groups(optimizer, [], [[Part("a", [a], 1.0, {}), Part("b", [b], 2.0, {})]])
    optimizer.param_groups[0]["lr"].fill_(7.0)
    assert float(optimizer.param_groups[1]["lr"]) == pytest.approx(0.2)


def test_an_optimizer_that_has_stepped_is_refused() -> None:
    (a,) = parameters(1)
    optimizer = AdamW([a])
    a.grad = torch.ones(1)
    optimizer.step()
    with pytest.raises(ValueError, match="has taken steps already"):
        split_groups(optimizer, [], [[Part("a", [a], 1.0, {})]])
