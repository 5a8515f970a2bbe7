"""Small generated data sets in the layouts that VALUE releases: annotations per split, and subtitles."""

import json
from pathlib import Path
from typing import Any

SHOWS = ("castle", "friends", "grey", "house")
COLOURS = ("red", "green", "blue", "yellow", "white", "black")
# as they are named by VALUE's download scripts, not by the code that is tested
ANNOTATIONS = {
    "tvqa": ("tvqa_train.jsonl", "tvqa_val.jsonl", "tvqa_test_release.jsonl"),
    "how2qa": ("how2qa_train_release.jsonl", "how2qa_val_release.jsonl", "how2qa_test_public_release.jsonl"),
    "tvc": ("tvc_train_release.jsonl", "tvc_val_release.jsonl", "tvc_test_release.jsonl"),
    "yc2c": ("yc2c_train_release.jsonl", "yc2c_val_release.jsonl", "yc2c_test_release.jsonl"),
}
SUBTITLES = {
    "tvqa": "tv_subtitles.jsonl",
    "how2qa": "how2_subtitles.jsonl",
    "tvc": "tv_subtitles.jsonl",
    "yc2c": "yc2_subtitles.jsonl",
}


def write_value(folder: Path, rows: int = 6, words: int = 12, duration: float = 4.0) -> dict[str, list[str]]:
    """VALUE's folder ``ann`` with all four data sets.

    Args:
        folder: Where to write.
        rows: Rows to train on; half as many, and at least two, for validation and for the test, whose answers are
            hidden. Two rows are about each video.
        words: Words in each video's subtitles.
        duration: Seconds of each video, to which spans keep.

    Returns:
        The ids of each set's videos; those of ``tvqa`` and ``tvc`` are the same.
    """
    videos: dict[str, list[str]] = {}
    for source, names in ANNOTATIONS.items():
        numbers = iter(range(10_000))
        ids: list[str] = []
        for split, name in zip(("train", "val", "test"), names, strict=True):
            count = rows if split == "train" else max(2, rows // 2)
            written = [row(source, next(numbers), split, duration) for _ in range(count)]
            ids += [written_row["vid_name"] for written_row in written]
            write_lines(folder / source / name, written)
        videos[source] = list(dict.fromkeys(ids))
        said = [subtitles(video, words, duration) for video in videos[source]]
        write_lines(folder / SUBTITLES[source], said)
    return videos


def row(source: str, number: int, split: str, duration: float = 4.0) -> dict[str, Any]:
    """A row of one of the four, about the video ``number // 2``."""
    make = {"tvqa": _tvqa, "how2qa": _how2qa, "tvc": _tvc, "yc2c": _yc2c}[source]
    return make(number, split, duration)


def subtitles(video: str, words: int, duration: float) -> dict[str, Any]:
    """A row of a file of subtitles: three words at a time, one of them in VALUE's way of naming the speaker."""
    said = [f"{COLOURS[number % len(COLOURS)]}{number}" for number in range(words)]
    lines = [" ".join(said[start : start + 3]) for start in range(0, words, 3)]
    step = duration / max(1, len(lines))
    lines[:1] = [f" Chase : {line}" for line in lines[:1]]
    return {
        "vid_name": video,
        "sub": [
            {"text": text, "start": round(place * step, 3), "end": round((place + 1) * step, 3)}
            for place, text in enumerate(lines)
        ],
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return path


def _tv_clip(number: int) -> str:
    return f"{SHOWS[number // 2 % 4]}_s01e01_seg02_clip_{number // 2:02d}"


def _span(number: int, duration: float) -> tuple[float, float]:
    return round(duration * (number % 2) / 4, 2), round(duration * (2 + number % 3) / 4, 2)


def _tvqa(number: int, split: str, duration: float) -> dict[str, Any]:
    start, end = _span(number, duration)
    choices = {f"a{place}": f"Because it is {COLOURS[(number + place) % 6]}." for place in range(5)}
    hidden = {} if split == "test" else {"answer_idx": number % 5}
    return {
        **choices,
        **hidden,
        "q": f"Why is number {number} {COLOURS[number % 6]}?",
        "qid": 122_000 + number,
        "show_name": "Castle",
        "ts": f"{start:.2f}-{end:.2f}",
        "vid_name": _tv_clip(number),
    }


def _how2qa(number: int, split: str, duration: float) -> dict[str, Any]:
    start, end = _span(number, duration)
    choices = {f"a{place}": f"{COLOURS[(number + place) % 6].capitalize()}." for place in range(4)}
    hidden = {} if split == "test" else {"answer_idx": number % 4}
    asked = {"vid_name": f"e_{number // 2}c", "ts": f"{start:.2f}-{end:.2f}", "qid": 30_000 + number}
    return {**asked, "q": f"What color is number {number}?", **choices, **hidden}


def _tvc(number: int, split: str, duration: float) -> dict[str, Any]:
    captions = {"train": 2, "val": 4, "test": 0}[split]
    described = [
        {
            "desc": f"Someone paints {COLOURS[(number + place) % 6]} on wall {number}.",
            "desc_id": 10 * number + place,
            "type": "vt",
            "from_retrieval": place == 0,
        }
        for place in range(captions)
    ]
    clip = {"vid_name": _tv_clip(number), "duration": duration, "ts": list(_span(number, duration))}
    return {**clip, **({"descs": described} if described else {}), "clip_id": 80_000 + number}


def _yc2c(number: int, split: str, duration: float) -> dict[str, Any]:
    described = [{"desc": f"add {COLOURS[number % 6]} sauce to pan {number}", "desc_id": number}]
    clip = {"vid_name": f"xHr8X2Wpmno_{number // 2}", "clip_id": number, "duration": duration}
    return clip if split == "test" else {**clip, "descs": described}
