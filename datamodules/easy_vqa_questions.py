"""The questions of the package easy-vqa, and how parts of them are drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from datamodules.subsets import permutation

ANSWERS = {
    "shape": ("circle", "rectangle", "triangle"),
    "color": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
    "yes_no": ("yes", "no"),
}
"""The 13 answers by kind of question."""

_KINDS = {answer: kind for kind, answers in ANSWERS.items() for answer in answers}
ALL_ANSWERS = tuple(_KINDS)
"""All of them."""


class EasyQuestion(NamedTuple):
    """One question of the package."""

    number: int
    """Place in the package's file."""

    text: str
    answer: str
    image_id: int
    image_path: Path

    @property
    def kind(self) -> str:
        """Which of :data:`ANSWERS` its answer is of."""
        return _KINDS[self.answer]


def read_questions(split: Literal["train", "test"]) -> list[EasyQuestion]:
    """The questions of one of the package's splits, in its order.

    Raises:
        ModuleNotFoundError: The package ``easy-vqa`` is not installed.
    """
    try:
        import easy_vqa
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "easy-VQA comes in the package easy-vqa: pip install 'dora-lightning[quickstart]'"
        ) from error
    get_questions, get_paths = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }[split]
    paths = {image: Path(path) for image, path in get_paths().items()}
    rows = zip(*get_questions(), strict=True)
    return [
        EasyQuestion(number, text, answer, image, paths[image]) for number, (text, answer, image) in enumerate(rows)
    ]


def hold_out(
    questions: Sequence[EasyQuestion], val_images: int, train_images: int | None, seed: int
) -> tuple[list[EasyQuestion], list[EasyQuestion]]:
    """Training and validation questions, about different images, each in their order.

    Args:
        questions: All of them.
        val_images: Images that are held out for validation, drawn by the seed.
        train_images: Most of the other images; None for all of them. With one seed, fewer are part of more, and
            validation stays as it is.
        seed: Seed of the draw.

    Raises:
        ValueError: ``val_images`` leaves no image to train on.
    """
    images = sorted({question.image_id for question in questions})
    if val_images >= len(images):
        raise ValueError(f"val_images={val_images} must leave something of {len(images)} training images")
    order = [images[index] for index in permutation(len(images), seed)]
    held_out, trained = set(order[:val_images]), set(order[val_images:][:train_images])
    return (
        [question for question in questions if question.image_id in trained],
        [question for question in questions if question.image_id in held_out],
    )


def draw_per_image(
    questions: Sequence[EasyQuestion], questions_per_image: int | None, seed: int
) -> dict[int, list[EasyQuestion]]:
    """Image -> so many of its questions (None for all), in a random order; images in the order of their numbers."""
    about: dict[int, list[EasyQuestion]] = {}
    for question in questions:
        about.setdefault(question.image_id, []).append(question)
    # a seed for each image, so that what is drawn of it does not depend on which others there are
    orders = {image: permutation(len(about[image]), seed + 1_000_003 * (image + 1)) for image in sorted(about)}
    return {image: [about[image][index] for index in order[:questions_per_image]] for image, order in orders.items()}


def draw_evenly(questions: Sequence[EasyQuestion], size: int | None, seed: int) -> list[EasyQuestion]:
    """So many of the questions, in their order, each answer as frequent among them as among all; None for all."""
    if size is None or size >= len(questions):
        return list(questions)
    groups: dict[str, list[int]] = {answer: [] for answer in ALL_ANSWERS}
    for index in permutation(len(questions), seed):
        groups[questions[index].answer].append(index)
    # each answer's share rounded down; what is missing goes to the largest remainders
    shares = {answer: divmod(size * len(group), len(questions)) for answer, group in groups.items()}
    missing = size - sum(whole for whole, _ in shares.values())
    topped_up = sorted(shares, key=lambda answer: -shares[answer][1])[:missing]
    chosen = [index for answer, group in groups.items() for index in group[: shares[answer][0] + (answer in topped_up)]]
    return [questions[index] for index in sorted(chosen)]
