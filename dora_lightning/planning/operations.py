"""Floating-point operations of a training step over a frozen base, counted from sizes.

A product with ``W [out, in]`` takes ``2 out in`` operations a token. With P weights in the blocks a token takes 2 P in
the forward pass and 2 P for the gradient of the activations: 4 P, and 6 P if blocks are computed again. The gradient of
the weights, another 2 P, is what a frozen base saves. Blocks below the first adapter have no backward pass.
"""

from __future__ import annotations

from dora_lightning.planning.activations import Step
from dora_lightning.planning.blocks import Block, Linear, Sizes


def step_operations(sizes: Sizes, step: Step) -> int:
    """Operations of the forward and backward pass of one micro-batch."""
    total, stream = 0, sizes.embedding.method is not None
    known: dict[tuple[Block, bool], int] = {}
    for block in sizes.blocks:
        if (block, stream) not in known:
            known[block, stream] = _block(block, step, stream)
        total += known[block, stream]
        stream = block.needs_gradient(stream)[1]
    forward, backward = _linear(sizes.head, needs_x=True)
    return total + step.positions * (forward + backward)


def forward_operations(sizes: Sizes, step: Step) -> int:
    """Operations of a forward pass of the base alone, without adapters, as preference tuning's reference takes it."""
    linears = sum(2 * linear.weights for block in sizes.blocks for _, linear in block.linears)
    attention = sum(_attention(block, step) for block in sizes.blocks)
    return step.tokens * (linears + attention) + step.positions * 2 * sizes.head.weights


def norm_operations(sizes: Sizes) -> int:
    """Operations of all norms, once per optimiser step: ``W A^T`` takes ``2 out in r``."""
    return sum(
        2 * linear.weights * linear.rank
        for block in sizes.blocks
        for _, linear in block.linears
        if linear.method in ("dora", "dvora")
    )


def _block(block: Block, step: Step, stream: bool) -> int:
    needs, _ = block.needs_gradient(stream)
    per_token = 0
    for name, linear in block.linears:
        forward, backward = _linear(linear, needs[name])
        per_token += forward * (2 if step.checkpointing else 1) + backward
    attention = _attention(block, step)
    per_token += attention * (2 if step.checkpointing else 1)
    if needs["o"]:
        # five products in place of two: the kernels compute the scores again; eager keeps them and needs four
        per_token += 2 * attention if step.attention == "eager" else 5 * attention // 2
    return step.tokens * per_token


def _attention(block: Block, step: Step) -> int:
    """Scores and their product with the values, ``4 T Q`` a token; half of it where kernels skip what is not seen."""
    whole = 4 * step.length * block.heads * block.head_dim
    skips = step.attention == "flash_attention_2" or (step.attention == "sdpa" and not step.masked)
    return whole // 2 if skips else whole


def _linear(linear: Linear, needs_x: bool) -> tuple[int, int]:
    """Operations a token of the forward and of the backward pass."""
    base, r = 2 * linear.weights, linear.rank
    low_rank = 2 * r * (linear.inputs + linear.outputs)
    products = 2 if linear.exact_dropout and linear.dropout else 1
    forward = base * products + low_rank
    backward = base * products if needs_x else 0
    if linear.method == "full":
        backward += base
    elif linear.method in ("vera", "dvora"):
        backward += low_rank  # the pair is frozen: the gradients of h and of x alone
    elif r:
        # dh and dB with B; dA, and dx where it is needed, with A
        backward += 4 * r * linear.outputs + (4 if needs_x else 2) * r * linear.inputs
    return forward, backward
