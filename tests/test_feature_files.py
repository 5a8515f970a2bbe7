"""Published layouts written by their own libraries."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROWS, CHANNELS = 9, 5


def folder(path: Path) -> Any:
    from dora_lightning.feature_files import FeatureFolder

    return FeatureFolder(path)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def write_h5(path: Path, features: Tensor, key: str | None = None) -> None:
    h5py = pytest.importorskip("h5py")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset(key or f"{path.stem}/features", data=features.numpy())


@pytest.mark.parametrize("layout", ["rows", "channels first", "channels last"])
def test_vl_adapters_h5(layout: str, tmp_path: Path) -> None:
    expected = numbers(ROWS, CHANNELS)
    grid = expected.reshape(3, 3, CHANNELS)
    stored = {"rows": expected, "channels first": grid.permute(2, 0, 1), "channels last": grid}[layout]
    write_h5(tmp_path / "COCO_train2014_000000000009.h5", stored.half())
    features = folder(tmp_path).read("COCO_train2014_000000000009")
    assert features.dtype == torch.float32
    assert torch.equal(features, expected.half().float())


def test_values_npz(tmp_path: Path) -> None:
    expected = numbers(11, CHANNELS)
    np.savez(tmp_path / "castle_s01e01_seg02_clip_00.npz", features=expected.numpy())
    assert torch.equal(folder(tmp_path).read("castle_s01e01_seg02_clip_00"), expected)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made = folder(tmp_path / "new")
    features = numbers(ROWS, CHANNELS)
    made.write("n1", features)
    made.write("train/n2", features, torch.bfloat16)
    made.write("n3", features.to(torch.float64), torch.float32)
    assert load_file(tmp_path / "new" / "n1.safetensors")["features"].dtype == torch.float16
    for found in (made, folder(tmp_path / "new"), pickle.loads(pickle.dumps(made))):
        assert torch.equal(found.read("n1"), features.half().float())
        assert torch.equal(found.read("train/n2"), features.bfloat16().float())
        assert torch.equal(found.read("n3"), features)
        assert found.ids == ["n1", "n3", "train/n2"]
    made.write("n1", features + 1, torch.float32)  # over the old one, after the folder was listed
    assert torch.equal(made.read("n1"), features + 1)
    assert [path.name for path in (tmp_path / "new").rglob("*.partial")] == []


def test_ids_with_and_without_their_folder(tmp_path: Path) -> None:
    write_h5(tmp_path / "train" / "a.h5", numbers(ROWS, CHANNELS))
    write_h5(tmp_path / "val" / "b.h5", numbers(ROWS, CHANNELS))
    made = folder(tmp_path)
    assert made.ids == ["train/a", "val/b"]
    assert torch.equal(made.read("a"), made.read("train/a"))
    assert "a" in made
    assert "val/b" in made
    assert "val/a" not in made
    assert made.missing(["x", "a", "val/b", "val/a", "x"]) == ["x", "val/a"]


def test_a_name_that_two_files_have(tmp_path: Path) -> None:
    for place in ("train", "val"):
        write_h5(tmp_path / place / "a.h5", numbers(ROWS, CHANNELS))
    made = folder(tmp_path)
    assert made.read("val/a").shape == (ROWS, CHANNELS)
    with pytest.raises(ValueError, match=r"2 files have features of 'a': .*a\.h5, .*a\.h5"):
        made.read("a")


def test_a_record_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = folder(tmp_path)
    made.write("old", numbers(2, 3))

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="disk full"):
            made.write(name, numbers(4, 3))
    assert folder(tmp_path).ids == ["old"]
    assert made.read("old").shape == (2, 3)


def test_missing_features(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder of features at .*nowhere"):
        folder(tmp_path / "nowhere").missing(["a"])
    with pytest.raises(FileNotFoundError, match=r"no features of 'n9'; looked for n9.safetensors, n9.h5, n9.npz"):
        folder(tmp_path).read("n9")


def test_broken_files_are_named(tmp_path: Path) -> None:
    for suffix in (".safetensors", ".h5", ".npz"):
        (tmp_path / f"empty{suffix}").touch()
        (tmp_path / f"broken{suffix}").write_bytes(b"PK\x03\x04 not what it seems")
        for name in ("empty", "broken"):
            with pytest.raises(ValueError, match=rf"{name}{suffix} cannot be read: "):
                folder(tmp_path).read(name)
            (tmp_path / f"{name}{suffix}").unlink()


def test_files_that_were_cut_short(tmp_path: Path) -> None:
    features = numbers(200, 30)
    write_h5(tmp_path / "a.h5", features)
    np.savez(tmp_path / "b.npz", features=features.numpy())
    save_file({"features": features}, tmp_path / "c.safetensors")
    for path in list(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[:9000])
        with pytest.raises(ValueError, match=rf"{path.name} cannot be read: "):
            folder(tmp_path).read(path.stem)


def test_wrong_keys_are_named(tmp_path: Path) -> None:
    write_h5(tmp_path / "a.h5", numbers(2, 3), key="b/features")
    np.savez(tmp_path / "b.npz", feats=np.zeros((2, 3)))
    save_file({"feature": torch.zeros(2, 3)}, tmp_path / "c.safetensors")
    for name, message in {
        "a": r"a.h5: expected 'a/features' in the file, found 'b', 'b/features'",
        "b": r"b.npz: expected 'features' in the file, found 'feats'",
        "c": r"c.safetensors: expected 'features' in the file, found 'feature'",
    }.items():
        with pytest.raises(ValueError, match=message):
            folder(tmp_path).read(name)


def test_npz_is_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", features=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"a.npz cannot be read: .*allow_pickle"):
        folder(tmp_path).read("a")


@pytest.mark.parametrize("shape", [(4,), (0, 3), (2, 3, 4), (3, 3, 3), (2, 2, 3, 4)])
def test_wrong_shapes_are_named(shape: tuple[int, ...], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", features=np.zeros(shape, dtype=np.float32))
    with pytest.raises(ValueError, match=r"a.npz: expected .*\[rows, C\]|a.npz: expected a square grid") as error:
        folder(tmp_path).read("a")
    assert str(list(shape)) in str(error.value)


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    features = numbers(2, 3)
    features[1, 2] = float("nan")
    np.savez(tmp_path / "a.npz", features=features.numpy())
    with pytest.raises(ValueError, match=r"a.npz: 1 of 6 features are not finite as float32"):
        folder(tmp_path).read("a")
    made = folder(tmp_path)
    with pytest.raises(ValueError, match=r"b.safetensors: 2 of 2 features are not finite as float16"):
        made.write("b", torch.full((1, 2), 1e6))
    assert made.ids == ["a"]


def test_h5_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_h5(tmp_path / "a.h5", numbers(2, 3))
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dora-lightning\[features\]'"):
        folder(tmp_path).read("a")


def test_settings_of_a_folder(tmp_path: Path) -> None:
    settings = {"model": "RN101", "rows": 49, "mean": (0.5, 0.5)}
    made = folder(tmp_path / "new")
    assert made.settings is None
    made.check_settings(settings)  # published folders do not tell
    made.claim(settings)
    made.write("a", numbers(2, 3))
    assert json.loads((tmp_path / "new" / "features.json").read_text()) == settings | {"mean": [0.5, 0.5]}

    folder(tmp_path / "new").claim(settings)
    made.check_settings({"model": "RN101"})
    message = "new holds features of other settings: rows: 49 in the folder, 36 expected"
    for check in (made.check_settings, made.claim):
        with pytest.raises(ValueError, match=message):
            check(settings | {"rows": 36})
    with pytest.raises(ValueError, match="rows: 49 in the folder, None expected"):
        made.claim({"model": "RN101", "mean": (0.5, 0.5)})
    assert made.settings == settings | {"mean": [0.5, 0.5]}


def test_features_of_unknown_origin_are_not_mixed_with(tmp_path: Path) -> None:
    write_h5(tmp_path / "a.h5", numbers(2, 3))
    with pytest.raises(ValueError, match=r"holds features already, a among them, and no features.json"):
        folder(tmp_path).claim({"model": "RN101"})
    for content, message in {"{": "broken JSON", "[]": "expected an object"}.items():
        (tmp_path / "features.json").write_text(content)
        with pytest.raises(ValueError, match=rf"features.json.*{message}"):
            folder(tmp_path).check_settings({})
