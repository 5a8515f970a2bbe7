"""The one reader of JSON and JSONL files: row by row, each with its place.

A file is UTF-8 text, with or without a byte order mark, plain or gzipped. Beyond broken JSON, what Python's own reader
lets pass or stumbles over is refused by its place: half of a surrogate pair (no file can hold it again), ``NaN`` and
``Infinity`` (no JSON), numbers too large for a float, a key that stands twice in an object, and deep nesting.
"""

from __future__ import annotations

import codecs
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from sys import intern
from typing import IO, Any

MAX_DEPTH = 100
"""Most lists and objects inside one another."""

_MAX_DIGITS = 300  # of a whole number, so that it is a float too
_CHUNK = 1 << 20
_EDGE = 16  # characters before the end of what is in memory, where a literal or an escape may go on
_BLANK = re.compile(r"[ \t\n\r]*")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_GZIP = b"\x1f\x8b"
_FORMATS = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"\x28\xb5\x2f\xfd": "a Zstandard file",
    b"\x89HDF": "an HDF5 file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


def json_rows(path: Path, expected: str = "a JSON list of objects, or JSONL") -> Iterator[tuple[str, Any]]:
    """The rows of a file one by one, each with its place, ``row 3`` of a list or ``line 3`` of JSONL.

    Which of the two it is is seen from the first character, so the file's name does not matter. A file of one object is
    one row, unless its field ``data`` is a list of objects: these are the rows then. Only a piece of the file is in
    memory at a time.

    Args:
        path: the file.
        expected: what the file should hold, for messages.

    Yields:
        Place and row; in place of a row that is bad by itself, the ValueError that says why.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, is no UTF-8 text, or breaks off in a list: where the next row begins is unknown.
    """
    text = _Text(path, expected)
    first = text.next_character()
    if not first:
        raise ValueError(f"{path}: the file is empty; expected {expected}")
    if first == "[":
        yield from _rows_of_list(text)
        return
    whole = None
    if first == "{":
        with suppress(ValueError):  # the line that is broken says it
            whole = read_object(path, expected)
    if whole is None:
        yield from _rows_of_lines(text)
    elif _is_list_of_objects(whole.get("data")):
        yield from ((f"field 'data', row {number}", row) for number, row in enumerate(whole["data"], start=1))
    else:
        yield f"line {text.line_number}", whole


def read_json(path: Path, expected: str = "JSON") -> Any:
    """The one JSON value that a file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no UTF-8 text, no JSON, or holds what the module's first lines name.
    """
    value, suspicious = _read_whole(path, expected)
    if suspicious and (fault := _fault(value)):
        raise ValueError(f"{path}: {fault}")
    return value


def read_object(path: Path, expected: str = "JSON") -> dict[str, Any] | None:
    """The one JSON object that a file holds, or None if it is a list, or JSONL of more than one line.

    Rows inside it, that is the items of lists that are its values, and its other values, are replaced by the ValueError
    that says what is wrong with them where something is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, see :func:`read_json`.
    """
    text = _Text(path, expected)
    if text.next_character() != "{":
        return None
    line = text.line()
    assert line is not None
    more = text.next_character()
    try:
        value, suspicious = _decode(line)
    except ValueError as error:
        # an object that is written over several lines breaks off at the end of the first; else it is a bad row of JSONL
        if more and getattr(error.__cause__, "pos", 0) < len(line.rstrip()):
            return None
        value, suspicious = _read_whole(path, expected)
        more = ""
    if more or not isinstance(value, dict):
        return None
    return {name: _checked(item) for name, item in value.items()} if suspicious else value


def read_text(path: Path, expected: str = "text") -> str:
    """The whole text of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no UTF-8 text.
    """
    return "".join(_pieces(path, expected))


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is broken, or holds what the module's first lines name; the message says where.
    """
    value, suspicious = _decode(text)
    if suspicious and (fault := _fault(value)):
        raise ValueError(fault)
    return value


class _Refused:
    """Stands for a value that JSON does not know."""

    def __init__(self, why: str) -> None:
        self.why = why


class _Decoder(json.JSONDecoder):
    def __init__(self) -> None:
        self.refused = False
        super().__init__(
            object_pairs_hook=self._object,
            parse_constant=lambda name: self._refuse(f"holds {name}, which is no JSON"),
            parse_int=self._whole_number,
            parse_float=self._float,
        )

    def _refuse(self, why: str) -> Any:
        self.refused = True
        return _Refused(why)

    def _object(self, pairs: list[tuple[str, Any]]) -> Any:
        made = {intern(name): value for name, value in pairs}
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            return self._refuse(f"has the key {next(n for n in names if names.count(n) > 1)!r:.80} more than once")
        return made

    def _whole_number(self, digits: str) -> Any:
        return int(digits) if len(digits) <= _MAX_DIGITS else self._refuse(f"is a number of {len(digits)} digits")

    def _float(self, digits: str) -> Any:
        value = float(digits)
        return value if math.isfinite(value) else self._refuse(f"is a number that is too large, {digits:.40}")


class _Text:
    """The text of a file, of which a piece at a time is in memory."""

    def __init__(self, path: Path, expected: str) -> None:
        self.path = path
        self.expected = expected
        self.decoder = _Decoder()
        self._pieces = _pieces(path, expected)
        self._buffer = ""
        self._at = 0
        self._line, self._column = 1, 1  # of the buffer's first character

    def next_character(self) -> str:
        """The next character that is no white space, which stays there; none at the end of the file."""
        while True:
            found = _BLANK.match(self._buffer, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    @property
    def line_number(self) -> int:
        """Which line the next character is on, from 1."""
        return self._place(self._at)[0]

    def skip(self) -> None:
        """Go on behind the next character."""
        self._at += 1

    def line(self) -> str | None:
        """The rest of the line; None at the end of the file."""
        searched = 0
        while (end := self._buffer.find("\n", self._at + searched)) < 0:
            searched = len(self._buffer) - self._at
            if not self._more():
                end = len(self._buffer)
                break
        if self._at == len(self._buffer):
            return None
        found = self._buffer[self._at : end]
        self._at = min(end + 1, len(self._buffer))
        return found

    def value(self) -> tuple[Any, bool]:
        """The JSON value that begins at the next character, and whether it is to be looked through for faults."""
        while True:
            self.decoder.refused = False
            try:
                value, end = self.decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                behind = error.pos - self._at
                breaks_off = error.msg.startswith("Unterminated") or error.pos >= len(self._buffer) - _EDGE
                if breaks_off and self._more():
                    continue
                raise self.broken(error.msg, self._at + behind) from error
            # a number may go on, "-0" with what follows "-0." or "-0e-"
            if end >= len(self._buffer) - 2:
                length = end - self._at
                if self._more():
                    continue
                end = self._at + length  # the text before the value is not kept
            suspicious = _is_suspicious(self.decoder, self._buffer, self._at, end)
            self._at = end
            return value, suspicious

    def broken(self, what: str, position: int | None = None) -> ValueError:
        """What to raise where the text is no JSON."""
        line, column = self._place(self._at if position is None else position)
        return ValueError(f"{self.path}: broken JSON at line {line}, column {column}: {what}; expected {self.expected}")

    def _place(self, position: int) -> tuple[int, int]:
        lines = self._buffer.count("\n", 0, position)
        column = position - self._buffer.rfind("\n", 0, position) if lines else self._column + position
        return self._line + lines, column

    def _more(self) -> bool:
        """Read on, twice as much if nothing of what was read could be used; whether there was more."""
        self._line, self._column = self._place(self._at)
        self._buffer, self._at = self._buffer[self._at :], 0
        wanted = max(_CHUNK, len(self._buffer))
        read: list[str] = []
        for piece in self._pieces:
            read.append(piece)
            wanted -= len(piece)
            if wanted <= 0:
                break
        self._buffer += "".join(read)
        return bool(read)


def _pieces(path: Path, expected: str) -> Iterator[str]:
    """The text of a file in pieces that are not empty."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    with _open(path, expected) as file:
        while True:
            try:
                data = file.read(_CHUNK)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{path}: cannot be read: {error}") from error
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place = done - held + error.start
                raise ValueError(f"{path}: not UTF-8 text, byte {place}: {error.reason}") from error
            if not done:
                text = text.removeprefix("\ufeff")
            done += len(data)
            if text:
                yield text
            if not data:
                return


def _open(path: Path, expected: str) -> IO[bytes]:
    if path.is_dir():
        raise ValueError(f"{path}: a folder; expected a file with {expected}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {expected}")
    with open(path, "rb") as file:
        head = file.read(8)
    for magic, what in _FORMATS.items():
        if head.startswith(magic):
            raise ValueError(f"{path}: {what}; expected {expected}, as UTF-8 text, plain or gzipped")
    opened: Any = gzip.open if head.startswith(_GZIP) else open
    return opened(path, "rb")


def _rows_of_list(text: _Text) -> Iterator[tuple[str, Any]]:
    text.skip()
    number = 0
    while text.next_character() != "]" or number:
        number += 1
        try:
            value, suspicious = text.value()
        except RecursionError:
            raise ValueError(f"{text.path}, row {number}: {_TOO_DEEP}") from None
        yield f"row {number}", _checked_row(value) if suspicious else value
        del value  # the reader holds one row less
        separator = text.next_character()
        if separator == "]":
            break
        if separator != ",":
            raise text.broken("expected a comma or the end of the list")
        text.skip()
        if text.next_character() == "]":
            raise text.broken("a comma stands before the end of the list")
    text.skip()
    if text.next_character():
        raise text.broken("more text stands behind the list")


def _rows_of_lines(text: _Text) -> Iterator[tuple[str, Any]]:
    number = text.line_number  # the first ones may be blank
    while (line := text.line()) is not None:
        if line.strip(" \t\r"):
            yield f"line {number}", _parsed_line(line)
        number += 1


def _parsed_line(line: str) -> Any:
    try:
        value, suspicious = _decode(line)
    except ValueError as error:
        return ValueError(f"{error}; expected one object per line")
    return _checked_row(value) if suspicious else value


def _read_whole(path: Path, expected: str) -> tuple[Any, bool]:
    text = read_text(path, expected)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; expected {expected}")
    try:
        return _decode(text, one_line=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected {expected}") from error


def _decode(text: str, one_line: bool = True) -> tuple[Any, bool]:
    decoder = _Decoder()
    try:
        value = decoder.decode(text)
    except json.JSONDecodeError as error:
        line = "" if one_line else f"line {error.lineno}, "
        raise ValueError(f"broken JSON at {line}column {error.colno}: {error.msg}") from error
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    return value, _is_suspicious(decoder, text, 0, len(text))


def _is_suspicious(decoder: _Decoder, text: str, start: int, end: int) -> bool:
    """Whether a value that was read from this text can have a fault; looking through all values takes its time."""
    return (
        decoder.refused
        or text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH
        or _SURROGATE_ESCAPE.search(text, start, end) is not None
    )


_TOO_DEEP = f"lists and objects are nested more than {MAX_DEPTH} deep"


def _fault(value: Any, place: str = "", depth: int = 0) -> str:
    """What is wrong with a value or in it, with its place; empty if nothing is."""
    named = f"{place} " if place else ""
    if isinstance(value, _Refused):
        return f"{named}{value.why}".strip()
    if isinstance(value, str):
        return _broken_text(value, named)
    if not isinstance(value, dict | list):
        return ""
    if depth == MAX_DEPTH:
        return _TOO_DEEP
    if isinstance(value, list):
        inside = ((f"{place}[{number}]", item) for number, item in enumerate(value))
    else:
        for name in value:
            if broken := _broken_text(name, "a field's name "):
                return broken
        inside = ((f"{place}.{name}" if place else f"field {name!r}", item) for name, item in value.items())
    return next((fault for name, item in inside if (fault := _fault(item, name, depth + 1))), "")


def _broken_text(text: str, named: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        return f"{named}holds {half!r}, half of a surrogate pair, which is no text that a file can hold".strip()
    return ""


def _checked_row(value: Any) -> Any:
    return ValueError(fault) if (fault := _fault(value)) else value


def _checked(value: Any) -> Any:
    """A value of an object, or of a list in it the items; see :func:`read_object`."""
    return [_checked_row(item) for item in value] if isinstance(value, list) else _checked_row(value)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict | ValueError) for item in value)
