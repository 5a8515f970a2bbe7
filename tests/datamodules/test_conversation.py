import pytest
from conversation_examples import CHATML_TEMPLATE, make_bpe

from datamodules.conversation import (
    CONVERSATION_TEMPLATES,
    ConversationTemplate,
    Turns,
    check_conversation_template,
    get_conversation_template,
)

TURNS = [("<image>\nWhat is it?", "A red square."), ("How many?", "Two."), ("Is it blue?", "No.")]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# the published texts, written out
WHOLE = {
    "vicuna_v1": (
        f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A red square.</s>USER: How many? ASSISTANT: Two.</s>"
        "USER: Is it blue? ASSISTANT: No.</s>"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA red square.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHow many?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nTwo.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nIs it blue?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nNo.<|eot_id|>"
    ),
    "chatml": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA red square.<|im_end|>\n"
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n"
        "<|im_start|>user\nIs it blue?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>"
    ),
}
ANSWERS = {
    "vicuna_v1": [" A red square.</s>", " Two.</s>", " No.</s>"],
    "llama3": ["A red square.<|eot_id|>", "Two.<|eot_id|>", "No.<|eot_id|>"],
    "chatml": ["A red square.<|im_end|>", "Two.<|im_end|>", "No.<|im_end|>"],
}
# one that leaves plain text out, as those of llava-hf's processors do, and one that stumbles over it
PARTS_TEMPLATES = [
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    f"{{% for part in message['content']{only} %}}{{{{ part['text'] + ' ' }}}}{{% endfor %}}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    for only in (" | selectattr('type', 'equalto', 'text')", "")
]


@pytest.mark.parametrize("name", CONVERSATION_TEMPLATES)
def test_the_text_is_the_published_one_and_the_spans_are_its_answers(name: str) -> None:
    prompt, target, answered = get_conversation_template(name).sample_text(TURNS)
    assert prompt + target == WHOLE[name]
    assert [*(prompt[start:end] for start, end in answered), target] == ANSWERS[name]


@pytest.mark.parametrize("name", CONVERSATION_TEMPLATES)
def test_a_prompt_to_generate_from_is_that_of_training_without_the_answer(name: str) -> None:
    template = get_conversation_template(name)
    trained = template.sample_text(TURNS)
    asked = template.sample_text([*TURNS[:-1], (TURNS[-1][0], None)])
    assert asked == (trained.prompt, "", trained.answered)


def test_a_tokenizers_own_template() -> None:
    template = get_conversation_template("tokenizer", make_bpe(chat_template=CHATML_TEMPLATE))
    chatml = CONVERSATION_TEMPLATES["chatml"]
    system = len(chatml.opening)
    prompt, target, answered = chatml.sample_text(TURNS)
    shifted = tuple((start - system, end - system) for start, end in answered)
    assert template.sample_text(TURNS) == (prompt[system:], target, shifted)
    assert template.sample_text([("Is it?", None)]) == (
        "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n",
        "",
        (),
    )


@pytest.mark.parametrize("parts_template", PARTS_TEMPLATES)
def test_a_template_that_wants_parts_loses_no_text(parts_template: str) -> None:
    template = get_conversation_template("tokenizer", make_bpe(chat_template=parts_template))
    prompt, target, answered = template.sample_text(TURNS[:2])
    assert prompt == "USER: <image>\nWhat is it? ASSISTANT: A red square. USER: How many? ASSISTANT:"
    assert target == " Two."
    assert [prompt[start:end] for start, end in answered] == [" A red square."]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    last_only = "{{ messages[-1]['content'] }}"
    template = get_conversation_template("tokenizer", make_bpe(chat_template=last_only))
    with pytest.raises(ValueError, match="writes earlier turns in another way"):
        template.sample_text(TURNS)


def test_a_template_that_refuses_a_conversation() -> None:
    at_most_one = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + CHATML_TEMPLATE
    template = get_conversation_template("tokenizer", make_bpe(chat_template=at_most_one))
    assert template.sample_text(TURNS[:1]).target == "A red square.<|im_end|>"
    with pytest.raises(ValueError, match=r"the chat template of the tokenizer .* refuses a conversation: too long"):
        template.sample_text(TURNS)


def test_a_tokenizer_without_a_template_of_its_own() -> None:
    with pytest.raises(ValueError, match="has no chat template of its own; choose another template: vicuna_v1"):
        get_conversation_template("tokenizer", make_bpe())


@pytest.mark.parametrize("name", CONVERSATION_TEMPLATES)
def test_templates_are_checked_against_the_tokenizer(name: str, tokenizer: object) -> None:
    get_conversation_template(name, make_bpe())
    if name != "vicuna_v1":  # this tokenizer has </s> alone
        with pytest.raises(ValueError, match=rf"template '{name}' does not fit .* no token '<\|"):
            get_conversation_template(name, tokenizer)


def test_unknown_templates() -> None:
    with pytest.raises(ValueError, match=r"unknown conversation template 'vicuna'. Did you mean 'vicuna_v1'\?"):
        get_conversation_template("vicuna")
    with pytest.raises(ValueError, match="The templates are: vicuna_v1, llama3, chatml, tokenizer"):
        check_conversation_template("mistral")
    check_conversation_template("tokenizer")


@pytest.mark.parametrize("name", [*CONVERSATION_TEMPLATES, "tokenizer"])
@pytest.mark.parametrize(
    ("turns", "message"),
    [([], "at least one turn"), ([("Is it?", None), ("Why?", "So.")], "only the last answer of a conversation")],
)
def test_conversations_that_make_no_sense(name: str, turns: Turns, message: str) -> None:
    template = get_conversation_template(name, make_bpe(chat_template=CHATML_TEMPLATE))
    with pytest.raises(ValueError, match=message):
        template.sample_text(turns)


def test_a_template_of_ones_own() -> None:
    template = ConversationTemplate("", "Q: ", "\nA:", answer_prefix=" ", end="\n\n")
    assert template.sample_text([("1?", "2"), ("3?", None)]) == ("Q: 1?\nA: 2\n\nQ: 3?\nA:", "", ((8, 12),))
