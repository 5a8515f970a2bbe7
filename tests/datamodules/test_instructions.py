"""Alpaca's rows and chat messages become samples of which the assistant's words are trained on, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
from conversation_examples import CHATML_TEMPLATE, make_bpe

from datamodules import IGNORE, InstructionDataModule, Row

ROWS: list[Row] = [
    {"instruction": f"Name thing {number}.", "input": "" if number % 2 else "from a list", "output": f"Thing {number}!"}
    for number in range(40)
]
CHAT: Row = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
    ]
}


def write(path: Path, rows: list[Row]) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write(tmp_path / "alpaca.json", ROWS)


@pytest.fixture
def chatml_folder(tmp_path: Path) -> str:
    make_bpe(chat_template=CHATML_TEMPLATE).save_pretrained(tmp_path / "chatml")
    (tmp_path / "chatml" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(tmp_path / "chatml")


def prompts(data: InstructionDataModule, stage: Any = "train") -> list[str]:
    return [sample.prompt for sample in data.build_samples(stage)]


def test_alpacas_prompts(tokenizer_folder: str, file: str) -> None:
    first, second, *_ = InstructionDataModule(tokenizer_folder, file).build_samples("train")
    assert first.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nName thing 0.\n\n### Input:\nfrom a "
        "list\n\n### Response:\n"
    )
    assert second.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName thing 1.\n\n### Response:\n"
    )
    assert (second.target, second.references, second.row) == ("Thing 1!", ("Thing 1!",), ROWS[1])


def test_smaller_sets_are_part_of_larger_ones(tokenizer_folder: str, file: str) -> None:
    sets = [
        InstructionDataModule(tokenizer_folder, file, val_size=8, limit_train=size, seed=7)
        for size in (4, 16, 32, None)
    ]
    trained = [set(prompts(data)) for data in sets]
    assert [len(part) for part in trained] == [4, 16, 32, 32]
    assert trained[0] < trained[1] < trained[2]
    for data, part in zip(sets, trained, strict=True):
        assert prompts(data, "validate") == prompts(sets[0], "validate") == prompts(data, "test")
        assert len(prompts(data, "validate")) == 8
        assert not part & set(prompts(data, "validate"))
    other = InstructionDataModule(tokenizer_folder, file, val_size=8, limit_train=16, seed=8)
    assert set(prompts(other)) != trained[1]


def test_files_of_their_own(tokenizer_folder: str, file: str, tmp_path: Path) -> None:
    val_file, test_file = write(tmp_path / "val.json", ROWS[:3]), write(tmp_path / "test.json", ROWS[3:5])
    data = InstructionDataModule(tokenizer_folder, file, val_file=val_file, test_file=test_file)
    assert [len(prompts(data, stage)) for stage in ("train", "validate", "test")] == [40, 3, 2]


def test_every_answer_of_a_chat_is_trained_on_and_nothing_else(chatml_folder: str, tmp_path: Path) -> None:
    rows = [CHAT, ROWS[0], {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}]
    for template in ("tokenizer", "chatml"):
        data = InstructionDataModule(chatml_folder, write(tmp_path / "chat.json", rows), template=template)
        data.setup("fit")
        (batch,) = data.train_dataloader()
        trained = {
            sample.references[0]: data.tokenizer.decode(labels[labels != IGNORE])
            for sample, labels in zip(batch["samples"], batch["labels"], strict=True)
        }
        assert trained == {
            "Because.": "Me.<|im_end|>Because.<|im_end|>",
            "Thing 0!": "Thing 0!<|im_end|>",
            "A": "A<|im_end|>",
        }
        texts = {sample.references[0]: sample.prompt for sample in batch["samples"]}
        assert texts["Because."].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>")
        assert "Name thing 0.\n\nfrom a list<|im_end|>" in texts["Thing 0!"]


def test_one_turn_of_messages_fits_alpacas_template(tokenizer_folder: str, tmp_path: Path) -> None:
    row = {"messages": CHAT["messages"][1:3]}
    (sample,) = InstructionDataModule(tokenizer_folder, write(tmp_path / "one.json", [row])).build_samples("train")
    assert sample.prompt.endswith("### Instruction:\nWho?\n\n### Response:\n")
    assert sample.target == "Me."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (CHAT, r"bad.json, row 2: template 'alpaca' holds one instruction .* has 2 turns; choose .* tokenizer"),
        ({"messages": CHAT["messages"][:3]}, "row 2: template 'alpaca' .* has a system message"),
        ({"instruction": "Do."}, "row 2: field 'output' is missing"),
        ({"instruction": "Do.", "input": 3, "output": "Done."}, "row 2: field 'input' must be text, found int: 3"),
        ({"messages": []}, "row 2: field 'messages' must be a list of messages"),
    ],
)
def test_bad_rows_are_named(tokenizer_folder: str, tmp_path: Path, row: Row, message: str) -> None:
    data = InstructionDataModule(tokenizer_folder, write(tmp_path / "bad.json", [ROWS[0], row]))
    with pytest.raises(ValueError, match=message):
        data.build_samples("train")
    data = InstructionDataModule(tokenizer_folder, str(tmp_path / "bad.json"), on_bad_row="skip")
    with pytest.warns(UserWarning, match="1 of 2 rows were skipped"):
        assert len(prompts(data)) == 1


def test_a_data_set_of_the_hub(tokenizer_folder: str, file: str, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "train.json", ROWS)
    data = InstructionDataModule(tokenizer_folder, hub=str(tmp_path / "hub"), val_size=8, limit_train=16)
    data.prepare_data()
    same = InstructionDataModule(tokenizer_folder, file, val_size=8, limit_train=16)
    assert prompts(data) == prompts(same)
    with pytest.raises(ValueError, match="hub: could not load the split 'dev' of "):
        InstructionDataModule(tokenizer_folder, hub=str(tmp_path / "hub"), hub_split="dev").build_samples("train")


def test_arguments_that_contradict_each_other(tokenizer_folder: str, file: str) -> None:
    for sources in ({}, {"train_file": file, "hub": "yahma/alpaca-cleaned"}):
        with pytest.raises(ValueError, match="give train_file or hub, one of the two"):
            InstructionDataModule(tokenizer_folder, **sources)
    with pytest.raises(ValueError, match="give val_file or val_size, not both"):
        InstructionDataModule(tokenizer_folder, file, val_file=file, val_size=3)
    with pytest.raises(FileNotFoundError, match=r"test_file nowhere\.json: no such file"):
        InstructionDataModule(tokenizer_folder, file, test_file="nowhere.json")
    with pytest.raises(ValueError, match=r"unknown template 'alpacca'\. Did you mean 'alpaca'\?"):
        InstructionDataModule(tokenizer_folder, file, template="alpacca")
    with pytest.raises(ValueError, match="val_size=40 must be at least 0 and leave something of 40 rows"):
        InstructionDataModule(tokenizer_folder, file, val_size=40).build_samples("train")
    with pytest.raises(ValueError, match="limit_train must be at least 1, or null for all, found 0"):
        InstructionDataModule(tokenizer_folder, file, limit_train=0).build_samples("train")
