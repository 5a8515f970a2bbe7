"""DoRA as pure functions of tensors (Liu et al., ICML 2024, https://arxiv.org/abs/2402.09353).

Shape legend::

    W  [out, in]   pretrained weight, as in nn.Linear          x  [..., in]   input
    A  [rank, in]  B [out, rank]   low-rank direction update   y  [..., out]  output
    s  alpha / rank                                            h  [..., rank] A x
    m  [out]       magnitude                                   n  [out]       norm of each row of W + s B A
    g  [out]       gain, m / n

    y = g * (W x + s B A x~) + bias        with x~ = dropout(x)

The norm has one value per *output* feature: the paper writes "column-wise" over a weight stored [in, out], and every
published adapter follows it. All norms, magnitudes and gains are at least fp32: the spread of ``g - 1`` during training
(about 0.0015) is below the resolution of bf16.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

NORM_EPS = 1e-12
"""Lower bound of a norm. A row of zeros (real models have them) then gives zero outputs and gradients, not NaN."""

# Rows of a half-precision weight or activation are widened to fp32 this many elements at a time, never as a whole.
# On a CPU the piece must fit the cache next to its operands; on a GPU it must fill the device.
_CHUNK_ELEMENTS = {"cpu": 2**17}
_CHUNK_ELEMENTS_DEFAULT = 2**24


def weight_norm_sq(weight: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
    """Squared norm of each row of ``weight``, accumulated in at least fp32 without widening the whole weight.

    >>> weight_norm_sq(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([25.,  0.])
    """
    return torch.cat([_wide(rows).square().sum(dim=1) for rows in _split_rows(weight)])


def adapted_norm(
    weight: Float[Tensor, "out in"],
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
    scaling: float,
    base_norm_sq: Float[Tensor, " out"],
) -> Float[Tensor, " out"]:
    """Norm of each row of ``W + s B A`` (paper, equation 5), without building ``B A`` or the sum.

    ``n^2 = |W|^2 + 2 s rowsum(B * (W A^T)) + s^2 rowsum((B (A A^T)) * B)``, with ``base_norm_sq`` the constant
    ``|W|^2`` of :func:`weight_norm_sq`. Differentiable in ``lora_A`` and ``lora_B``.

    >>> W, A, B = torch.eye(2), torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]])
    >>> adapted_norm(W, A, B, 1.0, weight_norm_sq(W))
    tensor([3., 1.])
    """
    with _no_autocast(weight.device.type):
        A, B = _wide(lora_A), _wide(lora_B)
        if weight.dtype == A.dtype:
            cross = weight @ A.T  # [out, rank]
        else:
            cross = torch.cat([rows.to(A.dtype) @ A.T for rows in _split_rows(weight)])
        return _norm_of_update(cross, A, B, scaling, base_norm_sq)


def adapted_norm_from_product(
    cross: Float[Tensor, "out rank"],
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
    scaling: float,
    base_norm_sq: Float[Tensor, " out"],
) -> Float[Tensor, " out"]:
    """:func:`adapted_norm` where ``cross``, ``W A^T``, is all that can be had of the weight."""
    with _no_autocast(cross.device.type):
        return _norm_of_update(cross, _wide(lora_A), _wide(lora_B), scaling, base_norm_sq)


def _norm_of_update(cross: Tensor, A: Tensor, B: Tensor, scaling: float, base_norm_sq: Tensor) -> Tensor:
    norm_sq = base_norm_sq + scaling * (B * (2 * cross + scaling * (B @ (A @ A.T)))).sum(dim=1)
    # rounding can leave a tiny negative number where W + s B A cancels
    return norm_sq.clamp(min=NORM_EPS**2).sqrt()


def gain(magnitude: Float[Tensor, " features"], norm: Float[Tensor, " features"]) -> Float[Tensor, " features"]:
    """``g = m / n``: what each output feature is scaled by."""
    return magnitude / norm.clamp(min=NORM_EPS)


def adapter_linear(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None = None,
    lora_A: Float[Tensor, "rank in"] | None = None,
    lora_B: Float[Tensor, "out rank"] | None = None,
    scaling: float = 1.0,
    gain: Float[Tensor, " out"] | None = None,
    x_dropped: Float[Tensor, "*batch in"] | None = None,
    reuse_output: bool = False,
) -> Float[Tensor, "*batch out"]:
    """``g * (W x + s B A x~) + bias`` as one autograd function; ``B A`` is never built, the bias never scaled.

    Without ``gain`` this is LoRA, without ``lora_A`` and ``lora_B`` magnitude-only tuning. ``gain`` is a tensor of
    the graph: its gradient ``sum(dy * z)``, with ``z = W x + s B A x~``, reaches the magnitude as ``sum(dy * z) / n``
    (no division by the magnitude, which may be 0), and the norm too unless it is detached (paper, section 4.3).

    Args:
        x: input; under autocast it is computed in autocast's dtype, else in its own.
        weight: frozen as a rule, but gets its gradient if it requires one.
        bias: added after scaling.
        lora_A: down-projection, any dtype.
        lora_B: up-projection, any dtype.
        scaling: ``alpha / rank``.
        gain: ``m / n``; kept in fp32 and applied in fp32.
        x_dropped: input of the low-rank path if it differs from ``x`` (dropout).
        reuse_output: keep the output for the gradient of the gain, as ``z = y / g``, and no ``z`` of its own. Whoever
            reads the output often keeps it anyway. It must then not be changed in place, which autograd refuses; a
            gain of exactly 0 gets no gradient. Ignored where there is a bias, beside which ``g z`` may be small.

    A second derivative is refused with an error: the backward pass is written for one.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        x_dropped = None if x_dropped is None else x_dropped.to(dtype)
    with _no_autocast(device):
        reuse_output = reuse_output and bias is None
        return _AdapterLinear.apply(x, x_dropped, weight, bias, lora_A, lora_B, scaling, gain, reuse_output)


def adapt_product(
    z: Float[Tensor, "*batch out"],
    x: Float[Tensor, "*batch in"],
    bias: Float[Tensor, " out"] | None = None,
    lora_A: Float[Tensor, "rank in"] | None = None,
    lora_B: Float[Tensor, "out rank"] | None = None,
    scaling: float = 1.0,
    gain: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """``g * (z + s B A x) + bias`` as one autograd function, for a ``z = W x`` that another kernel gives.

    ``z`` is overwritten: its backward pass must not need it. The rest is as in :func:`adapter_linear`.
    """
    with _no_autocast(z.device.type):
        return _AdaptProduct.apply(z, x, bias, lora_A, lora_B, scaling, gain)


def merge_weight(
    weight: Float[Tensor, "out in"],
    lora_A: Float[Tensor, "rank in"] | None = None,
    lora_B: Float[Tensor, "out rank"] | None = None,
    scaling: float = 1.0,
    magnitude: Float[Tensor, " features"] | None = None,
    norm_axis: str = "out",
) -> Float[Tensor, "out in"]:
    """``g (W + s B A)`` as a new tensor in the dtype of ``weight``, from fp32 arithmetic rounded once.

    ``magnitude`` has one value per output feature, or per input feature with ``norm_axis="in"``.

    >>> merge_weight(torch.eye(2), torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]), 1.0, torch.ones(2))
    tensor([[1., 0.],
            [0., 1.]])
    """
    merged = _wide(weight)
    if lora_A is not None and lora_B is not None:
        merged = torch.addmm(merged, lora_B.to(merged.dtype), lora_A.to(merged.dtype), alpha=scaling)
    if magnitude is not None:
        norm = weight_norm_sq(merged if norm_axis == "out" else merged.T).sqrt()
        scale = gain(magnitude.to(merged.dtype), norm)
        merged = merged * (scale[:, None] if norm_axis == "out" else scale)
    # a copy even where nothing above made one: callers own what they get
    return merged.to(weight.dtype, copy=merged is weight)


def decompose(weight: Float[Tensor, "out in"]) -> tuple[Float[Tensor, " out"], Float[Tensor, "out in"]]:
    """Magnitude and direction of each row (paper, equation 2), in at least fp32; a zero row has direction zero."""
    wide = _wide(weight)
    magnitude = weight_norm_sq(wide).sqrt()
    return magnitude, wide / magnitude.clamp(min=NORM_EPS)[:, None]


class _AdapterLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        scaling: float,
        gain: Tensor | None,
        reuse_output: bool,
    ) -> Tensor:
        z = F.linear(x, weight.to(x.dtype))
        h = None
        if lora_A is not None and lora_B is not None:
            h = F.linear(x if x_dropped is None else x_dropped, lora_A.to(x.dtype))
            # into the base product: the low-rank product never exists at [..., out]
            _flat(z).addmm_(_flat(h), lora_B.to(x.dtype).T, alpha=scaling)
        needs_gain = ctx.needs_input_grad[7]
        if gain is None:
            y = z
        elif needs_gain and not reuse_output:
            y = _scale(z, gain, out=torch.empty_like(z))
        else:
            y = _scale(z, gain, out=z)
        if bias is not None:
            y.add_(bias)
        # what the gradient of the gain is made of, and of the two inputs only those that a gradient is made of
        needs_weight, low_rank = ctx.needs_input_grad[2], h is not None
        kept_x = x if needs_weight or (low_rank and x_dropped is None) else None
        kept_z = None if not needs_gain else y if reuse_output else z
        ctx.save_for_backward(kept_x, x_dropped, h, kept_z, weight, lora_A, lora_B, gain)
        ctx.scaling, ctx.reuse_output, ctx.x_shape = scaling, reuse_output, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, x_dropped, h, z, weight, lora_A, lora_B, gain = ctx.saved_tensors
        s: float = ctx.scaling
        needs_x, needs_dropped, needs_weight, needs_bias, needs_A, needs_B, _, needs_gain, _ = ctx.needs_input_grad
        dx = dx_dropped = dweight = dbias = dA = dB = dgain = None

        flat_dy = _flat(dy)
        if needs_bias:
            dbias = flat_dy.sum(dim=0, dtype=_wide_dtype(dy.dtype)).to(ctx.bias_dtype)
        if needs_gain:
            dgain = _sum_of_products(flat_dy, _flat(z)).to(gain.dtype)
            if ctx.reuse_output:  # z is y, hence g z
                dgain = torch.where(gain == 0, 0, dgain / gain)
        # g * dy is built where there are fewer tokens than inputs; elsewhere the gain goes into a smaller factor
        if needs_x:
            dx = _product_with_gain(flat_dy, gain, weight).view(ctx.x_shape)
        if needs_weight:
            dweight = flat_dy.T @ _flat(x)
            dweight = (dweight if gain is None else gain[:, None] * dweight).to(weight.dtype)
        if h is not None:
            scale = s if gain is None else (s * gain)[:, None]
            if needs_B:
                dB = (scale * (flat_dy.T @ _flat(h))).to(lora_B.dtype)
            if needs_A or needs_x or needs_dropped:
                dh = flat_dy @ (scale * _wide(lora_B)).to(dy.dtype)  # [tokens, rank]
                if needs_A:
                    dA = (dh.T @ _flat(x if x_dropped is None else x_dropped)).to(lora_A.dtype)
                if needs_dropped:
                    dx_dropped = (dh @ lora_A.to(dy.dtype)).view(ctx.x_shape)
                elif needs_x and x_dropped is None and dx is not None:
                    _flat(dx).addmm_(dh, lora_A.to(dy.dtype))
        return dx, dx_dropped, dweight, dbias, dA, dB, None, dgain, None


class _AdaptProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        x: Tensor,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        scaling: float,
        gain: Tensor | None,
    ) -> Tensor:
        # not marked dirty: what is returned is another tensor, and nobody asks for the gradient at the new z
        z = z.contiguous()
        h = None
        if lora_A is not None and lora_B is not None:
            h = F.linear(x.to(z.dtype), lora_A.to(z.dtype))
            _flat(z).addmm_(_flat(h), lora_B.to(z.dtype).T, alpha=scaling)
        y = z.clone() if gain is None else _scale(z, gain, out=torch.empty_like(z))
        if bias is not None:
            y.add_(bias)
        kept_x = x if h is not None else None
        ctx.save_for_backward(kept_x, h, z if ctx.needs_input_grad[6] else None, lora_A, lora_B, gain)
        ctx.scaling = scaling
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, z, lora_A, lora_B, gain = ctx.saved_tensors
        s: float = ctx.scaling
        needs_z, needs_x, needs_bias, needs_A, needs_B, _, needs_gain = ctx.needs_input_grad
        dz = dx = dbias = dA = dB = dgain = None

        flat_dy = _flat(dy)
        if needs_bias:
            dbias = flat_dy.sum(dim=0, dtype=_wide_dtype(dy.dtype)).to(ctx.bias_dtype)
        if needs_gain:
            dgain = _sum_of_products(flat_dy, _flat(z)).to(gain.dtype)
        if h is not None:
            scale = s if gain is None else (s * gain)[:, None]
            if needs_B:
                dB = (scale * (flat_dy.T @ _flat(h))).to(lora_B.dtype)
            dh = flat_dy @ (scale * _wide(lora_B)).to(dy.dtype)  # [tokens, rank]
            if needs_A:
                dA = (dh.T @ _flat(x).to(dh.dtype)).to(lora_A.dtype)
            if needs_x:
                dx = (dh @ lora_A.to(dy.dtype)).view(x.shape).to(x.dtype)
        if needs_z:
            dz = dy if gain is None else _scale(dy, gain, out=torch.empty_like(dy))
        return dz, dx, dbias, dA, dB, None, dgain


def _product_with_gain(
    dy: Float[Tensor, "tokens out"], gain: Float[Tensor, " out"] | None, weight: Float[Tensor, "out in"]
) -> Float[Tensor, "tokens in"]:
    """``(g * dy) @ W`` in the dtype of ``dy``; the gain is put into the smaller of the two."""
    weight = weight.to(dy.dtype)
    if gain is None:
        return dy @ weight
    if dy.shape[0] <= weight.shape[1]:
        return _scale(dy, gain, out=torch.empty_like(dy)) @ weight
    scaled = torch.empty_like(weight)
    parts = _split_rows(weight)
    gains = gain[:, None].split(parts[0].shape[0])
    for rows, row_gains, out_rows in zip(parts, gains, _split_rows(scaled), strict=True):
        torch.mul(rows, row_gains, out=out_rows)
    return dy @ scaled


def _sum_of_products(a: Float[Tensor, "tokens out"], b: Float[Tensor, "tokens out"]) -> Float[Tensor, " out"]:
    """``sum_t a * b`` in at least fp32, a few rows at a time, so that no product of the full size exists."""
    dtype = _wide_dtype(a.dtype)
    a_chunks, b_chunks = _split_rows(a), _split_rows(b)
    # one sum per position in a chunk: a single pass over each, and shorter sums, hence less rounding
    sums = torch.zeros(a_chunks[0].shape, dtype=dtype, device=a.device)
    for a_rows, b_rows in zip(a_chunks, b_chunks, strict=True):
        sums[: a_rows.shape[0]].addcmul_(a_rows.to(dtype), b_rows.to(dtype))
    return sums.sum(dim=0)


def _scale(matrix: Float[Tensor, "*batch out"], gain: Float[Tensor, " out"], out: Tensor) -> Tensor:
    """``gain * matrix`` into ``out``, multiplied in the dtype of ``gain`` and rounded once."""
    if matrix.dtype == gain.dtype:
        return torch.mul(matrix, gain, out=out)
    # a CPU would widen the whole matrix
    for rows, out_rows in zip(_split_rows(_flat(matrix)), _split_rows(out.view(-1, out.shape[-1])), strict=True):
        torch.mul(rows, gain, out=out_rows)
    return out


def _split_rows(matrix: Tensor) -> tuple[Tensor, ...]:
    elements = _CHUNK_ELEMENTS.get(matrix.device.type, _CHUNK_ELEMENTS_DEFAULT)
    return matrix.split(max(1, elements // max(1, matrix.shape[1])))


def _no_autocast(device: str) -> AbstractContextManager[None]:
    # the meta device has no autocast, and refuses to switch it off
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor.dtype))
