"""Answer normalisation: worked by hand from the official rules, and against the rules followed letter by letter."""

import pytest
from vqa_rules import CONTRACTIONS, normal_form, random_answers

from dora_lightning.metrics import normalize_answer

VARIANTS = ["official", "m4c", "lmms", "vl_t5_reference"]

# what LLaVA's own processor gave for these
M4C = {
    "A dog.": "dog",
    "3.5": "3.5",
    "1,000": "1000",
    "Two cats": "2 cats",
    "U.S.A.": "usa",
    "red/blue": "red blue",
    "Mike's": "mike 's",
    "a.b 2.5 .": "ab 2.5",
}

# worked by hand; the reason beside each
OFFICIAL = {
    "": "",
    "  Two\n": "2",
    "None": "0",
    "zero": "0",
    "Ten": "10",
    "eleven": "eleven",
    "one hundred": "1 hundred",
    "onetwo": "onetwo",
    "a": "",
    "The an A": "",
    "answer a": "answer",
    "theatre": "theatre",
    "U.S.A.": "usa",
    "3.5": "3.5",
    ".5": ".5",
    "3.": "3",
    "v1.x": "v1x",
    "5 . 5": "5 5",
    "..5": ".5",
    "red/blue": "red blue",  # no space beside a slash: it becomes one
    "red / blue": "red blue",  # a space beside it: it goes, the spaces stay and are joined
    "red /blue": "red blue",
    "red/blue /": "redblue",  # one slash beside a space, so all of them go
    "t-shirt": "t shirt",
    "t-shirt - red": "tshirt red",
    "1,000": "1000",
    "1,000-2,000": "10002000",  # with a number like this every mark goes
    "1,000 red/blue": "1000 redblue",
    "a,b": "b",  # the comma becomes a space, then the a is an article
    "a, b": "b",
    "x,y": "x y",
    "x , y": "x y",
    "1, 2": "1 2",
    "12:30": "12:30",  # a colon and an apostrophe are no marks
    "10 o'clock": "10 o'clock",
    "10 oclock": "10 o'clock",
    "what's up?": "what's up",
    "yes!": "yes",
    "'yes'": "'yes'",
    "$5.00": "$5.00",
    "5%": "5%",
    "dont": "don't",
    "DONT": "don't",
    "don't": "don't",
    "dont.": "don't",
    "dont-know": "don't know",
    "im": "im",  # the table has Im, which no lower-cased word is
    "ive": "ive",
    "somebody'd": "somebodyd",
    "couldntve": "couldntve",
    "couldnt've": "couldn't've",
    "one of the dogs isnt": "1 of dogs isn't",
    "a\tdog": "dog",
    "t-shirt-\tred": "tshirt red",  # a tab or a line's end is a space before marks are looked at
    "t-shirt\n-red": "tshirt red",
    "two\nthree": "2 3",
    "." * 40: "." * 8,  # 32 are removed
    "a" + "." * 33: "a.",
    "a" + "." * 32: "",
}


@pytest.mark.parametrize(("text", "expected"), M4C.items())
def test_m4c_as_llava(text: str, expected: str) -> None:
    assert normalize_answer(text, "m4c") == expected


@pytest.mark.parametrize(("text", "expected"), OFFICIAL.items())
def test_official_by_hand(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected == normal_form(text, "official")


@pytest.mark.parametrize(
    ("text", "official", "m4c", "lmms", "vl_t5_reference"),
    [
        ("Mike's", "mike's", "mike 's", "mike's", "Mike's"),
        ("what?no", "what no", "whatno", "what no", "what no"),
        ("x,y", "x y", "xy", "x y", "x y"),
        ("1,,000-5", "1 000 5", "1000 5", "10005", "1  000 5"),
        ("1,000-5", "10005", "1000 5", "10005", "10005"),
        ("Two dogs.", "2 dogs", "2 dogs", "2 dogs", "Two dogs"),
        (" the\tdont\n", "don't", "don't", "don't", " the\tdont\n"),
        ("whats's", "whats's", "what's 's", "whats's", "whats's"),
    ],
)
def test_variants_by_hand(text: str, official: str, m4c: str, lmms: str, vl_t5_reference: str) -> None:
    got = [normalize_answer(text, variant) for variant in VARIANTS]
    assert got == [official, m4c, lmms, vl_t5_reference]


@pytest.mark.parametrize(("written", "completed"), CONTRACTIONS.items())
def test_every_entry_of_the_official_table(written: str, completed: str) -> None:
    if written != written.lower():  # never matches a lower-cased word
        completed = written.lower()
    assert normalize_answer(written) == completed
    assert normalize_answer(f"the {written.upper()}, two") == f"{completed} 2"


def test_the_official_table_has_no_entries_beside_those() -> None:
    for word in ("shed", "wed", "id", "ill", "its", "were", "well", "lets", "hell", "somebodyd", "itd'd", "couldntve"):
        assert normalize_answer(word) == word
    assert len(CONTRACTIONS) == 120


@pytest.mark.parametrize("variant", VARIANTS)
def test_hundreds_of_generated_answers(variant: str) -> None:
    texts = random_answers(1000, seed=0)
    assert {text: normalize_answer(text, variant) for text in texts} == {
        text: normal_form(text, variant) for text in texts
    }
    # the texts give every variant something to do
    assert sum(normalize_answer(text, variant) != text for text in texts) > 500


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown variant 'evalai'; there are official, m4c, lmms and vl_t5_reference"):
        normalize_answer("dog", "evalai")
