"""Moving shapes: short videos that are drawn, and questions about them, for the video quickstart and for tests."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datamodules.moving_shapes_drawing import COLORS, DIRECTIONS, SHAPES, STEPS, Scene, draw_scenes, pictures_of
from datamodules.rows import OnBadRow, Row, convert_file, read_rows, require_field
from dora_lightning.files import write_text_atomically
from dora_lightning.model_cache import cached
from dora_lightning.videos import encode_video

FORMAT = 1
"""Goes up when the same settings give other videos or questions."""


class MovingQuestion(NamedTuple):
    """A question about a video."""

    kind: str
    """``shape``, ``color``, ``direction`` or ``first``."""

    video: Path
    question: str
    answer: str
    options: tuple[str, ...]
    """What the answer is one of."""

    order: bool
    """Whether the answer needs the order of the frames."""

    question_id: str


def make_moving_shapes(
    folder: Path, videos: int, split: str, seed: int, size: int = 64, frames: int = 16, rate: float = 8.0
) -> Path:
    """Write ``{split}/videos/{id}.mp4`` and ``{split}/questions.jsonl``, if they are not there.

    In two of three videos one shape moves:

    - ``direction``: "which way does the circle move?" (4 answers)
    - ``shape``: "which shape moves?" (3 answers), or
    - ``color``: "what color is the circle?" (7 answers)

    In the third one shape comes and goes, and then another one of another color:

    - ``first``: "which came first, red or blue?" (``red``, ``blue``)
    - ``color``, as above, of each of the two

    **What can be known without the video:** nothing. To each text its answers are equally frequent (those of ``first``
    apart from the colors it names): 33 %, 14 %, 25 % and 50 % are right by chance. Questions are to be asked alone,
    since one about the same video may name what another one asks for.

    **What can be known without the order of the frames:** all of ``shape`` and ``color``; of ``direction`` whether it
    is left or right, or up or down, so 50 % are right; of ``first`` nothing, so 50 % are right. What moves to the left,
    or comes first, is drawn as its contrary and shown backwards, and each frame is encoded by itself, so that frames
    without their order are equally likely either way. This holds for all frames, and for one of each eighth of the
    video: ``sample_times`` with ``count: 8``.

    Args:
        folder: Where the splits are.
        videos: How many, at least 3.
        split: Name of the split; different ones have different videos, whatever the seed.
        seed: Decides all that is drawn.
        size: Pixels of a side, even, at least 32.
        frames: Of a video, a multiple of 8.
        rate: Frames per second.

    Returns:
        The folder of the split, which is there whole or not at all.

    Raises:
        ValueError: A number is out of range, or the folder was made with other settings.
        ModuleNotFoundError: PyAV is not installed.
    """
    if videos < 3:
        raise ValueError(f"videos must be at least 3, found {videos}")
    if size < 32 or size % 2:
        raise ValueError(f"size must be an even number of at least 32 pixels, found {size}")
    if frames < STEPS or frames % STEPS:
        raise ValueError(f"frames must be a multiple of {STEPS}, found {frames}")
    if not 0 < rate < math.inf:
        raise ValueError(f"rate must be above 0 frames per second, found {rate}")
    if split in ("", "..") or Path(split).name != split:
        raise ValueError(f"split must be the name of a folder, found {split!r}")
    settings = {"format": FORMAT, "videos": videos, "seed": seed, "size": size, "frames": frames, "rate": rate}

    def make(made: Path) -> None:
        (made / "videos").mkdir(parents=True)
        rows = []
        for name, scene in draw_scenes(videos, split, seed):
            _write_video(made / "videos" / f"{name}.mp4", scene, size, frames, rate)
            rows += _rows(name, scene)
        write_text_atomically(made / "questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_text_atomically(made / "settings.json", json.dumps(settings))

    place = cached(folder / split, make)
    _check_settings(place, settings)
    return place


def read_moving_shapes(folder: Path, split: str, on_bad_row: OnBadRow = "raise") -> list[MovingQuestion]:
    """The questions of a split, in the order of its file.

    A row has ``question_id``, ``video``, ``kind``, ``question``, ``answer``, ``options`` and ``order``; ``video`` is a
    file's name in ``videos`` without its ending.

    Args:
        folder: As in :func:`make_moving_shapes`.
        split: As in :func:`make_moving_shapes`.
        on_bad_row: As in :func:`~datamodules.rows.convert_file`.

    Raises:
        FileNotFoundError: There is no such split.
        ValueError: A row is bad, or its video is missing.
    """
    present = {path.stem for path in (folder / split / "videos").glob("*.mp4")}

    def convert(row: Row) -> MovingQuestion:
        kind, video, question, answer, name = (
            require_field(row, field) for field in ("kind", "video", "question", "answer", "question_id")
        )
        options, order = row.get("options"), row.get("order")
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            raise ValueError(f"field 'options' must be a list of texts, found {options!r}")
        if answer not in options:
            raise ValueError(f"field 'answer' must be one of {options!r}, found {answer!r}")
        if not isinstance(order, bool):
            raise ValueError(f"field 'order' must be true or false, found {order!r}")
        path = folder / split / "videos" / f"{video}.mp4"
        if video not in present:
            raise ValueError(f"there is no video {path}")
        return MovingQuestion(kind, path, question, answer, tuple(options), order, name)

    return convert_file(folder / split / "questions.jsonl", convert, on_bad_row)


def _write_video(path: Path, scene: Scene, size: int, frames: int, rate: float) -> None:
    pictures = np.repeat(pictures_of(scene, size), frames // STEPS, axis=0)
    with open(path, "wb") as file:
        encode_video(file, pictures, rate, preset="ultrafast", entry_every=1)


def _rows(name: str, scene: Scene) -> list[Row]:
    asked: list[tuple[str, str, str, tuple[str, ...]]] = []
    if scene.direction is None:
        first, second = (shape.color for shape in scene.shapes)
        named = (second, first) if scene.later_named_first else (first, second)
        asked.append((f"which came first, {named[0]} or {named[1]}?", "first", first, named))
    else:
        mover = scene.shapes[0].name
        asked.append((f"which way does the {mover} move?", "direction", scene.direction, DIRECTIONS))
    if scene.direction is None or scene.asks_color:
        asked += [(f"what color is the {shape.name}?", "color", shape.color, tuple(COLORS)) for shape in scene.shapes]
    else:
        asked.append(("which shape moves?", "shape", scene.shapes[0].name, SHAPES))
    return [
        {
            "question_id": f"{name}_{number}",
            "video": name,
            "kind": kind,
            "question": text,
            "answer": answer,
            "options": list(options),
            "order": kind in ("direction", "first"),
        }
        for number, (text, kind, answer, options) in enumerate(asked)
    ]


def _check_settings(place: Path, settings: Row) -> None:
    path = place / "settings.json"
    if not path.is_file():
        raise ValueError(f"{place}: the folder is there, but was not made here: it has no settings.json")
    (found,) = read_rows(path)
    changed = [
        f"{name} {found.get(name)!r}, not {value!r}" for name, value in settings.items() if found.get(name) != value
    ]
    if changed:
        raise ValueError(f"{place}: made with {', '.join(changed)}; give another folder, or remove this one")
