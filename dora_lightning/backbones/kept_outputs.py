"""Which adapted layers may keep their output for the backward pass, in place of a product of their own."""

from __future__ import annotations

from torch import nn

from dora_lightning.adapters import adapter_layers

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# their blocks change no output in place; kernels put in their stead may, and without telling autograd
_MODELING_FILES = {f"transformers.models.{name}.modeling_{name}" for name in _MODEL_TYPES}


def reuse_outputs(model: nn.Module) -> int:
    """Let the adapted layers in blocks that are known to leave outputs as they are keep these alone.

    See ``reuse_output`` of :func:`dora_lightning.adapters.functional.adapter_linear`. A block whose ``forward`` was
    replaced is not known any more.

    Args:
        model: with adapters.

    Returns:
        How many layers do.
    """
    count = 0
    for name, layer in adapter_layers(model):
        block = model.get_submodule(name.rpartition(".")[0])
        layer.reuse_output = type(block).__module__ in _MODELING_FILES and "forward" not in vars(block)
        count += layer.reuse_output
    return count
