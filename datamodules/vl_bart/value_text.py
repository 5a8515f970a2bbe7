"""What VL-Adapter's video run has VL-BART read and write for VALUE's rows, character for character.

A question is ``[Subs] what is said [Q] question [TS] (20.16-25.12) [Choices] a0: one. a1: another. tvqa: `` and is
answered by ``a1``; a clip is ``[Subs] what is said [TS] ([35.73, 40.9]) tvc: `` (YC2C's has no ``[TS]``) and is
answered by a caption.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

from datamodules.vl_bart.records import Asked, VideoRow

Prompts: TypeAlias = Literal["published", "none"]

MAX_INPUT_TOKENS = 600
MAX_CAPTION_TOKENS = 20


def value_asked(rows: Sequence[VideoRow], training: bool, prompts: Prompts = "published") -> list[Asked]:
    """The rows as VL-BART is asked about them.

    Args:
        rows: One benchmark's rows.
        training: One record for each caption, rather than one for each clip with all of its captions. Clips without
            captions, and questions without an answer, are left out of training.
        prompts: ``published`` ends each text with its benchmark's prompt; ``none`` leaves it out.

    Raises:
        ValueError: ``prompts`` is unknown.
    """
    if prompts not in ("published", "none"):
        raise ValueError(f"prompts must be 'published' or 'none', found {prompts!r}")
    # questions about one video share one text, which is most of what they hold
    texts: dict[int, str] = {}
    asked: list[Asked] = []
    for row in rows:
        video = id(row.subtitles)
        if video not in texts:
            texts[video] = " ".join(subtitle.text for subtitle in row.subtitles)
        prompt = f" {row.source}: " if prompts == "published" else ""
        asked += (_question if row.choices else _clip)(row, texts[video], prompt, training)
    return asked


def _question(row: VideoRow, said: str, prompt: str, training: bool) -> list[Asked]:
    if training and row.answer is None:
        return []
    labels = tuple(f"a{number}" for number in range(len(row.choices)))
    choices = " ".join(f"{label}: {text.strip('. ')}." for label, text in zip(labels, row.choices, strict=True))
    answer = () if row.answer is None else (labels[row.answer],)
    return [
        Asked(
            row.source,
            (row.video,),
            before="[Subs] ",
            subtitles=said,
            after=f" [Q] {row.question}{_span(row)} [Choices] {choices}{prompt}",
            answers=tuple((text, 1.0) for text in answer),
            references=answer,
            options=labels,
            max_input_tokens=MAX_INPUT_TOKENS,
            row={**row.row, "question": row.question, "choices": list(row.choices)},
        )
    ]


def _clip(row: VideoRow, said: str, prompt: str, training: bool) -> list[Asked]:
    whole = Asked(
        row.source,
        (row.video,),
        before="[Subs] ",
        subtitles=said,
        after=f"{_span(row)}{prompt}",
        answers=tuple((caption, 1.0) for caption in row.captions),
        references=row.captions,
        max_target_tokens=MAX_CAPTION_TOKENS,
        max_input_tokens=MAX_INPUT_TOKENS,
        row=row.row,
    )
    return [whole._replace(answers=(answer,)) for answer in whole.answers] if training else [whole]


def _span(row: VideoRow) -> str:
    """As the file has it, whatever its form."""
    return f" [TS] ({row.row['ts']})" if "ts" in row.row else ""
