"""Small data sets in the true file formats of VL-BART's image tasks, about images of one colour each."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

COLORS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 50, 210), "yellow": (220, 210, 40)}

_SPLITS = ("train", "val", "test")


def color_of(image_id: str) -> str:
    """The colour of an image, told by the digits in its id; neighbours have different ones."""
    return list(COLORS)[sum(int(digit) for digit in image_id if digit.isdigit()) % len(COLORS)]


def write_images(folder: Path, ids: Iterable[str], size: tuple[int, int] = (40, 32), suffix: str = ".jpg") -> Path:
    """Images of those ids, each all of its colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for image_id in ids:
        Image.new("RGB", size, COLORS[color_of(image_id)]).save(folder / f"{image_id}{suffix}")
    return folder


def write_vqav2(folder: Path, images: int = 2, questions: int = 2) -> list[str]:
    """VL-T5's ``vqa`` folder: so many images in each split, so many questions about each.

    Training has ``restval`` images too, one question whose label is empty, and one with two answers.
    """
    ids: list[str] = []
    official: dict[str, list[Any]] = {"train2014": [], "val2014": []}
    for split in _SPLITS:
        rows = []
        for image_id in _coco_ids(split, images):
            ids.append(image_id)
            for place in range(questions):
                number, color = int(image_id[-12:]) * 1000 + place, color_of(image_id)
                label = {color: 1} if place % 2 == 0 else {f"dark {color}": 0.3, color: 0.9}
                row = {
                    "answer_type": "other",
                    "img_id": image_id,
                    "label": label,
                    "question_id": number,
                    "question_type": "what color is",
                    "sent": f"What color is this picture, asked {place} times?",
                }
                rows.append(row)
                texts = [f"dark {color}"] * (place % 2) + [color] * (10 - place % 2)
                official[image_id.split("_")[1]].append(
                    {
                        "question_type": "what color is",
                        "multiple_choice_answer": color,
                        "answers": [
                            {"answer": text, "answer_confidence": "yes", "answer_id": n}
                            for n, text in enumerate(texts, 1)
                        ],
                        "image_id": int(image_id[-12:]),
                        "answer_type": "other",
                        "question_id": number,
                    }
                )
        # an answer that is too rare to be among the labels
        rows.append({**rows[0], "question_id": rows[0]["question_id"] + 999, "label": {}})
        official["train2014" if split == "train" else "val2014"].append(
            {
                "answers": [
                    {"answer": f"rare {n}", "answer_confidence": "maybe", "answer_id": n} for n in range(1, 11)
                ],
                "image_id": int(rows[0]["img_id"][-12:]),
                "question_id": rows[-1]["question_id"],
            }
        )
        _write(folder / f"karpathy_{split}.json", rows)
    for subset, annotations in official.items():
        document = {"info": {}, "data_subtype": subset, "data_type": "mscoco", "annotations": annotations}
        _write(folder / f"v2_mscoco_{subset}_annotations.json", document)
    answers = [*COLORS, *(f"dark {color}" for color in COLORS)]
    _write(folder / "trainval_ans2label.json", {answer: n for n, answer in enumerate(answers)})
    _write(folder / "trainval_label2ans.json", answers)
    return ids


def write_gqa(folder: Path, images: int = 2, questions: int = 2) -> list[str]:
    """VL-T5's ``GQA`` folder: so many images in each split, so many questions about each."""
    ids: list[str] = []
    for split, start in (("train", 2375000), ("valid", 2385000), ("testdev", 161000)):
        rows = []
        for number in range(start, start + images):
            image_id = f"n{number}" if split == "testdev" else str(number)
            ids.append(image_id)
            rows += [
                {
                    "img_id": image_id,
                    "label": {color_of(image_id): 1.0},
                    "question_id": f"0{number}{place}",
                    "sent": f"Which color is picture {place}?",
                }
                for place in range(questions)
            ]
        _write(folder / f"{split}.json", rows)
    return ids


def write_nlvr2(folder: Path, sets: int = 2, official: bool = False) -> list[str]:
    """NLVR2: in each split so many sets of two pairs, about which one sentence is written: true, then false.

    Args:
        folder: VL-T5's ``nlvr`` folder.
        sets: Sets in each split.
        official: Write the release's JSONL (``dev.json``, ``test1.json``) rather than VL-T5's lists.
    """
    ids: list[str] = []
    for name, split in (("train", "train"), ("valid", "dev"), ("test", "test1")):
        rows: list[dict[str, Any]] = []
        for number in range(sets):
            for pair in range(2):
                images = [f"{split}-{number}-{pair}-img{place}" for place in range(2)]
                ids += images
                sentence = f"The left picture is {color_of(f'{split}-{number}-0-img0')}."
                truth = color_of(images[0]) in sentence
                identifier = f"{split}-{number}-{pair}-0"
                if official:
                    row: dict[str, Any] = {
                        "sentence": sentence,
                        "left_url": f"https://example.org/{images[0]}.jpg",
                        "writer": "61",
                        "label": str(truth),
                        "right_url": f"https://example.org/{images[1]}.jpg",
                        "synset": "picture",
                        "identifier": identifier,
                    }
                else:
                    row = {
                        "identifier": identifier,
                        "img0": images[0],
                        "img1": images[1],
                        "label": int(truth),
                        "sent": sentence,
                        "uid": f"nlvr2_{name}_{len(rows)}",
                    }
                rows.append(row)
        _write(folder / f"{split if official else name}.json", rows, lines=official)
    return ids


def write_coco_captions(folder: Path, images: int = 2, captions: int = 5) -> list[str]:
    """Karpathy's ``dataset_coco.json``: so many images in each split (half of training's are ``restval``)."""
    ids: list[str] = []
    entries: list[dict[str, Any]] = []
    for split in _SPLITS:
        for image_id in _coco_ids(split, images):
            subset, number = image_id.split("_")[1], int(image_id[-12:])
            ids.append(image_id)
            start = len(entries) * captions
            texts = [f" A picture, number {place}, that is {color_of(image_id)}. " for place in range(captions)]
            sentences = [
                {
                    "tokens": text.strip(" .").lower().split(),
                    "raw": text,
                    "imgid": len(entries),
                    "sentid": start + place,
                }
                for place, text in enumerate(texts)
            ]
            entries.append(
                {
                    "filepath": subset,
                    "sentids": list(range(start, start + captions)),
                    "filename": f"{image_id}.jpg",
                    "imgid": len(entries),
                    "split": "restval" if split == "train" and subset == "val2014" else split,
                    "sentences": sentences,
                    "cocoid": number,
                }
            )
    _write(folder / "dataset_coco.json", {"images": entries, "dataset": "coco"})
    return ids


def _coco_ids(split: str, images: int) -> list[str]:
    """Karpathy's training images are of both years' sets, the others of val2014."""
    start = 1 + 1000 * _SPLITS.index(split)
    subsets = ["train2014" if split == "train" and n % 2 == 0 else "val2014" for n in range(images)]
    return [f"COCO_{subset}_{start + n:012d}" for n, subset in enumerate(subsets)]


def _write(path: Path, content: Any, lines: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: Sequence[Any] = content if lines else [content]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
