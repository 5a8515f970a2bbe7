"""NaN is never trained on, saved, merged, scored or answered with, in any backbone."""

import itertools
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import MakeBackbone, MakeData, MakeTrainer
from tiny_llava import save_image, save_llava
from tiny_vl_bart import features, save_bart
from torch.optim import AdamW
from torch.utils.data import DataLoader

from dora_lightning import AdapterConfig
from dora_lightning.adapters.finite import NonFiniteError
from dora_lightning.backbones import DoRALlama, DoRALlamaDPO, DoRALlava, DoRAVLBart, PeftLlama
from dora_lightning.callbacks import MergeOnSave, ShardedTraining

QV = ["q_proj", "v_proj"]
# lightning 2.6 under torch 2.14; pytest.warns raises it anew
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


def poison(module: Any, at: int, gradients: bool = True) -> None:
    """Make the training loss of one micro-batch NaN, and its gradients or not."""
    loss, calls = module.loss, itertools.count()

    def poisoned(batch: dict[str, Any]) -> tuple[torch.Tensor, int]:
        own, tokens = loss(batch)
        if module.training and next(calls) == at:
            return (own * math.nan if gradients else own + math.nan), tokens
        return own, tokens

    module.loss = poisoned


def trained(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def set_nan(module: torch.nn.Module, end: str) -> None:
    parameter = next(p for n, p in module.named_parameters() if n.endswith(end))
    with torch.no_grad():
        parameter.view(-1)[0] = math.nan


class Weights(Callback):
    """Weights after each batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self.seen.append(trained(module))


# Training -----------------------------------------------------------------------------------------------------------


def test_a_poisoned_batch_stops_the_run_and_the_last_good_checkpoint_goes_on(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    clean = Weights()
    make_trainer(callbacks=[clean]).fit(make_backbone(), datamodule=make_data())
    module = make_backbone()
    poison(module, at=5)
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True, save_top_k=0, every_n_train_steps=2)
    trainer = make_trainer(callbacks=[saver, MergeOnSave("last")])
    with pytest.raises(NonFiniteError) as error:
        trainer.fit(module, datamodule=make_data())
    message = str(error.value)
    assert message.startswith("step 5 of epoch 0, learning rate 0.01: the loss of batch 5 (samples: ")
    assert "is nan; the step was not taken; try a lower learning rate" in message
    assert "\n" not in message
    # the step was not taken: the weights are those of the run without the poison
    for name, value in trained(module).items():
        assert torch.equal(value, clean.seen[4][name])
    last = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4
    assert (tmp_path / "saved" / "last-merged" / "config.json").is_file()
    resumed = make_backbone()
    again = make_trainer(callbacks=[ModelCheckpoint(tmp_path / "saved", save_top_k=0, every_n_train_steps=2)])
    again.fit(resumed, datamodule=make_data(), ckpt_path=tmp_path / "saved" / "last.ckpt", weights_only=True)
    for name, value in trained(resumed).items():
        assert torch.equal(value, clean.seen[9][name])


def test_skip_leaves_the_whole_step_out(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    module, seen = make_backbone(on_nonfinite="skip"), Weights()
    poison(module, at=5)
    with pytest.warns(UserWarning, match=r"the loss of batch 5 .* is nan; the step is left out .*, 1 so far"):
        make_trainer(callbacks=[seen], accumulate_grad_batches=2).fit(module, datamodule=make_data())
    assert module._steps.skipped == 1
    for name, value in seen.seen[5].items():  # the step of batches 4 and 5
        assert torch.equal(value, seen.seen[3][name])
    assert any(not torch.equal(value, seen.seen[5][name]) for name, value in seen.seen[7].items())
    assert all(value.isfinite().all() for value in seen.seen[-1].values())


def test_skip_does_not_go_on_for_ever(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    module = make_backbone(on_nonfinite="skip")
    loss = module.loss

    def infinite(batch: dict[str, Any]) -> tuple[torch.Tensor, int]:
        own, tokens = loss(batch)
        return own * math.inf, tokens

    module.loss = infinite
    trainer = make_trainer(max_epochs=3, limit_val_batches=0)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(NonFiniteError, match="20 steps in a row"):
        trainer.fit(module, datamodule=make_data())


def test_a_rate_that_blows_the_weights_up(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True, save_top_k=1, monitor="val/loss")
    trainer = make_trainer(callbacks=[saver, MergeOnSave("fit_end")])
    with pytest.raises(NonFiniteError, match=r"step 1 of epoch 0, learning rate 1e\+30: the loss of batch 1"):
        trainer.fit(make_backbone(lr=1e30), datamodule=make_data())
    assert not list(tmp_path.iterdir())


def test_an_end_in_numbers_that_blow_up_is_no_result(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True, save_top_k=1, monitor="val/loss")
    trainer = make_trainer(max_steps=1, limit_train_batches=1, callbacks=[saver, MergeOnSave("fit_end")])
    with pytest.raises(NonFiniteError, match=r"validation at step 1: the loss of batch 0 \(samples: .* is (nan|inf)"):
        trainer.fit(make_backbone(lr=1e30), datamodule=make_data())
    assert not list(tmp_path.iterdir())


def test_gradients_alone(make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer) -> None:
    class Spoils(Callback):
        def on_after_backward(self, trainer: Trainer, module: Any) -> None:
            if trainer.global_step == 2:
                set_nan_gradient(module)

    def set_nan_gradient(module: Any) -> None:
        grad = next(p.grad for n, p in module.named_parameters() if n.endswith("1.mlp.down_proj.lora_B"))
        grad[0, 0] = math.inf

    message = r"step 2 .*: the gradient of model\.model\.layers\.1\.mlp\.down_proj\.lora_B is not finite; the step was"
    with pytest.raises(NonFiniteError, match=message):
        make_trainer(callbacks=[Spoils()]).fit(make_backbone(), datamodule=make_data())


@pytest.mark.parametrize("choice", ["raise", "skip"])
def test_weights_that_are_nan_are_named(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, choice: str
) -> None:
    module = make_backbone(on_nonfinite=choice)
    module.configure_model()
    set_nan(module, "layers.1.mlp.up_proj.weight")
    with pytest.raises(NonFiniteError, match=r"weights are not finite already: model\.model\.layers\.1\.mlp\.up_proj"):
        make_trainer().fit(module, datamodule=make_data())


def test_no_checkpoint_of_nan_even_where_nobody_looks(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = make_backbone(on_nonfinite="ignore")
    poison(module, at=2)
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True, save_top_k=0, every_n_train_steps=2)
    trainer = make_trainer(callbacks=[saver], limit_val_batches=0)
    with pytest.raises(
        NonFiniteError,
        match=r"no checkpoint is saved of step 4: model\.model\.layers\.0\.self_attn\.q_proj\.lora_A \(and 17 more\)",
    ):
        trainer.fit(module, datamodule=make_data())
    assert torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)["global_step"] == 2


def make_other(kind: str, tiny_llama: Path, tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    """A backbone, and a batch for it."""
    optimizer, adapter = partial(AdamW, lr=0.01), AdapterConfig(rank=4, target_modules=QV)
    ids = torch.arange(3, 27).reshape(4, 6)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if kind == "llama":
        return DoRALlama(str(tiny_llama), adapter, optimizer), batch
    if kind == "dpo":
        return DoRALlamaDPO(str(tiny_llama), adapter, optimizer), batch | {"samples": ["a", "b"]}
    if kind == "adalora":
        peft = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "target_modules": QV}
        return PeftLlama(str(tiny_llama), peft, optimizer, on_nonfinite="skip"), batch
    if kind == "vl_bart":
        from dora_lightning.vl_bart import VLBartParts

        parts = VLBartParts(str(save_bart(tmp_path / "bart")), feature_dim=24)
        return DoRAVLBart(parts, adapter, optimizer), batch | {"vision": features(4, 1, 4, 24)}
    folder = save_llava(tmp_path / "llava")
    from transformers import AutoProcessor

    from dora_lightning.images import open_image

    images = [open_image(save_image(tmp_path / f"{seed}.png", seed)) for seed in range(2)]
    processor: Any = AutoProcessor.from_pretrained(folder)
    encoded = dict(processor(text=["<image> is it hot"] * 2, images=images, return_tensors="pt"))
    labels = encoded["input_ids"].masked_fill(encoded["input_ids"] == processor.image_token_id, -100)
    vision = {"pixel_values": encoded.pop("pixel_values")}
    names = ("input_ids", "attention_mask")
    batch = {name: encoded[name] for name in names} | {"labels": labels, "vision": vision}
    return DoRALlava(str(folder), adapter, optimizer), batch


@pytest.mark.parametrize("kind", ["llama", "dpo", "vl_bart", "llava"])
def test_every_backbone_stops(
    kind: str, tiny_llama: Path, tmp_path: Path, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    module, batch = make_other(kind, tiny_llama, tmp_path)
    poisoned = dict(batch)
    if "vision" in batch:  # as a broken image, or features, would be
        name, tensor = next((n, t) for n, t in batch["vision"].items() if t.is_floating_point())
        poisoned["vision"] = batch["vision"] | {name: tensor * math.nan}
    else:
        poison(module, at=1)
    loader = DataLoader([batch, poisoned, batch], batch_size=None)
    with pytest.raises(NonFiniteError, match=r"step 1 of epoch 0, learning rate 0.01: the loss of batch 1.* is nan"):
        make_trainer(limit_val_batches=0).fit(module, loader, loader)
    assert all(value.isfinite().all() for value in trained(module).values())
    # held out, it is no mean of the batches that are finite
    if "vision" in batch:
        loader = DataLoader([batch, poisoned, batch], batch_size=None)
        with pytest.raises(
            NonFiniteError, match=r"validation at step 0: the loss of batch 1 .*is nan; all weights are"
        ):
            make_trainer().validate(module, loader, verbose=False)


@pytest.mark.filterwarnings("ignore:`(is_gradient_checkpointing|past_key_values)` is deprecated:FutureWarning")
def test_a_step_that_is_left_out_allocates_no_ranks(
    tiny_llama: Path, tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    module, batch = make_other("adalora", tiny_llama, tmp_path)
    poison(module, at=1)
    loader = DataLoader([batch] * 4, batch_size=None)
    with pytest.warns(UserWarning, match="the step is left out"):
        make_trainer(limit_val_batches=0).fit(module, loader, loader)
    assert all(value.isfinite().all() for value in trained(module).values())
    set_nan(module, "lora_A.default")
    with pytest.raises(NonFiniteError, match=r"adapter is not written: .* holds NaN"):
        module.save_peft(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# Scores and texts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("judge", ["ranking", "generation"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_nan_model_gets_no_score(
    make_backbone: MakeBackbone,
    make_data: MakeData,
    make_trainer: MakeTrainer,
    judge: str,
    num_beams: int,
    tmp_path: Path,
) -> None:
    from tasks import CommonsenseQA

    module = make_backbone(task=CommonsenseQA(judge, max_new_tokens=3, num_beams=num_beams))
    module.configure_model()
    set_nan(module, "layers.0.mlp.down_proj.magnitude")
    wrong = {"ranking": r"log-likelihoods of the options .* no ranking", "generation": "scores of the next token"}
    with pytest.raises(NonFiniteError, match=wrong[judge]):
        make_trainer().test(module, datamodule=make_data(), verbose=False)
    assert not list(tmp_path.rglob("*predictions*"))


def test_sampling_from_nan_is_refused_too(make_backbone: MakeBackbone) -> None:
    module = make_backbone()
    module.configure_model()
    set_nan(module, "layers.0.mlp.down_proj.magnitude")
    with pytest.raises(NonFiniteError, match="for 'is it cold'"):
        module.generate(["is it cold", "or hot"], do_sample=True, max_new_tokens=2)


def test_a_score_that_chooses_checkpoints_is_a_number(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = make_backbone()
    module.held_out_metrics = lambda loss: {"perplexity": torch.tensor(math.inf)}
    saver = ModelCheckpoint(tmp_path / "saved", monitor="val/perplexity")
    with pytest.raises(NonFiniteError, match="val/perplexity is inf, and checkpoints are chosen by it"):
        make_trainer(callbacks=[saver]).fit(module, datamodule=make_data())
    assert not list(tmp_path.iterdir())


def test_validation_without_a_supervised_token(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    module = make_backbone()
    loss = module.loss
    module.loss = lambda batch: (loss(batch)[0] * 0, 0)
    with (
        pytest.warns(UserWarning, match="before the ``update`` method"),
        pytest.raises(ValueError, match="the validation data has no supervised token"),
    ):
        make_trainer().validate(module, datamodule=make_data(), verbose=False)


# Two processes ------------------------------------------------------------------------------------------------------


def fit_poisoned(kind: str, llama: str, data: str, folder: str) -> None:
    """One process of two has a loss that is NaN; each writes what it was told."""
    from datamodules import CommonsenseDataModule

    torch.manual_seed(0)
    module = DoRALlama(llama, AdapterConfig(rank=4, target_modules=QV), partial(AdamW, lr=0.01))
    samples = CommonsenseDataModule(
        llama, data, train_tasks=["ARC-Easy"], template="plain", val_size=4, batch_size=2, eval_batch_size=2
    )
    strategy: Any = "ddp" if kind == "ddp" else ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    saver = ModelCheckpoint(Path(folder) / "saved", save_last=True, save_top_k=0, every_n_train_steps=1)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=1,
        callbacks=[saver, *([ShardedTraining(base_dtype=None)] if kind == "fsdp2" else [])],
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if trainer.global_rank == 1:
        poison(module, at=3, gradients=False)  # else the other process would see it in its own
    try:
        trainer.fit(module, datamodule=samples)
        told = "no error"
    except NonFiniteError as error:
        told = str(error)
    Path(folder, f"rank{trainer.global_rank}.json").write_text(json.dumps(told))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_both_processes_stop(kind: str, tiny_llama: Path, commonsense_folder: Path, tmp_path: Path) -> None:
    import os

    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, __file__, kind, str(tiny_llama), str(commonsense_folder), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    assert told[0].startswith("step 3 of epoch 0, learning rate 0.01: the loss of batch 3 (samples: 2 of ARC-Easy;")
    last = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 3
    assert all(value.isfinite().all() for value in last["state_dict"].values())


if __name__ == "__main__":
    fit_poisoned(*sys.argv[1:])
