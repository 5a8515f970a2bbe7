"""Several tasks in one run, each for its own data sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from rich import box
from rich.console import Group, RenderableType
from torch import Tensor, nn

from dora_lightning.data import Sample
from dora_lightning.gathering import gather
from dora_lightning.task import Task
from dora_lightning.terminal import PlainTable
from tasks.submissions import file_part


class Mixed(Task):
    """Judges each sample by the task of its :attr:`~dora_lightning.data.Sample.source`.

    Results are those of the tasks without their means over data sets, and ``mean/headline``, which papers report of
    such a run: the mean of the headline numbers of the tasks, such as ``vqav2/accuracy``, ``gqa/accuracy``,
    ``nlvr2/accuracy`` and ``coco_captions/cider_d``. A task's headline measure is the first that it reports a mean of.
    A source counts with its own number, and what a pattern stands for with its task's mean. Tasks of which nothing was
    judged do not count. A result or a file that several tasks give the same name is preceded by the key of each.

    Args:
        tasks: key -> task. A key is a source, a pattern such as ``moving_shapes_*``, or several of these separated by
            commas, which share one task: ``tvc, yc2c``. A source's own name goes before patterns, and patterns go in
            the order they have here.

    Raises:
        ValueError: there are no tasks; a key is empty, or a source is there twice; one task is given under two keys.
    """

    _judged: set[int]
    _headlines: dict[str, tuple[str, Tensor]]
    _named: dict[int, dict[str, str]]
    """Task -> its own name of a result -> the name that the result has here."""

    def __init__(self, tasks: dict[str, Task]) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("tasks: give at least one, as source -> task")
        self.keys = list(tasks)
        # a list, since a ModuleDict refuses names with a period
        self.tasks = nn.ModuleList(tasks.values())
        if len({id(task) for task in tasks.values()}) < len(tasks):
            raise ValueError("tasks: one task is given under several keys; give it one key, such as 'tvc, yc2c'")
        self._names = [_split(key) for key in self.keys]
        self._owners: dict[str, int] = {}
        for index, names in enumerate(self._names):
            for name in names:
                if name in self._owners:
                    raise ValueError(
                        f"tasks: {name!r} is in the keys {self.keys[self._owners[name]]!r} and {self.keys[index]!r}"
                    )
                self._owners[name] = index
        parts = [file_part(key) or "all" for key in self.keys]
        self._labels = [part if parts.count(part) == 1 else f"{part}_{n}" for n, part in enumerate(parts, 1)]
        self._forget()

    def judge_of(self, samples: Sequence[Sample]) -> Task:
        """The task of the samples' source.

        Raises:
            ValueError: no task is for a source, or the samples belong to several tasks.
        """
        indices = list(dict.fromkeys(self._index(sample.source) for sample in samples))
        if len(indices) != 1:
            keys = ", ".join(repr(self.keys[index]) for index in indices)
            raise ValueError(f"a batch to be judged holds samples of one task, got those of {keys or 'none'}")
        return self._task(indices[0]).judge_of(samples)

    def update(
        self, samples: Sequence[Sample], texts: Sequence[str] | None = None, scores: Sequence[Tensor] | None = None
    ) -> None:
        """Hand each sample to its task.

        Raises:
            ValueError: no task is for a source; what a task raises.
        """
        places: dict[int, list[int]] = {}
        for place, sample in enumerate(samples):
            places.setdefault(self._index(sample.source), []).append(place)
        for index, chosen in places.items():
            self._task(index).update(
                [samples[place] for place in chosen],
                None if texts is None else [texts[place] for place in chosen],
                None if scores is None else [scores[place] for place in chosen],
            )
            self._judged.add(index)

    def compute(self) -> dict[str, Tensor]:
        """The tasks' results and ``mean/headline``, over the answers of all processes."""
        # the same tasks on every process, since they wait for each other in theirs
        judged = sorted(set(gather(sorted(self._judged))))
        results = {index: self._task(index).compute() for index in judged}
        for index, own in results.items():
            self._headlines |= self._headlines_of(index, own)
        names = {index: [name for name in own if not _is_mean(name)] for index, own in results.items()}
        self._named = self._tell_apart(names, "/")
        merged = {shown: results[index][name] for index, named in self._named.items() for name, shown in named.items()}
        if self._headlines:
            values = [value.float().cpu() for _, value in self._headlines.values()]
            merged["mean/headline"] = torch.stack(values).mean()
        return merged

    def _headlines_of(self, index: int, results: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
        """Source or pattern -> its headline measure and the number."""
        measure = next((name.removeprefix("mean/") for name in results if _is_mean(name)), None)
        if measure is None:
            return {}
        names = self._names[index]
        if any(_is_pattern(name) for name in names):
            return {self.keys[index]: (measure, results[f"mean/{measure}"])}
        return {name: (measure, results[f"{name}/{measure}"]) for name in names if f"{name}/{measure}" in results}

    def records(self) -> list[dict[str, Any]]:
        """The rows judged in this process, of all tasks."""
        return [record for index in range(len(self.keys)) for record in self._task(index).records()]

    def files(self, records: list[dict[str, Any]]) -> dict[str, bytes]:
        """The files of all tasks."""
        owned: dict[int, list[dict[str, Any]]] = {}
        for record in records:
            index = self._find(record["source"])
            # a task that writes no files may let a row's own field of this name stand
            if index is not None:
                owned.setdefault(index, []).append(record)
        files = {index: self._task(index).files(owned[index]) for index in sorted(owned)}
        named = self._tell_apart({index: list(own) for index, own in files.items()}, "_")
        return {shown: files[index][name] for index, names in named.items() for name, shown in names.items()}

    def _tell_apart(self, names: Mapping[int, Sequence[str]], between: str) -> dict[int, dict[str, str]]:
        """Task -> name -> the name among those of all tasks: preceded by the task's key where several have it."""
        every = Counter(name for own in names.values() for name in own)
        return {
            index: {name: f"{self._labels[index]}{between}{name}" if every[name] > 1 else name for name in own}
            for index, own in names.items()
        }

    def table(self, metrics: dict[str, Tensor]) -> RenderableType:
        """The headline numbers and their mean, times 100, and the tables of the tasks; after :meth:`compute`."""
        headlines = PlainTable(title="Headline numbers (x 100)", box=box.SIMPLE_HEAD, padding=(0, 1))
        headlines.add_column("data set", overflow="fold")
        headlines.add_column("measure")
        headlines.add_column("score", justify="right")
        for name, (measure, value) in self._headlines.items():
            headlines.add_row(name, measure, f"{100 * float(value):.1f}")
        headlines.add_section()
        if "mean/headline" in metrics:
            headlines.add_row("mean", "", f"{100 * float(metrics['mean/headline']):.1f}")
        tables = [
            self._task(index).table({name: metrics[shown] for name, shown in names.items()})
            for index, names in self._named.items()
            if names
        ]
        return Group(headlines, *tables)

    def reset(self) -> None:
        """Forget what was judged."""
        for index in range(len(self.keys)):
            self._task(index).reset()
        self._forget()

    def _forget(self) -> None:
        self._judged, self._headlines, self._named = set(), {}, {}

    def _task(self, index: int) -> Task:
        task = self.tasks[index]
        assert isinstance(task, Task)
        return task

    def _index(self, source: str) -> int:
        index = self._find(source)
        if index is None:
            raise ValueError(f"no task is for the source {source!r}; there are tasks for {', '.join(self._owners)}")
        return index

    def _find(self, source: str) -> int | None:
        if source in self._owners:
            return self._owners[source]
        return next((index for name, index in self._owners.items() if fnmatchcase(source, name)), None)


def _split(key: str) -> list[str]:
    names = [name.strip() for name in key.split(",")]
    if "" in names:
        raise ValueError(f"tasks: a key is a source, a pattern, or several of these with commas between, got {key!r}")
    return names


def _is_pattern(name: str) -> bool:
    return any(mark in name for mark in "*?[")


def _is_mean(name: str) -> bool:
    return name.startswith("mean/")
