"""Captions: scores against pycocoevalcap's, what counts once, files of the servers, the table."""

import io
import json
import shutil
from typing import Any

import pytest
from rich.console import Console

from dora_lightning.data import Sample
from tasks import Captioning
from tasks.caption_files import caption_files

# captions, references, and what pycocoevalcap 1.2 with its own tokenizer makes of them
CAPTIONS = ["A cat on a mat.", "two dogs run", "a man's hat", "", "a red bus on a street"]
REFERENCES = [
    ("a cat sits on a mat", "a cat on the mat"),
    ("Two dogs are running!", "two dogs run on grass", "dogs"),
    ("the man's hat is red",),
    ("a boy eats pizza", "a pizza"),
    ("a red bus on the street", "a bus in a street", "a red bus on a street."),
]
SCORES = {
    "cider_d": 3.5211353,
    "bleu_1": 0.7153837,
    "bleu_2": 0.7093466,
    "bleu_3": 0.6730643,
    "bleu_4": 0.5829423,
    "rouge_l": 0.6947084,
}


def image(number: int, *references: str, source: str = "coco_captions") -> Sample:
    row = {"image_id": number, "file_name": f"{number}.jpg"}
    return Sample("caption: ", "", references=references, source=source, row=row)


def clip(number: int, *references: str, source: str = "tvc", **row: Any) -> Sample:
    row = {"clip_id": number, "vid_name": f"castle_{number}", "ts": [1.5, 4], "duration": 9.0, **row}
    return Sample("tvc: ", "", references=references, source=source, row=row)


IMAGES = [image(number, *references) for number, references in enumerate(REFERENCES)]


def floats(results: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in results.items()}


def test_scores_are_those_of_the_coco_evaluation() -> None:
    task = Captioning()
    assert task.generation == {"num_beams": 5, "max_new_tokens": 39, "do_sample": False}
    assert not task.ranks_options
    task.update(IMAGES[:2], CAPTIONS[:2])
    task.update(IMAGES[2:], [f" {caption}\n" for caption in CAPTIONS[2:]])
    scores = {**SCORES, "blank": 0.2}
    expected = {f"coco_captions/{name}": value for name, value in scores.items()}
    expected |= {f"mean/{name}": value for name, value in scores.items()}
    assert floats(task.compute()) == pytest.approx(expected)
    task.reset()
    assert (task.compute(), task.records()) == ({}, [])


@pytest.mark.skipif(shutil.which("java") is None, reason="needs a Java runtime")
def test_the_java_tokenizer_gives_the_same_here() -> None:
    pytest.importorskip("pycocoevalcap")
    task = Captioning(tokenizer="java")
    task.update(IMAGES, CAPTIONS)
    assert float(task.compute()["coco_captions/cider_d"]) == pytest.approx(SCORES["cider_d"])


def test_each_data_set_has_its_own_document_frequencies() -> None:
    task = Captioning()
    clips = [clip(number, *references) for number, references in enumerate(REFERENCES)]
    # captions of both come mixed; right ones in one, swapped ones in the other
    task.update([*IMAGES, *clips], [*CAPTIONS, *CAPTIONS[::-1]])
    results = floats(task.compute())
    assert results["coco_captions/cider_d"] == pytest.approx(SCORES["cider_d"])
    assert results["tvc/cider_d"] < SCORES["cider_d"] / 2
    assert results["mean/cider_d"] == pytest.approx((results["coco_captions/cider_d"] + results["tvc/cider_d"]) / 2)


def test_the_first_caption_of_an_image_counts() -> None:
    task = Captioning()
    task.update(IMAGES, CAPTIONS)
    task.update([IMAGES[3], IMAGES[0]], ["a pizza", "a bus"])
    # the same number in another data set, or no number, is another image
    other = [image(0, "a dog", source="mine"), image(1, "a dog", source="mine")]
    task.update([*other, *(sample._replace(row=None, source="unnamed") for sample in other)], ["a dog", ""] * 2)
    results = floats(task.compute())
    assert results["coco_captions/cider_d"] == pytest.approx(SCORES["cider_d"])
    assert results["mine/blank"] == results["unnamed/blank"] == 0.5
    answers = json.loads(task.files(task.records())["captions_coco_captions_results.json"])
    assert [answer["caption"] for answer in answers] == CAPTIONS


def test_an_image_with_other_references_is_an_error() -> None:
    task = Captioning()
    task.update([image(7, "a cat"), image(7, "a dog")], ["a cat", "a cat"])
    with pytest.raises(ValueError, match="coco_captions: id 7 came with different references"):
        task.compute()


def test_value_reads_ascii_alone() -> None:
    word, cut = "the café is here", "the caf is here"
    for source, given, expected in (("tvc", None, 1.0), ("coco_captions", None, 0.75), ("coco_captions", True, 1.0)):
        task = Captioning(ascii_only=given)
        task.update([clip(1, word, source=source)], [cut])
        assert float(task.compute()[f"{source}/bleu_1"]) == pytest.approx(expected), (source, given)
    task = Captioning(ascii_only=False)
    task.update([clip(1, word)], [cut])
    assert float(task.compute()["tvc/bleu_1"]) == pytest.approx(0.75)


def test_hidden_captions_are_kept_and_not_scored() -> None:
    task = Captioning()
    task.update([clip(4), clip(5, "a cat")], ["a dog", "a cat"])
    assert floats(task.compute())["tvc/rouge_l"] == 1.0
    assert [record["pred"] for record in task.records()] == ["a dog", "a cat"]
    assert task.records()[0] == {
        **{"clip_id": 4, "vid_name": "castle_4", "ts": [1.5, 4], "duration": 9.0},
        **{"source": "tvc", "references": [], "output_pred": "a dog", "pred": "a dog"},
    }


def test_a_server_gets_its_own_file_with_each_once_in_order() -> None:
    task = Captioning()
    task.update([clip(10, "x"), clip(9, "x")], [" Rachel's café\n", ""])
    task.update([clip(3, "x", source="yc2c", ts=None), clip(9, "x")], ["stir", "again"])
    task.update([image(12, "x"), image(2, "x")], ["a cat", "a dog"])
    task.update([Sample("caption: ", "", references=("x",), source="unnamed")], ["a cow"])
    files = task.files(task.records())
    assert set(files) == {"tvc_submission.jsonl", "yc2c_submission.jsonl", "captions_coco_captions_results.json"}
    assert [json.loads(line) for line in files["tvc_submission.jsonl"].decode().splitlines()] == [
        {"vid_name": "castle_9", "clip_id": 9, "ts": [1.5, 4], "descs": [{"desc": ""}]},
        {"vid_name": "castle_10", "clip_id": 10, "ts": [1.5, 4], "descs": [{"desc": "Rachel's café"}]},
    ]
    assert json.loads(files["yc2c_submission.jsonl"]) == {
        "video_id": "castle_3",
        "clip_id": 3,
        "descs": [{"desc": "stir"}],
    }
    assert json.loads(files["captions_coco_captions_results.json"]) == [
        {"image_id": 2, "caption": "a dog"},
        {"image_id": 12, "caption": "a cat"},
    ]
    assert Captioning(submissions=False).files(task.records()) == {}
    named = Captioning(results_name="test2014_mine").files(task.records())
    assert "captions_test2014_mine_results.json" in named


def test_a_data_set_of_any_name_has_a_file() -> None:
    record = {"image_id": 1, "source": "my/photos", "pred": "a cat"}
    assert list(caption_files([record])) == ["captions_my_photos_results.json"]


def test_the_table_is_times_100_as_published() -> None:
    task = Captioning()
    task.update(IMAGES, CAPTIONS)
    console = Console(file=io.StringIO(), width=80)
    console.print(task.table(task.compute()))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    cells = [line.split() for line in lines if line.strip() and "─" not in line]
    assert cells == [
        ["Captions", "(x", "100)"],
        ["data", "set", "CIDEr-D", "BLEU-4", "BLEU-1", "ROUGE-L", "blank"],
        ["coco_captions", "352.1", "58.3", "71.5", "69.5", "20.0"],
        ["mean", "352.1", "58.3", "71.5", "69.5", "20.0"],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "nltk"}, "unknown tokenizer 'nltk'"),
        ({"results_name": "a/b"}, "results_name is a part of a file's name, .* got 'a/b'"),
        ({"results_name": ""}, "results_name is a part of a file's name"),
    ],
)
def test_unknown_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Captioning(**options)


def test_captions_have_to_be_generated() -> None:
    with pytest.raises(ValueError, match="Captioning judges texts, and none were generated"):
        Captioning().update(IMAGES)
