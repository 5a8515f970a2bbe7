"""The picture shows examples of every kind of question, right ones in green and wrong ones in red."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFont

from dora_lightning.data import Sample
from tasks import VQA
from tasks.picture import _wrap, choose_examples, examples_picture

GREEN, RED = (26, 127, 55), (198, 40, 40)


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "image.png"
    Image.new("RGB", (60, 30), (0, 0, 255)).save(path)
    return str(path)


def record(image: str, text: str, source: str = "mine", question_id: Any = 1, truth: str = "red") -> dict[str, Any]:
    task = VQA()
    row = {"question_id": question_id, "question": "Which colour?", "image_path": image}
    task.update([Sample("...", truth, references=(truth,), source=source, row=row)], [text])
    return task.records()[0]


def pixels(content: bytes | None) -> dict[tuple[int, ...], int]:
    assert content is not None
    picture = Image.open(io.BytesIO(content))
    assert picture.format == "PNG"
    return {colour: count for count, colour in picture.getcolors(picture.width * picture.height) or []}


@pytest.mark.parametrize(("text", "shown", "not_shown"), [("Red", GREEN, RED), ("blue", RED, GREEN), ("", RED, GREEN)])
def test_right_is_green_and_wrong_is_red(
    image: str, text: str, shown: tuple[int, ...], not_shown: tuple[int, ...]
) -> None:
    found = pixels(examples_picture([record(image, text)]))
    assert found[shown] > 50
    assert not_shown not in found
    assert found[(0, 0, 255)] == 238 * 120  # twice as wide as high, scaled to the square, within its frame


def test_hidden_truth_is_neither(image: str) -> None:
    task = VQA()
    row = {"question_id": 1, "question": "Which?", "image_path": image, "image": "image.png"}
    task.update([Sample("...", "", source="vizwiz", row=row)], ["blue"])
    found = pixels(examples_picture(task.records()))
    assert GREEN not in found
    assert RED not in found


def test_ranked_answers_are_shown_too(image: str) -> None:
    task = VQA("ranking")
    row = {"question_id": 1, "question": "Which?", "image_path": image, "choices": ["iron", "wood"], "has_image": True}
    for right in ("A", "B"):
        task.update(
            [Sample("...", right, ("A", "B"), (right,), source="scienceqa", row=row)], scores=[torch.arange(2.0)]
        )
    found = pixels(examples_picture(task.records()))
    assert found[GREEN] > 50
    assert found[RED] > 50


def test_the_same_records_give_the_same_picture_in_any_order(image: str) -> None:
    records = [record(image, text, question_id=number) for number, text in enumerate(["red", "blue", "", "red"] * 5)]
    assert examples_picture(records) == examples_picture(records[::-1])


def test_examples_are_spread_over_kinds_and_questions() -> None:
    records = [{"source": "a", "question_id": n} for n in range(100)] + [{"source": "b", "question_id": "7"}]
    records += [{"source": "c", "question_id": n} for n in range(30)]
    chosen = choose_examples(records, 7)
    assert [(row["source"], row["question_id"]) for row in chosen] == [
        *[("a", 16), ("a", 50), ("a", 83)],
        ("b", "7"),
        *[("c", 5), ("c", 15), ("c", 25)],
    ]
    assert len(choose_examples(records, 1000)) == 131
    assert choose_examples(records, 0) == choose_examples([], 5) == []


def test_the_task_writes_it(image: str) -> None:
    records = [record(image, "red", question_id=number) for number in range(6)]
    files = VQA().files(records)
    assert files.keys() == {"examples.png"}
    assert Image.open(io.BytesIO(files["examples.png"])).width == 4 * (240 + 16) + 16
    assert Image.open(io.BytesIO(VQA(picture=2).files(records)["examples.png"])).width == 2 * (240 + 16) + 16
    assert VQA(picture=0).files(records) == {}


def test_only_images_that_are_files_can_be_shown(image: str, tmp_path: Path) -> None:
    shown = record(image, "red")
    without = {name: value for name, value in shown.items() if name != "image_path"}
    assert examples_picture([without]) is None
    # a file that went away since then costs no submission
    gone = pixels(examples_picture([{**shown, "image_path": str(tmp_path / "gone.png")}]))
    assert gone[GREEN] > 50
    assert (0, 0, 255) not in gone


@pytest.mark.parametrize(
    "text", ["", "word", "many words " * 30, "x" * 300, "a " + "y" * 60 + " z", "naïve Mützen", "\n\n"]
)
def test_text_is_wrapped_into_its_room(text: str) -> None:
    font = ImageFont.load_default(size=17)
    lines = _wrap(text, font, 240, 3)
    assert 1 <= len(lines) <= 3
    assert all(font.getlength(line) <= 240 for line in lines)
    words = " ".join(lines).removesuffix(" ...")
    assert (
        "".join(words.split())
        == "".join(text.replace("ï", "i").replace("ü", "u").split())[: len("".join(words.split()))]
    )
    assert len(lines) == 3 or "..." not in lines[-1]
