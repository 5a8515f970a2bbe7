"""The commonsense reasoning benchmark: eight tasks to train on together and to score one by one."""

import difflib
from pathlib import Path
from typing import Any, Literal, TypeAlias

from datamodules.commonsense_hub import load_hub_split
from datamodules.commonsense_rows import (
    ARC_OR_OPENBOOKQA,
    TASKS,
    Question,
    answer_labels,
    parse_hub_row,
    parse_row,
    recognise_task,
    render_row,
)
from datamodules.instructions import check_files
from datamodules.loading import Stage
from datamodules.rows import OnBadRow, Row, convert_file, convert_rows, optional_text, require_field
from datamodules.subsets import drawn, permutation
from datamodules.templates import get_template
from datamodules.text import PackingLen, TextDataModule
from dora_lightning.data import Sample
from dora_lightning.messages import check_whole

Split: TypeAlias = Literal["train", "test"]
_UNNAMED = "custom"  # source of a row in a combined file that is in none of the eight formats


class CommonsenseDataModule(TextDataModule):
    """BoolQ, PIQA, Social IQa, HellaSwag, WinoGrande, ARC-Challenge, ARC-Easy and OpenBookQA.

    Rows come from LLM-Adapters' folder (``data_dir``, with ``<task>/train.json`` and ``<task>/test.json``) or from the
    Hugging Face hub (``hub``); ``train_file`` puts one combined file, such as ``commonsense_170k.json``, in place of
    the training files. A row's ``source`` is its task.

    Args:
        tokenizer: As in :class:`~datamodules.text.TextDataModule`.
        data_dir: LLM-Adapters' folder of tasks.
        hub: Read the data sets of the hub instead: true for the ids of :data:`~datamodules.commonsense_hub.HUB_IDS`,
            or a dict from task to another id, ``name`` or ``name:config``. Like LLM-Adapters, it tests on the
            validation split of the five tasks whose test answers are not public.
        train_tasks: The tasks to train on; ``all`` is every one of the eight that is in ``data_dir`` (all eight from
            the hub). Any other folder of ``data_dir`` can be named too.
        test_tasks: The tasks to test on; likewise.
        train_file: One file with the training rows of all tasks. A row's task is recognised from its instruction, see
            :func:`~datamodules.commonsense_rows.recognise_task`.
        template: A name in :data:`~datamodules.templates.TEMPLATES`. Training and validation use its training prompt,
            testing its evaluation prompt.
        answer_style: ``label`` is the published protocol: the prompt lists the options, and the target is "the correct
            answer is answer2". ``text``: the prompt is the question alone and the target is the text of the right
            option, for ranking options by log-likelihood.
        val_size: Training samples, drawn by ``seed``, that are kept for validation.
        limit_train: Most training rows per task (or of ``train_file``), drawn by ``seed``.
        limit_test: Most test rows per task, drawn by ``seed``.
        batch_size: As in :class:`~datamodules.text.TextDataModule`.
        eval_batch_size: As in :class:`~datamodules.text.TextDataModule`.
        cutoff_len: As in :class:`~datamodules.text.TextDataModule`.
        train_on_inputs: As in :class:`~datamodules.text.TextDataModule`.
        num_workers: As in :class:`~datamodules.text.TextDataModule`.
        seed: As in :class:`~datamodules.text.TextDataModule`.
        on_bad_row: As in :class:`~datamodules.text.TextDataModule`.
        group_by_length: Likewise.
        packing_len: Likewise.

    Raises:
        ValueError: The arguments contradict each other, or the template or a task is unknown.
        FileNotFoundError: ``data_dir`` or ``train_file`` is missing.
    """

    def __init__(
        self,
        tokenizer: str,
        data_dir: str | None = None,
        hub: bool | dict[str, str] = False,
        train_tasks: list[str] | Literal["all"] = "all",
        test_tasks: list[str] | Literal["all"] = "all",
        train_file: str | None = None,
        template: str = "llm_adapters",
        answer_style: Literal["label", "text"] = "label",
        val_size: int = 120,
        limit_train: int | None = None,
        limit_test: int | None = None,
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
        check_whole(1, none="all", limit_train=limit_train, limit_test=limit_test)
        check_whole(0, val_size=val_size)
        if data_dir is not None and hub:
            raise ValueError("give data_dir or hub, not both: they name the same rows in two places")
        if data_dir is None and not hub and train_file is None:
            raise ValueError("no data: give data_dir (LLM-Adapters' folder), hub: true, or train_file")
        if train_file is not None and train_tasks != "all":
            raise ValueError("train_tasks chooses among the files of data_dir; it has no effect beside train_file")
        if answer_style not in ("label", "text"):
            raise ValueError(f"answer_style must be 'label' or 'text', found {answer_style!r}")
        self.data_dir = None if data_dir is None else Path(data_dir)
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise FileNotFoundError(f"data_dir {self.data_dir} is not a folder; expected LLM-Adapters' folder of tasks")
        check_files(train_file=train_file)
        self.hub_ids = hub if isinstance(hub, dict) else {}
        self.from_hub = bool(hub)
        self.train_file = train_file
        self.train_tasks = self._resolve("train_tasks", train_tasks, "train")
        self.test_tasks = self._resolve("test_tasks", test_tasks, "test")
        self._resolve("hub", list(self.hub_ids), "train")
        self.template = get_template(template)
        self.answer_style = answer_style
        self.val_size = val_size
        self.limit_train = limit_train
        self.limit_test = limit_test
        self._split: tuple[list[Sample], list[Sample]] | None = None

    def prepare_data(self) -> None:
        """Download the data sets of the hub, on one process."""
        if not self.from_hub:
            return
        if self.train_file is None:
            for task in self.train_tasks:
                load_hub_split(task, "train", self.hub_ids.get(task))
        for task in self.test_tasks:
            load_hub_split(task, "test", self.hub_ids.get(task))

    def trained_inputs(self) -> dict[str, Any]:
        """See :mod:`dora_lightning.training.trained_inputs`."""
        return {"prompt": self.template.eval_prompt("{prompt}")}

    def build_samples(self, stage: Stage) -> list[Sample]:
        """The samples of a stage; training and validation are two parts of the training rows.

        Raises:
            FileNotFoundError: A task has no file; the message names it and the tasks that are there.
            ValueError: A row is bad (see ``on_bad_row``), or ``val_size`` leaves nothing to train on.
        """
        if stage == "test":
            return self._samples(self.test_tasks, "test", self.limit_test)
        if self._split is None:
            self._split = self._split_off_validation(self._training_samples())
        return self._split[0 if stage == "train" else 1]

    def _training_samples(self) -> list[Sample]:
        if self.train_file is None:
            return self._samples(self.train_tasks, "train", self.limit_train)

        def convert(row: Row) -> Sample:
            return self._sample(row, recognise_task(row) or _UNNAMED, "train")

        return drawn(convert_file(self.train_file, convert, self.on_bad_row), self.limit_train, self.seed)

    def _split_off_validation(self, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
        if not 0 <= self.val_size < len(samples):
            raise ValueError(
                f"val_size={self.val_size} must be at least 0 and leave something of {len(samples)} training samples"
            )
        order = permutation(len(samples), self.seed)
        chosen = set(order[: self.val_size])
        train = [sample for index, sample in enumerate(samples) if index not in chosen]
        return train, [samples[index] for index in sorted(chosen)]

    def _samples(self, tasks: list[str], split: Split, limit: int | None) -> list[Sample]:
        if not tasks:
            raise FileNotFoundError(
                f"data_dir {self.data_dir} holds none of the eight tasks with {split}.json: {', '.join(TASKS)}"
            )
        return [sample for task in tasks for sample in self._task_samples(task, split, limit)]

    def _task_samples(self, task: str, split: Split, limit: int | None) -> list[Sample]:
        if self.from_hub:
            rows = load_hub_split(task, split, self.hub_ids.get(task))
            samples = convert_rows(
                rows,
                # the row is kept as LLM-Adapters writes it, so that predictions look the same wherever it came from
                lambda row: self._sample(render_row(parse_hub_row(row, task)), task, split),
                f"{task} ({split}, from the hub)",
                self.on_bad_row,
            )
        else:
            path = self._file(task, split)
            samples = convert_file(path, lambda row: self._sample(row, task, split), self.on_bad_row)
        return drawn(samples, limit, self.seed)

    def _file(self, task: str, split: Split) -> Path:
        if self.data_dir is None:
            raise ValueError(f"there is nothing to {split} on: only train_file was given; add data_dir or hub")
        path = self.data_dir / task / f"{split}.json"
        if not path.is_file():
            there = ", ".join(self._folders(split)) or "none"
            raise FileNotFoundError(f"{path}: no such file; tasks with {split}.json: {there}")
        return path

    def _sample(self, row: Row, task: str, split: Split) -> Sample:
        prompt = self.template.train_prompt if split == "train" else self.template.eval_prompt
        prefix = self.template.target_prefix
        if self.answer_style == "text":
            if task not in TASKS and task != ARC_OR_OPENBOOKQA:
                raise ValueError(
                    "the texts of the options can only be read from a row in the format of one of the eight tasks; "
                    "use answer_style: label"
                )
            question = parse_row(row, task)
            return _text_sample(question, prompt(question.text), prefix, row)
        instruction, output, answer = (require_field(row, field) for field in ("instruction", "output", "answer"))
        labels = answer_labels(instruction)
        if answer not in labels:
            raise ValueError(f"field 'answer' must be one of {'/'.join(labels)}, found {answer!r}")
        before, found, after = output.rpartition(answer)
        if not found:
            raise ValueError(f"field 'output' must contain the answer {answer!r}, found {output!r:.200}")
        return Sample(
            prompt=prompt(instruction, optional_text(row, "input")),
            target=prefix + output,
            options=tuple(prefix + before + label + after for label in labels),
            references=(answer,),
            source=task,
            row=row,
        )

    def _resolve(self, argument: str, tasks: list[str] | Literal["all"], split: Split) -> list[str]:
        if tasks == "all":
            there = self._folders(split)
            return [task for task in TASKS if self.data_dir is None or task in there]
        if isinstance(tasks, str):
            raise ValueError(f"{argument} must be 'all' or a list of tasks, found {tasks!r}")
        known = {name.lower(): name for name in [*TASKS, *self._folders()]}
        for task in tasks:
            if task not in known.values():
                close = difflib.get_close_matches(task.lower(), known, n=1)
                hint = f" Did you mean {known[close[0]]!r}?" if close else ""
                raise ValueError(f"{argument}: unknown task {task!r}.{hint} Known tasks: {', '.join(known.values())}")
        return tasks

    def _folders(self, split: Split | None = None) -> list[str]:
        """The folders of ``data_dir``; those that have a file for ``split``, if it is given."""
        if self.data_dir is None:
            return []
        folders = sorted(path for path in self.data_dir.iterdir() if path.is_dir())
        return [path.name for path in folders if split is None or (path / f"{split}.json").is_file()]


def _text_sample(question: Question, prompt: str, prefix: str, row: Row) -> Sample:
    options = tuple(prefix + option for option in question.options)
    right = question.answer
    return Sample(prompt, options[right], options, (question.options[right],), source=question.task, row=row)
