"""The base of all datamodules: batches of like length out of encoded samples, resumable in the middle of an epoch."""

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from datamodules.fingerprint import fingerprint, tokenizer_fingerprint
from datamodules.resuming import ResumableDataLoader, resume_sampler
from datamodules.sampling import LengthGroupedSampler
from datamodules.steps import StepCollator, StepDataset, plan_steps
from dora_lightning.messages import check_whole

_CHANGED = {
    "samples": "training goes on with other samples than the checkpoint's run had, or with the same in another order "
    "or template: in this epoch some may be seen twice and others not at all",
    "tokens": "the training samples are those of the checkpoint's run, but not their tokens or labels, as after a "
    "change of the tokenizer, cutoff_len or train_on_inputs",
    "tokenizer": "the tokenizer is not the one of the checkpoint's run: its vocabulary, special tokens or rules differ",
}

Stage: TypeAlias = Literal["train", "validate", "test"]


class SampledDataset(Protocol):
    """Encoded samples, drawn a whole batch at a time."""

    lengths: Sequence[int]
    groups: Sequence[Hashable]

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, indices: Any) -> list[Any]:
        """The samples of one batch."""


class SampledDataModule(LightningDataModule):
    """Encodes the samples of each stage once, and makes loaders of them.

    A subclass implements :meth:`encoded`, :meth:`collator` and :meth:`train_sampler`.

    Args:
        eval_batch_size: Validation and test samples in a batch, per device.
        num_workers: Processes that collate.
        seed: Seed of the order of training batches.
    """

    def __init__(self, eval_batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        check_whole(1, eval_batch_size=eval_batch_size)
        check_whole(0, num_workers=num_workers, seed=seed)
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._datasets: dict[Stage, Any] = {}
        self._fingerprint: dict[str, str] | None = None

    @abstractmethod
    def encoded(self, stage: Stage) -> SampledDataset:
        """The encoded samples of one stage."""

    @abstractmethod
    def collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        """What makes a batch of encoded samples."""

    @abstractmethod
    def train_sampler(self, dataset: Any, **replicas: Any) -> LengthGroupedSampler:
        """What draws training batches.

        Args:
            dataset: What :meth:`encoded` returned for training.
            replicas: ``num_replicas`` and ``rank``, or nothing.
        """

    def train_collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        """What makes a training batch: here, as any other.

        Where it has a method ``supervised``, which takes the same samples and says what their loss is a mean over
        (``tokens``, ``pairs``, ``rows``) and how many there are, batches know their optimizer step
        (:class:`~dora_lightning.data.OptimizerStep`), and the loss of a step is one mean.
        """
        return self.collator()

    def setup(self, stage: str) -> None:
        """Encode the samples that ``stage`` needs; what is there already is kept."""
        # the test set is what predictions are made for
        wanted: dict[str, tuple[Stage, ...]] = {
            "fit": ("train", "validate"),
            "validate": ("validate",),
            "test": ("test",),
            "predict": ("test",),
        }
        for name in wanted[stage]:
            if name not in self._datasets:
                self._datasets[name] = self.encoded(name)

    def state_dict(self) -> dict[str, Any]:
        """Fingerprints of what is trained on, for a checkpoint."""
        if "train" not in self._datasets:
            return {}
        if self._fingerprint is None:
            dataset = self._datasets["train"]
            self._fingerprint = fingerprint(dataset[[index]] for index in range(len(dataset)))
            if (tokenizer := getattr(self, "tokenizer", None)) is not None:
                self._fingerprint["tokenizer"] = tokenizer_fingerprint(tokenizer)
        return dict(self._fingerprint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say what is not as it was when the checkpoint was saved, where training goes on from it."""
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        for name, now in self.state_dict().items():
            before = state_dict.get(name, now)
            # other texts have other tokens
            if before != now and not (name == "tokens" and state_dict["samples"] != self.state_dict()["samples"]):
                rank_zero_warn(f"{_CHANGED[name]} (fingerprint {now[:12]}, checkpoint {before[:12]})")

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of like length; goes on where a checkpoint stopped, to the batch."""
        dataset = self._datasets["train"]
        sampler = self.train_sampler(dataset, **self._replicas())
        collator = self.train_collator()
        if (supervised := getattr(collator, "supervised", None)) is not None:
            sampler.plan = plan_steps(self.trainer, lambda indices: supervised(dataset[indices]), len(sampler))
        if self.trainer is not None:
            resume_sampler(self.trainer, sampler)
        return self._loader(StepDataset(dataset), sampler, StepCollator(collator), ResumableDataLoader)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Every validation sample once, longest first; no loader if there are none."""
        return self._eval_dataloader("validate")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """Every test sample once, longest first."""
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        """The test samples."""
        return self._eval_dataloader("test")

    def _eval_dataloader(self, stage: Stage) -> DataLoader | list[DataLoader]:
        dataset = self._datasets[stage]
        if not len(dataset):
            return []
        sampler = LengthGroupedSampler(
            dataset.lengths, self.eval_batch_size, shuffle=False, groups=dataset.groups, **self._replicas()
        )
        return self._loader(dataset, sampler, self.collator(), DataLoader)

    def _loader(
        self, dataset: Any, sampler: LengthGroupedSampler, collator: Callable[..., Any], cls: type[DataLoader]
    ) -> DataLoader:
        return cls(
            dataset,
            sampler=sampler,
            batch_size=None,  # the sampler yields whole batches
            collate_fn=collator,
            num_workers=self.num_workers,
            # each iterator draws a seed; from torch's own generator, a run that is resumed at the end of an epoch, and
            # makes one iterator less, would drop other values than the uninterrupted one
            generator=torch.Generator(),
            persistent_workers=self.num_workers > 0,
        )

    def _replicas(self) -> dict[str, Any]:
        # the strategy knows which ranks share a batch, as those of one tensor-parallel group do
        return (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
