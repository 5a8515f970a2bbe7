from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from datamodules import IGNORE, Stage, TextDataModule
from dora_lightning.data import Sample

pytestmark = [
    # lightning 2.6 under torch 2.14
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


class Given(TextDataModule):
    """Yields the samples that it is given."""

    def __init__(self, tokenizer: str, samples: dict[Stage, list[Sample]], **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self.samples = samples
        self.built: list[Stage] = []

    def build_samples(self, stage: Stage) -> list[Sample]:
        self.built.append(stage)
        return self.samples.get(stage, [])


def numbered(count: int) -> list[Sample]:
    return [Sample(f"{number} " + "x" * (number % 50), "true", source="numbers") for number in range(count)]


def numbers(loader: Any) -> list[str]:
    return [sample.prompt.split()[0] for batch in loader for sample in batch["samples"]]


def test_each_stage_is_built_once_and_only_when_needed(tokenizer_folder: str) -> None:
    data = Given(tokenizer_folder, {"train": numbered(9), "validate": numbered(5), "test": numbered(3)})
    data.setup("validate")
    data.setup("fit")
    data.setup("test")
    data.setup("predict")
    assert data.built == ["validate", "train", "test"]
    everything = {str(number) for number in range(9)}
    assert set(numbers(data.train_dataloader())) == everything
    assert sorted(numbers(data.val_dataloader())) == ["0", "1", "2", "3", "4"]
    assert sorted(numbers(data.test_dataloader())) == sorted(numbers(data.predict_dataloader())) == ["0", "1", "2"]


def test_batch_sizes(tokenizer_folder: str) -> None:
    samples = {"train": numbered(64), "validate": numbered(20)}
    data = Given(tokenizer_folder, samples, batch_size=8, eval_batch_size=6)
    data.setup("fit")
    assert [len(batch["samples"]) for batch in data.train_dataloader()] == [8] * 8
    assert [len(batch["samples"]) for batch in data.val_dataloader()] == [5, 5, 5, 5]


def test_batches_of_like_length_can_be_switched_off(tokenizer_folder: str) -> None:
    widths = []
    for group_by_length in (True, False):
        data = Given(tokenizer_folder, {"train": numbered(64)}, batch_size=8, group_by_length=group_by_length)
        data.setup("fit")
        batches = list(data.train_dataloader())
        assert {sample.prompt for batch in batches for sample in batch["samples"]} == {s.prompt for s in numbered(64)}
        widths.append(sum(batch["input_ids"].shape[1] for batch in batches))
    assert widths[0] < 0.75 * widths[1]


def test_samples_whose_target_is_cut_off_are_left_out_and_reported(tokenizer_folder: str) -> None:
    samples = [*numbered(5), Sample("y" * 40, "true", source="long"), Sample("y" * 40, "true", source="longer")]
    data = Given(tokenizer_folder, {"train": samples}, cutoff_len=16)
    with pytest.warns(UserWarning, match=r"2 of 7 train samples were left out, since cutoff_len=16.*long: 1, longer"):
        data.setup("fit")
    (batch,) = data.train_dataloader()
    assert {sample.source for sample in batch["samples"]} == {"numbers"}
    assert batch["labels"].ne(IGNORE).any(1).all()


def test_a_cutoff_that_leaves_no_target_is_an_error(tokenizer_folder: str) -> None:
    data = Given(tokenizer_folder, {"train": [Sample("y" * 40, "true")] * 3}, cutoff_len=16)
    with pytest.raises(ValueError, match=r"3 of 3 train samples .* use a larger cutoff_len"):
        data.setup("fit")


def test_test_samples_are_kept_however_long(tokenizer_folder: str) -> None:
    data = Given(tokenizer_folder, {"test": [Sample("y" * 40, "true")] * 3}, cutoff_len=16)
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert batch["input_ids"].shape == (3, 16)


def test_no_training_samples_is_an_error(tokenizer_folder: str) -> None:
    with pytest.raises(ValueError, match="Given has no training samples"):
        Given(tokenizer_folder, {}).setup("fit")


class Module(LightningModule):
    """Writes down, per process, which samples it got."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder = folder

    def record(self, stage: str, batch: dict[str, Any]) -> None:
        with (self.folder / f"{stage}{self.global_rank}").open("a") as file:
            file.write(" ".join(sample.prompt.split()[0] for sample in batch["samples"]) + "\n")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.record(f"train{self.current_epoch}-", batch)
        return self.weight * batch["input_ids"].sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.record("validate", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.record("test", batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        return [sample.prompt.split()[0] for sample in batch["samples"]]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def batches(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()]


def trainer_in(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **options,
    )


def test_prediction_covers_the_test_samples(tokenizer_folder: str, tmp_path: Path) -> None:
    data = Given(tokenizer_folder, {"test": numbered(11)}, eval_batch_size=4)
    predictions = trainer_in(tmp_path).predict(Module(tmp_path), datamodule=data)
    assert sorted(number for batch in predictions for number in batch) == sorted(map(str, range(11)))


def test_no_validation_samples_means_no_validation(tokenizer_folder: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Please make sure this was your intention"):
        trainer_in(tmp_path).fit(Module(tmp_path), datamodule=Given(tokenizer_folder, {"train": numbered(9)}))
    assert not list(tmp_path.glob("validate*"))


@pytest.mark.filterwarnings("ignore:.*use of fork.*|.*multi-threaded.*")
def test_two_processes_share_the_batches_of_one(tokenizer_folder: str, tmp_path: Path) -> None:
    samples: dict[Stage, list[Sample]] = {"train": numbered(45), "validate": numbered(13)}
    for name, batch_size, options in [
        ("one", 8, {}),
        ("two", 4, {"strategy": "ddp_fork", "devices": 2}),
    ]:
        (tmp_path / name).mkdir()
        data = Given(tokenizer_folder, samples, batch_size=batch_size, eval_batch_size=4)
        trainer_in(tmp_path, **options).fit(Module(tmp_path / name), datamodule=data)
    for epoch in range(2):
        whole = batches(tmp_path / "one" / f"train{epoch}-0")
        halves = [batches(tmp_path / "two" / f"train{epoch}-{rank}") for rank in range(2)]
        assert len(whole) == 6
        assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in whole]
    validated = [
        number for rank in range(2) for batch in batches(tmp_path / "two" / f"validate{rank}") for number in batch
    ]
    assert sorted(validated) == sorted([str(number) for number in range(13)] * 2)  # once in each of two epochs
