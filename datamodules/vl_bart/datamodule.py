"""VL-BART's tasks, one or several at once: questions about images and videos, statements, captions."""

from collections.abc import Mapping
from typing import Any

from datamodules.loading import Stage
from datamodules.rows import OnBadRow
from datamodules.vl_bart.asked import AskedDataModule
from datamodules.vl_bart.records import Asked
from datamodules.vl_bart.sets import SETS, task_options
from datamodules.vl_bart.truncation import Truncation
from datamodules.vl_bart.visuals import Visuals
from dora_lightning.vl_bart import VLBartParts


class VLBartDataModule(AskedDataModule):
    """VQAv2, GQA, NLVR2 and COCO captions, or TVQA, How2QA, TVC and YC2C, alone or mixed.

    Each batch is of one task, with that task's batch size; an epoch goes through all batches of all tasks once,
    shuffled together. Batches are those of :class:`~dora_lightning.backbones.DoRAVLBart`. A target of VQAv2 or GQA is
    drawn anew in each epoch, in proportion to its answers' scores.

    Args:
        tokenizer: The model, a folder or hub id, or the parts it is put together from.
        tasks: Name of a task -> its options: where its rows are (the dataclass of its data set, such as
            :class:`~datamodules.vl_bart.image_sets.VQAv2Files`), what they look at
            (:class:`~datamodules.vl_bart.visuals.VisualFiles`: ``features``, or ``images`` or ``videos`` for a model
            with a tower), and ``batch_size``, where it is another than the one for all.
        batch_size: As in :class:`~datamodules.vl_bart.asked.AskedDataModule`.
        eval_batch_size: Likewise.
        truncation: Likewise.
        share_visuals: Likewise.
        group_by_length: Likewise.
        keep_pixels: Keep the scaled pixels of images and frames in memory, so that each file is decoded once.
        num_workers: As in :class:`~datamodules.vl_bart.asked.AskedDataModule`.
        seed: Likewise, and of what limits draw.
        on_bad_row: Likewise.

    Raises:
        ValueError: No task, an unknown task or option, or options that do not go together.
        FileNotFoundError: A folder is missing.
    """

    def __init__(
        self,
        tokenizer: str | VLBartParts,
        tasks: dict[str, dict[str, Any]],
        batch_size: int = 32,
        eval_batch_size: int = 64,
        truncation: Truncation = "subtitles",
        share_visuals: bool = False,
        group_by_length: bool = True,
        keep_pixels: bool = False,
        num_workers: int = 0,
        seed: int = 42,
        on_bad_row: OnBadRow = "raise",
    ) -> None:
        super().__init__(
            tokenizer,
            batch_size,
            eval_batch_size,
            truncation,
            share_visuals,
            group_by_length,
            num_workers,
            seed,
            on_bad_row,
        )
        if not tasks:
            raise ValueError(f"tasks: name at least one of {', '.join(SETS)}")
        self.options = {name: task_options(name, given) for name, given in tasks.items()}
        self.keep_pixels = keep_pixels

    def asked(self, stage: Stage) -> list[Asked]:
        """The rows of one stage, of all tasks; an empty list if there are none."""
        return [
            row
            for name, options in self.options.items()
            for row in SETS[name].read(options.rows, stage, self.seed, self.on_bad_row)
        ]

    def visuals(self) -> Mapping[str, Visuals]:
        """Source of rows -> what opens what they look at."""
        return {
            name: Visuals(options.visuals, SETS[name].of_videos, self.keep_pixels)
            for name, options in self.options.items()
        }

    def batch_sizes(self) -> Mapping[str, int]:
        """Source of rows -> its batch size, where it is another than :attr:`batch_size`."""
        return {name: options.batch_size for name, options in self.options.items() if options.batch_size is not None}
