"""Short videos of moving shapes for VL-BART: a set that is made where it is needed, as real video files."""

from collections.abc import Mapping
from pathlib import Path

from datamodules.loading import Stage
from datamodules.moving_shapes_files import FORMAT, MovingQuestion, make_moving_shapes, read_moving_shapes
from datamodules.vl_bart.asked import AskedDataModule
from datamodules.vl_bart.records import Asked
from datamodules.vl_bart.visuals import VisualFiles, Visuals
from dora_lightning.messages import check_whole
from dora_lightning.model_cache import cache_folder
from dora_lightning.vl_bart import VLBartParts

KINDS = ("shape", "color", "direction", "first")
_SPLITS = {"train": "train", "validate": "val", "test": "test"}


class MovingShapesDataModule(AskedDataModule):
    """Which shape moves, what color it has, which way it goes, and which of two came first.

    The videos are drawn and encoded at the start, once. What is in them, and what can be answered without looking or
    without the order of the frames, is told by :func:`~datamodules.moving_shapes_files.make_moving_shapes`. Sources are
    ``moving_shapes_shape``, ``moving_shapes_color``, ``moving_shapes_direction`` and ``moving_shapes_first``; in
    training all are ``moving_shapes``, so that a batch holds all kinds.

    Args:
        tokenizer: The model, which has a vision tower, or the parts it is put together from.
        data_dir: Where the videos are made; null for the cache.
        train_videos: Videos to train on, with two or three questions each.
        val_videos: Videos of validation.
        test_videos: Videos of the test.
        frames: Frames of a video that are looked at.
        shuffled: Kinds of question that are tested again with the frames in another order, and in that order backwards,
            as the sources ``moving_shapes_<kind>_shuffled``.
        batch_size: Videos in a training batch, each with all its questions.
        eval_batch_size: Questions in a batch of validation or test.
        num_workers: Processes that decode videos. Decoded frames are kept in memory, in each process.
        seed: Seed of the videos, and of the order of training batches.

    Raises:
        ValueError: A number is out of range, or a kind of question is unknown.
        ModuleNotFoundError: PyAV is not installed (when the videos are made).
    """

    def __init__(
        self,
        tokenizer: str | VLBartParts,
        data_dir: str | None = None,
        train_videos: int = 4000,
        val_videos: int = 100,
        test_videos: int = 400,
        frames: int = 8,
        shuffled: tuple[str, ...] = ("direction", "first"),
        batch_size: int = 24,
        eval_batch_size: int = 100,
        num_workers: int = 0,
        seed: int = 42,
    ) -> None:
        super().__init__(
            tokenizer,
            batch_size,
            eval_batch_size,
            share_visuals=True,
            num_workers=num_workers,
            seed=seed,
        )
        check_whole(3, train_videos=train_videos, val_videos=val_videos, test_videos=test_videos)
        check_whole(1, frames=frames)
        for kind in shuffled:
            if kind not in KINDS:
                raise ValueError(f"shuffled: unknown kind of question {kind!r}; there are {', '.join(KINDS)}")
        self.videos: dict[Stage, int] = {"train": train_videos, "validate": val_videos, "test": test_videos}
        self.folder = Path(data_dir).expanduser() if data_dir is not None else cache_folder() / "moving-shapes"
        self.frames = frames
        self.shuffled = tuple(shuffled)

    def prepare_data(self) -> None:
        """Make the videos, on one process; those that are there are kept."""
        for stage in self.videos:
            self._made(stage)

    def asked(self, stage: Stage) -> list[Asked]:
        """The questions of one stage; those of the test that are asked again with shuffled frames come last."""
        questions = read_moving_shapes(self._made(stage), _SPLITS[stage], self.on_bad_row)
        rows = [_row(question, stage) for question in questions]
        again = [
            row._replace(source=f"{row.source}_shuffled", shuffle=2 * number + backwards)
            for number, (question, row) in enumerate(zip(questions, rows, strict=True))
            if stage == "test" and question.kind in self.shuffled
            for backwards in (0, 1)
        ]
        return rows + again

    def visuals(self) -> Mapping[str, Visuals]:
        """Videos by their paths, for each source."""
        seen = Visuals(VisualFiles(frames=self.frames), of_videos=True, keep=True)
        named = [f"moving_shapes_{kind}{suffix}" for kind in KINDS for suffix in ("", "_shuffled")]
        return dict.fromkeys(["moving_shapes", *named], seen)

    def _made(self, stage: Stage) -> Path:
        """The folder of a stage's split: one for each number and seed, so that other settings are other videos."""
        folder = self.folder / f"{self.videos[stage]}-videos-seed-{self.seed}-format-{FORMAT}"
        make_moving_shapes(folder, self.videos[stage], _SPLITS[stage], self.seed)
        return folder


def _row(question: MovingQuestion, stage: Stage) -> Asked:
    return Asked(
        source="moving_shapes" if stage == "train" else f"moving_shapes_{question.kind}",
        visuals=(str(question.video),),
        before=question.question,
        answers=((question.answer, 1.0),),
        mean_by_sample=True,
        references=(question.answer,),
        options=question.options,
        row={
            "question_id": question.question_id,
            "question": question.question,
            "kind": question.kind,
            "video_path": str(question.video),
        },
    )
