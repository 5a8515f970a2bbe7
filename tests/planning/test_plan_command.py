"""The verb: shipped configs are planned as they are, without data, network or device."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import MakeLlama, RunCLI

from dora_lightning.planning import command
from dora_lightning.planning.devices import DEVICES, device_named
from dora_lightning.planning.planner import largest

CONFIGS = Path(__file__).parents[2] / "configs"
COMMONSENSE = CONFIGS / "commonsense"
MATH = CONFIGS / "math"
GIB = 2**30


@pytest.fixture
def plan(run_cli: RunCLI, tmp_path: Path) -> Any:
    """Plans by the command, and gives what it writes."""

    def run(*args: object) -> dict[str, Any]:
        path = tmp_path / "plan.json"
        run_cli("plan", *args, "--json", path)
        return json.loads(path.read_text())

    return run


def files(*paths: Path) -> list[object]:
    return [part for path in paths for part in ("--config", path)]


def outcomes(plan: dict[str, Any]) -> dict[tuple[str, bool], dict[str, Any]]:
    return {(outcome["strategy"], outcome["checkpointing"]): outcome for outcome in plan["outcomes"]}


def test_seven_billion_on_eight(plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    settings = files(COMMONSENSE / "protocol.yaml", COMMONSENSE / "llama-7b-dora.yaml")
    made = plan(*settings, "--gpus", 8, "--memory", 80, "--samples", 170_300)
    assert made["parameters"] == {
        "base": 6_738_415_616,
        "trainable": 56_975_360,  # 0.84 % as published
        "groups": {"magnitude": 876_544, "lora_A": 28_049_408, "lora_B": 28_049_408},
    }
    assert made["batch"] == {"size": 16, "rows": 16, "tokens_per_row": 256, "supervised": 16 * 255, "accumulate": 1}
    found = outcomes(made)
    assert set(found) == {(strategy, recomputed) for strategy in ("DDP", "FSDP2") for recomputed in (False, True)}
    own = found["DDP", False]
    assert own["config"]
    assert own["fits"]
    assert own["memory"]["base"] == pytest.approx(2 * 6_738_415_616, rel=1e-6)
    assert own["memory"]["optimizer"] == pytest.approx(8 * 56_975_360, rel=1e-3)
    assert found["FSDP2", False]["memory"]["base"] == pytest.approx(2 * 6_738_415_616 / 8, rel=1e-3)
    assert found["DDP", True]["memory"]["activations"] < own["memory"]["activations"] / 20
    seconds = own["hours"] * 3600
    assert seconds == pytest.approx(3 * 170_300 * 256 / own["tokens_per_second"])
    assert own["tokens_per_second"] == pytest.approx(8 * 0.4 * 989e12 / made["operations_per_token"]["plain"], rel=0.05)
    shown = capsys.readouterr().out
    for words in ("56,975,360 (0.84%)", "saved activations", "The config fits as it is: DDP on 8 devices", "assumed"):
        assert words in shown


def test_four_bits_on_one_card(plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    settings = files(MATH / "protocol.yaml", MATH / "qdora-llama2-7b-dora.yaml")
    made = plan(*settings, "--gpus", 1, "--device", "RTX4090")
    found = outcomes(made)
    assert set(found) == {("one device", False), ("one device", True)}
    assert found["one device", True]["fits"]
    assert found["one device", True]["config"]
    assert not found["one device", False]["fits"]
    packed = 6_738_415_616 - 2 * 32000 * 4096
    assert found["one device", True]["memory"]["base"] == pytest.approx(packed * 0.5625 + 4 * 32000 * 4096, rel=0.001)
    assert made["samples"] == 100_000
    assert "cannot be sharded" in capsys.readouterr().out


@pytest.mark.slow
def test_405_billion_on_sixty_four(plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = CONFIGS / "instruction_tuning"
    settings = files(folder / "protocol.yaml", folder / "llama2-7b-dora.yaml")
    made = plan(*settings, "--shape", "llama3-405b", "--gpus", 64, "--memory", 80)
    assert made["parameters"]["base"] == 405_853_388_800
    found = outcomes(made)
    assert [key for key, outcome in found.items() if outcome["fits"]] == [("FSDP2", True)]
    assert made["fewest_devices"]["FSDP2, checkpointing"] > 10
    assert "data_parallel_size: 64" in capsys.readouterr().out


def tiny(folder: Path, tmp_path: Path, **changes: Any) -> Path:
    """A config of a tiny model."""
    model = {"model_name_or_path": str(folder), "adapter": {"rank": 4, "target_modules": ["q_proj"]}}
    config = {
        "model": {"class_path": "DoRALlama", "init_args": model},
        "data": {"class_path": "InstructionDataModule", "init_args": {"hub": "nowhere/nothing", "batch_size": 2}},
        "trainer": {"max_epochs": 1},
    }
    for path, value in changes.items():
        part: Any = config
        *parents, last = path.split("__")
        for name in parents:
            part = part.setdefault(name, {})
        part[last] = value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_settings_are_those_of_the_config(plan: Any, tiny_llama: Path, tmp_path: Path) -> None:
    sharded = {
        "class_path": "dora_lightning.callbacks.ShardedTraining",
        "init_args": {"activation_checkpointing": True},
    }
    strategy = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 4, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
    }
    config = tiny(
        tiny_llama,
        tmp_path,
        trainer__devices=2,
        trainer__num_nodes=2,
        trainer__strategy=strategy,
        trainer__callbacks=[sharded],
        trainer__accumulate_grad_batches=3,
        data__init_args__limit_train=100,
        model__init_args__optimizer={"class_path": "torch.optim.SGD"},
    )
    made = plan("--config", config, "--data.init_args.cutoff_len", 64, "--mean_tokens", 32)
    assert (made["devices"], made["samples"]) == (4, 100)
    assert made["batch"] == {"size": 2, "rows": 2, "tokens_per_row": 64, "supervised": 2 * 63, "accumulate": 3}
    own = next(outcome for outcome in made["outcomes"] if outcome["config"])
    assert (own["strategy"], own["checkpointing"], own["memory"]["optimizer"]) == ("FSDP2", True, 0)
    # ShardedTraining casts the frozen base of fp32 to bf16
    half = outcomes(made)["DDP", False]["memory"]
    assert half["base"] == pytest.approx(2 * made["parameters"]["base"], rel=0.01)
    assert half["gradients"] == 2 * half["adapters"]
    assert own["hours"] * 3600 == pytest.approx(100 * 32 / own["tokens_per_second"])


def test_samples_are_counted_in_the_file(plan: Any, tiny_llama: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n' * 12)
    config = tiny(tiny_llama, tmp_path, data__init_args__hub=None, data__init_args__train_file=str(rows))
    assert plan("--config", config, "--data.init_args.val_size", 2)["samples"] == 10


def test_a_file_that_cannot_be_written_is_found_first(
    run_cli: RunCLI, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "make_plan", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(SystemExit, match="is a folder; name a file to write"):
        run_cli("plan", "--config", tiny(tiny_llama, tmp_path), "--json", tmp_path)


def test_preference_tuning_reads_two_sequences(plan: Any, tiny_llama: Path, tmp_path: Path) -> None:
    plain = plan("--config", tiny(tiny_llama, tmp_path))
    made = plan("--config", tiny(tiny_llama, tmp_path, model__class_path="DoRALlamaDPO"))
    assert (plain["batch"]["rows"], made["batch"]["rows"]) == (2, 4)
    assert made["outcomes"][0]["tokens_per_second"] < 0.8 * plain["outcomes"][0]["tokens_per_second"]


def test_what_does_not_fit(
    plan: Any, make_llama: MakeLlama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 40 MB of weights, whose blocks are small beside them
    folder = make_llama(hidden_size=128, intermediate_size=512, num_hidden_layers=40, tied=False)
    settings = ["--config", tiny(folder, tmp_path), "--reserve", 0, "--memory", 0.02, "--tokens", 16]
    made = plan(*settings, "--gpus", 1)
    assert not any(outcome["fits"] for outcome in made["outcomes"])
    assert "does not fit on 1 device" in capsys.readouterr().out
    fewest = made["fewest_devices"]["FSDP2, checkpointing"]
    assert 2 <= fewest <= 16
    assert plan(*settings, "--gpus", fewest)["outcomes"][-1]["fits"]
    assert not plan(*settings, "--gpus", fewest - 1)["outcomes"][-1]["fits"]


def test_largest_batch_is_the_largest(plan: Any, tiny_llama: Path, tmp_path: Path) -> None:
    settings = ["--config", tiny(tiny_llama, tmp_path), "--reserve", 0, "--memory", 0.05]
    most = plan(*settings)["outcomes"][0]["largest_batch"]
    assert plan(*settings, "--batch_size", most)["outcomes"][0]["fits"]
    assert not plan(*settings, "--batch_size", most + 1)["outcomes"][0]["fits"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "2000"], "gpus must be at most 1024"),
        (["--utilization", "0"], "utilization must be a number"),
        (["--device", "abacus"], "device must be one of A100"),
        (["--shape", "llama9"], "shape must be one of"),
        (["--model.class_path", "DoRALlava"], "plan does not cover DoRALlava: its vision tower"),
        (["--model.init_args.adapter.detach_norm", "false"], "detach_norm: false"),
    ],
)
def test_refused(run_cli: RunCLI, tiny_llama: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run_cli("plan", "--config", tiny(tiny_llama, tmp_path), *options)


def test_devices() -> None:
    assert device_named("h100") is DEVICES["H100"]
    assert DEVICES["H100"].bandwidth(8) == 450e9
    assert DEVICES["H100"].bandwidth(16) == 400e9


def test_largest() -> None:
    for limit in (0, 1, 2, 3, 7, 8, 63, 64, 100):
        assert largest(lambda number, limit=limit: number <= limit, 64) == min(limit, 64)
