"""Write the merged model beside the checkpoints."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from dora_lightning.adapters import AdapterConfig, adapted_submodule
from dora_lightning.files import check_folder, remove_folder
from dora_lightning.files.digests import file_digest
from dora_lightning.files.folders import adopt_folder
from dora_lightning.pretrained import local_folder
from dora_lightning.training.adapter_checkpoint import AdapterCheckpoint, frozen_names, read_adapter_checkpoint
from dora_lightning.training.base_identity import base_identity
from dora_lightning.training.first_process import first_process_works
from dora_lightning.training.merging import SOURCE_FILE, merge_to_folder
from dora_lightning.training.sharded_checkpoint import whole_tensor
from dora_lightning.training.stored_names import base_name_or_path
from dora_lightning.training.trained_inputs import inputs_of

WHEN = ("checkpoint", "best", "last", "fit_end")


class MergeOnSave(Callback):
    """Merges adapters into Hugging Face folders that ``transformers`` loads by itself.

    The base's weights are streamed from its own files, one tensor at a time; what trains is not touched. A folder is
    there whole or not at all. For each checkpoint that ModelCheckpoint keeps, ``<checkpoint>-merged`` stands beside it,
    and goes when the checkpoint goes. While the first process merges, the others wait for as long as it takes.

    A folder that merging did not make, or that holds other files too, is never replaced: for ``fit_end`` that is an
    error at the start of the fit; beside a checkpoint it is a warning, and the checkpoint is not merged.

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
        self._seen: list[Any] = []
        self._merged: dict[Path, Path] = {}
        self._digests: dict[tuple[Path, int, int], str] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See before the fit whether its end can be written.

        Raises:
            FileExistsError: the folder may not be replaced.
        """
        if self.when == "fit_end" and stage == "fit":
            base = self.base or getattr(pl_module, "model_name_or_path", None)
            root, folder = self._folders(trainer)
            # what describes a model's parts may be too long for the name of a file, which Path.is_dir raises
            keep = [Path(base)] if isinstance(base, str) and os.path.isdir(base) else []
            check_folder(folder, overwrite=True, keep=[root, *keep])

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
        if self.when == "fit_end":
            return
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        # the same on all processes, which files on a disk of the first one's need not be
        saved = [
            (c.best_model_path, c.last_model_path, list(c.best_k_models), c._last_global_step_saved) for c in callbacks
        ]
        if saved == self._seen:
            return
        self._seen = saved
        with first_process_works("merging checkpoints") as works:
            if works:
                self._merge_kept(callbacks, pl_module)

    def _merge_kept(self, callbacks: list[ModelCheckpoint], pl_module: LightningModule) -> None:
        wanted, kept = self._checkpoints(callbacks)
        self._merged |= {_merged_folder(checkpoint): checkpoint for checkpoint in kept if checkpoint.is_file()}
        for merged, checkpoint in self._merged.items():
            if merged.is_dir() and not checkpoint.exists():
                remove_folder(merged)
        _, model = adapted_submodule(pl_module)
        for checkpoint in wanted:
            if not checkpoint.is_file():
                continue
            base = self.base or _loaded_from(pl_module, model)
            source, folder = self._source(checkpoint, base), _merged_folder(checkpoint)
            found = _source_of(folder)
            if found == source:
                continue
            if found is not None:
                adopt_folder(folder, {SOURCE_FILE, *(file.name for file in local_folder(base).iterdir())})
            notes = {SOURCE_FILE: json.dumps(source) + "\n"}
            try:
                merge_to_folder(base, read_adapter_checkpoint(checkpoint), folder, overwrite=True, notes=notes)
                rank_zero_info(f"Merged model: {folder}")
            except FileExistsError as error:
                rank_zero_warn(f"{checkpoint} is not merged: {error}")

    def _source(self, checkpoint: Path, base: str) -> dict[str, str]:
        """What a merged folder is made from."""
        stat = checkpoint.stat()
        known = (checkpoint, stat.st_size, stat.st_mtime_ns)
        if known not in self._digests:
            self._digests[known] = file_digest(checkpoint)
        return {"checkpoint": checkpoint.name, "sha256": self._digests[known], "base": base}

    def _checkpoints(self, callbacks: list[ModelCheckpoint]) -> tuple[list[Path], list[Path]]:
        """Checkpoints to merge, and all that are kept."""
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
        _, folder = self._folders(trainer)
        with first_process_works("merging") as works:
            if works:
                config = cast(AdapterConfig, model.adapter_config)
                base = self.base or _loaded_from(pl_module, model)
                adapter = AdapterCheckpoint(config, base_identity(model, base), tensors, inputs=inputs_of(trainer))
                merge_to_folder(base, adapter, folder, overwrite=True)
                rank_zero_info(f"Merged model: {folder}")

    def _folders(self, trainer: Trainer) -> tuple[Path, Path]:
        """The run's folder, and that of the model merged at the end; to be called on every process."""
        root = Path(trainer.log_dir or trainer.default_root_dir)  # asks the first process
        return root, Path(self.dirpath) if self.dirpath else root / "merged"


def _has_a_score(callback: ModelCheckpoint) -> bool:
    """Whether the best checkpoint is the best: the first one is, to Lightning, even where its score is NaN."""
    score = callback.best_model_score
    return callback.monitor is None or score is None or math.isfinite(float(score))


def _paths(names: list[str]) -> list[Path]:
    return [Path(name) for name in dict.fromkeys(names) if name]


def _merged_folder(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}-merged")


def _source_of(merged: Path) -> Any:
    path = merged / SOURCE_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        return None


def _loaded_from(pl_module: LightningModule, model: nn.Module) -> str:
    name = getattr(pl_module, "model_name_or_path", None) or base_name_or_path(model)
    if not name:
        raise ValueError("MergeOnSave does not know what the base model was loaded from; pass base=<folder or hub id>")
    return str(name)
