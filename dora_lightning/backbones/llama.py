"""DoRA on causal language models of the LLaMA family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dora_lightning.adapters import AdapterConfig
from dora_lightning.backbones.backbone import Backbone
from dora_lightning.backbones.causal_lm import (
    check_plain_logits,
    enable_recomputation,
    generate_texts,
    option_log_likelihoods,
    supervised_loss,
)
from dora_lightning.backbones.kept_outputs import reuse_outputs
from dora_lightning.backbones.step_loss import LossMean
from dora_lightning.pretrained import checked_dtype, load_causal_lm, load_tokenizer
from dora_lightning.task import Task


class DoRALlama(Backbone):
    """A causal language model of the LLaMA family with adapters.

    Batches are dicts with ``input_ids``, ``attention_mask``, ``labels`` ``[batch, tokens]`` and ``samples``, the
    list of :class:`dora_lightning.data.Sample` they were made from. Packed rows, each of several samples, come with
    ``position_ids`` that begin at 0 with each sample; they never attend to one another.

    Args:
        model_name_or_path: folder, hub id, GGUF file or ``package:NAME`` of any LLaMA-family ``AutoModelForCausalLM``.
        adapter: what to adapt, and how.
        optimizer: makes the optimiser from the parameter groups ``magnitude``, ``lora_A``, ``lora_B``, ``other``.
        lr_scheduler: makes the scheduler, stepped after every optimiser step.
        task: how answers are obtained and judged; training needs none.
        judge_in_validation: judge the task in validation too, beside the loss.
        dtype: dtype of the frozen base: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: attention (``sdpa``, ``flash_attention_2``, ``eager``); null for the default.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        meta_device: build the model without weights and let the callback ``ShardedTraining`` read them from the
            folder's safetensors straight into each process's shards, so that no process ever holds the whole base.
        quantization: quantise the linear layers of the base while it is loaded (QDoRA): ``nf4``, ``nf4-dq`` (the scales
            too, as QLoRA does), ``fp4``, ``fp4-dq``, ``int8``, ``torchao-int8`` or ``torchao-int4``; null for not.
        loss_mean: what the loss of an optimizer step is the mean over, see :class:`~dora_lightning.backbones.Backbone`.
        on_nonfinite: before an optimizer step whose loss or gradient is NaN or infinite, ``raise`` stops the run and
            names the batch, ``skip`` leaves the step out and warns, ``ignore`` does not look.
    """

    def __init__(
        self,
        model_name_or_path: str,
        adapter: AdapterConfig,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        task: Task | None = None,
        judge_in_validation: bool = False,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        meta_device: bool = False,
        quantization: str | None = None,
        loss_mean: LossMean = "tokens",
        on_nonfinite: str = "raise",
    ) -> None:
        super().__init__(
            model_name_or_path, adapter, optimizer, lr_scheduler, task, judge_in_validation, loss_mean, on_nonfinite
        )
        self.base_dtype = checked_dtype(dtype)
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        # not a hyperparameter: what loads a checkpoint later wants the weights
        self.meta_device = meta_device
        self.quantization = quantization
        self.save_hyperparameters(
            {"dtype": dtype, "attn_implementation": attn_implementation, "quantization": quantization}
        )

    def load_pretrained(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The causal language model and its tokenizer."""
        model = load_causal_lm(
            self.model_name_or_path, self.base_dtype, self.attn_implementation, self.meta_device, self.quantization
        )
        check_plain_logits(model)
        if self.gradient_checkpointing:
            enable_recomputation(model)
        return model, load_tokenizer(self.model_name_or_path)

    def inject(self, model: PreTrainedModel) -> None:
        """Put the adapters into the model, and freeze what does not train."""
        super().inject(model)
        reuse_outputs(model)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Mean cross-entropy over supervised tokens, and how many they are; images are refused."""
        _check_no_images(batch.get("vision"))
        return supervised_loss(
            self.language_model,
            batch["input_ids"],
            batch["attention_mask"],
            batch["labels"],
            position_ids=batch.get("position_ids"),
        )

    def held_out_metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """Perplexity of the supervised tokens, ``exp(loss)``."""
        return {"perplexity": loss.exp()}

    def generate(self, prompts: Sequence[str], vision: Mapping[str, Tensor] | None = None, **options: Any) -> list[str]:
        """Continuation of each prompt; ``options`` as in ``generate`` of transformers.

        Raises:
            ValueError: there are images, which a language model cannot read.
        """
        _check_no_images(vision)
        return generate_texts(self.language_model, self.tokenizer, prompts, **options)

    def rank(
        self, prompts: Sequence[str], options: Sequence[Sequence[str]], vision: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        """Log-likelihood ``[options]`` of each prompt's options; images are refused as in :meth:`generate`."""
        _check_no_images(vision)
        return option_log_likelihoods(self.language_model, self.tokenizer, prompts, options)


def _check_no_images(vision: Mapping[str, Tensor] | None) -> None:
    if vision:
        raise ValueError("DoRALlama reads text alone, and the batch has images; use DoRALlava")
