"""The original files of VQAv2, GQA, VizWiz and TextVQA: LLaVA's question files, the official ones, and both joined."""

import os
import re
from pathlib import Path
from typing import Any

from datamodules.rows import OnBadRow, Row, convert_file, convert_rows, require_field, require_id, require_texts
from datamodules.vqa_rows import VisualQuestion, answer_texts, bare_question, gqa, textvqa, vizwiz, vqav2, without_ocr
from datamodules.vqa_sets import EvaluationSet
from dora_lightning import files


def read_vqav2(where: EvaluationSet, on_bad_row: OnBadRow) -> list[VisualQuestion]:
    """VQAv2 from LLaVA's JSONL or the official questions, with the answers of the official annotations."""
    answers: dict[Any, Any] = {}
    if where.annotations:
        rows = _records(where.annotations, "annotations")
        answers = dict(
            convert_rows(
                rows,
                lambda row: (require_id(row, "question_id"), answer_texts(row.get("answers"))),
                where.annotations,
                on_bad_row,
            )
        )

    def convert(row: Row, subset: str | None) -> VisualQuestion:
        number = require_id(row, "question_id")
        found = _answers_of(number, answers, where)
        if subset is None:
            text, name = require_field(row, "text"), require_field(row, "image")
            return vqav2(number, bare_question(text), image_file(where, name), found, _number_at_end(name), text)
        question, image_id = require_field(row, "question"), row.get("image_id")
        if not isinstance(image_id, int) or isinstance(image_id, bool):
            raise ValueError(f"field 'image_id' must be a number, found {image_id!r:.80}")
        return vqav2(number, question, image_file(where, f"COCO_{subset}_{image_id:012d}.jpg"), found, image_id)

    path = questions_file(where)
    document = read_object(path)
    if document is None:
        return convert_file(path, lambda row: convert(row, None), on_bad_row)
    subset = document.get("data_subtype", "val2014")
    if not isinstance(subset, str):
        raise ValueError(f"{path}: field 'data_subtype' must be text, such as 'val2014', found {subset!r:.80}")
    # test-dev is a part of the test images
    subset = "test2015" if subset.startswith("test") else subset
    return convert_rows(_records(path, "questions"), lambda row: convert(row, subset), path, on_bad_row)


def read_gqa(where: EvaluationSet, on_bad_row: OnBadRow) -> list[VisualQuestion]:
    """GQA from LLaVA's JSONL or the official questions, which hold the answers."""
    answers: dict[Any, Any] = {}
    if where.annotations:
        rows = _rows_by_id(where.annotations)
        answers = dict(
            convert_rows(rows, lambda row: (row["question_id"], _answer(row)), where.annotations, on_bad_row)
        )

    def convert(row: Row) -> VisualQuestion:
        number = str(require_id(row, "question_id"))
        if "text" in row:
            text, image = require_field(row, "text"), image_file(where, require_field(row, "image"))
            return gqa(number, bare_question(text), image, _answers_of(number, answers, where), text)
        image = image_file(where, f"{require_field(row, 'imageId')}.jpg")
        return gqa(number, require_field(row, "question"), image, _answer(row))

    path = questions_file(where)
    if read_object(path) is None:
        return convert_file(path, convert, on_bad_row)
    return convert_rows(_rows_by_id(path), convert, path, on_bad_row)


def _rows_by_id(path: str) -> list[Any]:
    rows = require_object(path).items()
    return [{**row, "question_id": number} if isinstance(row, dict) else row for number, row in rows]


def _answer(row: Row) -> tuple[str, ...]:
    # questions of the test and challenge splits have none
    return (require_field(row, "answer"),) if "answer" in row else ()


def read_vizwiz(where: EvaluationSet, on_bad_row: OnBadRow) -> list[VisualQuestion]:
    """VizWiz from LLaVA's JSONL or the official list, joined on the image, of which each question has its own."""
    answers: dict[Any, Any] = {}
    if where.annotations:
        answers = dict(
            convert_file(
                where.annotations,
                lambda row: (require_field(row, "image"), answer_texts(row.get("answers"))),
                on_bad_row,
            )
        )

    def convert(row: Row) -> VisualQuestion:
        name = require_field(row, "image")
        if "text" in row:
            text = require_field(row, "text")
            found = _answers_of(name, answers, where)
            return vizwiz(
                require_id(row, "question_id"), bare_question(text), image_file(where, name), found, name, text
            )
        question = require_field(row, "question")
        return vizwiz(name, question, image_file(where, name), answer_texts(row.get("answers")), name)

    return convert_file(questions_file(where), convert, on_bad_row)


def read_textvqa(where: EvaluationSet, on_bad_row: OnBadRow) -> list[VisualQuestion]:
    """TextVQA from LLaVA's JSONL or the official file; joined, as LLaVA does, on the image and the question."""
    path = questions_file(where)
    if read_object(path) is not None:
        return _read_official_textvqa(path, where, on_bad_row)
    official: dict[Any, Row] = {}
    if where.annotations:
        rows = _records(where.annotations, "data")
        official = dict(convert_rows(rows, lambda row: (_textvqa_key(row), row), where.annotations, on_bad_row))

    def convert(row: Row) -> VisualQuestion:
        text, name, image_id = (
            require_field(row, "text"),
            require_field(row, "image"),
            str(require_id(row, "question_id")),
        )
        found = {"question": bare_question(text), "question_id": image_id}
        if official:
            key = (image_id, found["question"].lower())
            if key not in official:
                raise ValueError(f"image {image_id} with question {key[1]!r} is not in {where.annotations}")
            found = official[key]
        answers = answer_texts(found.get("answers"))
        text = text if where.ocr_tokens else without_ocr(text)
        return textvqa(
            require_id(found, "question_id"), found["question"], image_file(where, name), answers, image_id, text=text
        )

    return convert_file(path, convert, on_bad_row)


def _read_official_textvqa(path: str, where: EvaluationSet, on_bad_row: OnBadRow) -> list[VisualQuestion]:
    words: dict[str, list[str]] | None = None
    if where.ocr_tokens:
        if where.ocr is None:
            raise ValueError(
                f"{path} does not hold the words read in the images: give ocr (TextVQA_Rosetta_OCR_v0.2_val.json), or "
                "set ocr_tokens: false"
            )
        words = dict(convert_rows(_records(where.ocr, "data"), _ocr_words, where.ocr, on_bad_row))

    def convert(row: Row) -> VisualQuestion:
        image_id, question = require_field(row, "image_id"), require_field(row, "question")
        if words is not None and image_id not in words:
            raise ValueError(f"image {image_id} is not in {where.ocr}")
        tokens = None if words is None else words[image_id]
        image = image_file(where, f"{image_id}.jpg")
        return textvqa(
            require_id(row, "question_id"), question, image, answer_texts(row.get("answers")), image_id, tokens
        )

    return convert_rows(_records(path, "data"), convert, path, on_bad_row)


def _ocr_words(row: Row) -> tuple[str, list[str]]:
    if "ocr_tokens" in row:
        return require_field(row, "image_id"), require_texts(row, "ocr_tokens", least=0)
    found = row.get("ocr_info", [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"field 'ocr_info' must be a list of records with 'word', found {found!r:.80}")
    return require_field(row, "image_id"), [require_field(entry, "word") for entry in found]


def _textvqa_key(row: Row) -> tuple[str, str]:
    return require_field(row, "image_id"), require_field(row, "question").lower()


# what the readers of all sets share


def questions_file(where: EvaluationSet) -> str:
    """The file that asks."""
    assert where.questions is not None, "locate() names it"
    return where.questions


def image_file(where: EvaluationSet, name: str) -> Path:
    """The image file of that name.

    Raises:
        ValueError: There is no such file, or no folder was given.
    """
    if where.images is None:
        raise ValueError(f"image {name!r} is needed, and no folder of images was given (images)")
    path = Path(where.images, name)
    if not os.path.isfile(path):  # a name that no file can have is a missing one too
        raise ValueError(f"image {path}: no such file")
    return path


def read_object(path: str) -> dict[str, Any] | None:
    """The one JSON object that a file holds, or None if it is a list or JSONL.

    Raises:
        ValueError: It is not JSON.
    """
    document = files.read_object(Path(path), "JSON or JSONL")
    # a JSONL file of one row is an object too, and is told by its field
    return None if document is not None and "question_id" in document else document


def require_object(path: str) -> dict[str, Any]:
    """Likewise, for a file that must be one object, and of objects, or the errors that say why one cannot be read.

    Raises:
        ValueError: It is not.
    """
    document = read_object(path)
    if document is None or not all(isinstance(value, dict | ValueError) for value in document.values()):
        raise ValueError(f"{path}: expected a JSON object with one object for each id")
    return document


def _records(path: str, field: str) -> list[Any]:
    document = read_object(path)
    if document is None or not isinstance(document.get(field), list):
        raise ValueError(f"{path}: expected a JSON object with a list {field!r}")
    return document[field]


def _number_at_end(name: str) -> int:
    found = re.search(r"(\d+)\.\w+$", name)
    if found is None:
        raise ValueError(f"field 'image' must end in the number of a COCO image, found {name!r}")
    return int(found[1])


def _answers_of(key: Any, answers: dict[Any, Any], where: EvaluationSet) -> Any:
    if where.annotations is None:
        return ()
    if key not in answers:
        raise ValueError(f"{key!r} has no answer in {where.annotations}")
    return answers[key]
