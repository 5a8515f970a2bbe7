import json
import math
from pathlib import Path
from typing import Any

import pytest

from datamodules.vl_bart.records import Subtitle
from datamodules.vl_bart.value_rows import (
    parse_span,
    read_how2qa,
    read_subtitles,
    read_tvc,
    read_tvqa,
    read_video_qa,
    read_yc2c,
)
from datamodules.vl_bart.value_sets import VALUEFiles
from tests.datamodules.vl_bart.value_examples import row, write_lines, write_value

# the examples of VALUE's DATA.md, and the first row of the how2qa_val_release.jsonl of its EvaluationTools
TVQA: dict[str, Any] = {
    "a0": "Because Sheldon is being rude.",
    "a1": "Because he doesn't like Sheldon.",
    "a2": "Because they are having an argument.",
    "a3": "Because Howard wanted to have a private meal with Raj.",
    "a4": "Because Sheldon won't loan him money for food.",
    "answer_idx": 2,
    "q": "Why is Howard ...",
    "qid": 122039,
    "show_name": "The Big Bang Theory",
    "ts": "20.16-25.12",
    "vid_name": "s03e02_seg02_clip_10",
}
HOW2QA: dict[str, Any] = {
    "vid_name": "25848",
    "ts": "36.58-58.52",
    "qid": 30351,
    "q": "What website is shown during this video?",
    "a0": "Www.lyndalepl.com.",
    "a1": "Www.plants.com.",
    "a2": "Www.lyndaleplants.com.",
    "a3": "Www.lyndale.com.",
    "answer_idx": 2,
}
TVC: dict[str, Any] = {
    "vid_name": "grey_s03e12_seg02_clip_17",
    "duration": 94.03,
    "ts": [35.73, 40.9],
    "descs": [
        {"desc": "Meredith walks into the kitchen.", "desc_id": 62633, "type": "v", "from_retrieval": True},
        {"desc": "She looks around.", "desc_id": 62634, "type": "v", "from_retrieval": False},
    ],
    "clip_id": 86602,
}
SUBTITLES: dict[str, Any] = {
    "vid_name": "house_s02e05_seg02_clip_11",
    "sub": [{"text": " Chase : That's all this is?", "start": 0.862, "end": 1.862}],
}


def files(folder: Path, rows: list[dict[str, Any]], said: list[dict[str, Any]] | None = None, **options: Any) -> Any:
    if said is None:
        said = [{"vid_name": name, "sub": []} for name in dict.fromkeys(item["vid_name"] for item in rows)]
    return VALUEFiles(
        train=str(write_lines(folder / "rows.jsonl", rows)),
        subtitles=str(write_lines(folder / "said.jsonl", said)),
        **options,
    )


def test_a_published_row_of_tvqa(tmp_path: Path) -> None:
    said = [SUBTITLES, {**SUBTITLES, "vid_name": "s03e02_seg02_clip_10"}]
    (read,) = read_tvqa(files(tmp_path, [TVQA], said), "train")
    assert (read.source, read.video, read.span) == ("tvqa", "s03e02_seg02_clip_10", (20.16, 25.12))
    assert read.question == "Why is Howard ..."
    assert read.choices == tuple(TVQA[f"a{number}"] for number in range(5))
    assert read.answer == 2
    assert read.subtitles == (Subtitle(" Chase : That's all this is?", 0.862, 1.862),)
    named = {"qid": 122039, "vid_name": "s03e02_seg02_clip_10", "ts": "20.16-25.12", "show_name": "The Big Bang Theory"}
    assert read.row == named


def test_a_published_row_of_how2qa(tmp_path: Path) -> None:
    (read,) = read_how2qa(files(tmp_path, [HOW2QA]), "train")
    assert (read.source, read.video, read.span, read.answer) == ("how2qa", "25848", (36.58, 58.52), 2)
    assert read.choices[3] == "Www.lyndale.com."
    assert len(read.choices) == 4


def test_a_published_row_of_tvc(tmp_path: Path) -> None:
    (read,) = read_tvc(files(tmp_path, [TVC]), "train")
    assert (read.source, read.video, read.span) == ("tvc", "grey_s03e12_seg02_clip_17", (35.73, 40.9))
    assert read.captions == ("Meredith walks into the kitchen.", "She looks around.")
    assert (read.question, read.choices, read.answer) == ("", (), None)
    named = {"clip_id": 86602, "vid_name": "grey_s03e12_seg02_clip_17", "ts": [35.73, 40.9], "duration": 94.03}
    assert read.row == named


def test_a_row_of_yc2c_is_about_a_whole_video(tmp_path: Path) -> None:
    clip = {"vid_name": "xHr8X2Wpmno_0", "clip_id": 3, "duration": 12.0, "descs": [{"desc": "add salt", "desc_id": 1}]}
    (read,) = read_yc2c(files(tmp_path, [clip]), "train")
    assert (read.source, read.video, read.span, read.captions) == ("yc2c", "xHr8X2Wpmno_0", None, ("add salt",))
    assert read.row == {"clip_id": 3, "vid_name": "xHr8X2Wpmno_0", "duration": 12.0}


def test_values_folder_holds_all_four(tmp_path: Path) -> None:
    videos = write_value(tmp_path, rows=6, words=12, duration=4.0)
    ann = VALUEFiles(str(tmp_path))
    readers = {"tvqa": read_tvqa, "how2qa": read_how2qa, "tvc": read_tvc, "yc2c": read_yc2c}
    for source, read in readers.items():
        splits = {split: read(ann, split) for split in ("train", "validate", "test")}  # type: ignore[arg-type]
        assert {split: len(rows) for split, rows in splits.items()} == {"train": 6, "validate": 3, "test": 3}
        rows = [item for split in splits.values() for item in split]
        assert list(dict.fromkeys(item.video for item in rows)) == videos[source]
        assert all(item.source == source and len(item.subtitles) == 4 for item in rows)
        # two rows of a video share what is said in it
        assert splits["train"][0].subtitles is splits["train"][1].subtitles
        asks = source.endswith("qa")
        known = [bool(item.captions) or item.answer is not None for item in rows]
        assert known == [True] * 9 + [False] * 3
        assert all(bool(item.choices) == asks for item in rows)
        assert [len(item.captions) for item in splits["validate"]] == [{"tvc": 4, "yc2c": 1}.get(source, 0)] * 3
    assert videos["tvqa"] == videos["tvc"]


def test_a_set_of_ones_own(tmp_path: Path) -> None:
    asked = {"vid_name": "v", "qid": "first", "q": "Which?", "a0": "this", "a1": "that", "answer_idx": 1}
    path = str(write_lines(tmp_path / "mine.jsonl", [asked]))
    (read,) = read_video_qa("shapes", VALUEFiles(test=path), "test")
    assert (read.source, read.choices, read.answer, read.span, read.subtitles) == (
        "shapes",
        ("this", "that"),
        1,
        None,
        (),
    )
    del asked["a1"]
    write_lines(tmp_path / "mine.jsonl", [asked])
    with pytest.raises(ValueError, match=r"mine.jsonl, line 1: fields 'a0', 'a1', ... must hold two .* found 1"):
        read_video_qa("shapes", VALUEFiles(test=path), "test")


@pytest.mark.parametrize(
    ("ts", "span"),
    [("20.16-25.12", (20.16, 25.12)), ("0-3", (0, 3)), (" 1.5 - 2. ", (1.5, 2)), ([0, 4.5], (0, 4.5)), ("7-7", (7, 7))],
)
def test_spans(ts: Any, span: tuple[float, float]) -> None:
    assert parse_span(ts) == span


@pytest.mark.parametrize("ts", ["nan-nan", "NaN - nan", [math.nan, math.nan]])
def test_spans_that_are_unknown(ts: Any) -> None:
    assert parse_span(ts) is None


@pytest.mark.parametrize(
    ("ts", "message"),
    [
        ("25.12-20.16", "0 <= start <= end"),
        ([3, 2], "0 <= start <= end"),
        ("-1.5-3", "0 <= start <= end"),
        ("1-nan", "0 <= start <= end"),
        ([math.nan, 2], "0 <= start <= end"),
        ([0, math.inf], "0 <= start <= end"),
        ("20.16", "'start-end' or"),
        ("1.2.3-4", "'start-end' or"),
        ([1, 2, 3], "'start-end' or"),
        ([True, 2], "'start-end' or"),
        (["1", "2"], "'start-end' or"),
        (None, "'start-end' or"),
    ],
)
def test_spans_that_are_none(ts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_span(ts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vid_name": " "}, "field 'vid_name' is blank"),
        ({"qid": None}, "field 'qid' must be a number or name, found None"),
        ({"qid": True}, "field 'qid' must be a number or name, found True"),
        ({"q": 3}, "field 'q' must be text, found int"),
        ({"a3": ""}, "field 'a3' is blank"),
        ({"a4": None}, "field 'a4' must be text"),
        ({"answer_idx": 5}, "field 'answer_idx' must be the index of one of 5 answers, found 5"),
        ({"answer_idx": -1}, "field 'answer_idx' must be"),
        ({"answer_idx": "2"}, "field 'answer_idx' must be"),
        ({"answer_idx": True}, "field 'answer_idx' must be"),
        ({"ts": "nan-nan"}, "field 'ts' gives no span, found 'nan-nan'"),
        ({"ts": "9-3"}, "field 'ts' must be a span"),
    ],
)
def test_bad_questions_are_named_or_counted(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = [TVQA, {**TVQA, **change}, TVQA]
    said = [{"vid_name": TVQA["vid_name"], "sub": []}]
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2: {message}"):
        read_tvqa(files(tmp_path, rows, said), "train")
    with pytest.warns(UserWarning, match="rows.jsonl: 1 of 3 rows were skipped; the first: .*line 2"):
        assert len(read_tvqa(files(tmp_path, rows, said), "train", "skip")) == 2


@pytest.mark.parametrize("missing", ["vid_name", "qid", "q", "a0", "a4", "ts"])
def test_a_field_that_is_missing(tmp_path: Path, missing: str) -> None:
    rows = [{name: value for name, value in TVQA.items() if name != missing}]
    with pytest.raises(ValueError, match=f"rows.jsonl, line 1: field '{missing}'"):
        read_tvqa(files(tmp_path, rows, [SUBTITLES]), "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_id": 1.5}, "field 'clip_id' must be a number or name"),
        ({"descs": "a text"}, "field 'descs' must be a list"),
        ({"descs": ["a text"]}, "field 'descs' must be a list"),
        ({"descs": [{"desc": ""}]}, "field 'desc' is blank"),
        ({"ts": [40.9, 35.73]}, "field 'ts' must be a span"),
    ],
)
def test_bad_clips(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"rows.jsonl, line 1: {message}"):
        read_tvc(files(tmp_path, [{**TVC, **change}]), "train")


def test_unknown_spans_can_be_taken_as_the_whole_video(tmp_path: Path) -> None:
    rows = [TVQA, {**TVQA, "qid": 7, "ts": "nan-nan"}]
    with pytest.warns(UserWarning, match="1 of 2 rows have no span .* whole video; the first: qid 7"):
        read = read_tvqa(files(tmp_path, rows, on_missing_span="whole"), "train")
    assert [item.span for item in read] == [(20.16, 25.12), None]
    assert read[1].row["ts"] == "nan-nan"


def test_videos_without_subtitles(tmp_path: Path) -> None:
    rows = [row("tvqa", number, "train") for number in range(6)]
    said = [{"vid_name": rows[0]["vid_name"], "sub": SUBTITLES["sub"]}]
    with pytest.raises(
        ValueError, match=r"rows.jsonl, line 3: .*said.jsonl has no subtitles of 'friends_s01e01_seg02_c"
    ):
        read_tvqa(files(tmp_path, rows, said), "train")
    with pytest.warns(UserWarning, match="4 of 6 rows were skipped"):
        assert len(read_tvqa(files(tmp_path, rows, said), "train", "skip")) == 2
    with pytest.warns(UserWarning, match=r"rows.jsonl: 2 videos have no subtitles in .*said.jsonl"):
        read = read_tvqa(files(tmp_path, rows, said, on_missing_subtitles="empty"), "train")
    assert [len(item.subtitles) for item in read] == [1, 1, 0, 0, 0, 0]


def test_without_any_subtitles(tmp_path: Path) -> None:
    path = str(write_lines(tmp_path / "rows.jsonl", [TVQA]))
    assert read_tvqa(VALUEFiles(train=path, use_subtitles=False), "train")[0].subtitles == ()
    with pytest.raises(ValueError, match=r"tvqa: give folder or subtitles, .* or set use_subtitles: false"):
        read_tvqa(VALUEFiles(train=path), "train")
    with pytest.raises(ValueError, match="tvqa: subtitles names a file, but use_subtitles is false"):
        read_tvqa(VALUEFiles(train=path, subtitles=path, use_subtitles=False), "train")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            [SUBTITLES, SUBTITLES],
            "line 2: field 'vid_name': the subtitles of 'house_s02e05_seg02_clip_11' are there twice",
        ),
        ([{**SUBTITLES, "sub": "text"}], "line 1: field 'sub' must be a list of subtitles, found 'text'"),
        (
            [{**SUBTITLES, "sub": [{"text": 1, "start": 0, "end": 1}]}],
            "line 1: field 'sub': subtitle 1 must have 'text'",
        ),
        (
            [{**SUBTITLES, "sub": [{"text": "x", "start": "0", "end": 1}]}],
            "subtitle 1 must have 'start' and 'end' in sec",
        ),
        (
            [{**SUBTITLES, "sub": [{"text": "x", "start": math.nan, "end": 1}]}],
            "subtitle 1 must have 'text', 'start' and 'end', found .*'start' holds NaN",
        ),
    ],
)
def test_bad_subtitles(tmp_path: Path, said: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_subtitles(write_lines(tmp_path / "said.jsonl", said))


def test_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tvqa: validate: no such file: .*tvqa/tvqa_val.jsonl"):
        read_tvqa(VALUEFiles(str(tmp_path)), "validate")
    with pytest.raises(
        ValueError, match="yc2c: give folder or test, the file with the annotations of the split 'test'"
    ):
        read_yc2c(VALUEFiles(), "test")
    with pytest.raises(ValueError, match="shapes: give train, the file"):
        read_video_qa("shapes", VALUEFiles(str(tmp_path)), "train")
    write_lines(tmp_path / "tvqa" / "tvqa_val.jsonl", [TVQA])
    with pytest.raises(FileNotFoundError, match=r"tvqa: subtitles: no such file: .*tv_subtitles.jsonl"):
        read_tvqa(VALUEFiles(str(tmp_path)), "validate")
    with pytest.raises(ValueError, match="split must be 'train', 'validate' or 'test', found 'val'"):
        read_tvqa(VALUEFiles(str(tmp_path)), "val")  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["on_missing_subtitles", "on_missing_span"])
def test_options_that_are_unknown(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be 'raise' or .*, found 'skip'"):
        VALUEFiles(**{option: "skip"})  # type: ignore[arg-type]


def test_examples_are_json_as_released(tmp_path: Path) -> None:
    write_value(tmp_path)
    line = json.loads((tmp_path / "tvqa" / "tvqa_train.jsonl").read_text().splitlines()[0])
    assert set(line) == set(TVQA)
    line = json.loads((tmp_path / "how2qa" / "how2qa_val_release.jsonl").read_text().splitlines()[0])
    assert set(line) == set(HOW2QA)
    line = json.loads((tmp_path / "tvc" / "tvc_train_release.jsonl").read_text().splitlines()[0])
    assert set(line) == set(TVC)
    assert set(line["descs"][0]) == set(TVC["descs"][0])
