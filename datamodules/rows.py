"""Reading rows from files, with errors that name the file, the row and the field."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from datamodules.tables import is_table, table_rows
from dora_lightning.files import json_rows

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
    """Read a file of rows and apply ``convert`` to each.

    It is a JSON list of objects, JSONL (one object per line), or an object whose field ``data`` is such a list, plain
    or gzipped, whatever its name; or a ``.csv`` or ``.tsv`` table, a Parquet file, or a folder that the
    ``save_to_disk`` of ``datasets`` has written.

    Args:
        path: The file.
        convert: Turns a row into what is wanted; raises ValueError where it cannot.
        on_bad_row: ``raise`` stops at the first bad row; ``skip`` leaves bad rows out and warns once, with their
            number and the first one's message.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty, is not UTF-8, is broken or of another kind, or holds a bad row and
            ``on_bad_row="raise"``; or no good row is left. The message names the file, the row (from 1) or line, and
            what was expected.
    """
    path = Path(path)
    rows = table_rows(path) if is_table(path) else json_rows(path)
    return _convert(rows, convert, str(path), on_bad_row)


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
    return _convert(places, convert, name, on_bad_row)


def require_field(row: Row, field: str) -> str:
    """The text in ``row[field]``.

    Raises:
        ValueError: The field is missing, is not text, or is blank.
    """
    if field not in row:
        raise ValueError(f"field {field!r} is missing; the row has {', '.join(map(repr, row)) or 'no fields'}")
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} must be text, found {type(value).__name__}: {value!r:.80}")
    if not value.strip():
        raise ValueError(f"field {field!r} is blank")
    return value


def optional_text(row: Row, field: str) -> str:
    """The text in ``row[field]``, as it stands; empty where the field is missing, null or blank.

    Raises:
        ValueError: It holds something else; a number is no text, 0 and false neither.
    """
    value = row.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} must be text, found {type(value).__name__}: {value!r:.80}")
    return value if value.strip() else ""


def require_texts(row: Row, field: str, least: int = 1) -> list[str]:
    """The list of texts in ``row[field]``.

    Raises:
        ValueError: The field is missing, is no list of texts, or holds fewer than ``least``.
    """
    value = row.get(field)
    if not isinstance(value, list) or len(value) < least or not all(isinstance(text, str) for text in value):
        raise ValueError(f"field {field!r} must be a list of {least} or more texts, found {value!r:.80}")
    return value


def require_id(row: Row, field: str) -> int | str:
    """The number or name in ``row[field]``.

    Raises:
        ValueError: The field is missing, empty, or holds something else.
    """
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError(f"field {field!r} must be a number or text, found {value!r:.80}")
    return value


def _object(row: Any) -> Row:
    if isinstance(row, ValueError):  # the reader's, of a row that is bad by itself
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with named fields, found {type(row).__name__}: {row!r:.80}")
    return row


def _convert(
    places: Iterable[tuple[str, Any]], convert: Callable[[Row], T], name: str, on_bad_row: OnBadRow
) -> list[T]:
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"on_bad_row must be 'raise' or 'skip', found {on_bad_row!r}")
    good: list[T] = []
    bad: list[str] = []
    for place, row in places:
        try:
            good.append(convert(_object(row)))
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
