import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversation_examples import CHATML_TEMPLATE, make_bpe, save_llava_processor
from PIL import Image

from datamodules import IGNORE
from datamodules.llava import LlavaInstructions, conversation_turns, image_first

Row = dict[str, Any]


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]


ROWS: list[Row] = [
    {
        "id": "a",
        "image": "coco/1.png",
        "conversations": talk("What is it?\n<image>", "A red square.", "Is it?", "Yes."),
    },
    {"id": "b", "image": "coco/2.png", "conversations": talk("<image>\nHow many?", "Two.")},
    {"id": "c", "conversations": talk("Who?", "Me.", "Why?", "So.", "Is it?", "No.")},
    {"id": 4, "image": ["coco/1.png", "gqa/3.png"], "conversations": talk("Is <image> or <image> red?", "Both.")},
    {"id": "e", "image": None, "conversations": talk("How?", "There.")},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llava_processor(tmp_path_factory.mktemp("llava"), make_bpe(chat_template=CHATML_TEMPLATE))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(["coco/1.png", "coco/2.png", "gqa/3.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path


def make(model: str, folder: Path, rows: list[Row] = ROWS, **options: Any) -> LlavaInstructions:
    (folder / "train.json").write_text(json.dumps(rows))
    return LlavaInstructions(model, str(folder / "train.json"), **{"num_workers": 0, "batch_size": 2, **options})


def build(model: str, folder: Path, rows: list[Row] = ROWS, **options: Any) -> LlavaInstructions:
    data = make(model, folder, rows, **options)
    data.setup("fit")
    return data


def test_rows_become_conversations(model: str, folder: Path) -> None:
    data = build(model, folder)
    samples = {item.sample.row["question_id"]: item.sample for item in data._datasets["train"].encoded}
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    assert list(samples) == ["a", "b", "c", 4, "e"]
    assert samples["a"].prompt == (
        f"{system} USER: <image>\nWhat is it? ASSISTANT: A red square.</s>USER: Is it? ASSISTANT:"
    )
    assert samples["a"].target == " Yes.</s>"
    assert samples["a"].images == (str(folder / "coco/1.png"),)
    assert samples["a"].references == ("Yes.",)
    assert samples["a"].row == {
        "question_id": "a",
        "question": "Is it?",
        "image_path": str(folder / "coco/1.png"),
        "file": str(folder / "train.json"),
        "row": 1,
    }
    assert samples["c"].prompt.endswith(
        "USER: Who? ASSISTANT: Me.</s>USER: Why? ASSISTANT: So.</s>USER: Is it? ASSISTANT:"
    )
    assert samples["c"].images == samples["e"].images == ()
    # the places of several images are those of the text
    assert samples[4].prompt == f"{system} USER: Is <image> or <image> red? ASSISTANT:"
    assert samples[4].images == (str(folder / "coco/1.png"), str(folder / "gqa/3.png"))
    assert json.dumps([sample.row for sample in samples.values()])


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        ("vicuna_v1", " A red square.</s> Yes.</s>"),
        ("llama3", "A red square.<|eot_id|>Yes.<|eot_id|>"),
        ("chatml", "A red square.<|im_end|>Yes.<|im_end|>"),
        ("tokenizer", "A red square.<|im_end|>Yes.<|im_end|>"),
    ],
)
def test_every_answer_is_trained_in_every_template(model: str, folder: Path, template: str, answers: str) -> None:
    data = build(model, folder, ROWS[:1], template=template, batch_size=1)
    (batch,) = data.train_dataloader()
    labels = batch["labels"][0]
    assert data.tokenizer.decode(labels[labels != IGNORE]) == answers
    assert batch["input_ids"].eq(3).sum() == 16
    assert batch["vision"]["pixel_values"].shape == (1, 3, 32, 32)


def test_batches_of_a_mixed_file(model: str, folder: Path) -> None:
    batches = list(build(model, folder).train_dataloader())
    assert {sample.row["question_id"] for batch in batches for sample in batch["samples"]} == {"a", "b", "c", 4, "e"}
    for batch in batches:
        images = [len(sample.images) for sample in batch["samples"]]
        assert len({bool(count) for count in images}) == 1
        assert len(batch.get("vision", {"pixel_values": []})["pixel_values"]) == sum(images)
        assert batch["input_ids"].eq(3).sum(1).tolist() == [16 * count for count in images]


def test_images_may_lie_elsewhere(model: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    data = build(model, elsewhere, image_folder=str(folder))
    assert data._datasets["train"].encoded[0].sample.images == (str(folder / "coco/1.png"),)


def test_a_file_of_lines(model: str, folder: Path) -> None:
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    data = LlavaInstructions(model, str(folder / "train.jsonl"))
    data.setup("fit")
    assert len(data._datasets["train"]) == 5


def ids(data: LlavaInstructions, stage: Any) -> list[Any]:
    return [item.sample.row["question_id"] for item in data._datasets[stage].encoded]


def test_validation_is_drawn_by_seed(model: str, folder: Path) -> None:
    rows = [{"id": number, "conversations": talk(f"Is it {number}?", "Yes.")} for number in range(30)]
    data = build(model, folder, rows, val_size=8, seed=1)
    data.setup("test")
    assert sorted([*ids(data, "train"), *ids(data, "validate")]) == list(range(30))
    assert len(ids(data, "validate")) == 8
    assert ids(data, "test") == ids(data, "validate")
    assert ids(build(model, folder, rows, val_size=8, seed=1), "validate") == ids(data, "validate")
    assert ids(build(model, folder, rows, val_size=8, seed=2), "validate") != ids(data, "validate")
    # fewer samples to train on come from the same draw, and validation stays what it was
    fewer = build(model, folder, rows, val_size=8, seed=1, limit_train=5)
    assert len(ids(fewer, "train")) == 5
    assert set(ids(fewer, "train")) < set(ids(data, "train"))
    assert ids(fewer, "validate") == ids(data, "validate")
    assert ids(build(model, folder, rows), "validate") == []


def test_validation_from_a_file_of_its_own(model: str, folder: Path) -> None:
    (folder / "val.json").write_text(json.dumps(ROWS[3:]))
    data = build(model, folder, ROWS[:3], val_file=str(folder / "val.json"))
    data.setup("test")
    assert ids(data, "train") == ["a", "b", "c"]
    assert ids(data, "validate") == ids(data, "test") == [4, "e"]


BAD = [
    ({"conversations": talk("<image>", "Yes."), "image": "coco/9.png"}, "coco/9.png: no such image"),
    ({"conversations": talk("<image>", "Yes."), "image": "train.json"}, "train.json: not an image"),
    ({"conversations": talk("<image>", "Yes.")}, "found 1 of them and 0 images"),
    ({"conversations": talk("Is it?", "Yes."), "image": "coco/1.png"}, "found 0 of them and 1 images"),
    ({"conversations": talk("<image>", "Yes."), "image": ["coco/1.png"] * 2}, "found 1 of them and 2 images"),
    ({"conversations": talk("<image><image>", "Yes."), "image": "coco/1.png"}, "found 2 of them and 1 images"),
    ({"conversations": talk("Is it?", "<image>"), "image": "coco/1.png"}, "an answer holds '<image>'"),
    ({"conversations": talk("Is it?", "<image>", "So?", "Yes."), "image": "coco/1.png"}, "an answer holds '<image>'"),
    (
        {"conversations": talk("Is it?", "Yes."), "image": 7},
        "field 'image' must be a file name or a list of them, found 7",
    ),
    ({"conversations": talk("Is it?", "Yes."), "image": " "}, "field 'image' must be a file name"),
    ({"conversations": talk("<image>", "Yes."), "image": ["a", None]}, "field 'image' must be a file name"),
    ({}, "field 'conversations' must be a list of messages, found None"),
    ({"conversations": []}, "field 'conversations' must be a list of messages"),
    ({"conversations": ["Is it?"]}, "message 1 must have the fields 'from' and 'value', found 'Is it"),
    ({"conversations": [{"from": "human", "value": 7}]}, "message 1 must have the fields 'from' and 'value'"),
    ({"conversations": talk("Is it?", "Yes.", "Why?")}, "message 3, the last, is from 'human' and has no answer"),
    ({"conversations": talk("Is it?", "\n")}, "message 2, from 'gpt', is blank"),
    (
        {"conversations": [talk("Is it?")[0], *talk("Is it?", "Yes.")]},
        "message 2 is from 'human'; expected 'gpt', since 'human' and 'gpt' speak in turn",
    ),
    ({"conversations": talk("Is it?", "Yes.")[1:]}, "message 1 is from 'gpt'; expected 'human', since a conversation"),
    (
        {"conversations": [{"from": "system", "value": "Be brief."}, *talk("Is it?", "Yes.")]},
        "message 1 is from 'system'; expected 'human' or 'gpt'",
    ),
    ({"conversations": [{"value": "Is it?"}]}, "message 1 is from None; expected 'human' or 'gpt'"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_a_bad_row_stops_the_run_or_is_skipped(model: str, folder: Path, row: Row, message: str) -> None:
    rows = [ROWS[0], {"id": "bad", **row}, ROWS[1]]
    with pytest.raises(ValueError, match=r"train.json, row 2: ") as caught:
        build(model, folder, rows)
    assert message in str(caught.value)
    with pytest.warns(UserWarning, match="1 of 3 .* were skipped.*train.json, row 2: ") as warned:
        data = build(model, folder, rows, on_bad_row="skip")
    assert any(message in str(warning.message) for warning in warned)
    assert ids(data, "train") == ["a", "b"]


def test_many_bad_rows_are_counted(model: str, folder: Path) -> None:
    rows = [*ROWS, *(row for row, _ in BAD)]
    with pytest.warns(UserWarning, match="were skipped") as warned:
        data = build(model, folder, rows, on_bad_row="skip")
    said = [str(warning.message) for warning in warned]
    # 13 that are no conversations or name no image, then 8 whose images cannot be used
    assert any("train.json: 13 of 26 rows were skipped; the first: " in text for text in said)
    assert any("8 of 13 samples were skipped for their images; the first: " in text for text in said)
    assert ids(data, "train") == ["a", "b", "c", 4, "e"]


def test_arguments_that_make_no_sense(model: str, folder: Path) -> None:
    with pytest.raises(ValueError, match="give val_file or val_size, not both"):
        make(model, folder, val_file=str(folder / "train.json"), val_size=2)
    with pytest.raises(ValueError, match="val_size=5 must be at least 0 and leave something of 5 conversations"):
        build(model, folder, val_size=5)
    with pytest.raises(FileNotFoundError, match=r"image_folder .*nowhere: no such folder"):
        make(model, folder, image_folder=str(folder / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"val_file .*nowhere.json: no such file"):
        make(model, folder, val_file=str(folder / "nowhere.json"))
    with pytest.raises(FileNotFoundError, match=r"train_file nowhere.json: no such file"):
        LlavaInstructions(model, "nowhere.json")


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is it?\n<image>", "<image>\nWhat is it?"),
        ("<image>\nWhat is it?", "<image>\nWhat is it?"),
        ("What <image> is it? ", "<image>\nWhat  is it?"),
        ("<image>", "<image>"),
        (" Why? ", " Why? "),
        ("<image> or <image>?", "<image> or <image>?"),
    ],
)
def test_an_image_comes_before_its_question(question: str, expected: str) -> None:
    assert image_first(question) == expected


def test_turns() -> None:
    assert conversation_turns({"conversations": talk("1", "2", "3", "4")}) == [("1", "2"), ("3", "4")]


def test_settings_reach_the_batches(model: str, folder: Path) -> None:
    data = build(
        model, folder, image_aspect_ratio="plain", train_on_inputs=True, cutoff_len=2000, group_by_length=False
    )
    image = Image.open(folder / "coco/2.png")
    plain = data.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
    found = False
    for batch in data.train_dataloader():
        kept = batch["attention_mask"].bool() & (batch["input_ids"] != 3)
        assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
        found |= any(torch.equal(pixels, plain) for pixels in batch.get("vision", {"pixel_values": []})["pixel_values"])
    assert found
    assert (data.cutoff_len, data.group_by_length) == (2000, False)
