"""The method in pure torch: knows nothing of Lightning, transformers or tasks."""

from dora_lightning.adapters.config import AdapterConfig
from dora_lightning.adapters.inject import (
    adapted_submodule,
    adapter_layers,
    find_targets,
    inject_adapters,
    restrict_to_magnitude,
)
from dora_lightning.adapters.layers import AdapterLayer, DoRALinear, LoRALinear, MagnitudeLinear, forget_norms
from dora_lightning.adapters.merge import adapters_disabled, merge_adapters, unmerge_adapters
from dora_lightning.adapters.norm_cache import weights_kept
from dora_lightning.adapters.peft_reading import load_peft_adapter
from dora_lightning.adapters.peft_writing import save_peft_adapter
from dora_lightning.adapters.summary import AdapterSummary, parameter_group, summarize_adapters
from dora_lightning.adapters.vera import DVoRALinear, VeRALinear

__all__ = [
    "AdapterConfig",
    "AdapterLayer",
    "AdapterSummary",
    "DVoRALinear",
    "DoRALinear",
    "LoRALinear",
    "MagnitudeLinear",
    "VeRALinear",
    "adapted_submodule",
    "adapter_layers",
    "adapters_disabled",
    "find_targets",
    "forget_norms",
    "inject_adapters",
    "load_peft_adapter",
    "merge_adapters",
    "parameter_group",
    "restrict_to_magnitude",
    "save_peft_adapter",
    "summarize_adapters",
    "unmerge_adapters",
    "weights_kept",
]
