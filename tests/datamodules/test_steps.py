"""What a batch knows of its optimizer step, worked by hand and against the labels of the batches themselves."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from tiny_llava import save_image, save_llava
from torch.utils.data import DataLoader

from datamodules import InstructionDataModule, LengthGroupedSampler, LlavaInstructions, PreferenceDataModule
from datamodules.packing import PackingSampler
from datamodules.steps import StepIndices, StepPlan
from dora_lightning.data import IGNORE, OptimizerStep

COUNTS = [1, 60, 2, 7, 30, 1, 11, 5, 3, 44]


def count(indices: list[int]) -> tuple[str, int]:
    return "tokens", sum(COUNTS[index] for index in indices)


def make(rank: int, accumulated: int = 2, limit: int = 5, replicas: int = 2) -> LengthGroupedSampler:
    """Ten samples in five global batches of two, one sample on each of two ranks."""
    sampler = LengthGroupedSampler([9] * len(COUNTS), 2 // replicas, num_replicas=replicas, rank=rank)
    sampler.plan = StepPlan(count, lambda epoch: accumulated + epoch, limit)
    return sampler


def steps(sampler: LengthGroupedSampler) -> list[tuple[list[int], OptimizerStep]]:
    return [(list(batch), batch.step) for batch in sampler]  # type: ignore[attr-defined]


def test_all_processes_know_what_is_in_their_step() -> None:
    ranks = [steps(make(rank)) for rank in range(2)]
    assert [batch for batch, _ in ranks[0]] == [
        list(batch) for batch in LengthGroupedSampler([9] * 10, 1, num_replicas=2, rank=0)
    ]
    # two, two and one global batches
    for numbers in ([0, 1], [2, 3], [4]):
        members = [index for rank in ranks for number in numbers for index in rank[number][0]]
        supervised = sum(COUNTS[index] for index in members)
        for rank in ranks:
            for number in numbers:
                batch, step = rank[number]
                own = COUNTS[batch[0]]
                assert step == OptimizerStep(supervised, own, batches=2, replicas=2, ends=number == numbers[-1])
                assert step.share == own * 4 / supervised
        # as the trainer divides them and the strategy averages them, the shares are those of one mean
        assert sum(rank[number][1].share for rank in ranks for number in numbers) / 4 == pytest.approx(1)


def test_the_last_step_ends_where_the_trainer_stops() -> None:
    batches = steps(make(0, limit=3, replicas=1))
    assert [step.ends for _, step in batches[:3]] == [False, True, True]
    assert batches[2][1].supervised == batches[2][1].own


def test_the_number_of_batches_changes_with_the_epoch() -> None:
    sampler = make(0, replicas=1)
    sampler.epoch_offset = 1  # a restart made the trainer count one epoch twice
    sampler.set_epoch(1)
    assert sampler.epoch == 2
    batches = steps(sampler)
    assert [step.batches for _, step in batches] == [3] * 5
    assert [step.ends for _, step in batches] == [False, False, True, False, True]


def test_a_step_that_is_resumed_counts_what_is_left() -> None:
    whole = steps(make(0, accumulated=3, replicas=1))
    sampler = make(0, accumulated=3, replicas=1)
    sampler.skip_batches = 2
    with pytest.warns(UserWarning, match="its first 2 batches of 3 are lost"):
        left = steps(sampler)
    assert [batch for batch, _ in left] == [batch for batch, _ in whole[2:]]
    assert left[0][1].supervised == left[0][1].own
    assert left[1:] == whole[3:]
    sampler.skip_batches = 3
    assert steps(sampler) == whole[3:]


def test_means_over_different_things_have_their_batches_weight() -> None:
    sampler = make(0, accumulated=4, replicas=1)
    first = next(iter(sampler))
    sampler.plan = StepPlan(lambda indices: ("rows", 2) if indices == first else count(indices), lambda _: 4, 5)
    batches = steps(sampler)
    assert batches[0][1].share == pytest.approx(1)  # the only one of its kind is a quarter of the step
    assert sum(step.share for _, step in batches[1:4]) == pytest.approx(3)
    tokens = sum(step.own for _, step in batches[1:4])
    for _, step in batches[1:4]:
        assert step.share == pytest.approx(3 * step.own / tokens)


def test_without_anything_supervised_a_step_has_no_share() -> None:
    assert OptimizerStep(0, 0, batches=2, replicas=2, ends=True).share == 0


def test_rows_of_samples_are_counted_by_row() -> None:
    samplers = [PackingSampler([5, 4, 3, 2, 6], 10, 1, num_replicas=2, rank=rank) for rank in range(2)]
    for sampler in samplers:
        sampler.plan = StepPlan(lambda rows: ("tokens", sum(map(len, rows))), lambda _: 1, len(sampler))
    for left, right in zip(*samplers, strict=True):
        assert left.step.supervised == right.step.supervised == len(left[0]) + len(right[0])  # type: ignore[attr-defined]


def test_indices_go_to_workers() -> None:
    indices = StepIndices([3, 1], OptimizerStep(4, 2, 1, 2, True))
    received = pickle.loads(pickle.dumps(indices))
    assert (received, received.step) == (indices, indices.step)


def check_counts(data: Any, epochs: int = 2) -> list[int]:
    """What is said beforehand is what the labels of the batches are; returns the counts of all batches."""
    data.setup("fit")
    loader: DataLoader[Any] = data.train_dataloader()
    found = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for batch in loader:
            labels = batch["labels"][:, 1:]
            step = batch["step"]
            found.append(int((labels != IGNORE).sum()))
            assert step == OptimizerStep(found[-1], found[-1], 1, 1, True)
    return found


def instructions(folder: Path) -> Path:
    rows = [{"instruction": f"is {n} hot?", "output": " ".join(["hot"] * (n * n % 37 + 1))} for n in range(21)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


@pytest.mark.parametrize("packing_len", [None, "batch", 96])
@pytest.mark.parametrize("train_on_inputs", [False, True])
def test_counts_of_texts(tokenizer_folder: str, tmp_path: Path, packing_len: Any, train_on_inputs: bool) -> None:
    data = InstructionDataModule(
        tokenizer_folder,
        str(instructions(tmp_path)),
        template="plain",
        batch_size=4,
        cutoff_len=64,
        packing_len=packing_len,
        train_on_inputs=train_on_inputs,
    )
    assert len(set(check_counts(data))) > 3


def test_counts_of_images(tmp_path: Path) -> None:
    rows = []
    for number in range(12):
        turns = [
            {"from": "human", "value": "<image>\nis it?" if number % 3 else "is it?"},
            {"from": "gpt", "value": "hot " * number + "true"},
        ]
        row: dict[str, Any] = {"id": str(number), "conversations": turns}
        if number % 3:
            row["image"] = save_image(tmp_path / f"{number % 4}.png", number % 4).name
        rows.append(row)
    (tmp_path / "train.json").write_text(json.dumps(rows))
    llava = str(save_llava(tmp_path / "llava"))
    for shared in (False, True):
        data = LlavaInstructions(
            llava, str(tmp_path / "train.json"), batch_size=2, num_workers=0, cutoff_len=256, share_images=shared
        )
        assert len(set(check_counts(data))) > 3


def test_pairs_are_counted(tokenizer_folder: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"is {n}?", "chosen": " hot" * (n + 1), "rejected": " cold"} for n in range(6)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    data = PreferenceDataModule(tokenizer_folder, str(tmp_path / "pairs.json"), template="none", batch_size=4)
    data.setup("fit")
    assert [batch["step"] for batch in data.train_dataloader()] == [OptimizerStep(4, 4, 1, 1, True)] * 2


def test_a_collator_that_does_not_count_makes_batches_without_a_step(tokenizer_folder: str, tmp_path: Path) -> None:
    class Own(InstructionDataModule):
        def train_collator(self) -> Any:
            collator = super().train_collator()
            return lambda samples: collator(samples)

    data = Own(tokenizer_folder, str(instructions(tmp_path)), template="plain", batch_size=4)
    data.setup("fit")
    assert all("step" not in batch for batch in data.train_dataloader())
