import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.conversation import get_conversation_template
from datamodules.vqa_files import read_gqa, read_textvqa, read_vizwiz, read_vqav2
from datamodules.vqa_sets import EvaluationSet
from dora_lightning.data import Sample

VICUNA = get_conversation_template("vicuna_v1")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: <image>\n"
)
SHORT = "\nAnswer the question using a single word or phrase."
TEN = ["net", "net", "the net", "net", "nets", "net", "net", "net", "net", "net"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (
        "COCO_val2014_000000262148.jpg",
        "COCO_test2015_000000262144.jpg",
        "n161313.jpg",
        "VizWiz_val_00000000.jpg",
        "0a1b2c.jpg",
    ):
        Image.new("RGB", (8, 6), (10, 200, 30)).save(folder / name)
    return folder


def write(path: Path, content: Any) -> str:
    """JSONL for a list of rows given as a tuple, else JSON."""
    lines = "\n".join(map(json.dumps, content)) + "\n" if isinstance(content, tuple) else json.dumps(content)
    path.write_text(lines, encoding="utf-8")
    return str(path)


def asked(sample: Sample) -> str:
    assert sample.prompt.startswith(SYSTEM)
    assert sample.prompt.endswith(" ASSISTANT:")
    return sample.prompt[len(SYSTEM) : -len(" ASSISTANT:")]


def annotations(answers: list[str]) -> dict[str, Any]:
    records = [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(answers, 1)]
    row = {"question_id": 262148000, "image_id": 262148, "answers": records, "multiple_choice_answer": "net"}
    return {"info": {}, "data_subtype": "val2014", "annotations": [row]}


QUESTION = {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}


def test_vqav2_from_the_official_files(tmp_path: Path, images: Path) -> None:
    where = EvaluationSet(
        questions=write(tmp_path / "q.json", {"data_subtype": "val2014", "questions": [QUESTION]}),
        annotations=write(tmp_path / "a.json", annotations(TEN)),
        images=str(images),
    )
    (question,) = read_vqav2(where, "raise")
    sample = question.sample(VICUNA)
    assert sample.prompt == SYSTEM + "Where is he looking?" + SHORT + " ASSISTANT:"
    assert sample.target == " net</s>"
    assert (sample.source, sample.options, sample.references) == ("vqav2", (), tuple(TEN))
    path = images / "COCO_val2014_000000262148.jpg"
    assert sample.images == (path,)
    assert sample.row == {
        "question_id": 262148000,
        "question": "Where is he looking?",
        "text": "Where is he looking?" + SHORT,
        "image_id": 262148,
        "image_path": str(path),
    }


def test_vqav2_without_answers_is_for_submission(tmp_path: Path, images: Path) -> None:
    question = {**QUESTION, "image_id": 262144}
    official = write(tmp_path / "q.json", {"data_subtype": "test-dev2015", "questions": [question]})
    llava = write(
        tmp_path / "llava.jsonl",
        (
            {
                "question_id": 262148000,
                "image": "COCO_test2015_000000262144.jpg",
                "text": "Where is he looking?" + SHORT,
                "category": "default",
            },
        ),
    )
    (first,) = read_vqav2(EvaluationSet(questions=official, images=str(images)), "raise")
    (second,) = read_vqav2(EvaluationSet(questions=llava, images=str(images)), "raise")
    assert first == second
    sample = first.sample(VICUNA)
    assert (sample.target, sample.references) == ("", ())
    assert asked(sample) == "Where is he looking?" + SHORT
    assert sample.row is not None
    assert sample.row["image_path"].endswith("COCO_test2015_000000262144.jpg")


def test_vqav2_rows_that_are_bad(tmp_path: Path, images: Path) -> None:
    rows = [QUESTION, {**QUESTION, "question_id": 5}, {**QUESTION, "image_id": 7}, {"question": "Why?"}]
    where = EvaluationSet(
        questions=write(tmp_path / "q.json", {"data_subtype": "val2014", "questions": rows}),
        annotations=write(tmp_path / "a.json", annotations(TEN)),
        images=str(images),
    )
    with pytest.raises(ValueError, match=r"q\.json, row 2: 5 has no answer in .*a\.json"):
        read_vqav2(where, "raise")
    with pytest.warns(UserWarning, match=r"q\.json: 3 of 4 rows were skipped"):
        assert len(read_vqav2(where, "skip")) == 1
    write(tmp_path / "q.json", {"data_subtype": "val2014", "questions": [{**QUESTION, "image_id": 7}]})
    with pytest.raises(ValueError, match=r"q\.json, row 1: image .*COCO_val2014_000000000007\.jpg: no such file"):
        read_vqav2(where, "raise")
    write(tmp_path / "q.json", {"data_subtype": "val2014", "questions": [{"question": "Why?"}]})
    with pytest.raises(ValueError, match=r"row 1: field 'question_id' must be a number or text, found None"):
        read_vqav2(where, "raise")


def test_gqa_from_both_files(tmp_path: Path, images: Path) -> None:
    official = write(
        tmp_path / "testdev_balanced_questions.json",
        {"201307251": {"imageId": "n161313", "question": "Is it overcast?", "answer": "no", "fullAnswer": "No."}},
    )
    llava = write(
        tmp_path / "llava.jsonl",
        ({"question_id": "201307251", "image": "n161313.jpg", "text": "Is it overcast?" + SHORT, "category": "x"},),
    )
    (alone,) = read_gqa(EvaluationSet(questions=official, images=str(images)), "raise")
    (joined,) = read_gqa(EvaluationSet(questions=llava, annotations=official, images=str(images)), "raise")
    assert alone == joined
    sample = alone.sample(VICUNA)
    assert asked(sample) == "Is it overcast?" + SHORT
    assert (sample.source, sample.references, sample.target) == ("gqa", ("no",), " no</s>")
    assert sample.row is not None
    assert (sample.row["question_id"], sample.row["question"]) == ("201307251", "Is it overcast?")
    (hidden,) = read_gqa(EvaluationSet(questions=llava, images=str(images)), "raise")
    assert hidden.answers == ()
    write(tmp_path / "testdev_balanced_questions.json", {"7": {"imageId": "n161313", "question": "Why?", "answer": 3}})
    with pytest.raises(ValueError, match=r"questions\.json, row 1: field 'answer' must be text, found int: 3"):
        read_gqa(EvaluationSet(questions=official, images=str(images)), "raise")
    write(tmp_path / "testdev_balanced_questions.json", {"7": "Why?"})
    with pytest.raises(ValueError, match=r"questions\.json: expected a JSON object with one object for each id"):
        read_gqa(EvaluationSet(questions=official, images=str(images)), "raise")


def test_vizwiz_from_both_files(tmp_path: Path, images: Path) -> None:
    name = "VizWiz_val_00000000.jpg"
    row = {"image": name, "question": "What is this?", "answers": [{"answer": text} for text in TEN], "answerable": 1}
    official = write(tmp_path / "val.json", [row])
    suffix = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
    llava = write(tmp_path / "l.jsonl", ({"question_id": name, "image": name, "text": "What is this?" + suffix},))
    (alone,) = read_vizwiz(EvaluationSet(questions=official, images=str(images)), "raise")
    (joined,) = read_vizwiz(EvaluationSet(questions=llava, annotations=official, images=str(images)), "raise")
    assert alone == joined
    sample = alone.sample(VICUNA)
    assert asked(sample) == (
        "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    )
    assert (sample.source, sample.references) == ("vizwiz", tuple(TEN))
    assert sample.row is not None
    assert (sample.row["question"], sample.row["image"]) == ("What is this?", name)
    hidden = write(tmp_path / "test.json", [{"image": name, "question": "What is this?"}])
    assert read_vizwiz(EvaluationSet(questions=hidden, images=str(images)), "raise")[0].answers == ()


TEXTVQA = {"image_id": "0a1b2c", "question_id": 34602, "question": "what is the brand of this TV?", "answers": TEN}
PROMPT = (
    "What is the brand of this tv?\nReference OCR token: SONY, Mar 1, 5\n"
    "Answer the question using a single word or phrase."
)


def test_textvqa_from_the_official_files(tmp_path: Path, images: Path) -> None:
    where = EvaluationSet(
        questions=write(tmp_path / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [TEXTVQA]}),
        ocr=write(
            tmp_path / "ocr.json",
            {"data": [{"image_id": "0a1b2c", "ocr_info": [{"word": word} for word in ("SONY", "Mar 1", "5")]}]},
        ),
        images=str(images),
    )
    (question,) = read_textvqa(where, "raise")
    sample = question.sample(VICUNA)
    assert asked(sample) == PROMPT
    assert (sample.source, sample.references, sample.target) == ("textvqa", tuple(TEN), " net</s>")
    assert sample.row is not None
    assert sample.row["question"] == "what is the brand of this TV?"
    assert (sample.row["image_id"], sample.row["question_id"]) == ("0a1b2c", 34602)
    where.ocr_tokens = False
    (question,) = read_textvqa(where, "raise")
    assert question.text == "What is the brand of this tv?" + SHORT
    where.ocr_tokens, where.ocr = True, None
    with pytest.raises(ValueError, match=r"give ocr \(TextVQA_Rosetta_OCR_v0.2_val.json\), or set ocr_tokens: false"):
        read_textvqa(where, "raise")


def test_textvqa_from_llavas_file(tmp_path: Path, images: Path) -> None:
    row = {"question_id": "0a1b2c", "image": "0a1b2c.jpg", "text": PROMPT, "category": "default"}
    where = EvaluationSet(
        questions=write(tmp_path / "l.jsonl", (row,)),
        annotations=write(tmp_path / "TextVQA_0.5.1_val.json", {"data": [TEXTVQA]}),
        images=str(images),
    )
    (question,) = read_textvqa(where, "raise")
    assert (question.text, question.answers, question.question_id) == (PROMPT, tuple(TEN), 34602)
    assert question.question == "what is the brand of this TV?"
    where.ocr_tokens = False
    assert read_textvqa(where, "raise")[0].text == "What is the brand of this tv?" + SHORT
    write(tmp_path / "l.jsonl", ({**row, "text": "Who is it?" + SHORT},))
    with pytest.raises(ValueError, match=r"l\.jsonl, line 1: image 0a1b2c with question 'who is it\?' is not in"):
        read_textvqa(where, "raise")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"q\.json: broken JSON at line 1, column 2"),
        ('{"data_subtype": "val2014"}', r"q\.json: expected a JSON object with a list 'questions'"),
        ("", r"q\.json: the file is empty"),
    ],
)
def test_files_that_are_broken(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "q.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_vqav2(EvaluationSet(questions=str(path), images=str(tmp_path)), "raise")


def test_answers_in_another_form(tmp_path: Path, images: Path) -> None:
    row = {"image": "VizWiz_val_00000000.jpg", "question": "What?", "answers": "net"}
    path = write(tmp_path / "val.json", [row])
    with pytest.raises(ValueError, match=r"val\.json, row 1: field 'answers' must be a list of texts or of records"):
        read_vizwiz(EvaluationSet(questions=path, images=str(images)), "raise")
