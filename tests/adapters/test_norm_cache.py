"""The norm is computed once per optimiser step, and never stale."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_lightning.adapters import DoRALinear, forget_norms, functional
from dora_lightning.adapters.norm_cache import NormCache, weights_kept
from tests.adapters.perturbed import adapted, assert_close


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each computation of a norm."""
    calls: list[int] = []
    compute = functional.adapted_norm

    def counted(*args: object) -> torch.Tensor:
        calls.append(1)
        return compute(*args)

    monkeypatch.setattr(functional, "adapted_norm", counted)
    return calls


@pytest.fixture
def layer() -> DoRALinear:
    layer = adapted("dora")
    layer(torch.randn(2, 12)).sum().backward()
    return layer


def assert_fresh(layer: DoRALinear) -> None:
    V = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    assert_close(layer.norm(), V.norm(dim=1), 1e-2 if layer.weight.dtype == torch.bfloat16 else 1e-6)
    x = torch.randn(5, 12, dtype=layer.weight.dtype)
    expected = x.double() @ (layer.magnitude / V.norm(dim=1))[:, None].mul(V).T + layer.bias
    assert_close(layer(x), expected, 2e-2 if layer.weight.dtype == torch.bfloat16 else 1e-5)


def test_once_per_step_over_micro_batches(layer: DoRALinear, norms: list[int]) -> None:
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 4):
        optimizer.step()
        for _ in range(4):
            layer(torch.randn(2, 12)).sum().backward()
        assert len(norms) == step


def test_once_under_activation_checkpointing(layer: DoRALinear, norms: list[int]) -> None:
    block = nn.Sequential(layer, nn.GELU())
    x = torch.randn(2, 12, requires_grad=True)
    expected = torch.autograd.grad(block(x).sum(), [x, layer.lora_A, layer.lora_B, layer.magnitude])
    with torch.no_grad():
        layer.lora_B.add_(0)
    norms.clear()
    y = checkpoint(block, x, use_reentrant=False)
    grads = torch.autograd.grad(y.sum(), [x, layer.lora_A, layer.lora_B, layer.magnitude])
    assert len(norms) == 1
    torch.testing.assert_close(grads, expected, rtol=0, atol=0)


def test_none_while_generating(layer: DoRALinear, norms: list[int]) -> None:
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(1, 12))
    norms.clear()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(3):
                layer(torch.randn(1, 12))
    assert norms == []


@pytest.mark.parametrize("kind", [{"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_fresh_after_an_optimizer_step(layer: DoRALinear, optimizer: type, kind: dict) -> None:
    stepper = optimizer([p for p in layer.parameters() if p.requires_grad], lr=0.1, **kind)
    for _ in range(2):
        layer(torch.randn(2, 12)).square().sum().backward()
        stepper.step()
        assert_fresh(layer)


class ThroughData(torch.optim.Optimizer):
    """Writes through ``.data``, which moves no version counter."""

    def __init__(self, params: list) -> None:
        super().__init__(params, {})

    def step(self, closure: None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(0.5)


def test_fresh_after_an_optimizer_that_writes_through_data(layer: DoRALinear, monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a GPU, where contents are not compared
    monkeypatch.setattr(NormCache, "_unchanged", lambda self, small: True)
    ThroughData([layer.lora_A, layer.lora_B]).step()
    assert_fresh(layer)


# Weights swapped through .data, on a device whose contents are not compared ------------------------------------------


@pytest.fixture
def no_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NormCache, "_unchanged", lambda self, small: True)


def swap(layer: DoRALinear, other: dict[str, torch.Tensor]) -> None:
    """As WeightAveraging of Lightning does it."""
    for name, value in other.items():
        own = getattr(layer, name)
        kept = value.clone()
        value.copy_(own.data)
        own.data.copy_(kept)


def set_mode(layer: DoRALinear, training: bool) -> None:
    """As Lightning gives a module its mode back."""
    for module in layer.modules():
        module.training = training


@pytest.mark.parametrize("stays_in_evaluation", [False, True])
@pytest.mark.parametrize("evaluation", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_fresh_around_an_evaluation_of_averaged_weights(
    layer: DoRALinear, no_contents: None, stays_in_evaluation: bool, evaluation: Callable
) -> None:
    if stays_in_evaluation:
        layer.eval()
    average = {name: torch.randn_like(getattr(layer, name)) for name in ("lora_A", "lora_B", "magnitude")}
    for _ in range(2):
        layer(torch.randn(2, 12)).sum().backward()
        training = layer.training
        layer.eval()
        swap(layer, average)
        with evaluation():
            assert_fresh(layer)
        swap(layer, average)
        set_mode(layer, training)
        assert_fresh(layer)


def test_fresh_after_an_evaluation_without_a_change_of_mode(layer: DoRALinear, no_contents: None) -> None:
    average = {"lora_B": torch.randn_like(layer.lora_B)}
    layer(torch.randn(2, 12))
    swap(layer, average)
    with torch.no_grad():
        assert_fresh(layer)
    swap(layer, average)
    assert_fresh(layer)


def test_fresh_after_weights_that_are_loaded_into_memory_of_their_own(layer: DoRALinear, no_contents: None) -> None:
    """As FSDP2's shards are: the gathered tensors, which the layer sees, keep identity and version."""
    state = {name: tensor + 0.3 for name, tensor in layer.state_dict().items()}
    version = layer.lora_B._version
    with torch.autograd._unsafe_preserve_version_counter((*layer.parameters(),)):
        layer.load_state_dict(state)
    assert layer.lora_B._version == version
    assert_fresh(layer)


def test_evaluated_anew_where_contents_cannot_be_compared(norms: list[int]) -> None:
    layer = adapted("dora").to("meta")
    norms.clear()
    x = torch.randn(2, 12, device="meta")
    for _ in range(2):
        layer(x)
    assert len(norms) == 1
    with torch.no_grad():
        layer(x), layer(x)
        assert len(norms) == 3
        with weights_kept():
            layer(x), layer(x)
        assert len(norms) == 4


def test_a_mode_that_is_set_again_at_each_step_costs_no_norm(layer: DoRALinear, norms: list[int]) -> None:
    for _ in range(3):
        layer.train()
        layer(torch.randn(2, 12))
    assert norms == []


def test_what_nothing_shows_can_be_said(layer: DoRALinear, no_contents: None) -> None:
    before = layer.norm()
    layer.lora_B.data.add_(0.3)
    assert layer.norm() is before  # of what the documentation says is not seen on a GPU
    forget_norms(nn.Sequential(layer))
    assert_fresh(layer)


def reassign(layer: DoRALinear) -> None:
    state = {name: tensor + 0.3 for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def load(layer: DoRALinear) -> None:
    layer.load_state_dict({name: tensor + 0.3 for name, tensor in layer.state_dict().items()})


def replace_base_in_place_of_a_freed_one(layer: DoRALinear) -> None:
    """The new parameter may get the id and the memory of the old one."""
    value = (layer.weight + 0.3).tolist()
    del layer.base_layer.weight
    gc.collect()
    layer.base_layer.weight = nn.Parameter(torch.tensor(value), requires_grad=False)


EDITS: dict[str, Callable[[DoRALinear], object]] = {
    "lora_A in place": lambda layer: layer.lora_A.add_(0.3),
    "lora_B in place": lambda layer: layer.lora_B.mul_(2),
    "lora_A.data in place": lambda layer: layer.lora_A.data.add_(0.3),
    "lora_B.data one value": lambda layer: layer.lora_B.data[3, 1].add_(0.3),
    "lora_B.data set": lambda layer: setattr(layer.lora_B, "data", layer.lora_B.data + 0.3),
    "base copy_": lambda layer: layer.weight.copy_(layer.weight + 0.3),
    "base.data set": lambda layer: setattr(layer.weight, "data", layer.weight.data + 0.3),
    "base replaced": replace_base_in_place_of_a_freed_one,
    "load_state_dict": load,
    "load_state_dict, assign": reassign,
    "to bfloat16": lambda layer: layer.to(torch.bfloat16),
    "to float64": lambda layer: layer.double(),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_fresh_after(layer: DoRALinear, edit: Callable[[DoRALinear], object]) -> None:
    with torch.no_grad():
        edit(layer)
    assert_fresh(layer)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_go_their_own_way(layer: DoRALinear, duplicate: Callable[[DoRALinear], DoRALinear]) -> None:
    other = duplicate(layer)
    with torch.no_grad():
        other.lora_B.add_(0.3)
        other.weight.add_(0.3)
    assert_fresh(other)
    with torch.no_grad():
        layer.lora_B.sub_(0.3)
    assert_fresh(layer)
    assert_fresh(other)


def test_another_tensor_at_the_same_address_is_another_tensor() -> None:
    cache, weight = NormCache(), torch.ones(2)
    assert cache.get(lambda: torch.ones(1), large=[weight], small=[]) == 1
    assert cache.get(lambda: torch.zeros(1), large=[weight.view(2)], small=[]) == 0


def test_norm_under_autocast_is_fp32(layer: DoRALinear) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer.lora_B.add_(0.3)
        layer(torch.randn(2, 12))
    assert_fresh(layer)


def test_training_after_inference_mode(layer: DoRALinear) -> None:
    with torch.no_grad():
        layer.lora_B.add_(0.3)
    with torch.inference_mode():
        layer(torch.randn(2, 12))
    assert not layer.norm().is_inference()
    layer(torch.randn(2, 12)).sum().backward()
    assert_fresh(layer)


def test_the_state_dict_holds_no_norm(layer: DoRALinear) -> None:
    assert set(layer.state_dict()) == {"lora_A", "lora_B", "magnitude", "base_layer.weight", "base_layer.bias"}


def test_clear() -> None:
    cache, weight = NormCache(), torch.ones(2)
    values = iter([torch.ones(1), torch.zeros(1)])
    assert cache.get(lambda: next(values), large=[weight], small=[]) == 1
    assert cache.get(lambda: next(values), large=[weight], small=[]) == 1
    cache.clear()
    assert cache.get(lambda: next(values), large=[weight], small=[]) == 0


@pytest.mark.parametrize(
    "edit",
    [
        lambda layer: layer.magnitude.mul_(2),
        lambda layer: layer.magnitude.data.add_(1),
        lambda layer: layer.lora_B.data.add_(0.3),
    ],
)
def test_outputs_without_gradients_are_fresh_too(layer: DoRALinear, edit: Callable[[DoRALinear], object]) -> None:
    x = torch.randn(2, 12)
    with torch.no_grad():
        before = layer(x)
        edit(layer)
        after = layer(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, layer(x).detach())


def test_kept_weights_are_looked_at_once_in_each_promise(layer: DoRALinear, norms: list[int]) -> None:
    with torch.no_grad():
        layer.norm()
        norms.clear()
        with weights_kept():
            first = layer.norm()
            layer.lora_B.add_(0.3)  # what was promised not to happen
            with weights_kept():
                assert layer.norm() is first
        second = layer.norm()
        assert not torch.equal(second, first)
        with weights_kept():
            assert layer.norm() is second
            layer.lora_A.add_(0.3)
        with weights_kept():
            assert not torch.equal(layer.norm(), second)
    assert len(norms) == 2


def test_an_error_leaves_no_stale_norm() -> None:
    cache, weight = NormCache(), torch.ones(2)

    def fail() -> torch.Tensor:
        raise RuntimeError

    with weights_kept():
        assert cache.get(lambda: torch.ones(1), large=[weight], small=[]) == 1
    with torch.no_grad():
        weight.add_(1)
    with weights_kept():
        with pytest.raises(RuntimeError):
            cache.get(fail, large=[weight], small=[])
        assert cache.get(lambda: torch.zeros(1), large=[weight], small=[]) == 0
