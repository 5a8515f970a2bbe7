"""What turns text and images into the inputs of a vision-language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from dora_lightning.images import pad_to_square
from dora_lightning.llava_parts import LlavaParts, resolve_llava
from dora_lightning.pretrained import give_padding_token, not_loaded

AspectRatio: TypeAlias = Literal["pad", "plain"]


def load_processor(name: str | LlavaParts) -> Any:
    """Processor of a LLaVA-style model: its ``tokenizer``, ``image_processor`` and ``image_token``.

    Args:
        name: folder or hub id of the model, or the parts it is put together from.

    Raises:
        OSError: there is none to be had.
        ValueError: the model is a language model alone, or its images are no placeholder tokens in the text.
    """
    source = resolve_llava(name)
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise not_loaded(source, "processor", error) from error
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise ValueError(f"{source} is a language model alone: expected a LLaVA-style model that reads images")
    if not hasattr(processor, "image_token") or not hasattr(processor, "_get_num_multimodal_tokens"):
        raise ValueError(f"{type(processor).__name__} has no image token: expected a LLaVA-style model")
    give_padding_token(processor.tokenizer)
    return processor


def image_token_counts(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """How many tokens each image takes in the text.

    Args:
        processor: as :func:`load_processor` gives it.
        sizes: ``(width, height)`` of each image, in pixels, as the image processor gets it.
    """
    if not sizes:
        return []
    heights_first = [(height, width) for width, height in sizes]
    return list(processor._get_num_multimodal_tokens(image_sizes=heights_first)["num_image_tokens"])


def vision_sizes(vision: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """``(width, height)`` of each image that a processor has read, which keeps them where a model takes any size."""
    if not vision:
        return []
    if "image_sizes" in vision:
        return [(int(width), int(height)) for height, width in vision["image_sizes"]]
    height, width = vision["pixel_values"].shape[-2:]
    return [(width, height)] * len(vision["pixel_values"])


def mean_colour(image_processor: Any) -> tuple[int, int, int]:
    """The colour that an image processor takes for the mean, in which LLaVA-1.5 pads images to squares."""
    red, green, blue = (int(255 * mean) for mean in image_processor.image_mean)
    return red, green, blue


def published_aspect_ratio(processor: Any) -> AspectRatio:
    """How images were shown to LLaVA-1.5, squared, and to LLaVA-NeXT, which takes any shape, in their training."""
    return "plain" if hasattr(processor.image_processor, "image_grid_pinpoints") else "pad"


def image_inputs(processor: Any, image: Image.Image, image_aspect_ratio: AspectRatio) -> BatchFeature:
    """What the model reads of one image.

    Args:
        processor: as :func:`load_processor` gives it.
        image: RGB.
        image_aspect_ratio: ``pad`` puts it in the middle of a square in the mean color, ``plain`` leaves it to the
            image processor.
    """
    if image_aspect_ratio == "pad":
        image = pad_to_square(image, mean_colour(processor.image_processor))
    return processor.image_processor(images=[image], return_tensors="pt")
