"""On one GPU: mixed and true bf16 follow fp32, DoRA's memory is near LoRA's, and torch.compile changes nothing.

Run with ``pytest -m gpu tests/callbacks/test_gpu.py``. ``DEVICE`` lets the logic be tried without one.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny import MakeLlama
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from dora_lightning.callbacks import DoRA, ShardedTraining

DEVICE = os.environ.get("DORA_LIGHTNING_TEST_DEVICE", "cuda")
STEPS = 20

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytestmark.append(pytest.mark.skip(reason="needs a CUDA device"))


class LanguageModel(LightningModule):
    """A LightningModule of somebody's own."""

    def __init__(self, folder: Path, compile_model: bool = False) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.compile_model = compile_model
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def on_fit_start(self) -> None:
        if self.compile_model:
            self.model.compile()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


def fit(
    folder: Path, method: str = "dora", extra: tuple[Callback, ...] = (), **options: Any
) -> tuple[list[float], int]:
    """Losses of a run, and its peak of allocated memory in bytes (0 without a GPU)."""
    torch.manual_seed(0)
    module = LanguageModel(folder, options.pop("compile_model", False))
    batches = DataLoader(
        torch.randint(3, 60, (4 * STEPS, 64), generator=torch.Generator().manual_seed(1)), batch_size=4
    )
    trainer = Trainer(
        accelerator="gpu" if DEVICE == "cuda" else "cpu",
        devices=1,
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[DoRA(method=method, rank=4, module="model"), *extra],
        **options,
    )
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, batches)
    return module.losses, torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


@pytest.fixture
def folder(make_llama: MakeLlama) -> Path:
    return make_llama()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_follows_fp32(folder: Path, precision: Any) -> None:
    exact, _ = fit(folder)
    rounded, _ = fit(folder, precision=precision)
    assert exact[-1] < exact[0] - 0.1
    # bf16 has 8 bits: each loss within 1 % of fp32's
    assert rounded == pytest.approx(exact, rel=0.01)


def test_a_bf16_base_under_fp32_adapters_follows_fp32(folder: Path) -> None:
    exact, _ = fit(folder)
    rounded, _ = fit(folder, extra=(ShardedTraining(base_dtype="bfloat16"),), precision="bf16-mixed")
    assert rounded == pytest.approx(exact, rel=0.01)


def test_memory_is_near_loras(folder: Path) -> None:
    if DEVICE != "cuda":
        pytest.skip("allocated memory is counted on a GPU")
    _, lora = fit(folder, method="lora", precision="bf16-mixed")
    _, dora = fit(folder, method="dora", precision="bf16-mixed")
    print(f"peak: LoRA {lora / 2**20:.1f} MiB, DoRA {dora / 2**20:.1f} MiB, ratio {dora / lora:.3f}")
    assert dora < 1.5 * lora


def test_compile_changes_nothing(folder: Path) -> None:
    eager, _ = fit(folder)
    compiled, _ = fit(folder, compile_model=True)
    assert compiled == pytest.approx(eager, rel=1e-4)
