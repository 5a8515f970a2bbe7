"""What came out of a run: a table in the terminal, and ``summary.md`` with plots in the run folder."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from dora_lightning.adapters import AdapterConfig, summarize_adapters
from dora_lightning.analyzing.figure import plot_pattern
from dora_lightning.analyzing.records import PATTERN_FILE, read_records
from dora_lightning.callbacks.merge_on_save import MergeOnSave
from dora_lightning.files import write_text_atomically
from dora_lightning.gathering import gather
from dora_lightning.plots import can_plot
from dora_lightning.runs import BEFORE_FILE, read_result
from dora_lightning.terminal import say
from dora_lightning.training.run_curves import draw_run
from dora_lightning.training.run_facts import Progress, RunFacts, peak_memory, samples_in
from dora_lightning.training.run_report import TITLE, Ending, markdown_report, terminal_report

SUMMARY_FILE = "summary.md"
_KEY = "dora_lightning_run_summary"


class RunSummary(Callback):
    """Says at the end of a fit what trained, on how much data, how long, in how much memory, and what came of it.

    For any LightningModule, with adapters or without. The table goes to the terminal of the first process; the same and
    more to ``summary.md``, with plots beside it if matplotlib is there. What was measured is kept in checkpoints, so
    that a resumed run counts all of its parts; steps that were lost in an interruption are not counted. A fit that is
    interrupted has no summary.

    Args:
        dirpath: folder of ``summary.md``; by default the logger's, and without a logger nothing is written.
        plots: draw the losses and learning rates that a CSVLogger has logged, and what WeightDecomposition has.
    """

    def __init__(self, dirpath: str | None = None, plots: bool = True) -> None:
        self.dirpath = dirpath
        self.plots = plots
        self.facts: RunFacts | None = None
        # who tests after the fit sets this, and calls `report` itself
        self.waits = False
        self._module: LightningModule | None = None
        self._progress = Progress()
        self._samples: int | None = 0
        self._began: float | None = None
        self._validation_began: float | None = None
        self._known: dict[str, float] = {}
        self._shown = ""

    # Measuring ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew, unless this Trainer goes on with what it has trained before."""
        if stage != "fit":
            return
        self.facts = self._began = self._validation_began = None
        self._samples = 0
        if trainer.global_step == 0:
            self._progress = Progress()

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on counting where the checkpoint's run was."""
        if trainer.state.fn == TrainerFn.FITTING:
            found = checkpoint.get(_KEY)
            self._progress = Progress.from_state(found) if found else Progress(since_step=checkpoint["global_step"])

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what was measured.

        Not by ``state_dict``: Lightning would warn whoever loads the checkpoint without this callback.
        """
        so_far = Progress(**vars(self._progress))
        so_far.seconds += self._running_seconds()
        # the other processes have had as many
        so_far.samples = _added(so_far.samples, self._samples, trainer.world_size)
        so_far.peak_memory = max(so_far.peak_memory, peak_memory(trainer.strategy.root_device))
        checkpoint[_KEY] = so_far.state()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._progress.parts += 1
        self._samples = 0
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
        self._began = time.monotonic()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count samples: here, so that a checkpoint that is saved after the batch has them."""
        self._samples = _added(self._samples, samples_in(batch))
        vision = batch.get("vision") if isinstance(batch, Mapping) else None
        self._shown = "" if not vision else "--image" if "pixel_values" in vision else "--features"

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss."""
        if hasattr(pl_module, "reported_loss"):  # as our backbones do: one for each optimizer step
            if pl_module.reported_loss is None:
                self._progress.losses.unit = "steps"
            else:
                self._progress.losses.add(pl_module.reported_loss)  # type: ignore[arg-type]
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Lightning has divided it
            accumulated = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._progress.losses.add(loss.detach() * accumulated)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of training."""
        if self._began is not None:
            self._validation_began = time.monotonic()
            self._known = _floats(trainer.callback_metrics)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the best of the scores that are known to be better when lower, or higher."""
        if self._validation_began is None or self._began is None:
            return
        scores = {
            name: value
            for name, value in _floats(trainer.callback_metrics).items()
            if math.isfinite(value) and self._known.get(name) != value  # what validation has changed
        }
        best = self._progress.best
        for name, better in _directions(trainer, scores).items():
            if name not in best or better(best[name][0], scores[name]) != best[name][0]:
                best[name] = scores[name], trainer.global_step
        spent = time.monotonic() - self._validation_began
        self._progress.validating += spent
        self._began += spent
        self._validation_began = None

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        self._progress.seconds += self._running_seconds()
        self._began = None

    # Reporting ---------------------------------------------------------------------------------------------------

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put together what all processes have measured."""
        device, progress = trainer.strategy.root_device, self._progress
        place = str(device) if device.type == "cuda" else "process"
        losses = progress.losses.ends()
        own = [(trainer.global_rank, place, peak_memory(device), self._samples, losses)]
        rows = gather(own) if trainer.world_size > 1 else own
        folder = trainer.log_dir  # asks the first process
        for _, _, peak, samples, _ in rows:
            progress.peak_memory = max(progress.peak_memory, peak)
            progress.samples = _added(progress.samples, samples)
        self._samples = 0
        ends = [row[4] for row in rows if row[4] is not None]
        config = _adapter_config(pl_module)
        batches = trainer.num_training_batches
        self._module = pl_module
        self.facts = RunFacts(
            module=type(pl_module).__name__,
            base=_base_name(pl_module),
            adapters=summarize_adapters(pl_module),
            config=config,
            steps=trainer.global_step,
            epochs=(trainer.fit_loop.total_batch_idx + 1) / batches if 0 < batches < float("inf") else None,
            progress=progress,
            losses=(sum(e[0] for e in ends) / len(ends), sum(e[1] for e in ends) / len(ends)) if ends else None,
            memory={f"{where} {rank}" if place == "process" else where: peak for rank, where, peak, *_ in rows},
            on_gpu=device.type == "cuda",
            folder=Path(folder) if trainer.loggers and folder else None,
        )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Report: here, since every callback has done what it does at the end of a fit."""
        if stage == "fit" and self.facts is not None and not self.waits:
            self.report(trainer)

    def report(self, trainer: Trainer, after: Mapping[str, float] | None = None) -> None:
        """Print the table and write the files; does nothing but in the first process.

        Args:
            trainer: that of the finished fit.
            after: scores of what was trained; by default those that the fit has left.

        Raises:
            RuntimeError: no fit has finished.
        """
        if self.facts is None or self._module is None:
            raise RuntimeError("there is no finished fit to report of")
        if not trainer.is_global_zero:
            return
        facts, folder = self.facts, self.facts.folder
        before = read_result(folder, BEFORE_FILE) if folder else None
        files = run_files(trainer, folder, self._module)
        after = after if after is not None else _floats(trainer.callback_metrics)
        ending = Ending(before or {}, dict(after), files, self._commands(trainer, files))
        page = Path(self.dirpath) if self.dirpath else folder
        if page is not None:
            self._write(trainer, page, ending)
        Console().print(terminal_report(facts, ending), soft_wrap=False)
        for label, text in ending.lines().items():
            say(f"{label}: {text}")

    def _write(self, trainer: Trainer, folder: Path, ending: Ending) -> None:
        assert self.facts is not None
        path = folder / SUMMARY_FILE
        if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(TITLE):
            rank_zero_warn(f"{path} is no run summary and is left as it is; give RunSummary a dirpath of its own")
            return
        folder.mkdir(parents=True, exist_ok=True)
        figures = self._draw(trainer, self.facts.folder or folder, folder) if self.plots and can_plot() else []
        write_text_atomically(path, markdown_report(self.facts, ending, figures, self.plots and not can_plot()))
        ending.files["Summary"] = str(path)

    def _draw(self, trainer: Trainer, run: Path, folder: Path) -> list[Path]:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        for logger in loggers:
            logger.save()  # which it does every so many steps, and when all is over
        drawn = draw_run(run, folder, [Path(logger.log_dir) for logger in loggers])
        pattern = run / PATTERN_FILE  # of WeightDecomposition
        if pattern.is_file() and (records := read_records(pattern)):
            drawn.append(plot_pattern(records, folder / f"{pattern.stem}.png"))
        return drawn

    def _commands(self, trainer: Trainer, files: Mapping[str, str]) -> dict[str, str]:
        """What to type next, where the ``dora-lightning`` command can do it."""
        module, facts = self._module, self.facts
        assert module is not None
        assert facts is not None
        checkpoint, merged = files.get(_checkpoint_label(module)), files.get("Merged model")
        commands = {}
        judged = is_overridden("test_step", module) and getattr(module, "task", self) is not None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by a connector
        has_tests = data is not None and is_overridden("test_dataloader", data)
        config = facts.folder / "config.yaml" if facts.folder else None
        if checkpoint and judged and has_tests and config and config.is_file():
            commands["Test it"] = ["test", "--config", str(config), "--ckpt_path", checkpoint]
        # the base's own files are what it is merged into
        if checkpoint and facts.base and facts.config and not merged:
            folder = facts.folder or Path(checkpoint).parent
            commands["Merge it"] = ["merge", checkpoint, str(folder / "merged")]
        if facts.base and callable(getattr(module, "generate", None)) and (merged or checkpoint):
            commands["Talk to it"] = ["generate", str(merged or checkpoint)]
            if self._shown:
                commands["Talk to it"] += [self._shown, "FILE"]
        return {label: shlex.join(["dora-lightning", *words]) for label, words in commands.items()}

    def _running_seconds(self) -> float:
        """Since the clock was started; while validation runs, up to its start."""
        if self._began is None:
            return 0.0
        return (self._validation_began or time.monotonic()) - self._began


def run_files(trainer: Trainer, folder: Path | None, pl_module: LightningModule) -> dict[str, str]:
    """Where a run has left what; to be called in the first process."""
    found = {"Run folder": str(folder)} if folder else {}
    saving: list[Any] = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    last = next((c.last_model_path or c.best_model_path for c in saving if c.last_model_path or c.best_model_path), "")
    if last:
        found[_checkpoint_label(pl_module)] = last
    for callback in saving:
        if callback.monitor is not None and callback.best_model_path not in ("", last):
            found[f"Best by {callback.monitor}"] = callback.best_model_path
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    for callback in callbacks:
        if isinstance(callback, MergeOnSave):
            beside = [Path(path).with_name(f"{Path(path).stem}-merged") for path in found.values()]
            root = Path(callback.dirpath) if callback.dirpath else Path(folder or trainer.default_root_dir) / "merged"
            merged = [path for path in ([root] if callback.when == "fit_end" else beside) if path.is_dir()]
            found |= {"Merged model": str(merged[0])} if merged else {}
    return found


def _checkpoint_label(pl_module: LightningModule) -> str:
    return "Adapter checkpoint" if _adapter_config(pl_module) is not None else "Checkpoint"


def _adapter_config(pl_module: LightningModule) -> AdapterConfig | None:
    found: list[Any] = [module for module in pl_module.modules() if hasattr(module, "adapter_config")]
    return found[0].adapter_config if len(found) == 1 else None


def _base_name(pl_module: LightningModule) -> str | None:
    name = getattr(pl_module, "model_name_or_path", None)
    for module in pl_module.modules():
        name = name or getattr(getattr(module, "config", None), "name_or_path", None)
    if is_dataclass(name) or isinstance(name, Mapping):  # one that was put together from parts
        parts = name if isinstance(name, Mapping) else vars(name)
        return " + ".join(value for value in parts.values() if isinstance(value, str))
    return str(name) if name else None


def _directions(trainer: Trainer, scores: Mapping[str, float]) -> dict[str, Any]:
    """``min`` or ``max`` for each score of which it is known: losses, and what is monitored."""
    found: dict[str, Any] = {name: min for name in scores if name.endswith("loss")}
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    for callback in callbacks:
        if isinstance(callback, (ModelCheckpoint, EarlyStopping)) and (monitor := callback.monitor) in scores:
            found[str(monitor)] = max if callback.mode == "max" else min
    return found


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _added(total: int | None, more: int | None, times: int = 1) -> int | None:
    return None if total is None or more is None else total + times * more
