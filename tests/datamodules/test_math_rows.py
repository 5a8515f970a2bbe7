"""Orca-Math's split: the rows that fsdp_qlora trains and tests on, from a file as from the hub."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from datamodules import IGNORE, MathQADataModule

ROWS = [{"question": f"What is {number} and 1?", "answer": f"It is {number + 1}."} for number in range(300)]
SIZES = {"train_size": 120, "held_out": 50, "test_size": 20, "val_size": 10}


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.json").write_text(json.dumps(ROWS))
    return str(tmp_path / "hub" / "train.json")


def test_the_published_split(tokenizer_folder: str, file: str) -> None:
    shuffled = Dataset.from_list(ROWS).shuffle(seed=42)  # as fsdp_qlora's train.py and evaluate.py do
    expected = {
        "train": shuffled.select(range(120)).to_list(),
        "test": shuffled.select(range(300 - 50, 300)).select(range(20)).to_list(),
        "validate": shuffled.select(range(300 - 50 + 20, 300 - 50 + 30)).to_list(),
    }
    for options in ({"train_file": file}, {"hub": str(Path(file).parent)}):
        data = MathQADataModule(tokenizer_folder, seed=7, **options, **SIZES)
        data.prepare_data()
        for stage, rows in expected.items():
            assert [sample.row for sample in data.build_samples(stage)] == rows


def test_the_prompt_and_what_is_trained_on(tokenizer_folder: str, file: str) -> None:
    data = MathQADataModule(tokenizer_folder, train_file=file, **SIZES)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    row, labels = batch["samples"][0].row, batch["labels"][0]
    assert batch["samples"][0].prompt == f"###Question:\n{row['question']}\n###Answer:\n"
    assert data.tokenizer.decode(labels[labels != IGNORE]) == row["answer"] + "</s>"


def test_sizes_that_do_not_fit(tokenizer_folder: str, file: str) -> None:
    with pytest.raises(ValueError, match="train_size=260 and held_out=50 ask for more rows than the 300"):
        MathQADataModule(tokenizer_folder, train_file=file, **SIZES | {"train_size": 260}).build_samples("train")
    with pytest.raises(ValueError, match="test_size=45 and val_size=10 do not fit in the held_out=50 rows"):
        MathQADataModule(tokenizer_folder, train_file=file, **SIZES | {"test_size": 45})
    with pytest.raises(ValueError, match="train_size must be at least 1"):
        MathQADataModule(tokenizer_folder, train_file=file, **SIZES | {"train_size": 0})
    with pytest.raises(ValueError, match="give train_file or hub"):
        MathQADataModule(tokenizer_folder)


def test_a_bad_row_is_named(tokenizer_folder: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps([*ROWS, {"question": "What?"}]))
    with pytest.raises(ValueError, match=r"bad\.json, row 301: field 'answer' is missing"):
        MathQADataModule(tokenizer_folder, train_file=str(tmp_path / "bad.json"), **SIZES).build_samples("train")
