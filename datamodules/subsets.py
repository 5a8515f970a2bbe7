"""Drawing parts of a data set: validation, and training subsets each of which holds the smaller ones."""

from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def permutation(size: int, seed: int) -> list[int]:
    """The numbers below ``size`` in an order drawn by the seed."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def drawn(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most ``limit`` of the items, in their order; with one seed, fewer are part of more. None for all.

    >>> drawn("abc", None, seed=0), set(drawn(range(9), 2, seed=0)) < set(drawn(range(9), 5, seed=0))
    (['a', 'b', 'c'], True)
    """
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index] for index in sorted(permutation(len(items), seed)[:limit])]


def split_off(items: Sequence[T], val_size: int, limit_train: int | None, seed: int) -> tuple[list[T], list[T]]:
    """Training and validation items, each in their order in the file.

    They come from one shuffle, by the seed: its first ``val_size`` are for validation, the next ``limit_train`` to
    train on. So with one seed, a smaller training set is part of a larger one, and all are judged on the same items.

    Args:
        items: What there is.
        val_size: How many are kept for validation.
        limit_train: Most items to train on; None for all the others.
        seed: Seed of the shuffle.

    Raises:
        ValueError: ``limit_train`` is not positive, or ``val_size`` is negative or leaves nothing to train on.

    Example::

        >>> small, validation = split_off(range(10), val_size=2, limit_train=3, seed=0)
        >>> large, same = split_off(range(10), val_size=2, limit_train=6, seed=0)
        >>> set(small) < set(large), validation == same
        (True, True)
    """
    if limit_train is not None and limit_train < 1:
        raise ValueError(f"limit_train must be at least 1, or null for all, found {limit_train}")
    if not 0 <= val_size < len(items):
        raise ValueError(f"val_size={val_size} must be at least 0 and leave something of {len(items)} rows to train on")
    order = permutation(len(items), seed)
    train = order[val_size:][:limit_train]
    return [items[index] for index in sorted(train)], [items[index] for index in sorted(order[:val_size])]
