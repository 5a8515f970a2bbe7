"""analyze: whatever was tuned and however it is stored, the numbers are those of the weights in float64."""

import json
import math
import socket
import subprocess
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from tiny import MakeBackbone, MakeLlama, MakeTrainer, RunCLI, perturb_adapters
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from dora_lightning import AdapterConfig, merge_adapters
from dora_lightning.adapters import adapter_layers
from dora_lightning.adapters.analysis import layer_change
from dora_lightning.analyzing import command
from dora_lightning.analyzing.command import analyze
from dora_lightning.analyzing.records import Record, read_records, write_records
from dora_lightning.analyzing.report import quick_check
from dora_lightning.backbones import DoRALlama
from dora_lightning.offline import merge

TARGETS = ["q_proj", "v_proj", "down_proj"]

# of PEFT under transformers 5
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def by_the_book(before: Tensor, after: Tensor) -> tuple[Any, Any]:
    old, new = before.double(), after.double()
    moved = (new.norm(dim=1) - old.norm(dim=1)).abs().mean()
    units = [nn.functional.normalize(matrix, dim=1) for matrix in (old, new)]
    return float(moved), float((units[1] - units[0]).square().sum(1).mean() / 2)


def numbers(folder: Path | str = "analysis") -> dict[str, Any]:
    return json.loads((Path(folder) / "analysis.json").read_text())


def moves(folder: Path | str = "analysis") -> dict[str, tuple[float, float]]:
    return {record["module"]: (record["delta_m"], record["delta_d"]) for record in numbers(folder)["records"]}


def check(found: dict[str, tuple[float, float]], before: nn.Module, after: nn.Module, names: list[str]) -> None:
    """The records are of these modules, and say what two models in memory say."""
    modules = {name for name, _ in before.named_modules() if name.endswith(tuple(names))}
    assert found.keys() == modules
    for name, moved in found.items():
        old, new = before.get_submodule(name), after.get_submodule(name)
        matrices = [module.weight.detach() for module in (old, new)]
        if isinstance(old, nn.Embedding) or type(old).__name__ == "Conv1D":
            matrices = [matrix.T for matrix in matrices]
        assert moved == pytest.approx(by_the_book(*matrices), rel=1e-5), name


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def save(make_backbone: MakeBackbone, make_trainer: MakeTrainer, here: Path) -> Any:
    """Saves a checkpoint of a perturbed adapter, and returns it with the model as it is, merged."""

    def make(step: int = 7, folder: Path | None = None, seed: int = 0, **adapter: Any) -> tuple[Path, nn.Module]:
        module = make_backbone(folder=folder, adapter={"target_modules": TARGETS} | adapter)
        module.configure_model()
        perturb_adapters(module, seed)
        trainer = make_trainer()
        trainer.strategy.connect(module)
        path = here / "checkpoints" / f"step={step}.ckpt"
        trainer.save_checkpoint(path)
        checkpoint = torch.load(path, weights_only=True)
        torch.save(checkpoint | {"global_step": step}, path)
        return path, merge_adapters(module.language_model, unload=True)

    return make


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("method", ["dora", "lora", "vera", "dvora", "magnitude"])
def test_an_adapter_checkpoint_knows_its_base(save: Any, method: str, tiny_llama: Path) -> None:
    options = {"rank": 16} if method == "magnitude" else {}  # of the fixture, which magnitude alone does not read
    path, merged = save(method=method, **options)
    analyze(str(path))
    assert {record["method"] for record in numbers()["records"]} == {method}
    assert numbers()["steps"] == [7]
    if method == "magnitude":
        assert {delta_d for _, delta_d in moves().values()} == {0.0}
    else:
        check(moves(), load(tiny_llama), merged, TARGETS)


@pytest.mark.parametrize("base", ["package:x @ file:///tmp/x.whl", "package:--requirement=F", "org/model"])
def test_the_base_that_a_peft_folder_names_is_never_fetched(
    here: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **_: Any) -> Any:
        raise AssertionError(f"called with {args}")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": base}
    tensors = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 32),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.zeros(32, 2),
    }
    Path("peft").mkdir()
    Path("peft/adapter_config.json").write_text(json.dumps(options))
    save_file(tensors, "peft/adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"^peft names '.*' as its base model, and no copy .* with --base$"):
        analyze("peft")


def test_first_values_that_came_from_the_weight(save: Any, tiny_llama: Path) -> None:
    path, merged = save(init="pissa")
    analyze(str(path))
    check(moves(), load(tiny_llama), merged, TARGETS)


def test_a_quantised_base_is_the_one_that_was_computed_with(
    make_llama: MakeLlama, make_trainer: MakeTrainer, here: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = make_llama(hidden_size=64, intermediate_size=64)
    module = DoRALlama(str(folder), AdapterConfig(rank=4, target_modules=TARGETS), quantization="nf4")
    module.configure_model()
    perturb_adapters(module)
    expected = {name: layer_change(layer) for name, layer in adapter_layers(module.language_model)}
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint("quantised.ckpt")
    analyze("quantised.ckpt")
    assert moves() == {name: pytest.approx(tuple(change), rel=1e-6) for name, change in expected.items()}


def test_full_fine_tuning_and_an_embedding(untied_llama: Path, here: Path) -> None:
    model = load(untied_llama)
    names = ["embed_tokens", "q_proj"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in (*names, "norm")):
                parameter.add_(1e-3 * torch.randn_like(parameter))
    model.save_pretrained(here / "tuned", max_shard_size="20KB")
    assert len(list((here / "tuned").glob("*.safetensors"))) > 1
    analyze(str(here / "tuned"), base=str(untied_llama))
    check(moves(), load(untied_llama), model, names)


def test_a_merged_folder_and_its_adapter_agree(save: Any, tiny_llama: Path, here: Path) -> None:
    path, merged = save()
    merge(str(path), "merged")
    analyze("merged", base=str(tiny_llama), output="of-folder")
    check(moves("of-folder"), load(tiny_llama), merged, TARGETS)
    analyze(str(path), output="of-adapter")
    assert moves("of-folder") == {name: pytest.approx(moved, rel=1e-4) for name, moved in moves("of-adapter").items()}


@pytest.mark.parametrize("kind", ["lora", "dora", "vera", "pissa"])
def test_what_peft_wrote(kind: str, tiny_llama: Path, here: Path) -> None:
    torch.manual_seed(0)
    before, model = load(tiny_llama), load(tiny_llama)
    targets = ["q_proj", "o_proj"]
    if kind == "vera":
        config: Any = peft.VeraConfig(r=4, target_modules=targets)
    else:
        options = {"init_lora_weights": "pissa"} if kind == "pissa" else {}
        config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, use_dora=kind == "dora", **options)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    wrapped.save_pretrained(here / "adapter")
    analyze("adapter")  # PEFT writes down the base
    check(moves(), before, wrapped.merge_and_unload(), targets)


def test_weights_that_are_stored_the_other_way_round(here: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained("gpt2")
    before, model = load("gpt2"), load("gpt2")  # type: ignore[arg-type]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn", "wte"], fan_in_fan_out=True))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(here / "adapter")
    tuned = wrapped.merge_and_unload()
    tuned.save_pretrained("tuned")
    for what in ("tuned", "adapter"):
        analyze(what, base="gpt2")
        check(moves(), before, tuned, ["c_attn", "wte"])


def test_several_checkpoints_are_several_steps(save: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step, seed in ((200, 1), (100, 2)):
        save(step=step, seed=seed, method="lora")
    (here / "checkpoints" / "last.ckpt").write_bytes((here / "checkpoints" / "step=200.ckpt").read_bytes())
    analyze(".")  # a run folder
    found = numbers(".")
    assert found["steps"] == [100, 200]
    assert [record["step"] for record in found["records"]] == [100] * 6 + [200] * 6
    points = torch.tensor(
        [(r["delta_d"], r["delta_m"]) for r in found["records"] if r["type"] == "q_proj"], dtype=torch.float64
    )
    assert found["types"]["q_proj"]["correlation"] == pytest.approx(float(torch.corrcoef(points.T)[0, 1]))
    assert found["types"]["q_proj"]["correlation_at_last"] is None  # of two layers
    assert (here / "learning_pattern.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "Learning pattern at step 200" in output
    assert "r, 2 steps" in output
    with pytest.raises(ValueError, match=r"are of step 200 .*analyse one run at a time"):
        analyze(["checkpoints/last.ckpt", "checkpoints/step=200.ckpt"])


def record(step: int, kind: str, layer: int, delta_m: float, delta_d: float, method: str = "lora") -> Record:
    return Record(step, f"layers.{layer}.{kind}", kind, layer, method, delta_m, delta_d)


def test_the_quick_check() -> None:
    together = [record(1, "q_proj", n, 1.0 + n, 0.1 + 0.1 * n) for n in range(4)]
    apart = [record(1, "q_proj", n, 5.0 - n, 0.1 + 0.1 * n) for n in range(4)]
    assert quick_check(together).dora_helps is True
    assert "above +0.3" in quick_check(together).reason
    assert quick_check(apart).dora_helps is False
    assert quick_check(apart).r == pytest.approx(-1.0)
    assert quick_check(together[:2]).dora_helps is None
    assert "at least 3 points, there are 2" in quick_check(together[:2]).reason
    of_dora = quick_check([record(1, "q_proj", n, 1.0 + n, 0.1, "dora") for n in range(4)])
    assert of_dora.dora_helps is None
    assert "read off a run of LoRA; this is of dora" in of_dora.reason
    # mlp modules whose direction moves a tenth as far, and whose magnitudes move as far, or not at all
    others = [record(1, "v_proj", n, 1.0 + n, 0.2 + 0.1 * n) for n in range(4)]
    still = [record(1, "up_proj", n, 1.0 + n, 0.02 + 0.01 * n) for n in range(4)]
    nothing = [record(1, "down_proj", n, 0.01, 0.002 + 0.001 * n) for n in range(4)]
    assert quick_check(together + others + still + nothing).magnitude_only == ["up_proj"]


def test_what_a_run_wrote_down_by_the_command(run_cli: RunCLI, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        record(s, k, n, s + n, 0.1 * s + 0.01 * n) for s in (1, 2) for k in ("q_proj", "up_proj") for n in (0, 1)
    ]
    write_records(here / "run" / "learning_pattern.jsonl", records)
    assert read_records(here / "run" / "learning_pattern.jsonl") == records
    run_cli("analyze", "run", "--modules", "[q_proj]")
    output = capsys.readouterr().out
    assert "q_proj" in output
    assert "up_proj" not in output
    assert f"Plot: {Path('run') / 'learning_pattern.png'}" in output
    assert {r["module"] for r in numbers("run")["records"]} == {"layers.0.q_proj", "layers.1.q_proj"}


def test_without_matplotlib_everything_else_comes(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "can_plot", lambda: False)
    write_records(here / "learning_pattern.jsonl", [record(1, "q_proj", 0, 1.0, math.ulp(1.0))])
    analyze("learning_pattern.jsonl")
    assert numbers(".")["types"]["q_proj"]["correlation"] is None
    assert "pip install 'dora-lightning[plots]'" in capsys.readouterr().out
    assert not (here / "learning_pattern.png").exists()


def test_bad_input_is_named(save: Any, here: Path, tiny_llama: Path, untied_llama: Path, make_llama: MakeLlama) -> None:
    path, _ = save()
    (here / "broken.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    (here / "cut.ckpt").write_bytes(path.read_bytes()[:1000])
    other = make_llama(seed=1)
    wider = make_llama(hidden_size=64)
    for arguments, message in (
        ({"tuned": str(path), "base": str(other)}, "trained on another base model"),
        ({"tuned": str(tiny_llama)}, "does not say what it was tuned from; give --base"),
        ({"tuned": str(tiny_llama), "base": str(tiny_llama)}, "none of the modules that are asked for differs"),
        ({"tuned": str(wider), "base": str(tiny_llama)}, "another base model, or a resized vocabulary"),
        ({"tuned": "broken.jsonl"}, r"broken.jsonl, line 1: expected a JSON object with step, module, type, layer"),
        ({"tuned": "cut.ckpt"}, "could not be read as a checkpoint"),
        ({"tuned": str(path), "modules": "("}, r"modules: '\(' is not a regular expression"),
        ({"tuned": []}, "nothing to analyse"),
    ):
        with pytest.raises(ValueError, match=message):
            analyze(**arguments)  # type: ignore[arg-type]
    for name in ("missing.ckpt", "missing.jsonl", "./missing"):
        with pytest.raises(FileNotFoundError, match="missing"):
            analyze(name, base=str(tiny_llama))
    assert not (here / "analysis").exists()
