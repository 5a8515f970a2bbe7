"""Files and folders that are there whole or not at all, and locks on them."""

from dora_lightning.files.atomic import write_atomically, write_bytes_atomically, write_text_atomically

__all__ = ["write_atomically", "write_bytes_atomically", "write_text_atomically"]
