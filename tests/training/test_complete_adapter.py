"""A checkpoint that holds less than its adapter is not merged."""

from typing import Any

import pytest
import torch

from dora_lightning import AdapterConfig
from dora_lightning.training.complete_adapter import check_complete

A, B, M = torch.zeros(2, 4), torch.zeros(4, 2), torch.ones(4)
Q, V = "layers.0.q_proj", "layers.0.v_proj"


def dora(*modules: str) -> dict[str, torch.Tensor]:
    return {f"{name}.{part}": t for name in modules for part, t in (("lora_A", A), ("lora_B", B), ("magnitude", M))}


def config(**options: Any) -> AdapterConfig:
    return AdapterConfig(**({"rank": 2, "target_modules": ["q_proj", "v_proj"]} | options))


@pytest.mark.parametrize(
    ("options", "tensors"),
    [
        ({}, dora(Q, V)),
        ({"target_modules": "all-linear"}, dora(Q)),
        ({"target_modules": r".*\.q_proj"}, dora(Q)),
        ({"exclude_modules": ["v_proj"]}, dora(Q)),
        ({"target_modules": ["q_proj"], "magnitude_only_modules": ["v_proj"]}, dora(Q) | {f"{V}.magnitude": M}),
        ({"init": "pissa", "target_modules": ["q_proj"]}, dora(Q) | {f"{Q}.init_A": A, f"{Q}.init_B": B}),
        ({"method": "full", "rank": 16}, {f"{Q}.weight": torch.zeros(4, 4)}),
        ({"target_modules": ["q_proj"]}, dora(Q) | {"norm.weight": M}),
    ],
)
def test_what_is_whole_passes(options: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    check_complete(config(**options), tensors)


@pytest.mark.parametrize(
    ("options", "tensors", "message"),
    [
        ({}, {}, "holds no trained weights: its state_dict is empty"),
        ({"method": "full", "rank": 16}, {}, "holds no trained weights"),
        ({}, {"norm.weight": M}, "holds no tensors of the adapter, method 'dora'"),
        ({}, dora(Q), "holds no adapter of 'v_proj', which target_modules names"),
        ({"target_modules": r".*\.k_proj"}, dora(Q), "holds no adapter of"),
        (
            {},
            dora(Q, V) | {"layers.1.q_proj.lora_A": A},
            r"whole adapter of layers\.1\.q_proj: it holds lora_A; method",
        ),
        ({}, dora(Q) | {f"{V}.magnitude": M}, rf"whole adapter of {V}: it holds magnitude"),
        ({"method": "lora"}, dora(Q, V), "it holds lora_A, lora_B, magnitude; method 'lora' has lora_A, lora_B"),
        ({"init": "pissa"}, dora(Q, V), "method 'dora' has init_A, init_B, lora_A"),
    ],
)
def test_what_is_missing_is_named(options: dict[str, Any], tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_complete(config(**options), tensors)
