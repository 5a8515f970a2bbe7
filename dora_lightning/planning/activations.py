"""Bytes that a forward pass keeps for the backward pass, counted from sizes.

Shapes: n tokens in a micro-batch of B rows of T tokens, D hidden features, F of the MLP, Q = H d of the queries and
K = H_kv d of the keys, r the rank, N supervised positions, V vocabulary; ``a`` bytes of a number that is
computed with, ``w`` bytes of one in the residual stream (another under autocast with a base of fp32).

An adapted linear layer, ``adapters.functional._AdapterLinear`` (what it saves, in the order of its code)::

    x          a n in     one tensor for q, k and v, and for gate and up, unless autocast casts it for each
    x~         a n in     with dropout, one for each layer, and its mask (1 byte a number; ``a`` on a CPU)
    h = A x~   a n r
    z          a n out    dora, dvora and magnitude: for the gradient of the gain
    g, |V|     8 out      fp32: gain, and the norm that its quotient keeps

Exact dropout keeps ``x - x~`` and ``x~`` in place of ``x`` and ``x~``. Over a quantised base, ``_AdaptProduct`` keeps
``x~`` alone. VeRA keeps ``x``, ``A x~`` (a n r), ``B h`` (a n out), and copies of the pair in the dtype computed with.

The rest of a block, with frozen weights, as transformers computes it::

    RMSNorm    4 n D + 4 n      twice: its input in fp32 and the inverse root
    attention  a n (2 Q + 2 K) + 4 n H      q, k, v, output, and the logarithm of the softmax's sum
               a n (4 Q) + a B T T          with a mask: keys and values are repeated for all heads, and the mask is
                                            made in ``a`` for each block (sdpa; padding or packed rows need one)
    SwiGLU     3 a n F          the gate's output, its SiLU, and up's output; the product is the input of down
"""

from __future__ import annotations

from dataclasses import dataclass

from dora_lightning.backbones.token_losses import tokens_at_once
from dora_lightning.planning.blocks import Block, Linear, Sizes


@dataclass(frozen=True)
class Step:
    """A micro-batch on one device, and how it is computed.

    Attributes:
        rows: sequences in a micro-batch, B.
        length: tokens in a sequence, T.
        supervised: share of positions that are supervised.
        compute_bytes: bytes of a number that linear layers compute with.
        stream_bytes: bytes of a number in the residual stream.
        attention: ``sdpa``, ``eager`` or ``flash_attention_2``.
        masked: whether attention is given a mask.
        quantized: whether the base is packed.
        checkpointing: whether blocks are computed again in the backward pass.
        on_cpu: dropout's mask is a tensor of numbers on a CPU, and bytes on a GPU.
    """

    rows: int
    length: int
    supervised: float = 1.0
    compute_bytes: int = 2
    stream_bytes: int = 2
    attention: str = "sdpa"
    masked: bool = False
    quantized: bool = False
    checkpointing: bool = False
    on_cpu: bool = False

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch, n."""
        return self.rows * self.length

    @property
    def positions(self) -> int:
        """Supervised positions, N: each predicts the token after it, so a row has one fewer."""
        return round(self.supervised * self.rows * (self.length - 1))


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch takes beside weights and optimiser.

    Attributes:
        saved: kept from the forward to the backward pass, without logits.
        block: of ``saved``, or with checkpointing beside it: the block that keeps most.
        logits: kept of the loss.
        logits_peak: the most that logits and their gradients take at once.
        backward: temporaries of the backward pass of a block.
    """

    saved: int
    block: int
    logits: int
    logits_peak: int
    backward: int

    def peak(self, checkpointing: bool) -> int:
        """The most there is at once: logits are gone when the first block's backward pass begins."""
        return self.saved + max(self.logits_peak, self.backward + (self.block if checkpointing else 0))


def activations(sizes: Sizes, step: Step) -> Activations:
    """Count the activations of a micro-batch; formulas are at the head of this file."""
    n, width = step.tokens, sizes.head.inputs
    kept, largest = 0, 0
    stream = sizes.embedding.method is not None
    kept += _embedding_bytes(sizes.embedding, step)
    known: dict[tuple[Block, bool], int] = {}
    for block in sizes.blocks:
        if (block, stream) not in known:
            known[block, stream] = block_bytes(block, step, stream)
        kept += step.stream_bytes * n * width if step.checkpointing else known[block, stream]
        largest = max(largest, known[block, stream])
        stream = block.needs_gradient(stream)[1]
    first = sizes.blocks[0]
    at_once = tokens_at_once(sizes.head.outputs)
    # cosines and sines of positions, for all blocks; one row of them unless rows are packed
    kept += 2 * step.stream_bytes * step.length * first.head_dim
    if step.masked and step.attention != "flash_attention_2":
        kept += step.rows * step.length**2  # as booleans, which each block casts
    kept += _norm_bytes(n, width)
    head = dict[str, int]()
    _keep_linear(head, "head", sizes.head, "head", True, Step(1, step.positions, 1.0, *_dtypes(step)), cast=True)
    return Activations(
        saved=kept + sum(head.values()) + n,
        block=largest,
        logits=8 * step.positions + (4 * step.positions * sizes.head.outputs if step.positions <= at_once else 0),
        # of the loss in fp32: the logarithms of the softmax, their gradient and that of the logits
        logits_peak=12 * min(step.positions, at_once) * sizes.head.outputs,
        backward=_backward_bytes(first, step),
    )


def block_bytes(block: Block, step: Step, stream: bool = True) -> int:
    """Bytes that a block keeps.

    Args:
        block: its sizes.
        step: the micro-batch.
        stream: whether the block's input gets a gradient.
    """
    n, a, linears = step.tokens, step.compute_bytes, block.named
    needs, _ = block.needs_gradient(stream)
    kept: dict[str, int] = {}
    if stream:
        kept["norm 1"] = _norm_bytes(n, block.hidden)
    # attention keeps values as they are, unless they are repeated for several heads
    repeated = step.attention == "eager" or (step.masked and step.attention == "sdpa")
    values_kept = not repeated or block.heads == block.kv_heads
    for name in "qkv":
        output_kept = name == "v" and values_kept
        _keep_linear(kept, name, linears[name], "x 1", needs[name], step, cast=True, output_kept=output_kept)
    if needs["o"]:
        kept |= _attention_bytes(block, step)
    # the output of attention is kept once, for both
    _keep_linear(kept, "o", linears["o"], "attention", needs["o"], step)
    if needs["gate"]:
        kept["norm 2"] = _norm_bytes(n, block.hidden)
    gate, up = (needs[name] or linears[name].method is not None for name in ("gate", "up"))
    for name in ("gate", "up"):
        _keep_linear(kept, name, linears[name], "x 2", needs[name], step, cast=True, output_kept=gate)
    inner = a * n * linears["up"].outputs
    kept["swiglu"] = inner * (gate + gate + up)
    _keep_linear(kept, "down", linears["down"], "product", needs["down"], step)
    return sum(kept.values())


def _keep_linear(
    kept: dict[str, int],
    name: str,
    linear: Linear,
    x: str,
    needs_x: bool,
    step: Step,
    cast: bool = False,
    output_kept: bool = False,
) -> None:
    """Add what a linear layer keeps; ``x`` is the name that its input has where others keep it too.

    ``cast``: the input comes from the residual stream, in its dtype. ``output_kept``: who reads the output keeps it.
    """
    n, a = step.tokens, step.compute_bytes
    own = cast and a != step.stream_bytes  # autocast makes a copy for each layer
    shared, x = x, f"{name} x" if own else x
    inputs = a * n * linear.inputs
    if linear.method is None:
        if needs_x and a != step.stream_bytes and not step.quantized:
            kept[f"{name} weight"] = a * linear.weights
        return
    if linear.method == "full":
        kept.setdefault(x, inputs)
        return
    rank, magnitude = linear.rank, linear.has_magnitude
    vera = linear.method in ("vera", "dvora")
    if linear.dropout and needs_x:
        number = step.stream_bytes if cast else a
        kept[f"{name} mask"] = n * linear.inputs * (number if step.on_cpu else 1)
    if magnitude and linear.norm_axis == "in":
        # what is scaled is not cast yet
        kept.setdefault(f"{shared} unscaled" if own else x, n * linear.inputs * (step.stream_bytes if cast else a))
        x = f"{name} scaled"
        kept[f"{name} vectors"] = 8 * linear.inputs
        magnitude = False
    # the base's product alone needs no input for its gradient
    if linear.dropout and not vera:
        kept[f"{name} x~"] = inputs
    elif rank and not vera:
        kept.setdefault(x, inputs)
    kept[f"{name} h"] = a * n * rank
    if vera:
        kept[f"{name} update"] = a * n * linear.outputs
        if a != 4:
            kept[f"{name} pair"] = a * rank * (linear.inputs + linear.outputs)
    if magnitude:
        # behind exact dropout the output is a sum, which nobody keeps
        if step.quantized or not (linear.keeps_output and output_kept) or (linear.dropout and linear.exact_dropout):
            kept[f"{name} z"] = a * n * linear.outputs
        kept[f"{name} vectors"] = 8 * linear.outputs
    if linear.doubled:
        kept[f"{name} factors"] = 4 * rank * (linear.inputs + linear.outputs)


def _attention_bytes(block: Block, step: Step) -> dict[str, int]:
    n, a = step.tokens, step.compute_bytes
    queries, keys = block.heads * block.head_dim, block.kv_heads * block.head_dim
    scores = step.rows * block.heads * step.length**2
    if step.attention == "eager":
        softmax = 4 * scores + (a * scores if a != 4 else 0)
        return {"qkv": 3 * a * n * queries, "softmax": softmax, "attention": a * n * queries}
    masked = step.masked and step.attention == "sdpa"
    kept = {"attention": a * n * queries, "sum": 4 * n * block.heads}
    kept["qkv"] = a * n * (3 * queries if masked else queries + 2 * keys)
    if masked:
        kept["mask"] = a * step.rows * step.length**2
    return kept


def _norm_bytes(tokens: int, width: int) -> int:
    return 4 * tokens * width + 4 * tokens


def _embedding_bytes(embedding: Linear, step: Step) -> int:
    """An adapted embedding keeps its indices, ``h`` in fp32, and ``z``."""
    n = step.tokens
    if embedding.method is None:
        return 0
    if embedding.method == "full":
        return 8 * n
    z = step.stream_bytes * n * embedding.outputs if embedding.has_magnitude else 0
    return 8 * n + 4 * n * embedding.rank + z


def _backward_bytes(block: Block, step: Step) -> int:
    """Temporaries beside what is kept, which is freed on the way.

    Either the gradients of SwiGLU's two factors, or, for a gain's gradient, slabs of an output and of its gradient that
    are widened to fp32, with their sums: those of down, or those of up when down's input is gone. Over a quantised
    base one weight unpacked too.
    """
    linears = block.named
    inner = step.compute_bytes * step.tokens * linears["up"].outputs
    unpacked = step.compute_bytes * max(linear.weights for linear in linears.values()) if step.quantized else 0
    input_of_down = 0 if linears["down"].method is None else inner
    widened_up, widened_down = _widened_bytes(linears["up"], step), _widened_bytes(linears["down"], step)
    return unpacked + max(2 * inner, widened_up - input_of_down, widened_down)


def _widened_bytes(linear: Linear, step: Step) -> int:
    slab = min(_SLAB_ON_CPU if step.on_cpu else _SLAB, step.tokens * linear.outputs)
    return 4 * slab * (3 if step.compute_bytes < 4 else 1) if linear.has_magnitude else 0


# numbers in a slab of adapters.functional
_SLAB, _SLAB_ON_CPU = 2**24, 2**17


def _dtypes(step: Step) -> tuple[int, int]:
    return step.compute_bytes, step.stream_bytes
