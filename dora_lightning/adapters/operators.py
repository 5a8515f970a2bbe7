"""The linear operators that adapters wrap, each seen as one matrix.

Every method is written for ``y = W x + bias`` with ``W [out, in]``; an operator says how a base layer stores ``W``, and
how it applies it and the low-rank factors ``A [rank, in]`` and ``B [out, rank / groups]`` to its kind of input::

    base layer               weight                        W [out, in]                     features
    nn.Linear                [out, in]                     the same                        last dimension
    Conv1D of transformers   [in, out]                     transposed                      last dimension
    nn.Conv1d, 2d, 3d        [out, in / groups, *kernel]   [out, in / groups * kernel]     channels
    nn.Embedding             [tokens, dimension]           [dimension, tokens]             last dimension
    a quantised nn.Linear    packed                        dequantised                     last dimension

An embedding is the product with a one-hot vector, so it has one magnitude per dimension, as in PEFT. In a convolution
with groups, ``A`` and ``B`` have the same groups: the update can be merged.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dora_lightning.adapters import functional, quantized

_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class Operator:
    """How one kind of base layer stores and applies its matrix; has no state."""

    transposed: ClassVar[bool] = False
    attributes: ClassVar[tuple[str, ...]] = ()
    """Constants that model code reads of such a layer, beside its weight, bias and features."""

    def features(self, base_layer: Any) -> tuple[int, int]:
        """Rows and columns of ``W``, from attributes alone: the weight may be packed."""
        raise NotImplementedError

    def matrix(self, base_layer: Any) -> Tensor:
        """``W [out, in]``: in the memory of the base's weight, or a copy in fp32 where that is packed."""
        return as_matrix(base_layer.weight, self.transposed)

    def watched(self, base_layer: Any) -> list[Tensor]:
        """The tensors that ``W`` is stored in."""
        return [base_layer.weight]

    def groups(self, base_layer: Any) -> int:
        """Groups of channels; 1 for all but convolutions."""
        return 1

    def product(self, base_layer: Any, x: Tensor) -> Tensor:
        """``W x``, without the bias."""
        raise NotImplementedError

    def down(self, base_layer: Any, x: Tensor, A: Tensor) -> Tensor:
        """``A x``, with the rank where the features of the output are."""
        raise NotImplementedError

    def up(self, base_layer: Any, h: Tensor, B: Tensor) -> Tensor:
        """``B h`` for ``h`` of :meth:`down`."""
        raise NotImplementedError

    def along_features(self, base_layer: Any, vector: Tensor) -> Tensor:
        """A vector over output features (or ranks), in a shape that multiplies outputs."""
        return vector

    def finish(self, base_layer: Any, z: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        """``g z + bias``, multiplied in the dtype of ``g``, which half precision would round to 1."""
        if gain is not None:
            z = (z * self.along_features(base_layer, gain)).to(z.dtype)
        return z if bias is None else z + self.along_features(base_layer, bias).to(z.dtype)

    def adapted(
        self,
        base_layer: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        scaling: float = 1.0,
        gain: Tensor | None = None,
        x_dropped: Tensor | None = None,
        reuse_output: bool = False,
    ) -> Tensor:
        """``g (W x + s B A x~) + bias``; arguments as in :func:`dora_lightning.adapters.functional.adapter_linear`.

        ``reuse_output`` saves memory where an operator has its own backward pass, and changes nothing elsewhere.
        """
        z = self.product(base_layer, x)
        if lora_A is not None and lora_B is not None:
            h = self.down(base_layer, x if x_dropped is None else x_dropped, lora_A)
            z = z + (scaling * self.up(base_layer, h, lora_B)).to(z.dtype)
        return self.finish(base_layer, z, gain, bias)


class _Linear(Operator):
    def features(self, base_layer: Any) -> tuple[int, int]:
        return base_layer.out_features, base_layer.in_features

    def product(self, base_layer: Any, x: Tensor) -> Tensor:
        return functional.adapter_linear(x, as_matrix(base_layer.weight, self.transposed))

    def down(self, base_layer: Any, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A.to(x.dtype))

    def up(self, base_layer: Any, h: Tensor, B: Tensor) -> Tensor:
        return F.linear(h, B.to(h.dtype))

    def adapted(self, base_layer: Any, x: Tensor, bias: Tensor | None, *args: Any, **options: Any) -> Tensor:
        return functional.adapter_linear(x, as_matrix(base_layer.weight, self.transposed), bias, *args, **options)


class _QuantizedLinear(_Linear):
    def matrix(self, base_layer: Any) -> Tensor:
        return quantized.dequantized(base_layer)

    def watched(self, base_layer: Any) -> list[Tensor]:
        return quantized.packed_tensors(base_layer)

    def product(self, base_layer: Any, x: Tensor) -> Tensor:
        return quantized.product(base_layer, x)

    def adapted(
        self,
        base_layer: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        scaling: float = 1.0,
        gain: Tensor | None = None,
        x_dropped: Tensor | None = None,
        reuse_output: bool = False,
    ) -> Tensor:
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        z = self.product(base_layer, x)
        return functional.adapt_product(z, x if x_dropped is None else x_dropped, bias, lora_A, lora_B, scaling, gain)


class _TransposedLinear(_Linear):
    transposed = True
    attributes = ("nf",)

    def features(self, base_layer: Any) -> tuple[int, int]:
        columns, rows = base_layer.weight.shape
        return rows, columns


class _Convolution(Operator):
    attributes = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )

    def features(self, base_layer: Any) -> tuple[int, int]:
        columns = base_layer.in_channels // base_layer.groups
        for size in base_layer.kernel_size:
            columns *= size
        return base_layer.out_channels, columns

    def groups(self, base_layer: Any) -> int:
        return base_layer.groups

    def product(self, base_layer: Any, x: Tensor) -> Tensor:
        return base_layer._conv_forward(x, base_layer.weight, None)

    def down(self, base_layer: Any, x: Tensor, A: Tensor) -> Tensor:
        channels = base_layer.in_channels // base_layer.groups
        A = A.reshape(len(A), channels, *base_layer.kernel_size)
        # the base's own way of applying a kernel: its stride, padding, padding mode, dilation and groups
        return base_layer._conv_forward(x, A.to(x.dtype), None)

    def up(self, base_layer: Any, h: Tensor, B: Tensor) -> Tensor:
        convolve = next(function for kind, function in _CONVOLUTIONS.items() if isinstance(base_layer, kind))
        B = B.reshape(*B.shape, *(1 for _ in base_layer.kernel_size))
        return convolve(h, B.to(h.dtype), groups=base_layer.groups)

    def along_features(self, base_layer: Any, vector: Tensor) -> Tensor:
        return vector.reshape(-1, *(1 for _ in base_layer.kernel_size))


class _Embedding(Operator):
    transposed = True
    attributes = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "sparse")

    def features(self, base_layer: Any) -> tuple[int, int]:
        return base_layer.embedding_dim, base_layer.num_embeddings

    def product(self, base_layer: Any, x: Tensor) -> Tensor:
        return base_layer(x)

    def down(self, base_layer: Any, x: Tensor, A: Tensor) -> Tensor:
        scale_grad = base_layer.scale_grad_by_freq
        return F.embedding(x, A.T, padding_idx=base_layer.padding_idx, scale_grad_by_freq=scale_grad)

    def up(self, base_layer: Any, h: Tensor, B: Tensor) -> Tensor:
        y = F.linear(h, B.to(h.dtype))
        # Gemma's embeddings scale what they look up
        scale = getattr(base_layer, "embed_scale", None)
        return y if scale is None else y * scale


_LINEAR, _TRANSPOSED_LINEAR, _CONVOLUTION, _EMBEDDING = _Linear(), _TransposedLinear(), _Convolution(), _Embedding()
_QUANTIZED_LINEAR = _QuantizedLinear()


def operator_of(module: nn.Module) -> Operator | None:
    """How ``module`` is adapted; ``None`` if it cannot be."""
    # nn.MultiheadAttention reads the weight of its out_proj and never calls it: an adapter there would train nothing
    if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear):
        return _QUANTIZED_LINEAR if quantized.is_quantized(module) else _LINEAR
    if is_transposed_linear(module):
        return _TRANSPOSED_LINEAR
    if isinstance(module, tuple(_CONVOLUTIONS)):
        return _CONVOLUTION
    # max_norm rewrites rows of the weight as they are looked up
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        return _EMBEDDING
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether ``all-linear`` means ``module``."""
    return isinstance(operator_of(module), _Linear)


def is_lookup(module: nn.Module) -> bool:
    """Whether ``module`` is an embedding: its input is an index, no vector."""
    return isinstance(operator_of(module), _Embedding)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether ``module`` is the ``Conv1D`` of transformers, known by its name: this package does not import it."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and hasattr(module, "nf")


def as_matrix(weight: Tensor, transposed: bool) -> Tensor:
    """A stored weight as ``W [out, in]``, in the same memory."""
    if weight.ndim > 2:
        return weight.flatten(1)
    return weight.T if transposed else weight


def as_stored(matrix: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """``W [out, in]`` in the shape of the stored ``weight``."""
    return (matrix.T if transposed else matrix).reshape(weight.shape).contiguous()


def ungrouped(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """``B [out, rank / groups]`` as the ``[out, rank]`` whose product with ``A [rank, in]`` is the update.

    >>> ungrouped(torch.zeros(4, 1), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[1., 2., 0., 0.],
            [0., 0., 3., 4.]])
    """
    rank, own = len(lora_A), lora_B.shape[1]
    if own == rank:
        return lora_B
    groups = rank // own
    return torch.block_diag(*lora_B.reshape(groups, -1, own))
