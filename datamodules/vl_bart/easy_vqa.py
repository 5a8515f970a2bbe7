"""easy-VQA for VL-BART: questions about images of one shape, for a first run and for tests."""

from collections.abc import Mapping

from datamodules.loading import Stage
from datamodules.vl_bart.asked import AskedDataModule
from datamodules.vl_bart.easy_vqa_rows import read_easy_vqa
from datamodules.vl_bart.records import Asked
from datamodules.vl_bart.visuals import VisualFiles, Visuals
from dora_lightning.messages import check_whole
from dora_lightning.vl_bart import VLBartParts

_SOURCES = ("easy_vqa", "easy_vqa_shape", "easy_vqa_color", "easy_vqa_yes_no")


class VLBartEasyVQADataModule(AskedDataModule):
    """The package ``easy-vqa`` for a VL-BART with a vision tower; see :class:`~datamodules.EasyVQADataModule`.

    Each question is asked alone; those about one image are drawn together, and the image is looked at once.

    Args:
        tokenizer: The model, which has a vision tower, or the parts it is put together from.
        train_images: Training images, drawn by ``seed``; null for all that are not held out.
        questions_per_image: Most questions about a training image, drawn by ``seed``; null for all of them.
        val_images: Training images, drawn by ``seed``, that are held out for validation.
        val_size: Questions about them, drawn by ``seed``; null for all.
        test_size: Test questions, drawn by ``seed``; null for all 9,673.
        batch_size: Images in a training batch, each with all its questions.
        eval_batch_size: Questions in a batch of validation or test.
        num_workers: Processes that open images. Scaled images are kept in memory, in each process.
        seed: Seed of everything drawn, and of the order of training batches.

    Raises:
        ValueError: A number is out of range.
        ModuleNotFoundError: The package is not installed (when rows are read).
    """

    def __init__(
        self,
        tokenizer: str | VLBartParts,
        train_images: int | None = None,
        questions_per_image: int | None = None,
        val_images: int = 400,
        val_size: int | None = 500,
        test_size: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 200,
        num_workers: int = 0,
        seed: int = 42,
    ) -> None:
        super().__init__(
            tokenizer,
            batch_size,
            eval_batch_size,
            share_visuals=True,
            group_by_length=False,  # texts are short, and batches of one kind of question teach less
            num_workers=num_workers,
            seed=seed,
        )
        check_whole(
            1, none="all", train_images=train_images, questions_per_image=questions_per_image, test_size=test_size
        )
        check_whole(0, val_images=val_images)
        check_whole(0, none="all", val_size=val_size)
        self.rows = {
            "train_images": train_images,
            "questions_per_image": questions_per_image,
            "val_images": val_images,
            "val_size": val_size,
            "test_size": test_size,
        }

    def asked(self, stage: Stage) -> list[Asked]:
        """The questions of one stage."""
        return read_easy_vqa(stage, **self.rows, seed=self.seed)

    def visuals(self) -> Mapping[str, Visuals]:
        """Images by their paths, for each source."""
        return dict.fromkeys(_SOURCES, Visuals(VisualFiles(), of_videos=False, keep=True))
