"""The trainable shares the paper prints, counted on the meta device from the true architectures."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dora_lightning.adapters import AdapterConfig, AdapterSummary, inject_adapters, summarize_adapters

ARCHITECTURES = {
    "LLaMA-7B": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32},
    "LLaMA-13B": {"vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
    | {"num_attention_heads": 40, "num_key_value_heads": 40},
    "LLaMA3-8B": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
}
ARCHITECTURES["LLaMA2-7B"] = ARCHITECTURES["LLaMA-7B"]
BASE_PARAMETERS = {
    "LLaMA-7B": 6_738_415_616,
    "LLaMA2-7B": 6_738_415_616,
    "LLaMA-13B": 13_015_864_320,
    "LLaMA3-8B": 8_030_261_248,
}

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
QKV, OTHERS = ["q_proj", "k_proj", "v_proj"], ["o_proj", "gate_proj", "up_proj", "down_proj"]

# model, what is trained, config, printed share in per cent
PAPER = [
    ("LLaMA-7B", "LoRA r32", AdapterConfig("lora", 32, target_modules=TARGETS), "0.83"),
    ("LLaMA-7B", "DoRA r16", AdapterConfig("dora", 16, target_modules=TARGETS), "0.43"),
    ("LLaMA-7B", "DoRA r32", AdapterConfig("dora", 32, target_modules=TARGETS), "0.84"),
    (
        "LLaMA-7B",
        "DoRA r32, q k v; magnitude of o gate up down",
        AdapterConfig("dora", 32, target_modules=QKV, magnitude_only_modules=OTHERS),
        "0.39",
    ),
    ("LLaMA-13B", "LoRA r32", AdapterConfig("lora", 32, target_modules=TARGETS), "0.67"),
    ("LLaMA-13B", "DoRA r32", AdapterConfig("dora", 32, target_modules=TARGETS), "0.68"),
    ("LLaMA2-7B", "DoRA r32", AdapterConfig("dora", 32, target_modules=TARGETS), "0.84"),
    # instruction tuning (Table 11): d, b and m of all linear modules; the frozen random pair is not counted
    ("LLaMA2-7B", "DVoRA r1024", AdapterConfig("dvora", 1024, target_modules=ALL), "0.04"),
    ("LLaMA3-8B", "LoRA r32", AdapterConfig("lora", 32, target_modules=TARGETS), "0.70"),
    ("LLaMA3-8B", "DoRA r32", AdapterConfig("dora", 32, target_modules=TARGETS), "0.71"),
]


def count(model: str, config: AdapterConfig) -> AdapterSummary:
    with torch.device("meta"):
        network = LlamaForCausalLM(LlamaConfig(**ARCHITECTURES[model], tie_word_embeddings=False))
    assert sum(p.numel() for p in network.parameters()) == BASE_PARAMETERS[model]
    return summarize_adapters(inject_adapters(network, config))


def test_what_dvora_s_share_is_made_of() -> None:
    rows = 5 * 4096 + 2 * 11008  # q k v o down, gate up
    vectors = {"lora_A": 7 * 1024, "lora_B": rows, "magnitude": rows}  # d, b, m of each of 32 layers
    groups = count("LLaMA2-7B", AdapterConfig("dvora", 1024, target_modules=ALL)).groups
    assert groups == {name: 32 * size for name, size in vectors.items()}
    assert sum(groups.values()) == 2_949_120


@pytest.mark.parametrize(("model", "trained", "config", "printed"), PAPER, ids=[f"{m} {t}" for m, t, _, _ in PAPER])
def test_share(model: str, trained: str, config: AdapterConfig, printed: str) -> None:
    summary = count(model, config)
    share, of_base = 100 * summary.share, 100 * summary.trainable / BASE_PARAMETERS[model]
    print(f"\n| {model} | {trained} | {summary.trainable:,} | {share:.4f} | {of_base:.4f} | {printed} |")
    assert f"{share:.2f}" == printed
