"""Models of finished runs, each kind of which is shown things, and answers, in its own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from dora_lightning.adapters import merge_adapters
from dora_lightning.backbones import DoRALlava, DoRAVLBart
from dora_lightning.backbones.causal_lm import generate_texts
from dora_lightning.backbones.seq2seq import encode_prompts, generate_targets
from dora_lightning.feature_rows import VIDEO_EVERY
from dora_lightning.offline.checkpoints import load_backbone
from dora_lightning.offline.shown import Shown
from dora_lightning.open_clip_tower import scaled_pixels
from dora_lightning.pretrained import (
    load_causal_lm,
    load_tokenizer,
    load_vision_language_model,
    not_loaded,
    reads_images_too,
    resolve_pretrained,
)
from dora_lightning.processing import (
    image_inputs,
    image_token_counts,
    load_processor,
    published_aspect_ratio,
    vision_sizes,
)
from dora_lightning.terminal import say
from dora_lightning.training.trained_inputs import read_inputs
from dora_lightning.videos import video_info
from dora_lightning.vl_bart import VLBart, VLBartConfig, load_vl_bart, load_vl_bart_tokenizer
from dora_lightning.vl_bart.inputs import pixel_inputs

LLAVA_FRAMES = 8

Vision = Mapping[str, Tensor]
"""What a model reads of what it is shown, on its device."""


class TextModel:
    """A causal language model.

    Args:
        name: what it was loaded by, for messages.
        network: the model, with its adapters merged.
        tokenizer: its tokenizer.
        trained: how its inputs were made in training, see :mod:`dora_lightning.training.trained_inputs`.
    """

    bare_prompts = False
    """Whether a prompt is read as it is where the tokenizer has no chat template."""

    def __init__(
        self,
        name: str,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        trained: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.trained = trained or {}
        self.network = network
        self.tokenizer = tokenizer
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        cast(nn.Module, network).eval().to(device)

    def look_at(self, shown: Shown) -> tuple[Vision, str]:
        """What the model reads of what it is shown, and what stands for it before a prompt.

        Raises:
            ValueError: there is something that this model cannot look at.
        """
        if shown:
            raise ValueError(
                f"{self.name} reads text alone: an image needs a LLaVA-style model or a VL-BART, and so does a video"
            )
        return {}, ""

    def _as_trained(self, shown: Shown, published: Mapping[str, Any]) -> Shown:
        shown, notes = shown.as_trained(self.trained, published)
        for note in notes:
            self.say(note)
        return shown

    def say(self, note: str) -> None:
        """Tell the user something about this model, beside its answers."""
        say(f"{self.name}: {note}", Console(stderr=True))

    def answer(self, texts: Sequence[str], vision: Vision, **options: Any) -> list[str]:
        """A continuation of each text, all of them about the same; ``options`` as in ``generate`` of transformers."""
        repeated = {name: torch.cat([tensor] * len(texts)) for name, tensor in vision.items()}
        return generate_texts(self.network, self.tokenizer, texts, repeated or None, **options)


class LlavaModel(TextModel):
    """A LLaVA-style model and its processor; images, or a video's frames, come before the prompt."""

    def __init__(
        self, name: str, network: PreTrainedModel, processor: Any, trained: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(name, network, processor.tokenizer, trained)
        self.processor = processor

    def look_at(self, shown: Shown) -> tuple[Vision, str]:
        """As in :class:`TextModel`."""
        if shown.features:
            raise ValueError(f"{self.name} looks at pixels: give it an image or a video; features are for VL-BART")
        if not shown:
            return {}, ""
        squared = published_aspect_ratio(self.processor)
        shown = self._as_trained(
            shown, {"image_aspect_ratio": squared, "exif_rotation": False, "frames": LLAVA_FRAMES, "every": None}
        )
        self._check_window(shown)
        assert shown.image_aspect_ratio is not None
        read = [image_inputs(self.processor, picture, shown.image_aspect_ratio) for picture in shown.pictures()]
        # LLaVA-NeXT cuts images into tiles; fewer ones are filled up with zeros, as its processor does
        vision = {
            name: pad_sequence([inputs[name][0] for inputs in read], batch_first=True).to(self.network.device)
            for name in read[0]
        }
        tokens = image_token_counts(self.processor, vision_sizes(vision))
        return vision, self.processor.image_token * sum(tokens) + "\n"

    def _check_window(self, shown: Shown) -> None:
        """Refuse more frames of a video than the model can read before they are decoded."""
        most = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        if shown.video is None or most is None:
            return
        width, height = video_info(shown.video)[-2:]
        size = (width, height) if shown.image_aspect_ratio == "plain" else (max(width, height),) * 2
        (each,) = image_token_counts(self.processor, [size])
        if (wanted := len(shown.times())) * each > most:
            raise ValueError(
                f"{wanted} frames of {shown.video} take {each} tokens each, and {self.name} reads at most {most}: "
                "choose fewer frames, or a larger every"
            )


class VLBartModel(TextModel):
    """A VL-BART, which reads pixels if it has a tower, and features that were computed before."""

    bare_prompts = True
    network: VLBart

    def look_at(self, shown: Shown) -> tuple[Vision, str]:
        """As in :class:`TextModel`."""
        if not shown:
            return {}, ""
        if shown.image_aspect_ratio is not None:
            raise ValueError(
                f"{self.name} has every image scaled straight to a square: image_aspect_ratio is for LLaVA-style models"
            )
        shown = self._as_trained(shown, {"exif_rotation": False, "frames": None, "every": VIDEO_EVERY})
        inputs = self._of_features(shown) if shown.features else self._of_pixels(shown)
        return {name: tensor.to(self.network.device) for name, tensor in inputs.items()}, ""

    def answer(self, texts: Sequence[str], vision: Vision, **options: Any) -> list[str]:
        """The decoder's text for each prompt; see :class:`TextModel`.

        Raises:
            ValueError: a prompt is longer than the model reads.
        """
        longest, most = (
            max(map(len, self.tokenizer(list(texts))["input_ids"])),
            self.network.config.max_position_embeddings,
        )
        if longest > cast(int, most):
            raise ValueError(f"a prompt of {longest} tokens is too long: {self.name} reads at most {most}")
        if vision:
            # what is shown goes through the tower once
            vision = {**vision, "visual_index": torch.zeros(len(texts), dtype=torch.int64, device=self.network.device)}
        with torch.no_grad():
            encoded = encode_prompts(self.network, self.tokenizer, texts, vision)
        return generate_targets(self.network, self.tokenizer, *encoded, **options)

    def _of_features(self, shown: Shown) -> dict[str, Tensor]:
        inputs = shown.feature_inputs(self.network.config.feature_dim)
        self._check_orders(len(shown.features), int(inputs["object_order"].max()) + 1)
        return inputs

    def _of_pixels(self, shown: Shown) -> dict[str, Tensor]:
        tower = self.network.vision_tower
        if tower is None:
            raise ValueError(
                f"{self.name} has no vision tower and reads features that were computed before, of "
                f"{self.network.config.feature_dim} numbers: give it features (dora-lightning extract-features)"
            )
        number = len(shown.images) if shown.video is None else len(shown.times())
        # images of one row are told apart as the objects of one image
        self._check_orders(*((number, tower.rows) if tower.rows > 1 else (1, number)))
        pictures = shown.pictures()
        pixels = torch.stack([scaled_pixels(picture, tower.image_size) for picture in pictures])
        return pixel_inputs([pixels], tower.mean, tower.std)

    def _check_orders(self, images: int, objects: int) -> None:
        config = self.network.config
        if images > config.image_orders:
            raise ValueError(f"{self.name} tells {config.image_orders} images apart (image_orders), found {images}")
        if objects > config.object_orders:
            raise ValueError(
                f"{self.name} tells {config.object_orders} places of an image, or moments of a video, apart "
                f"(object_orders), found {objects}; choose fewer frames, or rows of features"
            )


def load_model(model: str, base: str | None) -> TextModel:
    """A model to generate with, on the GPU if there is one.

    Args:
        model: adapter checkpoint (.ckpt), merged folder, or hub id.
        base: folder or hub id of an adapter's base model; None for where the run loaded it from.

    Raises:
        ValueError: the checkpoint is none of an adapter, or a base was given beside a whole model.
    """
    if model.endswith(".ckpt"):
        return _load_checkpoint(model, base)
    if base is not None:
        raise ValueError("base belongs to an adapter checkpoint (.ckpt); this model is loaded as it is")
    if _model_type(model) == VLBartConfig.model_type:
        return VLBartModel(model, load_vl_bart(model), load_vl_bart_tokenizer(model), read_inputs(model))
    if reads_images_too(model):
        return LlavaModel(model, load_vision_language_model(model), load_processor(model), read_inputs(model))
    return TextModel(model, load_causal_lm(model), load_tokenizer(model), read_inputs(model))


def load_language_model(model: str, base: str | None = None) -> TextModel:
    """A causal language model, which may read images too; see :func:`load_model`.

    Raises:
        ValueError: it is an encoder-decoder, or as in :func:`load_model`.
    """
    loaded = load_model(model, base)
    if isinstance(loaded, VLBartModel):
        raise ValueError(f"{model} is a VL-BART: expected a causal language model")
    return loaded


def load_finished(model: str, base: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of :func:`load_language_model`, and its tokenizer."""
    loaded = load_language_model(model, base)
    return loaded.network, loaded.tokenizer


def _load_checkpoint(path: str, base: str | None) -> TextModel:
    backbone, trained = load_backbone(path, base)
    network = backbone.language_model
    merge_adapters(network, unload=True)
    if isinstance(backbone, DoRALlava):
        return LlavaModel(path, network, backbone.processor, trained)
    if isinstance(backbone, DoRAVLBart):
        # biases and norms that trained are fp32, which a layer of another dtype does not take
        cast(nn.Module, network).to(network.config.dtype)
        return VLBartModel(path, network, backbone.tokenizer, trained)
    return TextModel(path, network, backbone.tokenizer, trained)


def _model_type(name: str) -> str:
    try:
        return str(AutoConfig.from_pretrained(resolve_pretrained(name), trust_remote_code=False).model_type)
    except OSError as error:
        raise not_loaded(name, "model", error) from error
