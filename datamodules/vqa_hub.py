"""The evaluation sets on the Hugging Face hub, in the layouts that lmms-eval publishes; images stay encoded."""

from collections.abc import Callable
from typing import Any

from PIL import Image

from datamodules.rows import OnBadRow, Row, convert_rows, optional_text, require_field, require_texts
from datamodules.vqa_rows import (
    POPE_CATEGORIES,
    VisualQuestion,
    answer_texts,
    gqa,
    mmbench,
    pope,
    scienceqa,
    textvqa,
    vizwiz,
    vqav2,
)
from datamodules.vqa_sets import EvaluationSet
from dora_lightning.images import open_encoded


class HubImage:
    """The image in one row of a data set, read and decoded when it is wanted.

    Args:
        dataset: The data set, its column of images not decoding by itself.
        index: Which row.
        name: What messages call it.
    """

    def __init__(self, dataset: Any, index: int, name: str) -> None:
        self.dataset = dataset
        self.index = index
        self.name = name

    def open(self) -> Image.Image:
        """The image."""
        stored = self.dataset[self.index]["image"]
        return open_encoded(stored["bytes"] if stored["bytes"] is not None else stored["path"])

    def __str__(self) -> str:
        """Data set and row, for messages."""
        return self.name


def prepare_hub(name: str, where: EvaluationSet) -> None:
    """Download a set."""
    for config in _configs(name, where):
        _load(where, config)


def read_hub(name: str, where: EvaluationSet, on_bad_row: OnBadRow) -> list[VisualQuestion]:
    """The questions of a set, in the order of the data set.

    Args:
        name: One of :data:`~datamodules.vqa_sets.DATASETS`.
        where: With ``hub_path`` and ``split``.
        on_bad_row: As in :func:`~datamodules.rows.convert_file`.

    Raises:
        ValueError: A column is missing, or a row is bad.
    """
    from datasets import Image as ImageFeature

    place = f"{where.hub_path} ({where.split})"
    questions, *others = [_load(where, config) for config in _configs(name, where)]
    pictures = others[0] if others else questions
    columns, convert = _READERS[name]
    _require_columns(questions, columns, place)
    _require_columns(pictures, ("id", "image") if others else ("image",), place)
    pictures = pictures.cast_column("image", ImageFeature(decode=False))
    # one object for each image, however many questions are about it: it is looked at once
    images = [
        HubImage(pictures, index, f"{place}, image {index + 1}") if there else None
        for index, there in enumerate(pictures.data.column("image").is_valid().to_pylist())
    ]
    index_of = {number: index for index, number in enumerate(pictures["id"])} if others else None

    def convert_row(numbered: Row) -> VisualQuestion:
        index, row = numbered["index"], numbered["row"]
        if index_of is not None and row["imageId"] not in index_of:
            raise ValueError(f"image {row['imageId']!r} of question {row['id']!r} is not among the set's images")
        image = images[index if index_of is None else index_of[row["imageId"]]]
        if image is None and name != "scienceqa":
            raise ValueError("column 'image' is empty")
        return convert(row, image, index, where)

    # without the column of images the rows are small, and images are read when they are wanted
    texts = questions.remove_columns("image") if "image" in questions.column_names else questions
    numbered = ({"index": index, "row": row} for index, row in enumerate(texts))
    return convert_rows(numbered, convert_row, place, on_bad_row)


def _configs(name: str, where: EvaluationSet) -> tuple[str | None, ...]:
    """The parts that a set is made of: GQA keeps its images apart, since several questions share one."""
    assert where.hub_path is not None, "locate() names it"
    config = where.hub_path.partition(":")[2]
    if name == "gqa":
        config = config or "testdev_balanced"
        return f"{config}_instructions", f"{config}_images"
    return (config or None,)


def _load(where: EvaluationSet, config: str | None) -> Any:
    # imported where it is used: it is slow to import, and local files do not need it
    from datasets import load_dataset

    assert where.hub_path is not None
    return load_dataset(where.hub_path.partition(":")[0], config, split=where.split)


def _require_columns(dataset: Any, columns: tuple[str, ...], place: str) -> None:
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(f"{place}: column {column!r} is missing; it has {', '.join(dataset.column_names)}")


_Convert = Callable[[Row, Any, int, EvaluationSet], VisualQuestion]


def _vqav2(row: Row, image: Any, index: int, where: EvaluationSet) -> VisualQuestion:
    return vqav2(
        row["question_id"], require_field(row, "question"), image, answer_texts(row.get("answers")), row["image_id"]
    )


def _gqa(row: Row, image: Any, index: int, where: EvaluationSet) -> VisualQuestion:
    answer = optional_text(row, "answer")
    return gqa(row["id"], require_field(row, "question"), image, (answer,) if answer else ())


def _vizwiz(row: Row, image: Any, index: int, where: EvaluationSet) -> VisualQuestion:
    number = str(row["question_id"])
    # the hub's ids are the files' names without their ending
    name = number if number.endswith(".jpg") else f"{number}.jpg"
    return vizwiz(number, require_field(row, "question"), image, answer_texts(row.get("answers")), name)


def _scienceqa(row: Row, image: Any, index: int, where: EvaluationSet) -> VisualQuestion:
    # the hub's rows have no id
    question, hint = require_field(row, "question"), optional_text(row, "hint")
    return scienceqa(index, question, image, row["choices"], row["answer"], hint)


def _textvqa(row: Row, image: Any, index: int, where: EvaluationSet) -> VisualQuestion:
    tokens = require_texts(row, "ocr_tokens", least=0) if where.ocr_tokens else None
    answers = answer_texts(row.get("answers"))
    return textvqa(row["question_id"], require_field(row, "question"), image, answers, row["image_id"], tokens)


def _pope(row: Row, image: Any, index: int, where: EvaluationSet) -> VisualQuestion:
    # the config "Full" has a split for each category, and there the column may be missing
    category = row.get("category") or (where.split if where.split in POPE_CATEGORIES else None)
    question, name = require_field(row, "question"), str(row.get("image_source", ""))
    return pope(row["question_id"], question, image, row["answer"], name, category)


def _mmbench(row: Row, image: Any, index: int, where: EvaluationSet) -> VisualQuestion:
    return mmbench(row, image)


_READERS: dict[str, tuple[tuple[str, ...], _Convert]] = {
    "vqav2": (("question_id", "question", "image_id"), _vqav2),
    "gqa": (("id", "imageId", "question"), _gqa),
    "vizwiz": (("question_id", "question"), _vizwiz),
    "scienceqa": (("question", "choices", "answer"), _scienceqa),
    "textvqa": (("question_id", "question", "image_id", "ocr_tokens"), _textvqa),
    "pope": (("question_id", "question", "answer"), _pope),
    "mmbench": (("index", "question", "A", "B"), _mmbench),
}
