"""Pairs of a preferred and a rejected answer to the same prompt, for direct preference optimisation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from datamodules.conversation import ConversationTemplate, TokenizerTemplate, get_conversation_template, prompt_form
from datamodules.encoding import Collator, EncodedSample, encode_samples
from datamodules.hub import load_hub_rows
from datamodules.instructions import check_files, check_sources, check_template
from datamodules.loading import Stage
from datamodules.messages import Dialogue, read_messages
from datamodules.rows import OnBadRow, Row, convert_file, convert_rows, require_field
from datamodules.steps import Counted
from datamodules.subsets import split_off
from datamodules.templates import TEMPLATES
from datamodules.text import TextDataModule
from dora_lightning.data import Sample
from dora_lightning.messages import check_whole

_NONE = "none"


class EncodedPair(NamedTuple):
    """A sample with its two answers; it has what :class:`~datamodules.encoding.EncodedSample` offers to samplers."""

    sample: Sample
    chosen: EncodedSample
    rejected: EncodedSample
    image_tokens: tuple[int, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether something of both answers is left, and tells them apart."""
        left = self.chosen.trains and self.rejected.trains
        return left and not torch.equal(self.chosen.input_ids, self.rejected.input_ids)

    @property
    def cut(self) -> int:
        """Tokens that were cut off the answer that lost most."""
        return max(self.chosen.cut, self.rejected.cut)

    @property
    def length(self) -> int:
        """Tokens of the longer one, which decides how wide a batch is."""
        return max(self.chosen.length, self.rejected.length)


class PairCollator(Collator):
    """Pads pairs to one batch: the preferred answers in its first half, the rejected ones in the same order behind.

    ``input_ids``, ``attention_mask`` and ``labels`` are ``[2 * pairs, tokens]``; ``samples`` lists the pairs' samples.
    """

    def supervised(self, encoded: Sequence[Any]) -> Counted:
        """How many pairs there are: the loss is the mean over pairs."""
        return "pairs", len(encoded)

    def __call__(self, encoded: Sequence[Any]) -> dict[str, Any]:
        """Make the batch."""
        batch = super().__call__([*(pair.chosen for pair in encoded), *(pair.rejected for pair in encoded)])
        return batch | {"samples": [pair.sample for pair in encoded]}


class PreferenceDataModule(TextDataModule):
    """Rows ``{"prompt": ..., "chosen": ..., "rejected": ...}``, from files or the hub.

    ``prompt`` is text, or a list of chat messages that ends in the user's. ``chosen`` and ``rejected`` are text, or a
    list of messages: the answer alone, or the whole conversation, which needs no ``prompt`` beside it (a text there is
    taken for a copy of the question). Both must be answers to the same prompt.

    A sample's ``target`` is the preferred answer and its ``options`` are both, the preferred one first.

    Args:
        tokenizer: As in :class:`~datamodules.text.TextDataModule`.
        train_file: Rows to train on, a JSON list or JSONL.
        hub: A data set of the hub instead, ``name`` or ``name:config``.
        hub_split: The split of it.
        val_file: Rows for validation; None to take some of the training rows.
        val_size: Training rows, drawn by ``seed``, that are kept for validation.
        limit_train: Most rows to train on; with one ``seed``, a smaller set is part of a larger one.
        template: As in :class:`~datamodules.instructions.InstructionDataModule`, or ``none``: the texts stand behind
            one another as they are.
        batch_size: Pairs in a training batch, per device: a forward pass reads twice as many sequences.
        eval_batch_size: Pairs in a validation batch, per device.
        cutoff_len: Most tokens of prompt and answer; longer ones are cut on the right. A pair is left out, and
            reported, of which one answer is cut off whole, or whose answers are the same up to there.
        num_workers: As in :class:`~datamodules.text.TextDataModule`.
        seed: Likewise.
        on_bad_row: Likewise. Bad is also a pair whose answers are the same.
        group_by_length: Likewise.

    Raises:
        ValueError: The arguments contradict each other, or the template is unknown.
        FileNotFoundError: A file is missing.
    """

    def __init__(
        self,
        tokenizer: str,
        train_file: str | None = None,
        hub: str | None = None,
        hub_split: str = "train",
        val_file: str | None = None,
        val_size: int = 0,
        limit_train: int | None = None,
        template: str = "tokenizer",
        batch_size: int = 8,
        eval_batch_size: int = 8,
        cutoff_len: int = 1024,
        num_workers: int = 0,
        seed: int = 42,
        on_bad_row: OnBadRow = "raise",
        group_by_length: bool = True,
    ) -> None:
        super().__init__(
            tokenizer,
            batch_size,
            eval_batch_size,
            cutoff_len,
            num_workers=num_workers,
            seed=seed,
            on_bad_row=on_bad_row,
            group_by_length=group_by_length,
        )
        check_whole(1, none="all", limit_train=limit_train)
        check_whole(0, val_size=val_size)
        check_sources(train_file, hub, val_file, val_size)
        check_files(train_file=train_file, val_file=val_file)
        if template != _NONE:
            check_template(template)
        self.train_file = train_file
        self.hub = hub
        self.hub_split = hub_split
        self.val_file = val_file
        self.val_size = val_size
        self.limit_train = limit_train
        self.template_name = template
        self._template: ConversationTemplate | TokenizerTemplate | None = None
        self._split: tuple[list[Sample], list[Sample]] | None = None

    lost_by_cutting = "one answer, or what tells the two apart"

    def trained_inputs(self) -> dict[str, Any]:
        """See :mod:`dora_lightning.training.trained_inputs`."""
        if self.template_name == _NONE:
            return {"prompt": "{prompt}"}
        if self.template_name in TEMPLATES:
            return {"prompt": TEMPLATES[self.template_name].train_prompt("{prompt}")}
        return {} if self._template is None else {"prompt": prompt_form(self._template)}

    def prepare_data(self) -> None:
        """Download the data set of the hub, on one process."""
        if self.hub is not None:
            load_hub_rows(self.hub, self.hub_split)

    def build_samples(self, stage: Stage) -> list[Sample]:
        """The pairs of a stage; validation and test have the same.

        Raises:
            ValueError: A row is bad (see ``on_bad_row``), or ``val_size`` leaves nothing to train on.
        """
        if stage != "train" and self.val_file is not None:
            return convert_file(self.val_file, self._sample, self.on_bad_row)
        if self._split is None:
            if self.train_file is not None:
                pairs = convert_file(self.train_file, self._sample, self.on_bad_row)
            else:
                assert self.hub is not None
                rows = load_hub_rows(self.hub, self.hub_split)
                pairs = convert_rows(rows, self._sample, f"{self.hub} ({self.hub_split})", self.on_bad_row)
            self._split = split_off(pairs, self.val_size, self.limit_train, self.seed)
        return self._split[0 if stage == "train" else 1]

    def encode(self, samples: list[Sample]) -> list[Any]:
        """Both answers of each sample, with its prompt."""
        assert self.tokenizer is not None
        chosen, rejected = (
            encode_samples([s._replace(target=s.options[side]) for s in samples], self.tokenizer, self.cutoff_len)
            for side in (0, 1)
        )
        return [EncodedPair(*parts) for parts in zip(samples, chosen, rejected, strict=True)]

    def collator(self) -> PairCollator:
        """What makes a batch of pairs."""
        assert self.tokenizer is not None
        return PairCollator(self.tokenizer.pad_token_id, self.cutoff_len)

    def _sample(self, row: Row) -> Sample:
        pair = [_conversation(row, side) for side in ("chosen", "rejected")]
        asked = [(dialogue.system, dialogue.turns[:-1], dialogue.turns[-1][0]) for dialogue in pair]
        if asked[0] != asked[1]:
            raise ValueError("the fields 'chosen' and 'rejected' must answer the same prompt, and theirs differ")
        if pair[0].turns[-1][1] == pair[1].turns[-1][1]:
            raise ValueError("the fields 'chosen' and 'rejected' hold the same answer, so neither is preferred")
        (prompt, better), (_, worse) = (self._text(dialogue) for dialogue in pair)
        return Sample(prompt, better, (better, worse), (str(pair[0].turns[-1][1]),), source="preferences", row=row)

    def _text(self, dialogue: Dialogue) -> tuple[str, str]:
        """Prompt and answer as the model reads and writes them."""
        question, answer = dialogue.turns[-1]
        assert answer is not None
        if self.template_name == _NONE or self.template_name in TEMPLATES:
            if len(dialogue.turns) > 1 or dialogue.system is not None:
                raise ValueError(
                    f"template {self.template_name!r} holds one question and its answer, and this conversation has "
                    "more; choose a conversation template, such as 'tokenizer'"
                )
            if self.template_name == _NONE:
                return question, answer
            template = TEMPLATES[self.template_name]
            return template.train_prompt(question), template.target_prefix + answer
        if self._template is None:
            self._template = get_conversation_template(self.template_name, self.tokenizer)
        rendered = self._template.sample_text(dialogue.turns, dialogue.system)
        return rendered.prompt, rendered.target


def _conversation(row: Row, side: str) -> Dialogue:
    """The prompt with one of the answers."""
    answer = row.get(side)
    if isinstance(answer, list):
        return _with_messages(row, side, answer)
    text = require_field(row, side)
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        asked = read_messages(prompt, "prompt")
        return _answered(asked, text)
    return Dialogue(((require_field(row, "prompt"), text),))


def _with_messages(row: Row, side: str, messages: list[Any]) -> Dialogue:
    prompt = row.get("prompt")
    if isinstance(prompt, list) and messages[: len(prompt)] != prompt:
        # the answer alone; a whole conversation begins with the prompt's messages
        messages = [*prompt, *messages]
    elif isinstance(prompt, str) and len(messages) == 1:
        messages = [{"role": "user", "content": require_field(row, "prompt")}, *messages]
    dialogue = read_messages(messages, side)
    if dialogue.turns[-1][1] is None:
        raise ValueError(f"field {side!r}: the last message is the user's and has no answer")
    return dialogue


def _answered(asked: Dialogue, text: str) -> Dialogue:
    if asked.turns[-1][1] is not None:
        raise ValueError("field 'prompt' must end in a message of the user's; it ends in an answer")
    return asked._replace(turns=(*asked.turns[:-1], (asked.turns[-1][0], text)))
