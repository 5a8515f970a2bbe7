"""Texts that are too long for VL-BART's encoder, cut to what it reads."""

from typing import Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from datamodules.vl_bart.records import Asked

Truncation: TypeAlias = Literal["subtitles", "published"]


def fit_text(tokenizer: PreTrainedTokenizerBase, asked: Asked, truncation: Truncation = "subtitles") -> str:
    """The text of a row, cut to at most ``asked.max_input_tokens`` tokens, special tokens included.

    What fits is left as it is. Else the cut is at the end of a token, so that the tokens that are left are as a rule
    those of the whole text, and tokenising the result never gives more than the limit.

    Args:
        tokenizer: A fast one, which says which characters a token stands for.
        asked: The row.
        truncation: ``subtitles`` cuts the end of the subtitles, so that question and choices are read, and cuts on
            the right only what is too long without any subtitles. ``published`` cuts the whole text on the right, as
            VL-Adapter does: long subtitles then leave nothing of the question.

    Raises:
        ValueError: ``truncation`` is unknown, or the limit has no room for the special tokens.
    """
    if truncation not in ("subtitles", "published"):
        raise ValueError(f"truncation must be 'subtitles' or 'published', found {truncation!r}")
    limit = asked.max_input_tokens
    special = tokenizer.num_special_tokens_to_add()
    if limit <= special:
        raise ValueError(f"max_input_tokens={limit} must be more than the {special} special tokens of every text")
    text = asked.before + asked.subtitles + asked.after
    if truncation == "subtitles" and asked.subtitles:
        start = len(asked.before)
        fitted = _cut(tokenizer, text, start, start + len(asked.subtitles), limit)
        if fitted is not None:
            return fitted
        text = asked.before + asked.after
    fitted = _cut(tokenizer, text, 0, len(text), limit)
    assert fitted is not None, "no text at all always fits"
    return fitted


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int, limit: int) -> str | None:
    """The text without the end of ``text[start:end]``, or None if it is too long without all of that."""
    # verbose=False: transformers warns of texts longer than the model's window
    ends = [last for _, last in tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]]
    excess = len(ends) - limit
    if excess <= 0:
        return text
    # where a token of the part that may be cut ends; special tokens stand at 0
    places = [start, *(place for place in ends if start < place <= end)]
    head, tail = text[:end], text[end:]
    kept, shorter = len(places) - 1, text
    while excess > 0 and kept > 0:
        kept = max(0, kept - excess)
        shorter = head[: places[kept]] + tail
        # words that were cut can take more tokens than they took as a part of the whole
        excess = len(tokenizer(shorter, verbose=False)["input_ids"]) - limit
    return shorter if excess <= 0 else None
