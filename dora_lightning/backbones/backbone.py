"""What every backbone does: own the adapted model, its optimiser, its checkpoints, and the loops that judge it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from rich.panel import Panel
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dora_lightning.adapters import AdapterConfig, inject_adapters
from dora_lightning.adapters.finite import NonFiniteError
from dora_lightning.backbones.step_loss import LossMean, StepLoss
from dora_lightning.data import Sample
from dora_lightning.files import json_lines, write_bytes_atomically
from dora_lightning.gathering import gather
from dora_lightning.task import Task
from dora_lightning.training.adapter_checkpoint import frozen_names
from dora_lightning.training.adapter_run import AdapterRun, check_precision
from dora_lightning.training.atomic_checkpoint import write_checkpoints_atomically
from dora_lightning.training.finite_steps import FiniteSteps, cause_in_weights, described_batch
from dora_lightning.training.parameter_groups import parameter_groups
from dora_lightning.training.schedules import WarmupDecay

NOT_TRAINED = "the pretrained model with an untrained adapter"


class Backbone(LightningModule):
    """Base class of the backbones; a subclass loads the model, computes the loss, and answers prompts.

    Args:
        model_name_or_path: folder, hub id, GGUF file or ``package:NAME`` of the pretrained model.
        adapter: what to adapt, and how.
        optimizer: makes the optimiser from the parameter groups ``magnitude``, ``lora_A``, ``lora_B``, ``other``.
        lr_scheduler: makes the scheduler, stepped after every optimiser step (with the validation metric after each
            validation if it is ``ReduceLROnPlateau``).
        task: how answers are obtained and judged; training needs none.
        judge_in_validation: judge the task in validation too, beside the loss.
        loss_mean: what the loss of an optimizer step is the mean over: all supervised ``tokens`` of the step (pairs, or
            rows, where the loss is a mean over these), on any number of micro-batches and processes, if the training
            batches know their step, as those of our data modules do; or ``batches``, the mean of the means of its
            batches, as in most published runs.
        on_nonfinite: what happens before an optimizer step whose loss or gradient is NaN or infinite: ``raise`` stops
            the run and names the batch, ``skip`` leaves the step out and warns, ``ignore`` does not look. Checkpoints
            of weights that are not finite, and scores that are NaN, are refused in any case.
    """

    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        model_name_or_path: str,
        adapter: AdapterConfig,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        task: Task | None = None,
        judge_in_validation: bool = False,
        loss_mean: LossMean = "tokens",
        on_nonfinite: str = "raise",
    ) -> None:
        super().__init__()
        if judge_in_validation and task is None:
            raise ValueError("judge_in_validation needs a task")
        self.model_name_or_path = model_name_or_path
        # checkpoints hold the config as a plain dict, which load_from_checkpoint hands back
        self.adapter = AdapterConfig(**adapter) if isinstance(adapter, dict) else adapter
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.task = task
        self.judge_in_validation = judge_in_validation
        self.model = None
        self.validation_loss = MeanMetric(nan_strategy=math.nan)  # its default leaves NaN out of the mean
        self.reported_loss: Tensor | None = None
        """What is logged as ``train/loss`` of the last batch, on this process: the loss of the step that it ended; None
        within a step."""
        self._step_loss = StepLoss(loss_mean)
        # the base is not in the checkpoint; check_adapter_entry does what strict loading would
        self.strict_loading = False
        self._run = AdapterRun()
        self._steps = FiniteSteps(on_nonfinite)
        self._bad_validation = ""
        # whether training or a checkpoint has set what trains, or else its version numbers when it was made
        self._is_trained = False
        self._untrained_versions = -1
        self._predicted: list[dict[str, Any]] = []
        self.save_hyperparameters({"model_name_or_path": model_name_or_path, "adapter": self.adapter.to_dict()})

    # What a subclass provides ------------------------------------------------------------------------------------

    @abstractmethod
    def load_pretrained(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The pretrained model and its tokenizer."""

    @abstractmethod
    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Mean loss over supervised tokens of a batch (or over pairs, or rows), and how many they are."""

    @abstractmethod
    def generate(self, prompts: Sequence[str], vision: Mapping[str, Tensor] | None = None, **options: Any) -> list[str]:
        """Continuation of each prompt; ``vision`` is what an image processor made of their images."""

    @abstractmethod
    def rank(
        self, prompts: Sequence[str], options: Sequence[Sequence[str]], vision: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        """Log-likelihood ``[options]`` of each prompt's options."""

    def answers(self, batch: dict[str, Any], **options: Any) -> list[str]:
        """Text generated for each sample of a batch; ``options`` as in ``generate`` of transformers."""
        return self.generate([sample.prompt for sample in batch["samples"]], batch.get("vision"), **options)

    def rankings(self, batch: dict[str, Any]) -> list[Tensor]:
        """Log-likelihood ``[options]`` of the options of each sample of a batch."""
        samples: list[Sample] = batch["samples"]
        prompts = [sample.prompt for sample in samples]
        return self.rank(prompts, [sample.options for sample in samples], batch.get("vision"))

    def held_out_metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """What is logged of validation beside the mean ``loss``, by name."""
        return {}

    def inject(self, model: PreTrainedModel) -> None:
        """Put the adapters into the pretrained model, and freeze what does not train."""
        inject_adapters(model, self.adapter)

    # Model and optimiser -----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Have checkpoints written whole, and read with their checksums compared."""
        write_checkpoints_atomically(self.trainer.strategy)

    def configure_model(self) -> None:
        """Load the pretrained model and inject the adapters; does nothing the second time."""
        if self.model is not None:
            return
        check_precision(self._trainer)
        model, self.tokenizer = self.load_pretrained()
        self.inject(model)
        model.train()  # from_pretrained returns it in evaluation mode, and Lightning keeps what it finds
        self._run.remember_base(model, self.model_name_or_path)
        self._check_weights_will_come(model)
        self.model = model
        self._untrained_versions = self._versions()

    def _check_weights_will_come(self, model: PreTrainedModel) -> None:
        # a strategy would fail on them with an error of torch's, or fill them with random numbers
        if self._trainer is None or not any(parameter.is_meta for parameter in model.parameters()):
            return
        callbacks: list[Any] = self._trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        if not any(getattr(callback, "fills_meta_parameters", False) for callback in callbacks):
            raise ValueError(
                "the model was built without weights (meta_device: true) and nothing would load them: "
                "add the callback ShardedTraining, or set meta_device: false"
            )

    def configure_optimizers(self) -> Any:
        """Optimiser over named groups, and the scheduler if there is one."""
        optimizer = self.optimizer(parameter_groups(self))
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            config = {"scheduler": scheduler, "interval": "epoch", "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_fit_start(self) -> None:
        """Check that the optimiser has what trains, and print what that is."""
        self._run.on_fit_start(self.trainer, self)

    def on_train_start(self) -> None:
        """Let optimiser settings that changed since the checkpoint win, and tell the schedule the length of the run."""
        self._is_trained = True
        self._run.on_train_start(self.trainer)
        self._step_loss.start(self.trainer)
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, WarmupDecay):
                # not in configure_optimizers: counting the batches there makes the training loader before the position
                # in it is restored, and a resumed run would begin its epoch anew
                config.scheduler.set_total_steps(int(self.trainer.estimated_stepping_batches))

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Note which batch the next loss is of."""
        self._steps.on_train_batch_start(batch, batch_idx)

    def on_before_backward(self, loss: Tensor) -> None:
        """Note a loss."""
        self._steps.on_before_backward(loss)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Stop before a step whose loss or gradient is not finite."""
        self._steps.on_before_optimizer_step(self.trainer, self, optimizer)

    @property
    def language_model(self) -> PreTrainedModel:
        """The adapted model.

        Raises:
            RuntimeError: it is not loaded yet.
        """
        if self.model is None:
            raise RuntimeError("the model is not loaded yet: call configure_model(), or let a Trainer do it")
        return self.model

    @property
    def is_trained(self) -> bool:
        """Whether what trains was trained, loaded or changed since the model was made."""
        return self._is_trained or self._versions() != self._untrained_versions

    def _versions(self) -> int:
        # shards are new tensors, whose versions tell nothing
        trained = [p for p in self.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        return sum(parameter._version for parameter in trained) if trained else self._untrained_versions

    # Loops -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch as a term of its step's; ``train/loss`` is the loss of the whole step, of all processes."""
        mean, count = self.loss(batch)
        loss, self.reported_loss = self._step_loss.term(mean, count, batch.get("step"), self.trainer)
        if self.reported_loss is not None:
            size = len(batch["input_ids"])
            self.log("train/loss", self.reported_loss, prog_bar=True, sync_dist=True, batch_size=size)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start the metrics anew: here, since states reset inside `trainer.validate` are inference tensors."""
        self.validation_loss.reset()
        self._bad_validation = ""
        if self.task is not None:
            self.task.reset()

    def on_test_epoch_start(self) -> None:
        """Start the metrics anew."""
        assert self.task is not None
        self.task.reset()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Held-out loss, weighted by tokens, and the task if it is judged in validation."""
        loss, tokens = self.loss(batch)
        if tokens:
            self.validation_loss.update(loss, weight=tokens)
            if not self._bad_validation and not math.isfinite(float(loss)):
                self._bad_validation = f"the loss of {described_batch(batch, batch_idx)} is {float(loss)}"
        if self.judge_in_validation:
            self._judge(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the loss and the task's metrics.

        Raises:
            NonFiniteError: the loss, or a score that checkpoints are chosen by, is NaN or infinite.
            ValueError: nothing in the validation data is supervised.
        """
        loss = self.validation_loss.compute()
        self._check_validation(loss)
        self.log("val/loss", loss, prog_bar=True)
        metrics = {f"val/{name}": value for name, value in self.held_out_metrics(loss).items()}
        self.log_dict(metrics)
        if self.judge_in_validation:
            metrics |= self._finish_judging("val")
        for name in _monitored(self.trainer):
            if name in metrics and not math.isfinite(float(metrics[name])):
                raise NonFiniteError(
                    f"{name} is {float(metrics[name])}, and checkpoints are chosen by it; monitor another score, such "
                    "as val/loss"
                )

    def _check_validation(self, loss: Tensor) -> None:
        """To be called on every process, with the loss over all of them."""
        if math.isfinite(float(loss)):
            return
        found = [line for line in gather([self._bad_validation]) if line]
        if found:
            raise NonFiniteError(f"validation at step {self.trainer.global_step}: {found[0]}; {cause_in_weights(self)}")
        if not self.trainer.sanity_checking:
            raise ValueError(
                "the validation data has no supervised token, so that there is no val/loss: cutoff_len may have cut "
                "all answers off, or limit_val_batches left none; trainer.limit_val_batches: 0 validates nothing"
            )

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Judge the task on a batch."""
        self._judge(batch)

    def on_test_start(self) -> None:
        """Testing needs a task."""
        if self.task is None:
            raise ValueError("testing needs a task that judges the answers; give the backbone one (model.task)")

    def on_test_epoch_end(self) -> None:
        """Log the task's metrics, print their table and write the predictions."""
        self._finish_judging("test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Generated text of each sample, with its prompt."""
        samples: list[Sample] = batch["samples"]
        options = self.task.judge_of(samples).generation if self.task is not None else None
        texts = self.answers(batch, **(options or {"max_new_tokens": 64}))
        rows = [{"prompt": s.prompt, "source": s.source, "output": t} for s, t in zip(samples, texts, strict=True)]
        self._predicted += rows
        return rows

    def on_predict_epoch_end(self) -> None:
        """Write what was generated."""
        predicted, self._predicted = self._predicted, []
        self._write_records("predictions.jsonl", predicted)

    def _judge(self, batch: dict[str, Any]) -> None:
        assert self.task is not None
        samples: list[Sample] = batch["samples"]
        judge = self.task.judge_of(samples)
        texts = self.answers(batch, **judge.generation) if judge.generation is not None else None
        scores = self.rankings(batch) if judge.ranks_options else None
        for sample, values in zip(samples, scores or (), strict=scores is not None):
            # the largest of NaN would be the first option
            if not bool(values.isfinite().all()):
                raise NonFiniteError(
                    f"{sample.source or 'a sample'}: the log-likelihoods of the options of {sample.prompt[:60]!r} are "
                    f"{values.tolist()}, which is no ranking; {cause_in_weights(self)}"
                )
        self.task.update(samples, texts, scores)

    def _finish_judging(self, stage: str) -> dict[str, Tensor]:
        """Log, print and write what came out; returns what was logged."""
        assert self.task is not None
        metrics = self.task.compute()
        logged = {f"{stage}/{name}": value for name, value in metrics.items()}
        self.log_dict(logged)
        if self.trainer.sanity_checking:
            return logged
        # the answers first: nothing that is made of them is worth losing them
        folder, gathered = self._write_records(f"{stage}_predictions.jsonl", self.task.records())
        if stage != "test" or not self.trainer.is_global_zero:
            return logged
        table = self.task.table(metrics)
        Console().print(table if self.is_trained else Panel.fit(table, title=NOT_TRAINED))
        for name, content in (self.task.files(gathered) if folder is not None else {}).items():
            assert folder is not None
            write_bytes_atomically(folder / name, content)
            rank_zero_info(f"Written: {folder / name}")
        return logged

    def _write_records(self, name: str, records: list[dict[str, Any]]) -> tuple[Path | None, list[dict[str, Any]]]:
        """Write the records of all processes; to be called on every process.

        Returns:
            The run's folder, None where there is none, and the records.
        """
        log_dir = self.trainer.log_dir  # asks the first process
        folder = Path(log_dir) if log_dir is not None else None
        gathered = gather(records if self.is_trained else [{**record, "untrained_adapter": True} for record in records])
        if folder is not None and self.trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes_atomically(folder / name, json_lines(gathered))
            rank_zero_info(f"Predictions: {folder / name}")
        return folder, gathered

    # Checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains, and say what base it belongs to."""
        self._run.on_save_checkpoint(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base or adapter."""
        self.configure_model()
        self._run.on_load_checkpoint(self, checkpoint)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Like ``nn.Module.load_state_dict``, but frozen base weights are not reported as missing.

        Raises:
            RuntimeError: a shape differs; with ``strict``, also for missing trained tensors and unexpected names.
        """
        loaded = super().load_state_dict(state_dict, strict=False, assign=assign)
        self._is_trained = True
        frozen = frozen_names(self)
        loaded.missing_keys[:] = [name for name in loaded.missing_keys if name not in frozen]
        found = {"Missing": loaded.missing_keys, "Unexpected": loaded.unexpected_keys}
        if strict and (wrong := [f"{kind} key(s): {', '.join(keys)}" for kind, keys in found.items() if keys]):
            raise RuntimeError(f"Error(s) in loading state_dict for {type(self).__name__}: {'; '.join(wrong)}")
        return loaded


def _monitored(trainer: Trainer) -> list[str]:
    """What checkpoints are chosen by, and what stops a fit early."""
    callbacks: list[Any] = [*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks]
    names = (getattr(callback, "monitor", None) for callback in callbacks)
    return [name for name in names if name is not None]
