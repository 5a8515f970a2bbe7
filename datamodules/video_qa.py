"""Multiple-choice questions about videos for LLaVA, which looks at frames of them."""

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from datamodules.image_checks import report_skipped
from datamodules.loading import Stage
from datamodules.rows import OnBadRow
from datamodules.subsets import drawn, permutation
from datamodules.vision import AspectRatio, VisionDataModule
from datamodules.vl_bart.records import VideoRow
from datamodules.vl_bart.value_rows import read_video_qa
from datamodules.vl_bart.value_sets import VALUEFiles, has_split
from datamodules.vqa_rows import LETTER
from dora_lightning.data import Sample
from dora_lightning.images import IMAGE
from dora_lightning.llava_parts import LlavaParts
from dora_lightning.messages import check_whole
from dora_lightning.videos import VIDEO_SUFFIXES, sample_times, video_frames, video_info

_PAST_THE_END = 0.05
"""How much of a video's length a span may go on after its end: How2QA's do, by up to 1.6 s of 60."""


@dataclass(kw_only=True)
class VideoQASet(VALUEFiles):
    """Where the questions of one data set are, see :class:`~datamodules.vl_bart.value_sets.VALUEFiles`, and its videos.

    Args:
        videos: Folder of the videos, with any folders in it; a file's name without its ending is the video's id.

    Raises:
        FileNotFoundError: There is no such folder.
    """

    videos: str

    def __post_init__(self) -> None:
        """Check the folder."""
        super().__post_init__()
        if not Path(self.videos).is_dir():
            raise FileNotFoundError(f"videos: no such folder: {self.videos}")


class VideoQADataModule(VisionDataModule):
    """TVQA, How2QA, or questions of one's own in their layout, asked about frames of the videos.

    A prompt is ``<image>`` for each frame, what is said, the question, its choices by letter, and LLaVA's request for
    the letter; the answer is the letter. Frames are those in the middle of equal parts of what the row is about. A
    sample's ``row`` holds what :class:`tasks.VideoQA` needs.

    Args:
        tokenizer: As in :class:`~datamodules.vision.VisionDataModule`.
        datasets: Name -> where it is. ``tvqa`` and ``how2qa`` are VALUE's; rows of any other name have the same fields,
            two choices or more, and may be without ``ts``.
        frames: Frames of each sample. The tokens of all of them must fit in ``cutoff_len`` and in the model's window.
        subtitles: Which of them the model reads: those of the row's ``span``, ``all`` of the video's, or ``none``.
        subtitle_words: Most words of subtitles, the first ones; so that the question is never cut off. Null for all.
        shuffle_frames: Put the frames of each sample in an order that is drawn by ``seed``: what a question is answered
            worse by then, the order of frames tells.
        limit_train: Most questions of each set to train on, drawn by ``seed``; null for all.
        limit_eval: Most questions of each set in validation and test, likewise.
        template: As in :class:`~datamodules.vision.VisionDataModule`.
        image_aspect_ratio: Likewise.
        batch_size: Likewise.
        eval_batch_size: Likewise.
        cutoff_len: Likewise.
        num_workers: Likewise.
        seed: Likewise, and of all that is drawn.
        on_bad_row: Likewise. Bad is also a row that cannot be read
            (:func:`~datamodules.vl_bart.value_rows.read_video_qa`), whose video is missing or no video, or whose span
            is of no length or ends after the video.
        group_by_length: As in :class:`~datamodules.vision.VisionDataModule`.

    Raises:
        ValueError: No data set, or a number or name that is out of range.
    """

    def __init__(
        self,
        tokenizer: str | LlavaParts,
        datasets: dict[str, VideoQASet],
        frames: int = 8,
        subtitles: Literal["span", "all", "none"] = "span",
        subtitle_words: int | None = 200,
        shuffle_frames: bool = False,
        limit_train: int | None = None,
        limit_eval: int | None = None,
        template: str = "vicuna_v1",
        image_aspect_ratio: AspectRatio = "pad",
        batch_size: int = 16,
        eval_batch_size: int = 16,
        cutoff_len: int = 4096,
        num_workers: int = 4,
        seed: int = 42,
        on_bad_row: OnBadRow = "raise",
        group_by_length: bool = True,
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
            on_bad_row=on_bad_row,
            group_by_length=group_by_length,
        )
        if not datasets:
            raise ValueError("datasets: name at least one, such as tvqa or how2qa")
        if subtitles not in ("span", "all", "none"):
            raise ValueError(f"subtitles must be 'span', 'all' or 'none', found {subtitles!r}")
        check_whole(1, none="all", subtitle_words=subtitle_words, limit_train=limit_train, limit_eval=limit_eval)
        check_whole(1, frames=frames)
        self.sets = datasets
        self.frames = frames
        self.subtitles = subtitles
        self.subtitle_words = subtitle_words
        self.shuffle_frames = shuffle_frames
        self.limit_train = limit_train
        self.limit_eval = limit_eval
        self._durations: dict[Path, float | ValueError] = {}

    def trained_inputs(self) -> dict[str, Any]:
        """See :mod:`dora_lightning.training.trained_inputs`."""
        return super().trained_inputs() | {"frames": self.frames}

    def build_samples(self, stage: Stage) -> list[Sample]:
        """The questions of a split, set by set in the order of their files; training and validation have those whose
        answers are known.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A row is bad, see ``on_bad_row``.
        """
        return [
            sample
            for name, where in self.sets.items()
            if has_split(name, where, stage)
            for sample in self._samples(name, where, stage)
        ]

    def _samples(self, name: str, where: VideoQASet, stage: Stage) -> list[Sample]:
        if self.subtitles == "none":
            where = replace(where, subtitles=None, use_subtitles=False)
        rows = read_video_qa(name, where, stage, self.on_bad_row)
        if stage != "test":
            rows = [row for row in rows if row.answer is not None]
        videos = _find_videos(Path(where.videos))
        samples: list[Sample] = []
        bad: list[str] = []
        chosen = drawn(range(len(rows)), self.limit_train if stage == "train" else self.limit_eval, self.seed)
        for place in chosen:
            try:
                samples.append(self._sample(rows[place], videos, where.videos, place))
            except ValueError as error:
                message = f"{name}, qid {rows[place].row['qid']}: {error}"
                if self.on_bad_row == "raise":
                    raise ValueError(message) from error
                bad.append(message)
        report_skipped(bad, len(chosen), "for their videos")
        return samples

    def _sample(self, row: VideoRow, videos: dict[str, list[Path]], folder: str, place: int) -> Sample:
        assert self.template is not None
        path = _the_video(row.video, videos, folder)
        span = self._span(row, path)
        times = sample_times(span, count=self.frames)
        if self.shuffle_frames:
            # a seed for each row, so that no limit changes another row's order
            times = [times[number] for number in permutation(self.frames, self.seed + 1_000_003 * (place + 1))]
        letters = string.ascii_uppercase[: len(row.choices)]
        if len(letters) < len(row.choices):
            raise ValueError(f"expected at most {len(letters)} choices, one for each letter, found {len(row.choices)}")
        text = self._text(row, span, letters)
        answer = None if row.answer is None else letters[row.answer]
        prompt, target, _ = self.template.sample_text([(text, answer)])
        return Sample(
            prompt,
            target,
            options=tuple(self.template.sample_text([(text, letter)])[1] for letter in letters),
            references=() if answer is None else (answer,),
            images=tuple(video_frames(path, times)),
            source=row.source,
            row={
                **row.row,
                "question": row.question,
                "choices": list(row.choices),
                "letters": True,
                "video": str(path),
                "frame_times": times,
            },
        )

    def _text(self, row: VideoRow, span: tuple[float, float], letters: str) -> str:
        said = [
            word
            for subtitle in row.subtitles
            if self.subtitles == "all" or (subtitle.start < span[1] and subtitle.end > span[0])
            for word in subtitle.text.split()
        ][: self.subtitle_words]
        spoken = f"Subtitles: {' '.join(said)}\n" if said else ""
        choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(letters, row.choices, strict=True))
        return f"{IMAGE * self.frames}\n{spoken}{row.question}{choices}{LETTER}"

    def _span(self, row: VideoRow, path: Path) -> tuple[float, float]:
        """What is looked at, in seconds: never anything after the end of the video."""
        if path not in self._durations:
            try:
                self._durations[path] = video_info(path).duration
            except ValueError as error:
                self._durations[path] = error
        duration = self._durations[path]
        if isinstance(duration, ValueError):
            raise ValueError(str(duration)) from duration
        if row.span is None:
            return 0.0, duration
        start, end = row.span
        if start == end:
            raise ValueError(f"field 'ts' is a span of no length, from {start} s to {end} s")
        if start >= duration or end > (1 + _PAST_THE_END) * duration:
            raise ValueError(f"field 'ts' ends at {end} s, after the end of {path}, which is {duration:.3f} s long")
        return start, min(end, duration)


def _find_videos(folder: Path) -> dict[str, list[Path]]:
    """Id -> its files; more than one is an error if it is asked for."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            found.setdefault(path.stem, []).append(path)
    return found


def _the_video(name: str, videos: dict[str, list[Path]], folder: str) -> Path:
    paths: Sequence[Path] = videos.get(name, ())
    if not paths:
        raise ValueError(f"no video {name!r} in {folder}; expected a file of that name, such as {name}.mp4")
    if len(paths) > 1:
        raise ValueError(f"two files for the video {name!r}: {paths[0]} and {paths[1]}")
    return paths[0]
