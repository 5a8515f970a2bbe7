"""Everyday questions that the project writes itself, for the quickstart: a few hundred, held-out things in the test."""

from typing import Any

from datamodules.everyday_questions import everyday_questions
from datamodules.loading import Stage
from datamodules.templates import get_template
from datamodules.text import TextDataModule
from dora_lightning.data import Sample
from dora_lightning.messages import check_whole


class EverydayDataModule(TextDataModule):
    """Questions about everyday things; validation and test ask about things that training never mentions.

    Args:
        tokenizer: As in :class:`~datamodules.text.TextDataModule`.
        train_size: Training questions; null for all there are.
        test_size: Held-out questions; null for all there are.
        template: Name of the prompt template.
        batch_size: Training samples in a batch, per device.
        eval_batch_size: Held-out samples in a batch, per device.
        num_workers: Processes that collate.
        seed: Seed of the questions drawn and of their order.
    """

    def __init__(
        self,
        tokenizer: str,
        train_size: int | None = None,
        test_size: int | None = None,
        template: str = "plain",
        batch_size: int = 16,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 42,
    ) -> None:
        super().__init__(
            tokenizer,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        check_whole(1, none="all", train_size=train_size, test_size=test_size)
        self.train_size = train_size
        self.test_size = test_size
        self.template = get_template(template)

    def trained_inputs(self) -> dict[str, Any]:
        """See :mod:`dora_lightning.training.trained_inputs`."""
        return {"prompt": self.template.eval_prompt("{prompt}")}

    def build_samples(self, stage: Stage) -> list[Sample]:
        """Questions of one split; validation and test are the same held-out questions."""
        split, size = ("train", self.train_size) if stage == "train" else ("test", self.test_size)
        return [self._sample(row) for row in everyday_questions(split, size, self.seed)]

    def _sample(self, row: dict) -> Sample:
        prefix = self.template.target_prefix
        return Sample(
            prompt=self.template.train_prompt(row["question"]),
            target=prefix + row["answer"],
            options=tuple(prefix + option for option in row["options"]),
            references=(row["answer"],),
            source=row["kind"],
            row=row,
        )
