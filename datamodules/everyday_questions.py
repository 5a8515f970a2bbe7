"""Everyday questions: a small commonsense data set that is written here, word by word, and needs no download.

Five kinds of question, each about ordinary things:

``use``
    *What do people use a harp for?* - ``making music``, ``cleaning``, ``cutting`` or ``travelling``
``material``
    *What is a jam jar made of?* - ``glass``, ``wood``, ``cloth`` or ``paper``
``colour``
    *What colour is a raven?* - ``black``, ``yellow``, ``white`` or ``green``
``size``
    *Which is bigger, a goat or a fork?* - ``a goat`` or ``a fork``
``which one``
    *Which can fly, a snail or a mosquito?* - ``a snail`` or ``a mosquito``

The things of the two splits are different ones: a thing that is asked about in the test split appears nowhere in the
training split, not even in a question of another kind. What a model can carry over from training is how such questions
are asked and which answers there are to choose from; what a jam jar is made of it has to know from before.

Guessing scores at chance. Every answer of a kind is right equally often and offered as a wrong option equally often,
and the right one stands in each position equally often.

Everything is drawn with :meth:`random.Random.random`, the one generator method whose sequence Python promises to keep,
so that a seed gives the same questions on every version.

>>> row = everyday_questions("test", size=1)[0]
>>> sorted(row)
['answer', 'kind', 'options', 'question']
>>> row["answer"] in row["options"]
True
"""

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from random import Random
from typing import Any, Literal, TypeVar

Split = Literal["train", "test"]
Things = tuple[str, str]
"""Names of the training and of the test things, each separated by a comma and a space."""

T = TypeVar("T")

# The answers of the next three tables are a ring. Neighbours on it are the ones somebody could argue about (a stove
# keeps warm too, some barrels are metal), so an answer is only ever offered against the answers beyond its neighbours.

USES: dict[str, Things] = {
    "writing": ("pen, pencil, typewriter, crayon, quill", "ballpoint, piece of chalk, felt-tip"),
    "cutting": ("knife, axe, saw, lawnmower, chisel", "razor, scalpel, machete"),
    "cooking": ("oven, saucepan, stove, barbecue, frying pan", "microwave, grill, wok"),
    "keeping warm": ("coat, scarf, radiator, duvet, woolly hat", "blanket, sweater, heater"),
    "giving light": ("lamp, candle, lantern, chandelier, street lamp", "torch, beacon, bulb"),
    "telling the time": (
        "clock, alarm clock, cuckoo clock, kitchen clock, sundial",
        "wristwatch, stopwatch, hourglass",
    ),
    "making music": ("guitar, piano, violin, drum, trumpet", "flute, harp, clarinet"),
    "cleaning": ("mop, broom, sponge, duster, bar of soap", "dishwasher, toothbrush, scrubbing brush"),
    "drinking": ("cup, mug, wine glass, straw, teacup", "tumbler, goblet, beer can"),
    "carrying things": ("suitcase, basket, backpack, shopping bag, wheelbarrow", "trolley, briefcase, rucksack"),
    "travelling": ("car, train, bicycle, ship, plane", "bus, motorcycle, ferry"),
    "sitting": ("chair, sofa, stool, bench, pew", "throne, couch, recliner"),
}
"""What a thing is used for."""

MATERIALS: dict[str, Things] = {
    "wood": (
        "plank, matchstick, toothpick, log cabin, rocking chair, tree stump, bookshelf, wagon wheel, pencil, paddle",
        "rolling pin, fence post, totem pole, twig, barrel, telegraph pole",
    ),
    "metal": (
        "nail, coin, key, anchor, horseshoe, sword, needle, saucepan, bolt, trumpet",
        "screw, padlock, safety pin, cannon, spanner, chain",
    ),
    "glass": (
        "window pane, decanter, mirror, test tube, windscreen, wine bottle, prism, microscope slide, lens, monocle",
        "jam jar, fish tank, crystal ball, tumbler, greenhouse, snow globe",
    ),
    "stone": (
        "castle, pyramid, cathedral, cliff, pebble, tomb, cave, fortress, gargoyle, Roman column",
        "boulder, mountain, gravel path, ancient temple, medieval tower, sphinx",
    ),
    "cloth": (
        "shirt, curtain, towel, bed sheet, dress, flag, pillowcase, skirt, scarf, sail",
        "handkerchief, blanket, sock, apron, pair of trousers, bathrobe",
    ),
    "paper": (
        "magazine, envelope, postcard, notebook, poster, diary, dictionary, birthday card, novel, invoice",
        "receipt, concert ticket, leaflet, calendar, road map, comic",
    ),
}
"""What a thing is made of."""

COLOURS: dict[str, Things] = {
    "white": (
        "snowflake, swan, polar bear, glass of milk, snowman, wedding dress, pearl, iceberg, aspirin, lump of salt",
        "cauliflower, sugar cube, bride's veil, igloo, dove, toilet roll",
    ),
    "yellow": (
        "banana, lemon, canary, sunflower, buttercup, baby chick, rubber duck, New York taxi, duckling, smiley face",
        "daffodil, corn cob, dandelion, omelette, block of butter, bowl of custard",
    ),
    "green": (
        "cucumber, frog, lawn, pea, lettuce, pine needle, lime, emerald, crocodile, spinach leaf",
        "cactus, cabbage, blade of grass, clover, sprig of parsley, gherkin",
    ),
    "red": (
        "tomato, strawberry, fire engine, cherry, drop of blood, stop sign, ruby, boiled lobster, poppy, Santa's coat",
        "ladybird, raspberry, lipstick, ripe chilli, cranberry, holly berry",
    ),
    "black": (
        "crow, lump of coal, panther, witch's hat, judge's robe, tuxedo, gorilla, hearse, liquorice stick, top hat",
        "tyre, raven, puddle of oil, vinyl record, priest's cassock, piece of burnt toast",
    ),
    "grey": (
        "elephant, rain cloud, mouse, donkey, concrete wall, shark, pigeon, battleship, koala, slate roof",
        "rhinoceros, hippopotamus, gravestone, dolphin, wolf, pile of ash",
    ),
}
"""Which colour a thing has."""

SIZES: Sequence[Things] = (
    (
        "feather, snowflake, grain of rice, eyelash, ant, petal, drop of water",
        "flea, mosquito, pin, raindrop, postage stamp",
    ),
    ("pencil, egg, coin, teaspoon, key, biscuit, plum", "grape, screw, wasp, walnut, sock"),
    ("cup, shoe, hammer, banana, hairbrush, sandwich, apple", "fork, glove, plate, orange, tumbler"),
    ("hen, cat, laptop, frying pan, rabbit, kettle, violin", "watermelon, goose, toaster, microwave, fox"),
    ("bicycle, bathtub, mattress, table, fridge, lion, donkey", "goat, couch, pig, wardrobe, motorcycle"),
    ("car, elephant, jeep, van, shed, bull, lorry", "bus, tractor, ambulance, giraffe, combine harvester"),
    ("castle, cathedral, forest, pyramid, skyscraper, island, city", "volcano, airport, stadium, desert, mountain"),
)
"""Things from small to big; things two or more rows apart are compared."""

PROPERTIES: Sequence[tuple[Sequence[str], Things, Things]] = (
    (
        ("Which can you eat, {} or {}?", "Which is food, {} or {}?"),
        (
            "apple, carrot, sandwich, potato, biscuit, sausage, plum, strawberry, egg, lettuce",
            "grapefruit, pancake, pizza, cauliflower, cake, orange",
        ),
        (
            "brick, pencil, shoe, rock, pillow, key, candle, hammer, mirror, chair",
            "screw, padlock, couch, wristwatch, sock, blanket",
        ),
    ),
    (
        ("Which can fly, {} or {}?", "Which flies in the air, {} or {}?"),
        (
            "crow, eagle, butterfly, bee, helicopter, plane, pigeon, kite, swan, canary",
            "owl, mosquito, seagull, wasp, rocket, raven",
        ),
        (
            "cow, elephant, worm, horse, lorry, dog, whale, frog, chair, train",
            "goat, snail, tortoise, tractor, pig, wolf",
        ),
    ),
    (
        ("Which is alive, {} or {}?", "Which is a living thing, {} or {}?"),
        (
            "dog, oak, cat, horse, frog, rose, whale, ant, crocodile, sunflower",
            "goat, tulip, dolphin, spider, daffodil, fox",
        ),
        (
            "brick, hammer, pencil, clock, sofa, car, spoon, bottle, table, shirt",
            "bus, wardrobe, shovel, fork, torch, stopwatch",
        ),
    ),
)
"""Phrasings about a property, things that have it, and things that do not."""

CHOICES: Sequence[tuple[str, Sequence[str], dict[str, Things]]] = (
    ("use", ("What is {} used for?", "What do people use {} for?", "What would you need {} for?"), USES),
    ("material", ("What is {} made of?", "What is {} usually made of?", "Which material is {} made from?"), MATERIALS),
    ("colour", ("What colour is {}?", "Which colour does {} have?", "What is the colour of {}?"), COLOURS),
)
"""Kind, phrasings and answers of the questions with four options."""

SIZE_PHRASINGS = ("Which is bigger, {} or {}?", "Which is larger, {} or {}?")
KINDS = ("use", "material", "colour", "size", "which one")
"""Kinds of question, in the order in which they are drawn."""

SIZE_QUESTIONS = (60, 36)
"""Comparisons drawn for the training and for the test split: as many as there are questions of each other kind."""


def everyday_questions(split: Split, size: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Draw the questions of one split, in random order and as many of one kind as of another.

    Args:
        split: ``"train"`` or ``"test"``; no thing is asked about in both.
        size: How many questions, all that there are (300 and 180) if None.
        seed: Chooses the phrasings, the pairs to compare, the order of the options and the questions kept.

    Returns:
        Rows with the ``kind`` of question, the ``question``, its ``options`` and the ``answer``, one of the options.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    column = 0 if split == "train" else 1
    rng = Random(seed)
    kinds = [list(_choice_questions(*choice, column, rng)) for choice in CHOICES]
    kinds.append(list(_size_questions(column, rng)))
    kinds.append(list(_property_questions(column, rng)))
    available = sum(map(len, kinds))
    if size is None:
        size = available
    if not 0 <= size <= available:
        raise ValueError(f"the {split} split has {available} questions, so size cannot be {size}")
    # one of each kind in turn, so that any size has as many of one kind as of another
    turns = chain.from_iterable(zip_longest(*kinds))
    rows = [row for row in turns if row is not None][:size]
    return _shuffled(rows, rng)


def things(split: Split) -> dict[str, set[str]]:
    """Names of the things that a split asks about, per kind of question."""
    column = 0 if split == "train" else 1
    named = {kind: [table[column] for table in answers.values()] for kind, _, answers in CHOICES}
    named["size"] = [row[column] for row in SIZES]
    named["which one"] = [names[column] for _, *pair in PROPERTIES for names in pair]
    return {kind: {name for names in tables for name in names.split(", ")} for kind, tables in named.items()}


def with_article(name: str) -> str:
    """Put the indefinite article before a name.

    >>> with_article("jam jar"), with_article("oven"), with_article("hourglass")
    ('a jam jar', 'an oven', 'an hourglass')
    """
    return f"an {name}" if name.startswith(("a", "e", "i", "o", "u", "hour")) else f"a {name}"


def _choice_questions(
    kind: str, phrasings: Sequence[str], answers: dict[str, Things], column: int, rng: Random
) -> Iterator[dict[str, Any]]:
    """Ask about every thing of a table once, against three answers that are not neighbours of the right one."""
    ring = list(answers)
    beyond = len(ring) - 3
    drawn = []
    for place, answer in enumerate(ring):
        for turn, name in enumerate(_shuffled(answers[answer][column].split(", "), rng)):
            # the same steps along the ring for every answer: each is a wrong option equally often
            steps = [2 + (3 * turn + step) % beyond for step in range(3)]
            drawn.append((name, answer, [ring[(place + step) % len(ring)] for step in steps]))
    for number, (name, answer, wrong) in enumerate(_shuffled(drawn, rng)):
        options = _shuffled(wrong, rng)
        options.insert(number % 4, answer)
        question = phrasings[number // 4 % len(phrasings)].format(with_article(name))
        yield {"kind": kind, "question": question, "options": options, "answer": answer}


def _size_questions(column: int, rng: Random) -> Iterator[dict[str, Any]]:
    """Compare things at least two rows apart, each about as often as any other."""
    ranked = [(rank, name) for rank, row in enumerate(SIZES) for name in row[column].split(", ")]
    drawn: list[tuple[str, str]] = []
    while len(drawn) < SIZE_QUESTIONS[column]:
        left = _shuffled(ranked, rng)
        while left:
            rank, name = left.pop()
            partner = next((other for other in left if abs(other[0] - rank) >= 2), None)
            if partner is None:
                continue
            left.remove(partner)
            pair = (name, partner[1]) if rank > partner[0] else (partner[1], name)
            if pair not in drawn:
                drawn.append(pair)
    for number, pair in enumerate(drawn[: SIZE_QUESTIONS[column]]):
        yield _comparison("size", SIZE_PHRASINGS, number, *pair)


def _property_questions(column: int, rng: Random) -> Iterator[dict[str, Any]]:
    """Ask which of two things has a property, with every thing in two questions."""
    drawn = []
    for phrasings, having, lacking in PROPERTIES:
        right = _shuffled(having[column].split(", "), rng)
        wrong = _shuffled(lacking[column].split(", "), rng)
        for turn in range(2):
            drawn += [(phrasings, name, wrong[(place + turn) % len(wrong)]) for place, name in enumerate(right)]
    for number, (phrasings, right_name, wrong_name) in enumerate(_shuffled(drawn, rng)):
        yield _comparison("which one", phrasings, number, right_name, wrong_name)


def _comparison(kind: str, phrasings: Sequence[str], number: int, right: str, wrong: str) -> dict[str, Any]:
    """Word the question which of two things it is, with the right one named first every other time."""
    answer = with_article(right)
    options = [answer, with_article(wrong)]
    if number % 2:
        options.reverse()
    question = phrasings[number // 2 % len(phrasings)].format(*options)
    return {"kind": kind, "question": question, "options": options, "answer": answer}


def _shuffled(items: Sequence[T], rng: Random) -> list[T]:
    """Copy the items in random order; unlike ``rng.shuffle``, the order is the same on every Python version."""
    return sorted(items, key=lambda _: rng.random())
