"""Magnitudes and directions move as the paper's formulas say, computed densely in float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dora_lightning.adapters import AdapterConfig, AdapterLayer, inject_adapters, merge_adapters
from dora_lightning.adapters.analysis import WeightChange, correlation, layer_change, weight_change
from tests.adapters.zoo import KINDS, adapted, dense


def by_the_book(before: Tensor, after: Tensor, norm_axis: str = "out") -> tuple[float, float]:
    """Equations 4 and 5 over ``[out, in]``, in float64, with 1 - cos as half the squared distance of unit vectors."""
    axis = 1 if norm_axis == "out" else 0
    old, new = before.double(), after.double()
    magnitudes = [matrix.norm(dim=axis) for matrix in (old, new)]
    units = [nn.functional.normalize(matrix, dim=axis) for matrix in (old, new)]
    away = (units[1] - units[0]).square().sum(axis) / 2
    return float((magnitudes[1] - magnitudes[0]).abs().mean()), float(away.mean())


def config(method: str, **options: Any) -> AdapterConfig:
    return AdapterConfig(method, target_modules=["0"], **({} if method == "magnitude" else {"rank": 4}) | options)


def moved(kind: str, method: str, by: float, **options: Any) -> tuple[AdapterLayer, Tensor]:
    """A layer whose parameters are ``by`` of the way from where training starts to where the zoo has them."""
    layer, x = adapted(kind, method, **options)
    torch.manual_seed(0)
    fresh = inject_adapters(nn.Sequential(KINDS[kind].make()), config(method, **options))
    start = dict(fresh[0].named_parameters(recurse=False))
    with torch.no_grad():
        for name, parameter in layer.named_parameters(recurse=False):
            parameter.copy_(start[name] + by * (parameter - start[name]))
    return layer, x


@pytest.mark.parametrize("by", [1.0, 1e-4])
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "dvora", "magnitude"])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "conv2d", "conv2d groups", "Embedding"])
def test_a_layer_moves_as_its_dense_weight_in_float64(kind: str, method: str, by: float) -> None:
    if kind == "conv2d groups" and method in ("vera", "dvora"):
        pytest.skip("one random pair does not fit groups")
    layer, x = moved(kind, method, by)
    matrix = KINDS[kind].matrix
    delta_m, delta_d = by_the_book(
        matrix(layer.base_layer.weight.detach()), matrix(dense(kind, layer, x)[1]["merged"].detach())
    )
    change = layer_change(layer)
    assert change.delta_m == pytest.approx(delta_m, rel=1e-6)
    # the book's own rounding, where the direction did not move at all
    assert change.delta_d == pytest.approx(delta_d, rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("by", [1.0, 1e-4])
@pytest.mark.parametrize("method", ["dora", "dvora", "magnitude"])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_magnitudes_of_inputs(kind: str, method: str, by: float) -> None:
    layer, x = moved(kind, method, by, norm_axis="in")
    matrix = KINDS[kind].matrix
    old, new = matrix(layer.base_layer.weight.detach()), matrix(dense(kind, layer, x)[1]["merged"].detach())
    assert layer_change(layer) == pytest.approx(by_the_book(old, new, "in"), rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("by", [1.0, 1e-4])
@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian", "orthogonal"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_first_values_are_taken_out_of_the_update(method: str, init: str, by: float) -> None:
    layer, x = moved("Linear", method, by, init=init)
    new = dense("Linear", layer, x)[1]["merged"].detach()
    assert layer_change(layer) == pytest.approx(by_the_book(layer.base_layer.weight.detach(), new), rel=1e-6)


@pytest.mark.parametrize("method", ["lora", "dora", "magnitude"])
def test_of_a_quantised_base_the_weight_that_is_computed_with_counts(method: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(128, 24, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    model = nn.Sequential(base).to("cpu")
    weight = bnb.functional.dequantize_4bit(model[0].weight.data, model[0].weight.quant_state).double()
    inject_adapters(
        model, AdapterConfig(method, target_modules=["0"], **({} if method == "magnitude" else {"rank": 4}))
    )
    layer: Any = model[0]
    with torch.no_grad():
        for parameter in layer.parameters(recurse=False):
            if parameter.requires_grad:
                parameter.add_(1e-3 * torch.randn_like(parameter))
    new = weight if method == "magnitude" else weight + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    if method != "lora":
        new = new * (layer.magnitude.double() / new.norm(dim=1))[:, None]
    assert layer_change(layer) == pytest.approx(by_the_book(weight, new.detach()), rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_two_weights_larger_than_a_block(dtype: torch.dtype, axis: str) -> None:
    torch.manual_seed(0)
    before = torch.randn(300, 4100).to(dtype)
    after = (before.float() * (1 + 1e-2 * torch.randn_like(before, dtype=torch.float32))).to(dtype)
    expected = by_the_book(before, after, axis)
    copies = before.clone(), after.clone()
    assert weight_change(before, after, axis) == pytest.approx(expected, rel=1e-9)
    stored = weight_change(before.T.contiguous(), after.T.contiguous(), axis, transposed=True)
    assert stored == pytest.approx(expected, rel=1e-9)
    assert torch.equal(before, copies[0])
    assert torch.equal(after, copies[1])


def test_an_adapter_and_its_merged_weight_agree() -> None:
    layer, _ = moved("conv2d", "dora", 0.1)
    weight = layer.base_layer.weight.detach().clone()
    change = layer_change(layer)
    merge_adapters(nn.Sequential(layer))
    assert weight_change(weight, layer.base_layer.weight) == pytest.approx(change, rel=1e-4)
    with pytest.raises(ValueError, match="unmerge it first"):
        layer_change(layer)


def test_turned_round_and_zero_rows() -> None:
    before = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    after = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
    # the first turned by 180 degrees, the last by 90, the one of zeros has no direction
    assert weight_change(before, after) == WeightChange(pytest.approx(1 / 3), pytest.approx(1.5))
    model = inject_adapters(nn.Sequential(nn.Linear(2, 2)), config("magnitude"))
    layer: Any = model[0]
    with torch.no_grad():
        layer.magnitude[0] *= -1
    assert layer_change(layer).delta_d == pytest.approx(1.0)  # one of two points the other way


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape, .* got \(2, 3\) and \(3, 2\)"):
        weight_change(torch.ones(2, 3), torch.ones(3, 2))


def test_correlation_is_numpys_and_says_why_there_is_none() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    changes = [WeightChange(m, d) for d, m in zip(1e-6 * x, 5 + 0.3 * x + y, strict=True)]
    assert correlation(changes).r == pytest.approx(np.corrcoef(x, 5 + 0.3 * x + y)[0, 1])
    for few, reason in (
        (changes[:2], "needs at least 3 points, there are 2"),
        ([WeightChange(1.0, d) for d in x], "delta_m is the same everywhere"),
        ([WeightChange(m, 0.0) for m in y], "delta_d is the same everywhere"),
    ):
        result = correlation(few)
        assert math.isnan(result.r)
        assert result.reason == reason
