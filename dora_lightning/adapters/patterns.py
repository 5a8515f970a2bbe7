"""Regular expressions for module names, matched in a time that does not depend on how they are written.

Python's engine tries one way of matching after the other, and ``(a+)+b`` has exponentially many. A checkpoint or a PEFT
folder of a stranger may hold such a pattern, so those that could have many ways are matched by sets of positions, which
is slower for ordinary patterns and never exponential. Both ways give the same answer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as ops  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as ops
    import sre_parse as parser

# ways of matching a name of a hundred characters that are left to Python's engine, which tries 50 of them in 1 us
_FEW, _LENGTH = 1_000_000, 100
_SINGLE = (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN)
_REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT)
# of Python 3.11 and later
_POSSESSIVE, _ATOMIC = (getattr(ops, name, None) for name in ("POSSESSIVE_REPEAT", "ATOMIC_GROUP"))


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression matches the whole of a name.

    Raises:
        ValueError: it could take exponentially long and has parts, such as back-references, that sets of positions
            cannot match.

    >>> matches(r".*\\.(q|v)_proj", "layers.0.q_proj"), matches("(a+)+b", "a" * 60)
    (True, False)
    """
    parsed, few = _parsed(pattern)
    if few:
        return re.fullmatch(pattern, name) is not None
    try:
        if parsed.state.flags & ~re.UNICODE:
            raise NotImplementedError("flags such as (?i)")
        return len(name) in _Positions(name).after(parsed, frozenset([0]))
    except NotImplementedError as error:
        raise ValueError(
            f"the regular expression {pattern!r:.100} could take exponentially long: write it without repeats inside "
            f"of repeats, or without {error}"
        ) from error


def named_by(names: Iterable[str], patterns: str | Sequence[str]) -> Iterator[tuple[str, set[str]]]:
    """Each pattern, and the names that it matches: a string as a regular expression, those of a list as suffixes."""
    names = list(names)
    if isinstance(patterns, str):
        yield patterns, {name for name in names if matches(patterns, name)}
        return
    for pattern in patterns:
        yield pattern, {name for name in names if name == pattern or name.endswith(f".{pattern}")}


@lru_cache(maxsize=256)
def _parsed(pattern: str) -> tuple[Any, bool]:
    parsed = parser.parse(pattern)
    return parsed, _ways(parsed) <= _FEW


def _ways(items: Any) -> int:
    """An upper bound of the ways in which a part matches, or more than :data:`_FEW`."""
    ways = 1
    for op, value in items:
        if op is ops.BRANCH:
            ways *= sum(_ways(branch) for branch in value[1])
        elif op is ops.SUBPATTERN:
            ways *= _ways(value[3])
        elif op in (ops.ASSERT, ops.ASSERT_NOT):
            ways *= _ways(value[1])
        elif op is _ATOMIC:
            ways *= _ways(value)
        elif op in _REPEATS or op is _POSSESSIVE:
            least, most, repeated = value
            inside = _ways(repeated)
            if most > 1 and inside > 1:
                return _FEW + 1
            ways *= inside * (1 if least == most else min(int(most) - least + 1, _LENGTH))
        elif op not in (*_SINGLE, ops.AT, ops.GROUPREF):
            return _FEW + 1
        if ways > _FEW:
            return _FEW + 1
    return ways


class _Positions:
    """Where in a name a part of a pattern can end, for all of its ways at once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._known: dict[tuple[int, int], frozenset[int]] = {}

    def after(self, items: Any, starts: frozenset[int]) -> frozenset[int]:
        """Where a sequence of items can end that begins at one of ``starts``."""
        for item in items:
            starts = frozenset().union(*(self._after_item(item, start) for start in starts))
        return starts

    def _after_item(self, item: Any, start: int) -> frozenset[int]:
        key = (id(item), start)  # the parsed pattern outlives this object
        if key not in self._known:
            op, value = item
            self._known[key] = self._compute(op, value, start)
        return self._known[key]

    def _compute(self, op: Any, value: Any, start: int) -> frozenset[int]:
        here = frozenset([start])
        if op in _SINGLE:
            return (
                frozenset([start + 1]) if start < len(self.name) and _fits(op, value, self.name[start]) else frozenset()
            )
        if op is ops.BRANCH:
            return frozenset().union(*(self.after(branch, here) for branch in value[1]))
        if op is ops.SUBPATTERN and not (value[1] or value[2]):
            return self.after(value[3], here)
        if op in _REPEATS:
            least, most, repeated = value
            return self._repeated(least, most, repeated, here)
        if op is ops.AT:
            return here if self._is_at(value, start) else frozenset()
        if op in (ops.ASSERT, ops.ASSERT_NOT):
            direction, items = value
            if direction > 0:
                found = bool(self.after(items, here))
            else:
                found = any(start in self.after(items, frozenset([begin])) for begin in range(start + 1))
            return here if found == (op is ops.ASSERT) else frozenset()
        raise NotImplementedError(
            f"{str(op).lower()} ({'(?i) and the like' if op is ops.SUBPATTERN else 'back-references'})"
        )

    def _repeated(self, least: int, most: int, items: Any, here: frozenset[int]) -> frozenset[int]:
        # what was reached in more steps than there are characters is reached in one step more as well
        for _ in range(min(least, 2 * len(self.name) + 2)):
            here = self.after(items, here)
        reached = here
        for _ in range(min(int(most) - least, len(self.name) + 1)):
            here = self.after(items, here) - reached
            if not here:
                break
            reached |= here
        return reached

    def _is_at(self, place: Any, position: int) -> bool:
        if place in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
            return position == 0
        if place in (ops.AT_END, ops.AT_END_STRING):
            return position == len(self.name)
        sides = [_is_word(self.name[i]) for i in (position - 1, position) if 0 <= i < len(self.name)]
        at_boundary = sides.count(True) == 1
        return at_boundary == (place is ops.AT_BOUNDARY)


def _fits(op: Any, value: Any, character: str) -> bool:
    if op is ops.IN:
        negated = value[0][0] is ops.NEGATE
        return any(_fits(kind, part, character) for kind, part in value[negated:]) != negated
    if op is ops.ANY:
        return character != "\n"
    if op is ops.RANGE:
        return value[0] <= ord(character) <= value[1]
    if op is ops.CATEGORY:
        kinds = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": _is_word}
        kind = str(value).rpartition("_")[2]
        return kinds[kind](character) != ("_NOT_" in str(value))
    return (ord(character) == value) == (op is ops.LITERAL)


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"
