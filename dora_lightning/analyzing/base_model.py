"""A base model's weights in its files, and what modules they belong to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from dora_lightning.adapters.operators import operator_of
from dora_lightning.analyzing.stored_weights import StoredWeights, is_matrix
from dora_lightning.pretrained import local_folder, resolve_recorded, weight_files
from dora_lightning.training.stored_names import stored_names
from dora_lightning.vl_bart import VLBart


class BaseModel:
    """Weights by the names of the model's modules; none of them is loaded.

    Args:
        name: folder, hub id, GGUF file or package.
        recorded_in: the file that says so, if it was not the user; nothing is fetched then.

    Raises:
        FileNotFoundError: there is no such model, or it has no safetensors.
    """

    def __init__(self, name: str, recorded_in: str | None = None) -> None:
        self.name = name
        folder = local_folder(name) if recorded_in is None else Path(resolve_recorded(name, recorded_in))
        self.weights = StoredWeights(weight_files(folder))
        self._model = _without_weights(folder)
        self._stored = stored_names(self._model) if self._model is not None else {}
        self._own = {key: own for own, key in self._stored.items()}

    def key_of(self, own_name: str) -> str | None:
        """Name in the files of a tensor that the model calls ``own_name``; None if they do not hold it."""
        return next(
            (key for key in (self._stored.get(own_name), own_name) if key is not None and key in self.weights), None
        )

    def name_of(self, key: str) -> str:
        """Name in the model of a tensor that the files call ``key``."""
        return self._own.get(key, key)

    def module(self, name: str) -> nn.Module | None:
        """The module of that name, on the meta device; None if the model could not be built, or has none."""
        try:
            return self._model.get_submodule(name) if self._model is not None else None
        except AttributeError:
            return None

    def transposed(self, module: str) -> bool:
        """Whether the weight of a module is stored ``[in, out]``, as those of embeddings and ``Conv1D``."""
        found = self.module(module)
        operator = None if found is None else operator_of(found)
        return operator is not None and operator.transposed

    def matrices(self) -> Iterator[tuple[str, str]]:
        """Key in the files, and name of the module, of every weight that has a magnitude and a direction."""
        for key in self.weights:
            name = self.name_of(key)
            module = name.removesuffix(".weight")
            if is_matrix(self.weights.shape(key), self.module(module)):
                yield key, module


def matrix_shape(shape: Sequence[int], transposed: bool) -> tuple[int, int]:
    """Rows and columns of ``W [out, in]``, from the shape it is stored in."""
    rows, *rest = shape
    columns = math.prod(rest)
    return (columns, rows) if transposed else (rows, columns)


def stored_matrix(weight: Tensor, transposed: bool) -> Tensor:
    """A stored weight as ``W [out, in]``, in fp32."""
    matrix = weight.flatten(1).float()
    return matrix.T if transposed else matrix


def _without_weights(folder: Path) -> nn.Module | None:
    """The model on the meta device, for its modules' names and kinds; None if its class is not to be had here."""
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        name = (config.architectures or [""])[0]
        kind: Any = VLBart if name == VLBart.__name__ else getattr(transformers, name)
        if not issubclass(kind, PreTrainedModel):  # the name is out of a file
            return None
        with torch.device("meta"):
            return kind(config)
    except (OSError, ValueError, AttributeError, TypeError):
        return None
