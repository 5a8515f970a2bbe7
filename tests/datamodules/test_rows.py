import json
from pathlib import Path

import pytest

from datamodules import convert_file, read_rows

GOOD = {"instruction": "a", "answer": "true"}


def write(folder: Path, text: str, name: str = "rows.json") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_json_list_and_jsonl_give_the_same_rows(tmp_path: Path) -> None:
    rows = [GOOD, {"instruction": "line\u2028separator", "answer": "é"}]
    as_list = write(tmp_path, json.dumps(rows, indent=1))
    as_lines = write(tmp_path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", "rows.jsonl")
    assert read_rows(as_list) == read_rows(as_lines, required=["answer"]) == rows


def test_a_byte_order_mark_is_no_row(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, "\ufeff" + json.dumps([GOOD]))) == [GOOD]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json: no such file"):
        read_rows(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n", r"rows\.json: the file is empty"),
        ("[]", r"rows\.json: no usable row"),
        ('[{"instruction": "a", "answer": "b"},\n {"a" 2}]', r"rows\.json: broken JSON at line 2, column 7"),
        ('{"instruction": "a", "answer": "b"}\n{"a": }', r"rows\.json, line 2: broken JSON at column 7"),
        (json.dumps([GOOD, ["a"]]), r"rows\.json, row 2: expected an object with named fields, found list"),
        ("3\n", r"rows\.json, line 1: expected an object with named fields, found int"),
        (json.dumps([GOOD, GOOD, {"answer": "x"}]), r"row 3: field 'instruction' is missing; the row has 'answer'"),
        (json.dumps([{"instruction": "a", "answer": 3}]), r"row 1: field 'answer' must be text, found int: 3"),
        (json.dumps([{"instruction": " ", "answer": "b"}]), r"row 1: field 'instruction' is blank"),
    ],
)
def test_bad_files_say_where_and_what(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path, text), required=["instruction", "answer"])


def test_text_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "latin.json"
    path.write_bytes('[{"a": "é"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.json: not UTF-8 text, byte 8"):
        read_rows(path)


def test_skipped_rows_are_counted_and_reported_once(tmp_path: Path) -> None:
    path = write(tmp_path, "\n".join([json.dumps(GOOD), "{", json.dumps({"answer": "x"}), json.dumps(GOOD)]))
    with pytest.warns(UserWarning, match=r"2 of 4 rows were skipped; the first: .*line 2: broken JSON") as caught:
        assert read_rows(path, ["instruction"], on_bad_row="skip") == [GOOD, GOOD]
    assert len(caught) == 1


def test_a_broken_list_is_never_skipped(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken JSON"):
        read_rows(write(tmp_path, '[{"a": 1}, {'), on_bad_row="skip")


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no usable row \(1 bad; the first: .*row 1"):
        read_rows(write(tmp_path, "[3]"), on_bad_row="skip")


def test_converting_keeps_the_row_numbers_of_the_file(tmp_path: Path) -> None:
    def convert(row: dict[str, int]) -> int:
        if row["a"] > 2:
            raise ValueError("too large")
        return row["a"]

    path = write(tmp_path, json.dumps([{"a": 1}, 5, {"a": 3}, {"a": 2}]))
    with pytest.warns(UserWarning, match="2 of 4"):
        assert convert_file(path, convert, "skip") == [1, 2]
    with pytest.raises(ValueError, match="row 3: too large"):
        convert_file(write(tmp_path, json.dumps([{"a": 1}, {"a": 2}, {"a": 3}])), convert)


def test_unknown_policy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_bad_row must be 'raise' or 'skip', found 'drop'"):
        read_rows(write(tmp_path, json.dumps([GOOD])), on_bad_row="drop")  # type: ignore[arg-type]
