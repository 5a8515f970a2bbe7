"""Checkpoint files: every byte is checked, nothing is unpickled, and what cannot be read is named with the way out."""

import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_lightning.training.atomic_checkpoint import AtomicCheckpointIO
from dora_lightning.training.checkpoint_files import check_training_state, load_checkpoint_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    content = {"state_dict": {"w": torch.arange(300.0)}, "global_step": 7, "options": [{"lr": 0.5}]}
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


def plain(content: dict[str, Any]) -> Any:
    return content["state_dict"]["w"].tolist(), content["global_step"], content["options"]


def test_no_flipped_bit_passes(path: Path) -> None:
    content, expected = path.read_bytes(), plain(load_checkpoint_file(path))
    random_, refused = random.Random(0), []
    # every third byte: weights, names, numbers of the archive, padding
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << random_.randrange(8)
        path.write_bytes(damaged)
        try:
            found = plain(load_checkpoint_file(path))
        except ValueError as error:
            refused.append(str(error))
        else:
            assert found == expected  # it was padding
    assert len(refused) > 1200 / 3  # the weights alone
    assert all("last.ckpt could not be read as a checkpoint: " in message for message in refused)
    assert not any("\n" in message for message in refused)


def test_a_flipped_weight_is_refused_by_lightning_too(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(torch.arange(300.0).numpy().tobytes()) + 401
    content[place] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["state_dict"]["w"], torch.arange(300.0))
    with pytest.raises(ValueError, match=r"the checksum of its record \S+ is wrong"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=True)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"garbage", "it is corrupt or was cut short"),
        (b"PK\x03\x04", "it is corrupt or was cut short"),
        (pickle.dumps({"state_dict": Evil()}), "it is a bare pickle, which could run code"),
    ],
)
def test_what_is_no_checkpoint(path: Path, content: bytes, reason: str) -> None:
    path.with_name("epoch=0.ckpt").write_bytes(path.read_bytes())
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{reason}.*; remove it and use .* beside it \(epoch=0\.ckpt\)"):
        load_checkpoint_file(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint file at"):
        load_checkpoint_file(path.with_name("none.ckpt"))


def test_a_file_that_was_cut(path: Path) -> None:
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="could not be read as a checkpoint"):
            load_checkpoint_file(path)


def test_objects_are_not_unpickled(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, path)
    for load in (load_checkpoint_file, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(ValueError, match=r"it holds Python objects \((os|posix)\.mkdir\)") as caught:
            load(path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="it holds a list"):
        load_checkpoint_file(path)


def test_training_needs_more_than_weights() -> None:
    check_training_state({"optimizer_states": [], "lr_schedulers": [], "loops": {}}, "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt holds weights alone \(no optimizer_states, lr_schedulers\)"):
        check_training_state({"loops": {}}, "a.ckpt")
