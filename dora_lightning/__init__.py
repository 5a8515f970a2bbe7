"""DoRA (weight-decomposed low-rank adaptation) for PyTorch Lightning."""

from dora_lightning.adapters import AdapterConfig, inject_adapters, merge_adapters, unmerge_adapters

__all__ = ["AdapterConfig", "inject_adapters", "merge_adapters", "unmerge_adapters"]
__version__ = "0.1.0"
