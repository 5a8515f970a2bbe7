"""Adapter layers around a frozen ``nn.Linear``: low-rank (LoRA), weight-decomposed (DoRA), and magnitude alone.

Each holds the module it replaces as ``base_layer`` and its own parameters as plain ``nn.Parameter`` (not ``nn.Linear``,
which precision plugins convert wherever they find one). ``weight``, ``bias``, ``in_features`` and ``out_features`` read
through to the base, since model code looks at them. See :mod:`dora_lightning.adapters.functional` for the shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dora_lightning.adapters import functional
from dora_lightning.adapters.config import AdapterConfig
from dora_lightning.adapters.norm_cache import NormCache


class AdapterLayer(nn.Module):
    """What every adapter around an ``nn.Linear`` shares: the frozen base, merging, and fp32 parameters.

    The adapter's parameters stay in fp32 when the model is cast to a half-precision dtype: a bf16 magnitude would not
    move under a step of 1e-4 at all.
    """

    method: ClassVar[str]

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        # the parameter that merging replaced, kept out of parameters() and state_dict()
        self._unmerged: tuple[Tensor, ...] = ()

    @property
    def weight(self) -> Tensor:
        """Weight of the base layer ``[out, in]``."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the base layer ``[out]``."""
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        """Input features of the base layer."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Output features of the base layer."""
        return self.base_layer.out_features

    @property
    def merged(self) -> bool:
        """Whether the base layer holds the merged weight at present."""
        return bool(self._unmerged)

    def merged_weight(self) -> Tensor:
        """The weight ``[out, in]`` of the plain layer that computes the same, as a new tensor in the base's dtype."""
        raise NotImplementedError

    def merge(self) -> None:
        """Put the merged weight into the base layer, keeping the original for :meth:`unmerge`."""
        if self.merged:
            return
        original = self.base_layer.weight
        self.base_layer.weight = nn.Parameter(self.merged_weight(), requires_grad=False)
        self._unmerged = (original,)

    def unmerge(self) -> None:
        """Put the original weight back: the very parameter, hence bit for bit."""
        if self.merged:
            (self.base_layer.weight,) = self._unmerged
            self._unmerged = ()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., in]`` to ``[..., out]``."""
        if not self.merged:
            return self._adapted(x)
        if self.training and torch.is_grad_enabled():
            raise RuntimeError("this adapter is merged and would not train; call unmerge_adapters(model) first")
        return self.base_layer(x)

    def _adapted(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        wide = {
            name: (p.detach(), None if p.grad is None else p.grad.detach())
            for name, p in self.named_parameters(recurse=False)
        }
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                data, grad = wide[name]
                parameter.data = data.to(parameter.device)
                parameter.grad = None if grad is None else grad.to(parameter.device)
        for original in self._unmerged:
            original.data = fn(original.data)
        return self


class LoRALinear(AdapterLayer):
    """``y = W x + s B A x~ + bias``, with ``lora_A [rank, in]`` and ``lora_B [out, rank]``."""

    method = "lora"

    def __init__(self, base_layer: nn.Linear, config: AdapterConfig) -> None:
        super().__init__(base_layer)
        options = _like(base_layer.weight)
        self.rank = config.rank
        self.scaling = config.scaling
        self.lora_A = nn.Parameter(torch.empty(config.rank, base_layer.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(base_layer.out_features, config.rank, **options))
        self.dropout = nn.Dropout(config.dropout)
        self._reset_low_rank()

    def reset_parameters(self) -> None:
        """Kaiming-uniform ``A`` and zero ``B``, so that training starts at the pretrained function."""
        self._reset_low_rank()

    def merged_weight(self) -> Tensor:
        """``W + s B A``."""
        with torch.no_grad():
            return functional.merge_weight(self.weight, self.lora_A, self.lora_B, self.scaling)

    def extra_repr(self) -> str:
        """Rank and scaling."""
        return f"rank={self.rank}, scaling={self.scaling:g}"

    def _reset_low_rank(self) -> None:
        draw_low_rank(self.lora_A)
        nn.init.zeros_(self.lora_B)

    def _dropped(self, x: Tensor) -> Tensor | None:
        return self.dropout(x) if self.training and self.dropout.p > 0 else None

    def _adapted(self, x: Tensor) -> Tensor:
        return functional.adapter_linear(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling, x_dropped=self._dropped(x)
        )


class DoRALinear(LoRALinear):
    """``y = g * (W x + s B A x~) + bias`` with ``g = magnitude / |W + s B A|`` (paper, equation 5).

    ``magnitude`` starts as the norm of the very weight that the forward pass uses, so the layer starts at the
    pretrained function exactly, whatever ``A`` and ``B`` are. It is ``[out]``, or ``[in]`` with ``norm_axis="in"``,
    where it scales the input instead.
    """

    method = "dora"

    def __init__(self, base_layer: nn.Linear, config: AdapterConfig) -> None:
        super().__init__(base_layer, config)
        self.detach_norm = config.detach_norm
        self.exact_dropout = config.exact_dropout
        self.norm_axis = config.norm_axis
        self._base_norm_sq = NormCache()
        self._norm = NormCache()
        self.magnitude = _empty_magnitude(base_layer, config)
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
        return self._norm.get(self._compute_norm, large=[self.weight], small=[self.lora_A, self.lora_B])

    def merged_weight(self) -> Tensor:
        """``g (W + s B A)``."""
        with torch.no_grad():
            return functional.merge_weight(
                self.weight, self.lora_A, self.lora_B, self.scaling, self.magnitude, self.norm_axis
            )

    def extra_repr(self) -> str:
        """Rank, scaling and what differs from the default."""
        return super().extra_repr() + ("" if self.norm_axis == "out" else ", norm_axis=in")

    def _per_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """``W``, ``A``, ``B`` with the features that have a magnitude in rows."""
        if self.norm_axis == "out":
            return self.weight, self.lora_A, self.lora_B
        return self.weight.T, self.lora_B.T, self.lora_A.T

    def _compute_norm(self) -> Tensor:
        weight, A, B = self._per_feature()
        if self.weight.requires_grad and torch.is_grad_enabled():
            return functional.adapted_norm(weight, A, B, self.scaling, functional.weight_norm_sq(weight))
        base = self._base_norm_sq.get(lambda: functional.weight_norm_sq(weight), large=[self.weight], small=[])
        return functional.adapted_norm(weight, A, B, self.scaling, base)

    def _adapted(self, x: Tensor) -> Tensor:
        gain = functional.gain(self.magnitude, self.norm())
        low_rank = (self.lora_A, self.lora_B, self.scaling)
        if self.norm_axis == "in":
            x = _scaled_input(x, gain)
            return functional.adapter_linear(x, self.weight, self.bias, *low_rank, x_dropped=self._dropped(x))
        dropped = self._dropped(x)
        if dropped is None or not self.exact_dropout:
            return functional.adapter_linear(x, self.weight, self.bias, *low_rank, gain=gain, x_dropped=dropped)
        # W x + (g - 1) W x~ + g s B A x~, regrouped
        base = functional.adapter_linear(x - dropped, self.weight, self.bias)
        return base + functional.adapter_linear(dropped, self.weight, None, *low_rank, gain=gain)


class MagnitudeLinear(AdapterLayer):
    """``y = g * W x + bias`` with ``g = magnitude / |W|``: the direction stays as it was (paper, section 5.6)."""

    method = "magnitude"

    def __init__(self, base_layer: nn.Linear, config: AdapterConfig) -> None:
        super().__init__(base_layer)
        self.norm_axis = config.norm_axis
        self._norm = NormCache()
        self.magnitude = _empty_magnitude(base_layer, config)
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
        return self._norm.get(lambda: _row_norm(self._per_feature()), large=[self.weight], small=[])

    def merged_weight(self) -> Tensor:
        """``g W``."""
        with torch.no_grad():
            return functional.merge_weight(self.weight, magnitude=self.magnitude, norm_axis=self.norm_axis)

    def _per_feature(self) -> Tensor:
        return self.weight if self.norm_axis == "out" else self.weight.T

    def _adapted(self, x: Tensor) -> Tensor:
        gain = functional.gain(self.magnitude, self.norm())
        if self.norm_axis == "in":
            return self.base_layer(_scaled_input(x, gain))
        return functional.adapter_linear(x, self.weight, self.bias, gain=gain)


def draw_low_rank(lora_A: Tensor) -> None:
    """Fill ``lora_A [rank, in]`` with the random values training starts from."""
    nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))


def _scaled_input(x: Tensor, gain: Tensor) -> Tensor:
    # the product is rounded, never the gain: bf16 cannot tell a trained gain from 1
    return (x * gain).to(x.dtype)


def _row_norm(weight: Tensor) -> Tensor:
    return functional.weight_norm_sq(weight).sqrt()


def _empty_magnitude(base_layer: nn.Linear, config: AdapterConfig) -> nn.Parameter:
    features = base_layer.out_features if config.norm_axis == "out" else base_layer.in_features
    return nn.Parameter(torch.empty(features, **_like(base_layer.weight)))


def _like(weight: Tensor) -> dict[str, Any]:
    return {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
