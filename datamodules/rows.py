"""Reading rows from JSON and JSONL files, with errors that name the file, the row and the field."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

Row: TypeAlias = dict[str, Any]
OnBadRow: TypeAlias = Literal["raise", "skip"]
T = TypeVar("T")


def read_rows(path: str | Path, required: Sequence[str] = (), on_bad_row: OnBadRow = "raise") -> list[Row]:
    """Read a file of rows as they are; see :func:`convert_file`.

    Args:
        path: The file.
        required: Fields that every row must have, as text that is not blank.
        on_bad_row: As in :func:`convert_file`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: As in :func:`convert_file`, or a row lacks a required field.
    """

    def check(row: Row) -> Row:
        for field in required:
            require_field(row, field)
        return row

    return convert_file(path, check, on_bad_row)


def convert_file(path: str | Path, convert: Callable[[Row], T], on_bad_row: OnBadRow = "raise") -> list[T]:
    """Read a file of rows, a JSON list of objects or JSONL (one object per line), and apply ``convert`` to each.

    Which of the two it is is seen from the first character, so the name of the file does not matter.

    Args:
        path: The file.
        convert: Turns a row into what is wanted; raises ValueError where it cannot.
        on_bad_row: ``raise`` stops at the first bad row; ``skip`` leaves bad rows out and warns once, with their
            number and the first one's message.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty, is not UTF-8, is broken JSON, or holds a bad row and ``on_bad_row="raise"``;
            or no good row is left. The message names the file, the row (from 1) or line, and what was expected.
    """
    path = Path(path)
    text = _read_text(path)
    if text.lstrip().startswith("["):
        return convert_rows(_parse_list(path, text), convert, str(path), on_bad_row)
    # not splitlines(): a JSON string may hold other line separators, such as U+2028, as they are
    lines = ((f"line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    return _convert(lines, lambda line: convert(_object(_parse_line(line))), str(path), on_bad_row)


def convert_rows(
    rows: Iterable[Any], convert: Callable[[Row], T], name: str, on_bad_row: OnBadRow = "raise"
) -> list[T]:
    """Apply ``convert`` to rows that are in memory already, and give a bad row's error its place.

    Args:
        rows: The rows, in the order of the file.
        convert: Turns a row into what is wanted; raises ValueError where it cannot.
        name: The file or data set, for messages.
        on_bad_row: As in :func:`convert_file`.

    Raises:
        ValueError: ``convert`` refused a row and ``on_bad_row="raise"``, or it refused all of them.
    """
    places = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    return _convert(places, lambda row: convert(_object(row)), name, on_bad_row)


def require_field(row: Row, field: str) -> str:
    """The text in ``row[field]``.

    Raises:
        ValueError: The field is missing, is not text, or is blank.
    """
    if field not in row:
        raise ValueError(f"field {field!r} is missing; the row has {', '.join(map(repr, row)) or 'no fields'}")
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} must be text, found {type(value).__name__}: {value!r}")
    if not value.strip():
        raise ValueError(f"field {field!r} is blank")
    return value


def _object(row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with named fields, found {type(row).__name__}: {row!r:.80}")
    return row


def _convert(
    places: Iterable[tuple[str, Any]], convert: Callable[[Any], T], name: str, on_bad_row: OnBadRow
) -> list[T]:
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"on_bad_row must be 'raise' or 'skip', found {on_bad_row!r}")
    good: list[T] = []
    bad: list[str] = []
    for place, row in places:
        try:
            good.append(convert(row))
        except ValueError as error:
            message = f"{name}, {place}: {error}"
            if on_bad_row == "raise":
                raise ValueError(message) from error
            bad.append(message)
    if not good:
        raise ValueError(f"{name}: no usable row" + (f" ({len(bad)} bad; the first: {bad[0]})" if bad else ""))
    if bad:
        rank_zero_warn(f"{name}: {len(bad)} of {len(good) + len(bad)} rows were skipped; the first: {bad[0]}")
    return good


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a JSON list of objects, or JSONL")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text, byte {error.start}: {error.reason}") from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; expected a JSON list of objects, or JSONL")
    return text


def _parse_list(path: Path, text: str) -> list[Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # where a list breaks off, the rows after it are unknown, so this is never a row to skip
        raise ValueError(
            f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}; expected a list of objects"
        ) from error


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON at column {error.colno}: {error.msg}; expected one object per line") from error
