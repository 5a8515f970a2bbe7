"""Run folders: their numbers, and which of them is an interrupted fit."""

import errno
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dora_lightning.files import locks, write_text_atomically
from dora_lightning.runs import (
    RESULT_FILE,
    hold,
    next_version,
    run_id,
    take_version,
    unfinished_run,
    unfinished_runs,
    write_result,
)


def make_run(root: Path, version: int, saved: bool = False, finished: bool = False) -> Path:
    folder = root / f"version_{version}"
    (folder / "checkpoints").mkdir(parents=True)
    if saved:
        (folder / "checkpoints" / "last.ckpt").touch()
    if finished:
        write_result(folder, RESULT_FILE, {"steps": 3})
    return folder


def test_versions_count_up_from_the_newest(tmp_path: Path) -> None:
    assert next_version(tmp_path / "none") == 0
    assert next_version(tmp_path) == 0
    make_run(tmp_path, 0)
    make_run(tmp_path, 10)
    (tmp_path / "version_x").mkdir()
    (tmp_path / "version_99").touch()
    assert next_version(tmp_path) == 11


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([], None),
        ([{}], None),  # stopped before anything was saved
        ([{"saved": True}], 0),
        ([{"saved": True, "finished": True}], None),
        ([{"saved": True}, {"saved": True, "finished": True}], None),  # done meanwhile
        ([{"saved": True, "finished": True}, {"saved": True}], 1),
        ([{"saved": True}, {}], 0),  # a test, or a run that failed at the start, came after it
        ([{"saved": True}, {"saved": True}, {}], 1),
    ],
)
def test_the_interrupted_run(tmp_path: Path, runs: list[dict[str, bool]], expected: int | None) -> None:
    for version, run in enumerate(runs):
        make_run(tmp_path, version, **run)
    found = unfinished_run(tmp_path)
    assert (found and found.version) == expected
    if found:
        assert found.checkpoints == [tmp_path / f"version_{expected}" / "checkpoints" / "last.ckpt"]


def test_a_fit_with_any_checkpoint_or_none_is_unfinished(tmp_path: Path) -> None:
    (make_run(tmp_path, 0) / "checkpoints" / "epoch=0-step=900.ckpt").touch()
    folder = make_run(tmp_path, 1)
    (folder / "hpc_ckpt_1.ckpt").touch()  # of Lightning, when SLURM stops a job
    make_run(tmp_path, 2)  # a test
    for version, verb in ((3, "test"), (4, "fit")):
        lock = hold(make_run(tmp_path, version), verb)
        assert lock is not None
        lock.release()
    assert [(run.version, [path.name for path in run.checkpoints]) for run in unfinished_runs(tmp_path)] == [
        (4, []),
        (1, ["hpc_ckpt_1.ckpt"]),
        (0, ["epoch=0-step=900.ckpt"]),
    ]
    found = unfinished_run(tmp_path)
    assert found is not None
    assert found.version == 1


def test_no_two_runs_take_one_folder(tmp_path: Path) -> None:
    (tmp_path / "version_1").touch()  # a file in the way is no folder to take
    with ThreadPoolExecutor(16) as pool:
        taken = list(pool.map(lambda _: take_version(tmp_path / "runs"), range(64)))
    assert sorted(taken) == list(range(64))
    assert take_version(tmp_path) == 0
    assert take_version(tmp_path) == 2


def test_a_living_run_keeps_its_folder_and_is_named(tmp_path: Path) -> None:
    lock = hold(tmp_path, "fit")
    assert lock is not None
    with pytest.raises(ValueError, match=rf"belongs to a run that is alive: process {os.getpid()} on .*--resume false"):
        hold(tmp_path, "fit")
    own = run_id(tmp_path)
    assert own
    lock.release()
    lock = hold(tmp_path, "fit")
    assert lock is not None
    lock.release()
    assert run_id(tmp_path) == own


def test_a_dead_run_keeps_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        lock = hold(tmp_path, "fit")
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(lock is None)
    os.read(reader, 1)
    with pytest.raises(ValueError, match=f"process {child} "):
        hold(tmp_path, "fit")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock = hold(tmp_path, "fit")
    assert lock is not None
    # nor does what a run has forked, such as a worker that outlives it
    child = os.fork()
    if child == 0:
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    lock.release()
    try:
        again = hold(tmp_path, "fit")
        assert again is not None
        again.release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    assert hold(tmp_path, "fit") is None
    assert run_id(tmp_path)


def test_a_result_makes_its_folder(tmp_path: Path) -> None:
    write_result(tmp_path / "a" / "b", "result.json", {"steps": 3})
    assert json.loads((tmp_path / "a" / "b" / "result.json").read_text()) == {"steps": 3}


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text_atomically(path, "größe")
    assert path.read_text(encoding="utf-8") == "größe"
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "half \ud800")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_text_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "größe"
    assert list(tmp_path.iterdir()) == [path]
