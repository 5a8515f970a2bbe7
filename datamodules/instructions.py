"""Instruction sets: Alpaca's rows and chat messages, from files or the hub."""

import difflib
from pathlib import Path
from typing import Any

from datamodules.conversation import (
    CONVERSATION_TEMPLATES,
    TOKENIZER,
    ConversationTemplate,
    TokenizerTemplate,
    get_conversation_template,
    prompt_form,
)
from datamodules.hub import load_hub_rows
from datamodules.loading import Stage
from datamodules.messages import Dialogue, dialogue_of_row, has_messages
from datamodules.rows import OnBadRow, Row, convert_file, convert_rows, optional_text, require_field
from datamodules.subsets import split_off
from datamodules.tables import is_saved_dataset
from datamodules.templates import TEMPLATES, PromptTemplate
from datamodules.text import PackingLen, TextDataModule
from dora_lightning.data import Sample
from dora_lightning.messages import check_whole


class InstructionDataModule(TextDataModule):
    """Instructions and the responses to them; what the assistant says is trained on, and nothing else.

    A row is one of these, and a file may mix them:

    - Alpaca's ``{"instruction": ..., "input": ..., "output": ...}``; ``input`` may be blank or left out;
    - ``{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}``, a message of the
      role ``system`` first or none;
    - ``{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}``, likewise.

    Every answer of a conversation is trained on, with the token that ends it. Validation and test judge the last one.

    Args:
        tokenizer: As in :class:`~datamodules.text.TextDataModule`.
        train_file: Rows to train on, a JSON list or JSONL.
        hub: A data set of the hub instead, ``name`` or ``name:config``, such as ``yahma/alpaca-cleaned``.
        hub_split: The split of it.
        val_file: Rows for validation; None to take some of the training rows.
        val_size: Training rows, drawn by ``seed``, that are kept for validation.
        test_file: Rows to test on; None for those of validation.
        limit_train: Most rows to train on. With one ``seed``, a smaller set is part of a larger one.
        template: A prompt template (``alpaca``, ``plain``, ...), for one instruction and its response; a conversation
            template (``chatml``, ``llama3``, ``vicuna_v1``); or ``tokenizer`` for the tokenizer's own chat template.
        batch_size: As in :class:`~datamodules.text.TextDataModule`.
        eval_batch_size: Likewise.
        cutoff_len: Likewise.
        train_on_inputs: Likewise.
        num_workers: Likewise.
        seed: Likewise.
        on_bad_row: Likewise. Bad is also a conversation that the template has no form for.
        group_by_length: Likewise.
        packing_len: Likewise.

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
        test_file: str | None = None,
        limit_train: int | None = None,
        template: str = "alpaca",
        batch_size: int = 16,
        eval_batch_size: int = 16,
        cutoff_len: int = 512,
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
        check_whole(1, none="all", limit_train=limit_train)
        check_whole(0, val_size=val_size)
        check_sources(train_file, hub, val_file, val_size)
        check_files(train_file=train_file, val_file=val_file, test_file=test_file)
        check_template(template)
        self.train_file = train_file
        self.hub = hub
        self.hub_split = hub_split
        self.val_file = val_file
        self.val_size = val_size
        self.test_file = test_file
        self.limit_train = limit_train
        self.template_name = template
        self._split: tuple[list[Sample], list[Sample]] | None = None

    def trained_inputs(self) -> dict[str, Any]:
        """See :mod:`dora_lightning.training.trained_inputs`."""
        if self.template_name in TEMPLATES:
            return {"prompt": TEMPLATES[self.template_name].eval_prompt("{prompt}")}
        if self.tokenizer is None:
            return {}
        return {"prompt": prompt_form(get_conversation_template(self.template_name, self.tokenizer))}

    def prepare_data(self) -> None:
        """Download the data set of the hub, on one process."""
        if self.hub is not None:
            load_hub_rows(self.hub, self.hub_split)

    def build_samples(self, stage: Stage) -> list[Sample]:
        """The samples of a stage; without files of their own, validation and test have the same.

        Raises:
            ValueError: A row is bad (see ``on_bad_row``), or ``val_size`` leaves nothing to train on.
        """
        if stage == "test" and self.test_file is not None:
            return self._read(self.test_file, stage)
        if stage != "train" and self.val_file is not None:
            return self._read(self.val_file, stage)
        if self._split is None:
            rows = self._training_rows()
            self._split = split_off(rows, self.val_size, self.limit_train, self.seed)
        return self._split[0 if stage == "train" else 1]

    def _training_rows(self) -> list[Sample]:
        if self.train_file is not None:
            return self._read(self.train_file, "train")
        assert self.hub is not None
        rows = load_hub_rows(self.hub, self.hub_split)
        return convert_rows(rows, self._reader("train"), f"{self.hub} ({self.hub_split})", self.on_bad_row)

    def _read(self, file: str, stage: Stage) -> list[Sample]:
        return convert_file(file, self._reader(stage), self.on_bad_row)

    def _reader(self, stage: Stage) -> Any:
        template = TEMPLATES.get(self.template_name) or get_conversation_template(self.template_name, self.tokenizer)

        def convert(row: Row) -> Sample:
            if isinstance(template, PromptTemplate):
                instruction, given, response = _one_instruction(row, self.template_name)
                prompt = template.eval_prompt if stage == "test" else template.train_prompt
                return Sample(
                    prompt(instruction, given),
                    template.target_prefix + response,
                    references=(response,),
                    source="instructions",
                    row=row,
                )
            return dialogue_sample(_dialogue(row), template, row)

        return convert


def dialogue_sample(dialogue: Dialogue, template: ConversationTemplate | TokenizerTemplate, row: Row) -> Sample:
    """A conversation as a sample; the answers before the last are trained on too."""
    prompt, target, answered = template.sample_text(dialogue.turns, dialogue.system)
    last = dialogue.turns[-1][1]
    references = () if last is None else (last,)
    return Sample(prompt, target, references=references, source="instructions", row=row, answered=answered)


def check_sources(train_file: str | None, hub: str | None, val_file: str | None, val_size: int) -> None:
    """See that training and validation data are named once each.

    Raises:
        ValueError: They are not.
    """
    if (train_file is None) == (hub is None):
        raise ValueError("give train_file or hub, one of the two: a file of rows, or a data set of the hub")
    if val_file is not None and val_size:
        raise ValueError("give val_file or val_size, not both: one names the validation data, the other draws it")


def check_files(**files: str | None) -> None:
    """See that files are there, by the names of the options that name them.

    Raises:
        FileNotFoundError: One is not.
    """
    for name, path in files.items():
        if path is not None and not Path(path).is_file() and not is_saved_dataset(Path(path)):
            raise FileNotFoundError(f"{name} {path}: no such file")


def check_template(name: str) -> None:
    """See whether there is a prompt or conversation template called ``name``.

    Raises:
        ValueError: There is none; the message lists the names.
    """
    known = [*TEMPLATES, *CONVERSATION_TEMPLATES, TOKENIZER]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown template {name!r}.{hint} The templates are: {', '.join(known)}")


def _one_instruction(row: Row, template: str) -> tuple[str, str, str]:
    """Instruction, input and response of a row, for a template that holds one of each."""
    if not has_messages(row):
        return require_field(row, "instruction"), optional_text(row, "input"), require_field(row, "output")
    dialogue = dialogue_of_row(row)
    if len(dialogue.turns) > 1 or dialogue.system is not None:
        what = "a system message" if len(dialogue.turns) == 1 else f"{len(dialogue.turns)} turns"
        raise ValueError(
            f"template {template!r} holds one instruction and its response, and this conversation has {what}; "
            f"choose a conversation template: {', '.join([*CONVERSATION_TEMPLATES, TOKENIZER])}"
        )
    ((question, answer),) = dialogue.turns
    assert answer is not None
    return question, "", answer


def _dialogue(row: Row) -> Dialogue:
    if has_messages(row):
        return dialogue_of_row(row)
    instruction, given, response = (
        require_field(row, "instruction"),
        optional_text(row, "input"),
        require_field(row, "output"),
    )
    return Dialogue(((f"{instruction}\n\n{given}" if given else instruction, response),))
