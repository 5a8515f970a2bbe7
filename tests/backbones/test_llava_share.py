"""The trainable share of LLaVA-1.5-7B that the paper prints, counted on the meta device from the true architecture."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dora_lightning import AdapterConfig
from dora_lightning.adapters import summarize_adapters
from dora_lightning.backbones import DoRALlava

PROJECTOR = 1024 * 4096 + 4096 + 4096 * 4096 + 4096


def llava_7b() -> LlavaForConditionalGeneration:
    """LLaVA-1.5-7B as it was trained: CLIP ViT-L/14 at 336 pixels, a two-layer projector, Vicuna-7B."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    language = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=language))


# Liu et al. 2024, table 5; the projector trains in full beside the adapters, in every row
@pytest.mark.parametrize(("method", "printed"), [("lora", "4.61"), ("dora", "4.63")])
def test_share_of_llava_7b(method: str, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = llava_7b()
    total = sum(p.numel() for p in model.parameters())
    DoRALlava("unused", AdapterConfig(method, 128, target_modules="all-linear")).inject(model)
    summary = summarize_adapters(model)
    # 7 linear modules of each of 32 layers: q k v o, gate up down; magnitudes of their outputs
    low_rank = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    magnitudes = 32 * (5 * 4096 + 2 * 11008) if method == "dora" else 0
    assert summary.groups["other"] == PROJECTOR
    assert summary.trainable == low_rank + magnitudes + PROJECTOR
    assert summary.total == total + low_rank + magnitudes
    with capsys.disabled():
        print(f"\nLLaVA-1.5-7B | {method} r128 | {summary.trainable:,} of {summary.total:,} | {summary.share:.4%}")
    # 4.6161 and 4.6337 %: the paper cuts the digits off
    assert f"{int(1e4 * summary.share) / 100:.2f}" == printed
