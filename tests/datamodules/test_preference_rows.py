"""Pairs of answers in every layout, and the batches that they make."""

import json
from pathlib import Path
from typing import Any

import pytest
from conversation_examples import CHATML_TEMPLATE, make_bpe

from datamodules import IGNORE, PreferenceDataModule, Row


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [SYSTEM, user("Who?"), assistant("Me."), user("Why?")]


@pytest.fixture
def chatml_folder(tmp_path: Path) -> str:
    make_bpe(chat_template=CHATML_TEMPLATE).save_pretrained(tmp_path / "chatml")
    (tmp_path / "chatml" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(tmp_path / "chatml")


def make(folder: str, tmp_path: Path, rows: list[Row], **options: Any) -> PreferenceDataModule:
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    data = PreferenceDataModule(folder, str(tmp_path / "pairs.json"), **options)
    data.setup("fit")
    return data


ONE_TURN: list[Row] = [
    {"prompt": "Why?", "chosen": "Because.", "rejected": "Go away."},
    {"prompt": [user("Why?")], "chosen": [assistant("Because.")], "rejected": [assistant("Go away.")]},
    {"prompt": [user("Why?")], "chosen": "Because.", "rejected": "Go away."},
    {"prompt": "Why?", "chosen": [assistant("Because.")], "rejected": [assistant("Go away.")]},
    # UltraFeedback's layout on the hub: a copy of the question, and whole conversations
    {
        "prompt": "Why?",
        "chosen": [user("Why?"), assistant("Because.")],
        "rejected": [user("Why?"), assistant("Go away.")],
        "score_chosen": 8.5,
    },
    {"chosen": [user("Why?"), assistant("Because.")], "rejected": [user("Why?"), assistant("Go away.")]},
]


@pytest.mark.parametrize("number", range(len(ONE_TURN)))
def test_one_turn_in_every_layout(chatml_folder: str, tmp_path: Path, number: int) -> None:
    (sample,) = make(chatml_folder, tmp_path, [ONE_TURN[number]]).build_samples("train")
    assert sample.prompt.endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert sample.prompt.count("Why?") == 1
    assert sample.target == "Because.<|im_end|>"
    assert sample.options == ("Because.<|im_end|>", "Go away.<|im_end|>")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TURNS, "chosen": [assistant("Because.")], "rejected": [assistant("Go away.")]},
        {"chosen": [*TURNS, assistant("Because.")], "rejected": [*TURNS, assistant("Go away.")]},
        {"prompt": TURNS, "chosen": [*TURNS, assistant("Because.")], "rejected": [*TURNS, assistant("Go away.")]},
    ],
)
def test_several_turns(chatml_folder: str, tmp_path: Path, row: Row) -> None:
    data = make(chatml_folder, tmp_path, [row])
    (sample,) = data.build_samples("train")
    assert sample.prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?")
    assert sample.options == ("Because.<|im_end|>", "Go away.<|im_end|>")
    (batch,) = data.train_dataloader()
    # the two answers and no earlier one: that is the same for both
    assert [data.tokenizer.decode(labels[labels != IGNORE]) for labels in batch["labels"][::8]] == [*sample.options]


def test_texts_as_they_are_and_alpacas_prompt(tokenizer_folder: str, tmp_path: Path) -> None:
    row = {"prompt": "Why?", "chosen": " Because.", "rejected": " Go away."}
    (sample,) = make(tokenizer_folder, tmp_path, [row], template="none").build_samples("train")
    assert (sample.prompt, sample.options) == ("Why?", (" Because.", " Go away."))
    (sample,) = make(tokenizer_folder, tmp_path, [ONE_TURN[0]], template="alpaca").build_samples("train")
    assert sample.prompt.endswith("### Instruction:\nWhy?\n\n### Response:\n")
    assert sample.target == "Because."


def test_a_batch_holds_the_preferred_answers_first(tokenizer_folder: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"Why {n}?", "chosen": f"so {n}", "rejected": f"no {'no ' * n}{n}"} for n in range(3)]
    data = make(tokenizer_folder, tmp_path, rows, template="none", batch_size=3)
    (batch,) = data.train_dataloader()
    tokenizer = data.tokenizer
    assert {key: batch[key].shape[0] for key in ("input_ids", "attention_mask", "labels")} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), 6
    )
    assert len(batch["samples"]) == 3
    for place, sample in enumerate(batch["samples"]):
        for half in (0, 1):
            ids, labels = batch["input_ids"][place + 3 * half], batch["labels"][place + 3 * half]
            text = tokenizer.decode(ids[batch["attention_mask"][place + 3 * half].bool()])
            assert text == f"<s>{sample.prompt}{sample.options[half]}</s>"
            assert tokenizer.decode(labels[labels != IGNORE]) == sample.options[half] + "</s>"


def test_a_pair_of_which_one_answer_is_cut_off_is_left_out(tokenizer_folder: str, tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "chosen": "so", "rejected": "no"}, {"prompt": "y" * 60, "chosen": "a", "rejected": "b"}]
    with pytest.warns(UserWarning, match="1 of 2 train samples were left out, since cutoff_len=16"):
        data = make(tokenizer_folder, tmp_path, rows, template="none", cutoff_len=16)
    (batch,) = data.train_dataloader()
    assert {sample.prompt for sample in batch["samples"]} == {"Why?"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "row 1: field 'prompt' is missing"),
        ({"prompt": "Why?", "chosen": "a"}, "row 1: field 'rejected' is missing"),
        ({"prompt": "Why?", "chosen": "a", "rejected": "a"}, "hold the same answer, so neither is preferred"),
        (
            {"chosen": [user("Why?"), assistant("a")], "rejected": [user("Who?"), assistant("b")]},
            "must answer the same prompt, and theirs differ",
        ),
        ({"prompt": [user("Q"), assistant("A")], "chosen": "a", "rejected": "b"}, "it ends in an answer"),
        ({"chosen": [user("Why?")], "rejected": [user("Why?"), assistant("b")]}, "'chosen': the last message is the"),
    ],
)
def test_bad_rows_are_named(chatml_folder: str, tmp_path: Path, row: Row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(chatml_folder, tmp_path, [row])


def test_a_conversation_that_the_template_has_no_form_for(tokenizer_folder: str, tmp_path: Path) -> None:
    row = {"prompt": TURNS, "chosen": [assistant("Because.")], "rejected": [assistant("Go away.")]}
    with pytest.raises(ValueError, match="template 'none' holds one question and its answer"):
        make(tokenizer_folder, tmp_path, [row], template="none")
    with pytest.raises(ValueError, match="unknown template 'nothing'"):
        make(tokenizer_folder, tmp_path, [row], template="nothing")
