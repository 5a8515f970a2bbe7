"""DoRA on VL-BART: images or videos beside text, answers and captions out of BART's decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dora_lightning.adapters import AdapterConfig, inject_adapters
from dora_lightning.adapters.inject import within
from dora_lightning.backbones.backbone import Backbone
from dora_lightning.backbones.causal_lm import enable_recomputation
from dora_lightning.backbones.seq2seq import encode_prompts, generate_targets, target_log_likelihoods, target_loss
from dora_lightning.backbones.step_loss import LossMean
from dora_lightning.pretrained import checked_dtype
from dora_lightning.task import Task
from dora_lightning.training.adapter_checkpoint import KEY
from dora_lightning.vl_bart import VLBart, VLBartParts, load_vl_bart, load_vl_bart_tokenizer, resolve_vl_bart

ALSO_TRAINED = ("visual_embedding", "biases", "layer_norms", "embeddings", "vision_tower")
"""What can train in full beside the adapters."""


class DoRAVLBart(Backbone):
    """VL-BART with adapters; by default as DoRA's image run trains it.

    Batches are dicts of ``input_ids``, ``attention_mask`` ``[batch, tokens]``, ``labels`` ``[batch, target tokens]``,
    ``samples``, ``vision`` (see :meth:`dora_lightning.vl_bart.VLBart.encode`) where there is something to look at, and
    ``row_weights`` ``[batch]`` where the loss is a mean over rows.

    Args:
        model_name_or_path: folder or hub id of a VL-BART or of a BART (``facebook/bart-base``), or the parts to put one
            together from.
        adapter: what to adapt, and how; query and value projections of all attentions at rank 128 unless given.
        optimizer: makes the optimiser from the parameter groups ``magnitude``, ``lora_A``, ``lora_B``, ``other``.
        lr_scheduler: makes the scheduler, stepped after every optimiser step.
        task: how answers are obtained and judged; training needs none.
        judge_in_validation: judge the task in validation too, beside the loss.
        also_trained: what trains in full, of ``visual_embedding``, ``biases`` (every bias of BART), ``layer_norms``
            (BART's), ``embeddings`` (of tokens and positions) and ``vision_tower``. The published image run has the
            first three, the video run the first two.
        dtype: dtype of the frozen base: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: attention (``sdpa``, ``flash_attention_2``, ``eager``); null for the default.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        loss_mean: what the loss of an optimizer step is the mean over, see :class:`~dora_lightning.backbones.Backbone`.
        on_nonfinite: before an optimizer step whose loss or gradient is NaN or infinite, ``raise`` stops the run and
            names the batch, ``skip`` leaves the step out and warns, ``ignore`` does not look.

    Raises:
        ValueError: an unknown part in ``also_trained``, or a tower that is to train and is not there.
    """

    def __init__(
        self,
        model_name_or_path: str | VLBartParts,
        adapter: AdapterConfig | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        task: Task | None = None,
        judge_in_validation: bool = False,
        also_trained: Sequence[str] = ("visual_embedding", "biases", "layer_norms"),
        dtype: str = "auto",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        loss_mean: LossMean = "tokens",
        on_nonfinite: str = "raise",
    ) -> None:
        # a checkpoint holds parts as a plain dict, which load_from_checkpoint hands back
        self.parts = VLBartParts(**model_name_or_path) if isinstance(model_name_or_path, dict) else model_name_or_path
        plain = self.parts if isinstance(self.parts, str) else self.parts.to_dict()
        if unknown := [part for part in also_trained if part not in ALSO_TRAINED]:
            raise ValueError(f"also_trained: unknown part {unknown[0]!r}; there are {', '.join(ALSO_TRAINED)}")
        adapter = (
            AdapterConfig(rank=128, alpha=128.0, target_modules=["q_proj", "v_proj"]) if adapter is None else adapter
        )
        super().__init__(
            str(self.parts), adapter, optimizer, lr_scheduler, task, judge_in_validation, loss_mean, on_nonfinite
        )
        self.also_trained = tuple(also_trained)
        self.base_dtype = checked_dtype(dtype)
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.save_hyperparameters(
            {
                "model_name_or_path": plain,
                "also_trained": list(also_trained),
                "dtype": dtype,
                "attn_implementation": attn_implementation,
            }
        )

    def load_pretrained(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, put together if it is not there, and its tokenizer."""
        self.model_name_or_path = resolve_vl_bart(self.parts)
        model = load_vl_bart(self.model_name_or_path, self.base_dtype, self.attn_implementation)
        if self.gradient_checkpointing:
            enable_recomputation(model)
        return model, load_vl_bart_tokenizer(self.model_name_or_path)

    def inject(self, model: PreTrainedModel) -> None:
        """Adapters in BART's encoder and decoder; what is to train in full beside them does.

        Raises:
            ValueError: there is no tower to train, or what trains in fp32 does not go with the base's dtype.
        """
        assert isinstance(model, VLBart)
        mixed = {"biases", "layer_norms", "embeddings"} & set(self.also_trained)
        if mixed and model.dtype != torch.float32 and not self._autocasts():
            raise ValueError(
                f"also_trained: {min(mixed)} train in fp32, which a base in {str(model.dtype).removeprefix('torch.')} "
                "takes under autocast alone: set trainer.precision to bf16-mixed, or dtype to float32"
            )
        inject_adapters(model, within(model, self.adapter, ["model"]))
        for part in self.also_trained:
            for parameter in _parameters_of(model, part):
                parameter.requires_grad_(True)
                parameter.data = parameter.data.float()
        if model.vision_tower is not None and "vision_tower" in self.also_trained:
            model.vision_tower.float()  # batch norms' statistics too, which must be of their weights' dtype

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what trains beside the adapters too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEY]["also_trained"] = list(self.also_trained)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base or adapter, or one in which other parts train.

        Raises:
            ValueError: it is such a checkpoint.
        """
        # not from the hyperparameters, which load_from_checkpoint has replaced by those it was called with
        saved = checkpoint.get(KEY, {}).get("also_trained", self.also_trained)
        if set(saved) != set(self.also_trained):
            raise ValueError(
                f"in the checkpoint also_trained is {', '.join(saved) or 'empty'}, and here "
                f"{', '.join(self.also_trained) or 'empty'}; what trains must be the same"
            )
        super().on_load_checkpoint(checkpoint)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Cross-entropy of the targets, and what it is the mean over; see :func:`~..seq2seq.target_loss`."""
        hidden, mask = self._encoded(batch)
        return target_loss(self._vl_bart, hidden, mask, batch["labels"], batch.get("row_weights"))

    def answers(self, batch: dict[str, Any], **options: Any) -> list[str]:
        """Text generated for each sample, from the very tokens of the batch."""
        return generate_targets(self._vl_bart, self.tokenizer, *self._encoded(batch), **options)

    def rankings(self, batch: dict[str, Any]) -> list[Tensor]:
        """Log-likelihood ``[options]`` of each sample's options, likewise."""
        options = [sample.options for sample in batch["samples"]]
        return target_log_likelihoods(self._vl_bart, self.tokenizer, *self._encoded(batch), options)

    def generate(self, prompts: Sequence[str], vision: Mapping[str, Tensor] | None = None, **options: Any) -> list[str]:
        """Text for each prompt; ``options`` as in ``generate`` of transformers.

        Args:
            prompts: what the encoder reads.
            vision: see :meth:`dora_lightning.vl_bart.VLBart.encode`.
            options: ``max_new_tokens``, ``num_beams``, ...
        """
        return generate_targets(self._vl_bart, self.tokenizer, *self._encoded_prompts(prompts, vision), **options)

    def rank(
        self, prompts: Sequence[str], options: Sequence[Sequence[str]], vision: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        """Log-likelihood ``[options]`` of each prompt's options as answers."""
        encoded = self._encoded_prompts(prompts, vision)
        return target_log_likelihoods(self._vl_bart, self.tokenizer, *encoded, options)

    @torch.no_grad()
    def _encoded_prompts(self, prompts: Sequence[str], vision: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        return encode_prompts(self._vl_bart, self.tokenizer, prompts, vision)

    def _encoded(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return self._vl_bart.encode(batch["input_ids"], batch["attention_mask"], **batch.get("vision", {}))

    def _autocasts(self) -> bool:
        # without a trainer, whoever runs the model has to see to it
        return self._trainer is None or "mixed" in str(self._trainer.precision)

    @property
    def _vl_bart(self) -> VLBart:
        model = self.language_model
        assert isinstance(model, VLBart)
        return model


def _parameters_of(model: VLBart, part: str) -> list[nn.Parameter]:
    """The parameters that a part of :data:`ALSO_TRAINED` stands for."""
    if part == "visual_embedding":
        return list(model.visual_embedding.parameters())
    if part == "vision_tower":
        if model.vision_tower is None:
            raise ValueError("also_trained: this model has no vision tower to train; remove 'vision_tower'")
        return list(model.vision_tower.parameters())
    if part == "embeddings":
        bart = model.model
        tables = (bart.shared, bart.encoder.embed_positions, bart.decoder.embed_positions)
        return [parameter for table in tables for parameter in table.parameters()]
    named = list(model.model.named_parameters())
    if part == "biases":
        return [parameter for name, parameter in named if name.endswith("bias")]
    norms = {id(p) for module in model.model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    return [parameter for _, parameter in named if id(parameter) in norms]
