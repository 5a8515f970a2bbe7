"""Plug-ins for any LightningModule, one file each."""

from dora_lightning.callbacks.dora import DoRA
from dora_lightning.callbacks.group_learning_rates import GroupLearningRates
from dora_lightning.callbacks.magnitude_only import MagnitudeOnly
from dora_lightning.callbacks.merge_on_save import MergeOnSave
from dora_lightning.callbacks.run_summary import RunSummary
from dora_lightning.callbacks.sharded_training import ShardedTraining
from dora_lightning.callbacks.weight_decomposition import WeightDecomposition

__all__ = [
    "DoRA",
    "GroupLearningRates",
    "MagnitudeOnly",
    "MergeOnSave",
    "RunSummary",
    "ShardedTraining",
    "WeightDecomposition",
]
