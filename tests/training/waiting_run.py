"""Two processes whose group gives up after two seconds, while the first one works for longer.

For test_first_process.py; not a test by itself.
"""

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parents[1] / "callbacks"))
from sharded_run import Words

from dora_lightning import AdapterConfig
from dora_lightning.backbones import DoRALlama
from dora_lightning.callbacks import MergeOnSave, merge_on_save
from dora_lightning.training.first_process import first_process_works

TIMEOUT = timedelta(seconds=2)
SECONDS = 4
merge = merge_on_save.merge_to_folder


def slowly(*arguments: object, **options: object) -> object:
    time.sleep(SECONDS)
    return merge(*arguments, **options)  # type: ignore[arg-type]


def fit(llama: str, folder: Path, when: str) -> None:
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=1, save_top_k=1)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT),
        max_steps=2,
        callbacks=[MergeOnSave(when, dirpath=str(folder / "end") if when == "fit_end" else None), saver],
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = DoRALlama(
        llama, AdapterConfig(rank=2, target_modules=["q_proj"]), optimizer=lambda p: torch.optim.AdamW(p)
    )
    trainer.fit(module, datamodule=Words(llama, batch_size=4))


def fail(rank: int) -> str:
    """What a process gets to know of a failure of the first one."""
    try:
        with first_process_works("merging") as works:
            if works:
                time.sleep(SECONDS)
                raise OSError(28, "No space left on device", "merged")
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(llama: str, folder: Path) -> None:
    merge_on_save.merge_to_folder = slowly  # type: ignore[assignment]
    for when in ("checkpoint", "fit_end"):
        fit(llama, folder, when)
    (folder / f"failure{dist.get_rank()}").write_text(fail(dist.get_rank()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
