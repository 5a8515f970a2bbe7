from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from datamodules.conversation import get_conversation_template
from datamodules.easy_vqa import EasyVQADataModule
from datamodules.vl_bart.easy_vqa_rows import read_easy_vqa
from datamodules.vl_bart.records import Asked

easy_vqa = pytest.importorskip("easy_vqa")


def asked(rows: list[Asked]) -> list[tuple[str, str, int]]:
    """Question, answer and image of each row, as the package lists them."""
    return [(row.row["question"], row.answers[0][0], int(Path(row.visuals[0]).stem)) for row in rows]


def published(split: str) -> list[tuple[str, str, int]]:
    texts, answers, images = getattr(easy_vqa, f"get_{split}_questions")()
    return list(zip(texts, answers, images, strict=True))


def test_test_questions() -> None:
    rows = read_easy_vqa("test")
    assert asked(rows) == published("test")
    path = easy_vqa.get_test_image_paths()[0]
    assert rows[0] == Asked(
        source="easy_vqa_shape",
        visuals=(path,),
        before="vqa: what is the red shape?",
        answers=(("triangle", 1.0),),
        weighted=False,
        mean_by_sample=True,
        references=("triangle",),
        options=tuple(rows[0].options),
        row={"question_id": 0, "question": "what is the red shape?", "image_id": 0, "image_path": path},
    )
    assert sorted(rows[0].options) == sorted(easy_vqa.get_answers())
    # counted in the package's file
    kinds = {"easy_vqa_shape": 1257, "easy_vqa_color": 1280, "easy_vqa_yes_no": 7136}
    assert Counter(row.source for row in rows) == kinds
    alone = read_easy_vqa("test", test_size=20, options_of_kind=True, prompt="")
    assert len(alone) == 20
    assert {len(row.options) for row in alone} == {2, 3, 8}
    assert all(row.references[0] in row.options and row.before == row.row["question"] for row in alone)


def test_training_questions_are_of_one_source() -> None:
    rows = read_easy_vqa("train", val_images=0)
    assert sorted(asked(rows)) == sorted(published("train"))
    assert {row.source for row in rows} == {"easy_vqa"}
    assert not any(row.references for row in rows)
    few = read_easy_vqa("train", train_images=50, questions_per_image=3)
    assert max(Counter(image for *_, image in asked(few)).values()) == 3
    assert len({image for *_, image in asked(few)}) == 50


def test_validation_images_are_never_trained_on() -> None:
    options: dict[str, Any] = {"val_images": 300, "val_size": 200, "train_images": 1000, "seed": 7}
    train, validation = read_easy_vqa("train", **options), read_easy_vqa("validate", **options)
    assert len(validation) == 200
    assert not {row.visuals for row in train} & {row.visuals for row in validation}
    assert all(row.references for row in validation)
    # the very questions that a LLaVA is validated on
    data = EasyVQADataModule("no-model", **options)
    data.template = get_conversation_template("vicuna_v1")
    samples = data.build_samples("validate")
    assert [row.row["question_id"] for row in validation] == [sample.row["question_id"] for sample in samples]  # type: ignore[index]
    assert [row.source for row in validation] == [sample.source for sample in samples]
    with pytest.raises(ValueError, match="val_images=4000 must leave something of 4000 training images"):
        read_easy_vqa("train", val_images=4000)
    with pytest.raises(ValueError, match="split must be one of train, validate, test, found 'val'"):
        read_easy_vqa("val")  # type: ignore[arg-type]
