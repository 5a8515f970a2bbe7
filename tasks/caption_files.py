"""Captions in the files that each benchmark's server reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dora_lightning.files import json_bytes, json_lines
from tasks.submissions import file_part, natural_order

Record = dict[str, Any]

# fields of VALUE's sample submissions beside ``clip_id`` and ``descs``, which alone its server reads
_VIDEO_NAME = {"yc2c": "video_id"}


def caption_id(row: Record) -> int | str | None:
    """What tells a captioned clip or image from the others of its data set, None where its row has no such field."""
    return next((row[name] for name in ("clip_id", "image_id") if row.get(name) is not None), None)


def caption_files(records: Sequence[Record], results_name: str | None = None) -> dict[str, bytes]:
    """Submission files, name -> content, each clip and image once, in order of their ids.

    Clips of videos (rows with a ``clip_id``) go into ``<source>_submission.jsonl`` as VALUE's server reads it: a line
    ``{"vid_name", "clip_id", "ts", "descs": [{"desc"}]}`` each, ``video_id`` in place of ``vid_name`` in YC2C's.
    Images (rows with an ``image_id``) go into ``captions_<name>_results.json`` as the COCO evaluation reads it: a list
    of ``{"image_id", "caption"}``. Other rows have no file.

    Args:
        records: rows of ``tasks.Captioning.records`` of all processes, in any order.
        results_name: name in the file of images, ``<split>_<algorithm>`` as the server asks for (such as
            ``test2014_mine``); the data set's if None.
    """
    sources: dict[str, dict[int | str, Record]] = {}
    for record in records:
        name = caption_id(record)
        if name is not None:
            sources.setdefault(record["source"], {}).setdefault(name, record)
    files: dict[str, bytes] = {}
    for source, named in sources.items():
        rows = [named[name] for name in sorted(named, key=natural_order)]
        safe = file_part(source)
        clips = [_clip(row) for row in rows if row.get("clip_id") is not None]
        images = [{"image_id": row["image_id"], "caption": row["pred"]} for row in rows if row.get("clip_id") is None]
        if clips:
            files[f"{safe}_submission.jsonl"] = json_lines(clips)
        if images:
            files[f"captions_{results_name or safe}_results.json"] = json_bytes(images)
    return files


def _clip(row: Record) -> Record:
    video = _VIDEO_NAME.get(row["source"], "vid_name")
    names = {video: "vid_name", "clip_id": "clip_id", "ts": "ts"}
    told = {name: row[field] for name, field in names.items() if row.get(field) is not None}
    return {**told, "descs": [{"desc": row["pred"]}]}
