"""Frozen linear layers whose weight is stored in a few bits, as bitsandbytes and torchao store it (QDoRA).

What such a layer computes with is ``W_dq [out, in]``, its weight dequantised. Norms, magnitudes and merged weights are
those of ``W_dq``, so training starts at the quantised model's very function. ``W_dq`` is made a few rows at a time and
in fp32: no norm needs it whole. (The layer itself applied to the rows of ``A`` would give ``W_dq A^T`` too, but rounded
to its compute dtype, and with 8 bits of bitsandbytes with ``A`` quantised as well; and it dequantises all of ``W``.)

Layers are known by their weights' types; neither library is imported before one is met.

====================  ==================================  ===========================================
scheme                layer                               packed
====================  ==================================  ===========================================
``nf4``, ``fp4``      ``Linear4bit`` of bitsandbytes      two values a byte, a scale per block
``nf4-dq, fp4-dq``    the same                            the scales quantised too (QLoRA)
``int8``              ``Linear8bitLt`` of bitsandbytes    a scale per row
``torchao-...``       ``nn.Linear``, weight of torchao    by the weight's type
====================  ==================================  ===========================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SLAB_ELEMENTS = {"cpu": 2**17}
_SLAB_ELEMENTS_DEFAULT = 2**24


def is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer of one of the libraries, its weight packed."""
    return isinstance(module, nn.Linear) and _kind(module.weight) != ""


def check_dequantises(module: nn.Module) -> None:
    """Check that a quantised layer's library gives its weight back.

    Raises:
        ValueError: it does not, on this device.
    """
    weight: Any = module.weight
    if _kind(weight) == "4bit" and weight.device.type == "cpu" and _shape(module)[1] % weight.quant_state.blocksize:
        # its kernel takes each row to begin a block, while quantising has blocks go on from row to row
        raise ValueError(
            f"on a CPU bitsandbytes dequantises {_shape(module)[1]} input features wrongly, which are no multiple of "
            f"the {weight.quant_state.blocksize} weights that share a scale; exclude the module or use int8"
        )


def scheme_of(module: nn.Module) -> dict[str, Any]:
    """How the weight of a quantised layer came about, in plain containers, enough to do it again.

    ``scheme``; ``dtype``, which the weight had before; ``device``, whose arithmetic may round differently; and with
    4 bits the ``blocksize``.
    """
    weight: Any = module.weight
    kind, device = _kind(weight), weight.device.type
    if kind == "4bit":
        state = weight.quant_state
        scheme = state.quant_type + ("-dq" if state.nested else "")
        return {"scheme": scheme, "dtype": _name(state.dtype), "device": device, "blocksize": state.blocksize}
    if kind == "8bit":
        return {"scheme": "int8", "dtype": "float16", "device": device}
    return {"scheme": f"torchao-{type(weight).__name__}", "dtype": _name(weight.dtype), "device": device}


def packed_tensors(module: nn.Module) -> list[Tensor]:
    """The tensors that the weight is stored in: any change to ``W_dq`` is one of theirs."""
    weight: Any = module.weight
    kind = _kind(weight)
    if kind == "4bit":
        state = weight.quant_state
        nested = [state.offset, state.state2.absmax] if state.nested else []
        return [weight, state.absmax, *nested]
    if kind == "8bit":
        return [weight, _row_scales(module)]
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


def row_slabs(module: nn.Module) -> Iterator[tuple[slice, Tensor]]:
    """``W_dq`` in fp32, a few rows at a time, with the rows they are."""
    weight: Any = module.weight
    rows, columns = _shape(module)
    kind = _kind(weight)
    height = max(1, _SLAB_ELEMENTS.get(weight.device.type, _SLAB_ELEMENTS_DEFAULT) // columns)
    if kind == "4bit":
        # a slab begins where a block of values that share a scale begins, and where a byte does
        unit = weight.quant_state.blocksize
        unit //= math.gcd(unit, columns)
        height = max(unit, height // unit * unit)
        scales = _block_scales(weight.quant_state)
    for first in range(0, rows, height):
        part = slice(first, min(rows, first + height))
        if kind == "4bit":
            yield part, _dequantized_blocks(weight, scales, part, columns)
        elif kind == "8bit":
            yield part, weight.data[part].float() * (_row_scales(module)[part, None] / 127)
        else:
            yield part, weight.detach()[part].dequantize().float()


def dequantized(module: nn.Module) -> Tensor:
    """``W_dq [out, in]`` in fp32, whole."""
    return torch.cat([slab for _, slab in row_slabs(module)])


def norm_sq(module: nn.Module) -> Tensor:
    """``|W_dq|^2`` of each row, ``[out]``."""
    return torch.cat([slab.square().sum(dim=1) for _, slab in row_slabs(module)])


def products_with_rows(module: nn.Module, A: Tensor) -> Tensor:
    """``W_dq A^T [out, rank]`` in fp32, differentiable in ``A [rank, in]``."""
    return _ProductsWithRows.apply(A, module)


def product(module: nn.Module, x: Tensor) -> Tensor:
    """What the layer gives for ``x [..., in]``, by its own kernel and backward pass, without its bias."""
    with _without_bias(module):
        return module(x)


def keep_packing(model: nn.Module) -> None:
    """Have the 4-bit layers in ``model`` keep their format in evaluation.

    On some CPUs bitsandbytes packs weights anew for inference, and from then on the layer has no backward pass.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False
            if is_quantized(layer) and getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                layer.state_dict()  # puts the format back


def plain_linear(module: nn.Module, weight: Tensor) -> nn.Linear:
    """An ``nn.Linear`` that computes with ``weight [out, in]`` and the bias of a quantised layer."""
    rows, columns = weight.shape
    bias = module.bias
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if isinstance(bias, Tensor):
        linear.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return linear.train(module.training)


def quantize_again(weight: Tensor, scheme: dict[str, Any]) -> nn.Module:
    """A layer without bias, quantised from ``weight [out, in]`` as :func:`scheme_of` says of another.

    Raises:
        ValueError: the scheme is none that this can repeat.
        ModuleNotFoundError: its library is not installed.
    """
    name, dtype = scheme["scheme"], getattr(torch, scheme["dtype"])
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    if name == "torchao-Int8Tensor":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(linear, Int8WeightOnlyConfig())
        return linear
    if name.startswith("torchao-"):
        raise ValueError(f"{name} cannot be repeated; merge in memory: merge_adapters(model, unload=True)")
    import bitsandbytes as bnb

    rows, columns = weight.shape
    packed: Any
    if name == "int8":
        packed = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, device="meta")
        packed.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        packed = bnb.nn.Linear4bit(columns, rows, bias=False, device="meta")
        packed.weight = bnb.nn.Params4bit(
            linear.weight.data,
            requires_grad=False,
            quant_type=name.removesuffix("-dq"),
            compress_statistics=name.endswith("-dq"),
            blocksize=scheme["blocksize"],
        )
    return packed.to(weight.device)


class _ProductsWithRows(torch.autograd.Function):
    # autograd would keep every slab of W_dq for the gradient of A
    @staticmethod
    def forward(ctx: Any, A: Tensor, module: nn.Module) -> Tensor:
        ctx.module, ctx.dtype = module, A.dtype
        wide = A.float()
        return torch.cat([slab @ wide.T for _, slab in row_slabs(module)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_products: Tensor) -> tuple[Tensor, None]:
        dA = sum(d_products[rows].T @ slab for rows, slab in row_slabs(ctx.module))
        return dA.to(ctx.dtype), None  # type: ignore[union-attr]  # a layer has rows


def _kind(weight: Any) -> str:
    """``4bit``, ``8bit``, ``torchao``, or nothing; quantised by now, not upon its way to a device."""
    if type(weight) in (nn.Parameter, Tensor):
        return ""  # torch.compile cannot go through the classes below
    for kind in type(weight).__mro__:
        if kind.__name__ == "Params4bit":
            return "4bit" if getattr(weight, "quant_state", None) is not None else ""
        if kind.__name__ == "Int8Params":
            return "8bit" if weight.dtype == torch.int8 else ""
        if kind.__module__.partition(".")[0] == "torchao":
            return "torchao"
    return ""


def _shape(module: Any) -> tuple[int, int]:
    return module.out_features, module.in_features


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row_scales(module: Any) -> Tensor:
    # the first forward pass moves them from the weight into the layer's state
    scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    return scales.to(module.weight.device)


def _block_scales(state: Any) -> Tensor:
    """A scale per block, in fp32; ``1 / blocksize`` as many as the weight has values."""
    if not state.nested:
        return state.absmax
    import bitsandbytes.functional as bnb

    return (bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


def _dequantized_blocks(weight: Any, scales: Tensor, rows: slice, columns: int) -> Tensor:
    import bitsandbytes.functional as bnb

    state = weight.quant_state
    first, last = rows.start * columns, rows.stop * columns
    # quant_storage may be another dtype than bytes
    packed = weight.data.view(torch.uint8).reshape(-1)[first // 2 : -(-last // 2), None].contiguous()
    blocks = scales[first // state.blocksize : -(-last // state.blocksize)].contiguous()
    shape = torch.Size((rows.stop - rows.start, columns))
    slab = bnb.QuantState(
        blocks, shape, dtype=torch.float32, blocksize=state.blocksize, quant_type=state.quant_type, code=state.code
    )
    return bnb.dequantize_4bit(packed, slab)


@contextmanager
def _without_bias(module: nn.Module) -> Iterator[None]:
    bias = module._parameters["bias"]
    module._parameters["bias"] = None
    try:
        yield
    finally:
        module._parameters["bias"] = bias
