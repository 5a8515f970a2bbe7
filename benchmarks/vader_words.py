"""A real data set that a small model learns on a CPU: whether people feel a word to be positive or negative.

    pip install vaderSentiment
    python benchmarks/vader_words.py data/vader_words

VADER's lexicon (Hutto & Gilbert 2014; MIT licence) has the ratings of ten people for each of 7,500 words, from -4 to 4.
Words of a mean rating of at least 1 either way become LLM-Adapters' rows, ``FOLDER/words/train.json``, ``test.json``;
as many positive as negative ones in each. Words that begin with the same five letters (beautiful, beautify) are on one
side, so that no form of a test word is trained on.
"""

from __future__ import annotations

import argparse
import json
import random
from importlib.resources import files
from pathlib import Path

from dora_lightning.files import write_text_atomically

LABELS = ("positive", "negative")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=2000, help="words to train on")
    parser.add_argument("--test", type=int, default=1000, help="words to test on")
    options = parser.parse_args()
    beginnings: dict[str, list[tuple[str, str]]] = {}
    for word, rating in read_lexicon():
        if abs(rating) >= 1:
            beginnings.setdefault(word[:5], []).append((word, LABELS[rating < 0]))
    order = sorted(beginnings)
    random.Random(0).shuffle(order)
    words = [pair for beginning in order for pair in beginnings[beginning]]
    half = len(words) * options.train // (options.train + options.test)
    # the border is moved to where a beginning ends
    while words[half][0][:5] == words[half - 1][0][:5]:
        half += 1
    for split, some, size in (("train", words[:half], options.train), ("test", words[half:], options.test)):
        rows = balanced(some, size)
        path = options.folder / "words" / f"{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(rows, indent=1))
        print(
            f"{path}: {len(rows)} words, such as {', '.join(row['instruction'].split(chr(39))[1] for row in rows[:8])}"
        )


def read_lexicon() -> list[tuple[str, float]]:
    """Words of letters alone, with their mean rating."""
    lines = files("vaderSentiment").joinpath("vader_lexicon.txt").read_text().splitlines()
    rows = (line.split("\t") for line in lines if line.strip())
    return [(row[0], float(row[1])) for row in rows if row[0].isalpha() and row[0].isascii()]


def balanced(words: list[tuple[str, str]], size: int) -> list[dict[str, str]]:
    """``size`` rows, as many of each label, in a random order."""
    rows = []
    for label in LABELS:
        some = [word for word, its in words if its == label]
        if len(some) < size // 2:
            raise SystemExit(f"there are {len(some)} words that are {label}; {size} rows want {size // 2}")
        for word in some[: size // 2]:
            instruction = f"Is the word '{word}' positive or negative? Answer format: {'/'.join(LABELS)}"
            rows.append({"instruction": instruction, "input": "", "output": label, "answer": label})
    random.Random(1).shuffle(rows)
    return rows


if __name__ == "__main__":
    main()
