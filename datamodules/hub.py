"""Rows of a data set on the Hugging Face hub."""

from typing import Any


def load_hub_rows(hub_id: str, split: str = "train") -> Any:
    """One split, from the hub or its cache, as a ``datasets.Dataset``: a sequence of rows.

    Args:
        hub_id: ``name`` or ``name:config``, or a local folder of data files.
        split: Name of the split.

    Raises:
        ValueError: ``datasets`` cannot find the data set or the split; the message names both.
    """
    # imported where it is used: it is slow to import, and local files do not need it
    from datasets import load_dataset

    name, _, config = hub_id.partition(":")
    try:
        return load_dataset(name, config or None, split=split)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"hub: could not load the split {split!r} of {hub_id!r}: {error}") from error
