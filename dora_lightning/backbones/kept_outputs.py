"""Which adapted layers may keep their output for the backward pass, in place of a product of their own."""

from __future__ import annotations

import sys

from torch import nn

from dora_lightning.adapters import adapter_layers

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# their blocks change no output in place; kernels put in their stead may, and without telling autograd
_MODELING_FILES = {f"transformers.models.{name}.modeling_{name}" for name in _MODEL_TYPES}


def reuse_outputs(model: nn.Module) -> int:
    """Let the adapted layers in blocks that are known to leave outputs as they are keep these alone.

    See ``reuse_output`` of :func:`dora_lightning.adapters.functional.adapter_linear`. A block whose ``forward`` was
    replaced is not known any more, nor is one whose rotary embedding was.

    Args:
        model: with adapters.

    Returns:
        How many layers do.
    """
    count = 0
    for name, layer in adapter_layers(model):
        block = model.get_submodule(name.rpartition(".")[0])
        layer.reuse_output = _leaves_outputs(block)
        count += layer.reuse_output
    return count


def _leaves_outputs(block: nn.Module) -> bool:
    name = type(block).__module__
    if name not in _MODELING_FILES or "forward" in vars(block):
        return False
    # it gets queries and keys in the memory of their projections' outputs
    rotary = getattr(sys.modules[name], "apply_rotary_pos_emb", None)
    return getattr(rotary, "__module__", None) == name
