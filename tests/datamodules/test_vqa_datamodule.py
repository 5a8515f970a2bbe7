import base64
import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from PIL import Image

from datamodules.conversation import get_conversation_template
from datamodules.text import TextDataModule
from datamodules.vqa import VQADataModule
from datamodules.vqa_sets import DATASETS, HUB_SETS, EvaluationSet
from tests.datamodules.conversation_examples import make_bpe, save_llava_processor

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def module(datasets: Any, data_dir: Path | None = None, **options: Any) -> VQADataModule:
    """A datamodule whose samples are asked for without a model."""
    data = VQADataModule("no-model", datasets, None if data_dir is None else str(data_dir), **options)
    data.template = get_conversation_template(options.get("template", "vicuna_v1"))
    return data


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (200, 10, 30)).save(path)


@pytest.fixture
def eval_folder(tmp_path: Path) -> Path:
    """LLaVA's evaluation folder, with two questions of each set (of each category of POPE)."""
    root = tmp_path / "eval"
    for name in ("vqav2/test2015/COCO_test2015_000000000007.jpg", "pope/val2014/COCO_val2014_000000000007.jpg"):
        picture(root / name)
    for name in ("gqa/data/images/n7.jpg", "vizwiz/test/v7.jpg", "textvqa/train_images/t7.jpg"):
        picture(root / name)
    picture(root / "scienceqa/images/test/3/image.png")

    def asked(image: str, *ids: Any, **fields: Any) -> list[dict[str, Any]]:
        return [
            {"question_id": id, "image": image, "text": f"What is {n}?{SHORT}", **fields} for n, id in enumerate(ids)
        ]

    lines(root / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", asked("COCO_test2015_000000000007.jpg", 70, 71))
    lines(root / "gqa/llava_gqa_testdev_balanced.jsonl", asked("n7.jpg", "1", "2"))
    official = {id: {"imageId": "n7", "question": "What?", "answer": "cat"} for id in ("1", "2")}
    (root / "gqa/data/testdev_balanced_questions.json").write_text(json.dumps(official))
    lines(root / "vizwiz/llava_test.jsonl", asked("v7.jpg", "v7.jpg", "v8.jpg"))
    lines(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", asked("t7.jpg", "t7", "t7"))
    data = [{"image_id": "t7", "question_id": n, "question": f"what is {n}?", "answers": ["x"] * 10} for n in (0, 1)]
    (root / "textvqa/TextVQA_0.5.1_val.json").write_text(json.dumps({"data": data}))
    pope = [
        {"image": "COCO_val2014_000000000007.jpg", "label": label, "text": f"What is {n}?", "question_id": n}
        for n, label in enumerate(("yes", "no"))
    ]
    questions = []
    for category in ("adversarial", "popular", "random"):
        lines(root / f"pope/coco/coco_pope_{category}.json", pope)
        questions += asked("COCO_val2014_000000000007.jpg", 1, 2, category=category)
    lines(root / "pope/llava_pope_test.jsonl", questions)
    problems = {
        "3": {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": "image.png"},
        "4": {"question": "Which?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None},
    }
    (root / "scienceqa/problems.json").write_text(json.dumps(problems))
    rows = [
        {"id": "3", "image": "3/image.png", "conversations": [{"from": "human", "value": "<image>\nWhich?"}]},
        {"id": "4", "conversations": [{"from": "human", "value": "Which?"}]},
    ]
    (root / "scienceqa/llava_test_CQM-A.json").write_text(json.dumps(rows))
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7)).save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    (root / "mmbench").mkdir()
    with (root / "mmbench/mmbench_dev_20230712.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category"])
        for index in (5, 1_000_005, 2_000_005, 6, 1_000_006, 2_000_006):
            writer.writerow([index, "Which?", "", "a", "b", "c", "", "A", "ocr", encoded, "perception"])
    return root


def sources(data: VQADataModule, stage: Any = "test") -> dict[str, int]:
    return dict(Counter(sample.source for sample in data.build_samples(stage)))


EVERYTHING = {
    "vqav2": 2, "gqa": 2, "vizwiz": 2, "scienceqa": 2, "textvqa": 2,
    "pope_adversarial": 2, "pope_popular": 2, "pope_random": 2, "mmbench": 6,
}  # fmt: skip


def test_llavas_folder_holds_all_sets(eval_folder: Path) -> None:
    data = module(list(DATASETS), eval_folder)
    assert sources(data) == EVERYTHING
    # VQAv2's and VizWiz's test sets have no public answers
    hidden = {"vqav2", "vizwiz"}
    assert {sample.source for sample in data.build_samples("test") if not sample.references} == hidden
    assert sources(data, "validate") == {name: n for name, n in EVERYTHING.items() if name not in hidden}
    with pytest.raises(ValueError, match="holds evaluation sets alone, there is nothing to train on"):
        data.build_samples("train")


def test_files_in_other_places(eval_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"image": "v7.jpg", "question": "What?", "answers": [{"answer": "a cat"}] * 10}]))
    places = {
        "vizwiz": EvaluationSet(questions=str(path), images=str(eval_folder / "vizwiz" / "test")),
        "textvqa": EvaluationSet(ocr_tokens=False),
    }
    samples = module(places, eval_folder).build_samples("test")
    assert [sample.source for sample in samples] == ["vizwiz", "textvqa", "textvqa"]
    assert samples[0].references == ("a cat",) * 10


def test_sets_of_the_hub_are_the_default() -> None:
    data = module(["gqa", "pope"])
    assert [where.hub_path for where in data.sets.values()] == [HUB_SETS["gqa"][0], HUB_SETS["pope"][0]]
    assert [where.split for where in data.sets.values()] == ["testdev", "test"]


def test_limits_are_per_source_and_seeded(eval_folder: Path) -> None:
    data = module(["gqa", "pope", "mmbench"], eval_folder, limit=1)
    samples = data.build_samples("test")
    # a question of MMBench comes with all its rotations
    assert Counter(sample.source for sample in samples) == {
        "gqa": 1, "pope_adversarial": 1, "pope_popular": 1, "pope_random": 1, "mmbench": 3,
    }  # fmt: skip
    indices = [sample.row["index"] for sample in samples if sample.source == "mmbench" and sample.row]
    assert len({index % 1_000_000 for index in indices}) == 1
    drawn = [
        str(module(["gqa", "pope", "mmbench"], eval_folder, limit=1, seed=seed).build_samples("test"))
        for seed in range(4)
    ]
    assert drawn[0] == str(module(["gqa", "pope", "mmbench"], eval_folder, limit=1, seed=0).build_samples("test"))
    assert len(set(drawn)) > 1
    places = {"gqa": EvaluationSet(limit=1), "vizwiz": EvaluationSet()}
    assert sources(module(places, eval_folder, limit=2)) == {"gqa": 1, "vizwiz": 2}


def test_bad_rows_are_skipped_or_stop_the_run(eval_folder: Path) -> None:
    questions = eval_folder / "gqa" / "llava_gqa_testdev_balanced.jsonl"
    questions.write_text(questions.read_text().replace("n7.jpg", "n8.jpg", 1))
    with pytest.raises(ValueError, match=r"balanced\.jsonl, line 1: image .*n8\.jpg: no such file"):
        module(["gqa"], eval_folder).build_samples("test")
    with pytest.warns(UserWarning, match="1 of 2 rows were skipped"):
        assert len(module(["gqa"], eval_folder, on_bad_row="skip").build_samples("test")) == 1


def test_other_templates(eval_folder: Path) -> None:
    sample = module(["scienceqa"], eval_folder, template="llama3").build_samples("test")[0]
    assert sample.prompt.endswith(
        f"user<|end_header_id|>\n\n<image>\nWhich?{LETTER}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert sample.options == ("A<|eot_id|>", "B<|eot_id|>")
    assert sample.target == "B<|eot_id|>"


def test_batches_of_all_sets(eval_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_llava_processor(model, make_bpe())
    data = VQADataModule(str(model), list(DATASETS), str(eval_folder), eval_batch_size=4, num_workers=0)
    data.prepare_data()
    data.setup("test")
    batches = list(data.test_dataloader())
    assert Counter(sample.source for batch in batches for sample in batch["samples"]) == EVERYTHING
    for batch in batches:
        images = sum(len(sample.images) for sample in batch["samples"])
        assert ("vision" in batch) == (images > 0)
        if images:
            assert batch["vision"]["pixel_values"].shape == (images, 3, 32, 32)


@pytest.mark.parametrize(
    ("datasets", "error", "message"),
    [
        (["popr"], ValueError, r"datasets: unknown set 'popr'\. Did you mean 'pope'\? Known sets: vqav2, gqa"),
        ([], ValueError, "datasets: name at least one of vqav2"),
        ({"gqa": EvaluationSet(images=".")}, ValueError, "gqa: images without questions, the file that asks"),
        (
            {"gqa": EvaluationSet(questions="q.json", hub_path="x")},
            ValueError,
            "gqa: give hub_path or files, not both; found hub_path and questions",
        ),
        ({"gqa": EvaluationSet(questions="q.json")}, FileNotFoundError, r"gqa: questions q\.json: no such file"),
    ],
)
def test_arguments_are_checked_at_once(datasets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        module(datasets)


def test_files_that_are_missing(eval_folder: Path, tmp_path: Path) -> None:
    (eval_folder / "gqa" / "data" / "testdev_balanced_questions.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"gqa: annotations .*testdev_balanced_questions\.json: no such file"):
        module(["gqa"], eval_folder)
    with pytest.raises(FileNotFoundError, match=r"data_dir .*nowhere is not a folder"):
        module(["gqa"], tmp_path / "nowhere")


def test_arguments_come_from_yaml(eval_folder: Path, tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(TextDataModule, "data")
    config = tmp_path / "config.yaml"
    head = (
        f"data:\n  class_path: datamodules.VQADataModule\n  init_args:\n    tokenizer: m\n    data_dir: {eval_folder}\n"
    )
    config.write_text(head + "    datasets: [gqa, pope]\n    limit: 1\n")
    data = parser.instantiate(parser.parse_path(str(config))).data
    assert (list(data.sets), data.limit) == (["gqa", "pope"], 1)
    config.write_text(
        head + "    datasets:\n      gqa: {limit: 1}\n"
        f"      vizwiz:\n        questions: {eval_folder}/vizwiz/llava_test.jsonl\n"
        f"        images: {eval_folder}/vizwiz/test\n"
    )
    data = parser.instantiate(parser.parse_path(str(config))).data
    assert data.sets["gqa"].limit == 1
    assert data.sets["vizwiz"].annotations is None
    data.template = get_conversation_template("vicuna_v1")
    assert sources(data) == {"gqa": 1, "vizwiz": 2}
    config.write_text(head + "    datasets:\n      gqa: {limits: 1}\n")
    with pytest.raises(SystemExit):
        parser.parse_path(str(config))
