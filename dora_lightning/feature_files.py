"""Visual features in files, one record ``[rows, C]`` for each image or video."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dora_lightning.files import read_json, remove_leftovers, write_atomically, write_text_atomically

SETTINGS_FILE = "features.json"
OWN_SUFFIX, H5_SUFFIX, NPZ_SUFFIX = ".safetensors", ".h5", ".npz"
SUFFIXES = (OWN_SUFFIX, H5_SUFFIX, NPZ_SUFFIX)
KEY = "features"


class FeatureFolder:
    """A folder with one file of features for each image or video, read in all of the published layouts.

    ``{id}.safetensors`` is this library's own, with the tensor ``features [rows, C]``. VL-Adapter's ``{id}.h5`` has the
    data set ``{id}/features``, ``[n * n, C]``, ``[C, n, n]`` or ``[n, n, C]``; VALUE's ``{id}.npz`` the array
    ``features [T, C]``. Files may lie in sub-folders: ``train/dog.h5`` is found as ``train/dog``, and as ``dog`` where
    no other file of that name is there. The folder is listed once, when it is first needed.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._listed = False
        self._paths: dict[str, list[Path]] = {}
        self._stems: dict[str, list[Path]] = {}

    @property
    def ids(self) -> list[str]:
        """Ids of what is there, sorted: paths in the folder without their ending."""
        return sorted(self._indexed())

    def __contains__(self, name: str) -> bool:
        """Whether there are features of this id."""
        return name in self._indexed() or name in self._stems

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Those of ``ids`` that there are no features of, each once."""
        return [name for name in dict.fromkeys(ids) if name not in self]

    def read(self, name: str) -> Tensor:
        """Features of an image or video as float32 ``[rows, C]``; a grid row by row.

        Raises:
            FileNotFoundError: there are none.
            ValueError: the file is broken, holds something else, or numbers that are not finite; or two files have
                this name.
        """
        return read_features(self._path(name))

    def write(self, name: str, features: Tensor, dtype: torch.dtype = torch.float16) -> None:
        """Write ``features [rows, C]`` as ``{name}.safetensors``, whole or not at all.

        Raises:
            ValueError: they are not of that shape, or not all finite in that dtype.
        """
        path = self.path / f"{name}{OWN_SUFFIX}"
        stored = _checked(features.detach().cpu().to(dtype), path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # leftovers are looked for once, in claim: with 100,000 files in the folder that takes the longest
        write_atomically(path, lambda file: file.write(save({KEY: stored.contiguous()})), tidy=False)
        if self._listed and path not in self._paths.get(name, []):
            self._add(name, path)

    @property
    def settings(self) -> dict[str, Any] | None:
        """What made the features, as ``features.json`` tells; None where it is not told, as in published folders."""
        path = self.path / SETTINGS_FILE
        if not path.is_file():
            return None
        settings = read_json(path, "the settings that made the features, as JSON")
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: expected an object with the settings, found {type(settings).__name__}")
        return settings

    def check_settings(self, expected: dict[str, Any]) -> None:
        """See whether the features were made as expected, as far as the folder tells.

        Raises:
            ValueError: a setting differs; the message says which.
        """
        if (recorded := self.settings) is None:
            return
        different = [
            f"{key}: {recorded.get(key)!r} in the folder, {value!r} expected"
            for key, value in json.loads(json.dumps(expected)).items()
            if recorded.get(key) != value
        ]
        if different:
            raise ValueError(f"{self.path} holds features of other settings: {'; '.join(different)}")

    def claim(self, settings: dict[str, Any]) -> None:
        """Make the folder, if need be, and record what makes the features that are about to be written.

        Raises:
            ValueError: other features are there already.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for place, _, _ in os.walk(self.path, followlinks=True):
            remove_leftovers(Path(place))
        recorded = self.settings
        if recorded is None:
            if self.ids:
                raise ValueError(
                    f"{self.path} holds features already, {self.ids[0]} among them, and no {SETTINGS_FILE} that says "
                    "what made them; choose another folder"
                )
            write_text_atomically(self.path / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
            return
        self.check_settings(dict.fromkeys(recorded) | settings)

    def _indexed(self) -> dict[str, list[Path]]:
        if not self._listed:
            if not self.path.is_dir():
                raise FileNotFoundError(f"no folder of features at {self.path}")
            for folder, _, names in os.walk(self.path, followlinks=True):
                for file in names:
                    if file.endswith(SUFFIXES) and not file.startswith("."):
                        path = Path(folder, file)
                        self._add(path.relative_to(self.path).with_suffix("").as_posix(), path)
            self._listed = True
        return self._paths

    def _add(self, name: str, path: Path) -> None:
        self._paths.setdefault(name, []).append(path)
        self._stems.setdefault(path.stem, []).append(path)

    def _path(self, name: str) -> Path:
        found = self._indexed().get(name) or self._stems.get(name, [])
        if not found:
            raise FileNotFoundError(
                f"{self.path}: no features of {name!r}; looked for {', '.join(name + suffix for suffix in SUFFIXES)}"
            )
        if len(found) > 1:
            raise ValueError(f"{self.path}: {len(found)} files have features of {name!r}: {found[0]}, {found[1]}")
        return found[0]


def read_features(path: Path) -> Tensor:
    """Features in one file, float32 ``[rows, C]``; see :class:`FeatureFolder`.

    Raises:
        ValueError: the file is broken, holds something else, or numbers that are not finite.
    """
    readers = {OWN_SUFFIX: _read_safetensors, H5_SUFFIX: _read_h5, NPZ_SUFFIX: _read_npz}
    try:
        features = readers[path.suffix](path)
    except ModuleNotFoundError:
        raise
    except _WrongKeyError as error:
        raise ValueError(f"{path}: {error}") from error
    # a broken file raises what its library stumbles over
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return _checked(_as_rows(features, path), path).float()


class _WrongKeyError(ValueError):
    def __init__(self, expected: str, found: Iterable[str]) -> None:
        super().__init__(f"expected {expected!r} in the file, found {', '.join(map(repr, found)) or 'nothing'}")


def _read_safetensors(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as file:
        if KEY not in file.keys():  # noqa: SIM118  # it is no dict
            raise _WrongKeyError(KEY, file.keys())
        return file.get_tensor(KEY)


def _read_npz(path: Path) -> Tensor:
    # opened here, since numpy leaves a broken file open
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        if KEY not in arrays:
            raise _WrongKeyError(KEY, arrays)
        return torch.from_numpy(arrays[KEY])


def _read_h5(path: Path) -> Tensor:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs h5py to be read: pip install 'dora-lightning[features]'") from error
    key = f"{path.stem}/{KEY}"
    with h5py.File(path, "r") as file:
        if not isinstance(file.get(key), h5py.Dataset):
            found: list[str] = []
            file.visit(found.append)
            raise _WrongKeyError(key, found)
        return torch.from_numpy(file[key][()])


def _as_rows(features: Tensor, path: Path) -> Tensor:
    """A grid as rows; which of its axes are the square's sides says where the channels are."""
    if features.ndim != 3:
        return features
    channels_first, channels_last = features.shape[1] == features.shape[2], features.shape[0] == features.shape[1]
    if channels_first == channels_last:
        raise ValueError(f"{path}: expected a square grid [C, n, n] or [n, n, C], found {list(features.shape)}")
    return features.flatten(1).T if channels_first else features.flatten(0, 1)


def _checked(features: Tensor, path: Path) -> Tensor:
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{path}: expected features [rows, C], found a shape of {list(features.shape)}")
    if bad := int((~features.isfinite()).sum()):
        raise ValueError(f"{path}: {bad} of {features.numel()} features are not finite as {_plain(features.dtype)}")
    return features


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
