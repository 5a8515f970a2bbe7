"""Rows of VL-BART's tasks -> token ids -> padded batches with what they look at.

Shapes: B samples, T tokens of the encoder, L of the decoder.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from datamodules.image_checks import sample_name
from datamodules.steps import Counted
from datamodules.vl_bart.records import Asked
from datamodules.vl_bart.truncation import Truncation, fit_text
from datamodules.vl_bart.visuals import Visuals
from dora_lightning.data import IGNORE, Sample
from dora_lightning.vl_bart.inputs import feature_inputs, pixel_inputs


class EncodedAsked(NamedTuple):
    """A row, and the tokens ``[T]`` of what the encoder reads of its text."""

    asked: Asked
    sample: Sample
    input_ids: Tensor


class AskedGroup(NamedTuple):
    """Rows that are drawn together, since they look at the same."""

    rows: list[EncodedAsked]
    visit: int = 0
    """Tells one time that it is drawn from every other; targets are drawn by it."""


def encode_asked(
    rows: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, truncation: Truncation = "subtitles"
) -> list[EncodedAsked]:
    """The samples of rows and their tokens; what is too long is cut, see :func:`~..truncation.fit_text`."""
    if not rows:
        return []
    prompts = [fit_text(tokenizer, asked, truncation) for asked in rows]
    # all at once, which is several times faster; fitted texts need no cut
    encoded = []
    for asked, prompt, ids in zip(rows, prompts, tokenizer(prompts)["input_ids"], strict=True):
        target = max(asked.answers, key=lambda answer: answer[1])[0] if asked.answers else ""
        sample = Sample(prompt, target, asked.options, asked.references, asked.visuals, asked.source, dict(asked.row))
        encoded.append(EncodedAsked(asked, sample, torch.tensor(ids, dtype=torch.int32)))
    return encoded


class AskedDataset(torch.utils.data.Dataset):
    """Encoded rows, drawn a whole batch at a time; with ``together``, rows that look at the same are one item.

    An index of ``epoch * items + item`` is the item in that epoch.
    """

    def __init__(self, encoded: Sequence[EncodedAsked], together: bool = False) -> None:
        groups: dict[Any, list[EncodedAsked]] = {}
        for place, item in enumerate(encoded):
            key = (item.asked.source, item.asked.visuals, item.asked.shuffle) if together else place
            groups.setdefault(key, []).append(item)
        self.items = list(groups.values())
        self.lengths = [max(len(row.input_ids) for row in rows) for rows in self.items]
        self.groups = [rows[0].asked.source for rows in self.items]
        """The task of each item: batches are of one."""

    def __len__(self) -> int:
        """Number of items."""
        return len(self.items)

    def __getitem__(self, indices: list[int] | int) -> list[AskedGroup]:
        """The items of one batch; an index alone is a batch of one, where Lightning draws (``overfit_batches``)."""
        wanted = [indices] if isinstance(indices, int) else indices
        return [AskedGroup(self.items[index % len(self.items)], index) for index in wanted]


class AskedCollator:
    """Makes a batch of encoded rows of one task.

    Args:
        tokenizer: The model's.
        visuals: What each task's rows look at.
        image_size: Pixels of a side, where a tower is to see them.
        mean: As in :func:`~dora_lightning.vl_bart.inputs.pixel_inputs`.
        std: Likewise.
        object_orders: Most rows of features of an image or a video that the model tells apart.
        draw: Draw a row's target in proportion to its answers' scores; else the best one is taken.
        seed: Seed of that.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        visuals: dict[str, Visuals],
        image_size: int | None,
        mean: Sequence[float],
        std: Sequence[float],
        object_orders: int,
        draw: bool,
        seed: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.visuals = visuals
        self.image_size = image_size
        self.mean, self.std = mean, std
        self.object_orders = object_orders
        self.draw = draw
        self.seed = seed

    def supervised(self, groups: list[AskedGroup]) -> Counted:
        """What the loss of rows is the mean over: their targets' tokens, or the rows with a target themselves."""
        rows, answers = self._answered(groups)
        drawn = [(text, row.asked.max_target_tokens) for (text, _), row in zip(answers, rows, strict=True) if text]
        if rows[0].asked.mean_by_sample:
            return "rows", len(drawn)
        if not drawn:
            return "tokens", 0
        # all at once, which is several times faster, and cut as they are when they come into the batch
        lengths = map(len, self.tokenizer([text for text, _ in drawn], verbose=False)["input_ids"])
        return "tokens", sum(min(length, most) for length, (_, most) in zip(lengths, drawn, strict=True))

    def __call__(self, groups: list[AskedGroup]) -> dict[str, Any]:
        """Make the batch.

        Raises:
            ValueError: Something to look at cannot be opened; the message names the row.
        """
        rows, answers = self._answered(groups)
        targets = [self._target(text, row.asked) for (text, _), row in zip(answers, rows, strict=True)]
        pad = int(self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(row.input_ids) for row in rows])
        input_ids = pad_sequence([row.input_ids for row in rows], batch_first=True, padding_value=pad).long()
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORE),
            "samples": [row.sample for row in rows],
            "vision": self._vision(rows),
        }
        if rows[0].asked.mean_by_sample:
            weights = [score if row.asked.weighted else 1.0 for (_, score), row in zip(answers, rows, strict=True)]
            batch["row_weights"] = torch.tensor(weights)
        return batch

    def _answered(self, groups: list[AskedGroup]) -> tuple[list[EncodedAsked], list[tuple[str, float]]]:
        """The rows of a batch, and the answer that each is trained on with its score."""
        rows = [row for group in groups for row in group.rows]
        visits = [f"{self.seed}/{group.visit}/{place}" for group in groups for place in range(len(group.rows))]
        return rows, [self._answer(row.asked, visit) for row, visit in zip(rows, visits, strict=True)]

    def _answer(self, asked: Asked, visit: str) -> tuple[str, float]:
        if not asked.answers:
            return "", 0.0
        if not self.draw or len(asked.answers) == 1:
            return max(asked.answers, key=lambda answer: answer[1])
        # by the visit alone: the same on any number of processes, with or without workers, and when a run goes on
        return random.Random(visit).choices(asked.answers, [score for _, score in asked.answers])[0]

    def _target(self, text: str, asked: Asked) -> Tensor:
        """Tokens ``[L]`` of a target; none of one that is hidden."""
        if not text:
            return torch.full((1,), IGNORE)
        return torch.tensor(self.tokenizer(text, truncation=True, max_length=asked.max_target_tokens)["input_ids"])

    def _vision(self, rows: list[EncodedAsked]) -> dict[str, Tensor]:
        """What the rows look at, each thing once, and ``visual_index [B]`` where several look at the same."""
        visuals = self.visuals[rows[0].asked.source]
        places: dict[Any, int] = {}
        seen: list[Any] = []
        for row in rows:
            key = (row.asked.visuals, row.asked.shuffle)
            if key not in places:
                places[key] = len(seen)
                seen.append(self._seen(visuals, row))
        if visuals.from_features:
            vision = feature_inputs(seen, visuals.of_videos)
        else:
            vision = pixel_inputs(seen, self.mean, self.std)
        if len(seen) < len(rows):
            vision["visual_index"] = torch.tensor([places[row.asked.visuals, row.asked.shuffle] for row in rows])
        return vision

    def _seen(self, visuals: Visuals, row: EncodedAsked) -> Any:
        try:
            if visuals.from_features:
                return [_shuffled(self._features(visuals, name), row.asked) for name in row.asked.visuals]
            assert self.image_size is not None
            pixels = [_shuffled(visuals.pixels(name, self.image_size), row.asked) for name in row.asked.visuals]
            return torch.cat(pixels)
        except ValueError as error:
            raise ValueError(f"{sample_name(row.sample)}: {error}") from error

    def _features(self, visuals: Visuals, name: str) -> Tensor:
        features = visuals.features(name)
        if len(features) > self.object_orders:
            raise ValueError(
                f"{name} has {len(features)} rows of features, and the model tells {self.object_orders} apart "
                "(object_orders); bring them to fewer (grid_rows, video_rows)"
            )
        return features


def _shuffled(moments: Tensor, asked: Asked) -> Tensor:
    if asked.shuffle is None:
        return moments
    order = torch.randperm(len(moments), generator=torch.Generator().manual_seed(asked.shuffle // 2))
    return moments[order.flip(0) if asked.shuffle % 2 else order]
