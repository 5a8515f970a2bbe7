"""Math word problems with worked solutions: Orca-Math, split as QDoRA's evaluation splits it."""

from typing import Any

from datamodules.hub import load_hub_rows
from datamodules.instructions import check_files, check_sources
from datamodules.loading import Stage
from datamodules.rows import OnBadRow, Row, convert_rows, read_rows, require_field
from datamodules.text import PackingLen, TextDataModule
from dora_lightning.data import Sample
from dora_lightning.messages import check_whole

_PROMPT = "###Question:\n{question}\n###Answer:\n"
_SHUFFLE_SEED = 42


class MathQADataModule(TextDataModule):
    """Orca-Math's rows ``{"question": ..., "answer": ...}``, from a file or the hub.

    The split is that of fsdp_qlora, by which QDoRA was measured: all rows are shuffled with seed 42 as ``datasets``
    shuffles; the first ``train_size`` are trained on, and the last ``held_out`` are not; the first ``test_size`` of
    those are the test. Validation takes the rows of ``held_out`` behind the test's.

    Args:
        tokenizer: As in :class:`~datamodules.text.TextDataModule`.
        hub: The data set of the hub, ``name`` or ``name:config``.
        train_file: All rows in a file instead, a JSON list or JSONL.
        train_size: Rows to train on: 100,000 (or 10,000) as published.
        held_out: Rows at the end of the shuffle that are never trained on.
        test_size: Rows to test on.
        val_size: Rows for validation.
        batch_size: As in :class:`~datamodules.text.TextDataModule`.
        eval_batch_size: Likewise.
        cutoff_len: Likewise.
        train_on_inputs: Likewise.
        num_workers: Likewise.
        seed: Seed of the order of training batches; the split does not depend on it.
        on_bad_row: As in :class:`~datamodules.text.TextDataModule`. Rows that are left out are so before the shuffle.
        group_by_length: Likewise.
        packing_len: Likewise.

    Raises:
        ValueError: The arguments contradict each other.
        FileNotFoundError: ``train_file`` is missing.
    """

    def __init__(
        self,
        tokenizer: str,
        hub: str | None = None,
        train_file: str | None = None,
        train_size: int = 100_000,
        held_out: int = 5_000,
        test_size: int = 500,
        val_size: int = 500,
        batch_size: int = 4,
        eval_batch_size: int = 16,
        cutoff_len: int = 2048,
        train_on_inputs: bool = False,
        num_workers: int = 0,
        seed: int = 42,
        on_bad_row: OnBadRow = "raise",
        group_by_length: bool = True,
        packing_len: PackingLen = None,
    ) -> None:
        super().__init__(
            tokenizer,
            batch_size,
            eval_batch_size,
            cutoff_len,
            train_on_inputs,
            num_workers,
            seed,
            on_bad_row,
            group_by_length,
            packing_len,
        )
        check_sources(train_file, hub, None, 0)
        check_files(train_file=train_file)
        check_whole(1, train_size=train_size)
        check_whole(0, held_out=held_out, test_size=test_size, val_size=val_size)
        if test_size + val_size > held_out:
            raise ValueError(
                f"test_size={test_size} and val_size={val_size} do not fit in the held_out={held_out} rows "
                "that are not trained on"
            )
        self.hub = hub
        self.train_file = train_file
        self.train_size = train_size
        self.held_out = held_out
        self.test_size = test_size
        self.val_size = val_size
        self._splits: dict[Stage, list[Sample]] | None = None

    def trained_inputs(self) -> dict[str, Any]:
        """See :mod:`dora_lightning.training.trained_inputs`."""
        return {"prompt": _PROMPT.format(question="{prompt}")}

    def prepare_data(self) -> None:
        """Download the data set of the hub, on one process."""
        if self.hub is not None:
            load_hub_rows(self.hub)

    def build_samples(self, stage: Stage) -> list[Sample]:
        """The samples of a stage.

        Raises:
            ValueError: A row is bad (see ``on_bad_row``), or there are not enough for all three stages.
        """
        if self._splits is None:
            self._splits = self._divide()
        return self._splits[stage]

    def _divide(self) -> dict[Stage, list[Sample]]:
        from datasets import Dataset  # slow to import

        if self.hub is not None:
            samples = convert_rows(load_hub_rows(self.hub), _sample, self.hub, self.on_bad_row)
        else:
            assert self.train_file is not None
            rows = read_rows(self.train_file, ("question", "answer"), self.on_bad_row)
            samples = [_sample(row) for row in rows]
        trainable = len(samples) - self.held_out
        if self.train_size > trainable:
            raise ValueError(
                f"train_size={self.train_size} and held_out={self.held_out} ask for more rows than the {len(samples)} "
                "that there are"
            )
        order = Dataset.from_dict({"index": range(len(samples))}).shuffle(seed=_SHUFFLE_SEED)["index"]
        shuffled = [samples[index] for index in order]
        held_out = shuffled[trainable:]
        return {
            "train": shuffled[: self.train_size],
            "validate": held_out[self.test_size :][: self.val_size],
            "test": held_out[: self.test_size],
        }


def _sample(row: Row) -> Sample:
    question, answer = require_field(row, "question"), require_field(row, "answer")
    row = {"question": question, "answer": answer}
    return Sample(_PROMPT.format(question=question), answer, references=(answer,), source="orca_math", row=row)
