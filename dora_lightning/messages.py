"""Errors of one line: options that are numbers, each refused by its name, its value and its range."""

from __future__ import annotations

import math
from typing import Any


def check_whole(least: int, /, none: str = "", most: int = 2**63 - 1, **options: Any) -> None:
    """See that options are whole numbers of at least ``least``, and not true or false.

    Args:
        least: the smallest that is allowed.
        none: what null stands for, where it is allowed.
        most: the largest that is allowed.
        options: name -> value.

    Raises:
        ValueError: one is not; the message names it.

    >>> check_whole(1, none="all", limit_train=-1)
    Traceback (most recent call last):
    ValueError: limit_train must be at least 1, or null for all, found -1
    """
    for name, value in options.items():
        if value is None and none:
            continue
        or_null = f", or null for {none}" if none else ""
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be a whole number of at least {least}{or_null}, found {value!r:.80}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}{or_null}, found {value}")
        if value > most:
            raise ValueError(f"{name} must be at most {most}{or_null}, found {value!r:.80}")


def check_real(
    least: float = -math.inf,
    /,
    none: str = "",
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    **options: Any,
) -> None:
    """See that options are finite numbers of a range, and not true or false.

    Args:
        least: the smallest that is allowed.
        none: what null stands for, where it is allowed.
        above: what they must be greater than.
        most: the largest that is allowed.
        below: what they must be smaller than.
        options: name -> value.

    Raises:
        ValueError: one is not; the message names it.

    >>> check_real(0, below=1, dropout=float("nan"))
    Traceback (most recent call last):
    ValueError: dropout must be a number of at least 0 and below 1, found nan
    """
    words = {"of at least": least, "greater than": above, "of at most": most, "below": below}
    bounds = " and ".join(f"{word} {bound:g}" for word, bound in words.items() if math.isfinite(bound))
    or_null = f", or null for {none}" if none else ""
    for name, value in options.items():
        if value is None and none:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
        if not number or not (least <= value <= most and above < value < below):
            raise ValueError(f"{name} must be a number {bounds or 'that is finite'}{or_null}, found {value!r:.80}")
