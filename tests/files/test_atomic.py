"""Files are there whole or not at all, whoever else writes them, and after any error."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import torch

from dora_lightning.files import (
    atomic,
    open_atomically,
    remove_leftovers,
    write_atomically,
    write_bytes_atomically,
    write_text_atomically,
)
from dora_lightning.training.atomic_checkpoint import AtomicCheckpointIO


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002], indirect=True)
def test_the_umask_holds(tmp_path: Path, umask: int) -> None:
    write_text_atomically(tmp_path / "a.json", "x")
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~umask


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path, begun, go_on = tmp_path / "r.json", threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def slow() -> None:
        try:
            with open_atomically(path) as file:
                file.write(b"slow")
                begun.set()
                go_on.wait(30)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=slow)
    thread.start()
    assert begun.wait(30)
    write_text_atomically(path, "quick")
    remove_leftovers(tmp_path)
    assert path.read_text() == "quick"
    go_on.set()
    thread.join()
    assert not errors
    assert path.read_text() == "slow"
    assert names(tmp_path) == {"r.json"}


KILLED = """
import os, signal, sys
from pathlib import Path
from dora_lightning.files import open_atomically
with open_atomically(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_text("before")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "before"
    assert len(names(tmp_path)) == 2
    write_text_atomically(path, "after")
    assert names(tmp_path) == {"last.ckpt"}


def leave_half(path: Path) -> None:
    """Leave what a killed writer of ``path`` does: the operating system closes its files."""
    _, descriptor = atomic._partial_file(path)
    os.close(descriptor)


@pytest.mark.parametrize("name", ["last.ckpt", "epoch[1]-*.ckpt", "a?b", "ä" * 127])
def test_what_a_killed_writer_left_is_removed(tmp_path: Path, name: str) -> None:
    leave_half(tmp_path / name)
    write_text_atomically(tmp_path / "other", "x")
    assert len(names(tmp_path)) == 2  # it is not that file's
    write_text_atomically(tmp_path / name, "whole")
    assert names(tmp_path) == {name, "other"}


def test_leftovers_of_any_file_can_be_removed_at_once(tmp_path: Path) -> None:
    leave_half(tmp_path / "a.safetensors")
    (tmp_path / ".hidden").write_text("the user's")
    (tmp_path / "b.partial-x").write_text("the user's")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {".hidden", "b.partial-x"}


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_text_atomically(path, "before")

    def interrupted(file: IO[bytes]) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_text() == "before"
    assert names(tmp_path) == {"a"}


def test_an_error_names_the_file(tmp_path: Path) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as caught:
        write_atomically(tmp_path / "a.json", full)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError) as missing:
        write_text_atomically(tmp_path / "missing" / "a.json", "x")
    assert str(missing.value) == f"[Errno 2] No such file or directory: '{tmp_path / 'missing' / 'a.json'}'"
    with pytest.raises(IsADirectoryError, match=f"is a folder.*'{tmp_path}'"):
        write_text_atomically(tmp_path, "x")


FULL = """
import resource, signal, sys, torch
from dora_lightning.training.atomic_checkpoint import AtomicCheckpointIO
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
try:
    AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(2**20)}, sys.argv[1])
except OSError as error:
    print(error)
"""


def test_a_checkpoint_that_does_not_fit_is_named_and_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, path)
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"[Errno 27] File too large: '{path}'\n"
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert names(tmp_path) == {"last.ckpt"}


def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "step=1.ckpt", "1")
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    write_text_atomically(tmp_path / "last.ckpt", "2")
    assert (tmp_path / "step=1.ckpt").read_text() == "1"
    assert (tmp_path / "last.ckpt").read_text() == "2"


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    write_bytes_atomically(pipe, b"x")
    reader.join()
    assert found == [b"x"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
