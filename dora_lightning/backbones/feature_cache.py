"""What a frozen vision tower makes of an image, kept on disk: a second epoch, or another run, reads it.

An image is known by its pixels as the tower gets them, so another resolution or augmentation is another image; each
tower, dtype and choice of layers has a folder of its own. Files are written beside their place and renamed: several
processes may share a cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dora_lightning.adapters.finite import check_finite
from dora_lightning.files import write_atomically
from dora_lightning.training.base_identity import weights_digest


class FeatureCache:
    """Stands before a vision tower: images that it has seen are read from disk, the others are passed on and written.

    The tower's outputs then hold the hidden states of the layers that the model projects, and nothing else.

    Args:
        folder: where features are kept; ``N x D`` numbers per image and layer, 1.2 MB for LLaVA-1.5 in half precision.
        tower: the frozen tower.
        layers: hidden states that are projected, counted as in transformers (-2 for the last but one).
    """

    def __init__(self, folder: str | Path, tower: PreTrainedModel, layers: list[int]) -> None:
        self.folder = Path(folder).expanduser()
        self.read = 0
        """Images whose features were read."""
        self.computed = 0
        """Images that the tower was run for."""
        self._tower = tower
        states = tower.config.num_hidden_layers + 1
        self._layers = [layer % states for layer in layers]
        self._states = states
        self._forward: Callable[..., Any] = tower.forward
        self._digest = _digest_of(tower)
        tower.forward = self  # the tower keeps its name, and its weights theirs

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        """The features of ``pixel_values [images, 3, height, width]``."""
        paths = [self._path(image) for image in pixel_values.cpu()]
        features: dict[Path, Tensor] = {}
        missing: list[int] = []
        for position, path in enumerate(paths):
            if path in features or paths.index(path) < position:
                continue
            if (found := self._load(path)) is None:
                missing.append(position)
            else:
                features[path] = found
        self.read += len(features)
        self.computed += len(missing)
        if missing:
            for position, computed in zip(missing, self._compute(pixel_values[missing]), strict=True):
                features[paths[position]] = computed
                self._save(paths[position], computed)
        # [images, layers, N, D]
        stacked = torch.stack([features[path].to(pixel_values.device) for path in paths])
        states: list[Tensor | None] = [None] * self._states
        for position, layer in enumerate(self._layers):
            states[layer] = stacked[:, position]
        return BaseModelOutputWithPooling(hidden_states=tuple(states))  # type: ignore[arg-type]  # None: not kept

    def _compute(self, pixel_values: Tensor) -> list[Tensor]:
        training = self._tower.training
        self._tower.eval()  # dropout would be kept for good
        states = self._forward(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        self._tower.train(training)
        return list(torch.stack([states[layer] for layer in self._layers], dim=1))

    def _path(self, image: Tensor) -> Path:
        device = next(self._tower.parameters()).device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self._tower.dtype
        layers = "-".join(map(str, self._layers))
        tower = f"{self._digest}-{str(precision).removeprefix('torch.')}-{layers}"
        # an image of one color has the same bytes upright and across
        pixels = str(tuple(image.shape)).encode() + image.contiguous().float().numpy().tobytes()
        name = hashlib.sha256(pixels).hexdigest()
        return self.folder / tower / name[:2] / f"{name}.safetensors"

    def _load(self, path: Path) -> Tensor | None:
        try:
            return load_file(path)["features"]
        except (FileNotFoundError, SafetensorError):
            return None  # not there, or cut short by a machine that went down: computed anew and written over

    def _save(self, path: Path, features: Tensor) -> None:
        check_finite({"the tower's output": features}, f"nothing is kept in {self.folder}")
        path.parent.mkdir(parents=True, exist_ok=True)
        # not waited for until it is on disk: what a machine that goes down cuts short is computed anew
        write_atomically(path, lambda file: file.write(save({"features": features.cpu().contiguous()})), durable=False)


def _digest_of(tower: PreTrainedModel) -> str:
    """Its weights, and what else its output depends on: activations and epsilons are no weights."""
    options = {
        key: value
        for key, value in tower.config.to_dict().items()
        if key not in ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
    }
    described = f"{type(tower).__name__} {json.dumps(options, sort_keys=True, default=str)} {weights_digest(tower)}"
    return hashlib.sha256(described.encode()).hexdigest()[:16]
