"""DoRA (weight-decomposed low-rank adaptation) for PyTorch Lightning."""

from dora_lightning.adapters import (
    AdapterConfig,
    adapters_disabled,
    inject_adapters,
    load_peft_adapter,
    merge_adapters,
    save_peft_adapter,
    unmerge_adapters,
)

__all__ = [
    "AdapterConfig",
    "adapters_disabled",
    "inject_adapters",
    "load_peft_adapter",
    "merge_adapters",
    "save_peft_adapter",
    "unmerge_adapters",
]
__version__ = "0.1.0"
