"""Files that grow by whole lines."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dora_lightning.files.growing import GrowingFile, check_writable


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_lines_are_added_by_several_threads(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    file = GrowingFile(path)
    assert not path.exists()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: file.append({"n": number, "text": "größe" * 1000}), range(100)))
    assert sorted(row["n"] for row in rows(path)) == list(range(100))
    GrowingFile(path).append({"n": 100}, {"n": "\ud83d"})
    assert [row["n"] for row in rows(path)[100:]] == [100, "\ud83d"]


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        ('{"n": 1}\n{"n": 2', '{"n": 1}\n'),
        ('{"n": 1}\n{"n": 2}', '{"n": 1}\n{"n": 2}\n'),
        ('{"n": 1', ""),
        ('{"n": 1}\n', '{"n": 1}\n'),
        ("", ""),
    ],
)
def test_a_line_that_was_cut_short_is_removed(tmp_path: Path, left: str, kept: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(left)
    GrowingFile(path).append({"n": 3})
    assert path.read_text() == kept + '{"n": 3}\n'


@pytest.mark.parametrize("content", ["my notes,\nwithout an end", "[1]", "notes"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"notes\.txt is no file of JSON lines"):
        GrowingFile(path)
    assert path.read_text() == content


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = GrowingFile(tmp_path / "a.jsonl")
    file.append({"n": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"a\.jsonl could not be written: .*No space left"):
        file.append({"n": 2})
    assert rows(tmp_path / "a.jsonl") == [{"n": 1}]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="is a folder; name a file to write"):
        check_writable(tmp_path)
    with pytest.raises(OSError, match=r"file/a\.json cannot be written"):
        check_writable(tmp_path / "file" / "a.json")
    check_writable(tmp_path / "new" / "newer" / "a.json")
    check_writable(Path("a.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
