"""Chat messages of both layouts, and what is no conversation."""

from typing import Any

import pytest
from conversation_examples import CHATML_TEMPLATE, make_bpe

from datamodules.conversation import get_conversation_template
from datamodules.messages import Dialogue, dialogue_of_row, read_messages


def openai(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in messages]


def sharegpt(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in messages]


def test_both_layouts() -> None:
    expected = Dialogue((("Who?", "Me."), ("Why?", "Because.")), "Be brief.")
    ours = openai(
        ("system", "Be brief."), ("user", "Who?"), ("assistant", "Me."), ("user", "Why?"), ("assistant", "Because.")
    )
    assert dialogue_of_row({"messages": ours}) == expected
    theirs = sharegpt(
        ("system", "Be brief."), ("human", "Who?"), ("gpt", "Me."), ("human", "Why?"), ("gpt", "Because.")
    )
    assert dialogue_of_row({"conversations": theirs, "id": 3}) == expected
    assert dialogue_of_row({"messages": openai(("user", "Who?"), ("assistant", "Me."))}).system is None
    assert read_messages(openai(("system", " "), ("user", "Who?")), "prompt") == Dialogue((("Who?", None),))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Who?", r"field 'messages' must be a list of messages, found 'Who\?'"),
        ([], r"field 'messages' must be a list of messages, found \[\]"),
        (["Who?"], r"message 1 must have the fields 'role' and 'content', or 'from' and 'value'; found 'Who\?'"),
        (openai(("tool", "3")), "message 1: unknown role 'tool'; expected one of system, user, human, assistant, gpt"),
        ([{"role": "user"}], "message 1: field 'content' must be text, found None"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1: field 'content' must be text"),
        (openai(("user", "Who?"), ("assistant", " ")), "message 2, of the role 'assistant', is blank"),
        (openai(("assistant", "Me.")), "message 1 is of the role 'assistant'; expected 'user'"),
        (openai(("user", "Who?"), ("user", "Why?")), "message 2 is of the role 'user'; expected 'assistant'"),
        (openai(("user", "Who?"), ("system", "Hm.")), "message 2 is of the role 'system'; expected 'assistant'"),
        (openai(("system", "Hm.")), "field 'messages' holds a system message alone"),
        (openai(("user", "Who?")), "the last message is the user's and has no answer"),
    ],
)
def test_what_is_no_conversation(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dialogue_of_row({"messages": messages})


def test_a_row_without_messages() -> None:
    with pytest.raises(ValueError, match="expected the field 'messages' or 'conversations'; the row has 'text'"):
        dialogue_of_row({"text": "Who?"})


@pytest.mark.parametrize("name", ["chatml", "llama3", "vicuna_v1"])
def test_a_system_message_takes_the_place_of_the_templates_own(name: str) -> None:
    template = get_conversation_template(name)
    own = template.sample_text([("Who?", "Me.")])
    other = template.sample_text([("Who?", "Me.")], "Be brief.")
    assert template.system in own.prompt
    assert own.prompt.replace(template.system, "Be brief.") == other.prompt
    assert own.target == other.target


def test_a_system_message_by_the_tokenizers_template() -> None:
    tokenizer = make_bpe(chat_template=CHATML_TEMPLATE)
    rendered = get_conversation_template("tokenizer", tokenizer).sample_text([("Who?", "Me.")], "Be brief.")
    assert rendered.prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>")
