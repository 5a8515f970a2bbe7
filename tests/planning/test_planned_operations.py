"""What is planned of operations, against torch's counter on real steps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_measured import Case
from tiny import MakeLlama
from torch.utils.flop_counter import FlopCounterMode

from dora_lightning import AdapterConfig
from dora_lightning.adapters import adapters_disabled
from dora_lightning.planning.activations import Step
from dora_lightning.planning.blocks import read_sizes
from dora_lightning.planning.models import planned_model
from dora_lightning.planning.operations import forward_operations, norm_operations, step_operations

pytestmark = pytest.mark.filterwarnings("ignore")


def counting() -> FlopCounterMode:
    """Torch's counter, which does not know the product that is added in place."""

    def added(into: Any, a: Any, b: Any, **_: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added})


@pytest.fixture(scope="module")
def llama(make_llama: MakeLlama) -> Path:
    return make_llama(num_hidden_layers=3, tied=False)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "adapter",
    [
        {"rank": 4},
        {"rank": 4, "dropout": 0.1},
        {"rank": 4, "dropout": 0.1, "exact_dropout": True},
        {"method": "lora", "rank": 4, "rank_pattern": {"up_proj": 8}},
        {"method": "magnitude"},
        {"rank": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "magnitude_only_modules": ["down_proj"]},
    ],
)
def test_counted_as_torch_counts(llama: Path, adapter: dict[str, Any], checkpointing: bool) -> None:
    # eager attention is made of products that the counter knows on every device
    case = Case(llama, adapter, checkpointing=checkpointing, attention="eager")
    backbone, batch = case.backbone(), case.batch()
    case.forward(backbone, batch).backward()  # norms are cached
    with counting() as counter:
        case.forward(backbone, batch).backward()
    planned = step_operations(read_sizes(case.planned()), case.step())
    # a checkpointed block is computed again only as far as something was kept
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.06 if checkpointing else 1e-9)


def test_reference_and_norms(llama: Path) -> None:
    case = Case(llama, {"rank": 4}, attention="eager")
    backbone, batch = case.backbone(), case.batch()
    with torch.no_grad(), adapters_disabled(backbone.model), counting() as counter:
        case.forward(backbone, batch)
    sizes = read_sizes(case.planned())
    assert forward_operations(sizes, case.step()) == counter.get_total_flops()
    with torch.no_grad(), counting() as counter:
        for module in backbone.modules():
            if hasattr(module, "magnitude"):
                _ = module.lora_A.add_(1), module.norm()
    # W A^T, and beside it A A^T and B (A A^T), which are smaller by rank / width
    assert norm_operations(sizes) == pytest.approx(counter.get_total_flops(), rel=0.2)


def test_frozen_base_takes_four_per_weight() -> None:
    adapter = AdapterConfig(method="magnitude")
    sizes = read_sizes(planned_model("llama-7b", adapter))
    step = Step(1, 4096, supervised=1.0)
    per_token = step_operations(sizes, step) / step.tokens
    weights = 6_738_415_616 - 32000 * 4096  # the input embedding is looked up
    attention = 32 * 4096 * 4096 * 2 * 3.5  # 32 blocks of 4096 features, half of what is not seen skipped
    assert per_token == pytest.approx(4 * weights + attention, rel=0.01)
    recomputed = step_operations(sizes, replace(step, checkpointing=True)) / step.tokens
    assert recomputed - per_token == pytest.approx(2 * weights + attention / 3.5, rel=0.03)
