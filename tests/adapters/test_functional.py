"""The pure functions against dense float64 formulas, and what training must never build."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dora_lightning.adapters import functional
from dora_lightning.adapters.functional import adapted_norm, adapter_linear, decompose, merge_weight, weight_norm_sq
from tests.adapters.perturbed import adapted, assert_close

S = 1.5


def operands(
    tokens: tuple[int, ...] = (7,), in_: int = 12, out: int = 10, rank: int = 4, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (*tokens, in_), "weight": (out, in_), "lora_A": (rank, in_), "lora_B": (out, rank), "bias": (out,)}
    made = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    return {**made, "gain": 1 + 0.1 * torch.randn(out, dtype=torch.promote_types(dtype, torch.float32))}


def dense(x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor, gain: Tensor) -> Tensor:
    return gain * (x @ weight.T + S * (x @ lora_A.T) @ lora_B.T) + bias


def test_every_gradient_by_finite_differences() -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in operands((2, 3)).items()}
    assert torch.autograd.gradcheck(
        lambda *args: adapter_linear(**dict(zip(tensors, args, strict=True)), scaling=S), tuple(tensors.values())
    )


@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2, 3), (2, 0, 3), (1500,)])
def test_shapes_of_the_batch(tokens: tuple[int, ...]) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in operands(tokens).items()}
    y, expected = adapter_linear(**tensors, scaling=S), dense(**tensors)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, list(tensors.values()), dy)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, list(tensors.values()), dy))


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_input_and_gradient_that_are_not_contiguous(layout: str) -> None:
    tensors = operands()
    x = {
        "transposed": torch.randn(5, 3, 12, dtype=torch.float64).transpose(0, 1),
        "expanded": torch.randn(1, 1, 12, dtype=torch.float64).expand(3, 5, 12),
        "strided": torch.randn(3, 5, 24, dtype=torch.float64)[..., ::2],
    }[layout]
    tensors = {name: tensor.requires_grad_() for name, tensor in {**tensors, "x": x}.items()}
    y, expected = adapter_linear(**tensors, scaling=S), dense(**tensors)
    torch.testing.assert_close(y, expected)
    # sum() hands back an expanded gradient
    grads = torch.autograd.grad(y.sum(), list(tensors.values()))
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), list(tensors.values())))


def test_trainable_weight_and_bias_get_their_gradient() -> None:
    layer = adapted("dora", dtype=torch.float64)
    layer.base_layer.requires_grad_(True)
    x, dy = torch.randn(7, 12, dtype=torch.float64), torch.randn(7, 10, dtype=torch.float64)
    layer(x).backward(dy)
    W, b = layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_()
    dense_y = (layer.magnitude / layer.norm()).detach() * (x @ (W + 2 * layer.lora_B @ layer.lora_A).T) + b
    expected = torch.autograd.grad(dense_y, [W, b], dy)
    torch.testing.assert_close((layer.weight.grad, layer.bias.grad), expected)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("train_base", [True, False])
def test_layer_against_a_dense_formula(axis: str, detach: bool, train_base: bool) -> None:
    layer = adapted("dora", norm_axis=axis, detach_norm=detach, dtype=torch.float64)
    layer.base_layer.requires_grad_(train_base)
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(7, 10, dtype=torch.float64)
    parameters = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y = layer(x)
    V = layer.weight + 2 * layer.lora_B @ layer.lora_A
    n = V.norm(dim=1 if axis == "out" else 0)
    g = layer.magnitude / (n.detach() if detach else n)
    expected = x @ (g[:, None] * V if axis == "out" else V * g).T + layer.bias
    torch.testing.assert_close(y, expected)
    actual_grads = torch.autograd.grad(y, parameters, dy)
    torch.testing.assert_close(actual_grads, torch.autograd.grad(expected, parameters, dy))


@pytest.mark.parametrize("method", ["dora", "magnitude"])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_zero_rows_and_columns_give_no_nan(method: str, axis: str) -> None:
    base = nn.Linear(12, 10)
    with torch.no_grad():
        base.weight[3] = 0
        base.weight[:, 5] = 0
    layer = adapted(method, norm_axis=axis)
    layer.base_layer = base
    layer.reset_parameters()
    for detach in (True, False):
        layer.detach_norm = detach
        x = torch.randn(7, 12, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        assert torch.equal(y[:, 3], base.bias[3].expand(7)) if axis == "out" else True
        for tensor in (y, x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)):
            assert tensor.isfinite().all()


def test_gradient_of_a_magnitude_that_is_zero() -> None:
    layer = adapted("dora", dtype=torch.float64)
    with torch.no_grad():
        layer.magnitude[2] = 0
    x, dy = torch.randn(7, 12, dtype=torch.float64), torch.randn(7, 10, dtype=torch.float64)
    layer(x).backward(dy)
    V = (layer.weight + 2 * layer.lora_B @ layer.lora_A).detach()
    torch.testing.assert_close(layer.magnitude.grad, (dy * (x @ V.T)).sum(0) / V.norm(dim=1))
    assert layer.magnitude.grad[2] != 0


class Sizes(TorchDispatchMode):
    """Shapes of every tensor that an operation makes or writes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(made):
            # views, such as W^T, take no memory
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.seen.add(tuple(tensor.shape))
        return made


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_training_builds_nothing_of_the_weights_size(method: str, cached: bool) -> None:
    layer = adapted(method, 52, 68)
    x = torch.randn(5, 52, requires_grad=True)
    layer(x)
    if not cached:
        with torch.no_grad():
            layer.lora_B.add_(1)
    with Sizes() as sizes:
        layer(x).sum().backward()
    assert (5, 68) in sizes.seen
    assert not {(68, 52), (52, 68)} & sizes.seen
    with Sizes() as sizes:
        layer.lora_B @ layer.lora_A
    assert (68, 52) in sizes.seen  # the check sees what it is for


@pytest.mark.parametrize("method", ["dora", "magnitude"])
def test_half_precision_weight_is_widened_in_pieces(method: str) -> None:
    layer = adapted(method, 1024, 1024, bias=False)
    layer.bfloat16()
    x = torch.randn(5, 1024, dtype=torch.bfloat16, requires_grad=True)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        layer(x).sum().backward()
    deltas = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(deltas, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak < 4 * 1024 * 1024 * 0.6  # a whole fp32 copy would be 4 MiB


def test_second_derivative_is_refused() -> None:
    layer = adapted("dora")
    x = torch.randn(7, 12, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_backward_twice_over_a_retained_graph() -> None:
    layer = adapted("dora")
    x = torch.randn(7, 12, requires_grad=True)
    y = layer(x).square().sum()
    y.backward(retain_graph=True)
    first = [p.grad.clone() for p in (x, layer.lora_A, layer.lora_B, layer.magnitude)]
    y.backward()
    for once, twice in zip(first, (x, layer.lora_A, layer.lora_B, layer.magnitude), strict=True):
        torch.testing.assert_close(twice.grad, 2 * once)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("setting", ["bf16", "autocast"])
@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
def test_half_precision_against_float64(method: str, setting: str, axis: str) -> None:
    if method == "lora" and axis == "in":
        pytest.skip("LoRA has no norm")
    layer = adapted(method, 256, 192, **({} if method == "lora" else {"norm_axis": axis}))
    x = torch.randn(64, 256, requires_grad=True)
    dy = torch.randn(64, 192).bfloat16()
    if setting == "bf16":
        layer.bfloat16()
        x = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(dy)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    wide = {name: getattr(layer, name).detach().double().requires_grad_() for name in names}
    wide["x"] = x.detach().double().requires_grad_()
    V = layer.weight.double()
    if method != "magnitude":
        V = V + layer.scaling * wide["lora_B"] @ wide["lora_A"]
    if method != "lora":
        g = wide["magnitude"] / V.detach().norm(dim=1 if axis == "out" else 0)
        V = g[:, None] * V if axis == "out" else V * g
    expected = wide["x"] @ V.T + layer.bias.double()
    grads = torch.autograd.grad(expected, list(wide.values()), dy.double())
    eps = 2**-8  # half of bf16's spacing above 1; each value passes through three or four roundings
    assert_close(y, expected.detach(), 2 * eps)
    for name, grad in zip(wide, grads, strict=True):
        assert_close(x.grad if name == "x" else getattr(layer, name).grad, grad, 4 * eps)
    for name in names:
        assert getattr(layer, name).dtype == getattr(layer, name).grad.dtype == torch.float32


@pytest.mark.parametrize("axis", ["out", "in"])
def test_gain_is_not_rounded_to_bf16(axis: str) -> None:
    layer = adapted("magnitude", 256, 192, bias=False, norm_axis=axis).bfloat16()
    layer.reset_parameters()
    x = torch.randn(512, 256, dtype=torch.bfloat16)
    before = layer(x).double()
    with torch.no_grad():
        layer.magnitude.mul_(1.003)
    # bf16(1.003) is 1; the products are rounded, some up and some down, and only their mean tells
    ratio = (layer(x).double() * before).sum() / before.square().sum()
    assert 1.001 < ratio < 1.006


def test_norm_by_hand_and_where_the_sum_cancels() -> None:
    W = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    A, B = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [-0.5]])
    norm = adapted_norm(W, A, B, 2.0, weight_norm_sq(W))
    assert norm[0] == 5
    assert 0 < norm[1] < 1e-6


@pytest.mark.parametrize("axis", ["out", "in"])
def test_merge_weight_against_float64(axis: str) -> None:
    t = operands(dtype=torch.float32)
    m = torch.rand(10 if axis == "out" else 12) + 0.5
    V = t["weight"].double() + S * t["lora_B"].double() @ t["lora_A"].double()
    expected = m.double()[:, None] * V / V.norm(dim=1, keepdim=True) if axis == "out" else m * V / V.norm(dim=0)
    assert_close(merge_weight(t["weight"], t["lora_A"], t["lora_B"], S, m, axis), expected, 1e-6)
    half = t["weight"].bfloat16()
    V = half.double() + S * t["lora_B"].double() @ t["lora_A"].double()
    expected = m.double()[:, None] * V / V.norm(dim=1, keepdim=True) if axis == "out" else m * V / V.norm(dim=0)
    merged = merge_weight(half, t["lora_A"], t["lora_B"], S, m, axis)
    # rounded once: the nearest bf16
    assert (merged == expected.bfloat16()).double().mean() > 0.99


def test_merge_weight_without_an_update_is_a_copy() -> None:
    W = torch.randn(3, 4)
    merged = merge_weight(W)
    assert torch.equal(merged, W)
    assert merged.data_ptr() != W.data_ptr()


def test_decompose() -> None:
    magnitude, direction = decompose(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    assert torch.equal(magnitude, torch.tensor([5.0, 0.0]))
    torch.testing.assert_close(direction, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


@pytest.mark.parametrize("tokens", [5, 50])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_the_gain_in_either_factor_gives_one_gradient(tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    # fewer tokens than the 20 inputs, and more: the gain goes into the gradient, or into the weight
    generator = torch.Generator().manual_seed(0)
    dy, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((tokens, 30), (30, 20)))
    gain = 1 + 0.1 * torch.randn(30, generator=generator)
    found = functional._product_with_gain(dy, gain, weight)
    assert found.dtype == dtype
    expected = (gain.double() * dy.double()) @ weight.double()
    assert float((found.double() - expected).abs().max() / expected.abs().max()) < tolerance
    torch.testing.assert_close(functional._product_with_gain(dy, None, weight), dy @ weight)
