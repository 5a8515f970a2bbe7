"""VALUE's annotations and subtitles, as they are released, read into :class:`~datamodules.vl_bart.records.VideoRow`.

Layouts: ``DATA.md`` of VALUE-Leaderboard/DataRelease.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from datamodules.loading import Stage
from datamodules.rows import OnBadRow, Row, convert_file, require_field
from datamodules.vl_bart.records import Subtitle, VideoRow
from datamodules.vl_bart.value_sets import VALUEFiles, annotation_file, subtitles_file

_TIME = r"(nan|[-+]?\d+(?:\.\d*)?)"
_SPAN = re.compile(rf"\s*{_TIME}\s*-\s*{_TIME}\s*", re.IGNORECASE)
_CHOICES = {"tvqa": 5, "how2qa": 4}


def read_tvqa(files: VALUEFiles, split: Stage, on_bad_row: OnBadRow = "raise") -> list[VideoRow]:
    """TVQA: five answers a question; see :func:`read_video_qa`."""
    return read_video_qa("tvqa", files, split, on_bad_row)


def read_how2qa(files: VALUEFiles, split: Stage, on_bad_row: OnBadRow = "raise") -> list[VideoRow]:
    """How2QA: four answers a question; see :func:`read_video_qa`."""
    return read_video_qa("how2qa", files, split, on_bad_row)


def read_tvc(files: VALUEFiles, split: Stage, on_bad_row: OnBadRow = "raise") -> list[VideoRow]:
    """TVC: spans of TV clips, each with 2 captions in training and 4 in validation; see :func:`read_captions`."""
    return read_captions("tvc", files, split, on_bad_row)


def read_yc2c(files: VALUEFiles, split: Stage, on_bad_row: OnBadRow = "raise") -> list[VideoRow]:
    """YouCook2's captions, each of a whole clip; see :func:`read_captions`."""
    return read_captions("yc2c", files, split, on_bad_row)


def read_video_qa(source: str, files: VALUEFiles, split: Stage, on_bad_row: OnBadRow = "raise") -> list[VideoRow]:
    """Multiple-choice questions about videos.

    A row is ``{"vid_name": ..., "qid": ..., "q": ..., "a0": ..., "a1": ..., "answer_idx": 2, "ts": "20.16-25.12"}``;
    ``answer_idx`` is missing or null where it is hidden.

    Args:
        source: ``tvqa``, ``how2qa``, or the name of a set of one's own in the same layout: with two answers or more,
            and with or without ``ts``.
        files: Where the rows are.
        split: Which of them.
        on_bad_row: As in :func:`~datamodules.rows.convert_file`. A bad row is one with a field missing or of a wrong
            kind, an answer that is none of the choices, a span that is reversed, negative or no numbers, or a video
            without subtitles or span if ``files`` says so.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file or a row is bad; the message names the file, the row and the field.
    """

    def convert(row: Row, video: str) -> VideoRow:
        choices = _choices(row, _CHOICES.get(source))
        kept = _fields(row, "qid", "vid_name", "ts", "show_name")
        return VideoRow(
            source, video, question=require_field(row, "q"), choices=choices, answer=_answer(row, choices), row=kept
        )

    return _read(source, files, split, on_bad_row, "qid", convert, needs_span=source in _CHOICES)


def read_captions(source: str, files: VALUEFiles, split: Stage, on_bad_row: OnBadRow = "raise") -> list[VideoRow]:
    """Clips to be described; arguments and errors as in :func:`read_video_qa`.

    A row is ``{"vid_name": ..., "clip_id": ..., "duration": 94.03, "ts": [35.73, 40.9], "descs": [{"desc": ...}]}``;
    YC2C's have no ``ts``, and ``descs`` is missing or empty where the captions are hidden.
    """

    def convert(row: Row, video: str) -> VideoRow:
        kept = _fields(row, "clip_id", "vid_name", "ts", "duration")
        return VideoRow(source, video, captions=_captions(row), row=kept)

    return _read(source, files, split, on_bad_row, "clip_id", convert, needs_span=source == "tvc")


def read_subtitles(path: str | Path, on_bad_row: OnBadRow = "raise") -> dict[str, tuple[Subtitle, ...]]:
    """What is said in each video, from rows ``{"vid_name": ..., "sub": [{"text": ..., "start": 0.8, "end": 1.8}]}``.

    Args:
        path: The file.
        on_bad_row: As in :func:`~datamodules.rows.convert_file`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A row is bad, or a video is there twice.
    """
    found: dict[str, tuple[Subtitle, ...]] = {}

    def convert(row: Row) -> None:
        video = require_field(row, "vid_name")
        if video in found:
            raise ValueError(f"field 'vid_name': the subtitles of {video!r} are there twice")
        said = row.get("sub")
        if not isinstance(said, list):
            raise ValueError(f"field 'sub' must be a list of subtitles, found {said!r:.80}")
        found[video] = tuple(_subtitle(item, number) for number, item in enumerate(said, start=1))

    convert_file(path, convert, on_bad_row)
    return found


def parse_span(ts: Any) -> tuple[float, float] | None:
    """``(start, end)`` in seconds of a field ``ts``, None if it says that they are unknown.

    >>> parse_span("20.16-25.12"), parse_span([35.73, 40.9]), parse_span("nan-nan")
    ((20.16, 25.12), (35.73, 40.9), None)

    Raises:
        ValueError: It is neither ``"start-end"`` nor ``[start, end]``, or is reversed or negative.
    """
    if isinstance(ts, str) and (match := _SPAN.fullmatch(ts)):
        start, end = float(match[1]), float(match[2])
    elif isinstance(ts, Sequence) and not isinstance(ts, str) and len(ts) == 2 and all(map(_is_number, ts)):
        start, end = map(float, ts)
    else:
        raise ValueError(f"field 'ts' must be 'start-end' or [start, end] in seconds, found {ts!r:.80}")
    if math.isnan(start) and math.isnan(end):
        return None
    # not a number, or without end, compares as neither
    if not 0 <= start <= end < math.inf:
        raise ValueError(f"field 'ts' must be a span with 0 <= start <= end, found {ts!r}")
    return start, end


def _read(
    source: str,
    files: VALUEFiles,
    split: Stage,
    on_bad_row: OnBadRow,
    identity: str,
    convert: Callable[[Row, str], VideoRow],
    needs_span: bool,
) -> list[VideoRow]:
    path, subtitles_path = annotation_file(source, files, split), subtitles_file(source, files)
    subtitles = {} if subtitles_path is None else read_subtitles(subtitles_path, on_bad_row)
    without_subtitles: set[str] = set()
    without_span: list[Any] = []

    def complete(row: Row) -> VideoRow:
        video = require_field(row, "vid_name")
        if type(row.get(identity)) not in (int, str):
            raise ValueError(f"field {identity!r} must be a number or name, found {row.get(identity)!r:.80}")
        read = convert(row, video)
        if needs_span and "ts" not in row:
            raise ValueError(f"field 'ts' is missing; the row has {', '.join(map(repr, row))}")
        span = parse_span(row["ts"]) if "ts" in row else None
        unknown = span is None and "ts" in row
        if unknown and files.on_missing_span == "raise":
            raise ValueError(f"field 'ts' gives no span, found {row['ts']!r}; on_missing_span: whole takes the video")
        if subtitles_path is not None and video not in subtitles:
            if files.on_missing_subtitles == "raise":
                raise ValueError(
                    f"field 'vid_name': {subtitles_path} has no subtitles of {video!r}; "
                    "on_missing_subtitles: empty does without"
                )
            without_subtitles.add(video)
        if unknown:
            without_span.append(row[identity])
        return read._replace(span=span, subtitles=subtitles.get(video, ()))

    rows = convert_file(path, complete, on_bad_row)
    if without_subtitles:
        rank_zero_warn(
            f"{path}: {len(without_subtitles)} videos have no subtitles in {subtitles_path} and are taken to be "
            f"silent; for example {min(without_subtitles)}"
        )
    if without_span:
        rank_zero_warn(
            f"{path}: {len(without_span)} of {len(rows)} rows have no span and are taken to be about the whole video; "
            f"the first: {identity} {without_span[0]}"
        )
    return rows


def _fields(row: Row, *names: str) -> Row:
    return {name: row[name] for name in names if name in row}


def _choices(row: Row, count: int | None) -> tuple[str, ...]:
    if count is None:
        count = next(number for number in range(len(row) + 1) if f"a{number}" not in row)
        if count < 2:
            raise ValueError(f"fields 'a0', 'a1', ... must hold two answers or more, found {count}")
    return tuple(require_field(row, f"a{number}") for number in range(count))


def _answer(row: Row, choices: Sequence[str]) -> int | None:
    answer = row.get("answer_idx")
    if answer is None:
        return None
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"field 'answer_idx' must be the index of one of {len(choices)} answers, found {answer!r:.80}")
    return answer


def _captions(row: Row) -> tuple[str, ...]:
    captions = row.get("descs")
    if captions is None:
        return ()
    if not isinstance(captions, list) or not all(isinstance(item, dict) for item in captions):
        raise ValueError(f"field 'descs' must be a list of objects with 'desc', found {captions!r:.80}")
    return tuple(require_field(item, "desc") for item in captions)


def _subtitle(item: Any, number: int) -> Subtitle:
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        raise ValueError(f"field 'sub': subtitle {number} must have 'text', 'start' and 'end', found {item!r:.80}")
    start, end = item.get("start"), item.get("end")
    if not (_is_number(start) and _is_number(end) and math.isfinite(start) and math.isfinite(end)):
        raise ValueError(f"field 'sub': subtitle {number} must have 'start' and 'end' in seconds, found {item!r:.80}")
    return Subtitle(item["text"], float(start), float(end))


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
