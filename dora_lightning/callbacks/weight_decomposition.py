"""How far magnitudes and directions move while a model trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from dora_lightning.adapters import AdapterConfig, AdapterLayer, find_targets
from dora_lightning.adapters.analysis import (
    RunningCorrelation,
    WeightChange,
    change_of_blocks,
    layer_change,
    layer_tensors,
    row_blocks,
)
from dora_lightning.adapters.operators import operator_of
from dora_lightning.analyzing.records import (
    PATTERN_FILE,
    Record,
    append_records,
    drop_half_line,
    make_record,
    patterns_of,
    read_records,
    write_records,
)
from dora_lightning.analyzing.start_weights import SNAPSHOT_FILE, StartWeights, write_snapshot
from dora_lightning.analyzing.stored_weights import is_matrix
from dora_lightning.messages import check_whole
from dora_lightning.training.first_process import first_process_works
from dora_lightning.training.sharded_checkpoint import whole_tensor


@dataclass
class _Watched:
    """One module: an adapter layer, or a weight that trains in full.

    Names are in the LightningModule, but ``module``, which is relative to the adapted model.
    """

    full_name: str
    module: str
    layer: AdapterLayer | None = None
    weight: nn.Parameter | None = None
    parameter: str = ""
    transposed: bool = False

    @property
    def method(self) -> str:
        return "full" if self.layer is None else self.layer.method


class WeightDecomposition(Callback):
    """Writes down how far each module's magnitudes and directions have moved from where training started.

    They are the paper's learning patterns (section 3, equations 4 and 5), of adapters of any method and of weights of
    two or more dimensions that train in full. Rows go to ``learning_pattern.jsonl`` in the run's folder, and for each
    type of module the means over its modules, and the correlation over modules and steps, to the loggers. What trains
    is only read, one module at a time; a resumed run goes on with the rows that are there.

    Where a weight that trains in full started is read from the base model's own files if they hold it. Other such
    weights are written once, at the start of the fit, to ``start_weights.safetensors`` in the run's folder.

    Args:
        every_n_steps: optimiser steps between two measurements; null for none beside ``steps``.
        steps: optimiser steps to measure after, beside those. The end of the fit is always measured.
        modules: names or dotted suffixes, or one regular expression, as ``target_modules``; by default all that train.

    Raises:
        ValueError: steps below 1; modules that match nothing that trains; nothing trains that has a magnitude and a
            direction; the start of a resumed run is not to be had.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        steps: list[int] | None = None,
        modules: str | list[str] | None = None,
    ) -> None:
        check_whole(1, none="none beside steps", every_n_steps=every_n_steps)
        for step in steps or []:
            check_whole(1, steps=step)
        self.every_n_steps = every_n_steps
        self.steps = sorted(steps or [])
        self.modules = modules
        self._watched: list[_Watched] = []
        self._correlations: dict[str, RunningCorrelation] = {}
        self._goes_on = False
        self._start: StartWeights | None = None
        self._snapshot: str | None = None
        self._sharded = False
        self._folder = Path()
        self._last = self._measured = 0

    @override
    def state_dict(self) -> dict[str, Any]:
        """Where the snapshot is, for a run that goes on in another folder."""
        return {"snapshot": self._snapshot}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`state_dict`."""
        self._snapshot = state_dict["snapshot"]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what trains, and make sure that its start can be read later."""
        if isinstance(trainer.strategy, FSDPStrategy) or type(trainer.strategy).__name__ == "DeepSpeedStrategy":
            raise ValueError(
                f"WeightDecomposition does not run under {type(trainer.strategy).__name__}, whose weights have lost "
                "their shapes; use FSDP2: lightning.pytorch.strategies.ModelParallelStrategy with ShardedTraining"
            )
        self._watched = _find_watched(pl_module, self.modules)
        self._sharded = any(isinstance(tensor, DTensor) for watched in self._watched for tensor in _tensors(watched))
        self._last, self._measured = trainer.global_step, 0
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks the first process
        with self._taking_part("reading where training starts") as takes_part:
            if takes_part:
                self._prepare_start(trainer, pl_module, self._folder / SNAPSHOT_FILE)
        if trainer.is_global_zero:
            # rows of an earlier fit, or of steps that are taken once more, are of another course of training
            path = self._folder / PATTERN_FILE
            self._correlations, self._goes_on = {}, self._last > 0 and path.is_file()
            if self._goes_on:
                drop_half_line(path)
                known = read_records(path)
                kept = [record for record in known if record.step <= self._last]
                if len(kept) < len(known):
                    write_records(path, kept)
                _count(kept, self._correlations)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, if the step that was just taken is one to measure after."""
        last, self._last = self._last, trainer.global_step
        every = self.every_n_steps
        # with several optimisers a batch takes several steps
        due = every is not None and self._last // every > last // every
        if due or any(last < step <= self._last for step in self.steps):
            self._measure_in_turn(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the end, and say where the rows are."""
        if trainer.global_step > 0:
            if self._measured != trainer.global_step:
                self._measure_in_turn(trainer)
            rank_zero_info(f"Learning pattern: {self._folder / PATTERN_FILE}")

    def _prepare_start(self, trainer: Trainer, pl_module: LightningModule, path: Path) -> None:
        full = {watched.parameter: watched.weight for watched in self._watched if watched.weight is not None}
        self._start = None
        if not full:
            return
        start = StartWeights(pl_module) if trainer.is_global_zero else None
        if self._last == 0:
            missing = []
            for name, weight in full.items():
                whole = _whole(weight)
                if start is not None and not start.in_files(name, whole):
                    missing.append(name)
            if self._sharded:
                missing = trainer.strategy.broadcast(missing)
            self._snapshot = str(path) if missing else None
            if missing:
                write_snapshot(path, missing, full, trainer.is_global_zero)
                rank_zero_info(f"Start of {len(missing)} weights that no file of a base model holds: {path}")
        if start is None:
            return
        if self._snapshot is not None:
            # a run's folder may have been moved
            there = next((place for place in (Path(self._snapshot), path) if place.is_file()), None)
            if there is None:
                raise ValueError(f"the run that goes on kept where its weights started in {self._snapshot}, now gone")
            start.open_snapshot(there)
        if unknown := [name for name in full if name not in start]:
            raise ValueError(
                f"it is not known where {unknown[0]} started: the checkpoint that the run goes on from was saved "
                "without WeightDecomposition, or by a model whose files are not there any more; remove the callback"
            )
        self._start = start

    def _taking_part(self, what: str) -> AbstractContextManager[bool]:
        """All processes take part where they hold shards; else the first one works, and the others wait for it."""
        return nullcontext(True) if self._sharded else first_process_works(what)

    def _measure_in_turn(self, trainer: Trainer) -> None:
        self._measured = trainer.global_step
        with self._taking_part("measuring the learning pattern") as takes_part:
            if takes_part:
                self._measure(trainer, self._measured)

    def _measure(self, trainer: Trainer, step: int) -> None:
        measured = []
        for watched in self._watched:
            change = self._change(watched, trainer.is_global_zero)
            if change is not None:
                measured.append(make_record(step, watched.module, watched.method, change, watched.full_name))
        if not trainer.is_global_zero:
            return
        # the first rows of a new run replace those of an earlier one
        (append_records if self._goes_on else write_records)(self._folder / PATTERN_FILE, measured)
        self._goes_on = True
        _count(measured, self._correlations)
        metrics = _metrics(measured, self._correlations)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    @torch.no_grad()
    def _change(self, watched: _Watched, computes: bool) -> WeightChange | None:
        """What one module's change is; on a process that only holds shards, nothing but its part in gathering."""
        if watched.layer is not None:
            tensors = {name: _whole(tensor) for name, tensor in layer_tensors(watched.layer).items()}
            return layer_change(watched.layer, tensors) if computes else None
        assert watched.weight is not None
        weight = _whole(watched.weight)
        if not computes:
            return None
        assert self._start is not None
        pairs = zip(self._start.blocks(watched.parameter), row_blocks(weight), strict=True)
        return change_of_blocks(((old.to(new), new) for (_, old), (_, new) in pairs), not watched.transposed)


def _find_watched(pl_module: LightningModule, modules: str | list[str] | None) -> list[_Watched]:
    prefix, root = _adapted_or_whole(pl_module)
    names = _matched(root, modules)
    found: list[_Watched] = []
    seen: set[int] = set()
    for name, module in pl_module.named_modules():
        if isinstance(module, AdapterLayer):
            found.append(_Watched(name, name.removeprefix(prefix), layer=module))
            seen |= {id(parameter) for parameter in module.parameters()}
            continue
        if type(module).__module__.startswith("peft."):
            raise ValueError(
                f"{name} is a layer of PEFT's; WeightDecomposition knows the adapters of this library: the callback "
                "DoRA injects them, and load_peft_adapter reads those that PEFT has written"
            )
        for part, parameter in module.named_parameters(recurse=False):
            kind = module if part == "weight" else None
            if parameter.requires_grad and is_matrix(tuple(parameter.shape), kind) and id(parameter) not in seen:
                seen.add(id(parameter))
                operator = None if kind is None else operator_of(kind)
                parameter_name = f"{name}.{part}" if name else part
                # a weight goes by the name of its module
                shown = name if part == "weight" and name else parameter_name
                transposed = operator is not None and operator.transposed
                relative = shown.removeprefix(prefix)
                found.append(
                    _Watched(shown, relative, weight=parameter, parameter=parameter_name, transposed=transposed)
                )
    if not found:
        raise ValueError(
            "WeightDecomposition found nothing to measure: no adapters, and no weights of two dimensions that train"
        )
    if names is not None:
        found = [watched for watched in found if any(_inside(watched.module, name) for name in names)]
        if not found:
            raise ValueError(f"modules={modules!r} of WeightDecomposition matches modules, but none that train")
    return found


def _adapted_or_whole(pl_module: LightningModule) -> tuple[str, nn.Module]:
    """Prefix of the names in the adapted model, and that model."""
    for name, module in pl_module.named_modules():
        if hasattr(module, "adapter_config"):
            return (f"{name}." if name else ""), module
    return "", pl_module


def _matched(root: nn.Module, modules: str | list[str] | None) -> list[str] | None:
    if modules is None:
        return None
    try:
        return list(find_targets(root, AdapterConfig("full", target_modules=modules)))
    except ValueError as error:
        raise ValueError(f"WeightDecomposition: {str(error).replace('target_modules', 'modules')}") from error


def _inside(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def _tensors(watched: _Watched) -> Iterator[Tensor]:
    if watched.layer is not None:
        yield from layer_tensors(watched.layer).values()
    elif watched.weight is not None:
        yield watched.weight


def _whole(tensor: Tensor) -> Tensor:
    return whole_tensor(tensor) if isinstance(tensor, DTensor) else tensor.detach()


def _count(records: list[Record], correlations: dict[str, RunningCorrelation]) -> None:
    """Add the records to the correlation of their type, and to that of all."""
    for record in records:
        for name in (f"{record.type}/", ""):
            correlations.setdefault(name, RunningCorrelation()).add(record.change)


def _metrics(measured: list[Record], correlations: dict[str, RunningCorrelation]) -> dict[str, float]:
    """Means of one measurement, and the correlations of all so far."""
    metrics = {}
    for kind, pattern in patterns_of(measured).items():
        metrics[f"learning_pattern/{kind}/delta_m"] = pattern.delta_m
        metrics[f"learning_pattern/{kind}/delta_d"] = pattern.delta_d
    values = {kind: running.value() for kind, running in correlations.items()}
    return metrics | {
        f"learning_pattern/{kind}correlation": correlation.r
        for kind, correlation in values.items()
        if not correlation.reason
    }
