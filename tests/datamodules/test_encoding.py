import pytest
import torch
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from datamodules import IGNORE, Collator, encode_samples
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
