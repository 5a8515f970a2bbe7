"""easy-VQA: a small real set of questions about images of one shape, for the quickstart and for tests."""

from typing import Literal

from datamodules.easy_vqa_questions import (
    ALL_ANSWERS,
    ANSWERS,
    EasyQuestion,
    draw_evenly,
    draw_per_image,
    hold_out,
    read_questions,
)
from datamodules.loading import Stage
from datamodules.vision import AspectRatio, VisionDataModule
from datamodules.vqa_rows import SHORT_ANSWER, VisualQuestion
from dora_lightning.data import Sample
from dora_lightning.images import IMAGE
from dora_lightning.llava_parts import LlavaParts
from dora_lightning.messages import check_whole


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
        check_whole(1, none="all", train_images=train_images, questions_per_image=questions_per_image)
        check_whole(1, none="all", questions_per_conversation=questions_per_conversation, test_size=test_size)
        check_whole(0, val_images=val_images)
        check_whole(0, none="all", val_size=val_size)
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
            return self._asked_alone(read_questions("test"), self.test_size)
        trained, held_out = hold_out(read_questions("train"), self.val_images, self.train_images, self.seed)
        return self._conversations(trained) if stage == "train" else self._asked_alone(held_out, self.val_size)

    def _asked_alone(self, questions: list[EasyQuestion], size: int | None) -> list[Sample]:
        return [self._sample(question) for question in draw_evenly(questions, size, self.seed)]

    def _sample(self, question: EasyQuestion) -> Sample:
        assert self.template is not None
        answers = ANSWERS[question.kind] if self.options == "kind" else ALL_ANSWERS
        return VisualQuestion(
            f"easy_vqa_{question.kind}",
            question.number,
            question.text,
            question.text + self.suffix,
            question.image_path,
            (question.answer,),
            options=answers,
            fields={"image_id": question.image_id},
        ).sample(self.template)

    def _conversations(self, questions: list[EasyQuestion]) -> list[Sample]:
        samples = []
        for about in draw_per_image(questions, self.questions_per_image, self.seed).values():
            length = self.questions_per_conversation or len(about)
            samples += [self._conversation(about[start : start + length]) for start in range(0, len(about), length)]
        return samples

    def _conversation(self, questions: list[EasyQuestion]) -> Sample:
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
