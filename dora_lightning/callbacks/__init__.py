"""Plug-ins for any LightningModule, one file each."""

from dora_lightning.callbacks.merge_on_save import MergeOnSave

__all__ = ["MergeOnSave"]
