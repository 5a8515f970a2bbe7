"""VALUE's annotation files: where its download scripts put them, and what to do about what is missing in them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from datamodules.loading import Stage


class _Layout(NamedTuple):
    """Files of one benchmark in the folder ``ann``."""

    train: str
    validate: str
    test: str
    subtitles: str


# download_annotations/*.sh and DATA.md of VALUE-Leaderboard/DataRelease
_LAYOUTS = {
    "tvqa": _Layout("tvqa_train.jsonl", "tvqa_val.jsonl", "tvqa_test_release.jsonl", "tv_subtitles.jsonl"),
    "how2qa": _Layout(
        "how2qa_train_release.jsonl",
        "how2qa_val_release.jsonl",
        "how2qa_test_public_release.jsonl",
        "how2_subtitles.jsonl",
    ),
    "tvc": _Layout("tvc_train_release.jsonl", "tvc_val_release.jsonl", "tvc_test_release.jsonl", "tv_subtitles.jsonl"),
    "yc2c": _Layout(
        "yc2c_train_release.jsonl", "yc2c_val_release.jsonl", "yc2c_test_release.jsonl", "yc2_subtitles.jsonl"
    ),
}


@dataclass
class VALUEFiles:
    """Where the rows of one of VALUE's benchmarks are.

    Args:
        folder: The folder ``ann`` that VALUE's download scripts fill: ``tvqa/tvqa_train.jsonl``,
            ``how2qa/how2qa_val_release.jsonl``, ..., and ``tv_subtitles.jsonl``, ``how2_subtitles.jsonl``,
            ``yc2_subtitles.jsonl`` beside the folders.
        train: The annotations to train on, in place of the folder's.
        validate: Likewise for validation.
        test: Likewise for the test. VALUE hides the answers of its test splits, so name the validation file here for
            scores without the server.
        subtitles: The subtitles, in place of the folder's.
        use_subtitles: False to leave the subtitles out.
        on_missing_subtitles: A video that the subtitles' file does not have is a bad row (``raise``), or one in which
            nothing is said (``empty``), counted in a warning.
        on_missing_span: A row whose ``ts`` is ``nan-nan``, as some of TVQA's are, is a bad row (``raise``), or is about
            the whole video (``whole``), counted in a warning.

    Raises:
        ValueError: An option is none of those above.
    """

    folder: str | None = None
    train: str | None = None
    validate: str | None = None
    test: str | None = None
    subtitles: str | None = None
    use_subtitles: bool = True
    on_missing_subtitles: Literal["raise", "empty"] = "raise"
    on_missing_span: Literal["raise", "whole"] = "raise"

    def __post_init__(self) -> None:
        """Refuse what is unknown."""
        if self.on_missing_subtitles not in ("raise", "empty"):
            raise ValueError(f"on_missing_subtitles must be 'raise' or 'empty', found {self.on_missing_subtitles!r}")
        if self.on_missing_span not in ("raise", "whole"):
            raise ValueError(f"on_missing_span must be 'raise' or 'whole', found {self.on_missing_span!r}")


def has_split(source: str, files: VALUEFiles, split: Stage) -> bool:
    """Whether anything says where a split is; arguments as in :func:`annotation_file`."""
    return getattr(files, split) is not None or (files.folder is not None and source in _LAYOUTS)


def annotation_file(source: str, files: VALUEFiles, split: Stage) -> Path:
    """The annotations of one split.

    Args:
        source: ``tvqa``, ``how2qa``, ``tvc``, ``yc2c``, or a set of one's own, which no folder is known of.
        files: Where they are.
        split: Which of them.

    Raises:
        ValueError: The split is unknown, or nothing says where its file is.
        FileNotFoundError: There is no such file.
    """
    if split not in ("train", "validate", "test"):
        raise ValueError(f"split must be 'train', 'validate' or 'test', found {split!r}")
    named = getattr(files, split)
    if named is not None:
        return _existing(Path(named), f"{source}: {split}")
    if files.folder is None or not has_split(source, files, split):
        known = f"folder or {split}" if source in _LAYOUTS else split
        raise ValueError(f"{source}: give {known}, the file with the annotations of the split {split!r}")
    return _existing(Path(files.folder, source, getattr(_LAYOUTS[source], split)), f"{source}: {split}")


def subtitles_file(source: str, files: VALUEFiles) -> Path | None:
    """The subtitles of a benchmark, None if there are to be none; arguments as in :func:`annotation_file`.

    Raises:
        ValueError: Nothing says where they are, or a file is named and ``use_subtitles`` is False.
        FileNotFoundError: There is no such file.
    """
    if not files.use_subtitles:
        if files.subtitles is not None:
            raise ValueError(f"{source}: subtitles names a file, but use_subtitles is false")
        return None
    if files.subtitles is not None:
        return _existing(Path(files.subtitles), f"{source}: subtitles")
    if source not in _LAYOUTS:
        return None
    if files.folder is None:
        raise ValueError(f"{source}: give folder or subtitles, the file with what is said, or set use_subtitles: false")
    return _existing(Path(files.folder, _LAYOUTS[source].subtitles), f"{source}: subtitles")


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{what}: no such file: {path}; expected JSONL as VALUE releases it")
    return path
