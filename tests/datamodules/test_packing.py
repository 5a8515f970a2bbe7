"""Rows of several samples: which samples share one, in every epoch, on any number of processes, and after a restart."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import PreTrainedTokenizerBase

from datamodules import IGNORE, Collator, LengthGroupedSampler, Stage, TextDataModule, encode_samples
from datamodules.packing import PackingCollator, PackingSampler, pack_lengths, share_rows
from dora_lightning.data import Sample

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def some_lengths(count: int, longest: int = 60, seed: int = 0) -> list[int]:
    return [random.Random(seed * 1000 + number).randint(1, longest) for number in range(count)]


# Rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_every_sample_is_in_one_row_and_no_row_overflows(seed: int) -> None:
    lengths = some_lengths(200, seed=seed)
    rows = pack_lengths(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(200))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 64
    # best fit decreasing needs at most 11/9 of the fewest rows there could be, and four more (Johnson 1974)
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) + 4


def test_rows_worked_by_hand() -> None:
    # 7 opens a row, 6 another; 4 fits beside 6 exactly, 3 beside 7 exactly, 2 opens a third and 1 joins it
    assert pack_lengths([3, 6, 1, 7, 2, 4], 10) == [[3, 0], [1, 5], [4, 2]]


def test_a_sample_that_fits_in_no_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="a sample of 11 tokens does not fit in a row of 10"):
        pack_lengths([3, 11], 10)


def epoch_of(sampler: LengthGroupedSampler, epoch: int) -> list[Any]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_epochs_have_all_samples_in_as_many_batches_and_other_company() -> None:
    lengths = some_lengths(300, longest=20)
    sampler = PackingSampler(lengths, 64, batch_size=4, seed=5)
    rows = []
    for epoch in range(3):
        batches = epoch_of(sampler, epoch)
        assert len(batches) == len(sampler)
        assert batches == epoch_of(PackingSampler(lengths, 64, batch_size=4, seed=5), epoch)
        rows.append({frozenset(row) for batch in batches for row in batch})
        assert {index for row in rows[-1] for index in row} == set(range(300))
        # the rows that fill up the last batch are seen twice, no sample else
        assert sum(map(len, rows[-1])) == 300
        assert max(sum(lengths[index] for index in row) for row in rows[-1]) <= 64
    assert len(rows[0] & rows[1]) < len(rows[0]) / 4
    assert {frozenset(row) for batch in PackingSampler(lengths, 64, 4, seed=6) for row in batch} != rows[0]


def test_two_processes_have_the_global_batches_of_one() -> None:
    lengths = some_lengths(101)
    whole = PackingSampler(lengths, 64, batch_size=6, seed=1)
    halves = [PackingSampler(lengths, 64, batch_size=3, seed=1, num_replicas=2, rank=rank) for rank in range(2)]
    for epoch in range(2):
        first, second = (epoch_of(half, epoch) for half in halves)
        assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [
            sorted(batch) for batch in epoch_of(whole, epoch)
        ]


# Batches -------------------------------------------------------------------------------------------------------------


def test_a_batch_of_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    samples = [Sample(f"{'word ' * count}Answer:", " true") for count in (1, 4, 2)]
    items = encode_samples(samples, tokenizer, train_on_inputs=True)
    batch = PackingCollator(tokenizer.pad_token_id, 64)([[items[1], items[0]], [items[2]]])
    assert batch["samples"] == [samples[1], samples[0], samples[2]]
    lengths = [len(item.input_ids) for item in items]
    joined = lengths[1] + lengths[0]
    width = batch["input_ids"].shape[1]
    assert width == -(-joined // 8) * 8
    assert batch["input_ids"][0, :joined].tolist() == [*items[1].input_ids.tolist(), *items[0].input_ids.tolist()]
    assert batch["position_ids"].tolist() == [
        [*range(lengths[1]), *range(lengths[0]), *range(width - joined)],
        [*range(lengths[2]), *range(width - lengths[2])],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [joined, lengths[2]]
    # the first token of each sample follows one of another sample
    assert batch["labels"][0, :joined].tolist() == [
        *([IGNORE, *items[1].labels.tolist()[1:]]),
        *([IGNORE, *items[0].labels.tolist()[1:]]),
    ]
    assert items[0].labels[0] != IGNORE  # the sample itself is as it was


def test_a_row_may_be_as_wide_as_it_may_and_no_wider(tokenizer: PreTrainedTokenizerBase) -> None:
    (item,) = encode_samples([Sample("word", " true")], tokenizer)
    wide = 2 * len(item.input_ids) + 1
    batch = PackingCollator(tokenizer.pad_token_id, wide)([[item, item]])
    assert batch["input_ids"].shape == (1, min(wide, -(-2 * len(item.input_ids) // 8) * 8))
    assert set(Collator(tokenizer.pad_token_id, wide)([item])) == set(batch) - {"position_ids"}


# Datamodule ----------------------------------------------------------------------------------------------------------


class Packed(TextDataModule):
    """Samples of many lengths whose prompt begins with their number."""

    def build_samples(self, stage: Stage) -> list[Sample]:
        count = 90 if stage == "train" else 5
        return [Sample(f"{number} " + "word " * (number * 7 % 23), "answer1") for number in range(count)]


def make_packed(tokenizer: str, **options: Any) -> Packed:
    return Packed(tokenizer, **({"batch_size": 2, "seed": 3, "cutoff_len": 128, "packing_len": 256} | options))


def test_rows_are_for_training_alone(tokenizer_folder: str) -> None:
    data = make_packed(tokenizer_folder)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert sorted({int(s.prompt.split()[0]) for batch in batches for s in batch["samples"]}) == list(range(90))
    supervised = sum(int((batch["attention_mask"] == 1).sum()) for batch in batches[:-1])
    assert supervised > 0.9 * sum(batch["input_ids"].numel() for batch in batches[:-1])
    assert all(len(batch["input_ids"]) == 2 for batch in batches)
    (batch,) = data.val_dataloader()
    assert "position_ids" not in batch
    assert len(batch["input_ids"]) == 5


def test_rows_too_short_for_a_sample_are_refused(tokenizer_folder: str) -> None:
    with pytest.raises(ValueError, match="packing_len=32 must be at least cutoff_len=128"):
        make_packed(tokenizer_folder, packing_len=32)


def test_batches_keep_their_samples_and_share_rows(tokenizer_folder: str) -> None:
    padded = make_packed(tokenizer_folder, batch_size=8, packing_len=None, group_by_length=False)
    shared = make_packed(tokenizer_folder, batch_size=8, packing_len="batch", group_by_length=False)
    cells = []
    for data in (padded, shared):
        data.setup("fit")
    for one, other in zip(padded.train_dataloader(), shared.train_dataloader(), strict=True):
        assert {sample.prompt for sample in one["samples"]} == {sample.prompt for sample in other["samples"]}
        assert other["input_ids"].shape[1] <= 128
        assert other["input_ids"].numel() <= one["input_ids"].numel()
        # sample by sample the same tokens
        starts = (other["position_ids"] == 0) & other["attention_mask"].bool()
        assert int(starts.sum()) == 8
        assert sorted(one["input_ids"][one["attention_mask"].bool()].tolist()) == sorted(
            other["input_ids"][other["attention_mask"].bool()].tolist()
        )
        assert int((one["labels"] >= 0).sum()) == int((other["labels"] >= 0).sum())
        cells.append((one["input_ids"].numel(), other["input_ids"].numel()))
    before, after = map(sum, zip(*cells, strict=True))
    assert after < 0.75 * before


def test_rows_of_a_batch_have_as_few_cells_as_any_way() -> None:
    def fewest(lengths: list[int], rows: list[int]) -> int:
        """Of all ways to put the rest of the samples into rows."""
        if not lengths:
            return len(rows) * max(rows) if max(rows) <= 40 else 10**9
        ways = [[*rows[:i], rows[i] + lengths[0], *rows[i + 1 :]] for i in range(len(rows))] + [[*rows, lengths[0]]]
        return min(fewest(lengths[1:], way) for way in ways)

    for seed in range(6):
        lengths = some_lengths(6, longest=30, seed=seed)
        rows = share_rows(lengths, 40)
        assert sorted(index for row in rows for index in row) == list(range(6))
        sums = [sum(lengths[index] for index in row) for row in rows]
        assert max(sums) <= 40
        # longest first is a rule of thumb: 4/3 of the best at worst (Graham 1969)
        assert len(rows) * max(sums) <= 4 / 3 * fewest(lengths, [])


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int, tuple[str, ...]]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        numbers = tuple(sample.prompt.split()[0] for sample in batch["samples"])
        self.seen.append((self.current_epoch, batch_idx, numbers))
        return (self.weight - batch["input_ids"].float().mean()) ** 2

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class KilledError(RuntimeError):
    pass


class KillAt(Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            raise KilledError


def fit(
    folder: Path,
    data: Packed,
    callbacks: list[Callback],
    ckpt_path: str | None = None,
    module: Recorder | None = None,
    **options: Any,
) -> Recorder:
    module = module or Recorder()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        max_epochs=3,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [4, 12, 20])
def test_resume_in_the_middle_of_an_epoch(tmp_path: Path, tokenizer_folder: str, first: int, workers: int) -> None:
    def data() -> Packed:
        return make_packed(tokenizer_folder, num_workers=workers)

    whole = fit(tmp_path, data(), [])
    assert len(whole.seen) == 27  # nine batches in each of three epochs, so the places above lie within epochs
    assert len({place[0] for place in whole.seen}) == 3
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    with pytest.raises(KilledError):
        fit(tmp_path, data(), [saver, KillAt(first + 1)])
    resumed = fit(tmp_path, data(), [saver], str(tmp_path / f"step={first}.ckpt"))
    assert resumed.seen == whole.seen[first:]
    assert resumed.weight.item() == whole.weight.item()


class Writer(Recorder):
    """Writes down, per process, which samples each batch of an epoch holds."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        with (self.folder / f"epoch{self.current_epoch}-{self.global_rank}").open("a") as file:
            file.write(" ".join(sample.prompt.split()[0] for sample in batch["samples"]) + "\n")
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*use of fork.*|.*multi-threaded.*")
def test_two_processes_share_the_batches_of_one(tokenizer_folder: str, tmp_path: Path) -> None:
    runs: list[tuple[str, int, dict[str, Any]]] = [
        ("one", 4, {}),
        ("two", 2, {"strategy": "ddp_fork", "devices": 2}),
    ]
    for name, batch_size, options in runs:
        (tmp_path / name).mkdir()
        data = make_packed(tokenizer_folder, batch_size=batch_size)
        fit(tmp_path, data, [], module=Writer(tmp_path / name), **options)
    for epoch in range(3):
        whole = [line.split() for line in (tmp_path / "one" / f"epoch{epoch}-0").read_text().splitlines()]
        ranks = [(tmp_path / "two" / f"epoch{epoch}-{rank}").read_text().splitlines() for rank in range(2)]
        assert len(whole) == 5
        halves = [(left + " " + right).split() for left, right in zip(*ranks, strict=True)]
        assert [sorted(batch) for batch in halves] == [sorted(batch) for batch in whole]


def test_resume_with_rows_of_another_length_is_noticed(tmp_path: Path, tokenizer_folder: str) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    with pytest.raises(KilledError):
        fit(tmp_path, make_packed(tokenizer_folder), [saver, KillAt(3)])
    with pytest.warns(UserWarning, match="batches have changed"):
        fit(tmp_path, make_packed(tokenizer_folder, packing_len=160), [saver], str(tmp_path / "step=2.ckpt"))


def test_overfit_batches(tmp_path: Path, tokenizer_folder: str) -> None:
    with pytest.warns(UserWarning, match="overfit"):
        seen = fit(tmp_path, make_packed(tokenizer_folder), [], overfit_batches=1).seen
    assert [numbers for _, _, numbers in seen] == [("0",)] * 3
