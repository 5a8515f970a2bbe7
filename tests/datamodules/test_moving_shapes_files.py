import json
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

from datamodules import moving_shapes_files
from datamodules.moving_shapes_drawing import COLORS, DIRECTIONS, SHAPES, STEPS, Scene, draw_scenes, visits
from datamodules.moving_shapes_files import MovingQuestion, make_moving_shapes, read_moving_shapes
from dora_lightning.files.folders import MARKER
from dora_lightning.videos import VideoInfo, check_video, read_frames, sample_times

CHANCE = {"shape": 1 / 3, "color": 1 / 7, "direction": 1 / 4, "first": 1 / 2}


def pictures(path: Path, count: int = STEPS) -> np.ndarray:
    return np.stack([np.asarray(image) for image in read_frames(path, sample_times((0.0, 2.0), count=count))])


def digests(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moving")
    assert make_moving_shapes(folder, 96, "train", seed=1) == folder / "train"
    make_moving_shapes(folder, 48, "test", seed=1)
    return folder


def scenes(videos: int, split: str = "train", seed: int = 1) -> dict[str, Scene]:
    return dict(draw_scenes(videos, split, seed))


def rows(videos: int, split: str, seed: int = 1) -> list[dict]:
    return [
        row for name, scene in scenes(videos, split, seed).items() for row in moving_shapes_files._rows(name, scene)
    ]


def test_the_layout(made: Path) -> None:
    names = [f"train_{number:06d}" for number in range(96)]
    assert sorted(path.name for path in (made / "train").iterdir()) == [
        MARKER,
        "questions.jsonl",
        "settings.json",
        "videos",
    ]
    assert sorted(path.name for path in (made / "train/videos").iterdir()) == [f"{name}.mp4" for name in names]
    for name in names[:6]:
        info = check_video(made / f"train/videos/{name}.mp4", decode=True)
        assert info == VideoInfo(pytest.approx(2.0), 16, 8.0, 64, 64)
    questions = read_moving_shapes(made, "train")
    assert len({question.question_id for question in questions}) == len(questions)
    asked = Counter(question.video for question in questions)
    assert list(asked) == [made / f"train/videos/{name}.mp4" for name in names]
    assert set(asked.values()) == {2, 3}
    assert {question.kind: question.order for question in questions} == {
        "color": False,
        "direction": True,
        "shape": False,
        "first": True,
    }
    assert questions[0] == MovingQuestion(
        "direction",
        made / "train/videos/train_000000.mp4",
        "which way does the circle move?",
        "down",
        DIRECTIONS,
        True,
        "train_000000_0",
    )


def test_vocabulary_is_small(made: Path) -> None:
    words = {word for question in read_moving_shapes(made, "train") for word in re.findall(r"\w+", question.question)}
    assert words <= {
        *("what", "color", "is", "the", "which", "way", "does", "move", "shape", "moves", "came", "first", "or"),
        *(*SHAPES, *COLORS),
    }


def seen(frame: np.ndarray) -> dict[str, tuple[float, float, str]]:
    """What is to be seen of each color: x and y of its middle, and the shape, told by how it fills its box."""
    found = {}
    for color, rgb in COLORS.items():
        mask = np.abs(frame.astype(int) - rgb).max(-1) < 30
        if mask.sum() > 200:  # more than edges between other colors
            y, x = mask.nonzero()
            full = mask.sum() / ((np.ptp(x) + 1) * (np.ptp(y) + 1))
            shape = min(SHAPES, key=lambda name: abs(full - {"circle": 0.785, "square": 1.0, "triangle": 0.5}[name]))
            found[color] = (float(x.mean()), float(y.mean()), shape)
    return found


def shown_answer(question: MovingQuestion) -> str | None:
    """The answer as it is read from the frames, without the code that draws; shapes differ in color."""
    frames = [seen(frame) for frame in pictures(question.video)]
    shapes = {color: found[color][2] for found in frames for color in found}
    words = question.question.rstrip("?").split()
    if question.kind == "first":
        return next(color for found in frames for color in found)
    if question.kind == "color":
        return {shape: color for color, shape in shapes.items()}.get(words[-1])
    ((color, shape),) = shapes.items()
    if question.kind == "shape":
        return shape
    assert shape == words[4]
    x, y = np.subtract(frames[-1][color][:2], frames[0][color][:2])
    assert max(abs(x), abs(y)) > 40 > 2 > min(abs(x), abs(y))
    return ("left", "right")[int(x > 0)] if abs(x) > abs(y) else ("up", "down")[int(y > 0)]


def test_answers_are_what_the_videos_show(tmp_path: Path) -> None:
    make_moving_shapes(tmp_path, 60, "train", seed=2, size=160)
    questions = read_moving_shapes(tmp_path, "train")
    assert len(questions) == 40 * 2 + 20 * 3
    for question in questions:
        assert shown_answer(question) == question.answer, question


def accuracies(train: Iterable[dict], test: Iterable[dict], text: str) -> dict[str, float]:
    """How often the most frequent answer of training to the same text is right."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for row in train:
        counts[re.sub(text, "", row["question"])][row["answer"]] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for row in test:
        known = counts[re.sub(text, "", row["question"])].most_common(1)
        right[row["kind"]].append(row["answer"] == (known[0][0] if known else row["options"][0]))
    return {kind: float(np.mean(values)) for kind, values in right.items()}


COLOR = rf"\b({'|'.join(COLORS)})\b"


@pytest.mark.parametrize("text", ["^$", COLOR], ids=["text", "text-without-colors"])
def test_texts_alone_are_at_chance(text: str) -> None:
    found = accuracies(rows(4800, "train"), rows(2400, "test"), text)
    assert found.keys() == CHANCE.keys()
    # without the two colors it names, what came first is one of all
    chance = CHANCE | ({"first": CHANCE["color"]} if text == COLOR else {})
    for kind, accuracy in found.items():
        assert accuracy == pytest.approx(chance[kind], abs=0.025), kind


def test_answers_to_a_text_are_equally_frequent() -> None:
    counts: dict[str, Counter] = defaultdict(Counter)
    # whole decks: 24 ways of a mover, 7 colors of each shape, 42 pairs of colors
    for row in rows(3 * 24 * 7 * 3, "train"):
        kind = row["question"] if row["kind"] != "first" else "first"
        counts[kind][row["answer"]] += 1
    for text, answers in counts.items():
        assert len(answers) == (7 if "color" in text or text == "first" else 4 if "way" in text else 3)
        spread = max(answers.values()) - min(answers.values())
        # two shapes in a row have colors of one deck, whichever shapes they are
        assert spread <= (1 if "color" not in text else 25), (text, answers)


def test_first_named_is_first_in_half_of_the_questions() -> None:
    named = [row["options"].index(row["answer"]) for row in rows(402, "train") if row["kind"] == "first"]
    assert np.mean(named) == 0.5


def test_frames_without_their_order_may_be_either_way(tmp_path: Path) -> None:
    """A video shown backwards is a video of the contrary answer, to the last bit, whichever step it is sampled at."""
    for index, (name, scene) in enumerate(scenes(12).items()):
        contrary = scene.backwards()
        assert contrary.backwards() == scene
        if scene.direction is None:
            assert [shape.color for shape in contrary.shapes] == [shape.color for shape in scene.shapes][::-1]
        else:
            assert {scene.direction, contrary.direction} in ({"left", "right"}, {"up", "down"})
            assert [shape.name for shape in contrary.shapes] == [shape.name for shape in scene.shapes]
        for folder, drawn in (("forwards", scene), ("backwards", contrary)):
            moving_shapes_files._write_video(tmp_path / f"{folder}{index}.mp4", drawn, 64, 16, 8.0)
        for count in (STEPS, 2 * STEPS):
            forwards, backwards = (pictures(tmp_path / f"{way}{index}.mp4", count) for way in ("forwards", "backwards"))
            assert np.array_equal(forwards, backwards[::-1]), name


def test_either_way_is_equally_likely() -> None:
    """What the drawn scenes are like does not depend on the answer: places, sizes and times of both ways agree."""
    drawn = scenes(6000).values()
    features: dict[str, list[np.ndarray]] = defaultdict(list)
    for scene in drawn:
        shapes = scene.shapes
        if scene.direction:
            middle = np.add(shapes[0].start, shapes[0].end) / 2
            features[scene.direction].append(np.array([*middle, shapes[0].radius]))
        else:
            for place, shape in zip(("first", "second"), shapes, strict=True):
                features[place].append(np.array([*shape.start, shape.radius, len(shape.steps)]))
    backwards = [
        tuple(tuple(sorted(STEPS - 1 - step for step in steps)) for steps in reversed(visit)) for visit in visits()
    ]
    assert set(backwards) == set(visits())
    for one, other in (("left", "right"), ("up", "down"), ("first", "second")):
        a, b = np.stack(features[one]), np.stack(features[other])
        error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
        assert (np.abs(a.mean(0) - b.mean(0)) <= 3.5 * error + 1e-9).all(), (one, a.mean(0), b.mean(0))


def test_shapes_stay_in_the_picture_and_two_are_never_seen_together() -> None:
    for scene in scenes(2000).values():
        for shape in scene.shapes:
            for place in (*shape.start, *shape.end):
                assert shape.radius - 1e-9 <= place <= 1 - shape.radius + 1e-9
        if scene.direction is None:
            assert max(scene.shapes[0].steps) < min(scene.shapes[1].steps)
            assert scene.shapes[0].color != scene.shapes[1].color


def test_seed_and_split_decide_everything(tmp_path: Path, made: Path) -> None:
    make_moving_shapes(tmp_path, 96, "train", seed=1)
    assert digests(tmp_path / "train") == digests(made / "train")
    assert scenes(10, "train", 1) == scenes(10, "train", 1)
    several = [scenes(10, "train", 1), scenes(10, "test", 1), scenes(10, "train", 2)]
    drawn = [scene for some in several for scene in some.values()]
    assert len(set(drawn)) == 30
    assert list(scenes(20).values())[:10] == list(scenes(10).values())  # a larger set begins with a smaller one


def test_what_is_there_is_kept_and_other_settings_are_refused(tmp_path: Path, made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    make_moving_shapes(made, 48, "test", seed=1)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    with pytest.raises(ValueError, match=r"test: made with videos 48, not 50, seed 1, not 2; give another folder"):
        make_moving_shapes(made, 50, "test", seed=2)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"mine: the folder is there, but was not made here"):
        make_moving_shapes(tmp_path, 50, "mine", seed=2)


def test_a_killed_process_leaves_no_split(tmp_path: Path, made: Path) -> None:
    code = f"""
from pathlib import Path
from datamodules.moving_shapes_files import make_moving_shapes
make_moving_shapes(Path({str(tmp_path)!r}), 100000, "train", seed=1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob("train_000010.mp4")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
    process.wait()
    assert not (tmp_path / "train").exists()
    with pytest.raises(FileNotFoundError):
        read_moving_shapes(tmp_path, "train")
    make_moving_shapes(tmp_path, 96, "train", seed=1)
    assert digests(tmp_path / "train") == digests(made / "train")


def test_other_sizes(tmp_path: Path) -> None:
    make_moving_shapes(tmp_path, 3, "train", seed=3, size=96, frames=24, rate=12.0)
    for path in (tmp_path / "train/videos").iterdir():
        assert check_video(path, decode=True) == VideoInfo(pytest.approx(2.0), 24, 12.0, 96, 96)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"videos": 2}, "videos must be at least 3, found 2"),
        ({"size": 30}, "size must be an even number of at least 32 pixels, found 30"),
        ({"size": 65}, "size must be an even number"),
        ({"frames": 12}, "frames must be a multiple of 8, found 12"),
        ({"frames": 0}, "frames must be a multiple of 8, found 0"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"split": ""}, "split must be the name of a folder, found ''"),
        ({"split": "a/b"}, "split must be the name of a folder, found 'a/b'"),
        ({"split": ".."}, "split must be the name of a folder"),
    ],
)
def test_numbers_out_of_range(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_moving_shapes(tmp_path, **{"videos": 3, "split": "train", "seed": 0, **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": "nothing"}, "there is no video .*nothing.mp4"),
        ({"video": None}, "field 'video' must be text"),
        ({"question": " "}, "field 'question' is blank"),
        ({"options": "red"}, "field 'options' must be a list of texts, found 'red'"),
        ({"options": [1]}, r"field 'options' must be a list of texts, found \[1\]"),
        ({"answer": "cat"}, "field 'answer' must be one of .*, found 'cat'"),
        ({"order": "no"}, "field 'order' must be true or false, found 'no'"),
    ],
)
def test_bad_rows(tmp_path: Path, changes: dict, message: str) -> None:
    make_moving_shapes(tmp_path, 3, "train", seed=0)
    path = tmp_path / "train/questions.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), **changes})
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"questions.jsonl, line 2: {message}"):
        read_moving_shapes(tmp_path, "train")
    with pytest.warns(UserWarning, match=f"1 of {len(lines)} rows were skipped"):
        assert len(read_moving_shapes(tmp_path, "train", on_bad_row="skip")) == len(lines) - 1


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train/questions.jsonl: no such file"):
        read_moving_shapes(tmp_path, "train")


def test_the_ways_of_a_mover_are_all_there() -> None:
    ways = Counter(scene.direction for scene in scenes(360).values())
    assert ways == {None: 120, **dict.fromkeys(DIRECTIONS, 60)}
