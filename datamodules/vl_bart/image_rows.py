"""VL-BART's image tasks, from each data set's files to rows: VQAv2, GQA, NLVR2 and COCO captions.

Texts, splits and limits are VL-Adapter's, whose run the DoRA paper repeats.
"""

import math
import re
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from datamodules.loading import Stage
from datamodules.rows import OnBadRow, Row, convert_file, convert_rows, require_field, require_id
from datamodules.subsets import drawn
from datamodules.vl_bart.image_sets import COCOCaptionFiles, GQAFiles, ImageSet, NLVR2Files, VQAv2Files
from datamodules.vl_bart.records import Asked
from datamodules.vqa_files import read_object
from datamodules.vqa_rows import answer_texts

TRUTH = ("false", "true")
"""NLVR2's answers, by its labels 0 and 1."""

_WHOLE = 1024  # positions that bart-base has: the published run does not cut NLVR2's sentences
_KARPATHY = {"train": "train", "restval": "train", "val": "validate", "test": "test"}

# Each reader takes: where the files are, the split, the seed of what its limit draws, and what a bad row does (see
# convert_file). Rows to train on carry no references, since nothing scores them, and those without a target are left
# out. Each raises FileNotFoundError for a missing file and ValueError for a bad row or where no row is left.


def read_vqav2(where: VQAv2Files, split: Stage, seed: int = 42, on_bad_row: OnBadRow = "raise") -> list[Asked]:
    """VQAv2: one row per question; targets are the labels' answers, references ten people's answers."""
    paths = where.files(split)
    people: dict[int, tuple[str, ...]] = {}
    annotations = [] if split == "train" else where.annotation_files()
    for path in annotations:
        people |= convert_rows(_records(path, "annotations"), _people_answers, str(path), on_bad_row)

    def convert(row: Row) -> Asked:
        number, image = _number(row), require_field(row, "img_id")
        coco_number = re.search(r"_(\d+)$", image)
        if coco_number is None:
            raise ValueError(f"field 'img_id' must end in the number of a COCO image, found {image!r}")
        # a row with neither label nor people's answers is of a test set that hides them
        if annotations and number not in people and "label" in row:
            raise ValueError(f"question {number} has no answers in {', '.join(map(str, annotations))}")
        question = require_field(row, "sent")
        return Asked(
            source="vqav2",
            visuals=(image,),
            before=where.prompt("vqa: ") + question,
            answers=_label(row),
            weighted=True,
            mean_by_sample=True,
            references=people.get(number, ()),
            row={"question_id": number, "question": question, "image_id": int(coco_number[1])},
        )

    return _kept([asked for path in paths for asked in convert_file(path, convert, on_bad_row)], where, split, seed)


def read_gqa(where: GQAFiles, split: Stage, seed: int = 42, on_bad_row: OnBadRow = "raise") -> list[Asked]:
    """GQA: one row per question, whose label is its one answer."""

    def convert(row: Row) -> Asked:
        number = require_id(row, "question_id")
        question, answers = require_field(row, "sent"), _label(row)
        return Asked(
            source="gqa",
            visuals=(require_field(row, "img_id"),),
            before=where.prompt("gpa: ") + question,  # so spelt in the published run
            answers=answers,
            mean_by_sample=True,
            references=() if split == "train" else tuple(answer for answer, _ in answers),
            row={"question_id": str(number), "question": question},
        )

    paths = where.files(split)
    return _kept([asked for path in paths for asked in convert_file(path, convert, on_bad_row)], where, split, seed)


def read_nlvr2(where: NLVR2Files, split: Stage, seed: int = 42, on_bad_row: OnBadRow = "raise") -> list[Asked]:
    """NLVR2: one row per sentence and pair of images.

    VL-T5's rows are ``{"identifier", "sent", "img0", "img1", "label": 0 or 1, "uid"}``. The official ones, ``{
    "identifier", "sentence", "label": "True" or "False"}`` beside other fields, name no files: those of pair
    ``dev-850-0`` are ``dev-850-0-img0.png`` and ``dev-850-0-img1.png``.
    """

    def convert(row: Row) -> Asked:
        identifier = require_field(row, "identifier")
        if re.fullmatch(r"[^-]+-\d+-\d+-\d+", identifier) is None:
            raise ValueError(f"field 'identifier' must be split-set-pair-sentence, found {identifier!r}")
        if "sent" in row:
            sentence, images = require_field(row, "sent"), (require_field(row, "img0"), require_field(row, "img1"))
        else:
            pair = identifier.rpartition("-")[0]
            sentence, images = require_field(row, "sentence"), (f"{pair}-img0", f"{pair}-img1")
        answer = _truth(row)
        return Asked(
            source="nlvr2",
            visuals=images,
            before=where.prompt("nlvr: ") + sentence,
            answers=() if answer is None else ((answer, 1.0),),
            mean_by_sample=True,
            references=() if answer is None or split == "train" else (answer,),
            options=TRUTH[::-1],
            max_input_tokens=_WHOLE,
            row={"identifier": identifier, "sentence": sentence, "uid": row.get("uid", identifier)},
        )

    paths = where.files(split)
    return _kept([asked for path in paths for asked in convert_file(path, convert, on_bad_row)], where, split, seed)


def read_coco_captions(
    where: COCOCaptionFiles, split: Stage, seed: int = 42, on_bad_row: OnBadRow = "raise"
) -> list[Asked]:
    """COCO captions: one row per caption to train on, one per image to evaluate; ``restval`` is trained on."""

    def convert(row: Row) -> list[Asked]:
        if require_field(row, "split") not in _KARPATHY:
            raise ValueError(f"field 'split' must be one of {', '.join(_KARPATHY)}, found {row['split']!r:.80}")
        if _KARPATHY[row["split"]] != split:
            return []
        name, number, sentences = require_field(row, "filename"), row.get("cocoid"), row.get("sentences")
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"field 'cocoid' must be a number, found {number!r}")
        if not isinstance(sentences, list) or not sentences or not all(isinstance(entry, dict) for entry in sentences):
            raise ValueError(f"field 'sentences' must be a list of objects with 'raw', found {sentences!r:.80}")
        captions = tuple(require_field(entry, "raw").strip() for entry in sentences)
        asked = Asked(
            source="coco_captions",
            visuals=(Path(name).stem,),
            before=where.prompt("caption: "),
            answers=tuple((caption, 1.0) for caption in captions),
            references=captions,
            max_target_tokens=40,
            row={"image_id": number, "file_name": name},
        )
        if split != "train":
            return [asked]
        return [asked._replace(answers=((caption, 1.0),), references=()) for caption in captions]

    (path,) = where.files(split)
    images = convert_rows(_records(path, "images"), convert, str(path), on_bad_row)
    rows = [asked for of_image in images for asked in of_image]
    if not rows:
        raise ValueError(f"{path}: no image is of split {split!r}")
    return _kept(rows, where, split, seed)


def _kept(rows: list[Asked], where: ImageSet, split: Stage, seed: int) -> list[Asked]:
    """The rows that can be used, at most as many as the limit, in their order."""
    if split == "train":
        with_target = [row for row in rows if row.answers]
        if not with_target:
            raise ValueError(f"{where.folder}: none of {len(rows)} rows has an answer to train on")
        if len(with_target) < len(rows):
            left_out = len(rows) - len(with_target)
            rank_zero_info(
                f"{where.folder}: {left_out} of {len(rows)} rows have no answer to train on and are left out"
            )
        rows = with_target
    return drawn(rows, where.limit(split), seed)


def _label(row: Row) -> tuple[tuple[str, float], ...]:
    """Answers with their scores, the best first; those that score nothing are never a target."""
    label = row.get("label", {})
    if not isinstance(label, dict):
        raise ValueError(f"field 'label' must be an object of answers with scores, found {label!r:.80}")
    for answer, score in label.items():
        number = isinstance(score, int | float) and not isinstance(score, bool)
        if not answer.strip() or not number or not math.isfinite(score) or score < 0:
            raise ValueError(f"field 'label' must hold answers with scores of 0 or more, found {answer!r}: {score!r}")
    scored = [(answer, float(score)) for answer, score in label.items() if score > 0]
    return tuple(sorted(scored, key=lambda entry: -entry[1]))


def _truth(row: Row) -> str | None:
    label = row.get("label")
    if label is None:
        return None
    # to Python, True == 1
    named = {0: "false", 1: "true", "False": "false", "True": "true"}
    if not isinstance(label, int | str) or label not in named:
        raise ValueError(f"field 'label' must be 0, 1, 'False' or 'True', found {label!r}")
    return named[label]


def _number(row: Row) -> int:
    number = row.get("question_id")
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"field 'question_id' must be a number, found {number!r}")
    return number


def _people_answers(row: Row) -> tuple[int, tuple[str, ...]]:
    answers = answer_texts(row.get("answers"))
    if not answers:
        raise ValueError("field 'answers' must hold people's answers, found none")
    return _number(row), answers


def _records(path: Path, name: str) -> list[Any]:
    document = read_object(str(path))
    if document is None or not isinstance(document.get(name), list):
        raise ValueError(f"{path}: expected a JSON object with a list {name!r}")
    return document[name]
