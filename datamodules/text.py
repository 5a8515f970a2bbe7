"""The base of the text datamodules: samples in, padded batches out."""

from abc import abstractmethod
from collections import Counter
from typing import Any, Literal, TypeAlias

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from datamodules.encoding import Collator, EncodedDataset, EncodedSample, encode_samples
from datamodules.loading import SampledDataModule, Stage
from datamodules.packing import PackingCollator, PackingSampler
from datamodules.rows import OnBadRow
from datamodules.sampling import LengthGroupedSampler
from dora_lightning.data import Sample
from dora_lightning.messages import check_whole
from dora_lightning.pretrained import load_tokenizer

PackingLen: TypeAlias = int | Literal["batch"] | None


class TextDataModule(SampledDataModule):
    """Turns the samples that a subclass builds into batches for a causal language model.

    A subclass implements :meth:`build_samples`. Batches are dicts of ``input_ids``, ``attention_mask`` and ``labels``
    (int64 ``[batch, tokens]``, padded on the right) and ``samples`` (list of :class:`~dora_lightning.data.Sample`).

    Args:
        tokenizer: A folder, a hub id, a GGUF file or a ``package:`` reference, as for the model itself.
        batch_size: Training samples in a batch, per device.
        eval_batch_size: Validation and test samples in a batch, per device.
        cutoff_len: Most tokens in a sample; longer ones are cut on the right.
        train_on_inputs: Count the prompt towards the loss. Published commonsense runs do; masking it is the default.
        num_workers: Processes that collate; samples are encoded once at the start, so 0 serves well.
        seed: Seed of the order of training batches, and of any subset or split that a subclass draws.
        on_bad_row: Stop at the first bad row of a file (``raise``), or leave bad rows out and report how many
            (``skip``).
        group_by_length: Put training samples of like length into a batch, so that little of it is padding.
        packing_len: Put several training samples into a row of up to so many tokens, in which they do not see one
            another; ``batch_size`` then counts rows. ``batch`` leaves each batch the samples it has, and has them
            share rows of up to ``cutoff_len``: the same loss with less padding. None for one sample in a row.

    Raises:
        ValueError: ``packing_len`` is smaller than ``cutoff_len``.
    """

    def __init__(
        self,
        tokenizer: str,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        cutoff_len: int = 256,
        train_on_inputs: bool = False,
        num_workers: int = 0,
        seed: int = 42,
        on_bad_row: OnBadRow = "raise",
        group_by_length: bool = True,
        packing_len: PackingLen = None,
    ) -> None:
        super().__init__(eval_batch_size, num_workers, seed)
        check_whole(1, batch_size=batch_size, cutoff_len=cutoff_len)
        if packing_len != "batch":
            check_whole(1, none="one sample in a row", packing_len=packing_len)
        if isinstance(packing_len, int) and packing_len < cutoff_len:
            raise ValueError(
                f"packing_len={packing_len} must be at least cutoff_len={cutoff_len}: every sample is to fit in a row"
            )
        self.tokenizer_name = tokenizer
        self.batch_size = batch_size
        self.cutoff_len = cutoff_len
        self.train_on_inputs = train_on_inputs
        self.on_bad_row = on_bad_row
        self.group_by_length = group_by_length
        self.packing_len = packing_len
        self.tokenizer: PreTrainedTokenizerBase | None = None

    lost_by_cutting = "their whole target"
    """What is missing in samples that are left out because they were cut."""

    @abstractmethod
    def build_samples(self, stage: Stage) -> list[Sample]:
        """The samples of one stage; an empty list if there are none."""

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, once, when the first stage is set up."""
        return load_tokenizer(self.tokenizer_name)

    def encode(self, samples: list[Sample]) -> list[EncodedSample]:
        """The tokens of the samples of one stage."""
        assert self.tokenizer is not None
        return encode_samples(samples, self.tokenizer, self.cutoff_len, self.train_on_inputs)

    def collator(self) -> Collator:
        """What makes a batch of encoded samples."""
        assert self.tokenizer is not None
        return Collator(self.tokenizer.pad_token_id, self.cutoff_len)

    def encoded(self, stage: Stage) -> EncodedDataset:
        """The samples of one stage as tokens; what has no target left is left out of training and validation.

        Raises:
            ValueError: There is nothing to train on, or ``cutoff_len`` leaves no target of any sample.
        """
        if self.tokenizer is None:
            self.tokenizer = self.load_tokenizer()
        encoded = self.encode(self.build_samples(stage))
        if stage == "test":
            # generation reads the prompt, so a target that was cut off loses nothing
            return EncodedDataset(encoded)
        # without a single label the loss of a batch is 0/0
        kept = [item for item in encoded if item.trains]
        if cut := sum(item.cut > 0 for item in kept):
            rank_zero_info(
                f"{cut} of {len(encoded)} {stage} samples are longer than cutoff_len={self.cutoff_len} and lose the "
                f"end of their answer, up to {max(item.cut for item in kept)} tokens"
            )
        if dropped := len(encoded) - len(kept):
            sources = Counter(item.sample.source or "unnamed" for item in encoded if not item.trains)
            message = (
                f"{dropped} of {len(encoded)} {stage} samples were left out, since cutoff_len={self.cutoff_len} cuts "
                f"off {self.lost_by_cutting} ({', '.join(f'{name}: {count}' for name, count in sources.items())})"
            )
            if not kept:
                raise ValueError(f"{message}; use a larger cutoff_len")
            rank_zero_warn(message)
        if stage == "train" and not kept:
            raise ValueError(f"{type(self).__name__} has no training samples")
        return EncodedDataset(self.arranged(kept) if stage == "train" else kept)

    def arranged(self, encoded: list[EncodedSample]) -> list[EncodedSample]:
        """The training samples as they come into batches: here, as they are."""
        return encoded

    def train_sampler(self, dataset: EncodedDataset, **replicas: Any) -> LengthGroupedSampler:
        """Batches of like length and one modality, or rows filled up."""
        options = {"seed": self.seed, "group_by_length": self.group_by_length, **replicas}
        if isinstance(self.packing_len, int):
            return PackingSampler(dataset.lengths, self.packing_len, self.batch_size, **options)
        return LengthGroupedSampler(dataset.lengths, self.batch_size, groups=dataset.groups, **options)

    def train_collator(self) -> Collator | PackingCollator:
        """What makes a training batch."""
        if self.packing_len is None:
            return self.collator()
        assert self.tokenizer is not None
        if self.packing_len == "batch":
            return PackingCollator(self.tokenizer.pad_token_id, self.cutoff_len, share_rows=True)
        return PackingCollator(self.tokenizer.pad_token_id, self.packing_len)
