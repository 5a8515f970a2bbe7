"""A run that is stopped anywhere and resumed sees the batches that an uninterrupted run sees."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import Stage, TextDataModule
from dora_lightning.data import Sample

pytestmark = [
    # lightning 2.6 under torch 2.14
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # on machines with more cores Lightning wants workers, which would only pass ready tensors around
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # a resumed run writes beside the checkpoint it came from
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

BATCH_SIZE, SAMPLES = 4, 38  # ten batches in an epoch, the last one filled up
BATCHES = 10


class Numbers(TextDataModule):
    """Samples of many lengths whose prompt begins with their number."""

    def build_samples(self, stage: Stage) -> list[Sample]:
        count = SAMPLES if stage == "train" else 5
        return [Sample(f"{number} " + "word " * (number * 7 % 23), "answer1") for number in range(count)]


class Recorder(LightningModule):
    """Trains one weight and writes down (epoch, batch index, numbers of the samples)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int, tuple[str, ...]]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        numbers = tuple(sample.prompt.split()[0] for sample in batch["samples"])
        self.seen.append((self.current_epoch, batch_idx, numbers))
        # the trajectory depends on the order of the batches
        return (self.weight - batch["input_ids"].float().mean()) ** 2

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class KilledError(RuntimeError):
    pass


class KillAt(Callback):
    """Stops the run with an exception at the start of the given batch, counted over all epochs."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            raise KilledError


def fit(
    folder: Path,
    tokenizer: str,
    callbacks: list[Callback],
    ckpt_path: str | None = None,
    num_workers: int = 0,
    batch_size: int = BATCH_SIZE,
    **options: Any,
) -> Recorder:
    module = Recorder()
    data = Numbers(tokenizer, batch_size=batch_size, seed=3, num_workers=num_workers)
    limits = {"max_epochs": 3} if "max_steps" not in options else {}
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **limits,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def saver(folder: Path, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **when)


def check_resume(
    folder: Path, tokenizer: str, when: dict[str, Any], checkpoint: str, first: int, **options: Any
) -> None:
    """Resume from ``checkpoint`` after a kill; it must continue the uninterrupted run at its batch ``first``."""
    whole = fit(folder / "whole", tokenizer, [], **options)
    kill_at = min(first + 2, len(whole.seen) - 1)
    with pytest.raises(KilledError):
        fit(folder / "killed", tokenizer, [saver(folder, **when), KillAt(kill_at)], **options)
    resumed = fit(folder / "resumed", tokenizer, [saver(folder, **when)], str(folder / checkpoint), **options)
    assert resumed.seen == whole.seen[first:]
    assert resumed.weight.item() == whole.weight.item()


EVERY_2_STEPS = {"every_n_train_steps": 2}


def test_uninterrupted_run_sees_every_sample_in_an_order_of_its_own_per_epoch(
    tmp_path: Path, tokenizer_folder: str
) -> None:
    seen = fit(tmp_path, tokenizer_folder, []).seen
    assert [place[:2] for place in seen] == [(epoch, batch) for epoch in range(3) for batch in range(BATCHES)]
    epochs = [[numbers for epoch, _, numbers in seen if epoch == number] for number in range(3)]
    for epoch in epochs:
        assert {number for batch in epoch for number in batch} == {str(number) for number in range(SAMPLES)}
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("limits", [{}, {"max_steps": 28}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    ("checkpoint", "first"),
    [
        ("epoch=0-step=4.ckpt", 4),
        ("epoch=0-step=10.ckpt", 10),  # saved in the last batch's hook
        ("epoch=1-step=12.ckpt", 12),
        ("epoch=1-step=16.ckpt", 16),
        ("epoch=2-step=24.ckpt", 24),
    ],
)
def test_resume_in_the_middle_of_an_epoch(
    tmp_path: Path, tokenizer_folder: str, checkpoint: str, first: int, limits: dict[str, int]
) -> None:
    check_resume(tmp_path, tokenizer_folder, EVERY_2_STEPS, checkpoint, first, **limits)


@pytest.mark.parametrize("limits", [{}, {"max_steps": 14}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    ("checkpoint", "first"),
    [("epoch=0-step=2.ckpt", 4), ("epoch=1-step=6.ckpt", 12), ("epoch=1-step=8.ckpt", 16)],
)
def test_resume_with_accumulated_gradients(
    tmp_path: Path, tokenizer_folder: str, checkpoint: str, first: int, limits: dict[str, int]
) -> None:
    options = {"accumulate_grad_batches": 2, **limits}
    check_resume(tmp_path, tokenizer_folder, EVERY_2_STEPS, checkpoint, first, **options)


@pytest.mark.parametrize("limits", [{}, {"max_steps": 28}], ids=["epochs", "steps"])
@pytest.mark.parametrize("validates", [True, False], ids=["validation", "no-validation"])
@pytest.mark.parametrize(("checkpoint", "first"), [("epoch=0-step=10.ckpt", 10), ("epoch=1-step=20.ckpt", 20)])
def test_resume_from_the_end_of_an_epoch(
    tmp_path: Path, tokenizer_folder: str, checkpoint: str, first: int, validates: bool, limits: dict[str, int]
) -> None:
    when = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    options = limits if validates else {**limits, "limit_val_batches": 0}
    check_resume(tmp_path, tokenizer_folder, when, checkpoint, first, **options)


@pytest.mark.parametrize("limits", [{}, {"max_steps": 28}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    ("checkpoint", "first"),
    [("epoch=0-step=5.ckpt", 5), ("epoch=0-step=10.ckpt", 10), ("epoch=1-step=15.ckpt", 15)],
)
def test_resume_from_a_checkpoint_saved_after_validation(
    tmp_path: Path, tokenizer_folder: str, checkpoint: str, first: int, limits: dict[str, int]
) -> None:
    when = {"every_n_epochs": 1, "save_on_train_epoch_end": False}
    check_resume(tmp_path, tokenizer_folder, when, checkpoint, first, val_check_interval=5, **limits)


@pytest.mark.parametrize(("checkpoint", "first"), [("epoch=0-step=4.ckpt", 4), ("epoch=0-step=6.ckpt", 6)])
def test_resume_with_limited_batches(tmp_path: Path, tokenizer_folder: str, checkpoint: str, first: int) -> None:
    check_resume(tmp_path, tokenizer_folder, EVERY_2_STEPS, checkpoint, first, limit_train_batches=6)


def test_resume_of_a_resumed_run(tmp_path: Path, tokenizer_folder: str) -> None:
    # with max_steps, a restart from the end of an epoch leaves Lightning's count of epochs one too high
    options = {"max_steps": 28}
    whole = fit(tmp_path, tokenizer_folder, [], **options)
    at_ends = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    with pytest.raises(KilledError):
        fit(tmp_path, tokenizer_folder, [saver(tmp_path, **at_ends), KillAt(12)], **options)
    for checkpoint, kill_at in [("epoch=0-step=10", 22), ("epoch=1-step=20", 25)]:
        callbacks = [saver(tmp_path, **at_ends), saver(tmp_path / "steps", **EVERY_2_STEPS), KillAt(kill_at)]
        with pytest.raises(KilledError):
            fit(tmp_path, tokenizer_folder, callbacks, str(tmp_path / f"{checkpoint}.ckpt"), **options)
    last = fit(tmp_path, tokenizer_folder, callbacks[:2], str(tmp_path / "steps/epoch=2-step=24.ckpt"), **options)
    assert last.seen == whole.seen[24:]
    assert last.weight.item() == whole.weight.item()


def test_resume_with_workers(tmp_path: Path, tokenizer_folder: str) -> None:
    # workers prefetch, so the order must be right as soon as the loader's iterator is made
    check_resume(tmp_path, tokenizer_folder, EVERY_2_STEPS, "epoch=1-step=14.ckpt", 14, num_workers=2)


def test_resume_with_another_batch_size_is_noticed(tmp_path: Path, tokenizer_folder: str) -> None:
    with pytest.raises(KilledError):
        fit(tmp_path, tokenizer_folder, [saver(tmp_path, **EVERY_2_STEPS), KillAt(5)])
    with pytest.warns(UserWarning, match="global_batch_size was 4 and is 2"):
        fit(
            tmp_path,
            tokenizer_folder,
            [saver(tmp_path, **EVERY_2_STEPS)],
            str(tmp_path / "epoch=0-step=4.ckpt"),
            batch_size=2,
        )


def test_overfit_batches(tmp_path: Path, tokenizer_folder: str) -> None:
    with pytest.warns(UserWarning, match="overfit"):
        seen = fit(tmp_path, tokenizer_folder, [], overfit_batches=2).seen
    assert len(seen) == 6
    assert seen[0][2] == seen[2][2] == ("0",)
