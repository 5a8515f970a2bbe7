"""Where weights that train in full started: in the base model's own files, or in a snapshot of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dora_lightning.adapters.analysis import row_blocks
from dora_lightning.analyzing.stored_weights import StoredWeights, write_tensors
from dora_lightning.files import write_atomically
from dora_lightning.pretrained import local_folder, resolve_recorded, weight_files
from dora_lightning.training.sharded_checkpoint import whole_tensor
from dora_lightning.training.stored_names import base_name, stored_names

SNAPSHOT_FILE = "start_weights.safetensors"


class StartWeights:
    """Start values of parameters by their names in a LightningModule, read a few rows at a time.

    Args:
        module: knows its base model: by ``model_name_or_path``, or as a model of transformers inside it does.
    """

    def __init__(self, module: nn.Module) -> None:
        self._files, self._keys = _base_files(module)
        self._snapshot: StoredWeights | None = None

    def open_snapshot(self, path: Path) -> None:
        """Read from a snapshot what it holds."""
        self._snapshot = StoredWeights([path])

    def __contains__(self, name: object) -> bool:
        """Whether the start of that parameter is known."""
        return (self._snapshot is not None and name in self._snapshot) or name in self._keys

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Blocks of rows, each with the number of its first row, in the dtype of the file."""
        if self._snapshot is not None and name in self._snapshot:
            return self._snapshot.blocks(name)
        assert self._files is not None
        return self._files.blocks(self._keys[name])

    def in_files(self, name: str, weight: Tensor) -> bool:
        """Whether the base's files hold this very weight, as it is now."""
        if self._files is None or name not in self._keys or self._files.shape(self._keys[name]) != weight.shape:
            return False
        present = row_blocks(weight)
        stored = self._files.blocks(self._keys[name])
        return all(torch.equal(ours, theirs.to(ours)) for (_, ours), (_, theirs) in zip(present, stored, strict=True))


def write_snapshot(path: Path, names: Sequence[str], parameters: Mapping[str, Tensor], writes: bool) -> None:
    """Write the named parameters, gathered one at a time; to be called on every process that holds shards.

    Args:
        path: safetensors file.
        names: of the parameters to write.
        parameters: name -> parameter.
        writes: whether this process is the one that writes.
    """
    whole: Iterable[Tensor] = (whole_tensor(parameters[name]) for name in names)
    if not writes:
        for _ in whole:
            pass  # takes part in gathering
        return
    shapes = [(name, parameters[name].shape, parameters[name].dtype) for name in names]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: write_tensors(file, shapes, whole))


def _base_files(module: nn.Module) -> tuple[StoredWeights | None, dict[str, str]]:
    """The base's files, and name of a parameter in ``module`` -> its name there; nothing if they are not known."""
    found = next(((name, child) for name, child in module.named_modules() if isinstance(child, PreTrainedModel)), None)
    if found is None:
        return None, {}
    prefix, model = found
    named = getattr(module, "model_name_or_path", None)
    try:
        # what a config says of itself may stand in a file
        folder = local_folder(named) if isinstance(named, str) else resolve_recorded(model.config.name_or_path, "")
        files = StoredWeights(weight_files(Path(folder)))
    except (OSError, ValueError, ImportError):  # what cannot be had of the files is taken from a snapshot
        return None, {}
    stored = stored_names(model)
    keys = {}
    for name, _ in model.named_parameters():
        key = next((key for key in (stored.get(base_name(name)), base_name(name)) if key in files), None)
        if key is not None:
            keys[f"{prefix}.{name}" if prefix else name] = key
    return files, keys
