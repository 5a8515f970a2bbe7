"""Adapter layers around a frozen linear operator: low-rank (LoRA), weight-decomposed (DoRA), and magnitude alone.

Each holds the module it replaces as ``base_layer`` and its own parameters as plain ``nn.Parameter`` (not ``nn.Linear``,
which precision plugins convert wherever they find one). ``weight``, ``bias``, ``in_features``, ``out_features`` and
what else model code looks at read through to the base. Whatever the base is, parameters belong to its matrix
``W [out, in]`` (:mod:`dora_lightning.adapters.operators`): ``lora_A [rank, in]``, ``lora_B [out, rank / groups]``,
``magnitude [out]``. See :mod:`dora_lightning.adapters.functional` for the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dora_lightning.adapters import functional, quantized
from dora_lightning.adapters.config import AdapterConfig
from dora_lightning.adapters.initialization import draws_from_weight, start_low_rank
from dora_lightning.adapters.norm_cache import NormCache
from dora_lightning.adapters.operators import (
    Operator,
    as_stored,
    is_linear,
    is_lookup,
    operator_of,
    ungrouped,
)


class AdapterLayer(nn.Module):
    """What every adapter shares: the frozen base, merging, and fp32 parameters.

    The adapter's parameters stay in fp32 when the model is cast to a half-precision dtype: a bf16 magnitude would not
    move under a step of 1e-4 at all.

    Args:
        base_layer: what :func:`~dora_lightning.adapters.operators.operator_of` knows.
        config: how it is adapted.
        name: its dotted name in the model, for ``rank_pattern`` and ``alpha_pattern``.

    Raises:
        ValueError: the config makes no sense for such a base layer; the message says why.
    """

    method: ClassVar[str]

    def __init__(self, base_layer: nn.Module, config: AdapterConfig, name: str = "") -> None:
        super().__init__()
        operator = operator_of(base_layer)
        assert operator is not None  # find_targets has checked
        self.base_layer: Any = base_layer
        self.operator: Operator = operator
        if self.quantized:
            quantized.check_dequantises(base_layer)
        self.merged_dtype = torch.float32
        """Of the merged weight of a quantised layer, which does not say what the model computes with."""
        for attribute in operator.attributes:
            # not by __getattr__, which every access to a parameter would pass through
            setattr(self, attribute, getattr(base_layer, attribute))
        self.disabled = False
        self.reuse_output = False
        """Whether the magnitude's gradient is made of the output; see :func:`reuse_outputs`."""
        # the parameter, or the quantised layer, that merging replaced; out of parameters() and state_dict()
        self._unmerged: tuple[Tensor | nn.Module, ...] = ()

    @property
    def weight(self) -> Tensor:
        """Weight of the base layer, as it stores it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the base layer ``[out]``."""
        return getattr(self.base_layer, "bias", None)

    @property
    def in_features(self) -> int:
        """Columns of ``W``: input features of a linear layer, tokens of an embedding."""
        return self.operator.features(self.base_layer)[1]

    @property
    def out_features(self) -> int:
        """Rows of ``W``: output features of a linear layer, dimensions of an embedding."""
        return self.operator.features(self.base_layer)[0]

    @property
    def matrix(self) -> Tensor:
        """``W [out, in]``, in the memory of the base's weight; of a quantised one, a copy in fp32."""
        return self.operator.matrix(self.base_layer)

    @property
    def quantized(self) -> bool:
        """Whether the base layer's weight is packed."""
        return quantized.is_quantized(self.base_layer)

    @property
    def merged(self) -> bool:
        """Whether the base layer holds the merged weight at present."""
        return bool(self._unmerged)

    def merged_weight(self) -> Tensor:
        """The weight of the plain layer that computes the same, as a new tensor in the base's shape and dtype.

        Of a quantised base in :attr:`merged_dtype`, made from the dequantised weight: that is what was trained on.
        """
        raise NotImplementedError

    def merge(self) -> None:
        """Put the merged weight into the base layer, keeping the original for :meth:`unmerge`."""
        if not self.merged:
            self.put_weight(nn.Parameter(self.merged_weight(), requires_grad=False))

    def unmerge(self) -> None:
        """Put the original weight back: the very parameter or layer, hence bit for bit."""
        if self.merged:
            (original,) = self._unmerged
            if isinstance(original, nn.Module):
                self.base_layer = original
            else:
                self.base_layer.weight = original
            self._unmerged = ()

    def put_weight(self, merged: nn.Parameter) -> None:
        """Have the base layer hold a merged weight, keeping the original for :meth:`unmerge`."""
        base = self.base_layer
        if self.quantized:
            self._unmerged = (base,)
            self.base_layer = quantized.plain_linear(base, merged)
        else:
            self._unmerged = (base.weight,)
            base.weight = merged

    def forget_norms(self) -> None:
        """Compute the norms anew at the next call."""
        for value in vars(self).values():
            if isinstance(value, NormCache):
                value.clear()

    def __setattr__(self, name: str, value: Any) -> None:
        """As in ``nn.Module``; a change of mode, which is when weights are averaged or swapped, forgets the norms."""
        # Lightning sets the mode of each module without calling train(); a layer may be in evaluation all along
        if name == "training" and not (value and self.training):
            self.forget_norms()
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # FSDP2 loads into shards, and the forward pass reads what is gathered from them
        self.forget_norms()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., in]`` to ``[..., out]``, or what the base layer takes to what it gives."""
        if self.disabled:
            return self.base_layer(x)
        if not self.merged:
            return self._adapted(x)
        if self.training and torch.is_grad_enabled():
            raise RuntimeError("this adapter is merged and would not train; call unmerge_adapters(model) first")
        return self.base_layer(x)

    def _adapted(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _merged_weight(self, *args: Any, **options: Any) -> Tensor:
        with torch.no_grad():
            merged = functional.merge_weight(self.matrix, *args, **options)
            if self.quantized:
                return merged.to(self.merged_dtype)
            return as_stored(merged, self.weight, self.operator.transposed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        own = [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]
        wide = {name: (p.detach(), None if p.grad is None else p.grad.detach()) for name, p in own}
        super()._apply(fn, recurse)
        for name, tensor in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)):
            if tensor.dtype in (torch.float16, torch.bfloat16):
                data, grad = wide[name]
                tensor.data = data.to(tensor.device)
                tensor.grad = None if grad is None else grad.to(tensor.device)
        for original in self._unmerged:
            if isinstance(original, nn.Module):
                original._apply(fn)
            else:
                original.data = fn(original.data)
        return self


class LoRALinear(AdapterLayer):
    """``y = W x + s B A x~ + bias``, with ``lora_A [rank, in]`` and ``lora_B [out, rank / groups]``.

    With ``init="pissa"`` or ``"olora"`` the update is ``s (B A - B0 A0)`` with the first values ``A0`` and ``B0`` kept
    in buffers, see :mod:`dora_lightning.adapters.initialization`.
    """

    method = "lora"

    def __init__(self, base_layer: nn.Module, config: AdapterConfig, name: str = "") -> None:
        super().__init__(base_layer, config, name)
        self.dropout = nn.Dropout(config.dropout)
        self.rank = config.rank_of(name)
        self.scaling = config.scaling_of(name)
        self.init = config.init
        self.init_A: Tensor | None
        self.init_B: Tensor | None
        self._make_parameters(config)
        self._reset_low_rank()

    def reset_parameters(self) -> None:
        """Start ``A`` and ``B`` as ``init`` says, so that training starts at the pretrained function."""
        self._reset_low_rank()

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """``A [rank, in]`` and ``B [out, rank]`` of the update ``s B A``, for autograd too.

        Twice the rank where the first values are taken out of the update.
        """
        A, B = self.factors()
        return A, ungrouped(A, B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """``A [rank, in]`` and ``B [out, rank / groups]`` as the operator applies them; else as :meth:`low_rank`."""
        if self.init_A is None or self.init_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.init_A]), torch.cat([self.lora_B, -self.init_B], dim=1)

    def merged_weight(self) -> Tensor:
        """``W + s B A``."""
        return self._merged_weight(*self.low_rank(), self.scaling)

    def extra_repr(self) -> str:
        """Rank, scaling and what differs from the default."""
        return f"rank={self.rank}, scaling={self.scaling:g}" + ("" if self.init == "kaiming" else f", init={self.init}")

    def _make_parameters(self, config: AdapterConfig) -> None:
        rows, columns = self.operator.features(self.base_layer)
        groups = self.operator.groups(self.base_layer)
        if self.rank % groups:
            raise ValueError(f"the rank must be a multiple of the convolution's {groups} groups, got {self.rank}")
        options = wide_like(self.weight)
        self.lora_A = nn.Parameter(torch.empty(self.rank, columns, **options))
        self.lora_B = nn.Parameter(torch.empty(rows, self.rank // groups, **options))
        if groups > 1 and self.init not in ("kaiming", "gaussian"):
            raise ValueError(
                f"init={self.init!r} is made for one matrix; a convolution with {groups} groups has several"
            )
        if not draws_from_weight(self.init):
            self.init_A = self.init_B = None
            return
        if self.quantized:
            raise ValueError(
                f"init={self.init!r} starts from the weight's singular vectors or QR decomposition, and is made for a "
                "weight that is not quantised; choose kaiming, gaussian or orthogonal"
            )
        if self.rank > min(rows, columns):
            raise ValueError(f"init={self.init!r} needs a rank of at most {min(rows, columns)}, got {self.rank}")
        self.register_buffer("init_A", torch.empty_like(self.lora_A, requires_grad=False))
        self.register_buffer("init_B", torch.empty_like(self.lora_B, requires_grad=False))

    def _reset_low_rank(self) -> None:
        # the matrix of a packed weight would be made for nothing
        weight = self.matrix if draws_from_weight(self.init) else self.weight
        start_low_rank(self.lora_A, self.lora_B, self.init, weight, self.scaling, lookup=is_lookup(self.base_layer))
        if self.init_A is not None and self.init_B is not None:
            self.init_A.copy_(self.lora_A.detach())
            self.init_B.copy_(self.lora_B.detach())

    def _watched(self) -> list[Tensor]:
        """What the update is computed from."""
        first = [] if self.init_A is None or self.init_B is None else [self.init_A, self.init_B]
        return [self.lora_A, self.lora_B, *first]

    def _dropped(self, x: Tensor) -> Tensor | None:
        if not self.training or self.dropout.p == 0 or not x.is_floating_point():
            return None
        return self.dropout(x)

    def _outputs(self, x: Tensor, bias: Tensor | None, gain: Tensor | None, x_dropped: Tensor | None) -> Tensor:
        """``gain (W x + s B A x_dropped) + bias``."""
        A, B = self.factors()
        return self.operator.adapted(
            self.base_layer, x, bias, A, B, self.scaling, gain, x_dropped, reuse_output=self.reuse_output
        )

    def _adapted(self, x: Tensor) -> Tensor:
        return self._outputs(x, self.bias, None, self._dropped(x))


class DoRALinear(LoRALinear):
    """``y = g * (W x + s B A x~) + bias`` with ``g = magnitude / |W + s B A|`` (paper, equation 5).

    ``magnitude`` starts as the norm of the very weight that the forward pass uses, so the layer starts at the
    pretrained function exactly, whatever ``A`` and ``B`` are. It is ``[out]``, or ``[in]`` with ``norm_axis="in"``,
    where it scales the input instead.
    """

    method = "dora"

    def __init__(self, base_layer: nn.Module, config: AdapterConfig, name: str = "") -> None:
        super().__init__(base_layer, config, name)
        self.detach_norm = config.detach_norm
        self.exact_dropout = config.exact_dropout
        self.norm_axis = config.norm_axis
        self._base_norm_sq = NormCache()
        self._norm = NormCache()
        self._gain = NormCache()
        self.magnitude = _empty_magnitude(self, config)
        self.reset_magnitude()

    def reset_parameters(self) -> None:
        """Initialise ``A`` and ``B`` as LoRA does, and the magnitude as the norm that results."""
        super().reset_parameters()
        self.reset_magnitude()

    def reset_magnitude(self) -> None:
        """Set the magnitude to the present norm; call it after setting ``lora_A``, ``lora_B`` or the base by hand."""
        with torch.no_grad():
            self.magnitude.copy_(self._compute_norm())

    def norm(self) -> Tensor:
        """Norm of ``W + s B A``, kept until something changes; differentiable with ``detach_norm=False``."""
        if not self.detach_norm and torch.is_grad_enabled():
            return self._compute_norm()
        return self._norm.get(self._compute_norm, large=self.operator.watched(self.base_layer), small=self._watched())

    def gain(self) -> Tensor:
        """``magnitude / norm()``; without gradients kept as the norm is."""
        norm = self.norm()
        if torch.is_grad_enabled():
            return functional.gain(self.magnitude, norm)
        # a norm that changed is another tensor: what it was made of is looked at, and copied, once
        return self._gain.get(lambda: functional.gain(self.magnitude, norm), large=[norm], small=[self.magnitude])

    def merged_weight(self) -> Tensor:
        """``g (W + s B A)``."""
        return self._merged_weight(*self.low_rank(), self.scaling, self.magnitude, self.norm_axis)

    def extra_repr(self) -> str:
        """Rank, scaling and what differs from the default."""
        return super().extra_repr() + ("" if self.norm_axis == "out" else ", norm_axis=in")

    def _per_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """``W``, ``A``, ``B`` with the features that have a magnitude in rows."""
        A, B = self.low_rank()
        return (self.matrix, A, B) if self.norm_axis == "out" else (self.matrix.T, B.T, A.T)

    def _compute_norm(self) -> Tensor:
        if self.quantized:
            return self._quantized_norm()
        weight, A, B = self._per_feature()
        if self.weight.requires_grad and torch.is_grad_enabled():
            return functional.adapted_norm(weight, A, B, self.scaling, functional.weight_norm_sq(weight))
        base = self._base_norm_sq.get(lambda: functional.weight_norm_sq(weight), large=[self.weight], small=[])
        return functional.adapted_norm(weight, A, B, self.scaling, base)

    def _quantized_norm(self) -> Tensor:
        base_layer, (A, B) = self.base_layer, self.low_rank()
        packed = self.operator.watched(base_layer)
        base = self._base_norm_sq.get(lambda: quantized.norm_sq(base_layer), large=packed, small=[])
        cross = quantized.products_with_rows(base_layer, A)
        return functional.adapted_norm_from_product(cross, A, B, self.scaling, base)

    def _adapted(self, x: Tensor) -> Tensor:
        gain = self.gain()
        if self.norm_axis == "in":
            x = _scaled_input(x, gain)
            return self._outputs(x, self.bias, None, self._dropped(x))
        dropped = self._dropped(x)
        if dropped is None or not self.exact_dropout:
            return self._outputs(x, self.bias, gain, dropped)
        # W x + (g - 1) W x~ + g s B A x~, regrouped
        base = self.operator.adapted(self.base_layer, x - dropped, self.bias)
        return base + self._outputs(dropped, None, gain, None)


class MagnitudeLinear(AdapterLayer):
    """``y = g * W x + bias`` with ``g = magnitude / |W|``: the direction stays as it was (paper, section 5.6)."""

    method = "magnitude"

    def __init__(self, base_layer: nn.Module, config: AdapterConfig, name: str = "") -> None:
        super().__init__(base_layer, config, name)
        self.norm_axis = config.norm_axis
        self._norm = NormCache()
        self.magnitude = _empty_magnitude(self, config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the magnitude to the norm of the base weight."""
        self.reset_magnitude()

    def reset_magnitude(self) -> None:
        """Set the magnitude to the present norm; call it after setting the base by hand."""
        with torch.no_grad():
            self.magnitude.copy_(self.norm())

    def norm(self) -> Tensor:
        """Norm of ``W``, computed once."""
        return self._norm.get(self._compute_norm, large=self.operator.watched(self.base_layer), small=[])

    def merged_weight(self) -> Tensor:
        """``g W``."""
        return self._merged_weight(magnitude=self.magnitude, norm_axis=self.norm_axis)

    def _compute_norm(self) -> Tensor:
        if self.quantized:
            return quantized.norm_sq(self.base_layer).sqrt().clamp(min=functional.NORM_EPS)
        return functional.weight_norm_sq(self.matrix if self.norm_axis == "out" else self.matrix.T).sqrt()

    def _adapted(self, x: Tensor) -> Tensor:
        gain = functional.gain(self.magnitude, self.norm())
        if self.norm_axis == "in":
            return self.base_layer(_scaled_input(x, gain))
        return self.operator.adapted(self.base_layer, x, self.bias, gain=gain, reuse_output=self.reuse_output)


def forget_norms(model: nn.Module) -> None:
    """Have every adapter in ``model`` compute its norm anew at the next call.

    Needed only after a write that nothing shows: see :mod:`dora_lightning.adapters.norm_cache`.
    """
    for module in model.modules():
        if isinstance(module, AdapterLayer):
            module.forget_norms()


def _scaled_input(x: Tensor, gain: Tensor) -> Tensor:
    # the product is rounded, never the gain: bf16 cannot tell a trained gain from 1
    return (x * gain).to(x.dtype)


def _empty_magnitude(layer: AdapterLayer, config: AdapterConfig) -> nn.Parameter:
    if config.norm_axis == "in" and not is_linear(layer.base_layer):
        kind = type(layer.base_layer).__name__
        raise ValueError(
            f"norm_axis='in' scales the inputs of a linear layer; the columns of {kind} are no such inputs"
        )
    if config.norm_axis == "in" and layer.quantized:
        raise ValueError("norm_axis='in' is not there for quantised weights, whose scales go by rows; use 'out'")
    features = layer.out_features if config.norm_axis == "out" else layer.in_features
    return nn.Parameter(torch.empty(features, **wide_like(layer.weight)))


def wide_like(weight: Tensor) -> dict[str, Any]:
    """Dtype and device of an adapter's parameters."""
    return {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
