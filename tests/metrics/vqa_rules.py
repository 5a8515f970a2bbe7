"""The written rules of answer normalisation and soft accuracy, followed letter by letter, and answers to try them on.

Independent of the library: texts are walked through character by character, and people are left out one by one in
fractions. The table of contractions is the official one as it is written there, entry by entry.
"""

import random
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

TABLE = """
aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've couldnt've=couldn't've
didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've hadn'tve=hadn't've hasnt=hasn't
havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's Id've=I'd've
I'dve=I'd've Im=I'm Ive=I've isnt=isn't itd=it'd itd've=it'd've it'dve=it'd've itll=it'll let's=let's maam=ma'am
mightnt=mightn't mightnt've=mightn't've mightn'tve=mightn't've mightve=might've mustnt=mustn't mustve=must've
neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at
shant=shan't shed've=she'd've she'dve=she'd've she's=she's shouldve=should've shouldnt=shouldn't
shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd somebodyd've=somebody'd've
somebody'dve=somebody'd've somebodyll=somebody'll somebodys=somebody's someoned=someone'd someoned've=someone'd've
someone'dve=someone'd've someonell=someone'll someones=someone's somethingd=something'd
somethingd've=something'd've something'dve=something'd've somethingll=something'll thats=that's thered=there'd
thered've=there'd've there'dve=there'd've therere=there're theres=there's theyd=they'd theyd've=they'd've
they'dve=they'd've theyll=they'll theyre=they're theyve=they've twas='twas wasnt=wasn't wed've=we'd've
we'dve=we'd've weve=we've werent=weren't whatll=what'll whatre=what're whats=what's whatve=what've whens=when's
whered=where'd wheres=where's whereve=where've whod=who'd whod've=who'd've who'dve=who'd've wholl=who'll whos=who's
whove=who've whyll=why'll whyre=why're whys=why's wont=won't wouldve=would've wouldnt=wouldn't
wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll y'allll=y'all'll yall'd've=y'all'd've
y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've you'dve=you'd've youll=you'll youre=you're
youve=you've
"""
CONTRACTIONS = dict(entry.split("=") for entry in TABLE.split())
NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
MARKS = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")


def one_line(text: str) -> str:
    return "".join(" " if character in "\n\t" else character for character in text).strip()


def number_with_comma(text: str, several: bool) -> bool:
    for start, character in enumerate(text):
        if character == "," and start > 0 and text[start - 1].isdecimal():
            end = start + 1
            while several and end < len(text) and text[end] == ",":
                end += 1
            if end < len(text) and text[end].isdecimal():
                return True
    return False


def punctuation(text: str, several_commas: bool) -> str:
    beside_a_space = {right for left, right in pairwise(text) if left == " "}
    beside_a_space |= {left for left, right in pairwise(text) if right == " "}
    number = number_with_comma(text, several_commas)
    without_marks = []
    for character in text:
        if character not in MARKS:
            without_marks.append(character)
        elif not number and character not in beside_a_space:
            without_marks.append(" ")
    kept, removed = [], 0
    for position, character in enumerate(without_marks):
        following = without_marks[position + 1] if position + 1 < len(without_marks) else ""
        if character == "." and not following.isdecimal() and removed < 32:
            removed += 1
        else:
            kept.append(character)
    return "".join(kept)


def words(text: str) -> str:
    kept = []
    for word in text.lower().split():
        number = NUMBERS.get(word, word)
        if number not in ("a", "an", "the"):
            kept.append(CONTRACTIONS.get(number, number))
    return " ".join(kept)


def tokens(text: str) -> str:
    pieces = text.lower().replace("?", "").replace(",", "").split("'s")
    return " 's".join(pieces).strip()


def normal_form(text: str, variant: str) -> str:
    if variant == "official":
        return words(punctuation(one_line(text), several_commas=False))
    if variant == "m4c":
        return words(punctuation(one_line(tokens(text)), several_commas=True))
    if variant == "lmms":
        return words(punctuation(one_line(text), several_commas=True))
    assert variant == "vl_t5_reference"
    return punctuation(text, several_commas=False)


def soft_accuracy(prediction: str, answers: Sequence[str], variant: str) -> Fraction:
    if variant in ("official", "simplified"):
        prediction, answers = one_line(prediction), [one_line(answer) for answer in answers]
        if any(answer != answers[0] for answer in answers):
            prediction = normal_form(prediction, "official")
            answers = [normal_form(answer, "official") for answer in answers]
    elif variant == "vl_t5":
        if any(answer != answers[0] for answer in answers):
            answers = [normal_form(answer, "vl_t5_reference") for answer in answers]
        prediction = normal_form(prediction, "official")
    else:
        prediction, answers = normal_form(prediction, variant), [normal_form(answer, variant) for answer in answers]
    if variant == "simplified":
        return min(Fraction(1), Fraction(sum(answer == prediction for answer in answers), 3))
    total = Fraction(0)
    for left_out in range(len(answers)):
        matches = 0
        for person, answer in enumerate(answers):
            if person != left_out and answer == prediction:
                matches += 1
        total += min(Fraction(1), Fraction(matches, 3))
    return total / len(answers)


def random_answers(count: int, seed: int) -> list[str]:
    """Texts in which every rule has something to do, alone and together with others."""
    draw = random.Random(seed)
    vocabulary = [
        "dog",
        "Red",
        "U.S.A.",
        "3.5",
        "1,000",
        "1,,000",
        "10,5 ",
        ".5",
        "a.b",
        "Mike's",
        "o'clock",
        "5.",
        "é",
    ]
    vocabulary += [
        "",
        "...",
        "." * 40,
        "٣,٤",
        "٣.٤",
        "Id've",
        "I'dve",
        "Im",
        "let's",
        "SHE'S",
        "'s",
        "none?",
        "A",
        "An",
    ]
    vocabulary += list(CONTRACTIONS) + list(NUMBERS) * 3 + ["a", "an", "the", "The"] * 4
    between = [" "] * 6 + ["", "  ", "\t", "\n", " \n"] + [*MARKS, ".", "'", ":"] * 2 + [", ", " ,", "- ", ". ", " /"]
    texts = []
    for _ in range(count):
        text = draw.choice(["", " ", "\t", draw.choice(between)])
        for _ in range(draw.randint(0, 5)):
            word = draw.choice(vocabulary)
            text += draw.choice([word, word, word.capitalize(), word.upper()]) + draw.choice(between)
        texts.append(text)
    return texts
