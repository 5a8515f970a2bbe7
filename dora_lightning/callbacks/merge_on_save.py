"""Write the merged model beside the checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from typing_extensions import override

from dora_lightning.adapters import AdapterConfig, adapted_submodule
from dora_lightning.training.adapter_checkpoint import AdapterCheckpoint, frozen_names, read_adapter_checkpoint
from dora_lightning.training.base_identity import base_identity
from dora_lightning.training.merging import merge_to_folder
from dora_lightning.training.sharded_checkpoint import whole_tensor
from dora_lightning.training.stored_names import base_name_or_path

WHEN = ("checkpoint", "best", "last", "fit_end")
SOURCE_FILE = "merged_from.json"
"""In a merged folder: the checkpoint it was made from, so that a restarted run knows what is merged already."""


class MergeOnSave(Callback):
    """Merges adapters into Hugging Face folders that ``transformers`` loads by itself.

    The base's weights are streamed from its own files, one tensor at a time; what trains is not touched. A folder is
    there whole or not at all. For each checkpoint that ModelCheckpoint keeps, ``<checkpoint>-merged`` stands beside it,
    and goes when the checkpoint goes.

    Args:
        when: ``checkpoint`` for every checkpoint that is kept, ``best`` or ``last`` for that one alone, or ``fit_end``
            for one folder at the end of the fit. A checkpoint whose score is NaN is not the best.
        dirpath: folder for ``fit_end``; ``merged`` in the run's log folder if not given. One from before is replaced.
        base: folder or hub id of the base model; by default what the adapted model was loaded from.

    Raises:
        ValueError: unknown ``when``, or a ``dirpath`` that would be ignored.
    """

    def __init__(self, when: str = "checkpoint", dirpath: str | None = None, base: str | None = None) -> None:
        if when not in WHEN:
            raise ValueError(f"when must be one of {', '.join(WHEN)}, got {when!r}")
        if dirpath is not None and when != "fit_end":
            raise ValueError("dirpath is for when='fit_end'; merged checkpoints stand beside their checkpoints")
        self.when = when
        self.dirpath = dirpath
        self.base = base
        self._seen: list[dict[str, Any]] = []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Merge what was saved since the last batch: ModelCheckpoint always comes after the other callbacks."""
        self._merge_checkpoints(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge what was saved last, or the model as it is."""
        if self.when == "fit_end":
            self._merge_live(trainer, pl_module)
        else:
            self._merge_checkpoints(trainer, pl_module)

    def _merge_checkpoints(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "fit_end" or not trainer.is_global_zero:
            return
        wanted, kept = self._checkpoints(trainer)
        present = [_stamp(checkpoint) for checkpoint in kept if checkpoint.is_file()]
        if present == self._seen:
            return
        self._seen = present
        folders = {checkpoint.parent for checkpoint in kept}
        for folder in folders:
            for merged in folder.glob("*-merged"):
                source = _source_of(merged)
                if source is not None and not (folder / source["checkpoint"]).exists():
                    shutil.rmtree(merged)
        for checkpoint in wanted:
            if checkpoint.is_file() and _source_of(_merged_folder(checkpoint)) != _stamp(checkpoint):
                adapter = read_adapter_checkpoint(checkpoint)
                _, model = adapted_submodule(pl_module)
                base = self.base or _loaded_from(pl_module, model)
                notes = {SOURCE_FILE: json.dumps(_stamp(checkpoint)) + "\n"}
                folder = merge_to_folder(base, adapter, _merged_folder(checkpoint), overwrite=True, notes=notes)
                rank_zero_info(f"Merged model: {folder}")

    def _checkpoints(self, trainer: Trainer) -> tuple[list[Path], list[Path]]:
        """Checkpoints to merge, and all that are kept."""
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        best = [callback.best_model_path for callback in callbacks if _has_a_score(callback)]
        last = [callback.last_model_path for callback in callbacks]
        top = [path for callback in callbacks for path in callback.best_k_models]
        kept = [*best, *last, *top]
        chosen = {"checkpoint": kept, "best": best, "last": last}[self.when]
        return _paths(chosen), _paths(kept)

    def _merge_live(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _, model = adapted_submodule(pl_module)
        # what a checkpoint holds: batch norms' statistics change too, and are no parameters
        frozen = frozen_names(model)
        # every process takes part in gathering what is sharded
        tensors = {name: whole_tensor(t) for name, t in model.state_dict().items() if name not in frozen}
        root = Path(trainer.log_dir or trainer.default_root_dir)  # asks the first process
        if trainer.is_global_zero:
            config = cast(AdapterConfig, model.adapter_config)
            base = self.base or _loaded_from(pl_module, model)
            adapter = AdapterCheckpoint(config, base_identity(model, base), tensors)
            folder = Path(self.dirpath) if self.dirpath else root / "merged"
            merge_to_folder(base, adapter, folder, overwrite=True)
            rank_zero_info(f"Merged model: {folder}")
        trainer.strategy.barrier("merge")


def _has_a_score(callback: ModelCheckpoint) -> bool:
    """Whether the best checkpoint is the best: the first one is, to Lightning, even where its score is NaN."""
    score = callback.best_model_score
    return callback.monitor is None or score is None or math.isfinite(float(score))


def _paths(names: list[str]) -> list[Path]:
    return [Path(name) for name in dict.fromkeys(names) if name]


def _merged_folder(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}-merged")


def _stamp(checkpoint: Path) -> dict[str, Any]:
    """What tells a checkpoint from a later one of the same name."""
    stat = checkpoint.stat()
    return {"checkpoint": checkpoint.name, "size": stat.st_size, "modified_ns": stat.st_mtime_ns}


def _source_of(merged: Path) -> dict[str, Any] | None:
    path = merged / SOURCE_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def _loaded_from(pl_module: LightningModule, model: nn.Module) -> str:
    name = getattr(pl_module, "model_name_or_path", None) or base_name_or_path(model)
    if not name:
        raise ValueError("MergeOnSave does not know what the base model was loaded from; pass base=<folder or hub id>")
    return str(name)
