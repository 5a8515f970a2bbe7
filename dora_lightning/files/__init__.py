"""Files and folders that are there whole or not at all, locks on them, and the one reader and writer of JSON."""

from dora_lightning.files.atomic import (
    open_atomically,
    remove_leftovers,
    write_atomically,
    write_bytes_atomically,
    write_text_atomically,
)
from dora_lightning.files.folders import check_folder, remove_folder, write_folder
from dora_lightning.files.json_reader import json_rows, parse_json, read_json, read_object, read_text
from dora_lightning.files.json_writer import json_bytes, json_lines

__all__ = [
    "check_folder",
    "json_bytes",
    "json_lines",
    "json_rows",
    "open_atomically",
    "parse_json",
    "read_json",
    "read_object",
    "read_text",
    "remove_folder",
    "remove_leftovers",
    "write_atomically",
    "write_bytes_atomically",
    "write_folder",
    "write_text_atomically",
]
