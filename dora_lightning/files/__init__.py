"""Files and folders that are there whole or not at all, locks on them, and the one reader and writer of JSON."""

from dora_lightning.files.atomic import write_atomically, write_bytes_atomically, write_text_atomically
from dora_lightning.files.json_reader import json_rows, parse_json, read_json, read_object, read_text
from dora_lightning.files.json_writer import json_bytes, json_lines

__all__ = [
    "json_bytes",
    "json_lines",
    "json_rows",
    "parse_json",
    "read_json",
    "read_object",
    "read_text",
    "write_atomically",
    "write_bytes_atomically",
    "write_text_atomically",
]
