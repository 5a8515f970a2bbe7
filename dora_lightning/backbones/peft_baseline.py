"""Methods that are PEFT's and not ours, on the data, task, loss and generation of DoRALlama, to compare with.

Of the baselines in the DoRA paper's table 1 these are prefix tuning and (beside our own) LoRA. The series and parallel
bottleneck adapters are not here: PEFT has none, and the library ``adapters`` (1.3) asks for transformers 4.57.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dora_lightning.adapters import AdapterConfig
from dora_lightning.adapters.finite import check_finite
from dora_lightning.backbones.backbone import Backbone
from dora_lightning.backbones.causal_lm import (
    check_plain_logits,
    enable_recomputation,
    generate_texts,
    option_log_likelihoods,
    supervised_loss,
)
from dora_lightning.backbones.peft_methods import (
    ADAPTER,
    former_names,
    importances,
    losses_with_virtual_tokens,
    options_with_virtual_tokens,
    orthogonality_penalty,
    peft_config,
    peft_library,
    texts_with_virtual_tokens,
)
from dora_lightning.backbones.step_loss import LossMean
from dora_lightning.files import write_folder
from dora_lightning.pretrained import checked_dtype, load_causal_lm, load_tokenizer
from dora_lightning.task import Task
from dora_lightning.training.adapter_checkpoint import KEY, add_frozen, check_adapter_entry, write_adapter_entry
from dora_lightning.training.adapter_run import AdapterRun, check_precision
from dora_lightning.training.random_state import gather_random_states

PEFT_KEY = "dora_lightning_peft"
"""Entry of a checkpoint that says which of PEFT's methods it is of; it has no entry of our own adapters."""


class PeftLlama(Backbone):
    """A causal language model of the LLaMA family, trained by a method of PEFT (the extra ``baselines``).

    Batches, losses, generation and judging are those of :class:`~dora_lightning.backbones.DoRALlama`; the model is a
    ``PeftModelForCausalLM``. All that trains is fp32, and one optimiser group, ``other``.

    With virtual tokens (prefix tuning, prompt tuning, P-tuning) losses and rankings go through PEFT's own forward
    pass, and options are ranked by reading each one with its whole prompt. Texts go on from the keys and values that
    PEFT makes of the virtual tokens. Packed rows are refused.

    AdaLoRA's ranks are allocated after each optimiser step, counted from 0 as in PEFT's examples. While training its
    loss has the orthogonality penalty, as PEFT's own has; held-out losses are the cross-entropy alone.

    Args:
        model_name_or_path: folder, hub id, GGUF file or ``package:NAME`` of any LLaMA-family ``AutoModelForCausalLM``.
        peft: ``peft_type`` (one of ``TYPES`` in :mod:`~dora_lightning.backbones.peft_methods`) and options of that
            method's config in PEFT, such as ``{peft_type: PREFIX_TUNING, num_virtual_tokens: 30}``. AdaLoRA's
            ``total_step`` is the length of the run where it is not given.
        optimizer: makes the optimiser.
        lr_scheduler: makes the scheduler, stepped after every optimiser step.
        task: how answers are obtained and judged; training needs none.
        judge_in_validation: judge the task in validation too, beside the loss.
        dtype: dtype of the frozen base: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: attention (``sdpa``, ``flash_attention_2``, ``eager``); null for the default.
        gradient_checkpointing: recompute each block in the backward pass; prefix tuning, which trains a key-value
            cache, refuses it.
        loss_mean: what the loss of an optimizer step is the mean over, see :class:`~dora_lightning.backbones.Backbone`.
        on_nonfinite: before an optimizer step whose loss or gradient is NaN or infinite, ``raise`` stops the run and
            names the batch, ``skip`` leaves the step out and warns, ``ignore`` does not look.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: an unknown method or option, or a value that PEFT refuses.
    """

    def __init__(
        self,
        model_name_or_path: str,
        peft: dict[str, Any],
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        task: Task | None = None,
        judge_in_validation: bool = False,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        loss_mean: LossMean = "tokens",
        on_nonfinite: str = "raise",
    ) -> None:
        # no adapter of ours: what the base class notes of one is taken away again
        super().__init__(
            model_name_or_path,
            AdapterConfig(),
            optimizer,
            lr_scheduler,
            task,
            judge_in_validation,
            loss_mean,
            on_nonfinite,
        )
        del self.adapter
        self.hparams.pop("adapter")
        self.peft = dict(peft)
        config = peft_config(self.peft, model_name_or_path)
        self.virtual_tokens = bool(config.is_prompt_learning)
        if gradient_checkpointing and self.peft["peft_type"] == "PREFIX_TUNING":
            raise ValueError(
                "PREFIX_TUNING trains a key-value cache, which goes with gradient_checkpointing: false alone"
            )
        self.base_dtype = checked_dtype(dtype)
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self._run = _PeftRun()
        self.save_hyperparameters({"peft": self.peft, "dtype": dtype, "attn_implementation": attn_implementation})

    # Model -------------------------------------------------------------------------------------------------------

    def load_pretrained(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The causal language model and its tokenizer."""
        model = load_causal_lm(self.model_name_or_path, self.base_dtype, self.attn_implementation)
        check_plain_logits(model)
        return model, load_tokenizer(self.model_name_or_path)

    def configure_model(self) -> None:
        """Load the pretrained model and let PEFT adapt it; does nothing the second time."""
        if self.model is not None:
            return
        self._check_trainer()
        base, self.tokenizer = self.load_pretrained()
        base.requires_grad_(False)
        self._run.remember_base(base, self.model_name_or_path)  # before PEFT renames its weights
        config = peft_config(self.peft, self.model_name_or_path)
        with former_names():
            model = peft_library().get_peft_model(base, config)
        if self.gradient_checkpointing:
            enable_recomputation(base)
        model.train()
        self.model = model
        self._untrained_versions = self._versions()

    def _check_trainer(self) -> None:
        check_precision(self._trainer)
        if self._trainer is None:
            return
        if self.trainer.precision not in ("32-true", "64-true", "bf16-mixed", "16-mixed"):
            raise ValueError(
                f"precision {self.trainer.precision} would round what trains; set trainer.precision to 32-true and "
                "the dtype of the base to bfloat16 (model.init_args.dtype)"
            )
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        for callback in callbacks:
            # a backbone does not import callbacks
            if (name := type(callback).__name__) in ("MergeOnSave", "DoRA", "MagnitudeOnly", "ShardedTraining"):
                raise ValueError(
                    f"the callback {name} works on the adapters of dora-lightning, and PeftLlama has PEFT's "
                    f"({self.peft['peft_type']}); take it out of trainer.callbacks. save_peft(folder) writes an "
                    "adapter that PEFT reads, and merges where its method can be merged"
                )

    def _base(self) -> PreTrainedModel:
        """The language model that PEFT's layers are in."""
        return cast(Any, self.language_model).get_base_model()

    # Losses and answers ------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Mean cross-entropy over supervised tokens (with AdaLoRA's penalty in training), and how many they are."""
        _check_no_images(batch.get("vision"))
        inputs = (batch["input_ids"], batch["attention_mask"], batch["labels"])
        if self.virtual_tokens:
            if batch.get("position_ids") is not None:
                raise ValueError(
                    f"{self.peft['peft_type']} takes no packed rows; set data.init_args.packing_len to null"
                )
            losses, _ = losses_with_virtual_tokens(self.language_model, *inputs)
            return losses.sum() / max(1, len(losses)), len(losses)
        loss, count = supervised_loss(self._base(), *inputs, position_ids=batch.get("position_ids"))
        if self.training and self.peft["peft_type"] == "ADALORA":
            loss = loss + orthogonality_penalty(cast(Any, self.language_model))
        return loss, count

    def held_out_metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """Perplexity of the supervised tokens, ``exp(loss)``."""
        return {"perplexity": loss.exp()}

    def generate(self, prompts: Sequence[str], vision: Mapping[str, Tensor] | None = None, **options: Any) -> list[str]:
        """Continuation of each prompt; ``options`` as in ``generate`` of transformers.

        Raises:
            ValueError: there are images, which a language model cannot read.
        """
        _check_no_images(vision)
        if not self.virtual_tokens:
            return generate_texts(self._base(), self.tokenizer, prompts, **options)
        return texts_with_virtual_tokens(self.language_model, self.tokenizer, prompts, **options)

    def rank(
        self, prompts: Sequence[str], options: Sequence[Sequence[str]], vision: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        """Log-likelihood ``[options]`` of each prompt's options; images are refused as in :meth:`generate`."""
        _check_no_images(vision)
        if not self.virtual_tokens:
            return option_log_likelihoods(self._base(), self.tokenizer, prompts, options)
        return options_with_virtual_tokens(self.language_model, self.tokenizer, prompts, options)

    # AdaLoRA's ranks ---------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """As ever; and say which method it is."""
        super().on_fit_start()
        rank_zero_info("PEFT: " + ", ".join(f"{name} {value}" for name, value in self.peft.items()))

    def on_train_start(self) -> None:
        """As ever; and tell AdaLoRA the length of the run."""
        super().on_train_start()
        if self.peft["peft_type"] != "ADALORA":
            return
        tuner = cast(Any, self.language_model).base_model
        config = tuner.peft_config[ADAPTER]
        if "total_step" not in self.peft:
            # not in configure_model: counting the batches makes the loader before the position in it is restored
            config.total_step = int(self.trainer.estimated_stepping_batches)
        if config.tinit >= config.total_step - config.tfinal:
            raise ValueError(
                f"AdaLoRA has no step to allocate ranks in: tinit {config.tinit} and tfinal {config.tfinal} of "
                f"{config.total_step} steps; make them smaller, so that tinit + tfinal < the steps of the run"
            )
        parameters = dict(tuner.model.named_parameters())
        for scores in importances(tuner.rankallocator):
            for name, score in scores.items():
                scores[name] = score.to(parameters[name].device)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step; then let AdaLoRA allocate its ranks while the gradients are there."""
        skipped = self._steps.skipped
        super().optimizer_step(*args, **kwargs)
        if self.peft["peft_type"] == "ADALORA" and self._steps.skipped == skipped:
            # not counted yet: the first step is number 0
            cast(Any, self.language_model).base_model.update_and_allocate(self.trainer.global_step)

    # Files -------------------------------------------------------------------------------------------------------

    def save_peft(self, folder: str | Path) -> None:
        """Write the adapter as PEFT does: ``PeftModel.from_pretrained(base, folder)`` reads it.

        Raises:
            FileExistsError: the folder exists.
            NonFiniteError: what was trained holds NaN or infinity.
        """
        folder = Path(folder)
        if folder.exists():
            raise FileExistsError(f"{folder} exists; give the folder of a new adapter")
        model = cast(Any, self.language_model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        check_finite(trained, f"{folder} is not written")
        config = model.peft_config[ADAPTER]
        pattern = getattr(config, "rank_pattern", None)  # PEFT renames its keys in the live config
        try:
            with warnings.catch_warnings():
                # AdaLoRA may leave a matrix no rank at all, which PEFT warns of, and reads
                warnings.filterwarnings("ignore", "Adapter 'default': .* LoRA tensor")
                # the base's embeddings do not train
                write_folder(folder, lambda made: model.save_pretrained(made, save_embedding_layers=False))
        finally:
            if pattern is not None:
                config.rank_pattern = pattern


class _PeftRun(AdapterRun):
    """A run whose checkpoints are of one of PEFT's methods."""

    def on_save_checkpoint(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what trains, the method's options, AdaLoRA's ranks, and say what base it belongs to."""
        module = cast(PeftLlama, pl_module)
        write_adapter_entry(checkpoint, module, AdapterConfig(), self._base, "model.")
        entry = checkpoint.pop(KEY)
        del entry["adapter"]  # it has none of ours, and merging must not take it for one
        entry |= {"peft": module.peft, "optimizer_options": self._configured, "random_states": gather_random_states()}
        if module.peft["peft_type"] == "ADALORA":
            tuner = cast(Any, module.language_model).base_model
            entry["adalora"] = {
                "rank_pattern": tuner.peft_config[ADAPTER].rank_pattern,
                "importances": [dict(scores) for scores in importances(tuner.rankallocator)],
            }
        checkpoint[PEFT_KEY] = entry

    def on_load_checkpoint(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base or method."""
        module = cast(PeftLlama, pl_module)
        entry = checkpoint.get(PEFT_KEY)
        if entry is None:
            raise ValueError(f"the checkpoint is not one of PeftLlama: it has no entry {PEFT_KEY!r}")
        saved = entry["peft"]
        if saved != module.peft:
            names = sorted(k for k in saved.keys() | module.peft if saved.get(k) != module.peft.get(k))
            differing = ", ".join(f"{k}={saved.get(k)!r} (here {module.peft.get(k)!r})" for k in names)
            raise ValueError(f"the checkpoint was made with other options of PEFT: {differing}")
        # base, names and shapes are checked as of our own adapters, whose config is the same on both sides
        check_adapter_entry({**checkpoint, KEY: {**entry, "adapter": {}}}, module, AdapterConfig(), self._base)
        if "averaging_state" in checkpoint:
            add_frozen(checkpoint, module)
        if "adalora" in entry:
            tuner = cast(Any, module.language_model).base_model
            tuner.peft_config[ADAPTER].rank_pattern = entry["adalora"]["rank_pattern"]
            for scores, kept in zip(importances(tuner.rankallocator), entry["adalora"]["importances"], strict=True):
                scores.update(kept)
        trainer = module._trainer
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            self._restored = entry["optimizer_options"]
            self._random_states = entry["random_states"]


def _check_no_images(vision: Mapping[str, Tensor] | None) -> None:
    if vision:
        raise ValueError("PeftLlama reads text alone, and the batch has images")
