"""A picture of some questions with the answers they got, to see at a glance what a model can do."""

from __future__ import annotations

import io
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from dora_lightning.images import open_image
from tasks.submissions import natural_order
from tasks.vqa_protocols import LETTERS

Record = dict[str, Any]

_COLUMNS = 4
_SIDE = 240
"""Pixels of a side of the square that an image is fitted into."""
_MARGIN = 16
_TEXT_SIZE = 17
_LINE = 23
_GAP = 5
_INDENT = 20
_LINES = {"question": 4, "answer": 3, "truth": 2}
"""Most lines of each text."""

_PAPER, _FRAME, _INK, _PALE = "#ffffff", "#d8dce2", "#20242b", "#667080"
_RIGHT, _WRONG = "#1a7f37", "#c62828"


def examples_picture(records: Sequence[Record], count: int = 12) -> bytes | None:
    """A PNG of a grid of images with question, answer and truth: right answers in green, wrong ones in red.

    The same records give the same picture, in whatever order they come. An answer that more than half agrees with is
    shown as right.

    Args:
        records: rows of ``tasks.VQA.records``; those whose image is a file (``image_path``) can be shown.
        count: most examples.

    Returns:
        The content of the file, or None if there is nothing to show.
    """
    chosen = choose_examples([record for record in records if "image_path" in record], count)
    if not chosen:
        return None
    font = ImageFont.load_default(size=_TEXT_SIZE)
    cells = [_Cell(record, font) for record in chosen]
    columns = min(_COLUMNS, len(cells))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    for row in rows:
        # answers of a row stand on one line, whatever the length of the questions
        longest = max(len(cell.texts[0].lines) for cell in row)
        for cell in row:
            cell.texts[0].lines.extend([""] * (longest - len(cell.texts[0].lines)))
    heights = [max(cell.height for cell in row) for row in rows]
    width = columns * (_SIDE + _MARGIN) + _MARGIN
    picture = Image.new("RGB", (width, sum(heights) + _MARGIN * (len(rows) + 1)), _PAPER)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            cell.draw(picture, (_MARGIN + column * (_SIDE + _MARGIN), top))
        top += height + _MARGIN
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()


def choose_examples(records: Sequence[Record], count: int) -> list[Record]:
    """At most ``count`` records, as many of each source as there are, evenly over its questions in order of their ids.

    >>> rows = [{"source": source, "question_id": n} for source in "ab" for n in range(9)]
    >>> [(row["source"], row["question_id"]) for row in choose_examples(rows, 5)]
    [('a', 1), ('a', 4), ('a', 7), ('b', 2), ('b', 6)]
    """
    sources: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda row: (row["source"], natural_order(row.get("question_id", "")))):
        sources.setdefault(record["source"], []).append(record)
    shares = dict.fromkeys(sources, 0)
    while sum(shares.values()) < min(count, len(records)):
        open_to_more = [source for source in sources if shares[source] < len(sources[source])]
        shares[min(open_to_more, key=lambda source: shares[source])] += 1
    return [
        # the middle of each of as many equal parts
        rows[(2 * part + 1) * len(rows) // (2 * shares[source])]
        for source, rows in sources.items()
        for part in range(shares[source])
    ]


class _Text(NamedTuple):
    lines: list[str]
    colour: str
    mark: bool | None = None
    """A tick or a cross before the first line, so that right and wrong differ by more than their colour."""


class _Cell:
    """One example: the image with its texts below."""

    def __init__(self, record: Record, font: Any) -> None:
        self.font = font
        self.image = _fit(record["image_path"])
        right = _is_right(record)
        colour = _INK if right is None else _RIGHT if right else _WRONG
        answer = record.get("pred", record.get("ranked", ""))
        answer = _with_option(record, answer) if answer else _unread(record)
        self.texts = [
            _Text(_wrap(record.get("question", ""), font, _SIDE, _LINES["question"]), _INK),
            _Text(_wrap(answer, font, _SIDE - _INDENT, _LINES["answer"]), colour, right),
        ]
        if record["references"]:
            truth = _with_option(record, Counter(record["references"]).most_common(1)[0][0])
            self.texts.append(_Text(_wrap(f"truth: {truth}", font, _SIDE, _LINES["truth"]), _PALE))

    @property
    def height(self) -> int:
        return _SIDE + sum(_GAP + _LINE * len(text.lines) for text in self.texts)

    def draw(self, picture: Image.Image, corner: tuple[int, int]) -> None:
        left, top = corner
        canvas = ImageDraw.Draw(picture)
        width, height = self.image.size
        picture.paste(self.image, (left + (_SIDE - width) // 2, top + (_SIDE - height) // 2))
        canvas.rectangle((left, top, left + _SIDE - 1, top + _SIDE - 1), outline=_FRAME)
        top += _SIDE
        for text in self.texts:
            top += _GAP
            if text.mark is not None:
                _draw_mark(canvas, (left, top), text.mark)
            for line in text.lines:
                canvas.text((left + _INDENT * (text.mark is not None), top), line, fill=text.colour, font=self.font)
                top += _LINE


def _fit(path: str) -> Image.Image:
    """The image, scaled to the square; what can't be opened any more is left blank, a test is not lost for that."""
    try:
        image = open_image(path)
    except ValueError:
        blank = Image.new("RGB", (_SIDE, _SIDE), _FRAME)
        font = ImageFont.load_default(size=_TEXT_SIZE)
        ImageDraw.Draw(blank).text((_SIDE / 2, _SIDE / 2), "image not found", _PALE, font, anchor="mm")
        return blank
    scale = _SIDE / max(image.size)
    width, height = (max(1, round(scale * side)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _is_right(record: Record) -> bool | None:
    score = record.get("score", record.get("ranked_score"))
    return None if score is None else score > 0.5


def _unread(record: Record) -> str:
    text = record.get("output_pred", "").strip()
    return f"no answer read in: {text}" if text else "(no answer)"


def _with_option(record: Record, answer: str) -> str:
    """``B. a dog`` for a letter."""
    choices = record.get("choices")
    options = dict(zip(LETTERS, choices, strict=False)) if choices else record.get("options", {})
    return f"{answer}. {options[answer]}" if answer in options else answer


def _wrap(text: str, font: Any, width: int, most: int) -> list[str]:
    """At most ``most`` lines of ``text`` that fit into ``width``."""
    # Pillow's own font has no letters with accents
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    lines = [""]
    for word in plain.split():
        for piece in _pieces(word, font, width):
            longer = f"{lines[-1]} {piece}".strip()
            if font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(piece)
    if len(lines) > most:
        lines = lines[:most]
        while font.getlength(f"{lines[-1]} ...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = f"{lines[-1].rstrip()} ..."
    return lines


def _pieces(word: str, font: Any, width: int) -> list[str]:
    """The word, cut where it is longer than a line."""
    pieces = [""]
    for character in word:
        if font.getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def _draw_mark(canvas: ImageDraw.ImageDraw, corner: tuple[int, int], right: bool) -> None:
    """A tick or a cross; fonts do not have them all."""
    left, top = corner[0] + 1, corner[1] + 5
    if right:
        canvas.line([(left, top + 6), (left + 4, top + 11), (left + 12, top)], fill=_RIGHT, width=3, joint="curve")
    else:
        canvas.line([(left, top), (left + 11, top + 11)], fill=_WRONG, width=3)
        canvas.line([(left, top + 11), (left + 11, top)], fill=_WRONG, width=3)
