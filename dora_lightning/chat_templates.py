"""Chat templates: programs that come with a model, run by transformers in a sandbox, and here for a limited time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase

SECONDS = 10.0
"""How long a template may take for one conversation; real ones take less than a thousandth of a second."""

_LONGEST = 10_000_000  # characters that a template may write


class _TooSlow(Exception):  # noqa: N818  # never leaves this file
    pass


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> str:
    """A conversation as the tokenizer's chat template writes it.

    Args:
        tokenizer: has a chat template.
        messages: as for ``apply_chat_template`` of transformers.
        add_generation_prompt: whether the answer's beginning follows.

    Raises:
        ValueError: the template refuses the conversation, fails, or takes or writes too much. The message has its
            reason, and names the tokenizer.
    """
    name = f"the chat template of the tokenizer {tokenizer.name_or_path!r}"
    try:
        with _limited_time():
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
    except _TooSlow:
        raise ValueError(
            f"{name} takes more than {SECONDS:g} s for one conversation; choose another template"
        ) from None
    except Exception as error:  # whatever its expressions raise
        raise ValueError(f"{name} refuses a conversation: {str(error) or type(error).__name__}") from error
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise ValueError(f"{name} makes more than {_LONGEST:,} characters of one conversation; choose another template")
    return text


@contextmanager
def _limited_time() -> Iterator[None]:
    """Raise :class:`_TooSlow` in the block after :data:`SECONDS`, where the system has timers: not in other threads."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    # again and again: one may be lost in a finalizer, whose exceptions go nowhere
    left, interval = signal.setitimer(signal.ITIMER_REAL, SECONDS, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
