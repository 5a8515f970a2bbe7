"""Rows out of tables that are no JSON: CSV and TSV, Parquet, and folders that ``datasets`` has saved."""

import csv
import gzip
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


def is_table(path: Path) -> bool:
    """Whether :func:`table_rows` reads it: by its name, or by what it begins with."""
    return path.is_dir() or _delimiter(path) is not None or _is_parquet(path)


def table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a table, each with its place; in place of a row of CSV that is bad by itself, the ValueError.

    What stands in CSV and TSV is text, an empty field too; their first line names the columns.

    Raises:
        ValueError: The file is broken, or the folder is none that ``datasets`` has saved.
    """
    if path.is_dir():
        yield from _saved_rows(path)
    elif _is_parquet(path):
        yield from _parquet_rows(path)
    else:
        yield from _csv_rows(path)


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by ``datasets``' ``save_to_disk``."""
    return (path / _SAVED).is_file() or (path / _SAVED_SPLITS).is_file()


def _delimiter(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((delimiter for ending, delimiter in _DELIMITERS.items() if name.endswith(ending)), None)


def _is_parquet(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def _saved_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if not is_saved_dataset(path):
        raise ValueError(
            f"{path}: a folder; expected a file of rows (JSON, JSONL, CSV, TSV or Parquet), or a folder that the "
            "save_to_disk of datasets has written"
        )
    # imported where it is used: it is slow to import, and other files do not need it
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except Exception as error:  # a broken folder raises what its library stumbles over
        raise ValueError(f"{path}: a folder of datasets that cannot be read: {error}") from error
    if isinstance(saved, DatasetDict):
        raise ValueError(f"{path}: a folder of several splits; give that of one: {', '.join(map(repr, saved))}")
    yield from ((f"row {number}", row) for number, row in enumerate(saved, start=1))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: a Parquet file that cannot be read behind row {number}: {error}") from error


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    delimiter = _delimiter(path)
    assert delimiter is not None
    before = csv.field_size_limit(sys.maxsize)  # a text may be longer than the 128 KiB that a field may have
    try:
        with _open_text(path) as file:
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            names = next(lines, [])
            if not names:
                raise ValueError(f"{path}: the file is empty; expected a first line that names the columns")
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"{path}: two columns are named {twice!r}")
            for number, cells in enumerate(filter(None, lines), start=1):
                row: Any = dict(zip(names, cells, strict=False))
                if len(cells) != len(names):
                    row = ValueError(f"expected {len(names)} fields, one for each column, found {len(cells)}")
                yield f"row {number}", row
    except (csv.Error, UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: not a table of separated values: {error}") from error
    finally:
        csv.field_size_limit(before)


def _open_text(path: Path) -> IO[str]:
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return (gzip.open if zipped else open)(path, "rt", encoding="utf-8-sig", newline="")
