"""One seed for every test, and a tiny LLaMA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    def build(tied: bool = False) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
        return LlamaForCausalLM(config)

    return build
