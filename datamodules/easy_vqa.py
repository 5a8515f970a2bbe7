"""easy-VQA: a small real set of questions about images of one shape, for the quickstart and for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from datamodules.loading import Stage
from datamodules.vision import AspectRatio, VisionDataModule
from datamodules.vqa_rows import SHORT_ANSWER, VisualQuestion
from dora_lightning.data import Sample
from dora_lightning.images import IMAGE
from dora_lightning.llava_parts import LlavaParts

ANSWERS = {
    "shape": ("circle", "rectangle", "triangle"),
    "color": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
    "yes_no": ("yes", "no"),
}
"""The 13 answers by kind of question."""

_KINDS = {answer: kind for kind, answers in ANSWERS.items() for answer in answers}


class EasyVQADataModule(VisionDataModule):
    """The package ``easy-vqa``: 5,000 images of 64 x 64 pixels and 48,248 questions about their shape and colour.

    Training samples are conversations about one image, all of whose answers are trained: one pass over the tokens of an
    image trains about ten answers. An earlier answer can give a later one away, so validation and test ask each
    question alone. Sources are ``easy_vqa_shape``, ``easy_vqa_color`` and ``easy_vqa_yes_no``, by the kind of question.

    Test questions are those of the package's test split (9,673 about 1,000 images); validation questions are about
    training images that are held out.

    Args:
        tokenizer: As in :class:`~datamodules.vision.VisionDataModule`.
        train_images: Training images, drawn by ``seed``; null for all that are not held out.
        questions_per_image: Most questions about a training image, drawn by ``seed``; null for all of them.
        questions_per_conversation: Most questions in a training sample; an image with more of them is in several. Null
            for one conversation about each image.
        val_images: Training images, drawn by ``seed``, that are held out for validation.
        val_size: Questions about them, drawn by ``seed``; null for all.
        test_size: Test questions, drawn by ``seed``; null for all. Like those of validation, they keep the proportions
            that the 13 answers have.
        options: What is ranked: ``all`` 13 answers, or those of the question's ``kind``.
        short_answer_suffix: Add LLaVA's "Answer the question using a single word or phrase." to each question, in
            training too. Off, since these tokens are as many as the question's own.
        share_images: As in :class:`~datamodules.vision.VisionDataModule`; with ``questions_per_conversation: 1`` each
            question is trained on as it is tested, alone, at a third of the tokens.
        template: As in :class:`~datamodules.vision.VisionDataModule`.
        image_aspect_ratio: As in :class:`~datamodules.vision.VisionDataModule`; the images are square.
        batch_size: As in :class:`~datamodules.vision.VisionDataModule`.
        eval_batch_size: As in :class:`~datamodules.vision.VisionDataModule`.
        cutoff_len: As in :class:`~datamodules.vision.VisionDataModule`.
        num_workers: As in :class:`~datamodules.vision.VisionDataModule`.
        seed: Seed of everything drawn, and of the order of training batches.

    Raises:
        ValueError: A number is out of range.
        ModuleNotFoundError: The package is not installed (when samples are built).
    """

    def __init__(
        self,
        tokenizer: str | LlavaParts,
        train_images: int | None = None,
        questions_per_image: int | None = None,
        questions_per_conversation: int | None = None,
        val_images: int = 400,
        val_size: int | None = 500,
        test_size: int | None = None,
        options: Literal["all", "kind"] = "all",
        short_answer_suffix: bool = False,
        share_images: bool = False,
        template: str = "vicuna_v1",
        image_aspect_ratio: AspectRatio = "pad",
        batch_size: int = 16,
        eval_batch_size: int = 32,
        cutoff_len: int = 2048,
        num_workers: int = 0,
        seed: int = 42,
    ) -> None:
        super().__init__(
            tokenizer,
            template=template,
            image_aspect_ratio=image_aspect_ratio,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            cutoff_len=cutoff_len,
            num_workers=num_workers,
            seed=seed,
            share_images=share_images,
        )
        for name, number in (
            ("train_images", train_images),
            ("questions_per_image", questions_per_image),
            ("questions_per_conversation", questions_per_conversation),
            ("test_size", test_size),
        ):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, or null for all, found {number}")
        if val_images < 0:
            raise ValueError(f"val_images must be at least 0, found {val_images}")
        if val_size is not None and val_size < 0:
            raise ValueError(f"val_size must be at least 0, or null for all, found {val_size}")
        if options not in ("all", "kind"):
            raise ValueError(f"options must be 'all' or 'kind', found {options!r}")
        self.train_images = train_images
        self.questions_per_image = questions_per_image
        self.questions_per_conversation = questions_per_conversation
        self.val_images = val_images
        self.val_size = val_size
        self.test_size = test_size
        self.options = options
        self.suffix = SHORT_ANSWER if short_answer_suffix else ""

    def build_samples(self, stage: Stage) -> list[Sample]:
        """Conversations for training, single questions for validation and test.

        Raises:
            ValueError: ``val_images`` leaves no image to train on.
            ModuleNotFoundError: The package ``easy-vqa`` is not installed.
        """
        if stage == "test":
            return self._asked_alone(_read("test"), self.test_size)
        questions = _read("train")
        images = sorted({question.image_id for question in questions})
        if self.val_images >= len(images):
            raise ValueError(f"val_images={self.val_images} must leave something of {len(images)} training images")
        order = [images[index] for index in _permutation(len(images), self.seed)]
        held_out, trained = set(order[: self.val_images]), order[self.val_images :][: self.train_images]
        if stage == "validate":
            return self._asked_alone(
                [question for question in questions if question.image_id in held_out], self.val_size
            )
        return self._conversations(questions, sorted(trained))

    def _asked_alone(self, questions: list["_Question"], size: int | None) -> list[Sample]:
        if size is not None and size < len(questions):
            questions = _draw_evenly(questions, size, self.seed)
        return [self._sample(question) for question in questions]

    def _sample(self, question: "_Question") -> Sample:
        assert self.template is not None
        kind = _KINDS[question.answer]
        answers = ANSWERS[kind] if self.options == "kind" else tuple(_KINDS)
        return VisualQuestion(
            f"easy_vqa_{kind}",
            question.number,
            question.text,
            question.text + self.suffix,
            question.image_path,
            (question.answer,),
            options=answers,
            fields={"image_id": question.image_id},
        ).sample(self.template)

    def _conversations(self, questions: list["_Question"], images: Sequence[int]) -> list[Sample]:
        about: dict[int, list[_Question]] = {}
        for question in questions:
            about.setdefault(question.image_id, []).append(question)
        samples = []
        for image_id in images:
            # a seed for each image, so that its conversations do not depend on which others are trained on
            seed = self.seed + 1_000_003 * (image_id + 1)
            order = _permutation(len(about[image_id]), seed)[: self.questions_per_image]
            length = self.questions_per_conversation or len(order)
            for start in range(0, len(order), length):
                samples.append(self._conversation([about[image_id][index] for index in order[start : start + length]]))
        return samples

    def _conversation(self, questions: list["_Question"]) -> Sample:
        assert self.template is not None
        first, *rest = [(question.text + self.suffix, question.answer) for question in questions]
        turns = [(f"{IMAGE}\n{first[0]}", first[1]), *rest]
        prompt, target, answered = self.template.sample_text(turns)
        row = {
            "question_id": questions[-1].number,
            "question": questions[-1].text,
            "image_id": questions[-1].image_id,
            "image_path": str(questions[-1].image_path),
        }
        image = questions[-1].image_path
        return Sample(prompt, target, images=(image,), source="easy_vqa", row=row, answered=answered)


def _permutation(size: int, seed: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


class _Question(NamedTuple):
    number: int
    """Place in the package's file."""
    text: str
    answer: str
    image_id: int
    image_path: Path


def _read(split: Literal["train", "test"]) -> list[_Question]:
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
    return [_Question(number, text, answer, image, paths[image]) for number, (text, answer, image) in enumerate(rows)]


def _draw_evenly(questions: list[_Question], size: int, seed: int) -> list[_Question]:
    """So many of the questions, in their order, each answer as frequent among them as among all."""
    groups: dict[str, list[int]] = {answer: [] for answer in _KINDS}
    for index in _permutation(len(questions), seed):
        groups[questions[index].answer].append(index)
    # each answer's share rounded down; what is missing goes to the largest remainders
    shares = {answer: divmod(size * len(group), len(questions)) for answer, group in groups.items()}
    missing = size - sum(whole for whole, _ in shares.values())
    topped_up = sorted(shares, key=lambda answer: -shares[answer][1])[:missing]
    chosen = [index for answer, group in groups.items() for index in group[: shares[answer][0] + (answer in topped_up)]]
    return [questions[index] for index in sorted(chosen)]
