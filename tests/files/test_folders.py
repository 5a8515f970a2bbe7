"""Folders are there whole or not at all, and nothing that was not written by us is ever removed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dora_lightning.files import check_folder, folders, remove_folder, write_folder
from dora_lightning.files.folders import MARKER, adopt_folder
from dora_lightning.model_cache import cached, file_stamp


def fill(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "inner").mkdir()
        for name in ("a", "inner/b"):
            (folder / name).write_text(text)

    return write


def content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


OLD, NEW = ({"a": text, "inner/b": text} for text in ("old", "new"))


def test_a_folder_we_made_is_replaced_only_when_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(out, fill("old"))
    with pytest.raises(FileExistsError, match="out exists; choose another folder or pass overwrite"):
        write_folder(out, fill("new"))
    assert content(out) == OLD
    write_folder(out, fill("new"), overwrite=True)
    assert content(out) == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_we_did_not_make_stays(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    (runs / "version_0").mkdir(parents=True)
    (runs / "version_0" / "last.ckpt").write_text("mine")
    with pytest.raises(FileExistsError, match=f"runs is not replaced: it holds version_0/last.ckpt and no {MARKER}"):
        write_folder(runs, fill("new"), overwrite=True)
    with pytest.warns(UserWarning, match="runs is not removed"):
        assert not remove_folder(runs)
    assert content(runs) == {"version_0/last.ckpt": "mine"}


@pytest.mark.parametrize("extra", ["notes.txt", "inner/deep/notes.txt", ".hidden"])
def test_a_folder_with_a_file_of_the_users_stays(tmp_path: Path, extra: str) -> None:
    out = tmp_path / "out"
    write_folder(out, fill("old"))
    (out / extra).parent.mkdir(exist_ok=True)
    (out / extra).write_text("mine")
    with pytest.raises(FileExistsError, match=f"it holds {extra}, which dora-lightning did not write there"):
        write_folder(out, fill("new"), overwrite=True)
    with pytest.warns(UserWarning, match=f"it holds {extra}"):
        assert not remove_folder(out)
    assert content(out) == OLD | {extra: "mine"}
    (out / extra).unlink()
    assert remove_folder(out)
    assert not out.exists()


def test_a_file_put_in_while_the_new_folder_is_written_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(out, fill("old"))

    def write(folder: Path) -> None:
        fill("new")(folder)
        (out / "notes.txt").write_text("mine")

    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        write_folder(out, write, overwrite=True)
    assert content(out) == OLD | {"notes.txt": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    write_folder(real, fill("old"))
    link.symlink_to(real)
    with pytest.raises(FileExistsError, match=r"link is a symbolic link to .*real; name the folder itself"):
        write_folder(link, fill("new"), overwrite=True)
    with pytest.warns(UserWarning, match="link is not removed: it is a symbolic link"):
        assert not remove_folder(link)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError, match="is a symbolic link"):
        write_folder(tmp_path / "dangling", fill("new"), overwrite=True)
    # a folder of ours that was replaced by a link to the user's, with files of the same names
    shutil.rmtree(real / "inner")
    users = tmp_path / "users"
    users.mkdir()
    (users / "b").write_text("mine")
    (real / "inner").symlink_to(users)
    with pytest.raises(FileExistsError, match="real is not replaced: it holds inner, which"):
        write_folder(real, fill("new"), overwrite=True)
    assert content(users) == {"b": "mine"}


def test_what_is_still_needed_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "models" / "base"
    write_folder(tmp_path / "models", lambda folder: write_folder(folder / "base", fill("old")))
    for place in (base, base.parent):
        with pytest.raises(FileExistsError, match=r"is or holds .*base, which is still needed"):
            write_folder(place, fill("new"), overwrite=True, keep=[base])
    (tmp_path / "link").symlink_to(base.parent)
    with pytest.raises(FileExistsError, match="is or holds"):
        write_folder(tmp_path / "link" / "base", fill("new"), overwrite=True, keep=[base])
    monkeypatch.chdir(base)
    for name in (".", "..", str(base), "new/../.."):
        with pytest.raises(FileExistsError, match="which is still needed"):
            write_folder(Path(name), fill("new"), overwrite=True)
    monkeypatch.setenv("HOME", str(base))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="which is still needed"):
        check_folder(base, overwrite=True)
    # that there is nothing yet makes no difference
    with pytest.raises(FileExistsError, match="runs is or holds"):
        check_folder(tmp_path / "runs", overwrite=True, keep=[tmp_path / "runs" / "version_0"])
    assert content(base) == OLD


def test_an_error_or_a_file_in_the_way_leaves_all_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(out, fill("old"))

    def fails(folder: Path) -> None:
        fill("new")(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(out, fails, overwrite=True)
    assert content(out) == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file is not replaced: it is a file"):
        write_folder(tmp_path / "file", fill("new"), overwrite=True)
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", fill("new"), overwrite=True)
    assert content(tmp_path / "empty") == NEW


class Killed(BaseException):
    """Stands for SIGKILL: nothing is tidied up after it."""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_crash_at_any_moment_leaves_a_whole_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    out = tmp_path / "out"
    write_folder(out, fill("old"))

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        done = []
        rename = Path.rename

        def count(path: Path, target: Path) -> Path:
            if len(done) == renames:
                for name in ("rename", "unlink"):
                    patch.setattr(Path, name, die)
                raise Killed
            done.append(target)
            return rename(path, target)

        patch.setattr(Path, "rename", count)
        patch.setattr(shutil, "rmtree", die)
        if renames == 2:
            patch.setattr(folders, "_remove_listed", die)
        with pytest.raises(Killed):
            write_folder(out, fill("new"), overwrite=True)
    whole = [content(path) for path in tmp_path.iterdir() if content(path) in (OLD, NEW)]
    assert OLD in whole or out.exists()
    with pytest.raises(FileExistsError, match="out exists"):  # looks after what was left, and changes nothing else
        write_folder(out, fill("another"))
    assert content(out) == (NEW if renames == 2 else OLD)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_crash_left_is_kept_where_another_folder_took_its_place(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(out, fill("old"))
    out.rename(tmp_path / ".out.old-12345678")
    write_folder(tmp_path / "elsewhere", fill("users"))
    (tmp_path / "elsewhere").rename(out)
    with pytest.warns(UserWarning, match=".out.old-12345678 is left of a process that was killed, and is kept"):
        write_folder(out, fill("new"), overwrite=True)
    assert content(tmp_path / ".out.old-12345678") == OLD
    assert content(out) == NEW


def test_names_that_only_look_like_leftovers_stay(tmp_path: Path) -> None:
    for name in (".out.partial-mine", ".out.old-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("mine")
    write_folder(tmp_path / "out", fill("new"))
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.partial-mine", ".out.old-mine"}


def test_the_folder_a_living_process_writes_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write(folder: Path) -> None:
        fill("slow")(folder)
        write_folder(out, fill("quick"))
        assert content(folder) == {"a": "slow", "inner/b": "slow"}

    with pytest.raises(FileExistsError, match="out exists"):
        write_folder(out, write)
    assert content(out) == {"a": "quick", "inner/b": "quick"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_marker_lists_files_and_cannot_point_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "users").write_text("mine")
    out = tmp_path / "out"
    write_folder(out, fill("old"))
    marker = json.loads((out / MARKER).read_text())
    assert marker["files"] == ["a", "inner/b"]
    (out / MARKER).write_text(json.dumps(marker | {"files": [*marker["files"], "../users", str(tmp_path / "users")]}))
    assert remove_folder(out)
    assert (tmp_path / "users").read_text() == "mine"
    for broken in ("", "{", "[]", '{"id": 1}', '{"id": 1, "files": [[]]}'):
        write_folder(out, fill("old"))
        (out / MARKER).write_text(broken)
        with pytest.raises(FileExistsError, match="it holds a and 1 more files, which dora-lightning did not write"):
            write_folder(out, fill("new"), overwrite=True)
        shutil.rmtree(out)


def test_an_older_versions_folder_is_adopted_by_the_names_in_it(tmp_path: Path) -> None:
    fill("old")(tmp_path)
    adopt_folder(tmp_path, {"a"})
    assert not (tmp_path / MARKER).exists()
    adopt_folder(tmp_path, {"a", "inner/b", "c"})
    assert json.loads((tmp_path / MARKER).read_text())["files"] == ["a", "inner/b"]


def test_the_cache_tidies_up_after_a_killed_conversion(tmp_path: Path) -> None:
    place = tmp_path / "gguf" / "model"
    place.parent.mkdir()
    partial, marker = folders._partial_folder(place)
    (partial / "model.safetensors").write_text("half of 513 MB")
    marker.close()  # as the operating system does for a process that is killed
    assert content(cached(place, fill("new"))) == NEW
    assert [path.name for path in place.parent.iterdir()] == ["model"]
    assert content(cached(place, fill("never"))) == NEW


def test_another_process_may_fill_the_cache_first(tmp_path: Path) -> None:
    place = tmp_path / "model"

    def make(folder: Path) -> None:
        fill("second")(folder)
        write_folder(place, fill("first"))

    assert content(cached(place, make)) == {"a": "first", "inner/b": "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_of_another_content_is_another_source_whatever_its_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("one")
    stat, before = path.stat(), file_stamp(path)
    assert file_stamp(path) == before
    while path.stat().st_ctime_ns == stat.st_ctime_ns:  # a clock tick
        path.write_text("two")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert file_stamp(path) != before
