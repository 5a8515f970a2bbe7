"""The data sets of the eight commonsense tasks on the Hugging Face hub."""

from collections.abc import Iterable
from typing import Any, Literal

HUB_IDS = {
    "boolq": "google/boolq",
    "piqa": "baber/piqa",
    "social_i_qa": "lighteval/siqa",
    "hellaswag": "Rowan/hellaswag",
    # LLM-Adapters trains on all six sizes, one after another (63,238 rows); the largest holds 40,398 of them
    "winogrande": "allenai/winogrande:winogrande_xl",
    "ARC-Challenge": "allenai/ai2_arc:ARC-Challenge",
    "ARC-Easy": "allenai/ai2_arc:ARC-Easy",
    "openbookqa": "allenai/openbookqa:main",
}
"""Data set of each task, as ``name`` or ``name:config``; parquet mirrors, since ``datasets`` no longer runs scripts."""

# the answers of the other five test splits are not public, and LLM-Adapters tests on their validation splits
_PUBLIC_TEST = ("ARC-Challenge", "ARC-Easy", "openbookqa")


def load_hub_split(task: str, split: Literal["train", "test"], hub_id: str | None = None) -> Iterable[dict[str, Any]]:
    """The rows of one task, from the hub or its cache.

    Args:
        task: One of the eight tasks.
        split: ``train``, or the ``test`` rows that LLM-Adapters scores.
        hub_id: ``name`` or ``name:config`` of another data set with the same columns, or a local folder; the one in
            :data:`HUB_IDS` if None.

    Raises:
        ValueError: The task is not one of the eight.
    """
    # imported where it is used: it is slow to import, and local files do not need it
    from datasets import load_dataset

    if task not in HUB_IDS:
        raise ValueError(f"task {task!r} has no data set on the hub; those that have: {', '.join(HUB_IDS)}")
    name, _, config = (hub_id or HUB_IDS[task]).partition(":")
    hub_split = "validation" if split == "test" and task not in _PUBLIC_TEST else split
    return load_dataset(name, config or None, split=hub_split)
