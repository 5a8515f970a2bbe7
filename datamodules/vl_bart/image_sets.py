"""Where VL-BART's image tasks are read from: the options of VQAv2, GQA, NLVR2 and COCO captions."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datamodules.loading import Stage
from dora_lightning.messages import check_whole

SPLITS: tuple[Stage, ...] = ("train", "validate", "test")


@dataclass
class ImageSet:
    """What the options of all the sets share.

    Args:
        folder: The set's folder; names of files are relative to it.
        prompts: ``published`` begins each text with the task's prompt, ``none`` leaves it out.
        limit_train: Most rows to train on, drawn by the seed; with one seed, a smaller limit's rows are part of a
            larger one's. Null for all.
        limit_eval: Most rows of validation and of test, likewise.

    Raises:
        ValueError: An option has a value that it cannot have.
    """

    folder: str
    prompts: Literal["published", "none"] = "published"
    limit_train: int | None = None
    limit_eval: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.prompts not in ("published", "none"):
            raise ValueError(f"prompts must be 'published' or 'none', found {self.prompts!r}")
        check_whole(1, none="all", limit_train=self.limit_train, limit_eval=self.limit_eval)
        for name in SPLITS:
            self._check_names(name)

    def prompt(self, published: str) -> str:
        """The task's prompt, if texts begin with it."""
        return published if self.prompts == "published" else ""

    def limit(self, split: Stage) -> int | None:
        """Most rows of a split."""
        return self.limit_train if split == "train" else self.limit_eval

    def files(self, split: Stage) -> list[Path]:
        """The files with the rows of a split.

        Raises:
            ValueError: There is no such split, or it has no file.
            FileNotFoundError: A file or the folder is missing.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, found {split!r}")
        return self._existing(self._names(split), split)

    def _names(self, split: Stage) -> list[str]:
        return getattr(self, split)

    def _check_names(self, option: str) -> None:
        names = getattr(self, option, None)
        if names is not None and (not isinstance(names, list) or not all(isinstance(name, str) for name in names)):
            raise ValueError(f"{option} must be a list of files, found {names!r}")

    def _existing(self, names: list[str], option: str) -> list[Path]:
        if not Path(self.folder).is_dir():
            raise FileNotFoundError(f"folder {self.folder}: no such folder; expected one with {', '.join(names)}")
        if not names:
            raise ValueError(f"{option}: expected at least one file of {self.folder}")
        paths = [Path(self.folder, name) for name in names]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{option}: {path}: no such file")
        return paths


@dataclass
class VQAv2Files(ImageSet):
    """VQAv2 in VL-T5's files: lists of ``{"question_id", "img_id", "sent", "label": {answer: score}}``.

    Args:
        train: Files of the rows to train on.
        validate: Files of the rows to validate on.
        test: Files of the rows to test on.
        annotations: VQAv2's official files with each question's ten answers, which validation and test are scored
            with. All images of Karpathy's validation and test splits are of val2014. Empty for rows without known
            answers.
    """

    train: list[str] = field(default_factory=lambda: ["karpathy_train.json"])
    validate: list[str] = field(default_factory=lambda: ["karpathy_val.json"])
    test: list[str] = field(default_factory=lambda: ["karpathy_test.json"])
    annotations: list[str] = field(default_factory=lambda: ["v2_mscoco_val2014_annotations.json"])

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self._check_names("annotations")

    def annotation_files(self) -> list[Path]:
        """The official files with the answers.

        Raises:
            FileNotFoundError: One of them is missing.
        """
        return self._existing(self.annotations, "annotations") if self.annotations else []


@dataclass
class GQAFiles(ImageSet):
    """GQA in VL-T5's files: lists of ``{"question_id", "img_id", "sent", "label": {answer: 1.0}}``.

    The published run trains on ``[train.json, valid.json]`` and validates on ``testdev.json``, whose best epoch it
    reports; by default the three are kept apart.

    Args:
        train: Files of the rows to train on.
        validate: Files of the rows to validate on.
        test: Files of the rows to test on.
    """

    train: list[str] = field(default_factory=lambda: ["train.json"])
    validate: list[str] = field(default_factory=lambda: ["valid.json"])
    test: list[str] = field(default_factory=lambda: ["testdev.json"])


@dataclass
class NLVR2Files(ImageSet):
    """NLVR2 in VL-T5's files or those of the official release, whose rows can stand in one folder and be mixed.

    Consistency is over the pairs of images that share a sentence: under ``limit_eval`` it sees only those that were
    drawn, and is not the official one.

    Args:
        train: Files of the rows to train on; ``train.json`` if null.
        validate: Files of the rows to validate on; if null ``valid.json``, or the official ``dev.json``.
        test: Files of the rows to test on; if null ``test.json``, or the official ``test1.json``.
    """

    train: list[str] | None = None
    validate: list[str] | None = None
    test: list[str] | None = None

    def _names(self, split: Stage) -> list[str]:
        named: list[str] | None = getattr(self, split)
        if named is not None:
            return named
        ours, official = {
            "train": ("train.json", "train.json"),
            "validate": ("valid.json", "dev.json"),
            "test": ("test.json", "test1.json"),
        }[split]
        only_official = not Path(self.folder, ours).is_file() and Path(self.folder, official).is_file()
        return [official if only_official else ours]


@dataclass
class COCOCaptionFiles(ImageSet):
    """COCO captions in Karpathy's one file, whose rows name their split.

    Args:
        annotations: The file.
    """

    annotations: str = "dataset_coco.json"

    def _names(self, split: Stage) -> list[str]:
        return [self.annotations]
