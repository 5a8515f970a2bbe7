"""DoRALlama in a Trainer: it learns, resumes to the same losses, refuses another base, and merges to the same model."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import MakeBackbone, MakeData, MakeLlama, MakeTrainer, perturb_adapters
from transformers import LlamaForCausalLM

from dora_lightning import merge_adapters
from dora_lightning.training import WarmupDecay

PROMPTS = ["Question: is it cold or hot?\nAnswer:", "Please choose"]


class Losses(Callback):
    """Writes down the loss of every batch; stops with an exception at one of them, if asked to."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.kill_at:
            raise KilledError

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))


class KilledError(RuntimeError):
    pass


def trained(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


# Model ---------------------------------------------------------------------------------------------------------------


def test_outputs_are_those_of_the_base_at_step_0(make_backbone: MakeBackbone, untied_llama: Path) -> None:
    module = make_backbone(untied_llama, adapter={"target_modules": "all-linear"})
    module.configure_model()
    module.eval()
    ids = torch.arange(3, 50)[None]
    base = LlamaForCausalLM.from_pretrained(untied_llama)
    assert torch.equal(module.language_model(ids).logits, base(ids).logits)


def test_the_model_is_loaded_once(make_backbone: MakeBackbone) -> None:
    module = make_backbone()
    with pytest.raises(RuntimeError, match="not loaded yet"):
        _ = module.language_model
    module.configure_model()
    model = module.language_model
    module.configure_model()
    assert module.language_model is model
    assert model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_fp32_whatever_the_base(make_backbone: MakeBackbone, dtype: str) -> None:
    module = make_backbone(dtype=dtype)
    module.configure_model()
    assert module.language_model.model.embed_tokens.weight.dtype == getattr(torch, dtype)
    assert {p.dtype for p in trained(module).values()} == {torch.float32}


def test_gradient_checkpointing_gives_the_same_gradients(make_backbone: MakeBackbone, make_data: MakeData) -> None:
    data = make_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    gradients = []
    for checkpointing in (False, True):
        module = make_backbone(gradient_checkpointing=checkpointing)
        module.configure_model()
        perturb_adapters(module)
        calls: list[int] = []
        module.language_model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        module.loss(batch)[0].backward()
        assert len(calls) == (2 if checkpointing else 1)  # recomputed
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-8)


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_training_lowers_the_loss_in_every_precision(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, precision: str
) -> None:
    module, data = make_backbone(), make_data()
    trainer = make_trainer(max_epochs=3, precision=precision)
    before = trainer.validate(module, datamodule=data, verbose=False)[0]["val/loss"]
    trainer.fit(module, datamodule=data)
    after = trainer.callback_metrics["val/loss"]
    assert after < before - 1
    assert {p.dtype for p in trained(module).values()} == {torch.float32}
    assert module.language_model.model.embed_tokens.weight.dtype == (
        torch.bfloat16 if precision == "bf16-true" else torch.float32
    )


def test_the_base_does_not_change(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tiny_llama: Path
) -> None:
    module = make_backbone()
    make_trainer(max_steps=3).fit(module, datamodule=make_data())
    for name, weight in LlamaForCausalLM.from_pretrained(tiny_llama).named_parameters():
        ours = dict(module.language_model.named_parameters())
        assert torch.equal(ours.get(name, ours.get(name.replace(".weight", ".base_layer.weight"))), weight)


def test_nothing_trainable_is_an_error(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    module = make_backbone()
    module.configure_model()
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is trainable"):
        make_trainer().fit(module, datamodule=make_data())


def test_parameters_that_the_optimiser_lacks_are_an_error(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    module = make_backbone(optimizer=lambda groups: torch.optim.SGD(groups[1:], lr=0.1))
    with pytest.raises(ValueError, match=r"6 trainable parameters are in no optimiser group: .*magnitude"):
        make_trainer().fit(module, datamodule=make_data())


def test_a_target_that_matches_nothing_is_an_error(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    with pytest.raises(ValueError, match=r"'q_prj' matches no module\. Did you mean 'q_proj'"):
        make_trainer().fit(make_backbone(adapter={"target_modules": ["q_prj"]}), datamodule=make_data())


def test_plateau_scheduler_follows_the_validation_loss(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    # no improvement is large enough, so every validation halves the rate
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0, threshold=1e9)
    trainer = make_trainer(max_epochs=3, limit_train_batches=1)
    trainer.fit(make_backbone(lr=0.008, lr_scheduler=plateau), datamodule=make_data())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kill_at", "every", "options"),
    [
        (7, 3, {}),  # in the middle of the first epoch
        (15, 4, {}),  # of the second
        (17, 2, {"accumulate_grad_batches": 2}),
    ],
)
def test_a_killed_and_resumed_run_has_the_losses_of_an_uninterrupted_one(
    make_backbone: MakeBackbone,
    make_data: MakeData,
    make_trainer: MakeTrainer,
    tmp_path: Path,
    kill_at: int,
    every: int,
    options: dict[str, Any],
) -> None:
    def fit(losses: Losses, ckpt_path: Path | None = None) -> Any:
        torch.manual_seed(0 if ckpt_path is None else 1)  # a resumed process drops what the first would have dropped
        module = make_backbone(lr_scheduler=partial(WarmupDecay, warmup=3), adapter={"dropout": 0.1})
        saver = ModelCheckpoint(tmp_path / "saved", save_last=True, save_top_k=0, every_n_train_steps=every)
        trainer = make_trainer(max_epochs=2, callbacks=[losses, saver], **options)
        trainer.fit(module, datamodule=make_data(), ckpt_path=ckpt_path, weights_only=True)
        return module

    whole, killed, resumed = Losses(), Losses(kill_at), Losses()
    expected = trained(fit(whole))
    assert len(whole.seen) == 20
    (tmp_path / "saved" / "last.ckpt").unlink()
    with pytest.raises(KilledError):
        fit(killed)
    found = trained(fit(resumed, tmp_path / "saved" / "last.ckpt"))
    assert killed.seen == whole.seen[:kill_at]
    assert 0 < len(resumed.seen) < 20
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert len(killed.seen) + len(resumed.seen) >= 20
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture
def saved(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> tuple[Any, Path]:
    """A backbone that was trained for an epoch, and its checkpoint."""
    module, trainer = make_backbone(), make_trainer()
    trainer.fit(module, datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return module.eval(), tmp_path / "a.ckpt"


def test_load_from_checkpoint_gives_the_same_logits(saved: tuple[Any, Path]) -> None:
    module, path = saved
    loaded = type(module).load_from_checkpoint(path, weights_only=True).eval()
    ids = torch.arange(3, 50)[None]
    assert torch.equal(loaded.language_model(ids).logits, module.language_model(ids).logits)
    assert loaded.generate(PROMPTS, max_new_tokens=8) == module.generate(PROMPTS, max_new_tokens=8)


def test_another_base_is_refused(
    saved: tuple[Any, Path],
    make_backbone: MakeBackbone,
    make_llama: MakeLlama,
    make_data: MakeData,
    make_trainer: MakeTrainer,
) -> None:
    module, path = saved
    other = make_llama(seed=1)
    with pytest.raises(ValueError, match="trained on another base model"):
        type(module).load_from_checkpoint(path, model_name_or_path=str(other), weights_only=True)
    with pytest.raises(ValueError, match="trained on another base model"):
        make_trainer().fit(make_backbone(other), datamodule=make_data(), ckpt_path=path, weights_only=True)


def test_merging_keeps_logits_and_texts(saved: tuple[Any, Path]) -> None:
    module, _ = saved
    ids = torch.arange(3, 50)[None]
    logits = module.language_model(ids).logits
    texts = module.generate(PROMPTS, max_new_tokens=12, do_sample=False)
    merge_adapters(module.language_model, unload=True)
    torch.testing.assert_close(module.language_model(ids).logits, logits, rtol=0, atol=1e-4)
    assert module.generate(PROMPTS, max_new_tokens=12, do_sample=False) == texts


# Judging -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def task() -> Any:
    from tasks import CommonsenseQA

    return CommonsenseQA(judge="both", num_beams=2, max_new_tokens=6)


def test_test_after_fit_and_in_a_new_process_agree(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, task: Any, tmp_path: Path
) -> None:
    from lightning.pytorch.loggers import CSVLogger

    trainer = make_trainer(max_epochs=2, logger=CSVLogger(tmp_path, "", ""), log_every_n_steps=5)
    module, data = make_backbone(task=task), make_data()
    trainer.fit(module, datamodule=data)
    after_fit = trainer.test(module, datamodule=data, verbose=False)[0]
    records = (tmp_path / "test_predictions.jsonl").read_text()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = make_trainer(logger=CSVLogger(tmp_path, "", "fresh"))
    again = fresh.test(
        make_backbone(task=type(task)("both", 2, 6)),
        datamodule=make_data(),
        ckpt_path=tmp_path / "a.ckpt",
        verbose=False,
        weights_only=True,
    )[0]
    assert again == after_fit
    assert {f"test/{source}/ranking" for source in ("boolq", "ARC-Easy", "mean")} <= again.keys()
    assert (tmp_path / "fresh" / "test_predictions.jsonl").read_text() == records
    rows = [json.loads(line) for line in records.splitlines()]
    assert sorted(row["source"] for row in rows) == ["ARC-Easy"] * 4 + ["boolq"] * 5
    assert all(
        {"instruction", "answer", "output_pred", "pred", "flag", "log_likelihoods"} <= row.keys() for row in rows
    )


def test_testing_without_a_task_is_an_error(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    with pytest.raises(ValueError, match="testing needs a task"):
        make_trainer().test(make_backbone(), datamodule=make_data())


def test_predict_writes_what_it_returns(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer()
    module = make_backbone()
    batches = trainer.predict(module, datamodule=make_data())
    rows = [row for batch in batches for row in batch]
    written = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert written == [{**row, "untrained_adapter": True} for row in rows]
    assert len(rows) == 9
    assert rows[0].keys() == {"prompt", "source", "output"}
    trainer.predict(module, datamodule=make_data())
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 9


def test_the_task_may_be_judged_in_validation(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, task: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(num_sanity_val_steps=1)
    trainer.fit(make_backbone(task=task, judge_in_validation=True), datamodule=make_data())
    assert {"val/loss", "val/mean/generation", "val/mean/ranking"} <= trainer.callback_metrics.keys()
    assert len((tmp_path / "val_predictions.jsonl").read_text().splitlines()) == 8


def test_judging_in_validation_needs_a_task(make_backbone: MakeBackbone) -> None:
    with pytest.raises(ValueError, match="judge_in_validation needs a task"):
        make_backbone(judge_in_validation=True)


def test_validation_loss_weighs_tokens_not_batches(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    losses = [
        make_trainer().validate(make_backbone(), datamodule=make_data(eval_batch_size=size), verbose=False)[0][
            "val/loss"
        ]
        for size in (1, 3, 8)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
