"""DPO against the formula in float64, with the base model as the reference, and a run that learns to prefer."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MakeTrainer, perturb_adapters
from torch.optim import AdamW
from transformers import LlamaForCausalLM

from datamodules import IGNORE, PreferenceDataModule
from dora_lightning import AdapterConfig
from dora_lightning.backbones import DoRALlama, DoRALlamaDPO

BETA = 0.3


@pytest.fixture
def data(tiny_llama: Path, tmp_path: Path) -> PreferenceDataModule:
    rows = [
        {
            "prompt": f"is it {n} cold or hot?",
            "chosen": f" it is {n} hot",
            "rejected": f" the task {'is ' * (n % 5)}{n}",
        }
        for n in range(24)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    data = PreferenceDataModule(
        str(tiny_llama), str(tmp_path / "pairs.json"), val_size=8, template="none", batch_size=4, eval_batch_size=3
    )
    data.setup("fit")
    return data


def make(folder: Path, adapter: dict[str, Any] | None = None, lr: float = 0.01, **options: Any) -> DoRALlamaDPO:
    torch.manual_seed(0)
    config = {"rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]} | (adapter or {})
    return DoRALlamaDPO(str(folder), AdapterConfig(**config), partial(AdamW, lr=lr), beta=BETA, **options)


def log_likelihood(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Of one sequence alone, without padding, token by token in float64."""
    length = int((ids != 0).sum())
    logits = model(ids[None, :length]).logits[0].double()
    log_probs = logits.log_softmax(-1)
    return sum(float(log_probs[t - 1, ids[t]]) for t in range(1, length) if labels[t] != IGNORE)


@pytest.mark.parametrize("method", ["dora", "lora"])
@torch.no_grad()
def test_the_loss_is_the_formulas(tiny_llama: Path, data: PreferenceDataModule, method: str) -> None:
    module = make(tiny_llama, {"method": method})
    module.configure_model()
    perturb_adapters(module)
    base = LlamaForCausalLM.from_pretrained(tiny_llama).eval()
    batch = next(iter(data.train_dataloader()))
    loss, pairs = module.loss(batch)
    assert pairs == 4
    margins = []
    for place in range(4):
        rewards = []
        for row in (place, place + 4):
            ids, labels = batch["input_ids"][row], batch["labels"][row]
            # through the whole model, so that nothing of the code under test is in it
            ours = log_likelihood(module.language_model, ids, labels)
            rewards.append(BETA * (ours - log_likelihood(base, ids, labels)))
        margins.append(rewards[0] - rewards[1])
    assert float(loss) == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 4, abs=1e-5)
    assert module.scores(batch).margin.tolist() == pytest.approx(margins, abs=1e-4)
    assert max(map(abs, margins)) > 0.05


def test_an_untrained_adapter_prefers_nothing(tiny_llama: Path, data: PreferenceDataModule) -> None:
    module = make(tiny_llama)
    module.configure_model()
    batch = next(iter(data.train_dataloader()))
    loss, _ = module.loss(batch)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    # at a margin of 0, sigmoid(-0) = 1/2: the gradient is beta / 2 times that of the likelihoods' difference
    scores = module.scores(batch)
    module.zero_grad()
    (-(scores.margin / 2).mean()).backward()
    halves = [p.grad.clone() for p in module.parameters() if p.requires_grad]
    module.zero_grad()
    module.loss(batch)[0].backward()
    for expected, parameter in zip(halves, (p for p in module.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(parameter.grad, expected)
    assert any(half.abs().max() > 1e-4 for half in halves)


def test_the_reference_has_no_dropout_and_no_gradient(tiny_llama: Path, data: PreferenceDataModule) -> None:
    module = make(tiny_llama, {"dropout": 0.5})
    module.configure_model()
    perturb_adapters(module)
    batch = next(iter(data.train_dataloader()))
    base = LlamaForCausalLM.from_pretrained(tiny_llama).eval()
    seen: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: torch.Tensor) -> None:
        seen.append(output)

    module.language_model.model.norm.register_forward_hook(keep)
    module.loss(batch)
    with torch.no_grad():
        expected = base.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    torch.testing.assert_close(seen[0], expected)
    assert not seen[0].requires_grad
    assert seen[1].requires_grad
    assert not torch.allclose(seen[1], expected, atol=1e-3)


@pytest.mark.parametrize("method", ["dora", "lora", "vera", "dvora", "magnitude"])
def test_a_run_learns_to_prefer(
    tiny_llama: Path, data: PreferenceDataModule, make_trainer: MakeTrainer, method: str
) -> None:
    options: dict[str, Any] = {"method": method}
    module = make(tiny_llama, options if method != "magnitude" else {**options, "rank": AdapterConfig.rank}, lr=0.02)
    trainer = make_trainer(max_epochs=4, log_every_n_steps=1)
    trainer.fit(module, datamodule=data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["val/loss"] < math.log(2) - 0.1
    assert logged["val/accuracy"] == 1.0
    assert logged["val/margin"] == pytest.approx(logged["val/reward_chosen"] - logged["val/reward_rejected"], abs=1e-4)
    assert logged["train/margin"] > 0
    assert "val/perplexity" not in logged


def test_validation_weighs_pairs_alike(tiny_llama: Path, data: PreferenceDataModule, make_trainer: MakeTrainer) -> None:
    module = make(tiny_llama)
    module.configure_model()
    perturb_adapters(module)
    (logged,) = make_trainer().validate(module, datamodule=data, verbose=False)
    module.eval()
    with torch.no_grad():
        parts = [module.scores(batch).margin for batch in data.val_dataloader()]
    margins = torch.cat(parts)
    assert [len(part) for part in parts] == [3, 3, 2]
    assert logged["val/margin"] == pytest.approx(float(margins.mean()), abs=1e-5)
    assert logged["val/accuracy"] == pytest.approx(float((margins > 0).float().mean()))
    assert logged["val/loss"] == pytest.approx(float(-torch.nn.functional.logsigmoid(margins).mean()), abs=1e-5)


def test_a_checkpoint_brings_beta_and_the_adapter_back(
    tiny_llama: Path, data: PreferenceDataModule, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = make(tiny_llama)
    trainer = make_trainer(log_every_n_steps=1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "dpo.ckpt")
    loaded = DoRALlamaDPO.load_from_checkpoint(tmp_path / "dpo.ckpt", weights_only=True)
    assert loaded.beta == BETA
    # what merges and talks to a finished model knows nothing of preferences
    plain = DoRALlama.load_from_checkpoint(tmp_path / "dpo.ckpt", weights_only=True)
    assert plain.generate(["is it"], max_new_tokens=6) == module.eval().generate(["is it"], max_new_tokens=6)
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        assert torch.equal(loaded.eval().scores(batch).margin, module.eval().scores(batch).margin)


def test_what_leaves_no_reference_or_no_pairs_is_refused(tiny_llama: Path, data: PreferenceDataModule) -> None:
    with pytest.raises(ValueError, match="method: full trains the reference away"):
        DoRALlamaDPO(str(tiny_llama), AdapterConfig(method="full"))
    with pytest.raises(ValueError, match="beta must be a number greater than 0, found 0"):
        DoRALlamaDPO(str(tiny_llama), AdapterConfig(rank=4), beta=0.0)
    module = make(tiny_llama)
    module.configure_model()
    batch = next(iter(data.train_dataloader()))
    with pytest.raises(ValueError, match="expected two sequences for each of 4 samples"):
        module.loss({name: value[:4] for name, value in batch.items()})


@pytest.mark.filterwarnings("ignore:.*use of fork.*|.*multi-threaded.*")
@pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist=True")  # the metrics are synchronised already
def test_two_processes_follow_one(tiny_llama: Path, tmp_path: Path, make_trainer: MakeTrainer) -> None:
    rows = [{"prompt": f"is it {n}?", "chosen": f" it is {n}", "rejected": f" no {n}"} for n in range(16)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    results = []
    for batch_size, options in ((4, {}), (2, {"strategy": "ddp_fork", "devices": 2})):
        data = PreferenceDataModule(
            str(tiny_llama),
            str(tmp_path / "pairs.json"),
            val_file=str(tmp_path / "pairs.json"),
            template="none",
            batch_size=batch_size,
        )
        trainer = make_trainer(max_epochs=2, log_every_n_steps=1, **options)
        trainer.fit(make(tiny_llama, lr=0.003), datamodule=data)
        results.append({name: float(value) for name, value in trainer.callback_metrics.items() if "val/" in name})
    assert results[0].keys() == results[1].keys()
    assert results[1] == pytest.approx(results[0], abs=1e-4)
    assert results[0]["val/margin"] > 0.1
