"""The tasks of VL-BART by name, and their options."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, NamedTuple

from datamodules.loading import Stage
from datamodules.rows import OnBadRow
from datamodules.vl_bart.image_rows import read_coco_captions, read_gqa, read_nlvr2, read_vqav2
from datamodules.vl_bart.image_sets import COCOCaptionFiles, GQAFiles, NLVR2Files, VQAv2Files
from datamodules.vl_bart.records import Asked, VideoRow
from datamodules.vl_bart.value_rows import read_how2qa, read_tvc, read_tvqa, read_yc2c
from datamodules.vl_bart.value_sets import VALUEFiles
from datamodules.vl_bart.value_text import Prompts, value_asked
from datamodules.vl_bart.visuals import VisualFiles


@dataclass
class VALUETask(VALUEFiles):
    """One of VALUE's benchmarks as VL-BART reads it.

    Args:
        prompts: ``published`` ends each text with its benchmark's prompt, ``none`` leaves it out.
    """

    prompts: Prompts = "published"


class TaskSet(NamedTuple):
    """A task: the dataclass of its options, what reads its rows, and whether they are about videos."""

    options: type[Any]
    read: Callable[[Any, Stage, int, OnBadRow], list[Asked]]
    of_videos: bool


def _value(read: Callable[[VALUEFiles, Stage, OnBadRow], list[VideoRow]]) -> TaskSet:
    def read_asked(where: VALUETask, stage: Stage, seed: int, on_bad_row: OnBadRow) -> list[Asked]:
        return value_asked(read(where, stage, on_bad_row), stage == "train", where.prompts)

    return TaskSet(VALUETask, read_asked, of_videos=True)


SETS: dict[str, TaskSet] = {
    "vqav2": TaskSet(VQAv2Files, read_vqav2, of_videos=False),
    "gqa": TaskSet(GQAFiles, read_gqa, of_videos=False),
    "nlvr2": TaskSet(NLVR2Files, read_nlvr2, of_videos=False),
    "coco_captions": TaskSet(COCOCaptionFiles, read_coco_captions, of_videos=False),
    "tvqa": _value(read_tvqa),
    "how2qa": _value(read_how2qa),
    "tvc": _value(read_tvc),
    "yc2c": _value(read_yc2c),
}
"""Name -> task."""


class TaskOptions(NamedTuple):
    """A task with its options, out of a config."""

    rows: Any
    """Where its rows are: the dataclass that its :class:`TaskSet` names."""

    visuals: VisualFiles
    batch_size: int | None


def task_options(name: str, given: Mapping[str, Any]) -> TaskOptions:
    """Sort a task's options: where its rows and its images are, and ``batch_size``.

    Args:
        name: One of :data:`SETS`.
        given: The options of the task's own dataclass, those of :class:`~datamodules.vl_bart.visuals.VisualFiles`, and
            ``batch_size``.

    Raises:
        ValueError: The task or an option is unknown, or one is missing.
        FileNotFoundError: A folder is missing.
    """
    if name not in SETS:
        raise ValueError(f"tasks: unknown task {name!r}.{_close(name, SETS)} There are {', '.join(SETS)}")
    of_rows = {field.name: field for field in fields(SETS[name].options)}
    of_visuals = {field.name for field in fields(VisualFiles)}
    of_images, of_videos = {"images", "grid_rows", "exif_rotation"}, {"videos", "video_rows", "every", "frames"}
    of_visuals -= of_images if SETS[name].of_videos else of_videos
    known = [*of_rows, *sorted(of_visuals), "batch_size"]
    for option in given:
        if option not in known:
            raise ValueError(
                f"tasks: {name}: unknown option {option!r}.{_close(option, known)} There are {', '.join(known)}"
            )
    for option, field in of_rows.items():
        if field.default is MISSING and field.default_factory is MISSING and option not in given:
            raise ValueError(f"tasks: {name}: {option} is missing")
    size = given.get("batch_size")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"tasks: {name}: batch_size must be a whole number of at least 1, found {size!r}")
    try:
        rows = SETS[name].options(**{key: value for key, value in given.items() if key in of_rows})
        visuals = VisualFiles(**{key: value for key, value in given.items() if key in of_visuals})
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"tasks: {name}: {error}") from error
    return TaskOptions(rows, visuals, size)


def _close(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
