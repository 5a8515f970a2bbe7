import pytest

from datamodules import get_template

# NVlabs/DoRA, commonsense_reasoning/finetune.py and commonsense_evaluate.py
TRAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
    "\n"
    "                ### Instruction:\n"
    "                Is it?\n"
    "                \n"
    "                ### Response:\n"
    "                yes"
)
TRAIN_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request. \n"
    "\n"
    "                ### Instruction:\n"
    "                Is it?\n"
    "                \n"
    "                ### Input:\n"
    "                A cat.\n"
    "                \n"
    "                ### Response:\n"
    "                yes"
)
EVAL = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n"
    "\n"
    "                ### Instruction:\n"
    "                Is it?\n"
    "\n"
    "                ### Response:\n"
    "                "
)
EVAL_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n"
    "\n"
    "                ### Instruction:\n"
    "                Is it?\n"
    "\n"
    "                ### Input:\n"
    "                A cat.\n"
    "\n"
    "                ### Response:\n"
    "                "
)


def test_llm_adapters_is_the_published_text_byte_for_byte() -> None:
    template = get_template("llm_adapters")
    assert template.train_prompt("Is it?") + template.target_prefix + "yes" == TRAIN
    assert template.train_prompt("Is it?", "A cat.") + template.target_prefix + "yes" == TRAIN_WITH_INPUT
    assert template.eval_prompt("Is it?") == EVAL
    assert template.eval_prompt("Is it?", "A cat.") == EVAL_WITH_INPUT


def test_alpaca_is_alpaca_lora_s_text() -> None:
    template = get_template("alpaca")
    assert template.train_prompt("Is it?") == template.eval_prompt("Is it?")
    assert template.eval_prompt("Is it?") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nIs it?\n\n### Response:\n"
    )
    assert template.train_prompt("Is it?", "A cat.") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nIs it?\n\n### Input:\nA cat.\n\n### Response:\n"
    )
    assert template.target_prefix == ""


def test_plain_joins_the_target_with_a_space() -> None:
    template = get_template("plain")
    text = template.eval_prompt("Is it?") + template.target_prefix + "yes"
    assert text == "Question: Is it?\nAnswer: yes"


def test_braces_in_an_instruction_stay() -> None:
    assert "{x} {input}" in get_template("alpaca").train_prompt("{x} {input}", "y")


def test_unknown_name_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"'alpacca'\. Did you mean 'alpaca'\? .*alpaca, llm_adapters, plain"):
        get_template("alpacca")
