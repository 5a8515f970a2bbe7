"""The seven evaluation sets of LLaVA-1.5 in the DoRA paper, to be tested on together."""

import difflib
from collections.abc import Callable
from pathlib import Path

import torch

from datamodules.loading import Stage
from datamodules.rows import OnBadRow
from datamodules.vision import AspectRatio, VisionDataModule
from datamodules.vqa_choice_files import read_mmbench, read_pope, read_scienceqa
from datamodules.vqa_files import read_gqa, read_textvqa, read_vizwiz, read_vqav2
from datamodules.vqa_hub import prepare_hub, read_hub
from datamodules.vqa_rows import VisualQuestion
from datamodules.vqa_sets import DATASETS, EvaluationSet, locate
from dora_lightning.data import Sample
from dora_lightning.llava_parts import LlavaParts
from dora_lightning.messages import check_whole

_FILE_READERS: dict[str, Callable[[EvaluationSet, OnBadRow], list[VisualQuestion]]] = {
    "vqav2": read_vqav2,
    "gqa": read_gqa,
    "vizwiz": read_vizwiz,
    "scienceqa": read_scienceqa,
    "textvqa": read_textvqa,
    "pope": read_pope,
    "mmbench": read_mmbench,
}
_ROTATIONS = 1_000_000  # MMBench adds multiples of it to a question's index, one for each rotation of its options


class VQADataModule(VisionDataModule):
    """VQAv2, GQA, VizWiz, ScienceQA, TextVQA, POPE and MMBench, for evaluation.

    Questions come from files or from the Hugging Face hub, see :class:`~datamodules.vqa_sets.EvaluationSet`, and are
    asked as LLaVA-1.5's published evaluation asks them. There is nothing to train on; validation has the test questions
    whose answers are known.

    Sources are the sets' names, and ``pope_random``, ``pope_popular`` and ``pope_adversarial``. A sample's ``row``
    holds what its submission file needs.

    Args:
        tokenizer: As in :class:`~datamodules.vision.VisionDataModule`.
        datasets: Names of sets, or a dict from name to where it is. A set whose place is not said is read from
            ``data_dir`` if that is given, else from the hub.
        data_dir: LLaVA's evaluation folder, ``playground/data/eval``: its ``eval.zip`` with each set's official files.
        limit: Most questions of each set (of each category of POPE), drawn by ``seed``; a question of MMBench counts
            once and comes with all its rotations.
        template: As in :class:`~datamodules.vision.VisionDataModule`.
        image_aspect_ratio: As in :class:`~datamodules.vision.VisionDataModule`.
        eval_batch_size: As in :class:`~datamodules.vision.VisionDataModule`.
        cutoff_len: As in :class:`~datamodules.vision.VisionDataModule`.
        num_workers: As in :class:`~datamodules.vision.VisionDataModule`.
        seed: Seed of what ``limit`` draws.
        on_bad_row: As in :class:`~datamodules.vision.VisionDataModule`.
        exif_rotation: As in :class:`~datamodules.vision.VisionDataModule`.

    Raises:
        ValueError: No set, one that is unknown, or one with arguments that contradict each other.
        FileNotFoundError: A file or folder is missing.
    """

    def __init__(
        self,
        tokenizer: str | LlavaParts,
        datasets: list[str] | dict[str, EvaluationSet],
        data_dir: str | None = None,
        limit: int | None = None,
        template: str = "vicuna_v1",
        image_aspect_ratio: AspectRatio = "pad",
        eval_batch_size: int = 16,
        cutoff_len: int = 2048,
        num_workers: int = 4,
        seed: int = 42,
        on_bad_row: OnBadRow = "raise",
        exif_rotation: bool = True,
    ) -> None:
        super().__init__(
            tokenizer,
            template=template,
            image_aspect_ratio=image_aspect_ratio,
            eval_batch_size=eval_batch_size,
            cutoff_len=cutoff_len,
            num_workers=num_workers,
            seed=seed,
            on_bad_row=on_bad_row,
            exif_rotation=exif_rotation,
        )
        if data_dir is not None and not Path(data_dir).is_dir():
            raise FileNotFoundError(f"data_dir {data_dir} is not a folder; expected LLaVA's folder of evaluation sets")
        if not datasets:
            raise ValueError(f"datasets: name at least one of {', '.join(DATASETS)}")
        chosen = datasets if isinstance(datasets, dict) else {name: EvaluationSet() for name in datasets}
        for name in chosen:
            if name not in DATASETS:
                close = difflib.get_close_matches(name.lower(), DATASETS, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"datasets: unknown set {name!r}.{hint} Known sets: {', '.join(DATASETS)}")
        check_whole(1, none="all", limit=limit)
        self.limit = limit
        self.sets = {name: locate(name, where, data_dir) for name, where in chosen.items()}
        self._questions: list[VisualQuestion] | None = None

    def prepare_data(self) -> None:
        """Download the data sets of the hub, on one process."""
        for name, where in self.sets.items():
            if where.hub_path is not None:
                prepare_hub(name, where)

    def build_samples(self, stage: Stage) -> list[Sample]:
        """The test questions, set by set in the order of their files; for validation those with a known answer.

        Raises:
            ValueError: The stage is training, or a row is bad (see ``on_bad_row``).
        """
        if stage == "train":
            raise ValueError("VQADataModule holds evaluation sets alone, there is nothing to train on")
        assert self.template is not None
        if self._questions is None:
            self._questions = [question for name, where in self.sets.items() for question in self._read(name, where)]
        samples = [question.sample(self.template) for question in self._questions]
        return samples if stage == "test" else [sample for sample in samples if sample.target]

    def _read(self, name: str, where: EvaluationSet) -> list[VisualQuestion]:
        if where.hub_path is None:
            questions = _FILE_READERS[name](where, self.on_bad_row)
        else:
            questions = read_hub(name, where, self.on_bad_row)
        return _draw(questions, self.limit if where.limit is None else where.limit, self.seed)


def _draw(questions: list[VisualQuestion], limit: int | None, seed: int) -> list[VisualQuestion]:
    """At most ``limit`` questions of each source, drawn by the seed, in their order; rotations stay together."""
    if limit is None:
        return questions
    groups: dict[str, dict[object, list[int]]] = {}
    for place, question in enumerate(questions):
        index = question.fields.get("index")
        key = place if index is None else index % _ROTATIONS
        groups.setdefault(question.source, {}).setdefault(key, []).append(place)
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    for of_source in groups.values():
        members = list(of_source.values())
        for number in torch.randperm(len(members), generator=generator)[:limit].tolist():
            drawn += members[number]
    return [questions[place] for place in sorted(drawn)]
