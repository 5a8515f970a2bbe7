"""What a failed command says, and where its traceback is."""

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dora_lightning import failures
from dora_lightning.failures import explain, keep_traceback

Usage = namedtuple("Usage", ["total", "used", "free"])


def caught(act: Callable[[], Any]) -> BaseException:
    """What ``act`` raises."""
    try:
        act()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_out_of_memory_says_what_to_change() -> None:
    too_large = caught(lambda: torch.empty(2**55))  # an error of torch's own
    made = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of ...\nmore")
    for error, where in ((too_large, "out of memory: "), (made, "out of memory on the GPU: CUDA out of memory. Tried")):
        said = explain(error)
        assert said is not None
        assert said.startswith(where)
        for word in ("batch_size", "gradient_checkpointing", "quantization", "the verb plan"):
            assert word in said
        assert "\n" not in said
    assert explain(MemoryError()) == explain(MemoryError(""))
    assert (explain(MemoryError()) or "").startswith("out of memory: the system gives no more. Lower")


class _Ends(Dataset[int]):
    """Its worker process ends as if the system had killed it."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), 9)
        return index


class _Bad(_Ends):
    def __getitem__(self, index: int) -> int:
        raise ValueError(f"data.json, row {index + 1}: no answer")


def test_a_dead_worker_and_a_row_that_a_worker_stumbles_over() -> None:
    dead = caught(lambda: list(DataLoader(_Ends(), num_workers=1)))
    said = explain(dead)
    assert said is not None, dead
    assert "num_workers" in said
    assert "/dev/shm" in said
    assert "\n" not in said
    bad = caught(lambda: list(DataLoader(_Bad(), num_workers=1)))
    assert explain(bad) == "data.json, row 1: no answer"


def test_a_full_disk_names_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    usage = shutil.disk_usage
    monkeypatch.setattr(
        failures.shutil, "disk_usage", lambda place: Usage(10, 10, 0) if Path(place) == tmp_path else usage(place)
    )
    said = explain(error, tmp_path)
    assert said is not None
    assert said.startswith(f"[Errno 28] No space left on device: no space is left in {tmp_path} (the run is in")
    named = OSError(errno.ENOSPC, "No space left on device", "/data/last.ckpt")
    assert explain(named, tmp_path) == "[Errno 28] No space left on device: '/data/last.ckpt'"
    torn = RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/3")
    assert "no space is left in" in (explain(torn, tmp_path) or "")


def test_bugs_are_not_explained() -> None:
    for error in (KeyError("x"), RuntimeError("mat1 and mat2 shapes cannot be multiplied"), TypeError("x")):
        assert explain(error) is None


def raise_deep(message: str) -> None:
    raise ValueError(message)


def test_the_whole_traceback_is_kept_and_those_of_earlier_attempts_stay(tmp_path: Path) -> None:
    first, second = caught(lambda: raise_deep("first \ud83d")), caught(lambda: raise_deep("second"))
    path = keep_traceback(first, tmp_path)
    assert path == keep_traceback(first) == tmp_path / "traceback.txt"
    assert keep_traceback(second, tmp_path) == path
    text = path.read_text()
    assert text.count("in raise_deep") == 2
    assert text.index("ValueError: first") < text.index("ValueError: second")


def test_without_a_run_folder_it_goes_to_a_place_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures.tempfile, "tempdir", str(tmp_path))
    path = keep_traceback(caught(lambda: raise_deep("here")), tmp_path / "no_run_yet")
    assert path is not None
    assert path.parent == tmp_path
    assert "ValueError: here" in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(failures.tempfile, "tempdir", str(tmp_path / "gone"))
    assert keep_traceback(caught(lambda: raise_deep("there"))) is None
