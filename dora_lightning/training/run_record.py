"""What a run was asked for, kept beside it and in its checkpoints, and compared when training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from dora_lightning.files import write_text_atomically
from dora_lightning.runs import run_id
from dora_lightning.training.checkpoint_files import RUN_KEY
from dora_lightning.training.resume import config_changes

# they say how to start, and nothing of what is trained
_HOW_TO_START = ("resume", "ckpt_path", "weights_only", "config")


class RunRecord(SaveConfigCallback):
    """Saves the config in the run's folder and in its checkpoints, and names what differs when training goes on.

    ``config.yaml`` is the config of the run's last part. A part that was asked for something else has left its own
    beside it: ``config_0.yaml`` of the first part, ``config_1.yaml`` of the next.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the config, once, on the first process."""
        if self.already_saved:
            return
        folder = Path(str(trainer.log_dir))  # asks the first process
        text = self.parser.dump(self.config, skip_none=False)
        self._settings = {k: v for k, v in yaml.safe_load(text).items() if k not in _HOW_TO_START}
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            save_config(folder, text)
        self._run = trainer.strategy.broadcast(run_id(folder))
        self.already_saved = True

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say which run it is of, and what that was asked for."""
        checkpoint[RUN_KEY] = {"run": self._run, "config": self._settings}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Name each setting that is another than that of the checkpoint's run."""
        before = checkpoint.get(RUN_KEY, {}).get("config")
        if trainer.state.fn != TrainerFn.FITTING or before is None:
            return
        for line in config_changes(before, self._settings):
            rank_zero_info(f"The config overrides the checkpoint: {line}")


def save_config(folder: Path, text: str) -> None:
    """Write ``config.yaml``; one of another content that is there is kept as ``config_<number>.yaml``."""
    path = folder / "config.yaml"
    if path.is_file() and (old := path.read_text(encoding="utf-8")) != text:
        number = sum(1 for _ in folder.glob("config_*.yaml"))
        write_text_atomically(folder / f"config_{number}.yaml", old)
    write_text_atomically(path, text)
