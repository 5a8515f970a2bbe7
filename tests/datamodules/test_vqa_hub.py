import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Pillow

from datamodules.conversation import get_conversation_template
from datamodules.vqa_hub import HubImage, read_hub
from datamodules.vqa_sets import DATASETS, HUB_SETS, EvaluationSet, locate

VICUNA = get_conversation_template("vicuna_v1")
SHORT = "\nAnswer the question using a single word or phrase."
TEN = ["net"] * 9 + ["nets"]


def png(color: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Pillow.new("RGB", (9, 7), color).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


RED, BLUE = png("red"), png("blue")
RECORDS = [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(TEN, 1)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "vqav2": [{"question_id": 5, "question": "Where?", "image_id": 9, "answers": RECORDS, "image": RED}],
    "vizwiz": [{"question_id": "VizWiz_val_00000001", "question": "What?", "answers": TEN, "image": RED}],
    "scienceqa": [
        {"question": "Which?", "choices": ["a", "b", "c"], "answer": 2, "hint": "Look.", "image": None},
        {"question": "Hot?", "choices": ["yes", "no"], "answer": 0, "hint": "", "image": BLUE},
    ],
    "textvqa": [
        {
            "question_id": 7,
            "question": "what brand?",
            "image_id": "0a1b",
            "answers": TEN,
            "ocr_tokens": ["SONY", "5"],
            "image": RED,
        }
    ],
    "pope": [
        {
            "question_id": "1",
            "question": "Is there a cup in the image?",
            "answer": "no",
            "image_source": "COCO_val2014_000000000001",
            "category": "popular",
            "image": RED,
        }
    ],
    "mmbench": [
        {
            "index": "1000007",
            "question": "Which?",
            "hint": "nan",
            "answer": "B",
            "A": "one",
            "B": "two",
            "C": "nan",
            "D": "nan",
            "category": "ocr",
            "l2-category": "perception",
            "image": RED,
        }
    ],
}
# what the hub's cards declare where the rows alone do not tell
FEATURES = {"scienceqa": {"answer": Value("int8"), "choices": Sequence(Value("string"))}}


def save(rows: list[dict[str, Any]], path: Path, features: dict[str, Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = Dataset.from_list([{**row} for row in rows])
    types = {**dataset.features, **(features or {})}
    if "image" in types:
        types["image"] = Image()
    dataset.cast(Features(types)).to_parquet(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], EvaluationSet]:
    """Folders laid out as the hub's repositories, each set with its split in parquet."""
    # else the arrow files that parquet becomes would pile up in the user's cache
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def make(name: str) -> EvaluationSet:
        hub_path, split = HUB_SETS[name]
        config = hub_path.partition(":")[2]
        folder = tmp_path / name
        if name == "gqa":
            questions = [{"id": "20", "imageId": "n2", "question": "Overcast?", "answer": "no"}]
            save(questions, folder / "instructions.parquet")
            save([{"id": "n1", "image": BLUE}, {"id": "n2", "image": RED}], folder / "images.parquet")
            parts = {f"{config}_instructions": "instructions.parquet", f"{config}_images": "images.parquet"}
        else:
            save(ROWS[name], folder / f"{split}.parquet", FEATURES.get(name))
            parts = {config or "default": f"{split}.parquet"}
        card = "---\nconfigs:\n"
        for part, file in parts.items():
            card += f"- config_name: {part}\n  data_files:\n  - split: {split}\n    path: {file}\n"
        (folder / "README.md").write_text(card + "---\n")
        return locate(name, EvaluationSet(hub_path=f"{folder}:{config}" if config else str(folder)), None)

    return make


EXPECTED = {
    "vqav2": ("Where?" + SHORT, tuple(TEN), {"question_id": 5, "image_id": 9}),
    "gqa": ("Overcast?" + SHORT, ("no",), {"question_id": "20"}),
    "vizwiz": (
        "What?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT,
        tuple(TEN),
        {"question_id": "VizWiz_val_00000001", "image": "VizWiz_val_00000001.jpg"},
    ),
    "textvqa": (
        "What brand?\nReference OCR token: SONY, 5" + SHORT,
        tuple(TEN),
        {"question_id": 7, "image_id": "0a1b", "question": "what brand?"},
    ),
    "pope": (
        "Is there a cup in the image?" + SHORT,
        ("no",),
        {"question_id": "1", "category": "popular", "image": "COCO_val2014_000000000001"},
    ),
    "mmbench": (
        "Which?\nA. one\nB. two\nAnswer with the option's letter from the given choices directly.",
        ("B",),
        {
            "index": 1000007,
            "question_id": 1000007,
            "category": "ocr",
            "l2_category": "perception",
            "options": {"A": "one", "B": "two"},
        },
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_layouts_of_the_hub(hub: Callable[[str], EvaluationSet], name: str) -> None:
    text, answers, row = EXPECTED[name]
    (question,) = read_hub(name, hub(name), "raise")
    sample = question.sample(VICUNA)
    assert sample.prompt.endswith(f"USER: <image>\n{text} ASSISTANT:")
    assert sample.references == answers
    assert sample.source == ("pope_popular" if name == "pope" else name)
    assert sample.row is not None
    assert {key: sample.row[key] for key in row} == row
    assert sample.images[0].open().getpixel((0, 0)) == (255, 0, 0)


def test_scienceqa_of_the_hub(hub: Callable[[str], EvaluationSet]) -> None:
    without, with_image = read_hub("scienceqa", hub("scienceqa"), "raise")
    assert without.image is None
    assert without.text == (
        "Context: Look.\nWhich?\nA. a\nB. b\nC. c\nAnswer with the option's letter from the given choices directly."
    )
    assert (without.question_id, without.answers) == (0, ("C",))
    assert without.fields == {"choices": ["a", "b", "c"], "has_image": False}
    assert (with_image.question_id, with_image.answers, with_image.options) == (1, ("A",), ("A", "B"))
    assert with_image.fields["has_image"]
    assert with_image.image.open().getpixel((0, 0)) == (0, 0, 255)


def test_every_set_has_a_layout() -> None:
    assert set(HUB_SETS) == set(DATASETS) == {*EXPECTED, "scienceqa"}


def test_images_stay_encoded_until_they_are_wanted(
    hub: Callable[[str], EvaluationSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = hub("vqav2")
    opened: list[Any] = []
    real = Pillow.open
    monkeypatch.setattr(Pillow, "open", lambda *args, **kwargs: opened.append(args) or real(*args, **kwargs))
    (question,) = read_hub("vqav2", where, "raise")
    assert opened == []
    image = question.image
    assert isinstance(image, HubImage)
    assert str(image) == f"{where.hub_path} (validation), image 1"
    # to a worker and back
    again = pickle.loads(pickle.dumps(image))
    assert again.open().size == (9, 7)
    assert len(opened) == 1


def test_test_splits_without_answers(hub: Callable[[str], EvaluationSet], monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = {"vqav2": {"answers": None}, "textvqa": {"answers": [""] * 10}, "mmbench": {"answer": ""}}
    for name, change in hidden.items():
        monkeypatch.setitem(ROWS, name, [{**ROWS[name][0], **change}])
        (question,) = read_hub(name, hub(name), "raise")
        assert question.answers == ()


def test_pope_split_by_category(hub: Callable[[str], EvaluationSet], monkeypatch: pytest.MonkeyPatch) -> None:
    row = {key: value for key, value in ROWS["pope"][0].items() if key != "category"}
    monkeypatch.setitem(ROWS, "pope", [row])
    monkeypatch.setitem(HUB_SETS, "pope", ("lmms-lab/POPE:Full", "random"))
    (question,) = read_hub("pope", hub("pope"), "raise")
    assert question.source == "pope_random"


def test_rows_that_are_bad(hub: Callable[[str], EvaluationSet], monkeypatch: pytest.MonkeyPatch) -> None:
    good = ROWS["vqav2"][0]
    monkeypatch.setitem(ROWS, "vqav2", [good, {**good, "image": None}])
    with pytest.raises(ValueError, match=r"vqav2 \(validation\), row 2: column 'image' is empty"):
        read_hub("vqav2", hub("vqav2"), "raise")
    monkeypatch.setitem(ROWS, "pope", [{**ROWS["pope"][0], "answer": "maybe"}])
    with pytest.raises(ValueError, match=r"pope \(test\), row 1: the label of POPE must be 'yes' or 'no'"):
        read_hub("pope", hub("pope"), "raise")
    monkeypatch.setitem(ROWS, "textvqa", [{key: ROWS["textvqa"][0][key] for key in ("question_id", "question")}])
    with pytest.raises(ValueError, match=r"textvqa \(validation\): column 'image_id' is missing; it has question_id"):
        read_hub("textvqa", hub("textvqa"), "raise")
