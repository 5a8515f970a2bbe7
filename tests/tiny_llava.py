"""A tiny random LLaVA or LLaVA-NeXT in a folder, as a pretrained one would come, and small images in files."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny import save_tokenizer
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
)

SIDE, PATCH = 16, 8
IMAGE_TOKENS = (SIDE // PATCH) ** 2
VISION: dict[str, Any] = {
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def save_llava(folder: Path, next_generation: bool = False, seed: int = 0, **language: Any) -> Path:
    """A random LLaVA: a tower of two layers that makes 4 tokens of an image, and a LLaMA of two layers.

    LLaVA-NeXT's images are cut into up to two tiles, so their numbers of tokens differ with their shape.
    """
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    options: dict[str, Any] = {
        "vocab_size": 392,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    text = LlamaConfig(**(options | language))
    vision = CLIPVisionConfig(**VISION)
    size = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    processing: dict[str, Any] = {
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    shared: dict[str, Any] = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>")}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if next_generation:
            grid = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
            config: Any = LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=grid, **shared)
            model: Any = LlavaNextForConditionalGeneration(config)
            images = LlavaNextImageProcessor(size=size[0], crop_size=size[1], image_grid_pinpoints=grid)
            processor: Any = LlavaNextProcessor(images, tokenizer, **processing)
        else:
            config = LlavaConfig(vision_config=vision, text_config=text, image_seq_length=IMAGE_TOKENS, **shared)
            model = LlavaForConditionalGeneration(config)
            processor = LlavaProcessor(CLIPImageProcessor(size=size[0], crop_size=size[1]), tokenizer, **processing)
        # features that tell one image from another
        for parameter in model.model.vision_tower.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.3)
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_image(path: Path, seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Path:
    """An image of random pixels."""
    pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.manual_seed(seed))
    Image.fromarray(pixels.numpy()).save(path)
    return path
