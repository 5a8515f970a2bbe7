"""What is read of JSON files, and what is said of those that cannot be."""

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from dora_lightning.files import json_lines, json_rows, parse_json, read_json, read_object

ROWS = [{"text": "what\u2028is\x85it \U0001f600", "n": [1, {"a": None}]}, {"text": "", "n": -2.5e3}]


def write(folder: Path, content: str | bytes, name: str = "rows.json") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows_of(path: Path) -> list[Any]:
    return [row for _, row in json_rows(path)]


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, ensure_ascii=False, indent=2),
        "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n \n",
        "\r\n".join(json.dumps(row) for row in ROWS),
        json.dumps({"version": 1, "data": ROWS}),
        json.dumps({"data": ROWS}, indent=1),
    ],
)
def test_the_same_rows_in_every_form(tmp_path: Path, content: str, bom: str) -> None:
    assert rows_of(write(tmp_path, bom + content)) == ROWS
    assert rows_of(write(tmp_path, gzip.compress((bom + content).encode()))) == ROWS


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
def test_rows_that_lie_across_the_pieces_that_are_read(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dora_lightning.files.json_reader._CHUNK", piece)
    values = [*ROWS, 12345, -0.125, True, None, '\\"\U0001f600', [[]], {"\u00e9": "e"}]
    assert rows_of(write(tmp_path, json.dumps(values))) == values
    assert rows_of(write(tmp_path, json.dumps(values, indent=1, ensure_ascii=True))) == values
    assert rows_of(write(tmp_path, "".join(json.dumps(value) + "\n" for value in values))) == values
    with pytest.raises(ValueError, match=r"rows\.json: broken JSON at line 3, column 4: expected a comma"):
        rows_of(write(tmp_path, "[1,\n 2,\n 3 4]"))


def test_memory_is_that_of_the_rows_that_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps([{"text": "word " * 40 + "\U0001f600", "n": n} for n in range(40_000)]))
    tracemalloc.start()
    assert sum(row["n"] for _, row in json_rows(path)) == 40_000 * 39_999 // 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 9e6
    assert peak < 7e6


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ('{"a": [0, {"b": "\\ud83d!"}]}', r"field 'a'\[1\]\.b holds '\\ud83d', half of a surrogate pair"),
        ('{"\\udc00": 1}', r"a field's name holds '\\udc00', half of a surrogate pair"),
        ('{"a": NaN}', "field 'a' holds NaN, which is no JSON"),
        ('{"a": [-Infinity]}', r"field 'a'\[0\] holds -Infinity"),
        ('{"a": 1e999}', "field 'a' is a number that is too large, 1e999"),
        (f'{{"a": {"9" * 5000}}}', "field 'a' is a number of 5000 digits"),
        ('{"a": 1, "a": 2}', "has the key 'a' more than once"),
        ('{"x": {"a": 1, "a": 2}}', "field 'x' has the key 'a' more than once"),
        (f'{{"a": {"[" * 101}{"]" * 101}}}', "nested more than 100 deep"),
    ],
)
def test_a_bad_value_is_named_with_its_row(tmp_path: Path, row: str, fault: str) -> None:
    for content, place in (
        (f'[{{"a": 1}},\n{row}, {{"a": 3}}]', "row 2"),
        (f'{{"a": 1}}\n{row}\n{{"a": 3}}', "line 2"),
    ):
        rows = dict(json_rows(write(tmp_path, content)))
        assert [rows.pop(name) for name in list(rows) if name != place] == [{"a": 1}, {"a": 3}]
        with pytest.raises(ValueError, match=fault):
            raise rows[place]
    # a document's rows are the items of its lists
    document = read_object(write(tmp_path, f'{{"questions": [{{"a": 1}}, {row}]}}'))
    assert document is not None
    assert document["questions"][0] == {"a": 1}
    assert isinstance(document["questions"][1], ValueError)
    with pytest.raises(ValueError, match=r"rows\.json: .*"):
        read_json(write(tmp_path, row))
    with pytest.raises(ValueError, match=fault):
        parse_json(row)


def test_nesting_without_end(tmp_path: Path) -> None:
    deep = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    with pytest.raises(ValueError, match=r"rows\.json, row 2: lists and objects are nested more than 100 deep"):
        rows_of(write(tmp_path, f'[{{"a": 1}}, {deep}]'))
    first, second = rows_of(write(tmp_path, f'{{"a": 1}}\n{deep}\n'))
    assert first == {"a": 1}
    assert "nested" in str(second)
    with pytest.raises(ValueError, match=r"rows\.json: lists and objects are nested"):
        read_json(write(tmp_path, deep))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty; expected a JSON list of objects, or JSONL"),
        ("[1, 2,]", "column 7: a comma stands before the end of the list"),
        ("[1 2]", "column 4: expected a comma or the end of the list"),
        ("[1, 2", "column 6: expected a comma or the end of the list"),
        ("[1, 2] 3", "column 8: more text stands behind the list"),
        ('[{"a": "b', r"column 8: Unterminated string"),
        (b'["\xe9"]', "not UTF-8 text, byte 2"),
        (b'["' + b"x" * 3_000_000 + b"\xff", "not UTF-8 text, byte 3000002"),
        (b"PAR1....PAR1", "a Parquet file; expected a JSON list"),
        (b"PK\x03\x04...", "a zip archive; expected a JSON list"),
        ("[1]".encode("utf-16"), "UTF-16 text; expected a JSON list"),
        (gzip.compress(b"[1, 2, 3]", mtime=0)[:-6], "cannot be read"),
    ],
)
def test_files_that_are_broken_or_something_else(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"rows\.json: .*{message}"):
        rows_of(write(tmp_path, content))


def test_a_broken_line_is_its_row(tmp_path: Path) -> None:
    found = rows_of(write(tmp_path, '{"a": 1,\n{"a": 2}\n\n{"a": }\n'))
    assert found[1] == {"a": 2}
    assert [str(found[place])[:27] for place in (0, 2)] == [
        "broken JSON at column 9: Ex",
        "broken JSON at column 7: Ex",
    ]


def test_what_was_written_reads_the_same_in_every_program(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    rows = [
        {"text": "half \ud83d of it", "values": torch.tensor([1, 2])},
        {"text": "caf\u00e9\u2028", "what": {1}.__class__},
    ]
    path = write(tmp_path, json_lines(rows))
    lines = path.read_text(encoding="utf-8").split("\n")
    assert json.loads(lines[0]) == {"text": "half \ud83d of it", "values": [1, 2]}
    assert json.loads(lines[1]) == {"text": "caf\u00e9\u2028", "what": "<class 'set'>"}
