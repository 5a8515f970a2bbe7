"""DoRA on LLaVA-style models: a vision tower, a projector, and a language model that reads both."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dora_lightning.adapters import AdapterConfig, adapter_layers, inject_adapters
from dora_lightning.adapters.inject import within
from dora_lightning.backbones.backbone import Backbone
from dora_lightning.backbones.causal_lm import (
    check_plain_logits,
    enable_recomputation,
    generate_texts,
    option_log_likelihoods,
    supervised_loss,
)
from dora_lightning.backbones.feature_cache import FeatureCache
from dora_lightning.backbones.kept_outputs import reuse_outputs
from dora_lightning.backbones.step_loss import LossMean
from dora_lightning.backbones.vision_alignment import QuestionedImages, VisionAlignment, align_vision
from dora_lightning.images import IMAGE
from dora_lightning.llava_parts import LlavaParts, resolve_llava
from dora_lightning.pretrained import checked_dtype, load_vision_language_model
from dora_lightning.processing import image_token_counts, load_processor, vision_sizes
from dora_lightning.task import Task

Training = Literal["frozen", "full", "adapted"]

# what transformers calls the parts, by architecture
_TOWERS = ("vision_tower", "vision_model", "visual")
_PROJECTORS = ("multi_modal_projector", "connector")


class DoRALlava(Backbone):
    """A LLaVA-style model with adapters on its language model.

    Batches are those of :class:`~dora_lightning.backbones.DoRALlama`, and ``vision``, a dict of what the image
    processor made of the batch's images (``pixel_values``, ...), where it has any. The text holds an image token for
    every position that an image takes. Rows of several questions about one image come with ``turns``
    (:func:`~dora_lightning.backbones.causal_lm.supervised_loss`).

    What trains in full is kept in fp32, whatever the dtype of the base: in bf16, steps of 2e-5 would move nothing. Its
    learning rate is that of the group ``other``; the callback ``GroupLearningRates`` gives the projector and the tower
    rates of their own (``modules: {multi_modal_projector: {lr: 2.0e-5}}``).

    Args:
        model_name_or_path: folder or hub id of any model that ``AutoModelForImageTextToText`` loads and that takes
            images as LLaVA-1.5 and LLaVA-NeXT do; or the parts to put one together from.
        adapter: what to adapt, and how; modules outside of the language model only where a part is ``adapted``.
        optimizer: makes the optimiser from the parameter groups ``magnitude``, ``lora_A``, ``lora_B``, ``other``.
        lr_scheduler: makes the scheduler, stepped after every optimiser step.
        task: how answers are obtained and judged; training needs none.
        judge_in_validation: judge the task in validation too, beside the loss.
        vision_tower: ``frozen``, trained in ``full``, or ``adapted`` (the adapter's target modules reach into it).
        projector: likewise.
        feature_cache: folder where the features of a frozen tower are kept, so that each image goes through it once;
            null for none.
        vision_alignment: a first stage that trains the tower and the projector without the language model, for a tower
            that is new; null for none. It is left out when a run is resumed.
        dtype: dtype of what is frozen: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: attention (``sdpa``, ``flash_attention_2``, ``eager``); null for the default.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        quantization: quantise the language model, as in :class:`~dora_lightning.backbones.DoRALlama`.
        loss_mean: what the loss of an optimizer step is the mean over, see :class:`~dora_lightning.backbones.Backbone`.
        on_nonfinite: before an optimizer step whose loss or gradient is NaN or infinite, ``raise`` stops the run and
            names the batch, ``skip`` leaves the step out and warns, ``ignore`` does not look.
    """

    def __init__(
        self,
        model_name_or_path: str | LlavaParts,
        adapter: AdapterConfig,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        task: Task | None = None,
        judge_in_validation: bool = False,
        vision_tower: Training = "frozen",
        projector: Training = "full",
        feature_cache: str | None = None,
        vision_alignment: VisionAlignment | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        quantization: str | None = None,
        loss_mean: LossMean = "tokens",
        on_nonfinite: str = "raise",
    ) -> None:
        # a checkpoint holds parts as a plain dict, which load_from_checkpoint hands back
        self.parts = LlavaParts(**model_name_or_path) if isinstance(model_name_or_path, dict) else model_name_or_path
        name, plain = (self.parts,) * 2 if isinstance(self.parts, str) else (self.parts.language, self.parts.to_dict())
        super().__init__(name, adapter, optimizer, lr_scheduler, task, judge_in_validation, loss_mean, on_nonfinite)
        for part, training in (("vision_tower", vision_tower), ("projector", projector)):
            if training not in get_args(Training):
                raise ValueError(f"{part} must be one of {', '.join(get_args(Training))}, got {training!r}")
        if feature_cache is not None and vision_tower != "frozen":
            raise ValueError(f"feature_cache needs a frozen vision tower; this one is {vision_tower}")
        if vision_alignment is not None and projector != "full":
            raise ValueError(f"vision_alignment trains the projector in full; this one is {projector}")
        self.feature_cache = feature_cache
        self.vision_alignment = vision_alignment
        self.vision_tower_training = vision_tower
        self.projector_training = projector
        self.base_dtype = checked_dtype(dtype)
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.quantization = quantization
        self.processor: Any = None
        self.save_hyperparameters(
            {
                "model_name_or_path": plain,
                "vision_tower": vision_tower,
                "projector": projector,
                "dtype": dtype,
                "attn_implementation": attn_implementation,
                "quantization": quantization,
            }
        )

    def load_pretrained(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, and its processor's tokenizer."""
        self.model_name_or_path = resolve_llava(self.parts)
        model = load_vision_language_model(
            self.model_name_or_path, self.base_dtype, self.attn_implementation, self.quantization
        )
        check_plain_logits(model)
        if self.gradient_checkpointing:
            enable_recomputation(model)
        self.processor = load_processor(self.model_name_or_path)
        return model, self.processor.tokenizer

    def inject(self, model: PreTrainedModel) -> None:
        """Adapters in the language model, and in the parts that are to be adapted; parts that train in full do.

        Raises:
            ValueError: the model has no such part, or a part is to be adapted and no target is in it.
        """
        wanted = {"vision_tower": self.vision_tower_training, "projector": self.projector_training}
        parts = {"vision_tower": _part(model, _TOWERS), "projector": _part(model, _PROJECTORS)}
        adapted = [_name_of(model, model.get_decoder()), *(parts[p] for p in wanted if wanted[p] == "adapted")]
        inject_adapters(model, within(model, self.adapter, adapted))
        reuse_outputs(model)
        for part, training in wanted.items():
            module = model.get_submodule(parts[part])
            if training == "full":
                module.requires_grad_(True).float()
            elif training == "adapted" and not any(True for _ in adapter_layers(module)):
                kinds = sorted({n.rpartition(".")[2] for n, m in module.named_modules() if isinstance(m, nn.Linear)})
                raise ValueError(
                    f"{part}: adapted, but adapter.target_modules names nothing in it; its linear modules end in: "
                    f"{', '.join(kinds)}"
                )
        for name in parts.values():
            _cast_inputs(model.get_submodule(name))
        if self.feature_cache is not None:
            layer = model.config.vision_feature_layer
            tower = cast(PreTrainedModel, model.get_submodule(parts["vision_tower"]))
            FeatureCache(self.feature_cache, tower, [layer] if isinstance(layer, int) else list(layer))

    def on_train_start(self) -> None:
        """The first stage, if there is one and the run is new."""
        super().on_train_start()
        if self.vision_alignment is None or self.trainer.global_step > 0:
            return
        if self.trainer.world_size > 1:
            raise ValueError("vision_alignment runs on one device; save its checkpoint and go on with several")
        loader: Any = self.trainer.train_dataloader
        images = QuestionedImages()
        for start in range(0, len(loader.dataset), self.vision_alignment.batch_size):
            indices = range(start, min(start + self.vision_alignment.batch_size, len(loader.dataset)))
            images.add(loader.collate_fn(loader.dataset[list(indices)]), self._image_token)
        projector = self.language_model.get_submodule(_part(self.language_model, _PROJECTORS))
        align_vision(self.language_model, projector, images, self.vision_alignment)

    @property
    def _image_token(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(self.processor.image_token))  # type: ignore[arg-type]

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Mean cross-entropy over supervised tokens, and how many they are."""
        vision: Mapping[str, Tensor] | None = batch.get("vision")
        loss, tokens = supervised_loss(
            self.language_model,
            batch["input_ids"],
            batch["attention_mask"],
            batch["labels"],
            vision,
            turns=batch.get("turns"),
        )
        if self.training:
            loss = loss + self._nothing_of_vision()
        return loss, tokens

    def generate(self, prompts: Sequence[str], vision: Mapping[str, Tensor] | None = None, **options: Any) -> list[str]:
        """Continuation of each prompt; ``options`` as in ``generate`` of transformers.

        Args:
            prompts: with one ``<image>`` for each image.
            vision: what the image processor made of the images, in the order of the prompts.
            options: ``max_new_tokens``, ``num_beams``, ...

        Raises:
            ValueError: there are more or fewer images than the prompts have places for.
        """
        return generate_texts(self.language_model, self.tokenizer, self._expanded(prompts, vision), vision, **options)

    def rank(
        self, prompts: Sequence[str], options: Sequence[Sequence[str]], vision: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        """Log-likelihood ``[options]`` of each prompt's options; prompts and images as in :meth:`generate`."""
        expanded = self._expanded(prompts, vision)
        return option_log_likelihoods(self.language_model, self.tokenizer, expanded, options, vision)

    def _nothing_of_vision(self) -> Tensor:
        """Zero, with a gradient of zero for what trains outside of the language model.

        In a batch of text alone that would get no gradient, nor would the layers of a tower above those that are
        projected, ever. DDP takes this for an error; and it is not what a process gets whose next batch has images.
        """
        language = {id(parameter) for parameter in self.language_model.get_decoder().parameters()}
        outside = [p for p in self.parameters() if p.requires_grad and id(p) not in language]
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in outside]
        return sum((part.sum() * 0.0 for part in parts), torch.zeros((), device=self.device))

    def _expanded(self, prompts: Sequence[str], vision: Mapping[str, Tensor] | None) -> list[str]:
        """The prompts with an image token for every position that an image takes."""
        counts = image_token_counts(self.processor, vision_sizes(vision or {}))
        places = sum(prompt.count(IMAGE) for prompt in prompts)
        if places != len(counts):
            raise ValueError(f"the prompts have {places} {IMAGE} and there are {len(counts)} images")
        remaining = iter(counts)
        return [re.sub(IMAGE, lambda _: self.processor.image_token * next(remaining), prompt) for prompt in prompts]


def _part(model: PreTrainedModel, names: Sequence[str]) -> str:
    found = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in names]
    if not found:
        raise ValueError(f"{type(model).__name__} has no {' or '.join(names)}: expected a LLaVA-style model")
    return min(found, key=len)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _cast_inputs(part: nn.Module) -> None:
    """Let a part read inputs of another dtype than its own, as those of a frozen one in bf16."""

    def to_own_dtype(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        dtype = next(module.parameters()).dtype
        return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)

    part.register_forward_pre_hook(to_own_dtype)
