"""MergeOnSave writes what transformers loads, and does not touch what trains."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import MakeBackbone, MakeData, MakeTrainer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dora_lightning import AdapterConfig, inject_adapters
from dora_lightning.callbacks import MergeOnSave, merge_on_save
from dora_lightning.files.folders import MARKER
from dora_lightning.training import merging
from dora_lightning.training.merging import SOURCE_FILE
from dora_lightning.training.trained_inputs import INPUTS_FILE

IDS = torch.arange(3, 50)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def check_merged(folder: Path, expected: torch.Tensor) -> None:
    merged, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)


def test_at_the_end_of_a_fit(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path, tiny_llama: Path
) -> None:
    module = make_backbone()
    make_trainer(callbacks=[MergeOnSave("fit_end")]).fit(module, datamodule=make_data())
    check_merged(tmp_path / "merged", logits(module.language_model))
    assert not torch.allclose(
        logits(module.language_model), logits(LlamaForCausalLM.from_pretrained(tiny_llama)), atol=0.1
    )


class Copies(Callback):
    """Copies what trains after each batch, when this callback's turn comes."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def test_every_kept_checkpoint_and_what_trains_stays_bit_for_bit(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def fit(*callbacks: Callback) -> list[dict[str, torch.Tensor]]:
        copies = Copies()
        saver = ModelCheckpoint(tmp_path / "saved", "{step}", save_top_k=-1, every_n_train_steps=3)
        make_trainer(max_steps=7, callbacks=[*callbacks, copies, saver]).fit(make_backbone(), datamodule=make_data())
        return copies.seen

    with_merging, without = fit(MergeOnSave("checkpoint")), fit()
    for ours, theirs in zip(with_merging, without, strict=True):
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert {path.name for path in (tmp_path / "saved").glob("*-merged")} == {"step=3-merged", "step=6-merged"}
    for step in (3, 6):
        module = make_backbone()
        module.configure_model()
        module.load_state_dict(with_merging[step - 1], strict=False)
        check_merged(tmp_path / "saved" / f"step={step}-merged", logits(module.language_model))


def test_a_merged_folder_goes_with_its_checkpoint(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", "{step}", monitor="val/loss", save_top_k=1, every_n_epochs=1)
    trainer = make_trainer(max_epochs=3, limit_train_batches=3, callbacks=[MergeOnSave("checkpoint"), saver])
    trainer.fit(make_backbone(), datamodule=make_data())
    best = Path(saver.best_model_path)
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {best.name, f"{best.stem}-merged"}


class Plain(LightningModule):
    """A module of a user's own, with a model from transformers inside."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.net = LlamaForCausalLM.from_pretrained(folder)
        self.net.config.name_or_path = ""
        inject_adapters(self.net.train(), AdapterConfig(rank=4))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        return self.net(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def test_a_plain_module_with_the_base_given(
    make_data: MakeData, make_trainer: MakeTrainer, tiny_llama: Path, tmp_path: Path
) -> None:
    module = Plain(tiny_llama)
    callback = MergeOnSave("fit_end", dirpath=str(tmp_path / "here"), base=str(tiny_llama))
    trainer = make_trainer(max_steps=4, limit_val_batches=0, callbacks=[callback])
    trainer.fit(module, datamodule=make_data())
    check_merged(tmp_path / "here", logits(module.net))


def test_a_base_that_is_not_known_is_an_error(make_data: MakeData, make_trainer: MakeTrainer, tiny_llama: Path) -> None:
    trainer = make_trainer(max_steps=1, limit_val_batches=0, callbacks=[MergeOnSave("fit_end")])
    with pytest.raises(ValueError, match="does not know what the base model was loaded from; pass base="):
        trainer.fit(Plain(tiny_llama), datamodule=make_data())


def test_a_disk_that_fills_up_leaves_no_half_folder(
    make_backbone: MakeBackbone,
    make_data: MakeData,
    make_trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "_write_tensor", full)
    trainer = make_trainer(max_steps=1, callbacks=[MergeOnSave("fit_end", dirpath=str(tmp_path / "merged"))])
    with pytest.raises(OSError, match="the disk filled up"):
        trainer.fit(make_backbone(), datamodule=make_data())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["runs", "."])
def test_a_folder_that_holds_something_is_refused_before_training(
    make_backbone: MakeBackbone,
    make_data: MakeData,
    make_trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "result.json").write_text("mine")
    module = make_backbone()
    trainer = make_trainer(max_steps=1, callbacks=[MergeOnSave("fit_end", dirpath=place)])
    with pytest.raises(FileExistsError, match="still needed" if place == "." else r"it holds result\.json"):
        trainer.fit(module, datamodule=make_data())
    assert trainer.global_step == 0
    assert (tmp_path / "runs" / "result.json").read_text() == "mine"


def test_the_run_itself_is_never_replaced(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    # there is nothing at the start, and all of the run at the end
    trainer = make_trainer(max_steps=1, default_root_dir=tmp_path / "new" / "run")
    trainer.callbacks.append(MergeOnSave("fit_end", dirpath=str(tmp_path / "new")))
    with pytest.raises(FileExistsError, match=r"new is or holds .*new/run, which is still needed"):
        trainer.fit(make_backbone(), datamodule=make_data())
    assert trainer.global_step == 0


def fit_with_last(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, folder: Path, steps: int
) -> Path:
    """Merges ``last.ckpt`` at the end of each fit; returns its merged folder."""
    saver = ModelCheckpoint(folder, "last", every_n_train_steps=steps, enable_version_counter=False)
    make_trainer(max_steps=steps, limit_val_batches=0, callbacks=[MergeOnSave("checkpoint"), saver]).fit(
        make_backbone(), datamodule=make_data()
    )
    return folder / "last-merged"


def test_a_users_file_beside_merged_weights_stays(
    make_backbone: MakeBackbone,
    make_data: MakeData,
    make_trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(merge_on_save, "rank_zero_warn", warned.append)
    parts = (make_backbone, make_data, make_trainer, tmp_path / "saved")
    merged = fit_with_last(*parts, steps=1)
    before = (merged / "model.safetensors").read_bytes()
    (merged / "notes.txt").write_text("mine")
    fit_with_last(*parts, steps=2)
    assert len(warned) == 1
    assert "last.ckpt is not merged: " in warned[0]
    assert "it holds notes.txt, which dora-lightning did not write there" in warned[0]
    assert (merged / "notes.txt").read_text() == "mine"
    assert (merged / "model.safetensors").read_bytes() == before
    (merged / "notes.txt").unlink()
    for name in (MARKER, INPUTS_FILE):  # which an older version did not write
        (merged / name).unlink()
    fit_with_last(*parts, steps=3)
    assert (merged / "model.safetensors").read_bytes() != before
    source = json.loads((merged / SOURCE_FILE).read_text())
    assert source["sha256"] == hashlib.sha256((tmp_path / "saved" / "last.ckpt").read_bytes()).hexdigest()


def test_a_merged_folder_whose_checkpoint_the_user_removed_stays(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    merged = fit_with_last(make_backbone, make_data, make_trainer, tmp_path / "saved", steps=1)
    (tmp_path / "saved" / "last.ckpt").rename(tmp_path / "saved" / "best.ckpt")
    merged.rename(tmp_path / "saved" / "mine-merged")
    fit_with_last(make_backbone, make_data, make_trainer, tmp_path / "saved", steps=2)
    assert (tmp_path / "saved" / "mine-merged").is_dir()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="when must be one of checkpoint, best, last, fit_end, got 'never'"):
        MergeOnSave("never")
    with pytest.raises(ValueError, match="dirpath is for when='fit_end'"):
        MergeOnSave("best", dirpath="somewhere")
