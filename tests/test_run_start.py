"""Where a run begins: a new folder, or the interrupted run, and from which of its checkpoints."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_lightning.run_start import RunStart, start_run
from dora_lightning.runs import RESULT_FILE, hold, run_id, write_result
from dora_lightning.training.checkpoint_files import RUN_KEY


@pytest.fixture(autouse=True)
def _first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "NODE_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)


def save(path: Path, step: int, run: str | None = None, weights_only: bool = False) -> Path:
    content: dict[str, Any] = {"global_step": step, "state_dict": {"w": torch.ones(3)}}
    if not weights_only:
        content |= {"optimizer_states": [], "lr_schedulers": [], "loops": {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | {RUN_KEY: {"run": run, "config": {}}}, path)
    return path


def interrupted(root: Path, **checkpoints: int) -> Path:
    """A fit that has stopped, with checkpoints of these names and steps."""
    start = start_run(root, "fit", resume=False)
    start.release()
    for name, step in checkpoints.items():
        save(start.folder / "checkpoints" / f"{name}.ckpt", step, run_id(start.folder))
    return start.folder


def resume(root: Path, *folders: Path) -> RunStart:
    start = start_run(root, "fit", True, folders)
    start.release()
    return start


def test_without_last_the_checkpoint_with_the_most_steps_is_gone_on_from(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, early=100, middle=900, late=20)
    assert resume(tmp_path).checkpoint == folder / "checkpoints/middle.ckpt"
    # what Lightning saves in the last moment is newer than last.ckpt
    save(folder / "checkpoints/last.ckpt", 900)
    assert resume(tmp_path).checkpoint == folder / "checkpoints/last.ckpt"
    save(folder / "hpc_ckpt_1.ckpt", 950)
    assert resume(tmp_path).checkpoint == folder / "hpc_ckpt_1.ckpt"


def test_what_cannot_be_gone_on_from_is_named(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, early=100)
    save(folder / "checkpoints/weights.ckpt", 900, weights_only=True)
    (folder / "checkpoints/cut.ckpt").write_bytes(b"PK")
    with pytest.warns(UserWarning, match="ckpt") as caught:
        assert resume(tmp_path).checkpoint == folder / "checkpoints/early.ckpt"
    messages = [str(warning.message) for warning in caught]
    assert any("weights.ckpt holds weights alone" in message for message in messages)
    assert any("cut.ckpt could not be read as a checkpoint" in message for message in messages)
    (folder / "checkpoints/early.ckpt").unlink()
    with pytest.raises(
        ValueError, match=r"(?s)the run cannot go on: .*cut\.ckpt.*weights\.ckpt.*--resume false starts"
    ):
        resume(tmp_path)
    # a run that was refused does not hold its folder
    lock = hold(folder, "fit")
    assert lock is not None
    lock.release()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"garbage", b"\x80\x04N."])
def test_a_broken_last_checkpoint_is_refused_with_the_way_out(tmp_path: Path, content: bytes) -> None:
    folder = interrupted(tmp_path, early=100)
    (folder / "checkpoints/last.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.ckpt could not be read as a checkpoint: .*beside it \(early\.ckpt\)"):
        resume(tmp_path)


def test_the_last_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    folder, other = interrupted(tmp_path, last=10), interrupted(tmp_path / "other", last=20)
    (folder / "checkpoints/last.ckpt").write_bytes((other / "checkpoints/last.ckpt").read_bytes())
    with pytest.raises(ValueError, match=r"last\.ckpt belongs to another run \(id \w+\) than its folder"):
        resume(tmp_path)


def test_checkpoints_outside_of_the_run_folder(tmp_path: Path) -> None:
    """ModelCheckpoint's ``dirpath`` may hold those of several runs."""
    folder, elsewhere = interrupted(tmp_path), tmp_path / "elsewhere"
    save(elsewhere / "last.ckpt", 10, run_id(folder))
    save(elsewhere / "last-v1.ckpt", 20, "of another run")
    start = resume(tmp_path, elsewhere)
    assert (start.folder, start.checkpoint) == (folder, elsewhere / "last.ckpt")


def test_a_run_that_is_alive_is_not_gone_on_with(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, last=10)
    lock = hold(folder, "fit")
    with pytest.raises(ValueError, match="version_0 belongs to a run that is alive: process"):
        resume(tmp_path)
    assert lock is not None
    lock.release()
    assert resume(tmp_path).checkpoint == folder / "checkpoints/last.ckpt"


def test_starting_over_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupted(tmp_path)
    with caplog.at_level(logging.INFO):
        assert resume(tmp_path).version == 1
    assert "version_0 has no checkpoint, so there is nothing to go on from: it was interrupted before" in caplog.text
    # an older one with a checkpoint is gone on with, and the newer ones are named
    save(tmp_path / "version_0/checkpoints/last.ckpt", 10)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert resume(tmp_path).version == 0
    assert "version_1 has no checkpoint" in caplog.text
    write_result(tmp_path / "version_1", RESULT_FILE, {})
    assert resume(tmp_path).version == 2


def test_other_processes_take_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    start = start_run(tmp_path, "fit", resume=False)
    assert (start.version, start.lock, list(tmp_path.iterdir())) == (0, None, [])


def test_a_requeued_job_goes_on_with_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    own = interrupted(tmp_path, last=10)
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    other = interrupted(tmp_path, last=20)
    for job, folder in (("17", own), ("18", other)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        for resumes in (False, True):
            start = start_run(tmp_path, "fit", resumes)
            start.release()
            assert start.checkpoint == folder / "checkpoints/last.ckpt"
    monkeypatch.setenv("SLURM_JOB_ID", "19")
    start = start_run(tmp_path, "fit", resume=False)
    start.release()
    assert start.version == 2
