import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.loading import Stage
from datamodules.vl_bart.image_rows import read_coco_captions, read_gqa, read_nlvr2, read_vqav2
from datamodules.vl_bart.image_sets import COCOCaptionFiles, GQAFiles, NLVR2Files, VQAv2Files
from datamodules.vl_bart.records import Asked
from tests.datamodules.vl_bart import image_examples

REAL_NLVR2 = Path(__file__).parents[4] / "shared" / "data" / "nlvr2" / "dev_first300.json"

# as VL-T5's and the official files have them
VQA = {
    "answer_type": "other",
    "img_id": "COCO_train2014_000000458752",
    "label": {"mesh": 0.3, "net": 1, "sky": 0},
    "question_id": 458752000,
    "question_type": "what is this",
    "sent": "What is this photo taken looking through?",
}
PEOPLE = ["net", "net", "net", "netting", "net", "net", "mesh", "net", "net", "net"]
GQA = {
    "img_id": "2375429",
    "label": {"pipe": 1.0},
    "question_id": "07333408",
    "sent": "What is on the white wall?",
}
SENTENCE = "An image shows one leather pencil case, displayed open with writing implements tucked inside."
NLVR2 = {
    "identifier": "train-10171-0-0",
    "img0": "train-10171-0-img0",
    "img1": "train-10171-0-img1",
    "label": 0,
    "sent": SENTENCE,
    "uid": "nlvr2_train_0",
}
OFFICIAL_NLVR2 = {
    "sentence": SENTENCE,
    "left_url": "https://example.org/left.jpg",
    "label": "False",
    "right_url": "https://example.org/right.jpg",
    "identifier": "train-10171-0-0",
}
COCO = {
    "filepath": "val2014",
    "sentids": [770337, 771687],
    "filename": "COCO_val2014_000000391895.jpg",
    "imgid": 0,
    "split": "test",
    "sentences": [
        {"tokens": ["a", "man"], "raw": "A man with a red helmet. ", "imgid": 0, "sentid": 770337},
        {"tokens": ["man"], "raw": "Man riding a motor bike.", "imgid": 0, "sentid": 771687},
    ],
    "cocoid": 391895,
}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_annotations(folder: Path, **answers: Any) -> None:
    row = {
        "question_id": 458752000,
        "image_id": 458752,
        "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(PEOPLE, 1)],
        **answers,
    }
    write(folder / "v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": [row]})


def test_vqav2(tmp_path: Path) -> None:
    write(tmp_path / "karpathy_train.json", [VQA])
    write(tmp_path / "karpathy_val.json", [VQA])
    write_annotations(tmp_path)
    where = VQAv2Files(str(tmp_path))
    expected = Asked(
        source="vqav2",
        visuals=("COCO_train2014_000000458752",),
        before="vqa: What is this photo taken looking through?",
        answers=(("net", 1.0), ("mesh", 0.3)),  # the best first; what scores 0 is never drawn
        weighted=True,
        mean_by_sample=True,
        references=tuple(PEOPLE),
        max_target_tokens=10,
        max_input_tokens=20,
        row={
            "question_id": 458752000,
            "question": "What is this photo taken looking through?",
            "image_id": 458752,
        },
    )
    assert read_vqav2(where, "validate") == [expected]
    assert read_vqav2(where, "train") == [expected._replace(references=())]
    (bare,) = read_vqav2(VQAv2Files(str(tmp_path), prompts="none"), "train")
    assert bare.before == VQA["sent"]


def test_vqav2_questions_without_a_target(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rare = {**VQA, "label": {}}
    worthless = {**VQA, "label": {"sky": 0}}
    for split in ("train", "test"):
        write(tmp_path / f"karpathy_{split}.json", [rare, VQA, worthless])
    write_annotations(tmp_path)
    where = VQAv2Files(str(tmp_path))
    with caplog.at_level("INFO"):
        assert len(read_vqav2(where, "train")) == 1
    assert "2 of 3 rows have no answer to train on and are left out" in caplog.text
    kept = read_vqav2(where, "test")
    assert [row.answers for row in kept] == [(), (("net", 1.0), ("mesh", 0.3)), ()]
    assert all(row.references == tuple(PEOPLE) for row in kept)
    write(tmp_path / "karpathy_train.json", [rare])
    with pytest.raises(ValueError, match="none of 1 rows has an answer to train on"):
        read_vqav2(where, "train")


def test_vqav2_with_hidden_answers(tmp_path: Path) -> None:
    hidden = {"img_id": "COCO_test2015_000000262144", "question_id": 262144000, "sent": "What?"}
    write(tmp_path / "karpathy_test.json", [hidden])
    write_annotations(tmp_path)
    for where in (VQAv2Files(str(tmp_path)), VQAv2Files(str(tmp_path), annotations=[])):
        (row,) = read_vqav2(where, "test")
        assert (row.answers, row.references, row.row["image_id"]) == ((), (), 262144)


def test_gqa(tmp_path: Path) -> None:
    for name in ("train", "valid", "testdev"):
        write(tmp_path / f"{name}.json", [{**GQA, "question_id": f"{name}1"}])
    where = GQAFiles(str(tmp_path))
    expected = Asked(
        source="gqa",
        visuals=("2375429",),
        before="gpa: What is on the white wall?",
        answers=(("pipe", 1.0),),
        weighted=False,
        mean_by_sample=True,
        references=("pipe",),
        max_target_tokens=10,
        max_input_tokens=20,
        row={"question_id": "testdev1", "question": "What is on the white wall?"},
    )
    assert read_gqa(where, "test") == [expected]
    assert [row.row["question_id"] for row in read_gqa(where, "validate")] == ["valid1"]
    assert [row.row["question_id"] for row in read_gqa(where, "train")] == ["train1"]
    published = GQAFiles(str(tmp_path), train=["train.json", "valid.json"], validate=["testdev.json"])
    assert [row.row["question_id"] for row in read_gqa(published, "train")] == ["train1", "valid1"]
    assert read_gqa(published, "validate") == [expected]


def test_gqa_with_hidden_answers(tmp_path: Path) -> None:
    write(tmp_path / "submit.json", [{key: value for key, value in GQA.items() if key != "label"}])
    (row,) = read_gqa(GQAFiles(str(tmp_path), test=["submit.json"]), "test")
    assert (row.answers, row.references) == ((), ())


def test_nlvr2_in_both_layouts(tmp_path: Path) -> None:
    write(tmp_path / "train.json", [NLVR2, {**NLVR2, "label": 1, "uid": "nlvr2_train_1"}])
    where = NLVR2Files(str(tmp_path))
    false, true = read_nlvr2(where, "train")
    assert false == Asked(
        source="nlvr2",
        visuals=("train-10171-0-img0", "train-10171-0-img1"),
        before=f"nlvr: {SENTENCE}",
        answers=(("false", 1.0),),
        mean_by_sample=True,
        options=("true", "false"),
        max_target_tokens=10,
        max_input_tokens=1024,
        row={"identifier": "train-10171-0-0", "sentence": SENTENCE, "uid": "nlvr2_train_0"},
    )
    assert true.answers == (("true", 1.0),)
    lines = "\n".join(json.dumps(row) for row in (OFFICIAL_NLVR2, {**OFFICIAL_NLVR2, "label": "True"}))
    (tmp_path / "dev.json").write_text(lines)
    official = read_nlvr2(where, "validate")
    assert [row.references for row in official] == [("false",), ("true",)]
    assert official[0]._replace(references=()) == false._replace(row={**false.row, "uid": "train-10171-0-0"})
    # VL-T5's file goes first, a named one before both
    write(tmp_path / "valid.json", [NLVR2])
    assert len(read_nlvr2(where, "validate")) == 1
    assert len(read_nlvr2(NLVR2Files(str(tmp_path), validate=["dev.json", "valid.json"]), "validate")) == 3
    hidden = {key: value for key, value in NLVR2.items() if key != "label"}
    write(tmp_path / "test.json", [hidden])
    (row,) = read_nlvr2(where, "test")
    assert (row.answers, row.references, row.options) == ((), (), ("true", "false"))


@pytest.mark.skipif(not REAL_NLVR2.is_file(), reason=f"NLVR2's rows are not at {REAL_NLVR2}")
def test_nlvr2s_real_rows() -> None:
    where = NLVR2Files(str(REAL_NLVR2.parent), validate=[REAL_NLVR2.name])
    rows = read_nlvr2(where, "validate")
    assert len(rows) == 300
    real = [json.loads(line) for line in REAL_NLVR2.read_text().splitlines()]
    assert Counter(row.references[0].capitalize() for row in rows) == Counter(row["label"] for row in real)
    first = rows[0]
    assert first.visuals == ("dev-850-0-img0", "dev-850-0-img1")
    assert first.before == (
        "nlvr: The right image shows a curving walkway of dark glass circles embedded in dirt and flanked by foliage."
    )
    assert first.answers == (("false", 1.0),)
    assert first.row["identifier"] == "dev-850-0-0"
    assert len({row.row["uid"] for row in rows}) == 300


def test_coco_captions(tmp_path: Path) -> None:
    images = [
        COCO,
        {**COCO, "split": "restval", "cocoid": 42, "filename": "COCO_val2014_000000000042.jpg"},
        {**COCO, "split": "train", "cocoid": 9, "filename": "COCO_train2014_000000000009.jpg"},
        {**COCO, "split": "val", "cocoid": 7, "filename": "COCO_val2014_000000000007.jpg"},
    ]
    write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    where = COCOCaptionFiles(str(tmp_path))
    captions = ("A man with a red helmet.", "Man riding a motor bike.")
    (row,) = read_coco_captions(where, "test")
    assert row == Asked(
        source="coco_captions",
        visuals=("COCO_val2014_000000391895",),
        before="caption: ",
        answers=((captions[0], 1.0), (captions[1], 1.0)),
        weighted=False,
        mean_by_sample=False,
        references=captions,
        max_target_tokens=40,
        row={"image_id": 391895, "file_name": "COCO_val2014_000000391895.jpg"},
    )
    train = read_coco_captions(where, "train")
    assert [(row.row["image_id"], row.answers) for row in train] == [
        (number, ((caption, 1.0),)) for number in (42, 9) for caption in captions
    ]
    assert train[0].visuals == ("COCO_val2014_000000000042",)
    assert train[0].before == "caption: "
    assert [row.row["image_id"] for row in read_coco_captions(where, "validate")] == [7]
    assert read_coco_captions(COCOCaptionFiles(str(tmp_path), prompts="none"), "test")[0].before == ""
    write(tmp_path / "dataset_coco.json", {"images": [COCO], "dataset": "coco"})
    with pytest.raises(ValueError, match=r"dataset_coco\.json: no image is of split 'train'"):
        read_coco_captions(where, "train")


def test_limits_are_drawn_by_the_seed(tmp_path: Path) -> None:
    image_examples.write_gqa(tmp_path, images=10, questions=4)
    whole = read_gqa(GQAFiles(str(tmp_path)), "train")
    assert len(whole) == 40

    def drawn(limit: int, split: Stage = "train", seed: int = 1) -> list[Asked]:
        return read_gqa(GQAFiles(str(tmp_path), limit_train=limit, limit_eval=3), split, seed=seed)

    small, large = drawn(5), drawn(12)
    assert (len(small), len(large)) == (5, 12)
    places = [whole.index(row) for row in large]
    assert places == sorted(places)
    assert places != list(range(12))
    assert all(row in large for row in small)
    assert drawn(5) == small
    assert drawn(5, seed=2) != small
    assert drawn(1000) == whole
    assert len(drawn(5, "validate")) == len(drawn(5, "test")) == 3


Read = Callable[..., list[Asked]]


@pytest.mark.parametrize(
    ("read", "where", "row", "message"),
    [
        (read_vqav2, VQAv2Files, {**VQA, "question_id": "5"}, "field 'question_id' must be a number, found '5'"),
        (read_vqav2, VQAv2Files, {**VQA, "img_id": "n5.jpg"}, "field 'img_id' must end in the number of a COCO image"),
        (read_vqav2, VQAv2Files, {**VQA, "sent": " "}, "field 'sent' is blank"),
        (read_vqav2, VQAv2Files, {**VQA, "label": ["net"]}, "field 'label' must be an object of answers with scores"),
        (read_vqav2, VQAv2Files, {**VQA, "label": {"net": "1"}}, "scores of 0 or more, found 'net': '1'"),
        (read_vqav2, VQAv2Files, {**VQA, "label": {"net": -1}}, "scores of 0 or more, found 'net': -1"),
        (read_vqav2, VQAv2Files, {**VQA, "label": {"net": float("nan")}}, r"field 'label'\.net holds NaN"),
        (read_vqav2, VQAv2Files, {**VQA, "label": {"": 1}}, "scores of 0 or more, found '': 1"),
        (read_gqa, GQAFiles, {**GQA, "question_id": None}, "field 'question_id' must be a number or text, found None"),
        (read_gqa, GQAFiles, {**GQA, "img_id": 2375429}, "field 'img_id' must be text, found int"),
        (read_nlvr2, NLVR2Files, {**NLVR2, "label": 2}, "field 'label' must be 0, 1, 'False' or 'True', found 2"),
        (read_nlvr2, NLVR2Files, {**NLVR2, "label": [1]}, r"field 'label' must be 0, 1, .* found \[1\]"),
        (
            read_nlvr2,
            NLVR2Files,
            {**NLVR2, "identifier": "train-1"},
            "must be split-set-pair-sentence, found 'train-1'",
        ),
        (read_nlvr2, NLVR2Files, {"identifier": "dev-1-0-0", "label": 1}, "field 'sentence' is missing"),
    ],
)
def test_rows_that_are_bad(tmp_path: Path, read: Read, where: Any, row: Any, message: str) -> None:
    good = {read_vqav2: VQA, read_gqa: GQA, read_nlvr2: NLVR2}[read]
    write(tmp_path / "rows.json", [good, row])
    options = where(str(tmp_path), train=["rows.json"])
    with pytest.raises(ValueError, match=rf"rows\.json, row 2: .*{message}"):
        read(options, "train")
    with pytest.warns(UserWarning, match=rf"1 of 2 rows were skipped; the first: .*row 2: .*{message}"):
        assert len(read(options, "train", on_bad_row="skip")) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": "dev"}, "field 'split' must be one of train, restval, val, test, found 'dev'"),
        ({"cocoid": "7"}, "field 'cocoid' must be a number, found '7'"),
        ({"sentences": []}, "field 'sentences' must be a list of objects with 'raw'"),
        ({"sentences": [{"raw": ""}]}, "field 'raw' is blank"),
        ({"filename": None}, "field 'filename' must be text"),
    ],
)
def test_coco_images_that_are_bad(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    write(tmp_path / "dataset_coco.json", {"images": [COCO, {**COCO, **changed}]})
    where = COCOCaptionFiles(str(tmp_path))
    with pytest.raises(ValueError, match=rf"dataset_coco\.json, row 2: {message}"):
        read_coco_captions(where, "test")
    with pytest.warns(UserWarning, match="1 of 2 rows were skipped"):
        assert len(read_coco_captions(where, "test", on_bad_row="skip")) == 1


def test_annotations_that_do_not_fit(tmp_path: Path) -> None:
    write(tmp_path / "karpathy_val.json", [VQA])
    where = VQAv2Files(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"annotations: .*v2_mscoco_val2014_annotations\.json: no such file"):
        read_vqav2(where, "validate")
    write_annotations(tmp_path, question_id=1)
    with pytest.raises(ValueError, match=r"karpathy_val\.json, row 1: question 458752000 has no answers in .*val2014"):
        read_vqav2(where, "validate")
    write_annotations(tmp_path, answers=[])
    with pytest.raises(ValueError, match=r"annotations\.json, row 1: field 'answers' must hold people's answers"):
        read_vqav2(where, "validate")
    write(tmp_path / "v2_mscoco_val2014_annotations.json", [VQA])
    with pytest.raises(ValueError, match=r"annotations\.json: expected a JSON object with a list 'annotations'"):
        read_vqav2(where, "validate")


def test_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder .*vqa: no such folder; expected one with karpathy_test\.json"):
        read_vqav2(VQAv2Files(str(tmp_path / "vqa")), "test")
    with pytest.raises(FileNotFoundError, match=r"validate: .*valid\.json: no such file"):
        read_nlvr2(NLVR2Files(str(tmp_path)), "validate")
    with pytest.raises(FileNotFoundError, match=r"dataset_coco\.json: no such file"):
        read_coco_captions(COCOCaptionFiles(str(tmp_path)), "train")
    with pytest.raises(ValueError, match="train: expected at least one file of"):
        read_gqa(GQAFiles(str(tmp_path), train=[]), "train")
    with pytest.raises(ValueError, match="split must be one of train, validate, test, found 'val'"):
        read_gqa(GQAFiles(str(tmp_path)), "val")  # type: ignore[arg-type]


def test_options_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="prompts must be 'published' or 'none', found 'vqa'"):
        VQAv2Files("vqa", prompts="vqa")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit_eval must be at least 1, or null for all, found 0"):
        COCOCaptionFiles("COCO", limit_eval=0)
    with pytest.raises(ValueError, match=r"limit_train must be a whole number of at least 1, .*, found '5'"):
        GQAFiles("GQA", limit_train="5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"train must be a list of files, found 'train\.json'"):
        GQAFiles("GQA", train="train.json")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"annotations must be a list of files, found 'val\.json'"):
        VQAv2Files("vqa", annotations="val.json")  # type: ignore[arg-type]


def test_the_written_examples_are_read(tmp_path: Path) -> None:
    ids = {
        "vqav2": image_examples.write_vqav2(tmp_path / "vqa", images=3, questions=2),
        "gqa": image_examples.write_gqa(tmp_path / "GQA", images=3, questions=2),
        "nlvr2": image_examples.write_nlvr2(tmp_path / "nlvr", sets=3),
        "coco_captions": image_examples.write_coco_captions(tmp_path / "COCO", images=3, captions=5),
    }
    assert set(image_examples.write_nlvr2(tmp_path / "nlvr2", sets=3, official=True)) == set(ids["nlvr2"])
    counts: dict[str, tuple[int, int, int]] = {}
    for read, where in (
        (read_vqav2, VQAv2Files(str(tmp_path / "vqa"))),
        (read_gqa, GQAFiles(str(tmp_path / "GQA"))),
        (read_nlvr2, NLVR2Files(str(tmp_path / "nlvr"))),
        (read_nlvr2, NLVR2Files(str(tmp_path / "nlvr2"))),
        (read_coco_captions, COCOCaptionFiles(str(tmp_path / "COCO"))),
    ):
        splits = [read(where, split) for split in ("train", "validate", "test")]  # type: ignore[operator]
        source = splits[0][0].source
        counts[source] = tuple(map(len, splits))  # type: ignore[assignment]
        assert {visual for rows in splits for row in rows for visual in row.visuals} == set(ids[source])
        assert all(row.references for rows in splits[1:] for row in rows)
    # one question of each split of VQAv2 has an empty label
    assert counts == {"vqav2": (6, 7, 7), "gqa": (6, 6, 6), "nlvr2": (6, 6, 6), "coco_captions": (15, 3, 3)}
    folder = image_examples.write_images(tmp_path / "images", ids["vqav2"])
    with Image.open(folder / f"{ids['vqav2'][0]}.jpg") as image:
        assert (image.size, image.format) == ((40, 32), "JPEG")
