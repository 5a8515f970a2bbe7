"""What is to be seen in moving shapes: scenes that are drawn by a seed, and their pictures."""

from collections.abc import Iterator, Sequence
from itertools import permutations, product
from typing import Generic, NamedTuple, TypeVar

import numpy as np

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


def draw_scenes(videos: int, split: str, seed: int) -> Iterator[tuple[str, Scene]]:
    """Names and scenes of a split's videos; a larger split begins with a smaller one."""
    generator = np.random.default_rng([seed, *split.encode()])
    # a deck for each text, so that its answers are equally frequent
    movers = _Deck([*product(SHAPES, DIRECTIONS, (False, True))], generator)
    pairs = _Deck([*permutations(SHAPES, 2)], generator)
    colors = {key: _Deck([*COLORS], generator) for key in product(SHAPES, (False, True))}
    two_colors = _Deck([*permutations(COLORS, 2)], generator)
    times = _Deck(visits(), generator)
    namings = _Deck([False, True], generator)
    for number in range(videos):
        background = _background(generator)
        if number % 3 == 2:
            seen = zip(pairs.deal(), two_colors.deal(), times.deal(), strict=True)
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


def pictures_of(scene: Scene, size: int) -> np.ndarray:
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


def visits() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
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


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """How far places are outside of a shape, ``[height, width]``; below 0 inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.9 * radius
    # upright, with equal sides
    return np.maximum(y - 0.5 * radius, abs(x) * 0.75**0.5 - y / 2 - 0.5 * radius)


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
