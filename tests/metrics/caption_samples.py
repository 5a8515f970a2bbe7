"""Captions made up by chance: ordinary ones, and ones with what is hard to split."""

import random

_NOUNS = ["man", "woman", "dog", "cat", "bus", "train", "child", "girl", "horse", "pizza", "bench", "skateboarder"]
_VERBS = ["rides", "eats", "holds", "watches", "jumps over", "stands beside", "sits on", "plays with", "looks at"]
_PLACES = ["street", "beach", "kitchen table", "field of grass", "snow-covered hill", "red couch", "train station"]
_ADJECTIVES = ["small", "brown", "black-and-white", "large", "young", "red", "3-year-old", "half-eaten", "old"]
_HARD = [
    "the dog's bowl",
    "two dogs' toys",
    "a child who can't swim",
    "people that aren't looking",
    'a sign that says "STOP"',
    "a sign reading 'No Parking'",
    "a man (left) and a woman (right)",
    "a clock at 10:30 a.m.",
    "a clock showing 5:45pm",
    "bus no. 52 on St. Mary's Ave.",
    "a 1950's car",
    "cars of the '60s",
    "an 18-wheeler, parked",
    "salt & pepper shakers",
    "a Dr. Pepper can; empty",
    "a woman and/or a girl",
    "a man w/ an umbrella",
    "about 50% of a pizza",
    "a $5 bill",
    "3,000 people",
    "1 1/2 sandwiches",
    "a U.S. flag",
    "they're playing, it's fun",
    "what's this?!",
    "a dog... and a cat",
    "a boy - or a girl - on a swing",
    "the #1 player",
    "a 4x4 truck",
    "a T-shirt",
    "a café\u2019s \u201cmenu\u201d",
    "O'Hare airport",
    "rock 'n' roll band",
    "building B. The door is open",
    "she cannot see",
    "a bus saying [EXPRESS]",
    "Mr. and Mrs. Smith's wedding",
    "red,white and blue kites",
    "fruit: apples, pears etc. on a plate",
    "you'll see where he'd been",
    "a man.Another man",
    "a store named AT&T on the corner",
    "a 5 ft. tall statue",
    "a dog & a cat's toy!",
]


def caption(chance: random.Random, hard: float = 0.0) -> str:
    """One caption, with something hard to split in a share ``hard`` of them."""
    words = f"a {chance.choice(_ADJECTIVES)} {chance.choice(_NOUNS)} {chance.choice(_VERBS)}"
    words += f" a {chance.choice(_NOUNS)}" if chance.random() < 0.5 else ""
    words += f" on the {chance.choice(_PLACES)}" if chance.random() < 0.7 else ""
    if chance.random() < hard:
        one = chance.choice(_HARD)
        words = chance.choice([f"{one} {words}", f"{words} {one}", f"{words}, {one}", f"{one}. {words.capitalize()}"])
    if chance.random() < 0.5:
        words = words[0].upper() + words[1:]
    return words + chance.choice(["", "", ".", " .", ". ", "!", "\n"])


def samples(count: int, people: int = 5, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Candidates with one to ``people`` references, some of which they resemble; words are parted by spaces."""
    chance = random.Random(seed)
    candidates, references = [], []
    for _ in range(count):
        texts = [" ".join(caption(chance).lower().split()) for _ in range(chance.randint(1, people))]
        words = chance.choice(texts).split()
        kept = [word for word in words if chance.random() < 0.8]
        new = " ".join(caption(chance).lower().split())
        candidates.append(chance.choice([" ".join(kept), new, " ".join(kept[:4] * 2), texts[0]]))
        references.append(texts)
    return candidates, references
