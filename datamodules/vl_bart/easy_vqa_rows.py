"""easy-VQA as rows of VL-BART, one for each question; a visual's id is the path of the image file."""

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
from datamodules.vl_bart.image_sets import SPLITS
from datamodules.vl_bart.records import Asked


def read_easy_vqa(
    split: Stage,
    train_images: int | None = None,
    questions_per_image: int | None = None,
    val_images: int = 400,
    val_size: int | None = 500,
    test_size: int | None = None,
    options_of_kind: bool = False,
    prompt: str = "vqa: ",
    seed: int = 42,
) -> list[Asked]:
    """The questions of the package ``easy-vqa``.

    Test questions are those of the package's test split; validation questions are about training images that are held
    out: the same questions that :class:`~datamodules.easy_vqa.EasyVQADataModule` draws.

    Args:
        split: Which of them. Training rows are all of the source ``easy_vqa``, so that a batch holds all kinds; the
            others are of ``easy_vqa_shape``, ``easy_vqa_color`` and ``easy_vqa_yes_no``.
        train_images: Training images, drawn by ``seed``; None for all that are not held out.
        questions_per_image: Most questions about a training image, drawn by ``seed``; None for all of them.
        val_images: Training images, drawn by ``seed``, that are held out for validation.
        val_size: Questions about them, drawn by ``seed``, in the proportions of the answers; None for all.
        test_size: Test questions, likewise.
        options_of_kind: Rank the answers of the question's kind alone, in place of all 13.
        prompt: What each text begins with.
        seed: Seed of everything drawn.

    Raises:
        ValueError: There is no such split, or ``val_images`` leaves no image to train on.
        ModuleNotFoundError: The package is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, found {split!r}")

    def ask(question: EasyQuestion) -> Asked:
        return Asked(
            source="easy_vqa" if split == "train" else f"easy_vqa_{question.kind}",
            visuals=(str(question.image_path),),
            before=prompt + question.text,
            answers=((question.answer, 1.0),),
            mean_by_sample=True,
            references=() if split == "train" else (question.answer,),
            options=ANSWERS[question.kind] if options_of_kind else ALL_ANSWERS,
            row={
                "question_id": question.number,
                "question": question.text,
                "image_id": question.image_id,
                "image_path": str(question.image_path),
            },
        )

    if split == "test":
        return [ask(question) for question in draw_evenly(read_questions("test"), test_size, seed)]
    trained, held_out = hold_out(read_questions("train"), val_images, train_images, seed)
    if split == "validate":
        return [ask(question) for question in draw_evenly(held_out, val_size, seed)]
    drawn = draw_per_image(trained, questions_per_image, seed)
    return [ask(question) for about in drawn.values() for question in about]
