"""Run folders: their numbers, and which of them is an interrupted fit."""

import json
import os
from pathlib import Path

import pytest

from dora_lightning.files import write_text_atomically
from dora_lightning.runs import RESULT_FILE, next_version, unfinished_run, write_result


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
    checkpoint = tmp_path / f"version_{expected}" / "checkpoints" / "last.ckpt"
    assert unfinished_run(tmp_path) == (None if expected is None else (expected, checkpoint))


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
