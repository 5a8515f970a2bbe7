"""The base of VL-BART's datamodules: rows asked about images or videos in, batches of one task out."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import AutoConfig, PreTrainedTokenizerBase

from datamodules.image_checks import report_skipped, sample_name
from datamodules.loading import SampledDataModule, Stage
from datamodules.rows import OnBadRow
from datamodules.sampling import LengthGroupedSampler
from datamodules.vl_bart.encoding import AskedCollator, AskedDataset, EncodedAsked, encode_asked
from datamodules.vl_bart.records import Asked
from datamodules.vl_bart.truncation import Truncation
from datamodules.vl_bart.visuals import Visuals
from dora_lightning.messages import check_whole
from dora_lightning.open_clip_tower import CLIP_MEAN, CLIP_STD, OpenClipVision, build_tower
from dora_lightning.vl_bart import VLBartConfig, VLBartParts, load_vl_bart_tokenizer, resolve_vl_bart


class AskedDataModule(SampledDataModule):
    """Turns rows of VL-BART's tasks into batches of :class:`~dora_lightning.backbones.DoRAVLBart`.

    A subclass implements :meth:`asked` and :meth:`visuals`. Each batch is of one task, with that task's batch size; an
    epoch goes through all batches of all tasks once, shuffled together. A target is drawn anew in each epoch, in
    proportion to its answers' scores.

    Args:
        tokenizer: The model, a folder or hub id, or the parts it is put together from.
        batch_size: Training rows in a batch, per device.
        eval_batch_size: Validation and test rows in a batch, per device.
        truncation: What gives way where a text is too long: ``subtitles``, or, as ``published``, whatever is on the
            right, the question included.
        share_visuals: Training rows that look at the same are drawn together, and looked at once; a batch then has
            ``batch_size`` things to look at, each with all its rows.
        group_by_length: Put training rows of like length into a batch, so that little of it is padding.
        num_workers: Processes that read features, or open images and videos.
        seed: Seed of the order of training batches and of the targets.
        on_bad_row: ``raise`` stops at the first row that is broken, or whose image, video or features are missing or
            broken in their header; ``skip`` decodes every file at the start, leaves such rows out and reports how many.
    """

    def __init__(
        self,
        tokenizer: str | VLBartParts,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        truncation: Truncation = "subtitles",
        share_visuals: bool = False,
        group_by_length: bool = True,
        num_workers: int = 0,
        seed: int = 42,
        on_bad_row: OnBadRow = "raise",
    ) -> None:
        super().__init__(eval_batch_size, num_workers, seed)
        check_whole(1, batch_size=batch_size)
        self.model_name = tokenizer
        self.batch_size = batch_size
        self.truncation: Truncation = truncation
        self.share_visuals = share_visuals
        self.group_by_length = group_by_length
        self.on_bad_row: OnBadRow = on_bad_row
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._config: VLBartConfig | None = None
        self._visuals: dict[str, Visuals] | None = None

    @abstractmethod
    def asked(self, stage: Stage) -> list[Asked]:
        """The rows of one stage, of all tasks; an empty list if there are none."""

    @abstractmethod
    def visuals(self) -> Mapping[str, Visuals]:
        """Source of rows -> what opens what they look at."""

    def trained_inputs(self) -> dict[str, Any]:
        """See :mod:`dora_lightning.training.trained_inputs`."""
        if self._visuals is None:
            return {}
        said = [visuals.trained_inputs() for visuals in self._visuals.values()]
        # of several tasks, what all say that say anything of it
        named = {name: [one[name] for one in said if name in one] for one in said for name in one}
        return {name: values[0] for name, values in named.items() if values.count(values[0]) == len(values)}

    def batch_sizes(self) -> Mapping[str, int]:
        """Source of rows -> its batch size, where it is another than :attr:`batch_size`."""
        return {}

    def encoded(self, stage: Stage) -> AskedDataset:
        """The rows of one stage as tokens, those that can be used; see ``on_bad_row``.

        Raises:
            ValueError: There is nothing to train on, or pixels to look at and no tower in the model.
        """
        self._load()
        assert self.tokenizer is not None
        encoded = self._usable(encode_asked(self.asked(stage), self.tokenizer, self.truncation))
        if stage == "test":
            return AskedDataset(encoded)
        # what has no target is of no use to the loss, but may be judged
        kept = [item for item in encoded if item.asked.answers or (stage == "validate" and item.asked.references)]
        if stage == "train" and not kept:
            raise ValueError(f"{type(self).__name__} has no training samples")
        if len(kept) < len(encoded):
            dropped = Counter(item.asked.source for item in encoded) - Counter(item.asked.source for item in kept)
            listing = ", ".join(f"{name}: {count}" for name, count in dropped.items())
            rank_zero_warn(f"{stage}: rows without a target were left out ({listing})")
        return AskedDataset(kept, together=self.share_visuals and stage == "train")

    def train_sampler(self, dataset: AskedDataset, **replicas: Any) -> LengthGroupedSampler:
        """Batches of one task and of texts of like length."""
        sizes = dict.fromkeys(dataset.groups, self.batch_size) | dict(self.batch_sizes())
        return LengthGroupedSampler(
            dataset.lengths,
            sizes,
            seed=self.seed,
            groups=dataset.groups,
            group_by_length=self.group_by_length,
            count_epochs=True,
            **replicas,
        )

    def train_collator(self) -> AskedCollator:
        """What makes a training batch, targets drawn."""
        return self._collator(draw=True)

    def collator(self) -> AskedCollator:
        """What makes a batch, each row with its best target."""
        return self._collator(draw=False)

    def _collator(self, draw: bool) -> AskedCollator:
        assert self.tokenizer is not None
        assert self._visuals is not None
        assert self._config is not None
        orders = self._config.object_orders
        return AskedCollator(self.tokenizer, self._visuals, *self._reading, orders, draw, self.seed)

    @cached_property
    def _reading(self) -> tuple[int | None, tuple[float, ...], tuple[float, ...]]:
        """Pixels of a side, mean and standard deviation of colours as the model's tower reads them."""
        assert self._config is not None
        if self._config.vision is None:
            return None, CLIP_MEAN, CLIP_STD
        with torch.device("meta"):  # its weights are of no use here
            tower = build_tower(OpenClipVision(**self._config.vision), weights=False)
        return tower.image_size, tower.mean, tower.std

    def _load(self) -> None:
        if self.tokenizer is not None:
            return
        folder = resolve_vl_bart(self.model_name)
        self._config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        self._visuals = dict(self.visuals())
        for name, visuals in self._visuals.items():
            if not visuals.from_features and self._config.vision is None:
                raise ValueError(
                    f"{name}: the model has no vision tower that could look at pixels; give it one "
                    "(model_name_or_path.vision), or give the task a folder of features"
                )
            if visuals.from_features and self._config.vision is not None:
                raise ValueError(
                    f"{name}: the model computes features by its own vision tower; give the task images or "
                    "videos, or leave the tower out of the model"
                )
        self.tokenizer = load_vl_bart_tokenizer(folder)

    def _usable(self, encoded: list[EncodedAsked]) -> list[EncodedAsked]:
        assert self._visuals is not None
        # several sources may look at the same files
        found: dict[tuple[int, str], str] = {}
        good: list[EncodedAsked] = []
        bad: list[str] = []
        for item in encoded:
            visuals = self._visuals[item.asked.source]
            for name in item.asked.visuals:
                if (id(visuals), name) not in found:
                    found[id(visuals), name] = self._fault(visuals, name)
            faults = [fault for name in item.asked.visuals if (fault := found[id(visuals), name])]
            if not faults:
                good.append(item)
                continue
            message = f"{sample_name(item.sample)}: {faults[0]}"
            if self.on_bad_row == "raise":
                raise ValueError(message)
            bad.append(message)
        report_skipped(bad, len(encoded), "for what they look at")
        return good

    def _fault(self, visuals: Visuals, name: str) -> str:
        try:
            visuals.check(name, decode=self.on_bad_row == "skip")
        except ValueError as error:
            return str(error)
        return ""
