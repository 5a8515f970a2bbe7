"""What is planned of parameters, gradients and optimiser states, against real ones."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_measured import Case
from tiny import MakeLlama
from torch import Tensor

from dora_lightning import AdapterConfig
from dora_lightning.adapters import summarize_adapters
from dora_lightning.adapters.quantized import is_quantized, packed_tensors
from dora_lightning.planning.activations import Step
from dora_lightning.planning.blocks import read_sizes
from dora_lightning.planning.memory import DDP, FSDP2, ONE_DEVICE, Memory, Variant, device_memory
from dora_lightning.planning.models import SHAPES, planned_model
from dora_lightning.planning.weights import Weights, count_weights, packed_bytes

pytestmark = pytest.mark.filterwarnings("ignore")
ADAPTERS: list[dict[str, Any]] = [
    {"rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    {"rank": 4, "target_modules": ["q_proj"], "magnitude_only_modules": ["o_proj", "up_proj"]},
    {"rank": 4, "init": "pissa"},
    {"method": "lora", "rank": 4, "rank_pattern": {"q_proj": 8}},
    {"method": "dvora", "rank": 8},
    {"method": "full", "target_modules": ["q_proj"]},
]


def bytes_in(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory_of(case: Case, weights: Weights, variant: Variant, moments: int = 2) -> Memory:
    return device_memory(weights, read_sizes(case.planned()), Step(1, 8), variant, moments)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.get("method", "dora"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_after_a_real_step(make_llama: MakeLlama, adapter: dict[str, Any], dtype: str, tied: bool) -> None:
    case = Case(make_llama(tied=tied), adapter, dtype)
    backbone = case.backbone()
    optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad])
    case.forward(backbone, case.batch()).backward()
    optimizer.step()
    trained = [p for p in backbone.parameters() if p.requires_grad]
    frozen = [p for p in backbone.parameters() if not p.requires_grad]

    weights = count_weights(case.planned())
    summary = summarize_adapters(backbone)
    assert weights.groups == summary.groups
    assert weights.base == sum(p.numel() for p in frozen) + (
        summary.trainable if adapter.get("method") == "full" else 0
    )
    memory = memory_of(case, weights, Variant(ONE_DEVICE, 1, False))
    pair = 4 * 8 * (48 + 48) if adapter.get("method") == "dvora" else 0
    assert memory.base == bytes_in(frozen) + bytes_in(list(backbone.buffers())) + pair
    assert memory.adapters == bytes_in(trained)
    assert memory.gradients == bytes_in([p.grad for p in trained if p.grad is not None])
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert memory.optimizer == bytes_in(states)


def test_other_optimisers(make_llama: MakeLlama) -> None:
    case = Case(make_llama(), ADAPTERS[0])
    weights = count_weights(case.planned())
    assert memory_of(case, weights, Variant(ONE_DEVICE, 1, False), moments=0).optimizer == 0
    assert memory_of(case, weights, Variant(DDP, 2, False)).gradients == 2 * 4 * weights.trainable


@pytest.mark.parametrize("shards", [2, 3, 64])
def test_shards_are_those_of_chunk(make_llama: MakeLlama, shards: int) -> None:
    case = Case(make_llama(tied=False), ADAPTERS[0], "bfloat16")
    model = case.planned().model
    first = [parameter.chunk(shards)[0] for parameter in model.parameters()]  # as FSDP2 cuts them
    buffers = bytes_in(list(model.buffers()))
    memory = memory_of(case, count_weights(case.planned()), Variant(FSDP2, shards, False))
    assert memory.base - buffers == bytes_in([part for part in first if not part.requires_grad])
    assert memory.adapters == bytes_in([part for part in first if part.requires_grad])
    block = bytes_in(list(model.model.layers[0].parameters()))
    outside = [p for name, p in model.named_parameters() if ".layers." not in name]
    assert memory.gathered == 2 * block + bytes_in(outside)


@pytest.mark.parametrize("quantization", ["nf4", "nf4-dq", "fp4", "int8", "torchao-int8"])
def test_packed_bytes(make_llama: MakeLlama, quantization: str) -> None:
    pytest.importorskip("torchao" if quantization.startswith("torchao") else "bitsandbytes")
    case = Case(
        make_llama(hidden_size=256, intermediate_size=512, tied=False),
        ADAPTERS[0],
        "bfloat16",
        quantization=quantization,
    )
    backbone = case.backbone()
    packed = [module for module in backbone.modules() if is_quantized(module)]
    real = bytes_in([tensor for module in packed for tensor in packed_tensors(module)])
    counted = sum(packed_bytes(quantization, module.out_features, module.in_features) for module in packed)
    assert counted == pytest.approx(real, rel=0.001)
    weights = count_weights(case.planned(), quantization)
    inside = {id(parameter) for module in packed for parameter in module.parameters()}
    others = [p for p in backbone.parameters() if not p.requires_grad and id(p) not in inside]
    assert weights.bytes_of(trains=False) == pytest.approx(real + bytes_in(others), rel=0.001)


# of the models' cards and papers; LLaMA-2-70B with adapters as counted in docs/guides/many-gpus.md
@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama3-8b", 8_030_261_248),
        ("llama2-70b", 68_976_648_192),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_shapes(shape: str, parameters: int) -> None:
    adapter = AdapterConfig(rank=32, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    weights = count_weights(planned_model(shape, adapter))
    assert weights.base == parameters
    if shape == "llama2-70b":
        assert weights.trainable == 281_640_960


def test_all_shapes_are_llamas() -> None:
    assert {"llama-7b", "llama-13b", "llama2-7b", "llama3-8b", "llama3-70b", "llama3-405b"} <= set(SHAPES)
    for shape in SHAPES.values():
        assert shape["hidden_size"] % shape["num_attention_heads"] == 0


def test_refused(make_llama: MakeLlama, tmp_path: Path) -> None:
    plan_of = partial(planned_model, adapter=AdapterConfig(rank=4))
    with pytest.raises(ValueError, match="shape must be one of"):
        plan_of("anything", shape="llama9")
    with pytest.raises(ValueError, match="dtype must be"):
        plan_of("llama-7b", dtype="int8")
    with pytest.raises(ValueError, match="detach_norm"):
        read_sizes(planned_model("smollm2-135m", AdapterConfig(rank=4, detach_norm=False)))
    folder = make_llama()
    config = json.loads((folder / "config.json").read_text())
    qwen = config | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(qwen))
    with pytest.raises(ValueError, match=r"has self_attn\.[qk]_norm\.weight; plan knows blocks of LLaMA's form alone"):
        read_sizes(plan_of(str(tmp_path)))
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        plan_of(str(tmp_path))
