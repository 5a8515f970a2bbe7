"""A tiny random BART in a folder, as a pretrained one would come, and VL-BARTs made of it."""

from pathlib import Path
from typing import Any

import torch
from transformers import BartConfig, BartForConditionalGeneration

TEXT = "vqa gpa nlvr caption what color is it red green blue circle square yes no true false a0 a1 a2 a3 a4 , : ?"
WORDS = TEXT.split()
BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 640,
    "init_std": 0.2,
    "dropout": 0.0,
}
TOWER: dict[str, Any] = {
    "embed_dim": 24,
    "image_size": 16,
    "patch_size": 8,
    "width": 16,
    "layers": 2,
    "head_width": 8,
}


def save_bart(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random BART of two layers each, with a byte-level tokenizer that knows a few words."""
    from dora_lightning.vl_bart.parts import word_tokenizer

    torch.manual_seed(seed)
    tokenizer = word_tokenizer(WORDS)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = BartConfig(
        vocab_size=len(tokenizer),
        decoder_start_token_id=ids["eos_token_id"],
        forced_eos_token_id=ids["eos_token_id"],
        **ids,
        **(BART | changes),
    )
    model = BartForConditionalGeneration(config)
    model.generation_config.forced_eos_token_id = ids["eos_token_id"]  # transformers 5.0 leaves it out
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)  # biases and norms that do something
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def features(samples: int, images: int, rows: int, numbers: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Visual inputs of random features, each sample with so many images of so many rows."""
    generator = torch.Generator().manual_seed(seed)
    orders = torch.arange(images * rows).expand(samples, -1)
    return {
        "features": torch.randn(samples, images * rows, numbers, generator=generator),
        "image_order": orders // rows,
        "object_order": orders % rows,
        "visual_mask": torch.ones_like(orders),
    }
