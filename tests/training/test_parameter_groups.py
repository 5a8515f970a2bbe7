"""Named groups, no decay on magnitudes, and the check that each trainable parameter is in exactly one."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from dora_lightning import AdapterConfig, inject_adapters
from dora_lightning.training.parameter_groups import check_optimizers, parameter_groups


def adapted(**options: object) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.LayerNorm(4))
    inject_adapters(model, AdapterConfig(rank=2, **options))
    model[2].requires_grad_(True)
    return model


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    return {name for name, p in model.named_parameters() if any(p is q for q in parameters)}


def test_each_trainable_parameter_is_in_the_group_of_its_name() -> None:
    model = adapted(target_modules=["0"], magnitude_only_modules=["1"])
    groups = {group["name"]: names_of(model, group["params"]) for group in parameter_groups(model)}
    assert groups == {
        "magnitude": {"0.magnitude", "1.magnitude"},
        "lora_A": {"0.lora_A"},
        "lora_B": {"0.lora_B"},
        "other": {"2.weight", "2.bias"},
    }


def test_groups_without_members_are_left_out() -> None:
    model = adapted(method="lora", target_modules=["0"])
    model[2].requires_grad_(False)
    assert [group["name"] for group in parameter_groups(model)] == ["lora_A", "lora_B"]


def test_weight_decay_spares_magnitudes() -> None:
    model = adapted()
    optimizer = AdamW(parameter_groups(model), lr=0.0, weight_decay=0.1)
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {
        "magnitude": 0.0,
        "lora_A": 0.1,
        "lora_B": 0.1,
        "other": 0.1,
    }
    # with a zero gradient only decay moves anything
    optimizer = AdamW(parameter_groups(model), lr=0.5, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(3, 6)).mul(0).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].magnitude, before["0.magnitude"])
    assert not torch.equal(model[0].lora_A, before["0.lora_A"])


def test_nothing_trainable() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is trainable"):
        parameter_groups(model)
    with pytest.raises(ValueError, match="nothing is trainable"):
        check_optimizers(model, [])


def test_each_parameter_in_exactly_one_group_passes() -> None:
    model = adapted()
    groups = parameter_groups(model)
    check_optimizers(model, [AdamW(groups)])
    check_optimizers(model, [AdamW(groups[:2]), AdamW(groups[2:])])


def test_a_forgotten_parameter_is_named() -> None:
    model = adapted()
    with pytest.raises(ValueError, match=r"2 trainable parameters are in no optimiser group: 2.weight, 2.bias"):
        check_optimizers(model, [AdamW(parameter_groups(model)[:-1])])


def test_a_parameter_in_two_optimisers_is_named() -> None:
    model = adapted()
    groups = parameter_groups(model)
    with pytest.raises(ValueError, match=r"in more than one optimiser group: 0.magnitude, 1.magnitude"):
        check_optimizers(model, [AdamW(groups), AdamW(groups[:1])])


def test_an_optimiser_built_before_injection_trains_nothing_and_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    optimizer = AdamW(model.parameters())
    inject_adapters(model, AdapterConfig(rank=2))
    with pytest.raises(ValueError, match=r"in no optimiser group: 0.lora_A, 0.lora_B, 0.magnitude"):
        check_optimizers(model, [optimizer])
