import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from conversation_examples import (
    CHATML_TEMPLATE,
    make_bpe,
    make_llama_tokenizer,
    make_slow_tokenizer,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from datamodules import IGNORE, Collator, encode_samples
from datamodules.conversation import get_conversation_template
from dora_lightning.data import Sample

PROMPT, TARGET = "Question: what is it?\nAnswer:", " the correct answer is answer2"


def trained_text(tokenizer: PreTrainedTokenizerBase, labels: torch.Tensor) -> str:
    return tokenizer.decode(labels[labels != IGNORE])


def test_tokens_are_those_of_the_whole_text_and_an_end(tokenizer: PreTrainedTokenizerBase) -> None:
    (item,) = encode_samples([Sample(PROMPT, TARGET)], tokenizer)
    whole = tokenizer(PROMPT + TARGET)["input_ids"]
    assert item.input_ids.tolist() == [*whole, tokenizer.eos_token_id]
    assert whole[0] == tokenizer.bos_token_id
    assert trained_text(tokenizer, item.labels) == TARGET + "</s>"


def test_prompt_counts_with_train_on_inputs(tokenizer: PreTrainedTokenizerBase) -> None:
    (item,) = encode_samples([Sample(PROMPT, TARGET)], tokenizer, train_on_inputs=True)
    assert torch.equal(item.labels, item.input_ids)


def test_a_token_across_the_boundary_is_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    # " answer" is one token of this vocabulary
    assert len(tokenizer(" answer", add_special_tokens=False)["input_ids"]) == 1
    (item,) = encode_samples([Sample("It is an", "swer2")], tokenizer)
    assert trained_text(tokenizer, item.labels) == " answer2</s>"


def test_cut_on_the_right_and_an_end_only_where_there_is_room(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = [*tokenizer(PROMPT + TARGET)["input_ids"], tokenizer.eos_token_id]
    for cutoff_len in (4, len(whole) - 1, len(whole), len(whole) + 1):
        (item,) = encode_samples([Sample(PROMPT, TARGET)], tokenizer, cutoff_len)
        assert item.input_ids.tolist() == whole[:cutoff_len]
    (item,) = encode_samples([Sample(PROMPT, TARGET)], tokenizer, cutoff_len=4)
    assert not item.trains


def test_a_slow_tokenizer_masks_the_same_text() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    (item,) = encode_samples([Sample(PROMPT, TARGET)], tokenizer)
    # ByT5 is bytes shifted by three special tokens, and ends a text by itself
    assert item.input_ids.tolist() == [byte + 3 for byte in (PROMPT + TARGET).encode()] + [tokenizer.eos_token_id]
    assert item.labels.tolist() == [IGNORE] * len(PROMPT) + item.input_ids.tolist()[len(PROMPT) :]


def test_order_is_kept_over_many_samples(tokenizer: PreTrainedTokenizerBase) -> None:
    samples = [Sample(f"{number}:", "true") for number in range(2050)]
    assert [item.sample.prompt for item in encode_samples(samples, tokenizer)] == [sample.prompt for sample in samples]


@pytest.mark.parametrize(("cutoff_len", "width"), [(256, 40), (37, 37), (34, 34)])
def test_batches_are_padded_on_the_right_to_a_multiple_of_eight(
    tokenizer: PreTrainedTokenizerBase, cutoff_len: int, width: int
) -> None:
    samples = [Sample("x" * 20, "y" * 13), Sample("x" * 3, "y" * 2)]  # one token a letter: 35 and 7 tokens
    items = encode_samples(samples, tokenizer, cutoff_len)
    batch = Collator(tokenizer.pad_token_id, cutoff_len)(items)
    assert batch["samples"] == samples
    for name in ("input_ids", "attention_mask", "labels"):
        assert batch[name].shape == (2, width)
        assert batch[name].dtype == torch.int64
    assert batch["attention_mask"].sum(1).tolist() == [min(35, cutoff_len), 7]
    assert batch["input_ids"][1, 7:].eq(tokenizer.pad_token_id).all()
    assert batch["labels"][1].ne(IGNORE).sum() == 3  # y, y and the end
    for row, item in enumerate(items):
        assert torch.equal(batch["input_ids"][row, : len(item.input_ids)], item.input_ids.long())
        assert torch.equal(batch["labels"][row, : len(item.labels)], item.labels.long())


# conversations: which tokens are trained on, laid by hand piece by piece

TURNS = [
    ("<image>\nWhat is in the picture?", "It is a red square."),
    ("How many?  \n", " Two — été 😀\n\nand 42"),
    ("Is it blue?", "No."),
]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
)
VICUNA += "and polite answers to the user's questions. USER: "
LLAMA3 = "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
LLAMA3 += "provides, and assist the user with a variety of tasks using natural language."


def pieces(template: str) -> list[tuple[str, bool]]:
    """The text in pieces that are tokens by themselves or text between them, and whether the model is to write each."""
    made: list[tuple[str, bool]] = []
    if template == "vicuna_v1":
        made += [(VICUNA, False), ("<image>", False), ("\nWhat is in the picture? ASSISTANT:", False)]
        made += [(" It is a red square.", True), ("</s>", True)]
        made += [("USER: How many?  \n ASSISTANT:", False), ("  Two — été 😀\n\nand 42", True), ("</s>", True)]
        made += [("USER: Is it blue? ASSISTANT:", False), (" No.", True), ("</s>", True)]
    elif template == "llama3":
        start, end, eot = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
        made += [("<|begin_of_text|>", False), (start, False), ("system", False), (end, False)]
        made += [("\n\n" + LLAMA3, False), (eot, False)]
        for (question, answer), image in zip(TURNS, (True, False, False), strict=True):
            made += [(start, False), ("user", False), (end, False)]
            made += [("\n\n", False), ("<image>", False)] if image else []
            made += [(question.removeprefix("<image>") if image else "\n\n" + question, False), (eot, False)]
            made += [(start, False), ("assistant", False), (end, False)]
            made += [("\n\n", False), (answer, True), (eot, True)]
    else:
        start, end = "<|im_start|>", "<|im_end|>"
        if template == "chatml":
            made += [(start, False), ("system\nYou are a helpful assistant.", False), (end, False), ("\n", False)]
        for number, (question, answer) in enumerate(TURNS):
            made += [(start, False)]
            if number == 0:
                made += [("user\n", False), ("<image>", False), (question.removeprefix("<image>"), False), (end, False)]
            else:
                made += [("user\n" + question, False), (end, False)]
            made += [("\n", False), (start, False), ("assistant\n", False), (answer, True), (end, True)]
            made += [("\n", False)] if number < 2 else []
    return made


def is_special(piece: str) -> bool:
    return re.fullmatch(r"<\|\w+\|>|</?s>|<image>", piece) is not None


def by_hand(
    template: str, tokenizer: PreTrainedTokenizerBase, model: sentencepiece.SentencePieceProcessor | None
) -> tuple[list[int], list[int]]:
    """Tokens and labels; ``model`` does the texts of a SentencePiece tokenizer, which begins each in a space."""
    ids, labels = [], []
    if tokenizer.bos_token and pieces(template)[0][0] not in tokenizer.all_special_tokens:
        ids, labels = [tokenizer.bos_token_id], [IGNORE]
    after_special = True
    for piece, trained in pieces(template):
        if is_special(piece):
            tokens = [tokenizer.convert_tokens_to_ids(piece)]
        elif model is None:
            tokens = tokenizer(piece, add_special_tokens=False)["input_ids"]
        else:
            tokens = model.encode(piece if after_special else "\N{REPLACEMENT CHARACTER}" + piece)
            # no space comes before a piece that goes on in the middle of a text
            tokens = tokens if after_special else tokens[len(model.encode("\N{REPLACEMENT CHARACTER}")) :]
        ids += tokens
        labels += tokens if trained else [IGNORE] * len(tokens)
        after_special = is_special(piece)
    return ids, labels


def conversation(template: str, tokenizer: PreTrainedTokenizerBase) -> Sample:
    prompt, target, answered = get_conversation_template(template, tokenizer).sample_text(TURNS)
    return Sample(prompt, target, answered=answered)


def check_labels(item: Any, ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    def shown(row: list[int]) -> list[str | None]:
        return [None if token == IGNORE else tokenizer.convert_ids_to_tokens(token) for token in row]

    assert shown(item.input_ids.tolist()) == shown(ids)
    assert shown(item.labels.tolist()) == shown(labels)
    assert item.input_ids.tolist() == ids
    assert item.labels.tolist() == labels


@pytest.mark.parametrize(
    ("template", "bos", "eos"),
    [
        ("vicuna_v1", "<s>", "</s>"),
        ("llama3", "<|begin_of_text|>", "<|eot_id|>"),
        ("llama3", "<|begin_of_text|>", "</s>"),  # LLaMA-3's base tokenizer ends texts otherwise than turns
        ("chatml", None, "<|im_end|>"),
        ("chatml", "<s>", "</s>"),
        ("tokenizer", None, "<|im_end|>"),
    ],
)
def test_labels_of_a_conversation_in_byte_level_tokens(template: str, bos: str | None, eos: str) -> None:
    tokenizer = make_bpe(bos, eos, CHATML_TEMPLATE)
    (item,) = encode_samples([conversation(template, tokenizer)], tokenizer, 2048)
    check_labels(item, *by_hand(template, tokenizer, None), tokenizer)


@pytest.mark.parametrize("template", ["vicuna_v1", "llama3", "chatml", "tokenizer"])
@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_labels_of_a_conversation_in_sentencepiece_tokens(template: str, kind: str, tmp_path: Path) -> None:
    tokenizer = make_llama_tokenizer(tmp_path) if kind == "fast" else make_slow_tokenizer(tmp_path)
    tokenizer.chat_template = CHATML_TEMPLATE
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    (item,) = encode_samples([conversation(template, tokenizer)], tokenizer, 2048)
    check_labels(item, *by_hand(template, tokenizer, model), tokenizer)


def test_answers_of_a_tokenizer_that_puts_no_space_after_special_tokens(tmp_path: Path) -> None:
    tokenizer = make_llama_tokenizer(tmp_path, legacy=False)
    (item,) = encode_samples([conversation("vicuna_v1", tokenizer)], tokenizer, 2048)
    runs = "".join(
        "\0" if label == IGNORE else tokenizer.convert_ids_to_tokens(label) for label in item.labels.tolist()
    )
    trained = [run.replace("▁", " ") for run in re.split("\0+", runs) if run]
    assert trained[0] == " It is a red square.</s>"
    assert trained[1].startswith("  Two ")
    assert trained[2] == " No.</s>"


def published_rule(conversation: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """LLaVA's ``preprocess_v1`` as task protocol B4 and B5 describe it."""

    def tokenise(text: str) -> list[int]:
        first, *chunks = (tokenizer(chunk)["input_ids"] for chunk in text.split("<image>"))
        ids = list(first)
        for chunk in chunks:
            ids += [tokenizer.convert_tokens_to_ids("<image>"), *chunk[1:]]  # without the chunk's own <s>
        return ids

    ids = tokenise(conversation)
    labels = list(ids)
    position = 1
    labels[0] = IGNORE
    for round_text in conversation.split("</s>"):
        if not round_text:
            break
        asked, _ = round_text.split(" ASSISTANT: ")
        masked = len(tokenise(asked + " ASSISTANT: ")) - 2
        labels[position : position + masked] = [IGNORE] * masked
        position += len(tokenise(round_text))
    assert position == len(ids), "else the published code masks the whole row"
    return ids, labels


def test_labels_are_those_of_llavas_own_rule(tmp_path: Path) -> None:
    tokenizer = make_llama_tokenizer(tmp_path)
    turns = [TURNS[0], ("How many? <image> there", "Two — été 😀\n\nand 42"), TURNS[2]]
    prompt, target, answered = get_conversation_template("vicuna_v1").sample_text(turns)
    (item,) = encode_samples([Sample(prompt, target, answered=answered)], tokenizer, 2048)
    check_labels(item, *published_rule(prompt + target, tokenizer), tokenizer)


@pytest.mark.parametrize("cutoff_len", [1, 60, 80, 97])
def test_labels_are_cut_with_the_tokens(cutoff_len: int) -> None:
    tokenizer = make_bpe()
    (whole,) = encode_samples([conversation("vicuna_v1", tokenizer)], tokenizer, None)
    assert len(whole.input_ids) == 98
    (item,) = encode_samples([conversation("vicuna_v1", tokenizer)], tokenizer, cutoff_len)
    assert torch.equal(item.input_ids, whole.input_ids[:cutoff_len])
    assert torch.equal(item.labels, whole.labels[:cutoff_len])


@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_a_text_that_begins_and_ends_by_itself_gets_no_second_beginning_or_end(kind: str, tmp_path: Path) -> None:
    tokenizer = make_bpe() if kind == "fast" else make_slow_tokenizer(tmp_path)
    texts = [("It is", " red"), ("<s>It is", " red</s>"), ("It is", " red<|eot_id|>"), ("<s>It is", " red<unk>")]
    items = encode_samples([Sample(prompt, target) for prompt, target in texts], tokenizer)
    rows = [tokenizer.convert_ids_to_tokens(item.input_ids.tolist()) for item in items]
    assert [row[0] for row in rows] == ["<s>"] * 4
    assert [row.count("<s>") for row in rows] == [1] * 4
    assert [row[-1] for row in rows] == ["</s>", "</s>", "<|eot_id|>", "<unk>"]
    assert [row.count("</s>") for row in rows] == [1, 1, 0, 0]
    assert [item.labels[-1] for item in items] == [item.input_ids[-1] for item in items]


def test_an_unknown_character_at_the_end_is_no_end() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "red": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    (item,) = encode_samples([Sample("red", " é")], tokenizer)
    assert item.input_ids.tolist() == [2, 0, 1]


@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_tokens_that_reach_into_or_out_of_an_answer_are_trained(kind: str, tmp_path: Path) -> None:
    tokenizer = make_bpe() if kind == "fast" else make_slow_tokenizer(tmp_path)
    text = "It is a red square. It is blue."
    words = tokenizer.tokenize(text)
    for start, end in [(3, 8), (9, 13), (8, 19), (20, 22), (13, 17)]:
        (item,) = encode_samples([Sample(text, " No.", answered=((start, end),))], tokenizer)
        got = [int(label != IGNORE) for label in item.labels.tolist()][1 : len(words) + 1]
        # where each token of the text stands, from the texts of the tokens themselves
        expected, position = [], 0
        for number, word in enumerate(words):
            word = word.replace("▁", " ").replace("Ġ", " ")
            word = word[1:] if number == 0 and word.startswith(" ") else word
            assert text[position:].startswith(word)
            # a byte-level tokenizer does not count the space before a word in
            begin = position + (kind == "fast" and word.startswith(" ") and len(word) > 1)
            expected.append(int(position + len(word) > start and begin < end))
            position += len(word)
        assert got == expected, (start, end, words)


@pytest.mark.parametrize(("last", "trained"), [(5, "Ġis"), (6, "ĠisĠ"), (7, "ĠisĠĊ")])
def test_white_space_at_the_end_of_an_answer_is_trained(last: int, trained: str) -> None:
    tokenizer = make_bpe()
    (item,) = encode_samples([Sample("It is \nIs it", " No.", answered=((3, last),))], tokenizer)
    words = tokenizer.convert_ids_to_tokens(item.labels[item.labels != IGNORE].tolist())
    assert "".join(words) == trained + "ĠNo.</s>"


def test_an_end_that_the_tokenizer_adds_is_trained() -> None:
    tokenizer = make_bpe()
    step = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = step
    (item,) = encode_samples([Sample("It is", " red")], tokenizer)
    assert item.input_ids.tolist().count(tokenizer.eos_token_id) == 1
    assert trained_text(tokenizer, item.labels) == " red</s>"


def test_texts_of_both_kinds_keep_their_order() -> None:
    tokenizer = make_bpe()
    samples = [Sample(("<s>" if number % 3 else "") + f"{number}:", " Yes") for number in range(40)]
    items = encode_samples(samples, tokenizer)
    assert [item.sample for item in items] == samples
    assert all(item.input_ids.tolist().count(tokenizer.bos_token_id) == 1 for item in items)
