"""Write the merged model beside the checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from typing_extensions import override

from dora_lightning.adapters import AdapterConfig, adapted_submodule
from dora_lightning.training.adapter_checkpoint import AdapterCheckpoint
from dora_lightning.training.base_identity import base_identity
from dora_lightning.training.merging import merge_to_folder


class MergeOnSave(Callback):
    """At the end of a fit, merge the adapter into a Hugging Face folder that ``transformers`` loads by itself.

    The base's weights are streamed from its own files, one tensor at a time; the weights that train are not touched.

    Args:
        dirpath: folder to write; ``merged`` in the run's log folder if not given. One from before is replaced.
        base: folder or hub id of the base model; by default what the adapted model was loaded from.
    """

    def __init__(self, dirpath: str | None = None, base: str | None = None) -> None:
        self.dirpath = dirpath
        self.base = base

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge on one process, while the others wait."""
        folder = self._folder(trainer)
        if trainer.is_global_zero:
            _, model = adapted_submodule(pl_module)
            config = cast(AdapterConfig, model.adapter_config)
            base = self.base or _loaded_from(pl_module, model)
            tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
            adapter = AdapterCheckpoint(config, base_identity(model, base), tensors)
            merge_to_folder(base, adapter, folder, overwrite=True)
            rank_zero_info(f"Merged model: {folder}")
        trainer.strategy.barrier("merge")

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.dirpath) if self.dirpath else Path(trainer.log_dir or trainer.default_root_dir) / "merged"


def _loaded_from(pl_module: LightningModule, model: nn.Module) -> str:
    name = getattr(pl_module, "model_name_or_path", None) or getattr(
        getattr(model, "config", None), "name_or_path", None
    )
    if not name:
        raise ValueError("MergeOnSave does not know what the base model was loaded from; pass base=<folder or hub id>")
    return str(name)
