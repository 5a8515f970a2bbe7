"""A checkpoint file is there whole or not at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from dora_lightning.training.atomic_checkpoint import AtomicCheckpointIO, write_checkpoints_atomically


def test_a_failed_write_leaves_the_file_from_before_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "folder" / "last.ckpt"
    io.save_checkpoint({"a": 1}, path)

    def half(checkpoint: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("no space")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        io.save_checkpoint({"a": 2}, path)
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]
    assert io.load_checkpoint(path, weights_only=True) == {"a": 1}


def test_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.partial-xyz").write_bytes(b"half")
    (tmp_path / ".other.ckpt.partial-xyz").write_bytes(b"of another run in the same folder")
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")
    assert {entry.name for entry in tmp_path.iterdir()} == {"last.ckpt", ".other.ckpt.partial-xyz"}
    assert (tmp_path / "last.ckpt").stat().st_mode & 0o777 == 0o644


def test_a_link_is_replaced_and_what_it_pointed_to_stays(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, tmp_path / "step=1.ckpt")
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    io.save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "step=1.ckpt") == {"step": 1}
    assert torch.load(tmp_path / "last.ckpt") == {"step": 2}


def test_a_remote_path_is_left_to_lightning() -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint({"a": 1}, "memory://bucket/run.ckpt")
    assert io.load_checkpoint("memory://bucket/run.ckpt", weights_only=True) == {"a": 1}


def test_a_plugin_of_the_users_own_stays() -> None:
    class Own(TorchCheckpointIO):
        pass

    own, default = SingleDeviceStrategy(checkpoint_io=Own()), SingleDeviceStrategy()
    for strategy in (own, default):
        write_checkpoints_atomically(strategy)
    assert type(own.checkpoint_io) is Own
    assert type(default.checkpoint_io) is AtomicCheckpointIO
