"""Chat messages as they stand in instruction sets, read into a system message and turns of question and answer."""

from typing import Any, NamedTuple

from datamodules.rows import Row

# OpenAI's names, and ShareGPT's
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_FIELDS = {"messages": ("role", "content"), "conversations": ("from", "value")}


class Dialogue(NamedTuple):
    """A conversation, free of any file's layout."""

    turns: tuple[tuple[str, str | None], ...]
    """Questions and answers; the last answer is None if the conversation ends in a question."""
    system: str | None = None
    """The system message, if there is one."""


def dialogue_of_row(row: Row) -> Dialogue:
    """The conversation in a row's ``messages`` (``role``, ``content``) or ``conversations`` (``from``, ``value``).

    Raises:
        ValueError: The row has neither field, or its messages are no conversation (see :func:`read_messages`) that
            ends in an answer.
    """
    field = next((name for name in _FIELDS if row.get(name) is not None), None)
    if field is None:
        raise ValueError(
            f"expected the field {' or '.join(map(repr, _FIELDS))}; the row has {', '.join(map(repr, row)) or 'none'}"
        )
    dialogue = read_messages(row[field], field)
    if dialogue.turns[-1][1] is None:
        raise ValueError(f"field {field!r}: the last message is the user's and has no answer")
    return dialogue


def has_messages(row: Row) -> bool:
    """Whether a row holds chat messages rather than an instruction."""
    return any(row.get(name) is not None for name in _FIELDS)  # a table has all columns in each row


def read_messages(messages: Any, field: str) -> Dialogue:
    """A list of messages, each with ``role`` and ``content`` or with ``from`` and ``value``.

    Args:
        messages: The list: a system message or none, then the user and the assistant in turn.
        field: Where the list stands, for messages of errors.

    Raises:
        ValueError: It is no list, or a message has no text, another role, or its role out of turn.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"field {field!r} must be a list of messages, found {messages!r:.80}")
    texts: list[str] = []
    system = None
    for number, message in enumerate(messages, start=1):
        place = f"field {field!r}, message {number}"
        role, text = _read_message(message, place)
        if role == "system" and number == 1:
            system = text if text.strip() else None  # a blank one is common, and says nothing
            continue
        expected = "assistant" if len(texts) % 2 else "user"
        if role != expected:
            raise ValueError(f"{place} is of the role {role!r}; expected {expected!r}, since the two speak in turn")
        texts.append(text)
    if not texts:
        raise ValueError(f"field {field!r} holds a system message alone")
    answers: list[str | None] = [*texts[1::2], *([None] if len(texts) % 2 else [])]
    return Dialogue(tuple(zip(texts[::2], answers, strict=True)), system)


def _read_message(message: Any, place: str) -> tuple[str, str]:
    keys = next((pair for pair in _FIELDS.values() if isinstance(message, dict) and pair[0] in message), None)
    if keys is None:
        raise ValueError(
            f"{place} must have the fields 'role' and 'content', or 'from' and 'value'; found {message!r:.80}"
        )
    role, text = message[keys[0]], message.get(keys[1])
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"{place}: unknown role {role!r:.80}; expected one of {', '.join(_ROLES)}")
    if not isinstance(text, str):
        raise ValueError(f"{place}: field {keys[1]!r} must be text, found {text!r:.80}")
    if not text.strip() and _ROLES[role] != "system":
        raise ValueError(f"{place}, of the role {role!r}, is blank")
    return _ROLES[role], text
