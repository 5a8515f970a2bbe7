"""PeftLlama: PEFT's own losses, texts and log-likelihoods; AdaLoRA as in PEFT's loop; resuming; files PEFT reads."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from tiny import MakeData, MakeLlama, MakeTrainer, RunCLI
from torch.optim import AdamW
from transformers import AutoModelForCausalLM
from two_processes import fit_and_save, run_on_one_and_two

from dora_lightning.backbones import PeftLlama
from dora_lightning.backbones.peft_methods import TYPES
from dora_lightning.callbacks import MergeOnSave
from dora_lightning.training import WarmupDecay
from dora_lightning.training.adapter_checkpoint import read_adapter_checkpoint

LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
METHODS: dict[str, dict[str, Any]] = {
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "ADALORA": {"init_r": 4, "target_r": 2, "tinit": 3, "tfinal": 5, "deltaT": 2, "lora_dropout": 0.1, **LINEAR},
    "IA3": {},
    "LORA": {"r": 4, "use_dora": True, "lora_dropout": 0.1, **LINEAR},
    "LOHA": {"r": 4, **LINEAR},
    "LOKR": {"r": 4, **LINEAR},
    "OFT": {"oft_block_size": 8, **LINEAR},
}
pytestmark = [
    # names that PEFT knows and transformers 5.2x has changed
    pytest.mark.filterwarnings("ignore:`(is_gradient_checkpointing|past_key_values)` is deprecated:FutureWarning"),
    # what PEFT finds odd in its own files of AdaLoRA: ranks of 0, and the ranks' names, which are not LoRA's
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]
COMPARED = ["PREFIX_TUNING", "PROMPT_TUNING", "ADALORA", "IA3"]
PROMPTS = ["Question: is it cold or hot?\nAnswer:", "Please choose", "Question: is it cold or hot?\nanswer:", "is it"]
MakePeft = Callable[..., PeftLlama]


@pytest.fixture
def make_peft(tiny_llama: Path) -> MakePeft:
    """Makes a PeftLlama of a method, on the tiny LLaMA or on the folder that is given."""

    def make(kind: str, folder: Path | None = None, lr: float = 0.01, peft: Any = None, **options: Any) -> PeftLlama:
        options.setdefault("optimizer", partial(AdamW, lr=lr))
        torch.manual_seed(0)
        return PeftLlama(str(folder or tiny_llama), {"peft_type": kind, **METHODS[kind], **(peft or {})}, **options)

    return make


def loaded(module: PeftLlama) -> Any:
    """The PeftModel in evaluation mode, with adapters that do something."""
    module.configure_model()
    module.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.language_model


def batch_of(data: Any) -> dict[str, Any]:
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def tokens(module: PeftLlama, text: str) -> torch.Tensor:
    return torch.tensor([module.tokenizer(text)["input_ids"]])


def trained(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


# Losses, texts and rankings are PEFT's -------------------------------------------------------------------------------


def test_every_known_method_is_tested() -> None:
    assert set(TYPES) == set(METHODS)


@pytest.mark.parametrize("kind", TYPES)
def test_the_loss_is_that_of_pefts_own_forward_pass(make_peft: MakePeft, make_data: MakeData, kind: str) -> None:
    module = make_peft(kind, peft={"lora_dropout": 0.0} if "lora_dropout" in METHODS[kind] else {})
    model, batch = loaded(module), batch_of(make_data())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    assert 0 in inputs["attention_mask"]  # some rows are padded
    module.train()
    loss, count = module.loss(batch)
    assert count == int((inputs["labels"][:, 1:] != -100).sum())
    expected = model(**inputs).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])
    theirs = torch.autograd.grad(expected, [p for p in module.parameters() if p.requires_grad])
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
    with model.disable_adapter(), torch.no_grad():
        assert abs(float(model(**inputs).loss) - float(expected.detach())) > 1e-3


def test_a_batch_without_supervised_tokens_has_a_loss_of_zero(make_peft: MakePeft, make_data: MakeData) -> None:
    module, batch = make_peft("PREFIX_TUNING"), batch_of(make_data())
    module.configure_model()
    loss, count = module.loss({**batch, "labels": torch.full_like(batch["labels"], -100)})
    loss.backward()
    assert (float(loss.detach()), count) == (0.0, 0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("kind", ["ADALORA", "IA3"])  # of virtual tokens PEFT 0.21 loses the prefix, see the next tests
def test_texts_are_those_of_pefts_generate(make_peft: MakePeft, kind: str, options: dict[str, Any]) -> None:
    module = make_peft(kind)
    model = loaded(module)
    options = {"max_new_tokens": 6, "do_sample": False} | options
    expected = []
    for prompt in PROMPTS:  # one by one: nothing is padded
        ids = tokens(module, prompt)
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        expected.append(module.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert module.generate(PROMPTS, **options) == expected
    assert len(set(expected)) > 1


def beam_search(model: Any, ids: torch.Tensor, beams: int, steps: int) -> torch.Tensor:
    """Best continuation of exactly so many tokens, by PEFT's forward pass over whole sequences; 2 ends a text."""
    found = [(0.0, ids)]
    for _ in range(steps):
        grown = []
        for score, row in found:
            with torch.no_grad():
                log_probs = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -1].log_softmax(-1)
            log_probs[2] = -torch.inf
            values, best = log_probs.topk(beams)
            grown += [
                (score + float(v), torch.cat([row, b.view(1, 1)], dim=1)) for v, b in zip(values, best, strict=True)
            ]
        found = sorted(grown, key=lambda entry: -entry[0])[:beams]
    return found[0][1][0, ids.shape[1] :]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", [*COMPARED, "P_TUNING"])
def test_texts_follow_the_forward_pass_token_by_token(make_peft: MakePeft, kind: str, beams: int) -> None:
    module = make_peft(kind)
    model = loaded(module)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    expected = [
        module.tokenizer.decode(beam_search(model, tokens(module, prompt), beams, 5), skip_special_tokens=True)
        for prompt in PROMPTS
    ]
    assert module.generate(PROMPTS, **options) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("kind", COMPARED)
def test_rankings_are_those_of_a_loop_over_options(make_peft: MakePeft, kind: str) -> None:
    module = make_peft(kind)
    model = loaded(module)
    options = [[" true", " false", " it is hot"], [], [" answer1 answer2"], [" cold", " hot"]]
    found = module.rank(PROMPTS, options)
    assert [len(scores) for scores in found] == [3, 0, 1, 2]
    for prompt, texts, scores in zip(PROMPTS, options, found, strict=True):
        for text, score in zip(texts, scores, strict=True):
            ids, start = tokens(module, prompt + text), tokens(module, prompt).shape[1]
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            logits = logits[0, -ids.shape[1] :].double().log_softmax(-1)  # without virtual tokens
            expected = sum(float(logits[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))
            assert float(score) == pytest.approx(expected, abs=1e-3)
    assert [scores.tolist() for scores in module.rank(PROMPTS, [[]] * 4)] == [[], [], [], []]


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "ADALORA"])
def test_what_trains_is_fp32_on_a_bf16_base(make_peft: MakePeft, make_data: MakeData, kind: str) -> None:
    module = make_peft(kind, dtype="bfloat16")
    module.configure_model()
    assert {p.dtype for p in trained(module).values()} == {torch.float32}
    assert module.loss(batch_of(make_data()))[0].isfinite()


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "ADALORA"])
def test_recomputation_gives_the_same_gradients(make_peft: MakePeft, make_data: MakeData, kind: str) -> None:
    batch, gradients = batch_of(make_data()), []
    for checkpointing in (False, True):
        module = make_peft(kind, peft={"lora_dropout": 0.0} if kind == "ADALORA" else {})
        module.gradient_checkpointing = checkpointing
        loaded(module)
        module.train()
        calls: list[int] = []
        layer = module.language_model.get_base_model().model.layers[0].self_attn
        layer.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        module.loss(batch)[0].backward()
        assert len(calls) == (2 if checkpointing else 1)
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


# AdaLoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_adalora_trains_as_in_pefts_own_loop(
    make_peft: MakePeft, make_data: MakeData, make_trainer: MakeTrainer, accumulate: int
) -> None:
    peft = {"lora_dropout": 0.0, "tfinal": 3}
    # PEFT's loop takes the mean of the micro-batches' means
    module, data = make_peft("ADALORA", peft=peft, loss_mean="batches"), make_data()
    trainer = make_trainer(max_epochs=2, accumulate_grad_batches=accumulate)
    recorded = Losses()
    trainer.callbacks.append(recorded)
    trainer.fit(module, datamodule=data)
    steps = trainer.global_step
    assert steps == 20 // accumulate

    reference = make_peft("ADALORA", peft=peft)
    reference.configure_model()
    model: Any = reference.language_model
    model.peft_config["default"].total_step = steps
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        for batch in recorded.batches[step * accumulate : (step + 1) * accumulate]:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
            (model(**inputs).loss / accumulate).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    for name, value in trained(reference).items():
        torch.testing.assert_close(trained(module)[name], value, rtol=1e-3, atol=1e-5)
    pattern = module.language_model.peft_config["default"].rank_pattern
    assert pattern == model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) <= 2 * len(pattern)  # target_r on average
    zero = [int((p == 0).sum()) for name, p in module.named_parameters() if "lora_E" in name]
    assert sum(zero) >= 2 * len(pattern)


def test_adaloras_held_out_loss_has_no_penalty(make_peft: MakePeft, make_data: MakeData) -> None:
    module = make_peft("ADALORA", peft={"lora_dropout": 0.0})
    model, batch = loaded(module), batch_of(make_data())
    plain = module.loss(batch)[0]
    module.train()
    penalised = module.loss(batch)[0]
    grams = []
    for name, p in model.named_parameters():
        if "lora_A" in name:
            grams.append(p.double() @ p.double().T)
        elif "lora_B" in name:
            grams.append(p.double().T @ p.double())
    expected = 0.5 * sum(((gram - torch.eye(4)) ** 2).sum() ** 0.5 for gram in grams) / len(grams)
    assert float((penalised - plain).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_run_too_short_for_adaloras_schedule_is_an_error(
    make_peft: MakePeft, make_data: MakeData, make_trainer: MakeTrainer
) -> None:
    with pytest.raises(ValueError, match="no step to allocate ranks in: tinit 3 and tfinal 5 of 8 steps"):
        make_trainer(max_steps=8).fit(make_peft("ADALORA"), datamodule=make_data())


# Checkpoints ---------------------------------------------------------------------------------------------------------


class Losses(Callback):
    """Writes down every batch and its loss; stops with an exception at one of them, if asked to."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.seen: list[float] = []
        self.batches: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.kill_at:
            raise KilledError

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))
        self.batches.append(batch)


class KilledError(RuntimeError):
    pass


# AdaLoRA allocates ranks up to step 15, and keeps to them afterwards
@pytest.mark.parametrize(("kind", "kill_at"), [*((kind, 9) for kind in TYPES), ("ADALORA", 19)])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(
    make_peft: MakePeft, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path, kind: str, kill_at: int
) -> None:
    def fit(losses: Losses, ckpt_path: Path | None = None) -> PeftLlama:
        module = make_peft(kind, lr_scheduler=partial(WarmupDecay, warmup=3))
        if ckpt_path is not None:
            torch.manual_seed(1)  # another start, and other random numbers
        saver = ModelCheckpoint(tmp_path / "saved", save_last=True, save_top_k=0, every_n_train_steps=6)
        trainer = make_trainer(max_epochs=2, callbacks=[losses, saver], limit_val_batches=1)
        trainer.fit(module, datamodule=make_data(), ckpt_path=ckpt_path, weights_only=True)
        return module

    whole, killed, resumed = Losses(), Losses(kill_at), Losses()
    expected = fit(whole)
    (tmp_path / "saved" / "last.ckpt").unlink()
    with pytest.raises(KilledError):
        fit(killed)
    last = tmp_path / "saved" / "last.ckpt"
    found = fit(resumed, last)
    assert len(whole.seen) == 20
    assert killed.seen == whole.seen[:kill_at]
    assert resumed.seen == whole.seen[kill_at // 6 * 6 :]
    for name, value in trained(expected).items():
        assert torch.equal(trained(found)[name], value)
    saved = torch.load(last, weights_only=True)["state_dict"]
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(found.model_name_or_path).parameters())
    assert sum(tensor.numel() for tensor in saved.values()) < base
    assert not any(name.endswith(("embed_tokens.weight", "norm.weight", "base_layer.weight")) for name in saved)


@pytest.fixture
def saved(make_peft: MakePeft, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path) -> Path:
    """Checkpoint of a short run of prefix tuning."""
    trainer = make_trainer(max_steps=2)
    trainer.fit(make_peft("PREFIX_TUNING"), datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    return tmp_path / "some.ckpt"


def test_a_checkpoint_of_other_options_or_another_base_is_refused(
    make_peft: MakePeft, make_data: MakeData, make_trainer: MakeTrainer, make_llama: MakeLlama, saved: Path
) -> None:
    def resume(module: PeftLlama) -> None:
        make_trainer(max_steps=3).fit(module, datamodule=make_data(), ckpt_path=saved, weights_only=True)

    with pytest.raises(ValueError, match=r"other options of PEFT: num_virtual_tokens=3 \(here 4\)"):
        resume(make_peft("PREFIX_TUNING", peft={"num_virtual_tokens": 4}))
    with pytest.raises(ValueError, match="trained on another base model"):
        resume(make_peft("PREFIX_TUNING", make_llama(seed=1)))


def test_a_checkpoint_is_loaded_by_itself_and_never_merged(saved: Path, make_data: MakeData) -> None:
    module = PeftLlama.load_from_checkpoint(saved, weights_only=True)
    assert module.peft == {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}
    content = torch.load(saved, weights_only=True)
    assert "adapter" not in content["hyper_parameters"]
    for name, value in content["state_dict"].items():
        assert torch.equal(module.state_dict()[name], value)
    with pytest.raises(ValueError, match="no adapter checkpoint of dora-lightning"):
        read_adapter_checkpoint(saved)


@pytest.mark.parametrize("kind", TYPES)
def test_peft_reads_what_save_peft_writes(
    make_peft: MakePeft, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path, kind: str
) -> None:
    module, data = make_peft(kind), make_data()
    trainer = make_trainer(max_steps=12)
    trainer.fit(module, datamodule=data)
    module.save_peft(tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.glob("adapter*")) == ["adapter"]
    base = AutoModelForCausalLM.from_pretrained(module.model_name_or_path)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    module.eval()
    ids = tokens(module, PROMPTS[0])
    ours: Any = module.language_model
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(FileExistsError, match="adapter exists"):
        module.save_peft(tmp_path / "adapter")
    # the run could go on: masks are found by the names of the live parameters
    if kind == "ADALORA":
        assert all(".default" in name for name in ours.peft_config["default"].rank_pattern)


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({}, r"peft_type is None; it can be PREFIX_TUNING, PROMPT_TUNING"),
        ({"peft_type": "SERIES"}, r"peft_type is 'SERIES'; it can be PREFIX_TUNING"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_token": 3}, r"did you mean 'num_virtual_tokens'\? it can be enc"),
        ({"peft_type": "IA3", "task_type": "SEQ_CLS"}, r"no option 'task_type' for IA3"),
        ({"peft_type": "ADALORA", "init_r": 4, "target_r": 4}, r"init_r 4 must be above 4"),
        ({"peft_type": "ADALORA", "orth_reg_weight": -1}, r"peft: ADALORA: `orth_reg_weight` should be"),
    ],
)
def test_unknown_methods_options_and_values_are_errors(tiny_llama: Path, peft: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PeftLlama(str(tiny_llama), peft)


def test_a_missing_peft_names_the_extra(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'dora-lightning\[baselines\]'"):
        PeftLlama(str(tiny_llama), {"peft_type": "IA3"})


def test_what_cannot_go_with_it_is_refused(
    make_peft: MakePeft, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    data = make_data()
    with pytest.raises(ValueError, match="the callback MergeOnSave works on the adapters of dora-lightning"):
        make_trainer(callbacks=[MergeOnSave()]).fit(make_peft("IA3"), datamodule=data)
    with pytest.raises(ValueError, match="precision bf16-true would round what trains"):
        make_trainer(precision="bf16-true").fit(make_peft("IA3"), datamodule=data)
    with pytest.raises(ValueError, match="gradient_checkpointing: false"):
        make_peft("PREFIX_TUNING", gradient_checkpointing=True)
    module, batch = make_peft("PROMPT_TUNING"), batch_of(data)
    module.configure_model()
    with pytest.raises(ValueError, match="PROMPT_TUNING takes no packed rows; set data"):
        module.loss({**batch, "position_ids": torch.zeros_like(batch["input_ids"])})
    with pytest.raises(ValueError, match="reads text alone"):
        module.generate(["a"], {"pixel_values": torch.zeros(1)})


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COMPARED)
def test_a_config_of_dorallama_becomes_one_of_peftllama(
    run_cli: RunCLI, tiny_llama: Path, commonsense_folder: Path, tmp_path: Path, kind: str
) -> None:
    config = {
        "model": {
            "class_path": "dora_lightning.backbones.DoRALlama",
            "init_args": {
                "model_name_or_path": str(tiny_llama),
                "adapter": {"method": "dora", "rank": 4},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "task": {"class_path": "tasks.CommonsenseQA", "init_args": {"judge": "both", "max_new_tokens": 3}},
            },
        },
        "data": {
            "class_path": "datamodules.CommonsenseDataModule",
            "init_args": {"data_dir": str(commonsense_folder), "template": "plain", "val_size": 4, "batch_size": 8},
        },
        "seed_everything": 0,
        "trainer": {
            "max_steps": 12,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "default_root_dir": "runs",
        },
        "test_after": True,
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    cell = {"class_path": "dora_lightning.backbones.PeftLlama", "init_args": {"peft": {"peft_type": kind}}}
    cell["init_args"]["peft"] |= METHODS[kind]  # type: ignore[index,operator]
    (tmp_path / "cell.yaml").write_text(yaml.safe_dump({"model": cell}))
    run_cli("fit", "--config", "base.yaml", "--config", "cell.yaml")
    run = yaml.safe_load((tmp_path / "runs" / "version_0" / "config.yaml").read_text())
    assert "adapter" not in run["model"]["init_args"]
    assert run["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01
    result = yaml.safe_load((tmp_path / "runs" / "version_0" / "result.json").read_text())
    assert 0 <= result["after"]["test/mean/ranking"] <= 1


class MeanLosses(Callback):
    """Writes down the loss of every step, averaged over processes."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")))

    def written(self) -> dict[str, Any]:
        return {"losses": self.losses}


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "ADALORA"])
def test_two_processes_follow_one(tiny_llama: Path, commonsense_folder: Path, tmp_path: Path, kind: str) -> None:
    expected, _ = run_on_one_and_two(
        __file__, "ddp", tiny_llama, tmp_path, PEFT_TYPE=kind, DATA_DIR=str(commonsense_folder)
    )
    assert len(expected["losses"]) == 10
    assert expected["losses"][-1] < expected["losses"][0] - 0.3


def _fit(kind: str, model: str, folder: str, devices: str) -> None:
    from datamodules import CommonsenseDataModule

    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = METHODS[os.environ["PEFT_TYPE"]]
    if "lora_dropout" in options:
        options = {**options, "lora_dropout": 0.0, "tfinal": 3}  # processes drop what they like
    module = PeftLlama(model, {"peft_type": os.environ["PEFT_TYPE"], **options}, partial(AdamW, lr=0.05))
    # targets of one length, so that the mean over processes is the mean over tokens
    shapes: dict[str, Any] = {"train_tasks": ["ARC-Easy"], "template": "plain", "val_size": 4}
    data = CommonsenseDataModule(model, os.environ["DATA_DIR"], **shapes, batch_size=4 // int(devices))
    fit_and_save(kind, module, data, MeanLosses(), Path(folder), int(devices), epochs=2)


if __name__ == "__main__":
    _fit(*sys.argv[1:])
