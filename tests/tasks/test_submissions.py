"""Each benchmark's file, byte for byte where it is text and cell for cell where it is a sheet."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from dora_lightning.data import Sample
from tasks import VQA
from tasks.submissions import natural_order, read_question_ids, submission_files

SUFFIX = "\nAnswer the question using a single word or phrase."


def record(source: str, question_id: Any, text: str, *references: str, **row: Any) -> dict[str, Any]:
    """As the task makes it."""
    task = VQA(submissions=False)
    asked = {"question_id": question_id, "question": "What?", "text": f"What?{SUFFIX}", **row}
    task.update([Sample("USER: ...", "", references=references, source=source, row=asked)], [text])
    return task.records()[0]


def answers(content: bytes) -> list[dict[str, Any]]:
    assert content.endswith(b"\n")
    return [json.loads(line) for line in content.decode().splitlines()]


def test_vqav2_answers_the_questions_of_the_records() -> None:
    files = submission_files([record("vqav2", 12, " Two dogs.\n"), record("vqav2", 9, "Mike's")])
    assert files.keys() == {"vqav2_answers.jsonl", "vqav2_submission.json"}
    assert files["vqav2_submission.json"] == (
        b'[{"question_id": 9, "answer": "mike \'s"}, {"question_id": 12, "answer": "2 dogs"}]'
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("questions.json", '{"questions": [{"question_id": 12}, {"question_id": 5}, {"question_id": 9}]}'),
        ("llava.jsonl", '{"question_id": 12}\n{"question_id": 5}\n\n{"question_id": 9}\n'),
    ],
)
def test_vqav2_answers_all_questions_of_its_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    task = VQA(vqav2_questions=str(tmp_path / name))
    files = task.files([record("vqav2", 9, "yes"), record("vqav2", 12, "no")])
    assert json.loads(files["vqav2_submission.json"]) == [
        {"question_id": 12, "answer": "no"},
        {"question_id": 5, "answer": ""},
        {"question_id": 9, "answer": "yes"},
    ]


def test_gqa() -> None:
    files = submission_files([record("gqa", "20", "Left."), record("gqa", "3", " A man's hat ")])
    assert files["gqa_submission.json"] == (
        b'[{"questionId": "3", "prediction": "a man\'s hat"}, {"questionId": "20", "prediction": "left"}]'
    )


def test_vizwiz() -> None:
    files = submission_files([record("vizwiz", "VizWiz_test_00000001.jpg", "Unanswerable", image="1.jpg")])
    assert files["vizwiz_submission.json"] == b'[{"image": "1.jpg", "answer": "unanswerable"}]'


def test_llavas_answers_file_is_the_same_each_time() -> None:
    rows = [record("gqa", "20", " Left.\n"), record("gqa", "3", "right")]
    content = submission_files(rows, model_id="dora")["gqa_answers.jsonl"]
    assert content == submission_files(rows[::-1], model_id="dora")["gqa_answers.jsonl"]
    lines = answers(content)
    assert [list(line) for line in lines] == [
        ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    ] * 2
    assert len({line.pop("answer_id") for line in lines}) == 2
    assert lines == [
        {"question_id": "3", "prompt": f"What?{SUFFIX}", "text": "right", "model_id": "dora", "metadata": {}},
        {"question_id": "20", "prompt": f"What?{SUFFIX}", "text": "Left.", "model_id": "dora", "metadata": {}},
    ]


def test_textvqa_is_found_by_its_image() -> None:
    files = submission_files([record("textvqa", 34602, "nokia", image_id="0054c91397f2fe05")])
    assert files.keys() == {"textvqa_answers.jsonl"}
    assert answers(files["textvqa_answers.jsonl"])[0]["question_id"] == "0054c91397f2fe05"


def test_popes_answers_stand_in_the_order_of_the_labels() -> None:
    rows = [record(f"pope_{split}", number, "No", "no") for split in ("random", "adversarial") for number in (10, 9, 1)]
    files = submission_files(rows)
    assert files.keys() == {"pope_answers.jsonl"}
    assert [line["question_id"] for line in answers(files["pope_answers.jsonl"])] == [1, 9, 10, 1, 9, 10]


def test_scienceqa() -> None:
    choices = {"choices": ["iron", "wood"]}
    rows = [
        record("scienceqa", "4", "B", "B", has_image=True, **choices),
        record("scienceqa", "11", "wood\nof course", "B", has_image=False, **choices),
        record("scienceqa", "5", "A. iron", "B", has_image=True, **choices),
    ]
    files = submission_files(rows)
    assert files.keys() == {"scienceqa_answers.jsonl", "scienceqa_output.json", "scienceqa_result.json"}
    prompts = [line["prompt"] for line in answers(files["scienceqa_answers.jsonl"])]
    assert prompts == [f"<image>\nWhat?{SUFFIX}", f"<image>\nWhat?{SUFFIX}", f"What?{SUFFIX}"]
    assert json.loads(files["scienceqa_result.json"]) == {
        "acc": pytest.approx(100 / 3),
        "correct": 1,
        "count": 3,
        "results": {"4": 1, "5": 0, "11": -1},
        "outputs": {"4": "B", "5": "A. iron", "11": "wood. of course"},
    }
    assert json.loads(files["scienceqa_output.json"]) == {
        "correct": [
            {
                "question_id": "4",
                "parsed_ans": "B",
                "ground_truth": "B",
                "question": f"<image>\nWhat?{SUFFIX}",
                "pred": "B",
                "is_multimodal": True,
            }
        ],
        "incorrect": [
            {
                "question_id": "5",
                "parsed_ans": "A",
                "ground_truth": "B",
                "question": f"<image>\nWhat?{SUFFIX}",
                "pred": "A. iron",
                "is_multimodal": True,
            },
            {
                "question_id": "11",
                "parsed_ans": "FAILED",
                "ground_truth": "B",
                "question": f"What?{SUFFIX}",
                "pred": "wood. of course",
                "is_multimodal": False,
            },
        ],
    }


def cells(content: bytes) -> tuple[list[Any], set[str]]:
    openpyxl = pytest.importorskip("openpyxl")
    sheet = openpyxl.load_workbook(io.BytesIO(content)).active
    return [list(row) for row in sheet.iter_rows(values_only=True)], {c.data_type for row in sheet for c in row}


def mmbench(index: int, text: str, *references: str, **row: Any) -> dict[str, Any]:
    row = {"index": index, "category": "maps", "l2_category": "logic", "options": {"A": "=1+1", "B": "3"}, **row}
    return record("mmbench", index, text, *references, **row)


def test_mmbench() -> None:
    files = submission_files(
        [mmbench(1_000_007, "a\x07b", "B"), mmbench(7, " =2+2\n", "A", options={"A": "x", "B": "y"})]
    )
    rows, types = cells(files["mmbench_submission.xlsx"])
    assert rows == [
        ["index", "question", "A", "B", "C", "D", "prediction", "answer"],
        [7, "What?", "x", "y", None, None, "=2+2", "A"],
        [1_000_007, "What?", "=1+1", "3", None, None, "ab", "B"],  # a sheet cannot hold the bell
    ]
    assert "f" not in types  # no text became a formula
    assert [line["text"] for line in answers(files["mmbench_answers.jsonl"])] == ["=2+2", "a\x07b"]


def test_mmbench_with_hidden_answers_and_a_split() -> None:
    rows, _ = cells(submission_files([mmbench(7, "A", split="test")])["mmbench_submission.xlsx"])
    assert rows[0] == ["index", "question", "A", "B", "C", "D", "prediction", "split"]
    assert rows[1] == [7, "What?", "=1+1", "3", None, None, "A", "test"]


def test_what_has_no_server_has_no_file() -> None:
    assert submission_files([record("easy_vqa_shape", 1, "circle", "circle"), record("mine", 1, "a", "a")]) == {}
    assert submission_files([{"source": "gqa", "question_id": 1, "ranked": "left"}]) == {}
    assert VQA(submissions=False).files([record("gqa", 1, "left")]) == {}


def test_a_row_that_lacks_a_field_is_named() -> None:
    with pytest.raises(ValueError, match="vizwiz: a row has no 'image', which its submission file needs"):
        submission_files([record("vizwiz", 1, "red")])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.json", '{"data": [1]}', r'q\.json: expected one object \{"questions": \[...\]\}.*has \'data\''),
        ("q.json", '{"questions": [{"question_id": 1}, {"id": 2}]}', r"q\.json, question 2: expected .* 'question_id'"),
        ("q.json", "{", r"q\.json: broken JSON at line 1, column 2"),
        ("q.jsonl", '{"question_id": 1}\n{"id": 2}', r"q\.jsonl, line 2: expected .*'question_id', found \{'id': 2\}"),
        ("q.jsonl", '{"question_id": 1}\n{"question_id": [2]}', r"q\.jsonl, line 2: expected .*found \{'question_id'"),
    ],
)
def test_broken_question_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        VQA(vqav2_questions=str(tmp_path / name))


def test_a_line_separator_inside_a_question_ends_no_line(tmp_path: Path) -> None:
    rows = [{"question_id": number, "text": "what\u2028is\x85it"} for number in range(3)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    assert read_question_ids(tmp_path / "q.jsonl") == [0, 1, 2]


def test_ids_of_many_digits_are_ordered_too() -> None:
    long = "9" * 5000
    assert sorted([long, "10", "09", "9a"], key=natural_order) == ["09", "9a", "10", long]


def test_a_missing_question_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no question file at .*none\.json"):
        read_question_ids(tmp_path / "none.json")


def test_numbers_in_names_are_ordered_as_numbers() -> None:
    names = ["VizWiz_val_10.jpg", "VizWiz_val_9.jpg", "b", "10", "9"]
    assert sorted(names, key=natural_order) == ["9", "10", "VizWiz_val_9.jpg", "VizWiz_val_10.jpg", "b"]
