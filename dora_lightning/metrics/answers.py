"""Normal forms of short answers, under which a generated answer is compared with people's."""

from __future__ import annotations

import re
from functools import lru_cache

# contractions whose apostrophe is put back: ``dont`` -> ``don't``
_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""

# contractions that are completed where a single one of their apostrophes lacks: ``couldnt've`` -> ``couldn't've``
_MORE_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
"""


def _contractions() -> dict[str, str]:
    table = {form.replace("'", ""): form for form in _ONE_APOSTROPHE.split()}
    for form in _MORE_APOSTROPHES.split():
        marks = [position for position, character in enumerate(form) if character == "'"]
        table |= {form[:position] + form[position + 1 :]: form for position in marks}
    # the official table has this one the wrong way round; its capitalised entries never match a lower-cased word
    return table | {"somebody'd": "somebodyd"}


_CONTRACTIONS = _contractions()
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# the official pattern is (?!<=\d)(\.)(?!\d): the slip in its first group makes that group match everywhere
_PERIOD = re.compile(r"\.(?!\d)")
# the official code hands re.UNICODE, which is 32, to the place of ``count``
_PERIODS_REMOVED = 32
_COMMA_IN_NUMBER = {"official": re.compile(r"\d,\d"), "m4c": re.compile(r"\d,+(?=\d)")}


@lru_cache(maxsize=2**16)  # people's answers repeat a lot
def normalize_answer(text: str, variant: str = "official") -> str:
    r"""``text`` in the form in which answers are compared.

    Variants:
        official: punctuation, then number words, articles and contractions, as ``vqaEval.py`` of the VQA challenge
            (GT-Vision-Lab/VQA) does.
        m4c: the ``EvalAIAnswerProcessor`` of M4C that LLaVA scores TextVQA and writes VQAv2 and VizWiz submissions
            with: lower-cased without commas and question marks, ``'s`` as a word of its own, then the same steps.
        lmms: the two steps of that processor without what it does first, as lmms-eval does for VQAv2.
        vl_t5_reference: punctuation only, as VL-T5 does with people's answers.

    Raises:
        ValueError: an unknown variant.

    >>> normalize_answer("The two dogs, aint they?")
    "2 dogs ain't they"
    >>> normalize_answer("Mike's", variant="m4c")
    "mike 's"
    """
    if variant == "official":
        return _normalize_words(_normalize_punctuation(clean_answer(text), "official"))
    if variant == "m4c":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
        return _normalize_words(_normalize_punctuation(clean_answer(text), "m4c"))
    if variant == "lmms":
        return _normalize_words(_normalize_punctuation(clean_answer(text), "m4c"))
    if variant == "vl_t5_reference":
        return _normalize_punctuation(text, "official")
    raise ValueError(f"unknown variant {variant!r}; there are official, m4c, lmms and vl_t5_reference")


def clean_answer(text: str) -> str:
    r"""``text`` on one line without space around it; all that is done where people agree.

    >>> clean_answer(" A\tdog\n")
    'A dog'
    """
    return text.replace("\n", " ").replace("\t", " ").strip()


def _normalize_punctuation(text: str, comma: str) -> str:
    """A mark goes away where one of its kind is beside a space, else it becomes a space."""
    has_long_number = _COMMA_IN_NUMBER[comma].search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        if mark in text:
            goes = has_long_number or f"{mark} " in text or f" {mark}" in text
            result = result.replace(mark, "" if goes else " ")
    return _PERIOD.sub("", result, count=_PERIODS_REMOVED)


def _normalize_words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
