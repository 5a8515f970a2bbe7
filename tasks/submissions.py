"""Answers in the files that each benchmark's server, or LLaVA's evaluation script for it, reads.

Layouts are those of LLaVA-1.5 (``docs/Evaluation.md``, ``llava/eval`` and ``scripts/convert_*_for_submission.py`` of
its repository). Every benchmark also gets LLaVA's own answers file, one JSON object a line.
"""

from __future__ import annotations

import importlib.util
import io
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dora_lightning.files import json_bytes, json_lines, json_rows, read_object
from dora_lightning.metrics import normalize_answer
from tasks.vqa_protocols import LETTERS, benchmark_of

Record = dict[str, Any]

BENCHMARKS = ("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mmbench")
"""Benchmarks that have a file of their own."""


def submission_files(
    records: Sequence[Record], vqav2_question_ids: Iterable[Any] | None = None, model_id: str = ""
) -> dict[str, bytes]:
    """Submission files, name -> content, of the benchmarks that the records answer.

    Args:
        records: rows of ``tasks.VQA.records`` of all processes, in any order. Those without a generated text are left
            out. Answers stand in order of their question ids, since POPE's labels are joined by order.
        vqav2_question_ids: all questions that VQAv2's server expects, in its order; unanswered ones get "".
        model_id: what LLaVA's answers files say of the model.

    Raises:
        ValueError: a record lacks what its benchmark's file must hold.
        ModuleNotFoundError: MMBench's file needs openpyxl and it is not installed.
    """
    files: dict[str, bytes] = {}
    answered = sorted((record for record in records if "output_pred" in record), key=_order)
    for benchmark in BENCHMARKS:
        rows = [row for row in answered if benchmark_of(row["source"]) == benchmark]
        if not rows:
            continue
        files[f"{benchmark}_answers.jsonl"] = _llava_answers(rows, model_id)
        if benchmark == "vqav2":
            files["vqav2_submission.json"] = _vqav2(rows, vqav2_question_ids)
        elif benchmark == "scienceqa":
            files |= _scienceqa(rows)
        elif benchmark == "mmbench":
            files["mmbench_submission.xlsx"] = _mmbench(rows)
        elif benchmark in _SHORT:
            files[f"{benchmark}_submission.json"] = json_bytes([_SHORT[benchmark](row) for row in rows])
    return files


def require_openpyxl() -> None:
    """Say at the start of a test, rather than at its end, that MMBench's file could not be written.

    Raises:
        ModuleNotFoundError: openpyxl is not installed.
    """
    if importlib.util.find_spec("openpyxl") is None:
        raise ModuleNotFoundError(
            "MMBench's submission file is an Excel sheet, which needs openpyxl: "
            "install dora-lightning[submissions], or set submissions: false"
        )


def read_question_ids(path: str | Path) -> list[Any]:
    """The question ids of VQAv2's question file (``{"questions": [{"question_id": ...}, ...]}``) or LLaVA's JSON lines.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither, or a question has no id.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no question file at {path}")
    expected = 'one object {"questions": [...]}, or one question a line (JSONL)'
    document = read_object(path, expected)
    if document is None or "question_id" in document:
        return [_question_id(question, f"{path}, {place}") for place, question in json_rows(path, expected)]
    questions = document.get("questions")
    if not isinstance(questions, list):
        raise ValueError(f"{path}: expected {expected}; the object has {', '.join(map(repr, document)) or 'no fields'}")
    return [_question_id(question, f"{path}, question {number}") for number, question in enumerate(questions, 1)]


def _question_id(question: Any, place: str) -> int | str:
    if isinstance(question, ValueError):
        raise ValueError(f"{place}: {question}")
    found = question.get("question_id") if isinstance(question, dict) else None
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise ValueError(f"{place}: expected an object with a number or text in 'question_id', found {question!r:.80}")
    return found


def natural_order(question_id: Any) -> list[Any]:
    """Sorting key that puts 9 before 10, and ``val_9.jpg`` before ``val_10.jpg``.

    >>> sorted([10, 9, "a10", "a9"], key=natural_order)
    [9, 10, 'a9', 'a10']
    """
    # text and number take turns, so that like is compared with like; a number of any length by its digits
    parts = enumerate(re.split(r"0*([0-9]+)", str(question_id)))
    return [(len(part), part) if odd % 2 else part for odd, part in parts]


def file_part(name: str) -> str:
    """A data set's name as a part of a file's.

    >>> file_part("my/photos, easy_vqa_*")
    'my_photos_easy_vqa'
    """
    return re.sub(r"[^\w.-]+", "_", name).strip("_.")


def _order(record: Record) -> tuple[str, list[Any]]:
    return record["source"], natural_order(_field(record, "question_id"))


def _field(record: Record, name: str) -> Any:
    if name not in record:
        raise ValueError(f"{record['source']}: a row has no {name!r}, which its submission file needs: {record}")
    return record[name]


def _processed(record: Record) -> str:
    return normalize_answer(record["output_pred"].strip(), "m4c")


# uploads of the benchmarks that want one object a question
_SHORT: dict[str, Callable[[Record], Record]] = {
    "gqa": lambda row: {
        "questionId": _field(row, "question_id"),
        "prediction": row["output_pred"].strip().rstrip(".").lower(),
    },
    "vizwiz": lambda row: {"image": _field(row, "image"), "answer": _processed(row)},
}


def _llava_answers(rows: Sequence[Record], model_id: str) -> bytes:
    lines = []
    for row in rows:
        # TextVQA's script finds a question by its image and its text
        question_id = _field(row, "image_id" if row["source"] == "textvqa" else "question_id")
        # ScienceQA's script tells questions with an image by the placeholder
        image = "<image>\n" if row.get("has_image") else ""
        line = {
            "question_id": question_id,
            "prompt": image + _asked(row),
            "text": row["output_pred"].strip(),
            # LLaVA draws it at random; the same answers shall give the same file
            "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, f"{row['source']}/{row['question_id']}").hex,
            "model_id": model_id,
            "metadata": {},
        }
        lines.append(line)
    return json_lines(lines)


def _asked(row: Record) -> str:
    """The question as it was put to the model, with what a data set adds to it where its rows tell."""
    return row.get("text", _field(row, "question"))


def _vqav2(rows: Sequence[Record], question_ids: Iterable[Any] | None) -> bytes:
    answers = {row["question_id"]: _processed(row) for row in rows}
    wanted = list(answers if question_ids is None else question_ids)
    return json_bytes([{"question_id": question_id, "answer": answers.get(question_id, "")} for question_id in wanted])


def _scienceqa(rows: Sequence[Record]) -> dict[str, bytes]:
    """``scienceqa_output.json`` and ``scienceqa_result.json`` of LLaVA's ``eval_science_qa.py``."""
    judged: dict[str, list[Record]] = {"correct": [], "incorrect": []}
    indices, outputs = {}, {}
    for row in rows:
        letters = LETTERS[: len(_field(row, "choices"))]
        letter, text = row["pred"], row["output_pred"].strip().replace("\n", ". ")
        indices[row["question_id"]] = letters.index(letter) if letter else -1
        outputs[row["question_id"]] = text
        if row["references"]:
            analysis = {
                "question_id": row["question_id"],
                "parsed_ans": letter or "FAILED",
                "ground_truth": row["references"][0],
                "question": ("<image>\n" if _field(row, "has_image") else "") + _asked(row),
                "pred": text,
                "is_multimodal": row["has_image"],
            }
            judged["correct" if letter == row["references"][0] else "incorrect"].append(analysis)
    correct, count = len(judged["correct"]), len(judged["correct"]) + len(judged["incorrect"])
    result = {
        "acc": 100 * correct / count if count else None,
        "correct": correct,
        "count": count,
        "results": indices,
        "outputs": outputs,
    }
    return {
        "scienceqa_output.json": json_bytes(judged, indent=2),
        "scienceqa_result.json": json_bytes(result, indent=2),
    }


def _mmbench(rows: Sequence[Record]) -> bytes:
    """The sheet of questions as MMBench publishes it, without pictures and categories, with the predictions."""
    require_openpyxl()
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    columns = ["index", "question", "A", "B", "C", "D", "prediction"]
    if any(row["references"] for row in rows):
        columns.append("answer")
    if any("split" in row for row in rows):
        columns.append("split")
    workbook = Workbook()
    sheet = workbook.active
    sheet.append(columns)
    for number, row in enumerate(rows, 2):
        cells = {
            "index": _field(row, "index"),
            "question": _field(row, "question"),
            **_field(row, "options"),
            "prediction": row["output_pred"].strip(),
            "answer": next(iter(row["references"]), None),
            "split": row.get("split"),
        }
        for position, column in enumerate(columns, 1):
            value = cells.get(column)
            if isinstance(value, str):
                cell = sheet.cell(number, position, ILLEGAL_CHARACTERS_RE.sub("", value))
                cell.data_type = "s"  # a text that begins with "=" is no formula
            elif value is not None:
                sheet.cell(number, position, value)
    content = io.BytesIO()
    workbook.save(content)
    return content.getvalue()
