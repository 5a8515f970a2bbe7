"""Moving shapes: short videos that are drawn, and questions about them, for the video quickstart and for tests."""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import permutations, product
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from datamodules.rows import OnBadRow, Row, convert_file, read_rows, require_field
from dora_lightning.files import write_text_atomically
from dora_lightning.model_cache import cached
from dora_lightning.videos import encode_video

T = TypeVar("T")

STEPS = 8
"""Moments of a video: whatever moves or comes does so from one to the next, and is still in between."""

SHAPES = ("circle", "square", "triangle")
COLORS = {
    "black": (15, 15, 15),
    "blue": (40, 70, 225),
    "green": (30, 160, 50),
    "orange": (245, 130, 20),
    "purple": (140, 45, 170),
    "red": (220, 25, 30),
    "yellow": (245, 220, 30),
}
DIRECTIONS = ("left", "right", "up", "down")

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
        for name, scene in _scenes(videos, split, seed):
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


class Shape(NamedTuple):
    """Something in a video. Places and sizes are parts of the picture's side, from the top left."""

    name: str
    color: str
    radius: float
    start: tuple[float, float]
    """x and y of its middle at the first step."""
    end: tuple[float, float]
    """At the last one."""
    steps: tuple[int, ...] = tuple(range(STEPS))
    """When it is to be seen."""


class Scene(NamedTuple):
    """A video: one shape that moves, or one that comes and then another one."""

    shapes: tuple[Shape, ...]
    direction: str | None
    """Where the one shape moves to; None if there are two."""
    background: tuple[tuple[float, float, float], tuple[float, float, float]]
    """Red, green and blue, 0 to 255, above and below."""
    later_named_first: bool = False
    """Whether the question what came first names the later one first."""
    asks_color: bool = False
    """Whether the color of the one shape is asked for, rather than which shape it is."""

    def backwards(self) -> "Scene":
        """What is seen if the frames are shown from the last to the first."""
        shapes = [
            shape._replace(
                start=shape.end, end=shape.start, steps=tuple(sorted(STEPS - 1 - step for step in shape.steps))
            )
            for shape in self.shapes
        ]
        if self.direction is None:
            return self._replace(shapes=tuple(reversed(shapes)))
        opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
        return self._replace(shapes=tuple(shapes), direction=opposite[self.direction])


class _Deck(Generic[T]):
    """Deals items at random, each as often as the others."""

    def __init__(self, items: Sequence[T], generator: np.random.Generator) -> None:
        self.items = items
        self.generator = generator
        self.left: list[int] = []

    def deal(self) -> T:
        if not self.left:
            self.left = self.generator.permutation(len(self.items)).tolist()
        return self.items[self.left.pop()]


def _scenes(videos: int, split: str, seed: int) -> Iterator[tuple[str, Scene]]:
    generator = np.random.default_rng([seed, *split.encode()])
    # a deck for each text, so that its answers are equally frequent
    movers = _Deck([*product(SHAPES, DIRECTIONS, (False, True))], generator)
    pairs = _Deck([*permutations(SHAPES, 2)], generator)
    colors = {key: _Deck([*COLORS], generator) for key in product(SHAPES, (False, True))}
    two_colors = _Deck([*permutations(COLORS, 2)], generator)
    visits = _Deck(_visits(), generator)
    namings = _Deck([False, True], generator)
    for number in range(videos):
        background = _background(generator)
        if number % 3 == 2:
            seen = zip(pairs.deal(), two_colors.deal(), visits.deal(), strict=True)
            shapes = tuple(_still(name, color, steps, generator) for name, color, steps in seen)
            scene = Scene(shapes, None, background, namings.deal())
        else:
            name, direction, asks_color = movers.deal()
            sideways = direction in ("left", "right")
            forwards = "right" if sideways else "down"
            shape = _mover(name, colors[name, asks_color].deal(), sideways, generator)
            scene = Scene((shape,), forwards, background, asks_color=asks_color)
            scene = scene if direction == forwards else scene.backwards()
        yield f"{split}_{number:06d}", scene


def _visits() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All ways in which two shapes are seen one after the other, for two steps at least; backwards each is one too."""
    spans = [tuple(range(start, end)) for start in range(STEPS) for end in range(start + 2, STEPS + 1)]
    return [(first, second) for first in spans for second in spans if first[-1] < second[0]]


_LEAST, _MOST = 0.16, 0.22
"""Radius of a shape."""


def _still(name: str, color: str, steps: tuple[int, ...], generator: np.random.Generator) -> Shape:
    radius = generator.uniform(_LEAST, _MOST)
    x, y = generator.uniform(radius, 1 - radius, 2).tolist()
    return Shape(name, color, radius, (x, y), (x, y), steps)


def _mover(name: str, color: str, sideways: bool, generator: np.random.Generator) -> Shape:
    """Moves to the right or down."""
    radius = generator.uniform(_LEAST, _MOST)
    length = generator.uniform(0.6, 1.0) * (1 - 2 * radius)
    begin = generator.uniform(radius, 1 - radius - length)
    across = generator.uniform(radius, 1 - radius)
    start, end = (begin, across), (begin + length, across)
    return Shape(name, color, radius, start, end) if sideways else Shape(name, color, radius, start[::-1], end[::-1])


def _background(generator: np.random.Generator) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    above = generator.uniform(205, 235) + generator.uniform(-8, 8, 3)
    below = above + generator.uniform(-12, 12)
    return tuple(above.tolist()), tuple(below.tolist())


def _write_video(path: Path, scene: Scene, size: int, frames: int, rate: float) -> None:
    pictures = np.repeat(_draw(scene, size), frames // STEPS, axis=0)
    with open(path, "wb") as file:
        encode_video(file, pictures, rate, preset="ultrafast", entry_every=1)


def _draw(scene: Scene, size: int) -> np.ndarray:
    """The pictures of all steps, uint8 ``[STEPS, size, size, 3]``, with smooth edges."""
    rows = np.linspace(*scene.background, size)
    pixels = np.broadcast_to(rows[:, None], (STEPS, size, size, 3)).copy()
    places = (np.arange(size) + 0.5) / size
    for shape in scene.shapes:
        for step in shape.steps:
            x, y = np.array(shape.start) + (np.array(shape.end) - shape.start) * step / (STEPS - 1)
            distance = _distance(shape.name, (places - x)[None, :], (places - y)[:, None], shape.radius)
            inside = np.clip(0.5 - distance * size, 0, 1)[..., None]
            pixels[step] += inside * (np.array(COLORS[shape.color]) - pixels[step])
    return pixels.round().astype(np.uint8)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """How far places are outside of a shape, ``[height, width]``; below 0 inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.9 * radius
    # upright, with equal sides
    return np.maximum(y - 0.5 * radius, abs(x) * 0.75**0.5 - y / 2 - 0.5 * radius)


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
