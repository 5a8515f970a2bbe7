"""Rows of several samples give the loss and the gradients of the samples on their own, with every kind of attention."""

import math
from pathlib import Path

import pytest
import torch
from tiny import MakeBackbone, MakeData, MakeTrainer, perturb_adapters
from transformers import AttentionInterface, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from datamodules.encoding import Collator, encode_samples
from datamodules.packing import PackingCollator, pack_lengths
from dora_lightning.backbones.causal_lm import supervised_loss
from dora_lightning.data import Sample

SAMPLES = [
    Sample(
        f"Question: is {number} {'cold or hot ' * (number % 5)}?\nAnswer:",
        f" it is {'true' if number % 2 else 'false'}",
    )
    for number in range(12)
]


@pytest.mark.parametrize("train_on_inputs", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_of_the_samples_on_their_own(
    make_backbone: MakeBackbone, tiny_llama: Path, attention: str, checkpointing: bool, train_on_inputs: bool
) -> None:
    module = make_backbone(attn_implementation=attention, gradient_checkpointing=checkpointing)
    module.configure_model()
    perturb_adapters(module)
    items = encode_samples(SAMPLES, AutoTokenizer.from_pretrained(tiny_llama), train_on_inputs=train_on_inputs)
    rows = [[items[index] for index in row] for row in pack_lengths([item.length for item in items], 100)]
    assert len(rows) < len(items) / 2
    padded, packed = Collator(0, 100)(items), PackingCollator(0, 100)(rows)
    results = []
    shared = PackingCollator(0, 100, share_rows=True)(items)
    assert len(shared["input_ids"]) < len(items)
    for batch in (padded, packed, shared):
        module.zero_grad()
        loss, tokens = module.loss(batch)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        results.append((loss.detach(), tokens, gradients))
    expected, count, wanted = results[0]
    assert any(gradient.abs().max() > 1e-3 for gradient in wanted.values())
    for loss, tokens, gradients in results[1:]:
        assert tokens == count
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
        assert wanted.keys() == gradients.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_is_attended_to_across_a_boundary(make_backbone: MakeBackbone, attention: str) -> None:
    module = make_backbone(attn_implementation=attention)
    module.configure_model()
    module.eval()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0]])
    labels = torch.tensor([[-100, -100, -100, -100, -100, 70, 80, -100]])
    losses = []
    for first in (40, 50):
        ids = torch.tensor([[1, first, first + 1, first + 2, 60, 70, 80, 0]])
        losses.append(supervised_loss(module.language_model, ids, torch.ones_like(ids), labels, position_ids=positions))
        # one sequence does see what stands before it
        losses.append(supervised_loss(module.language_model, ids, torch.ones_like(ids), labels))
    assert torch.equal(losses[0][0], losses[2][0])
    assert not torch.equal(losses[1][0], losses[3][0])


def test_a_fit_with_rows_learns(make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer) -> None:
    data = make_data(batch_size=1)
    data.packing_len = 512
    trainer = make_trainer(max_epochs=3)
    trainer.fit(make_backbone(), datamodule=data)
    loss = float(trainer.callback_metrics["val/loss"])
    assert loss < 4  # of ln 384 = 5.95
    assert float(trainer.callback_metrics["val/perplexity"]) == pytest.approx(math.exp(loss), rel=1e-5)


def test_flash_attention_gets_one_row(make_backbone: MakeBackbone, tiny_llama: Path) -> None:
    # transformers looks for boundaries in a batch of one row only where flash attention is used, and takes several
    # rows for one sequence each without a word; there is no such attention on a CPU, so its name stands for another
    AttentionInterface.register("flash_by_another_name", sdpa_attention_forward)
    AttentionMaskInterface.register("flash_by_another_name", sdpa_mask)
    items = encode_samples(SAMPLES, AutoTokenizer.from_pretrained(tiny_llama))
    rows = [[items[index] for index in row] for row in pack_lengths([item.length for item in items], 100)]
    batch = PackingCollator(0, 100)(rows)
    losses, shapes = [], []
    for attention in ("sdpa", "flash_by_another_name"):
        module = make_backbone()
        module.configure_model()
        module.language_model.config._attn_implementation = attention
        module.language_model.model.register_forward_pre_hook(
            lambda _, __, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
        )
        losses.append(module.loss(batch)[0].detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-5)
    count, width = batch["input_ids"].shape
    assert count > 1
    assert shapes == [(count, width), (1, count * width)]
