"""The original files of ScienceQA, POPE and MMBench."""

import base64
import binascii
import csv
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from datamodules.rows import OnBadRow, Row, convert_file, convert_rows, optional_text, require_field, require_id
from datamodules.vqa_files import image_file, questions_file, read_object, require_object
from datamodules.vqa_rows import (
    LETTER,
    POPE_CATEGORIES,
    VisualQuestion,
    bare_question,
    mmbench,
    pope,
    scienceqa,
)
from datamodules.vqa_sets import EvaluationSet
from dora_lightning.images import IMAGE, open_encoded


def read_scienceqa(where: EvaluationSet, on_bad_row: OnBadRow) -> list[VisualQuestion]:
    """ScienceQA: the problems that LLaVA's list or a split of ``pid_splits.json`` names.

    Raises:
        ValueError: ``annotations`` is not given, the split is unknown, or a row is bad.
    """
    path = questions_file(where)
    if where.annotations is None:
        raise ValueError(f"scienceqa: {path} names problems only; give annotations (problems.json)")
    problems = require_object(where.annotations)

    def convert(row: Row) -> VisualQuestion:
        number = str(row.get("id"))
        if number not in problems:
            raise ValueError(f"problem {number:.80} is not in {where.annotations}")
        problem = problems[number]
        if isinstance(problem, ValueError):
            raise ValueError(f"problem {number} of {where.annotations}: {problem}")
        text = _asked(row) + LETTER if "conversations" in row else None
        try:
            name = optional_text(problem, "image") and f"{number}/{problem['image']}"
            name = name if text is None else optional_text(row, "image")
            question, hint = require_field(problem, "question"), optional_text(problem, "hint")
            image = image_file(where, name) if name else None
            return scienceqa(number, question, image, problem.get("choices"), problem.get("answer"), hint, text)
        except ValueError as error:
            raise ValueError(f"problem {number} of {where.annotations}: {error}") from error

    splits = read_object(path)
    if splits is None:
        return convert_file(path, convert, on_bad_row)
    split = where.split or "test"
    if not isinstance(splits.get(split), list):
        raise ValueError(f"{path}: no split {split!r}; it has {', '.join(map(repr, splits))}")
    return convert_rows([{"id": number} for number in splits[split]], convert, f"{path}, {split}", on_bad_row)


def _asked(row: Row) -> str:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
        raise ValueError(f"field 'conversations' must be a list of turns, found {turns!r:.200}")
    return require_field(turns[0], "value").replace(IMAGE, "").strip()


def read_pope(where: EvaluationSet, on_bad_row: OnBadRow) -> list[VisualQuestion]:
    """POPE, in the order of its files.

    LLaVA's question file and the label files are joined by their order within each category, which is all they have in
    common; that both name the same image is checked.

    Raises:
        ValueError: Labels are missing or more than the questions, or a row is bad.
        FileNotFoundError: A category has no label file.
    """
    path = questions_file(where)
    if Path(path).is_dir() or _category(path) is not None:
        return [
            question
            for category, file in _label_files(path).items()
            for question in _read_official_pope(file, category, where, on_bad_row)
        ]
    if where.annotations is None:
        raise ValueError(f"pope: {path} holds no labels; give annotations (the folder of coco_pope_*.json)")
    # a label that is left out would shift all that follow, so bad ones always stop the run
    labels = {category: convert_file(file, _label) for category, file in _label_files(where.annotations).items()}
    seen: Counter[str] = Counter()

    def convert(row: Row) -> VisualQuestion:
        category = require_field(row, "category")
        if category not in labels:
            raise ValueError(f"no labels of category {category!r}: no *_pope_{category}.json in {where.annotations}")
        place = seen[category]
        seen[category] += 1
        if place >= len(labels[category]):
            raise ValueError(f"there are only {place} labels of category {category!r} in {where.annotations}")
        label, text, name = labels[category][place], require_field(row, "text"), require_field(row, "image")
        if label["image"] != name:
            raise ValueError(
                f"question {place + 1} of category {category!r} is about {name}, its label about {label['image']}: the "
                "files do not belong together"
            )
        image, number = image_file(where, name), _id(row)
        return pope(number, bare_question(text), image, label["label"], name, category, text)

    questions = convert_file(path, convert, on_bad_row)
    for category, rows in labels.items():
        if category in seen and seen[category] != len(rows):
            raise ValueError(
                f"{path}: {seen[category]} questions of category {category!r}, but {len(rows)} labels in "
                f"{where.annotations}: the files do not belong together"
            )
    return questions


def _read_official_pope(file: str, category: str, where: EvaluationSet, on_bad_row: OnBadRow) -> list[VisualQuestion]:
    def convert(row: Row) -> VisualQuestion:
        label, name = _label(row), require_field(row, "image")
        image, question = image_file(where, name), require_field(row, "text")
        return pope(_id(row), question, image, label["label"], name, category)

    return convert_file(file, convert, on_bad_row)


def _id(row: Row) -> int | str | None:
    return None if row.get("question_id") is None else require_id(row, "question_id")


def _label(row: Row) -> dict[str, str]:
    return {"image": require_field(row, "image"), "label": require_field(row, "label")}


def _category(path: str) -> str | None:
    found = re.search(rf"pope_({'|'.join(POPE_CATEGORIES)})\.json$", Path(path).name)
    return found[1] if found else None


def _label_files(path: str) -> dict[str, str]:
    """Category -> file, of one file or of a folder's."""
    files = [path] if Path(path).is_file() else [str(file) for file in sorted(Path(path).glob("*_pope_*.json"))]
    named = {_category(file): file for file in files}
    there = {category: named[category] for category in POPE_CATEGORIES if category in named}
    if not there:
        raise FileNotFoundError(f"{path}: no file named *_pope_<category>.json, of {', '.join(POPE_CATEGORIES)}")
    return there


@dataclass(frozen=True)
class Base64Image:
    """An image inside a table, decoded when it is wanted."""

    name: str = field(compare=False)
    """Table and index: rows of one question's rotations hold the same image."""
    data: str

    def open(self) -> Image.Image:
        """The image.

        Raises:
            ValueError: The text is not base64.
        """
        try:
            return open_encoded(base64.b64decode(self.data, validate=True))
        except binascii.Error as error:
            raise ValueError(f"{self.name}: not base64: {error}") from error

    def __str__(self) -> str:
        """Table and index, for messages."""
        return self.name


def read_mmbench(where: EvaluationSet, on_bad_row: OnBadRow) -> list[VisualQuestion]:
    """MMBench's table, every row a question: rotations of the options are rows of their own.

    Raises:
        ValueError: The table lacks a column, or a row is bad.
    """
    path = questions_file(where)
    rows = _table(path)
    images: dict[str, str] = {str(row["index"]): row["image"] or "" for row in rows}

    def convert(row: Row) -> VisualQuestion:
        data = row["image"] or ""
        # newer tables hold an image once, and its row's index in the other rows
        data = images.get(data, data)
        if not data:
            raise ValueError(f"column 'image' is empty at index {row['index']}")
        return mmbench(row, Base64Image(f"{path}, index {row['index']}", data))

    return convert_rows(rows, convert, path, on_bad_row)


def _table(path: str) -> list[dict[str, Any]]:
    before = csv.field_size_limit(sys.maxsize)  # an image is longer than the 128 KiB that a field may have
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            missing = [
                name for name in ("index", "question", "A", "B", "image") if name not in (reader.fieldnames or ())
            ]
            if missing:
                raise ValueError(f"{path}: column {missing[0]!r} is missing; the table has {reader.fieldnames}")
            return list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a table of tab-separated values: {error}") from error
    finally:
        csv.field_size_limit(before)
