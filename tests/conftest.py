"""A tiny LLaMA with a tokenizer in a folder, as a pretrained model would come, and a few commonsense questions.

The library is imported inside the fixtures: jaxtyping's import hook is set after this file is read.
"""

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MakeBackbone, MakeData, MakeLlama, MakeTrainer, RunCLI, arc_row, boolq_row, save_llama, write_rows

# tensors this small are ten times slower on two threads that other processes share; child processes read the variable
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds_stay_in_their_test() -> Iterator[None]:
    """Processes that a later test starts would read the seed of a command that ran before."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> MakeLlama:
    """Makes a tiny LLaMA in a folder of its own; see :func:`save_llama` for what can be chosen."""

    def make(**changes: Any) -> Path:
        return save_llama(tmp_path_factory.mktemp("llama"), **changes)

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_llama: MakeLlama) -> Path:
    """A tiny LLaMA with tied embeddings and a chat template."""
    return make_llama()


@pytest.fixture(scope="session")
def untied_llama(make_llama: MakeLlama) -> Path:
    """A tiny LLaMA with an output embedding of its own, and no chat template."""
    return make_llama(tied=False, chat_template=None)


@pytest.fixture(scope="session")
def commonsense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLM-Adapters' layout with two tasks: 24 rows each to train on, 5 (boolq) and 4 (ARC-Easy) to test on."""
    folder = tmp_path_factory.mktemp("commonsense")
    for task, row, tests in (("boolq", boolq_row, 5), ("ARC-Easy", arc_row, 4)):
        write_rows(folder / task / "train.json", [row(number) for number in range(24)])
        write_rows(folder / task / "test.json", [row(number) for number in range(100, 100 + tests)])
    return folder


@pytest.fixture
def make_backbone(tiny_llama: Path) -> MakeBackbone:
    """Makes a DoRALlama on the tiny LLaMA, or on the folder that is given; adapter options go by ``adapter``."""
    from torch.optim import AdamW

    from dora_lightning import AdapterConfig
    from dora_lightning.backbones import DoRALlama

    def make(
        folder: Path | None = None, adapter: dict[str, Any] | None = None, lr: float = 0.01, **options: Any
    ) -> Any:
        config = {"rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]} | (adapter or {})
        options.setdefault("optimizer", partial(AdamW, lr=lr))
        torch.manual_seed(0)
        return DoRALlama(str(folder or tiny_llama), AdapterConfig(**config), **options)

    return make


@pytest.fixture
def make_data(tiny_llama: Path, commonsense_folder: Path) -> MakeData:
    """Makes a CommonsenseDataModule: 40 samples to train on, 8 for validation, 9 to test on."""
    from datamodules import CommonsenseDataModule

    def make(**options: Any) -> Any:
        defaults: dict[str, Any] = {"data_dir": str(commonsense_folder), "val_size": 8, "batch_size": 4}
        defaults |= {"template": "plain", "eval_batch_size": 4}
        return CommonsenseDataModule(str(tiny_llama), **(defaults | options))

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> MakeTrainer:
    """Makes a quiet Trainer for one CPU process that writes to ``tmp_path`` and saves no checkpoints by itself."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    def make(**options: Any) -> Any:
        saves = any(isinstance(callback, ModelCheckpoint) for callback in options.get("callbacks", []))
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": saves,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "num_sanity_val_steps": 0,
        }
        return Trainer(**(defaults | options))

    return make


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunCLI:
    """Runs the command in this process, in an empty folder."""
    from dora_lightning.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1]), *sys.path])
    monkeypatch.setattr(sys, "argv", ["dora-lightning"])
    monkeypatch.delenv("DORA_LIGHTNING_TRACEBACK", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what LightningCLI calls

    def run(*args: object) -> None:
        main([str(arg) for arg in args])

    return run
