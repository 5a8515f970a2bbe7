import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.conversation import get_conversation_template
from datamodules.vqa_choice_files import read_mmbench, read_pope, read_scienceqa
from datamodules.vqa_sets import EvaluationSet
from dora_lightning.data import Sample

REAL_POPE = Path(__file__).parents[3] / "shared" / "data" / "pope" / "coco_pope_random.json"
VICUNA = get_conversation_template("vicuna_v1")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
)
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def asked(sample: Sample) -> str:
    assert sample.prompt.startswith(SYSTEM)
    assert sample.prompt.endswith(" ASSISTANT:")
    return sample.prompt[len(SYSTEM) : -len(" ASSISTANT:")]


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), color).save(buffer, "PNG")
    return buffer.getvalue()


# ScienceQA


PROBLEMS = {
    "4": {
        "question": "Which is north?",
        "choices": ["Ohio", "Texas", "Utah"],
        "answer": 1,
        "hint": "Look at the map.",
        "image": "image.png",
        "split": "test",
    },
    "5": {"question": "Is it hot?", "choices": ["yes", "no"], "answer": 0, "hint": "", "image": None, "split": "test"},
    "6": {"question": "?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None, "split": "train"},
}


@pytest.fixture
def scienceqa(tmp_path: Path) -> EvaluationSet:
    (tmp_path / "test" / "4").mkdir(parents=True)
    (tmp_path / "test" / "4" / "image.png").write_bytes(png("blue"))
    (tmp_path / "problems.json").write_text(json.dumps(PROBLEMS))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["6"], "test": ["4", "5"]}))
    return EvaluationSet(
        questions=str(tmp_path / "pid_splits.json"),
        annotations=str(tmp_path / "problems.json"),
        images=str(tmp_path / "test"),
    )


def test_scienceqa_from_the_official_files(scienceqa: EvaluationSet, tmp_path: Path) -> None:
    with_image, without = [question.sample(VICUNA) for question in read_scienceqa(scienceqa, "raise")]
    assert asked(with_image) == (
        "<image>\nContext: Look at the map.\nWhich is north?\nA. Ohio\nB. Texas\nC. Utah\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert with_image.options == (" A</s>", " B</s>", " C</s>")
    assert (with_image.target, with_image.references) == (" B</s>", ("B",))
    path = tmp_path / "test" / "4" / "image.png"
    assert with_image.images == (path,)
    assert with_image.row == {
        "question_id": "4",
        "question": "Which is north?",
        "text": asked(with_image).removeprefix("<image>\n"),
        "choices": ["Ohio", "Texas", "Utah"],
        "has_image": True,
        "image_path": str(path),
    }
    assert asked(without) == "Is it hot?\nA. yes\nB. no" + LETTER
    assert (without.images, without.references, without.source) == ((), ("A",), "scienceqa")
    assert without.row is not None
    assert (without.row["has_image"], "image_path" in without.row) == (False, False)
    scienceqa.split = "train"
    assert [question.question_id for question in read_scienceqa(scienceqa, "raise")] == ["6"]
    scienceqa.split = "dev"
    with pytest.raises(ValueError, match=r"pid_splits\.json: no split 'dev'; it has 'train', 'test'"):
        read_scienceqa(scienceqa, "raise")


def test_scienceqa_from_llavas_file(scienceqa: EvaluationSet, tmp_path: Path) -> None:
    text = "Context: Look at the map.\nWhich is north?\nA. Ohio\nB. Texas\nC. Utah"
    answer = {"from": "gpt", "value": "The answer is B."}
    rows = [
        {"id": "4", "image": "4/image.png", "conversations": [{"from": "human", "value": f"{text}\n<image>"}, answer]},
        {"id": "5", "conversations": [{"from": "human", "value": "Is it hot?\nA. yes\nB. no"}, answer]},
    ]
    path = tmp_path / "llava_test_CQM-A.json"
    path.write_text(json.dumps(rows))
    official = read_scienceqa(scienceqa, "raise")
    scienceqa.questions = str(path)
    assert read_scienceqa(scienceqa, "raise") == official
    path.write_text(json.dumps([{**rows[0], "id": "9"}]))
    with pytest.raises(ValueError, match=r"CQM-A\.json, row 1: problem 9 is not in .*problems\.json"):
        read_scienceqa(scienceqa, "raise")
    scienceqa.annotations = None
    with pytest.raises(ValueError, match=r"give annotations \(problems\.json\)"):
        read_scienceqa(scienceqa, "raise")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, "field 'answer' must be the index of one of 3 choices, found 3"),
        ({"answer": "B"}, "field 'answer' must be the index of one of 3 choices, found 'B'"),
        ({"choices": ["a"]}, "field 'choices' must hold 2 to 8 texts"),
        ({"question": " "}, "field 'question' is blank"),
        ({"image": "other.png"}, r"image .*4/other\.png: no such file"),
    ],
)
def test_scienceqa_rows_that_are_bad(
    scienceqa: EvaluationSet, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "problems.json").write_text(json.dumps({**PROBLEMS, "4": {**PROBLEMS["4"], **change}}))
    with pytest.raises(ValueError, match=rf"pid_splits\.json, test, row 1: .*{message}"):
        read_scienceqa(scienceqa, "raise")


# POPE


def pope_row(number: int, label: str = "yes") -> dict[str, Any]:
    name = f"COCO_val2014_{number:012d}.jpg"
    return {"question_id": number, "image": name, "text": f"Is there a cup {number} in the image?", "label": label}


@pytest.fixture
def pope(tmp_path: Path) -> EvaluationSet:
    """Label files of all categories, whose ids repeat, and LLaVA's file, with its own order of categories."""
    (tmp_path / "coco").mkdir()
    for number in (1, 2):
        (tmp_path / f"COCO_val2014_{number:012d}.jpg").write_bytes(png("red"))
    labels = {"random": ("yes", "no"), "popular": ("no", "no"), "adversarial": ("yes", "yes")}
    for category, pair in labels.items():
        lines(tmp_path / "coco" / f"coco_pope_{category}.json", [pope_row(n, x) for n, x in enumerate(pair, 1)])
    questions = [
        {
            "question_id": 10 * place + n,
            "image": pope_row(n)["image"],
            "text": pope_row(n)["text"] + SHORT,
            "category": category,
        }
        for place, category in enumerate(("adversarial", "popular", "random"))
        for n in (1, 2)
    ]
    return EvaluationSet(
        questions=lines(tmp_path / "llava_pope_test.jsonl", questions),
        annotations=str(tmp_path / "coco"),
        images=str(tmp_path),
    )


def test_pope_is_joined_by_order_in_each_category(pope: EvaluationSet, tmp_path: Path) -> None:
    samples = [question.sample(VICUNA) for question in read_pope(pope, "raise")]
    assert [(sample.source, *sample.references) for sample in samples] == [
        ("pope_adversarial", "yes"),
        ("pope_adversarial", "yes"),
        ("pope_popular", "no"),
        ("pope_popular", "no"),
        ("pope_random", "yes"),
        ("pope_random", "no"),
    ]
    assert [sample.row["question_id"] for sample in samples if sample.row] == [1, 2, 11, 12, 21, 22]
    last = samples[-1]
    assert asked(last) == (
        "<image>\nIs there a cup 2 in the image?\nAnswer the question using a single word or phrase."
    )
    assert (last.target, last.options) == (" No</s>", (" Yes</s>", " No</s>"))
    assert last.row == {
        "question_id": 22,
        "question": "Is there a cup 2 in the image?",
        "text": "Is there a cup 2 in the image?" + SHORT,
        "image": "COCO_val2014_000000000002.jpg",
        "category": "random",
        "image_path": str(tmp_path / "COCO_val2014_000000000002.jpg"),
    }


def test_pope_from_the_label_files_alone(pope: EvaluationSet) -> None:
    joined = {(question.source, question.question): question for question in read_pope(pope, "raise")}
    folder, pope.questions, pope.annotations = Path(str(pope.annotations)), pope.annotations, None
    alone = read_pope(pope, "raise")
    assert [question.source.removeprefix("pope_") for question in alone] == [
        *["random"] * 2, *["popular"] * 2, *["adversarial"] * 2,
    ]  # fmt: skip
    for question in alone:
        twin = joined[question.source, question.question]
        assert (question.text, question.answers, question.image) == (twin.text, twin.answers, twin.image)
    pope.questions = str(folder / "coco_pope_popular.json")
    assert [question.answers for question in read_pope(pope, "raise")] == [("no",), ("no",)]


def test_pope_files_that_do_not_belong_together(pope: EvaluationSet, tmp_path: Path) -> None:
    labels = tmp_path / "coco" / "coco_pope_popular.json"
    lines(labels, [pope_row(2), pope_row(1)])
    with pytest.raises(ValueError, match=r"line 3: question 1 of category 'popular' is about COCO_val2014_0+1\.jpg"):
        read_pope(pope, "raise")
    lines(labels, [pope_row(1)])
    with pytest.raises(ValueError, match=r"line 4: there are only 1 labels of category 'popular'"):
        read_pope(pope, "raise")
    lines(labels, [pope_row(1), pope_row(2), pope_row(3)])
    with pytest.raises(ValueError, match=r"2 questions of category 'popular', but 3 labels"):
        read_pope(pope, "raise")
    lines(labels, [pope_row(1, "maybe"), pope_row(2)])
    with pytest.raises(ValueError, match=r"line 3: the label of POPE must be 'yes' or 'no', found 'maybe'"):
        read_pope(pope, "raise")
    # a question that is skipped takes its label with it
    with pytest.warns(UserWarning, match="1 of 6 rows were skipped"):
        questions = read_pope(pope, "skip")
    assert [question.question for question in questions if question.source == "pope_popular"] == [
        "Is there a cup 2 in the image?"
    ]
    labels.unlink()
    with pytest.raises(ValueError, match=r"no labels of category 'popular': no \*_pope_popular\.json in"):
        read_pope(pope, "raise")
    pope.annotations = None
    with pytest.raises(ValueError, match="holds no labels; give annotations"):
        read_pope(pope, "raise")


def test_pope_without_label_files(pope: EvaluationSet, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    pope.annotations = str(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"no file named \*_pope_<category>\.json, of random, popular"):
        read_pope(pope, "raise")


def test_pope_that_is_published(tmp_path: Path) -> None:
    if not REAL_POPE.is_file():
        pytest.skip(f"the label file is not at {REAL_POPE}")
    rows = [json.loads(line) for line in REAL_POPE.read_text().splitlines()]
    for name in {row["image"] for row in rows}:
        (tmp_path / name).touch()
    questions = read_pope(EvaluationSet(questions=str(REAL_POPE), images=str(tmp_path)), "raise")
    assert len(questions) == 3000
    assert [question.question_id for question in questions] == list(range(1, 3001))
    assert questions[0].text == "Is there a snowboard in the image?" + SHORT
    # POPE asks about as many objects that are there as are not
    assert sum(question.answers == ("yes",) for question in questions) == 1500


# MMBench

COLUMNS = [
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "split",
]


def mmbench_row(index: int, image: str, **change: str) -> dict[str, str]:
    row = {
        "index": str(index),
        "question": "Which is right?",
        "hint": "Read.\tThis",
        "A": 'the "first"',
        "B": "two\nlines",
        "answer": "B",
        "category": "ocr",
        "image": image,
        "l2-category": "finegrained_perception",
        "split": "dev",
    }
    return {**dict.fromkeys(COLUMNS, ""), **row, **change}


def table(path: Path, rows: list[dict[str, str]]) -> EvaluationSet:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return EvaluationSet(questions=str(path))


def test_mmbench_keeps_rotations_as_rows(tmp_path: Path) -> None:
    encoded = base64.b64encode(png("red")).decode()
    where = table(
        tmp_path / "dev.tsv",
        [
            mmbench_row(7, encoded, hint=""),
            mmbench_row(1_000_007, "7", A="two\nlines", B='the "first"', answer="A"),
            mmbench_row(8, encoded, C="nan", D="four", answer=""),
        ],
    )
    samples = [question.sample(VICUNA) for question in read_mmbench(where, "raise")]
    assert asked(samples[0]) == (
        '<image>\nWhich is right?\nA. the "first"\nB. two\nlines\n'
        "Answer with the option's letter from the given choices directly."
    )
    assert asked(samples[1]) == ('<image>\nRead.\tThis\nWhich is right?\nA. two\nlines\nB. the "first"' + LETTER)
    assert [sample.references for sample in samples] == [("B",), ("A",), ()]
    assert [sample.target for sample in samples] == [" B</s>", " A</s>", ""]
    assert all(sample.options == (" A</s>", " B</s>") for sample in samples)
    assert samples[1].row == {
        "question_id": 1_000_007,
        "question": "Which is right?",
        "text": asked(samples[1]).removeprefix("<image>\n"),
        "index": 1_000_007,
        "category": "ocr",
        "l2_category": "finegrained_perception",
        "options": {"A": "two\nlines", "B": 'the "first"'},
        "split": "dev",
    }
    for sample in samples:
        image = sample.images[0]
        assert image.open().getpixel((0, 0)) == (255, 0, 0)
        assert str(image).endswith(f"dev.tsv, index {sample.row and sample.row['index']}")


def test_mmbench_with_a_large_image(tmp_path: Path) -> None:
    noise = Image.effect_noise((500, 400), 90)
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    assert len(encoded) > 131072  # what a field of the csv module may have
    csv.field_size_limit(131072)
    (question,) = read_mmbench(table(tmp_path / "dev.tsv", [mmbench_row(1, encoded)]), "raise")
    assert question.image.open().size == (500, 400)
    assert csv.field_size_limit() == 131072


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": "one"}, "column 'index' must be a number, found 'one'"),
        ({"question": ""}, "column 'question' is empty at index 1"),
        ({"B": "nan"}, r"columns 'A' and 'B' must hold options, found \['the \"first\"'\] at index 1"),
        ({"answer": "C"}, "column 'answer' must be one of A/B, found 'C' at index 1"),
        ({"image": ""}, "column 'image' is empty at index 1"),
    ],
)
def test_mmbench_rows_that_are_bad(tmp_path: Path, change: dict[str, str], message: str) -> None:
    where = table(tmp_path / "dev.tsv", [{**mmbench_row(1, "aaaa"), **change}])
    with pytest.raises(ValueError, match=rf"dev\.tsv, row 1: {message}"):
        read_mmbench(where, "raise")


def test_mmbench_tables_that_are_bad(tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text("index\tquestion\tA\tB\n1\tx\ta\tb\n")
    with pytest.raises(ValueError, match=r"dev\.tsv: column 'image' is missing; the table has \['index', 'question'"):
        read_mmbench(EvaluationSet(questions=str(path)), "raise")
    (question,) = read_mmbench(table(path, [mmbench_row(1, "not base64!")]), "raise")
    with pytest.raises(ValueError, match=r"dev\.tsv, index 1: not base64"):
        question.image.open()
