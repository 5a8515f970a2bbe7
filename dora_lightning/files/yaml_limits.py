"""What a YAML text would become, counted before it does.

Nine lines of aliases of aliases stand for a billion values. The parser itself shares them; whoever copies the result,
as a reader of configs does, does not.
"""

from __future__ import annotations

import yaml

LARGEST = 200_000
"""Values that a config may have, with every alias written out."""


def check_yaml(text: str, place: str) -> None:
    """See whether a YAML text stays small with all of its aliases written out.

    What is no YAML passes: its reader says so.

    Args:
        text: the text.
        place: its file, for messages.

    Raises:
        ValueError: it becomes more than :data:`LARGEST` values, or is nested too deeply to be read.
    """
    if "*" not in text and not _is_deep(text):
        return
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        size = _size(root, {}, set()) if root is not None else 0
    except RecursionError:
        raise ValueError(f"{place}: YAML that is nested too deeply to be read") from None
    except yaml.YAMLError:
        return
    if size > LARGEST:
        raise ValueError(f"{place}: YAML that stands for more than {LARGEST:,} values with its aliases written out")


def _is_deep(text: str) -> bool:
    return any(text.count(opening) > 100 for opening in "[{") or "- " * 100 in text


def _size(node: yaml.Node, known: dict[int, int], open_ones: set[int]) -> int:
    """Values in a node, its own included; one that holds itself has no end."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in open_ones:
        return LARGEST + 1
    if id(node) not in known:
        open_ones.add(id(node))
        children = [child for pair in node.value for child in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_size(child, known, open_ones) for child in children)
        open_ones.remove(id(node))
    return known[id(node)]
