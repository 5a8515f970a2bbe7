"""A transformer block of the LLaMA family as sizes, and where gradients flow in it.

Activations and operations are counted from these, without running anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dora_lightning.adapters import AdapterConfig
from dora_lightning.adapters.layers import AdapterLayer
from dora_lightning.planning.models import PlannedModel

_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMS = {"input_layernorm", "post_attention_layernorm"}


@dataclass(frozen=True)
class Linear:
    """A linear layer ``W [out, in]`` and how it is adapted.

    Attributes:
        inputs: columns of ``W``.
        outputs: rows of ``W``.
        method: as in :class:`~dora_lightning.adapters.AdapterConfig`; ``None`` where it is frozen.
        rank: of the update that is applied: twice the adapter's where first values are taken out of it.
        dropout: probability.
        exact_dropout: the base path drops too, at the price of a second product.
        norm_axis: where the magnitude is.
        doubled: first values are taken out of the update.
        keeps_output: the gradient of the gain is made of the output, which others may keep too.
    """

    inputs: int
    outputs: int
    method: str | None = None
    rank: int = 0
    dropout: float = 0.0
    exact_dropout: bool = False
    norm_axis: str = "out"
    doubled: bool = False
    keeps_output: bool = False

    @property
    def weights(self) -> int:
        """Weights of ``W``."""
        return self.inputs * self.outputs

    @property
    def has_magnitude(self) -> bool:
        """Whether it has a gain."""
        return self.method in ("dora", "dvora", "magnitude")


@dataclass(frozen=True)
class Block:
    """Sizes of one transformer block.

    Attributes:
        hidden: features of the residual stream.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: features of a head.
        linears: ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    linears: tuple[tuple[str, Linear], ...]

    @property
    def named(self) -> Mapping[str, Linear]:
        """The linear layers by name."""
        return dict(self.linears)

    def needs_gradient(self, stream: bool) -> tuple[dict[str, bool], bool]:
        """Which linear layers' inputs get a gradient, and whether the block's output does.

        Below the first adapter nothing does, and nothing is kept there.

        Args:
            stream: whether the block's input gets one.
        """
        trains = {name: linear.method is not None for name, linear in self.linears}
        attention = stream or trains["q"] or trains["k"] or trains["v"]
        middle = attention or trains["o"]  # the residual stream between attention and MLP
        product = middle or trains["gate"] or trains["up"]
        inputs = dict.fromkeys("qkv", stream) | {"o": attention, "gate": middle, "up": middle, "down": product}
        return inputs, product or trains["down"]


@dataclass(frozen=True)
class Sizes:
    """What is counted of a model.

    Attributes:
        blocks: in their order.
        embedding: the input embedding as ``W [hidden, vocabulary]``.
        head: the output embedding, ``W [vocabulary, hidden]``.
    """

    blocks: tuple[Block, ...]
    embedding: Linear
    head: Linear


def read_sizes(planned: PlannedModel) -> Sizes:
    """Sizes of a model on the meta device.

    Raises:
        ValueError: its blocks are not LLaMA's, or it is adapted in a way that is not counted.
    """
    model, adapter = planned.model, planned.adapter
    if not adapter.detach_norm:
        raise ValueError(
            "detach_norm: false keeps what norms are computed from, whole weights included; plan does not count it"
        )
    config: Any = model.config
    heads, hidden = config.num_attention_heads, config.hidden_size
    layers = getattr(model.base_model, "layers", ())
    blocks = []
    for layer in layers:
        linears = tuple((name, _linear_at(layer, path, planned)) for name, path in _LINEARS.items())
        blocks.append(
            Block(
                hidden=hidden,
                heads=heads,
                kv_heads=getattr(config, "num_key_value_heads", None) or heads,
                head_dim=getattr(config, "head_dim", None) or hidden // heads,
                linears=linears,
            )
        )
        _check_nothing_else(layer, planned.name)
    if not blocks:
        raise ValueError(f"{planned.name}, a {type(model).__name__}, has no blocks that plan knows; it knows LLaMA's")
    embedding = _linear(model.get_input_embeddings(), adapter, planned.keeps_first_values)
    head = _linear(model.get_output_embeddings(), adapter, planned.keeps_first_values)
    return Sizes(tuple(blocks), embedding, head)


def _linear_at(layer: nn.Module, path: str, planned: PlannedModel) -> Linear:
    try:
        module = layer.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"{planned.name}: a {type(layer).__name__} has no {path}; plan knows blocks of LLaMA's form alone"
        ) from error
    return _linear(module, planned.adapter, planned.keeps_first_values)


def _linear(module: Any, adapter: AdapterConfig, doubled: bool) -> Linear:
    if not isinstance(module, AdapterLayer):
        outputs, inputs = module.weight.shape
        if isinstance(module, nn.Embedding):
            inputs, outputs = outputs, inputs
        return Linear(inputs, outputs, "full" if module.weight.requires_grad else None)
    low_rank = module.method != "magnitude"
    return Linear(
        inputs=module.in_features,
        outputs=module.out_features,
        method=module.method,
        rank=getattr(module, "rank", 0) * (2 if doubled else 1),
        dropout=adapter.dropout if low_rank else 0.0,
        exact_dropout=adapter.exact_dropout and low_rank,
        norm_axis=adapter.norm_axis,
        doubled=doubled and low_rank,
        keeps_output=module.reuse_output and module.bias is None and module.method in ("dora", "magnitude"),
    )


def _check_nothing_else(layer: nn.Module, name: str) -> None:
    """Refuse blocks with more parts than LLaMA's (experts, norms of heads), whose activations would be left out."""
    known = [*_LINEARS.values(), *_NORMS]
    for path, _ in layer.named_parameters():
        if not any(path.startswith(f"{part}.") for part in known):
            raise ValueError(f"{name}: a {type(layer).__name__} has {path}; plan knows blocks of LLaMA's form alone")
