"""Batches of easy-VQA for VL-BART: their sources, images that are shared, and the seed."""

from collections import Counter
from typing import Any

import pytest
import torch
from tiny_vl_bart import BART, TOWER, WORDS

pytest.importorskip("easy_vqa")

from datamodules import VLBartEasyVQADataModule
from dora_lightning.open_clip_tower import OpenClipVision
from dora_lightning.vl_bart import VLBartParts

SIZES = {"train_images": 12, "questions_per_image": 4, "val_images": 5, "val_size": 10, "test_size": 30}
SIDE = TOWER["image_size"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(tmp_path_factory.getbasetemp() / "vl-bart-easy-cache"))


def ready(stage: str, **options: Any) -> VLBartEasyVQADataModule:
    parts = VLBartParts(BART, tokenizer=WORDS, vision=OpenClipVision(config=TOWER))
    data = VLBartEasyVQADataModule(parts, **(SIZES | {"batch_size": 5} | options))
    data.setup(stage)
    return data


def test_training_batches_are_images_with_all_their_questions() -> None:
    data = ready("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    asked: dict[str, set[int]] = {}
    for batch in batches:
        images = [sample.images[0] for sample in batch["samples"]]
        vision = batch["vision"]
        assert len(vision["pixel_values"]) == 5
        assert vision["pixel_values"].shape[1:] == (3, SIDE, SIDE)
        assert vision["image_counts"].tolist() == [1] * 5
        assert len(vision["visual_index"]) == len(images)
        for image, place in zip(images, vision["visual_index"].tolist(), strict=True):
            assert images.index(image) == vision["visual_index"].tolist().index(place)
        for sample in batch["samples"]:
            asked.setdefault(sample.images[0], set()).add(sample.row["question_id"])
            assert sample.source == "easy_vqa"
    assert len(asked) == 12
    rows = data.asked("train")
    assert {number for numbers in asked.values() for number in numbers} == {row.row["question_id"] for row in rows}
    assert max(map(len, asked.values())) == 4


def test_batches_are_not_sorted_by_the_lengths_of_questions() -> None:
    loader: Any = ready("fit", train_images=200, questions_per_image=1, batch_size=20).train_dataloader()
    lengths = [batch["attention_mask"].sum(1) for batch in loader]
    spread = torch.stack([(own.max() - own.min()).float() for own in lengths]).mean()
    every = torch.cat(lengths)
    assert spread > 0.5 * (every.max() - every.min())


def test_evaluation_is_each_question_once_and_of_one_kind() -> None:
    data = ready("test", eval_batch_size=4)
    batches = list(data.test_dataloader())
    assert all(len({sample.source for sample in batch["samples"]}) == 1 for batch in batches)
    numbers = [sample.row["question_id"] for batch in batches for sample in batch["samples"]]
    assert len(numbers) == len(set(numbers)) == 30
    kinds = Counter(sample.source for batch in batches for sample in batch["samples"])
    assert set(kinds) == {"easy_vqa_shape", "easy_vqa_color", "easy_vqa_yes_no"}
    assert all(sample.references == (sample.target,) for batch in batches for sample in batch["samples"])
    # questions, not images, are counted in validation too
    data = ready("fit", eval_batch_size=3, val_images=2, val_size=None)
    batches = list(data.val_dataloader())
    assert {len(batch["samples"]) for batch in batches} <= {1, 2, 3}
    numbers = [sample.row["question_id"] for batch in batches for sample in batch["samples"]]
    assert len(numbers) == len(set(numbers)) > 6


def test_the_seed_decides_what_is_drawn_and_the_order() -> None:
    def epoch(seed: int, number: int = 0) -> list[list[int]]:
        loader: Any = ready("fit", seed=seed).train_dataloader()
        loader.sampler.set_epoch(number)
        return [[sample.row["question_id"] for sample in batch["samples"]] for batch in loader]

    assert epoch(1) == epoch(1)
    assert epoch(1) != epoch(1, 1)
    assert {number for batch in epoch(1) for number in batch} == {number for batch in epoch(1, 1) for number in batch}
    assert {number for batch in epoch(1) for number in batch} != {number for batch in epoch(2) for number in batch}
    first, again = ready("fit", seed=1), ready("fit", seed=1)
    assert first.asked("validate") == again.asked("validate") != ready("fit", seed=2).asked("validate")
