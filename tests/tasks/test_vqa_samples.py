"""The samples of the data modules have what the task reads: right answers get full marks in every benchmark."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from datamodules import vqa_rows
from datamodules.conversation import get_conversation_template
from datamodules.vqa_rows import VisualQuestion
from dora_lightning.data import Sample
from tasks import VQA

MMBENCH = {"question": "What is it?", "A": "a boat", "B": "a hat", "category": "maps", "l2-category": "logic"}


def questions(image: Path) -> list[VisualQuestion]:
    mmbench = [{"index": 7, "answer": "A"}, {"index": 1_000_007, "answer": "B", "A": "a hat", "B": "a boat"}]
    return [
        vqa_rows.vqav2(1, "What colour?", image, ("red",) * 10, image_id=3),
        vqa_rows.gqa("1", "What colour?", image, ("red",)),
        vqa_rows.vizwiz("v", "What colour?", image, ("unanswerable",) * 10, "image.png"),
        vqa_rows.textvqa(1, "Which brand?", image, ("nokia",) * 10, "0054", ["nokia"]),
        vqa_rows.scienceqa("1", "Which one?", image, ["iron", "wood"], 1),
        vqa_rows.scienceqa("2", "Which one?", None, ["iron", "wood", "glass"], 2),
        vqa_rows.pope(1, "Is there a dog?", image, "yes", "image.png", "random"),
        vqa_rows.pope(2, "Is there a dog?", image, "no", "image.png", "random"),
        *(vqa_rows.mmbench({**MMBENCH, **columns}, image) for columns in mmbench),
        VisualQuestion(
            "easy_vqa_shape", 1, "What shape?", "What shape?", image, ("circle",), options=("circle", "triangle")
        ),
    ]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def samples(image: Path, template: str) -> list[Sample]:
    return [question.sample(get_conversation_template(template)) for question in questions(image)]


@pytest.mark.parametrize("template", ["vicuna_v1", "llama3", "chatml"])
def test_right_answers_get_full_marks(image: Path, template: str) -> None:
    asked = samples(image, template)
    end = get_conversation_template(template).end  # type: ignore[union-attr]
    scores = [torch.tensor([float(option == sample.target) for option in sample.options]) for sample in asked]
    task = VQA("both")
    task.update(asked, [sample.target.replace(end, "") for sample in asked], scores)
    results = task.compute()
    benchmarks = ("vqav2", "gqa", "vizwiz", "textvqa", "scienceqa", "pope_random", "mmbench", "easy_vqa", "mean")
    assert {results[f"{benchmark}/accuracy"].item() for benchmark in benchmarks} == {1.0}
    assert {value.item() for name, value in results.items() if name.endswith("/ranking")} == {1.0}
    assert {value.item() for name, value in results.items() if name.endswith("/unparsed")} == {0.0}
    assert results["mmbench/maps/accuracy"] == results["mmbench/logic/accuracy"] == results["scienceqa/overall"] == 1.0
    assert results["pope/f1"] == 1.0
    ranked = [record["ranked"] for record in task.records() if "ranked" in record]
    assert ranked == ["B", "C", "Yes", "No", "A", "B", "circle"]
    assert task.files(task.records()).keys() == {
        *(f"{name}_answers.jsonl" for name in ("vqav2", "gqa", "vizwiz", "textvqa", "scienceqa", "pope", "mmbench")),
        *(f"{name}_submission.json" for name in ("vqav2", "gqa", "vizwiz")),
        *("scienceqa_output.json", "scienceqa_result.json", "mmbench_submission.xlsx", "examples.png"),
    }


def test_wrong_answers_get_none(image: Path) -> None:
    asked = samples(image, "vicuna_v1")
    task = VQA("both")
    texts = ["D" if sample.row and "choices" in sample.row else "something else" for sample in asked]
    scores = [torch.tensor([-float(option == sample.target) for option in sample.options]) for sample in asked]
    task.update(asked, texts, scores)
    results = task.compute()
    for benchmark in ("vqav2", "gqa", "vizwiz", "textvqa", "scienceqa", "mmbench", "easy_vqa"):
        assert results[f"{benchmark}/accuracy"] == 0.0
    assert results["pope_random/yes_ratio"] == 1.0
    assert results["scienceqa/unparsed"] == results["mmbench/unparsed"] == 1.0
    assert results["mean/ranking"] == 0.0
