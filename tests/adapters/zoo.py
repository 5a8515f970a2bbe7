"""Every kind of layer that is adapted: how to make one, its input, PEFT's twin, and the same in dense float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dora_lightning.adapters import AdapterConfig, AdapterLayer, inject_adapters
from tests.adapters.perturbed import perturb


@dataclass
class Kind:
    """One kind of base layer.

    ``matrix`` is ``W [out, in]`` of a stored weight and ``stored`` the way back, written apart from the library;
    ``apply`` computes the base layer with another weight and bias.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    apply: Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]
    matrix: Callable[[Tensor], Tensor] = lambda weight: weight.reshape(len(weight), -1)
    stored: Callable[[Tensor, Tensor], Tensor] = lambda matrix, weight: matrix.reshape(weight.shape)
    groups: int = 1
    features: int = -1
    """The dimension of outputs that magnitudes belong to."""


def _transposed(matrix: Tensor, weight: Tensor) -> Tensor:
    return matrix.T


def _convolved(function: Callable[..., Tensor]) -> Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]:
    def apply(base: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        pads = [side for size in reversed(base.padding) for side in (size, size)]
        x = F.pad(x, pads, mode={"zeros": "constant"}.get(base.padding_mode, base.padding_mode))
        return function(x, weight, bias, base.stride, 0, base.dilation, base.groups)

    return apply


def _conv1d_of_transformers() -> nn.Module:
    layer = Conv1D(10, 12)
    nn.init.normal_(layer.weight, std=0.3)
    nn.init.normal_(layer.bias)
    return layer


def _reals(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


KINDS: dict[str, Kind] = {
    "Linear": Kind(lambda: nn.Linear(12, 10), _reals(3, 5, 12), lambda base, x, w, b: F.linear(x, w, b)),
    "Conv1D": Kind(
        _conv1d_of_transformers,
        _reals(3, 5, 12),
        lambda base, x, w, b: x @ w + b,
        matrix=lambda weight: weight.T,
        stored=_transposed,
    ),
    "conv1d": Kind(lambda: nn.Conv1d(6, 10, 3, stride=2, padding=1), _reals(2, 6, 9), _convolved(F.conv1d), features=1),
    "conv2d": Kind(lambda: nn.Conv2d(4, 10, 3, padding=1), _reals(2, 4, 6, 5), _convolved(F.conv2d), features=1),
    "conv2d 1x1": Kind(lambda: nn.Conv2d(12, 10, 1, bias=False), _reals(2, 12, 4, 4), _convolved(F.conv2d), features=1),
    "conv2d dilated, reflecting": Kind(
        lambda: nn.Conv2d(4, 10, 3, padding=2, dilation=2, padding_mode="reflect"),
        _reals(2, 4, 6, 5),
        _convolved(F.conv2d),
        features=1,
    ),
    "conv2d groups": Kind(
        lambda: nn.Conv2d(8, 12, 3, groups=2), _reals(2, 8, 6, 5), _convolved(F.conv2d), groups=2, features=1
    ),
    "conv2d depthwise": Kind(
        lambda: nn.Conv2d(4, 4, 3, groups=4), _reals(2, 4, 6, 5), _convolved(F.conv2d), groups=4, features=1
    ),
    "conv3d": Kind(lambda: nn.Conv3d(2, 10, 2), _reals(2, 2, 4, 3, 3), _convolved(F.conv3d), features=1),
    "Embedding": Kind(
        lambda: nn.Embedding(20, 10),
        lambda: torch.randint(0, 20, (4, 7)),
        lambda base, x, w, b: w[x],
        matrix=lambda weight: weight.T,
        stored=_transposed,
    ),
}
# B and the magnitude learn from the padding too, as in PEFT, although the embedding's own row does not
PADDED = replace(KINDS["Embedding"], make=lambda: nn.Embedding(20, 10, padding_idx=3))
PLAIN = ["Linear", "Conv1D", "conv1d", "conv2d", "conv2d 1x1", "conv3d", "Embedding"]
"""Kinds that PEFT computes too: it ignores dilation and padding mode, and mixes groups."""


def kind_of(name: str) -> Kind:
    return PADDED if name == "Embedding padding" else KINDS[name]


def adapted(kind: str, method: str, **options: Any) -> tuple[AdapterLayer, Tensor]:
    """A perturbed adapter around a layer of that kind, and an input."""
    torch.manual_seed(0)
    if method != "magnitude":
        options = {"rank": 4} | options
    model = nn.Sequential(kind_of(kind).make())
    inject_adapters(model, AdapterConfig(method=method, target_modules=["0"], **options))
    perturb(model)
    layer = model[0]
    assert isinstance(layer, AdapterLayer)
    return layer, kind_of(kind).inputs()


def dense(kind: str, layer: AdapterLayer, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and weight by the formula, in float64, and the leaves it was computed from, to be differentiated.

    The norm is held constant, as the paper says, unless ``detach_norm=False``.
    """
    spec, base = KINDS[kind], layer.base_layer
    leaves = {
        name: parameter.detach().double().requires_grad_() for name, parameter in layer.named_parameters(recurse=False)
    }
    W = spec.matrix(base.weight.detach().double())
    if "lambda_d" in leaves:
        A0, B0 = layer.pair.on(torch.device("cpu"))
        A = leaves["lambda_d"].diag() @ A0[:, : W.shape[1]].double()
        update = leaves["lambda_b"].diag() @ B0[: W.shape[0]].double() @ A
    elif "lora_A" in leaves:
        update = layer.scaling * _by_groups(leaves["lora_A"], leaves["lora_B"], spec.groups)
        if layer.init_A is not None:
            update = update - layer.scaling * layer.init_B.double() @ layer.init_A.double()
    else:
        update = torch.zeros_like(W)
    V = W + update
    if "magnitude" in leaves:
        axis = 1 if layer.norm_axis == "out" else 0
        norm = V.norm(dim=axis)
        gain = leaves["magnitude"] / (norm.detach() if getattr(layer, "detach_norm", True) else norm)
        V = V * (gain[:, None] if axis == 1 else gain)
    weight = spec.stored(V, base.weight)
    bias = None if layer.bias is None else layer.bias.detach().double()
    if x.is_floating_point():
        x = leaves["x"] = x.detach().double().requires_grad_()
    return spec.apply(base, x, weight, bias), leaves | {"merged": weight}


def _by_groups(A: Tensor, B: Tensor, groups: int) -> Tensor:
    return torch.cat([b @ a for a, b in zip(A.chunk(groups), B.chunk(groups), strict=True)])


def peft_config(layer: AdapterLayer, **options: Any) -> peft.PeftConfig:
    if layer.method == "vera":
        return peft.VeraConfig(r=layer.rank, target_modules=["0"], **options)
    return peft.LoraConfig(
        r=layer.rank,
        lora_alpha=layer.scaling * layer.rank,
        target_modules=["0"],
        use_dora=layer.method == "dora",
        **options,
    )


def peft_twin(kind: str, layer: AdapterLayer, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """PEFT's layer with the very values of ``layer``, and its parameters under our names."""
    base = kind_of(kind).make()
    base.load_state_dict(layer.base_layer.state_dict())
    twin = peft.get_peft_model(nn.Sequential(base), peft_config(layer, **options)).base_model.model[0]
    if layer.method == "vera":
        parameters = {"lambda_d": twin.vera_lambda_d["default"], "lambda_b": twin.vera_lambda_b["default"]}
    elif isinstance(base, nn.Embedding):
        parameters = {"lora_A": twin.lora_embedding_A["default"], "lora_B": twin.lora_embedding_B["default"]}
    else:
        parameters = {"lora_A": twin.lora_A["default"].weight, "lora_B": twin.lora_B["default"].weight}
    if layer.method == "dora":
        parameters["magnitude"] = twin.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(getattr(layer, name).reshape(parameter.shape))
    return twin, parameters
