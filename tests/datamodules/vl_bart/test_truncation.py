"""Cutting with a byte-level BPE tokenizer as BART's: begun by <s>, ended by </s>, a space part of the word after it."""

import random
import time

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from datamodules.vl_bart.records import Asked
from datamodules.vl_bart.truncation import fit_text

TEXT = (
    "the a to and you is of what he she that they it was in on for not with have this me we know just about here right "
    "Because Sheldon holding kitchen television refrigerator absolutely yesterday something 20.16-25.12 [Q] [TS] a0: "
    "Zoë naïve café 東京 🙂🙂 привет \u2028 \t . , ... ' s n't supercalifragilisticexpialidocious"
)
WORDS = TEXT.split(" ")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(WORDS[:34])] * 3, trainer)
    bpe.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        # like BART's, shorter than some texts
        model_max_length=64,
    )


def length(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer(text, verbose=False)["input_ids"])


def drawn(random_numbers: random.Random, most: int) -> str:
    separator = random_numbers.choice([" ", "  ", ""])
    return separator.join(random_numbers.choices(WORDS, k=random_numbers.randint(0, most)))


def asked(subtitles: str, after: str, limit: int, before: str = "[Subs] ") -> Asked:
    return Asked("tvqa", ("video",), before, subtitles, after, max_input_tokens=limit)


def whole(row: Asked) -> str:
    return row.before + row.subtitles + row.after


def test_random_texts_fit_and_keep_their_question(tokenizer: PreTrainedTokenizerFast) -> None:
    random_numbers = random.Random(0)
    cut = uncut = hopeless = 0
    for _ in range(1500):
        row = asked(
            drawn(random_numbers, 60), f" [Q] {drawn(random_numbers, 15)} tvqa: ", random_numbers.randint(3, 150)
        )
        text = fit_text(tokenizer, row)
        assert length(tokenizer, text) <= row.max_input_tokens
        if length(tokenizer, whole(row)) <= row.max_input_tokens:
            uncut += 1
            assert text == whole(row)
        elif length(tokenizer, row.before + row.after) <= row.max_input_tokens:
            cut += 1
            assert text.startswith(row.before)
            assert text.endswith(row.after)
            kept = text[len(row.before) : len(text) - len(row.after)]
            assert row.subtitles.startswith(kept)
            assert len(kept) < len(row.subtitles)
        else:
            hopeless += 1
            assert text
            assert (row.before + row.after).startswith(text)
    assert min(cut, uncut, hopeless) > 100


def test_little_more_is_cut_than_must_be(tokenizer: PreTrainedTokenizerFast) -> None:
    random_numbers = random.Random(1)
    lengths = []
    for _ in range(300):
        row = asked(" ".join(random_numbers.choices(WORDS[:34], k=80)), " [Q] what is it? tvqa: ", 60)
        lengths.append(length(tokenizer, fit_text(tokenizer, row)))
    # a word that was cut may take more tokens, and then a word more is left out
    assert max(lengths) == 60
    assert min(lengths) >= 56
    assert sum(lengths) / len(lengths) > 59.5


def test_published_truncation_cuts_the_question(tokenizer: PreTrainedTokenizerFast) -> None:
    row = asked("the television is on " * 20, " [Q] what is it? tvqa: ", 40)
    text = fit_text(tokenizer, row, "published")
    assert whole(row).startswith(text)
    assert "[Q]" not in text
    ids = tokenizer(text)["input_ids"]
    # what transformers itself leaves with truncation=True
    assert ids == tokenizer(whole(row), truncation=True, max_length=40)["input_ids"]
    assert fit_text(tokenizer, row).endswith(" [Q] what is it? tvqa: ")


def test_published_truncation_of_random_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    random_numbers = random.Random(2)
    same = 0
    for number in range(500):
        row = asked(drawn(random_numbers, 60), f" [Q] {drawn(random_numbers, 15)}", 3 + number % 90)
        text = fit_text(tokenizer, row, "published")
        assert whole(row).startswith(text)
        assert length(tokenizer, text) <= row.max_input_tokens
        published = tokenizer(whole(row), truncation=True, max_length=row.max_input_tokens)["input_ids"]
        same += tokenizer(text, verbose=False)["input_ids"] == published
    # a character of several tokens is not cut in two
    assert same > 400


def test_text_without_subtitles_is_cut_on_the_right(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Asked("vqav2", ("image",), "vqa: " + "what is the right television " * 9, max_input_tokens=20)
    text = fit_text(tokenizer, row)
    assert row.before.startswith(text)
    assert length(tokenizer, text) == 20
    assert fit_text(tokenizer, row, "published") == text


def test_subtitles_that_are_nothing_but_special(tokenizer: PreTrainedTokenizerFast) -> None:
    row = asked("</s>" * 50, " [Q] what?", 20)
    text = fit_text(tokenizer, row)
    assert text.endswith(" [Q] what?")
    assert length(tokenizer, text) <= 20


def test_what_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="truncation must be 'subtitles' or 'published', found 'left'"):
        fit_text(tokenizer, asked("", "", 9), "left")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_input_tokens=2 must be more than the 2 special tokens of every text"):
        fit_text(tokenizer, asked("", "", 2))


def test_a_hundred_thousand_rows_take_minutes(tokenizer: PreTrainedTokenizerFast) -> None:
    random_numbers = random.Random(3)
    texts = [" ".join(random_numbers.choices(WORDS[:34], k=700)) for _ in range(25)]
    assert length(tokenizer, texts[0]) > 600
    rows = [asked(text, f" [Q] what is {number}? tvqa: ", 600) for text in texts for number in range(4)]
    began = time.monotonic()
    for row in rows:
        fit_text(tokenizer, row)
    seconds = (time.monotonic() - began) * 1000
    assert seconds < 1800, f"100,000 rows would take {seconds:.0f} s"
