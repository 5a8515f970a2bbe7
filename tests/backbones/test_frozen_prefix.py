"""Blocks below the first adapter cost a forward pass and nothing else, with recomputation too."""

from collections import Counter

import pytest
import torch
from tiny import MakeLlama
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from dora_lightning import AdapterConfig, inject_adapters
from dora_lightning.backbones.causal_lm import enable_recomputation, supervised_loss

UPPER = r".*layers\.[{}]\..*(q_proj|v_proj|down_proj)"


def adapted_llama(make_llama: MakeLlama, blocks: int, adapted: str, recompute: bool) -> LlamaForCausalLM:
    """A LLaMA of ``blocks`` blocks of which those whose number is in ``adapted`` have adapters."""
    model = LlamaForCausalLM.from_pretrained(make_llama(num_hidden_layers=blocks))
    inject_adapters(model, AdapterConfig(rank=4, target_modules=UPPER.format(adapted)))
    if recompute:
        enable_recomputation(model)
    return model.train()


def loss_of(model: LlamaForCausalLM) -> Tensor:
    ids = torch.randint(3, 384, (2, 24), generator=torch.Generator().manual_seed(0))
    return supervised_loss(model, ids, torch.ones_like(ids), ids)[0]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_operations_of_the_backward_pass_are_those_of_the_upper_blocks_alone(
    make_llama: MakeLlama, recompute: bool
) -> None:
    operations = []
    for blocks, adapted in ((4, "23"), (2, "01")):
        loss = loss_of(adapted_llama(make_llama, blocks, adapted, recompute))
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        operations.append(counter.get_total_flops())
    assert operations[0] == operations[1] > 0


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_lower_blocks_run_once_and_see_no_gradient(make_llama: MakeLlama, recompute: bool) -> None:
    model = adapted_llama(make_llama, 4, "23", recompute)
    forwards: Counter[int] = Counter()
    backwards: Counter[int] = Counter()
    graphs: list[bool] = []
    for number, layer in enumerate(model.model.layers):
        mlp = layer.mlp
        mlp.register_forward_pre_hook(lambda *_, number=number: forwards.update([number]))
        mlp.register_full_backward_hook(lambda *_, number=number: backwards.update([number]))
        layer.register_forward_hook(lambda _, __, y: graphs.append((y[0] if isinstance(y, tuple) else y).requires_grad))
    loss = loss_of(model)
    assert graphs == [False, False, True, True]
    loss.backward()
    again = 2 if recompute else 1
    assert forwards == {0: 1, 1: 1, 2: again, 3: again}
    assert backwards == {2: 1, 3: 1}
